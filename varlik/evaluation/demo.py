"""The demo: real pictures classified beside the naive per-class pass, checked against it, both timed."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from varlik import reference
from varlik.cascade import AVARC_PLUS, FAST, VARC, Cascade, Stage
from varlik.classifier import VARClassifier, load
from varlik.evaluation.calibrate import allows
from varlik.evaluation.samples import samples
from varlik.prediction import Prediction
from varlik.tokens import TokenMaps


@dataclass(frozen=True)
class DemoRow:
    """One picture: file name, true class, prediction, its posterior and the tokens evaluated for it."""

    file: str
    truth: str
    predicted: str
    posterior: float
    tokens: int

    @property
    def correct(self) -> bool:
        """Whether the prediction is the truth."""
        return self.truth == self.predicted


@dataclass(frozen=True)
class Timing:
    """One way to classify all pictures: median `seconds` over repeats, `tokens` per picture."""

    name: str
    seconds: float
    tokens: int


@dataclass(frozen=True)
class Demo:
    """Rows per picture, timings, the largest relative difference of any score from the naive one, and `notes`."""

    model: str
    device: str
    rows: tuple[DemoRow, ...]
    timings: tuple[Timing, ...]
    difference: float
    notes: tuple[str, ...] = ()


def run(model: str = "fashion-mnist", cascade: Cascade = VARC, repeats: int = 3) -> Demo:
    """Classify a bundled model's sample pictures; `FAST` is timed too where the model's calibration allows it.

    Raises `ValueError` for a model without samples.
    """
    pictures = samples(model)
    classifier = load(model)
    images = classifier.tokenize(list(pictures.paths))
    prediction = classifier.classify(images, cascade=cascade)
    expected = _naive(classifier, images)
    full = classifier.log_likelihood(images)
    difference = ((full - expected).abs() / expected.abs()).max().item()

    released, fast = AVARC_PLUS, f"varlik, FAST cascade {FAST}"
    ways = {
        "naive, one class at a time": lambda: _naive(classifier, images),
        "varlik, full likelihood": lambda: classifier.classify(images, cascade=VARC),
        f"varlik, A-VARC+ cascade {released}": lambda: classifier.classify(images, cascade=released),
    }
    if classifier.calibration is not None and allows(classifier.calibration, FAST):
        ways[fast] = lambda: classifier.classify(images, cascade=FAST)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    naive_tokens = classifier.var.config.num_tokens * classifier.var.config.num_classes
    tokens = dict.fromkeys(ways, naive_tokens)
    for _ in range(repeats):  # interleaved, so that a slow moment of the machine hits all alike
        for name, way in ways.items():
            started = time.perf_counter()
            result = way()
            seconds[name].append(time.perf_counter() - started)
            if isinstance(result, Prediction):
                tokens[name] = round(result.cost.tokens.double().mean().item())
    timings = tuple(Timing(name, sorted(values)[len(values) // 2], tokens[name]) for name, values in seconds.items())
    rows = tuple(
        DemoRow(path.name, classifier.class_names[truth], name, posterior.max().item(), int(evaluated))
        for path, truth, name, posterior, evaluated in zip(
            pictures.paths,
            pictures.labels,
            prediction.names,
            prediction.posterior,
            prediction.cost.tokens,
            strict=True,
        )
    )
    notes = _notes(released, classifier.var.config.num_classes)
    if fast in ways:
        notes += ("FAST sends all tokens of a picture backwards once, beside those in the table, which go forwards",)
    return Demo(model, str(classifier.device), rows, timings, difference, notes)


def _notes(cascade: Cascade, classes: int) -> tuple[str, ...]:
    """Why a cascade may be slower than full likelihood."""
    first = cascade.stages[0]
    if not isinstance(first, Stage) or first.keep < classes:
        return ()
    return (
        f"A-VARC+ can be slower than full likelihood here: its first stage keeps {first.keep} classes, and there are "
        f"{classes}, so it drops nobody, and its further samples come on top",
    )


def _naive(classifier: VARClassifier, images: TokenMaps) -> torch.Tensor:
    """Every picture by itself, every class by itself, as scripts around VAR do it."""
    labels = list(range(classifier.var.config.num_classes))
    scores = [
        reference.log_likelihood(
            classifier.var, images.tokens[i : i + 1], images.teacher_forcing_input[i : i + 1], labels
        )
        for i in range(len(images))
    ]
    return torch.cat(scores)
