"""Are maps of mutual information faithful? Insertion and deletion curves beside other ways to explain.

    python -m benchmarks.faithfulness fashion-mnist
    python -m benchmarks.faithfulness glyphs-100 --data data/glyphs-100

Test images at random, the class being the one the classifier answers. The probability is the posterior over the three
candidates that are best by full likelihood, at the calibration's temperature. Insertion begins with the blurred picture
and deletion ends with grey. Occlusion, ablation, LIME and SHAP, the last three being captum's, ask the same
posterior over 8 x 8 cells and cover them with the blurred picture. What is done is kept in `--work`, so a stopped run
goes on. Writes `benchmarks/results/faithfulness-<model>.json` and `.md`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection
from dataclasses import asdict
from functools import cached_property, partial
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
from varlik.explanation.faithfulness import curves, posterior_score
from varlik.explanation.information import Explanation, explain, mixture_log_prob, others_log_prob
from varlik.explanation.maps import compose, heat
from varlik.images import load_many

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
    found = []
    for index in track(chosen.tolist(), "images", console=Console(stderr=True)):
        file = options.work / f"{options.model}-{index}-{options.steps}.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        if not known.keys() >= set(WAYS):
            pixels = load_many(data.images[index : index + 1, ..., None], classifier.preprocessing)
            known |= measure(Picture(classifier, pixels, index, temperature), options.steps, known)
            unfinished = file.with_suffix(".part")
            unfinished.write_text(json.dumps(known))
            unfinished.replace(file)
        found.append({way: known[way] for way in WAYS})
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


class Picture:
    """One picture, and what the ways look at; `seed` decides all that is drawn."""

    def __init__(self, classifier: varlik.VARClassifier, pixels: Tensor, seed: int, temperature: float):
        self.classifier, self.pixels, self.seed, self.temperature = classifier, pixels, seed, temperature
        self.maps = classifier.tokenize_pixels(pixels)
        candidates = classifier.log_likelihood(self.maps)[0].topk(CANDIDATES).indices
        self.score, self.first = posterior_score(classifier, candidates, temperature), torch.zeros(1, dtype=torch.int64)

    @cached_property
    def explanation(self) -> Explanation:
        """Against the other classes."""
        return explain(self.classifier, self.maps)

    @cached_property
    def null(self) -> Explanation:
        """Against the null class."""
        return explain(self.classifier, self.maps, unconditional="null")

    @cached_property
    def own(self) -> Tensor:
        """Token log-probs of the target, (1, L)."""
        return self.explanation.token_log_prob[:, self.column.item()]

    @cached_property
    def column(self) -> Tensor:
        """Where among the classes the target is, (1,)."""
        return (self.explanation.labels == self.explanation.target.unsqueeze(1)).int().argmax(1)

    def map_of(self, values: Tensor, **options: Any) -> Tensor:
        """Values of tokens as a map of the pixels."""
        composed = compose(values.float(), self.explanation.patch_nums, **options)
        size = self.pixels.shape[-1]
        return F.interpolate(composed.unsqueeze(1), size=(size, size), mode="bilinear", align_corners=False)[:, 0]

    def released(self) -> Tensor:
        """The released code's map: null class, nearest token, negative values cut off, then enlarged."""
        composed = compose(self.null.information, self.null.patch_nums, rule="nearest")
        return heat(composed, self.pixels.shape[-1])

    def weights(self) -> list[float]:
        """The calibration's weights of scales."""
        calibration = self.classifier.calibration
        if calibration is None or calibration.scale_weights is None:
            raise ValueError(f"{self.classifier.name} has no calibration with weights of scales")
        return calibration.scale_weights.tolist()

    def captum(self, method: comparisons.Method) -> Tensor:
        torch.manual_seed(self.seed)  # LIME and SHAP draw from the global generator
        return comparisons.captum(method, self.score, self.pixels, self.first)


WAYS: dict[str, Callable[[Picture], Tensor]] = {
    "others": lambda one: one.map_of(one.explanation.information),
    "others, at the temperature": lambda one: one.map_of(
        one.own - others_log_prob(one.explanation.token_log_prob, one.column, one.temperature)
    ),
    "others, positive part": lambda one: one.map_of(one.explanation.information.clamp(min=0)),
    "others, 4 samples": lambda one: one.map_of(
        explain(one.classifier, one.maps, one.explanation.target, samples=4).information
    ),
    "others, nearest": lambda one: one.map_of(one.explanation.information, rule="nearest"),
    "others, scales weighted": lambda one: one.map_of(one.explanation.information, scale_weights=one.weights()),
    "mixture": lambda one: one.map_of(one.own - mixture_log_prob(one.explanation.token_log_prob)),
    "mixture, at the temperature": lambda one: one.map_of(
        one.own - mixture_log_prob(one.explanation.token_log_prob, one.temperature)
    ),
    "null class": lambda one: one.map_of(one.null.information),
    "null class, as released": lambda one: one.released(),
    "contrast with the best rival": lambda one: one.map_of(one.explanation.contrast),
    "random pixels": lambda one: comparisons.random_order(one.pixels, one.seed),
    "random cells": lambda one: comparisons.random_order(one.pixels, one.seed, cells=comparisons.CELLS),
    "centre": lambda one: comparisons.centre(one.pixels),
    "edges": lambda one: comparisons.edges(one.pixels),
    "occlusion": lambda one: comparisons.occlusion(one.score, one.pixels, one.first),
    **{f"captum {method}": partial(Picture.captum, method=method) for method in get_args(comparisons.Method)},
}
"""By name, importance (1, S, S) of the pixels of a picture."""


def measure(one: Picture, steps: int, known: Collection[str] = ()) -> dict[str, tuple[float, float]]:
    """Insertion and deletion AUC of one picture, by way; those that are `known` are left out."""
    found = {}
    for name, way in WAYS.items():
        if name not in known:
            curve = curves(one.score, one.pixels, way(one), one.first, steps)
            found[name] = (curve.insertion_auc.item(), curve.deletion_auc.item())
    return found


def summary(found: list[dict[str, tuple[float, float]]]) -> dict[str, dict[str, float]]:
    """Means and standard errors over images, by way."""
    report = {}
    for way in found[0]:
        both = torch.tensor([one[way] for one in found], dtype=torch.float64)
        values = torch.cat((both, both[:, :1] - both[:, 1:]), dim=1)
        errors = values.std(0, correction=min(1, len(values) - 1)) / len(values) ** 0.5
        names = ("insertion", "deletion", "difference")
        report[way] = dict(zip(names, values.mean(0).tolist(), strict=True))
        report[way] |= {f"{name} error": error for name, error in zip(names, errors.tolist(), strict=True)}
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
            f"| {x['difference']:.3f} ± {x['difference error']:.3f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
