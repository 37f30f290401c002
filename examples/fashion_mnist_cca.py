"""CCA on Fashion-MNIST: which beta and lambda, against more training by likelihood alone, from two models.

    python -m examples.fashion_mnist_cca --work runs/cca          # about four hours of one CPU core
    python -m examples.fashion_mnist_cca --work runs/cca --only plain-long-control    # that model alone, no figures

The two models are `plain`, trained here by likelihood alone on the bundled model's tokens, and the bundled
`fashion-mnist`, whose training ended with a term that tells classes apart. Short runs from `plain` compare many
variants on held-out images, long ones a few, with the optimisers and rates of that last stage of the bundled model; the
best of these is used on both models, from `plain` with three seeds. Models go to folders in `--work`, figures to
`benchmarks/results/fashion-mnist-cca.json` and `.md`. What is done is kept in `--work` by name and a killed run goes on
where it was, so settings that are changed here need another folder.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

import varlik
from examples import recipe
from examples.report import add_out, write
from examples.train_fashion_mnist import CONTRAST_LOOP, PREPROCESSING, VAR_CONFIG, VAR_LOOP
from varlik.datasets import fashion_mnist
from varlik.evaluation.machine import machine
from varlik.models import checkpoints
from varlik.models.var import VAR
from varlik.models.weights import digest
from varlik.training.cca import PRESETS, CCAConfig, accuracy, confusion, train_cca
from varlik.training.data import TrainingTokens
from varlik.training.likelihood import log_likelihood
from varlik.training.loop import LoopConfig, Part, train
from varlik.training.metrics import Metrics
from varlik.training.var import drop_labels, feature_maps, train_var

PLAIN_LOOP = replace(VAR_LOOP, steps=5_250, stop=0)
SHORT_LOOP = replace(PRESETS["small"].loop, steps=250, batch_size=16, warmup=20)
LONG_LOOP = replace(CONTRAST_LOOP, steps=1_500, stop=0)


@dataclass(frozen=True)
class Variant:
    """A way to fine-tune: `confused` negatives are drawn as often as classes are mistaken, others are rolled labels.

    `learning_rate`: another one than the loop's.
    """

    beta: float
    weight: float = 1.0
    confused: bool = False
    learning_rate: float | None = None

    @property
    def config(self) -> CCAConfig:
        return CCAConfig(self.beta, self.weight)

    def __str__(self) -> str:
        negatives = ", confused negatives" if self.confused else ""
        rate = f", rate {self.learning_rate:g}" if self.learning_rate else ""
        return f"beta {self.beta:g}, lambda {self.weight:g}{rate}{negatives}"

    @property
    def folder(self) -> str:
        rate = f"-rate{self.learning_rate:g}" if self.learning_rate else ""
        return f"beta{self.beta:g}-lambda{self.weight:g}{'-confused' if self.confused else ''}{rate}"

    def loop(self, usual: LoopConfig) -> LoopConfig:
        return replace(usual, learning_rate=self.learning_rate or usual.learning_rate)


SHORT = (
    Variant(0.02),
    Variant(0.05),
    Variant(0.2),
    Variant(0.05, 0.3),
    Variant(0.05, 4.0),
    Variant(0.2, learning_rate=1e-3),
    Variant(0.2, confused=True, learning_rate=1e-3),
)
LONG = (Variant(0.2, confused=True), Variant(1.0, confused=True))
COURSE = ("decided", "log_ratio", "negative_log_ratio")  # of a run's metrics
CONFUSION_IMAGES = 1_000  # of the training ones
SEARCH_IMAGES = 1_500  # of the held-out ones, for comparing variants
# Of the final runs, for the order of images, negatives and labels that are left out; the first one chose the variant.
SEEDS = {"plain": (LONG_LOOP.seed, 2, 3), "fashion-mnist": (LONG_LOOP.seed,)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="checkpoints, metrics and models")
    parser.add_argument("--data", type=Path, help="folder with the IDX files")
    parser.add_argument("--only", metavar="NAME", help="make that model, a folder in --work, and stop")
    parser.add_argument("--eager", action="store_true", help="do not compile the training step")
    add_out(parser)
    options = parser.parse_args()
    bundled = varlik.load("fashion-mnist", device="cpu")
    training, held_out = (tokens(bundled, split, options.data) for split in ("train", "held-out"))
    some = held_out.of_rows(torch.arange(SEARCH_IMAGES))
    rest = held_out.of_rows(torch.arange(SEARCH_IMAGES, len(held_out)))  # take no part in any choice
    runs = Runs(options.work, bundled, training, compiled=not options.eager)
    if options.only:
        runs.model(options.only)
        return
    search, unseen = partial(runs.accuracy, "search", some), partial(runs.accuracy, "unseen", rest)
    short = {
        "plain": search("plain"),
        "plain, more likelihood": search("plain-short-control"),
        **{f"plain, CCA, {variant}": search(f"plain-short-{variant.folder}") for variant in SHORT},
    }
    found = {variant: search(f"plain-long-{variant.folder}") for variant in LONG}
    long = {
        "plain, more likelihood": search("plain-long-control"),
        **{f"plain, CCA, {variant}": value for variant, value in found.items()},
    }
    best = max(found, key=lambda variant: found[variant])
    final: dict[str, list[float]] = {}
    for base, seeds in SEEDS.items():
        final[base] = [unseen(base)]
        for what, folder in (("more likelihood", "control"), ("CCA", best.folder)):
            others = [f"-seed{seed}" for seed in seeds[1:]]
            final[f"{base}, {what}"] = [unseen(f"{base}-long-{folder}{seed}") for seed in ("", *others)]
    report = {"short": short, "long": long, "best": str(best), "final": final}
    report["course"] = {
        base: course(options.work / f"{base}-long-{best.folder}-run" / "metrics.jsonl") for base in SEEDS
    }
    report["machine"] = asdict(machine(bundled.device))
    write(options.out, "fashion-mnist-cca", report, as_markdown(report))


@dataclass(frozen=True)
class Runs:
    """Models by name, each made once and kept in a folder of that name in `work`.

    "plain" and "fashion-mnist", and what is made of them: "BASE-short-..." and "BASE-long-..." followed by "control" or
    a variant's folder, and by "-seedN" for another seed than the loop's.
    """

    work: Path
    bundled: varlik.VARClassifier
    training: TrainingTokens
    compiled: bool

    def model(self, name: str) -> VAR:
        if name == "fashion-mnist":
            return varlik.load(name, device="cpu").var
        folder = self.work / name
        if not all((folder / file).exists() for file in ("var.safetensors", "vqvae.safetensors")):
            var, vqvae = self._make(name), self.bundled.vqvae
            checkpoints.save(folder, var, vqvae, self.bundled.class_names, PREPROCESSING, dtype=torch.float32)
        return varlik.load(str(folder), device="cpu").var

    def _make(self, name: str) -> VAR:
        folder = self.work / f"{name}-run"
        if name == "plain":
            return train_var(self.training, VAR_CONFIG, PLAIN_LOOP, folder, self.compiled)
        run, _, seed = name.partition("-seed")
        for length, variants, loop in (("short", SHORT, SHORT_LOOP), ("long", LONG, LONG_LOOP)):
            loop = replace(loop, seed=int(seed or loop.seed))
            base, found, what = run.partition(f"-{length}-")
            if found and what == "control":
                return more_likelihood(self.model(base), self.training, loop, folder)
            for variant in variants:
                if found and what == variant.folder:
                    return self._aligned(self.model(base), variant, variant.loop(loop), folder)
        raise ValueError(f"--only: no model is called {name!r}")

    def _aligned(self, start: VAR, variant: Variant, loop: LoopConfig, folder: Path) -> VAR:
        few = self.training.of_rows(torch.arange(CONFUSION_IMAGES))
        chances = confusion(start, few) if variant.confused else None
        return train_cca(start, self.training, variant.config, loop, folder, negatives=chances, compiled=self.compiled)

    def accuracy(self, what: str, data: TrainingTokens, name: str) -> float:
        """Top-1 of a model by full likelihood on images called `what`, kept in a file."""
        file = self.work / f"{name}-{what}.json"
        if not file.exists():
            unfinished = file.with_suffix(".part")
            unfinished.write_text(json.dumps(accuracy(self.model(name), data)))
            unfinished.replace(file)
        return json.loads(file.read_text())


def tokens(classifier: varlik.VARClassifier, split: str, folder: Path | None) -> TrainingTokens:
    """Token maps of a split of the data under the classifier's VQ-VAE."""
    data = fashion_mnist(split, folder)  # type: ignore[arg-type]
    features = feature_maps(classifier.vqvae, recipe.pixels_of(data, PREPROCESSING))
    labels: Tensor = torch.from_numpy(data.labels)
    return TrainingTokens.from_features(features, labels, classifier.vqvae.quantize, data.class_names)


