"""CCA on Fashion-MNIST: which beta and lambda, against more training by likelihood alone, from two models.

    python -m examples.fashion_mnist_cca --work runs/cca          # about two and a half hours of one CPU core

The two models are `plain`, trained here by likelihood alone on the bundled model's tokens, and the bundled
`fashion-mnist`, whose training ended with a term that tells classes apart. Variants start from `plain` and are compared
on held-out images; the best goes on from both models. Stages that are done are skipped and a killed run goes on where
it was. Models go to folders in `--work`, figures to `benchmarks/results/fashion-mnist-cca.json` and `.md`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import varlik
from examples import recipe
from examples.train_fashion_mnist import PREPROCESSING, VAR_CONFIG, VAR_LOOP
from varlik.datasets import fashion_mnist
from varlik.evaluation.machine import machine
from varlik.models import checkpoints
from varlik.models.var import VAR
from varlik.training.cca import PRESETS, CCAConfig, accuracy, confusion, train_cca
from varlik.training.data import TrainingTokens
from varlik.training.likelihood import log_likelihood
from varlik.training.loop import LoopConfig, Part, generator, train
from varlik.training.metrics import Metrics
from varlik.training.var import feature_maps, train_var

RESULTS = Path(__file__).parents[1] / "benchmarks/results"
PLAIN_LOOP = replace(VAR_LOOP, steps=5_250, stop=0)
SEARCH_LOOP = replace(PRESETS["small"].loop, steps=250, batch_size=16, warmup=20)
FINAL_LOOP = replace(PRESETS["small"].loop, steps=400, batch_size=16, evaluate_every=200)


@dataclass(frozen=True)
class Variant:
    """A way to fine-tune: `confused` negatives are drawn as often as classes are mistaken, others are rolled labels."""

    beta: float
    weight: float = 1.0
    confused: bool = False
    learning_rate: float = PRESETS["small"].loop.learning_rate

    @property
    def config(self) -> CCAConfig:
        return CCAConfig(self.beta, self.weight)

    def __str__(self) -> str:
        negatives = ", confused negatives" if self.confused else ""
        return f"beta {self.beta:g}, lambda {self.weight:g}, rate {self.learning_rate:g}{negatives}"

    def loop(self, usual: LoopConfig) -> LoopConfig:
        return replace(usual, learning_rate=self.learning_rate)


VARIANTS = (
    Variant(0.02),
    Variant(0.05),
    Variant(0.2),
    Variant(0.05, 0.3),
    Variant(0.05, confused=True),
    Variant(0.2, confused=True),
    Variant(0.2, 0.3, confused=True),
    Variant(0.2, learning_rate=1e-3),
    Variant(0.2, confused=True, learning_rate=1e-3),
)
NULL_RATE = 0.1
CONFUSION_IMAGES = 1_000  # of the training ones
SEARCH_IMAGES = 1_500  # of the held-out ones, for comparing variants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="checkpoints, metrics and models")
    parser.add_argument("--data", type=Path, help="folder with the IDX files")
    parser.add_argument("--eager", action="store_true", help="do not compile the training step")
    options = parser.parse_args()
    bundled = varlik.load("fashion-mnist", device="cpu")
    training, held_out = (tokens(bundled, split, options.data) for split in ("train", "held-out"))
    some = held_out.of_rows(torch.arange(SEARCH_IMAGES))
    compiled = not options.eager

    def save(model: VAR, name: str) -> None:
        folder = options.work / name
        checkpoints.save(folder, model, bundled.vqvae, bundled.class_names, PREPROCESSING, dtype=torch.float32)

    def model(name: str, make: Callable[[], VAR]) -> VAR:
        """Made once; later it comes from its folder."""
        if not (options.work / name / "var.safetensors").exists():
            save(make(), name)
        return varlik.load(str(options.work / name), device="cpu").var

    def measured(name: str, model_: VAR, images: TrainingTokens) -> float:
        """Held-out accuracy, kept in a file."""
        file = options.work / f"{name}-{len(images)}.json"
        if not file.exists():
            unfinished = file.with_suffix(".part")
            unfinished.write_text(json.dumps(accuracy(model_, images)))
            unfinished.replace(file)
        return json.loads(file.read_text())

    def plain() -> VAR:
        return model("plain", lambda: train_var(training, VAR_CONFIG, PLAIN_LOOP, options.work / "plain-run", compiled))

    def tuned(start: VAR, name: str, variant: Variant, loop: LoopConfig, watched: TrainingTokens | None) -> VAR:
        def make() -> VAR:
            few = training.of_rows(torch.arange(CONFUSION_IMAGES))
            chances = confusion(start, few) if variant.confused else None
            folder = options.work / f"{name}-run"
            return train_cca(
                start,
                training,
                variant.config,
                variant.loop(loop),
                folder,
                held_out=watched,
                negatives=chances,
                compiled=compiled,
            )

        return model(name, make)

    def control(start: VAR, name: str, loop: LoopConfig, watched: TrainingTokens | None) -> VAR:
        return model(name, lambda: more_likelihood(start, training, loop, watched, options.work / f"{name}-run"))

    search = {
        "plain": measured("plain", plain(), some),
        "plain, more likelihood": measured("control", control(plain(), "control", SEARCH_LOOP, None), some),
    }
    found: dict[Variant, float] = {}
    for variant in VARIANTS:
        name = f"beta{variant.beta:g}-lambda{variant.weight:g}{'-confused' if variant.confused else ''}"
        name += "" if variant.learning_rate == Variant.learning_rate else f"-rate{variant.learning_rate:g}"
        found[variant] = measured(name, tuned(plain(), name, variant, SEARCH_LOOP, None), some)
        search[f"plain, CCA, {variant}"] = found[variant]
    best = max(found, key=lambda variant: found[variant])
    rest = held_out.of_rows(torch.arange(SEARCH_IMAGES, len(held_out)))  # took no part in any choice
    final: dict[str, float] = {}
    for base, start in (("plain", plain), ("fashion-mnist", lambda: varlik.load("fashion-mnist", device="cpu").var)):
        final[base] = measured(base, start(), rest)
        name = f"{base}-control"
        final[f"{base}, more likelihood"] = measured(name, control(start(), name, FINAL_LOOP, some), rest)
        name = f"{base}-cca"
        final[f"{base}, CCA"] = measured(name, tuned(start(), name, best, FINAL_LOOP, some), rest)
    write({"search": search, "best": str(best), "final": final, "machine": asdict(machine(bundled.device))})


def tokens(classifier: varlik.VARClassifier, split: str, folder: Path | None) -> TrainingTokens:
    """Token maps of a split of the data under the classifier's VQ-VAE."""
    data = fashion_mnist(split, folder)  # type: ignore[arg-type]
    features = feature_maps(classifier.vqvae, recipe.pixels_of(data, PREPROCESSING))
    labels: Tensor = torch.from_numpy(data.labels)
    return TrainingTokens.from_features(features, labels, classifier.vqvae.quantize, data.class_names)


