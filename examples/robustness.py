"""Noise and JPEG on Fashion-MNIST test images: the generative classifier beside a discriminative network of its size.

    python -m examples.robustness --work runs/robustness --models fashion-mnist plain=runs/cca/plain

Five severities each, with the numbers of ImageNet-C (Hendrycks and Dietterich 2019): Gaussian noise of a standard
deviation of 0.08, 0.12, 0.18, 0.26 and 0.38 of the range, JPEG of a quality of 25, 18, 15, 10 and 7. The network is the
one of `examples/cwr.py`, trained here on clean images; nothing was trained on corrupted ones. Writes
`benchmarks/results/robustness-fashion-mnist.json` and `.md`.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

import varlik
from examples.cwr import CNN, LOOP, fit, pixels_of, predict
from examples.recipe import scoring_parameters
from examples.report import add_models, add_out, loaded, write
from varlik.datasets import LabelledImages, fashion_mnist
from varlik.evaluation.machine import machine
from varlik.images import load_many
from varlik.scoring.score_table import score_table

SIGMAS = (0.08, 0.12, 0.18, 0.26, 0.38)
QUALITIES = (25, 18, 15, 10, 7)
CNN_LOOP = replace(LOOP, steps=4_000, checkpoint_every=500)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="finished scores and the network")
    parser.add_argument("--data", type=Path, help="folder with the IDX files")
    add_models(parser)
    parser.add_argument("--images", type=int, default=500)
    add_out(parser)
    options = parser.parse_args()
    training, test = fashion_mnist("train", options.data), fashion_mnist("test", options.data)[: options.images]
    torch.manual_seed(0)
    network = CNN(len(training.class_names))
    fit(network, pixels_of(training), torch.from_numpy(training.labels), CNN_LOOP, options.work / "cnn")
    ways: dict[str, Callable[[LabelledImages], Tensor]] = {"network": lambda data: predict(network, pixels_of(data))}
    parameters = {"network": sum(p.numel() for p in network.parameters())}
    for name, classifier in loaded(options.models):
        ways[name] = partial(answers, classifier, folder=options.work / "scores")
        parameters[name] = scoring_parameters(classifier.var, classifier.vqvae)
    labels = torch.from_numpy(test.labels)
    kinds = {
        "clean": [test],
        "Gaussian noise": [noisy(test, sigma) for sigma in SIGMAS],
        "JPEG": [compressed(test, quality) for quality in QUALITIES],
    }
    found: dict[str, dict[str, list[float]]] = {name: {} for name in ways}
    for kind, versions in kinds.items():
        for data in track(versions, kind, console=Console(stderr=True)):
            for name, way in ways.items():
                found[name].setdefault(kind, []).append((way(data) == labels).double().mean().item())
    report = {
        "images": len(test),
        "parameters": parameters,
        "top1": found,
        "machine": asdict(machine(torch.device("cpu"))),
    }
    write(options.out, "robustness-fashion-mnist", report, as_markdown(report))


def noisy(data: LabelledImages, sigma: float) -> LabelledImages:
    """Gaussian noise on every pixel, cut off at black and white."""
    random = np.random.default_rng(0).standard_normal(data.images.shape)
    images = (data.images + 255 * sigma * random).round().clip(0, 255).astype(np.uint8)
    return LabelledImages(images, data.labels, data.class_names)


def compressed(data: LabelledImages, quality: int) -> LabelledImages:
    """Through a JPEG file of that quality and back."""
    images = []
    for image in data.images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        images.append(np.asarray(Image.open(file)))
    return LabelledImages(np.stack(images), data.labels, data.class_names)


def answers(classifier: varlik.VARClassifier, data: LabelledImages, folder: Path) -> Tensor:
    """The class of highest full likelihood of each image."""
    images = classifier.tokenize_pixels(load_many(data.images[..., None], classifier.preprocessing))
    return score_table(classifier.engine, images, classifier.labels(), folder).sum(2).argmax(1)


def as_markdown(report: dict[str, Any]) -> str:
    """One table of all severities."""
    lines = [
        "# Corrupted Fashion-MNIST",
        "",
        f"`python -m examples.robustness`, {report['images']} test images, commit {report['machine']['commit']}; top-1 "
        "by full likelihood. Parameters that scoring uses: "
        + ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in report["parameters"].items())
        + ".",
        "",
        "| | " + " | ".join(("clean", *(f"noise {s:g}" for s in SIGMAS), *(f"JPEG {q}" for q in QUALITIES))) + " |",
        "|---" * (2 + len(SIGMAS) + len(QUALITIES)) + "|",
    ]
    for name, kinds in report["top1"].items():
        values = [value for kind in ("clean", "Gaussian noise", "JPEG") for value in kinds[kind]]
        lines.append(f"| {name} | " + " | ".join(f"{value:.1%}" for value in values) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