def more_likelihood(model: VAR, data: TrainingTokens, loop: LoopConfig, folder: Path) -> VAR:
    """The control: as many steps of the same size, on the log-likelihood of the right class alone.

    As in CCA, a tenth of the labels is the null class.
    """

    def loss_of_part(part: Part) -> tuple[Tensor, Metrics]:
        images, inputs, labels = data.batch(part.indices)
        vectors = model.class_vectors(drop_labels(labels, part, loop.seed, model.config.null_class))
        return -log_likelihood(model, vectors, images, inputs).mean() / images.shape[1], {}

    settings = {"model": digest(model), "data": data.fingerprint()}
    return train(model.train(), loss_of_part, loop, folder, len(data), settings=settings).eval()


def course(file: Path) -> list[dict[str, float]]:
    """Means over each third of a run's records: shares of 1 and nats."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    size = -(-len(records) // 3)
    parts = [records[first : first + size] for first in range(0, len(records), size)]
    return [{name: mean(record[name] for record in part) for name in COURSE} for part in parts]


def as_markdown(report: dict[str, Any]) -> str:
    """All tables."""
    lines = [
        "# CCA on Fashion-MNIST, held-out accuracy by full likelihood",
        "",
        f"`python -m examples.fashion_mnist_cca`, commit {report['machine']['commit']}. A step has "
        f"{SHORT_LOOP.batch_size} images.",
        "",
        f"Short runs: {SHORT_LOOP.steps} steps, AdamW at {SHORT_LOOP.learning_rate:g} where no rate is given; "
        f"{SEARCH_IMAGES} images.",
        "",
        *table({name: [value] for name, value in report["short"].items()}),
        "",
        f"Long runs: {LONG_LOOP.steps} steps, Muon at {LONG_LOOP.muon_rate:g}, AdamW at {LONG_LOOP.learning_rate:g}, "
        f"moving average of the weights; the same {SEARCH_IMAGES} images.",
        "",
        *table({name: [value] for name, value in report["long"].items()}),
        "",
        f"Long runs with {report['best']}, images that took no part in any choice; from plain, mean and standard "
        f"deviation of {len(SEEDS['plain'])} seeds:",
        "",
        *table(report["final"]),
        "",
        ahead(report["final"]),
        "",
        "Those of the first seed, over each third of the steps: share of the negatives that were less likely than the "
        "image's own class, and nats by which own classes and negatives moved from the reference:",
        "",
        "| from | third | less likely | own | negatives |",
        "|---|---|---|---|---|",
        *(
            f"| {base} | {i} | {part['decided']:.1%} | {part['log_ratio']:.1f} | {part['negative_log_ratio']:.1f} |"
            for base, parts in report["course"].items()
            for i, part in enumerate(parts, 1)
        ),
    ]
    return "\n".join(lines) + "\n"


def ahead(final: dict[str, list[float]]) -> str:
    """How far CCA from plain is ahead of the control, seed by seed, and of plain."""
    pairs = zip(final["plain, CCA"], final["plain, more likelihood"], strict=True)
    gains = [100 * (tuned - control) for tuned, control in pairs]
    over_plain = 100 * (mean(final["plain, CCA"]) - final["plain"][0])
    return (
        f"From plain, CCA is ahead of more likelihood by {mean(gains):.2f} ± {stdev(gains) / len(gains) ** 0.5:.2f} "
        f"points (standard error over seeds), of plain by {over_plain:.2f}."
    )


def table(accuracies: dict[str, list[float]]) -> list[str]:
    """Lines of markdown: a row for each name, the mean of its values and, of several, their standard deviation."""
    lines = ["| | top-1 |", "|---|---|"]
    for name, values in accuracies.items():
        spread = f" ± {100 * stdev(values):.2f}" if len(values) > 1 else ""
        lines.append(f"| {name} | {mean(values):.2%}{spread} |")
    return lines


if __name__ == "__main__":
    main()
