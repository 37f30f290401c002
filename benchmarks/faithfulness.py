"""Are maps of mutual information faithful? Insertion and deletion curves beside other ways to explain.

    python -m benchmarks.faithfulness fashion-mnist
    python -m benchmarks.faithfulness glyphs-100 --data data/glyphs-100

Test images at random, the class being the one the classifier answers. The probability is the posterior over the ten
candidates that are best by full likelihood, at the calibration's temperature. LIME, SHAP and ablation are captum's, on
the same posterior, over 8 x 8 cells. Finished images are kept in `--work`, so a stopped run goes on. Writes
`benchmarks/results/faithfulness-<model>.json` and `.md`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

import varlik
from varlik.datasets import DATA_SETS
from varlik.evaluation.machine import machine
from varlik.explanation import comparisons
from varlik.explanation.faithfulness import Baseline, Score, curves, posterior_score
from varlik.explanation.information import Explanation, explain
from varlik.explanation.maps import compose
from varlik.images import load_many
from varlik.tokens import TokenMaps

RESULTS = Path(__file__).parent / "results"
CANDIDATES = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=DATA_SETS)
    parser.add_argument("--data", type=Path, help="folder with the data set's files")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--baselines", nargs="+", choices=get_args(Baseline), default=list(get_args(Baseline)))
    parser.add_argument("--work", type=Path, required=True, help="folder for finished images")
    options = parser.parse_args()
    classifier = varlik.load(options.model, device="cpu")
    calibration = classifier.calibration
    if calibration is None or calibration.temperature is None:
        raise SystemExit(f"{options.model} has no calibration with a temperature")
    temperature = float(calibration.temperature[-1])
    data = DATA_SETS[options.model]("test", options.data)
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[: options.images]
    options.work.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    for index in track(chosen.tolist(), "images", console=Console(stderr=True)):
        file = options.work / f"{options.model}-{index}-{options.steps}-{'-'.join(options.baselines)}.json"
        if not file.exists():
            pixels = load_many(data.images[index : index + 1, ..., None], classifier.preprocessing)
            result = measure(classifier, pixels, temperature, options.steps, options.baselines)
            partial = file.with_suffix(".part")
            partial.write_text(json.dumps(result))
            partial.replace(file)
        found.append(json.loads(file.read_text()))
    report = {
        "model": options.model,
        "machine": asdict(machine(classifier.device)),
        "images": len(found),
        "steps": options.steps,
        "temperature": temperature,
        "candidates": CANDIDATES,
        "auc": summary(found),
    }
    path = RESULTS / f"faithfulness-{options.model}"
    RESULTS.mkdir(exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    text = as_markdown(report)
    path.with_suffix(".md").write_text(text)
    print(text)


def measure(
    classifier: varlik.VARClassifier, pixels: Tensor, temperature: float, steps: int, baselines: list[Baseline]
) -> dict[str, dict[str, list[float]]]:
    """Insertion and deletion AUC of one image, (1, C, S, S), by baseline and way."""
    maps = classifier.tokenize_pixels(pixels)
    scores = classifier.log_likelihood(maps)[0]
    candidates = scores.topk(min(CANDIDATES, len(scores))).indices
    score, first = posterior_score(classifier, candidates, temperature), torch.zeros(1, dtype=torch.int64)
    ours = information_maps(classifier, maps, pixels.shape[-1])
    found: dict[str, dict[str, list[float]]] = {}
    for baseline in baselines:
        ways = {**ours, **{name: way(score, pixels, first, baseline) for name, way in OTHERS.items()}}
        both = {name: curves(score, pixels, importance, first, steps, baseline) for name, importance in ways.items()}
        found[baseline] = {name: [c.insertion_auc.item(), c.deletion_auc.item()] for name, c in both.items()}
    return found


def information_maps(classifier: varlik.VARClassifier, maps: TokenMaps, size: int) -> dict[str, Tensor]:
    """Our maps of one image, (1, size, size) each, by name."""
    mixture = explain(classifier, maps)
    null = explain(classifier, maps, unconditional="null")
    calibration = classifier.calibration
    weights = None if calibration is None or calibration.scale_weights is None else calibration.scale_weights.tolist()
    return {
        "TMI, mixture": _map(mixture, mixture.information, size),
        "TMI, null class": _map(null, null.information, size),
        "TMI, null class, as released": _map(null, null.information, size, rule="nearest").clamp(min=0),
        "TMI, mixture, scales weighted": _map(mixture, mixture.information, size, scale_weights=weights),
        "contrast": _map(mixture, mixture.contrast, size),
        "contrast, nearest": _map(mixture, mixture.contrast, size, rule="nearest"),
        "contrast, scales weighted": _map(mixture, mixture.contrast, size, scale_weights=weights),
        "contrast, positive part": _map(mixture, mixture.contrast, size).clamp(min=0),
    }


def _map(explanation: Explanation, values: Tensor, size: int, **options: Any) -> Tensor:
    composed = compose(values, explanation.patch_nums, **options)
    return F.interpolate(composed.unsqueeze(1), size=(size, size), mode="bilinear", align_corners=False)[:, 0]


OTHERS: dict[str, Callable[[Score, Tensor, Tensor, Baseline], Tensor]] = {
    "random": lambda score, pixels, column, baseline: comparisons.random_order(pixels),
    "centre": lambda score, pixels, column, baseline: comparisons.centre(pixels),
    "edges": lambda score, pixels, column, baseline: comparisons.edges(pixels),
    "occlusion": comparisons.occlusion,
    **{f"captum {method}": partial(comparisons.captum, method) for method in get_args(comparisons.Method)},
}


def summary(found: list[dict[str, dict[str, list[float]]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Means and standard errors over images, by baseline and way."""
    report: dict[str, dict[str, dict[str, float]]] = {}
    for baseline in found[0]:
        report[baseline] = {}
        for way in found[0][baseline]:
            values = torch.tensor([one[baseline][way] for one in found], dtype=torch.float64)
            means, errors = values.mean(0).tolist(), (values.std(0) / len(values) ** 0.5).tolist()
            names = ("insertion", "deletion", "insertion error", "deletion error")
            report[baseline][way] = dict(zip(names, (*means, *errors), strict=True))
    return report


def as_markdown(report: dict[str, Any]) -> str:
    """The report's tables."""
    lines = [
        f"# Faithfulness of maps on {report['model']}",
        "",
        f"`python -m benchmarks.faithfulness {report['model']}`: {report['images']} test images, "
        f"{report['steps']} steps, temperature {report['temperature']:.2f}, {report['candidates']} candidates, "
        f"commit {report['machine']['commit']}",
    ]
    for baseline, ways in report["auc"].items():
        lines += [
            "",
            f"Baseline {baseline}:",
            "",
            "| way | insertion AUC, higher is better | deletion AUC |",
            "|---|---|---|",
        ]
        lines += [
            f"| {way} | {x['insertion']:.3f} ± {x['insertion error']:.3f} "
            f"| {x['deletion']:.3f} ± {x['deletion error']:.3f} |"
            for way, x in ways.items()
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