def more_likelihood(
    model: VAR, data: TrainingTokens, loop: LoopConfig, watched: TrainingTokens | None, folder: Path
) -> VAR:
    """The control: as many steps of the same size, on the log-likelihood of the right class alone.

    As in CCA, a tenth of the labels is the null class, and the same look at held-out images keeps the best weights.
    """
    null = model.config.null_class

    def loss_of_part(part: Part) -> tuple[Tensor, Metrics]:
        images, inputs, labels = data.batch(part.indices)
        dropped = torch.rand(len(part.rows), generator=generator(loop.seed, part.step))[part.own] < NULL_RATE
        vectors = model.class_vectors(labels.masked_fill(dropped, null))
        return -log_likelihood(model, vectors, images, inputs).mean() / images.shape[1], {}

    validate = None if watched is None else lambda _: accuracy(model, watched)
    start = validate is not None
    return train(model.train(), loss_of_part, loop, folder, len(data), validate=validate, validate_start=start).eval()


def write(report: dict) -> None:
    """Figures as JSON and as a table."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "fashion-mnist-cca"
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    lines = [
        "# CCA on Fashion-MNIST, held-out accuracy by full likelihood",
        "",
        f"`python -m examples.fashion_mnist_cca`, commit {report['machine']['commit']}; CCA and its control for "
        f"{SEARCH_LOOP.steps} steps of {SEARCH_LOOP.batch_size} images, final ones for up to {FINAL_LOOP.steps}.",
        "",
        f"| variants, {SEARCH_IMAGES} images | top-1 |",
        "|---|---|",
        *(f"| {name} | {value:.2%} |" for name, value in report["search"].items()),
        "",
        f"Goes on as {report['best']}; images that took no part in any choice:",
        "",
        "| final | top-1 |",
        "|---|---|",
        *(f"| {name} | {value:.2%} |" for name, value in report["final"].items()),
    ]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
