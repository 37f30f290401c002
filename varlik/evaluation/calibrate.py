"""Calibration from picture files: where its file goes, which pictures count, and what it says in a few lines."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

import varlik
from varlik.calibration import Calibration, calibrate
from varlik.calibration.artefact import SmoothingPlan
from varlik.calibration.conformal import calibration_images_needed, images_needed
from varlik.calibration.fit import MIN_IMAGES
from varlik.cascade import Cascade, Stage
from varlik.classifier import VARClassifier
from varlik.evaluation import pictures
from varlik.models.presets import CALIBRATION_FILE

RECALL_AT = (1, 3, 5, 10)
DELTAS = (0.005, 0.01, 0.02, 0.05)


@dataclass(frozen=True)
class Finalists:
    """`expected` classes pass screening at `delta` on average; None where that takes `images_needed` images."""

    delta: float
    expected: float | None
    images_needed: int


@dataclass(frozen=True)
class Report:
    """What a calibration in `file` found on `images` images, of which `counted` were left out of fitting.

    `recall`: how often the best class of full likelihood is among so many best corrected first-order scores.
    `temperature` is that of all scales, None without labels.
    """

    model: str
    file: str
    images: int
    counted: int
    classes: int
    correlation: float
    recall: dict[int, float]
    finalists: tuple[Finalists, ...]
    smoothing: SmoothingPlan | None
    temperature: float | None
    notes: tuple[str, ...]


def place(model: str, out: Path | None) -> Path:
    """The file that a calibration of `model` goes to: `out`, or beside the model where that is a folder of the user's.

    Raises `ValueError` where `out` is needed, `OSError` for a folder that is not there or cannot be written to.
    """
    if out is None:
        folder = Path(model).expanduser()
        if not folder.is_dir():
            raise ValueError(f"out: {model} is no folder of yours to put the calibration in; name a file with --out")
        if folder.resolve().is_relative_to(Path(varlik.__file__).resolve().parent):
            raise ValueError(f"out: {model} is a part of varlik itself, which is left alone; name a file with --out")
        out = folder
    file = out.expanduser()
    file = file / CALIBRATION_FILE if file.is_dir() else file
    if not file.parent.is_dir():
        raise FileNotFoundError(f"out: {file.parent} is no folder")
    if not os.access(file.parent, os.W_OK):
        raise PermissionError(f"out: no permission to write to {file.parent}")
    return file


def run(
    classifier: VARClassifier,
    paths: Sequence[Path],
    file: Path,
    labels: Tensor | None = None,
    *,
    labelled: bool = False,
    samples: int = 1,
    sigma: float = 0.1,
    cache: Path | None = None,
    complain: Callable[[Exception], None],
    progress: Callable[[str, int, int], None],
) -> Report:
    """Calibrate on picture files, for classes `labels` (default: all), and write `file`.

    With `labelled` the pictures lie in folders named after their classes; those of classes that are not among `labels`
    are left out. Pictures that cannot be read are told to `complain`, `progress` how many are done of how many, at
    what. The others are as for `varlik.calibrate`. Raises `ValueError` as that and as `pictures.truth`, `OSError` for
    a file that cannot be written.
    """
    labels = classifier.labels() if labels is None else labels
    notes = []
    if labelled:
        among = pictures.of_classes(classifier, paths, labels)
        if len(among) < len(paths):
            notes.append(f"{len(paths) - len(among)} pictures of other classes were left out")
        paths = among
    found = pictures.read(classifier, paths, complain, lambda *done: progress("reading pictures", *done))
    if found is None:
        raise ValueError(f"images: expected at least {MIN_IMAGES} to calibrate on, got none")
    calibration = calibrate(
        classifier,
        found.images,
        labels,
        truth=pictures.truth(classifier, found.paths) if labelled else None,
        samples=samples,
        sigma=sigma,
        cache=cache,
        progress=lambda *done: progress("exact scores", *done),
    )
    calibration.save(file)
    return report(classifier.name, calibration, file, notes)


def report(model: str, calibration: Calibration, file: Path, notes: Sequence[str] = ()) -> Report:
    """The few lines of a calibration that lies in `file`."""
    classes, temperature = len(calibration.labels), calibration.temperature
    return Report(
        model=model,
        file=str(file),
        images=calibration.images,
        counted=counted(calibration),
        classes=classes,
        correlation=calibration.correlation,
        recall={k: float(calibration.recall[k - 1]) for k in RECALL_AT if k < classes},
        finalists=tuple(_finalists(calibration, delta) for delta in DELTAS),
        smoothing=calibration.smoothing,
        temperature=None if temperature is None else float(temperature[-1]),
        notes=tuple(notes),
    )


def counted(calibration: Calibration) -> int:
    """Images that its guarantees are counted on; the others were for fitting."""
    return len(calibration.full.both.scores)


def allows(calibration: Calibration, cascade: Cascade) -> bool:
    """Whether it was made on images enough for each stage of a cascade."""
    deltas = [stage.delta for stage in cascade.stages if not isinstance(stage, Stage)]
    return all(_allows(calibration, delta) for delta in deltas if delta is not None)


def _finalists(calibration: Calibration, delta: float) -> Finalists:
    expected = calibration.expected_finalists(delta) if _allows(calibration, delta) else None
    return Finalists(delta, expected, calibration_images_needed(delta))


def _allows(calibration: Calibration, delta: float) -> bool:
    return images_needed(delta) <= counted(calibration)
