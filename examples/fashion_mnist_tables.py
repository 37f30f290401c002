"""The tables of the papers on Fashion-MNIST: smoothing with and without CCA, scales, samples and noise, cascades.

    python -m examples.fashion_mnist_tables --work runs/tables --models fashion-mnist plain=runs/cca/plain \
        plain-cca=runs/cca/plain-long-beta0.2-lambda1-confused

All tables but the first are about the first model. Scores are exact and kept in `--work`, so a stopped run goes on.
Smoothing averages samples of the four classes that are best without it. Writes
`benchmarks/results/fashion-mnist-tables.json` and `.md`.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

import varlik
from examples.report import add_models, add_out, loaded, write
from varlik.datasets import fashion_mnist
from varlik.evaluation.machine import machine
from varlik.images import load_many
from varlik.scoring.score_table import score_table
from varlik.smoothing import Smoothing, perturb
from varlik.tokens import TokenMaps

BEST = 4  # classes that smoothing looks at
SAMPLES = 10
SAMPLE_COUNTS = (1, 2, 4, 10, 20)
SIGMAS = (0.02, 0.05, 0.1, 0.2)
CASCADES = {
    "full": varlik.VARC,
    **{
        text: varlik.Cascade.parse(text)
        for text in (
            "50%:5,100%:3,100%x3:1",
            "30%:6,50%:4,70%:3,100%:2,100%x3:1",
            "race:0.5%",
            "screen:0.5%,race:0.5%",
        )
    },
    "fast": varlik.FAST,
}


@dataclass(frozen=True)
class Scored:
    """A model's scores of B test images: `clean` (B, N, K) of every class and scale."""

    classifier: varlik.VARClassifier
    images: TokenMaps
    labels: Tensor
    clean: Tensor
    folder: Path

    def samples(self, count: int, sigma: float, images: int) -> tuple[Tensor, Tensor]:
        """The best classes (b, BEST) of the first `images`, and their log-likelihoods (b, BEST, count) by sample."""
        best = self.clean[:images].sum(2).topk(BEST, dim=1).indices
        own = [self.clean[:images].sum(2).gather(1, best)]
        quantizer = self.classifier.vqvae.quantize
        for sample in track(range(1, count), f"samples, sigma {sigma:g}", console=Console(stderr=True)):
            noisy = perturb(quantizer, self.images[:images], sample, Smoothing(sigma))
            own.append(score_table(self.classifier.engine, noisy, best, self.folder).sum(2))
        return best, torch.stack(own, dim=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for finished scores")
    parser.add_argument("--data", type=Path, help="folder with the IDX files")
    add_models(parser)
    parser.add_argument("--images", type=int, default=10_000, help="test images for clean scores")
    parser.add_argument("--smoothed", type=int, default=2_000, help="test images for smoothing and cascades")
    parser.add_argument("--swept", type=int, default=600, help="test images for sweeps over samples and sigma")
    add_out(parser)
    options = parser.parse_args()
    for name in ("smoothed", "swept"):
        if not 0 < getattr(options, name) <= options.images:
            parser.error(f"--{name}: expected 1 to {options.images}, as --images, got {getattr(options, name)}")
    data = fashion_mnist("test", options.data)[: options.images]
    report: dict[str, Any] = {"images": len(data), "smoothed": options.smoothed, "swept": options.swept}
    report |= {"models": options.models, "table": {}}
    for i, (name, classifier) in enumerate(loaded(options.models)):
        scored = score(classifier, data, options.work / "scores")
        report["table"][name] = two_by_two(scored, options.smoothed)
        if i == 0:
            report["model"] = name
            report["scales"] = by_scale(scored)
            report["sweep"] = sweep(scored, options.swept)
            report["cascades"] = cascades(scored, options.smoothed)
    report["machine"] = asdict(machine(torch.device("cpu")))
    write(options.out, "fashion-mnist-tables", report, as_markdown(report))


def score(classifier: varlik.VARClassifier, data: Any, folder: Path) -> Scored:
    """Clean scores of all images."""
    images = classifier.tokenize_pixels(load_many(data.images[..., None], classifier.preprocessing))
    with Console(stderr=True).status("clean scores"):
        clean = score_table(classifier.engine, images, classifier.labels(), folder)
    return Scored(classifier, images, torch.from_numpy(data.labels), clean.double(), folder)


def top1(found: Tensor, labels: Tensor) -> float:
    """Share of `found` (B,) that is right."""
    return (found == labels[: len(found)]).double().mean().item()


def two_by_two(scored: Scored, smoothed: int) -> dict[str, float]:
    """Accuracy without smoothing on all images, without and with it on the first `smoothed`, and FLOPs an image."""
    plain = scored.clean.sum(2).argmax(1)
    best, samples = scored.samples(SAMPLES, 0.1, smoothed)
    averaged = best.gather(1, samples.mean(2).argmax(1, keepdim=True))[:, 0]
    labels = scored.labels[:smoothed]
    difference = (averaged == labels).double() - (plain[:smoothed] == labels).double()
    few = scored.images[:20]
    costs = [
        scored.classifier.classify(few, cascade=cascade).cost.flops.double().mean().item()
        for cascade in (varlik.VARC, f"100%:{BEST},100%x{SAMPLES}:1")
    ]
    return {
        "all images": top1(plain, scored.labels),
        "without": top1(plain[:smoothed], scored.labels),
        "with": top1(averaged, scored.labels),
        "gain error": difference.std().item() / smoothed**0.5,
        "flops without": costs[0],
        "flops with": costs[1],
    }


def by_scale(scored: Scored) -> list[float]:
    """Accuracy of the first k scales."""
    return [top1(found, scored.labels) for found in scored.clean.cumsum(2).argmax(1).T]


def sweep(scored: Scored, images: int) -> list[dict[str, Any]]:
    """Accuracy by samples and noise, averaged either way, and how many tokens the noise changes in each scale."""
    found = []
    for sigma in SIGMAS:
        best, samples = scored.samples(max(SAMPLE_COUNTS), sigma, images)
        rows: dict[str, Any] = {"sigma": sigma, "changed": changed(scored, sigma, images)}
        for count in SAMPLE_COUNTS:
            for rule in ("mean", "log-mean-exp"):
                averaged = Smoothing(sigma, aggregate=rule).combine(samples[..., :count])
                rows[f"{rule} {count}"] = top1(best.gather(1, averaged.argmax(1, keepdim=True))[:, 0], scored.labels)
        found.append(rows)
    return found


def changed(scored: Scored, sigma: float, images: int) -> list[float]:
    """Share of tokens of each scale that differ between a perturbed sample and the clean image."""
    clean = scored.images[:images]
    differs = perturb(scored.classifier.vqvae.quantize, clean, 1, Smoothing(sigma)).tokens != clean.tokens
    return [part.double().mean().item() for part in differs.split([p * p for p in clean.patch_nums], dim=1)]


def cascades(scored: Scored, images: int) -> dict[str, dict[str, float]]:
    """Accuracy, agreement with full likelihood and FLOPs an image of each cascade."""
    full = scored.clean[:images].sum(2).argmax(1)
    found = {}
    for name, cascade in track(CASCADES.items(), "cascades", console=Console(stderr=True)):
        if scored.classifier.calibration is None and any("race" in str(stage) for stage in cascade.stages):
            continue
        answers, flops = [], []
        for first in range(0, images, 100):
            prediction = scored.classifier.classify(scored.images[:images][first : first + 100], cascade=cascade)
            answers.append(prediction.classes)
            flops.append(prediction.cost.flops.double())
        chosen = torch.cat(answers)
        found[name] = {
            "top1": top1(chosen, scored.labels),
            "agreement": top1(chosen, full),
            "flops": torch.cat(flops).mean().item(),
        }
    return found


def error(images: int) -> str:
    """Standard error, in points, of an accuracy of 87 % on so many images."""
    return f"{100 * (0.87 * 0.13 / images) ** 0.5:.1f}"


def as_markdown(report: dict[str, Any]) -> str:
    """All tables."""
    full, smoothed, swept = report["images"], report["smoothed"], report["swept"]
    lines = [
        "# The papers' tables on Fashion-MNIST",
        "",
        f"`python -m examples.fashion_mnist_tables --models {' '.join(report['models'])} --images {full} --smoothed "
        f"{smoothed} --swept {swept}`, commit {report['machine']['commit']}. The first test images; one standard error "
        f"of an accuracy of 87 % is {error(full)} points for {full} of them, {error(smoothed)} for {smoothed} and "
        f"{error(swept)} for {swept}. GFLOPs of an image count a multiply-add as two.",
        "",
        f"Smoothing: {SAMPLES} samples, sigma 0.1, of the {BEST} best classes. The gain is in points, with the "
        "standard error of a paired difference.",
        "",
        f"| model | top-1, {full} images | {smoothed} images | smoothed | gain | GFLOPs | smoothed |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in report["table"].items():
        costs = f"{row['flops without'] / 1e9:.2f} | {row['flops with'] / 1e9:.2f}"
        gain = f"{100 * (row['with'] - row['without']):+.2f} ± {100 * row['gain error']:.2f}"
        accuracies = f"{row['all images']:.2%} | {row['without']:.2%} | {row['with']:.2%}"
        lines.append(f"| {name} | {accuracies} | {gain} | {costs} |")
    scales = " | ".join(f"{value:.2%}" for value in report["scales"])
    lines += [
        "",
        f"Of {report['model']}, by the number of scales, {full} images:",
        "",
        "| " + " | ".join(str(k + 1) for k in range(len(report["scales"]))) + " |",
        "|---" * len(report["scales"]) + "|",
        f"| {scales} |",
        "",
        f"By samples and noise, mean of log-likelihoods and, in brackets, log of the mean, {swept} images; and the "
        "share of tokens that the noise changes, by scale:",
        "",
        "| sigma | " + " | ".join(f"S = {count}" for count in SAMPLE_COUNTS) + " | tokens changed |",
        "|---" * (len(SAMPLE_COUNTS) + 2) + "|",
    ]
    for row in report["sweep"]:
        cells = [f"{row[f'mean {count}']:.2%} ({row[f'log-mean-exp {count}']:.2%})" for count in SAMPLE_COUNTS]
        shares = ", ".join(f"{share:.0%}" for share in row["changed"])
        lines.append(f"| {row['sigma']:g} | " + " | ".join(cells) + f" | {shares} |")
    lines += [
        "",
        f"Cascades, {smoothed} images:",
        "",
        "| cascade | top-1 | same answer as full likelihood | GFLOPs |",
        "|---|---|---|---|",
    ]
    for name, row in report["cascades"].items():
        lines.append(f"| `{name}` | {row['top1']:.2%} | {row['agreement']:.2%} | {row['flops'] / 1e9:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
