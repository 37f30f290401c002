"""Are maps of mutual information faithful? Insertion and deletion curves beside other ways to explain.

    python -m benchmarks.faithfulness fashion-mnist
    python -m benchmarks.faithfulness glyphs-100 --data data/glyphs-100

Test images at random, the class being the one the classifier answers. The probability is the posterior over the three
candidates that are best by full likelihood, at the calibration's temperature. Insertion begins with the blurred picture
and deletion ends with grey, as in RISE. Occlusion, ablation, LIME and SHAP, the last three being captum's, ask the same
posterior over 8 x 8 cells and cover them with the blurred picture. Finished images are kept in `--work`, so a stopped
run goes on. Writes `benchmarks/results/faithfulness-<model>.json` and `.md`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
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
from varlik.explanation.faithfulness import Score, curves, posterior_score
from varlik.explanation.information import Unconditional, explain, mixture_log_prob, others_log_prob
from varlik.explanation.maps import compose
from varlik.images import load_many
from varlik.tokens import TokenMaps

RESULTS = Path(__file__).parent / "results"
CANDIDATES = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=DATA_SETS)
    parser.add_argument("--data", type=Path, help="folder with the data set's files")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--steps", type=int, default=10)
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
        file = options.work / f"{options.model}-{index}-{options.steps}.json"
        if not file.exists():
            pixels = load_many(data.images[index : index + 1, ..., None], classifier.preprocessing)
            result = measure(classifier, pixels, temperature, options.steps)
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
    classifier: varlik.VARClassifier, pixels: Tensor, temperature: float, steps: int
) -> dict[str, tuple[float, float]]:
    """Insertion and deletion AUC of one image, (1, C, S, S), by way."""
    maps = classifier.tokenize_pixels(pixels)
    scores = classifier.log_likelihood(maps)[0]
    candidates = scores.topk(CANDIDATES).indices
    score, first = posterior_score(classifier, candidates, temperature), torch.zeros(1, dtype=torch.int64)
    importance = information_maps(classifier, maps, pixels.shape[-1], temperature)
    importance |= {name: way(score, pixels, first) for name, way in OTHERS.items()}
    found = {name: curves(score, pixels, values, first, steps) for name, values in importance.items()}
    return {name: (curve.insertion_auc.item(), curve.deletion_auc.item()) for name, curve in found.items()}


def information_maps(
    classifier: varlik.VARClassifier, maps: TokenMaps, size: int, temperature: float
) -> dict[str, Tensor]:
    """Our maps of one image, (1, size, size) each, by name."""
    others, mixture, null = (explain(classifier, maps, unconditional=kind) for kind in get_args(Unconditional))
    smoothed = explain(classifier, maps, others.target, others.rival, samples=4)
    log_prob = others.token_log_prob
    column = (others.labels == others.target.unsqueeze(1)).int().argmax(1)
    own = log_prob[:, column.item()]
    calibration = classifier.calibration
    weights = None if calibration is None or calibration.scale_weights is None else calibration.scale_weights.tolist()
    found = {
        "TMI, others": others.information,
        "TMI, others at the temperature": own - others_log_prob(log_prob, column, temperature),
        "TMI, others, positive part": others.information.clamp(min=0),
        "TMI, others, 4 samples": smoothed.information,
        "TMI, mixture": mixture.information,
        "TMI, mixture at the temperature": own - mixture_log_prob(log_prob, temperature),
        "TMI, null class": null.information,
        "contrast": others.contrast,
    }
    composed = {name: _map(values, others.patch_nums, size) for name, values in found.items()}
    composed |= {
        "TMI, others, nearest": _map(others.information, others.patch_nums, size, rule="nearest"),
        "TMI, others, scales weighted": _map(others.information, others.patch_nums, size, scale_weights=weights),
        "TMI, null class, as released": _map(null.information, null.patch_nums, size, rule="nearest").clamp(min=0),
    }
    return composed


def _map(values: Tensor, patch_nums: Sequence[int], size: int, **options: Any) -> Tensor:
    composed = compose(values.float(), patch_nums, **options)
    return F.interpolate(composed.unsqueeze(1), size=(size, size), mode="bilinear", align_corners=False)[:, 0]


OTHERS: dict[str, Callable[[Score, Tensor, Tensor], Tensor]] = {
    "random pixels": lambda score, pixels, column: comparisons.random_order(pixels),
    "random cells": lambda score, pixels, column: comparisons.random_order(pixels, cells=comparisons.CELLS),
    "centre": lambda score, pixels, column: comparisons.centre(pixels),
    "edges": lambda score, pixels, column: comparisons.edges(pixels),
    "occlusion": comparisons.occlusion,
    **{f"captum {method}": partial(comparisons.captum, method) for method in get_args(comparisons.Method)},
}


def summary(found: list[dict[str, tuple[float, float]]]) -> dict[str, dict[str, float]]:
    """Means and standard errors over images, by way."""
    report = {}
    for way in found[0]:
        values = torch.tensor([one[way] for one in found], dtype=torch.float64)
        means, errors = values.mean(0).tolist(), (values.std(0) / len(values) ** 0.5).tolist()
        names = ("insertion", "deletion", "insertion error", "deletion error")
        report[way] = dict(zip(names, (*means, *errors), strict=True))
    return report


def as_markdown(report: dict[str, Any]) -> str:
    """The report's table."""
    lines = [
        f"# Faithfulness of maps on {report['model']}",
        "",
        f"`python -m benchmarks.faithfulness {report['model']}`: {report['images']} test images, "
        f"{report['steps']} steps, temperature {report['temperature']:.2f}, {report['candidates']} candidates, "
        f"commit {report['machine']['commit']}. Means over images with their standard errors; "
        "insertion into the blurred picture, deletion down to grey.",
        "",
        "| way | insertion AUC, higher is better | deletion AUC, lower is better | difference |",
        "|---|---|---|---|",
    ]
    for way, x in report["auc"].items():
        insertion, deletion = x["insertion"], x["deletion"]
        lines.append(
            f"| {way} | {insertion:.3f} ± {x['insertion error']:.3f} | {deletion:.3f} ± {x['deletion error']:.3f} "
            f"| {insertion - deletion:.3f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
