"""How far first-order scores of a model can be trusted, and what they cost: measured on a few images."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from varlik.calibration import Calibration
from varlik.classifier import VARClassifier
from varlik.tokens import TokenMaps

RECALL_AT = (1, 3, 5, 10)
MEAN, NULL, CORRECTED = "at the mean", "at the null class", "corrected"
REPEATS = 5


@dataclass(frozen=True)
class Quality:
    """First-order scores of one kind against exact ones.

    `correlation` over the classes of an image, averaged over images, NaN where scores are; `found`: in how many images
    the best class by exact scores is among so many best estimates.
    """

    name: str
    correlation: float
    found: dict[int, int]


@dataclass(frozen=True)
class FirstOrder:
    """Of `images` images under `classes` classes; `passes` is what it took in forward passes of one class."""

    images: int
    classes: int
    kinds: tuple[Quality, ...]
    passes: float


def measure(
    classifier: VARClassifier,
    images: TokenMaps,
    calibration: Calibration | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FirstOrder:
    """Compare first-order scores of `images` with exact ones: raw, and corrected where there is a `calibration`.

    Over all classes, or those calibrated. Exact scores take long: `progress` is told how many images are done.
    """
    labels = classifier.labels(None if calibration is None else calibration.labels)
    exact = []
    for i in range(len(images)):
        exact.append(classifier.log_likelihood(images[i : i + 1], labels))
        if progress is not None:
            progress(i + 1, len(images))
    estimate = partial(classifier.first_order_log_likelihood, images, labels)
    kinds = {MEAN: estimate(at="mean"), NULL: estimate(at="null")}
    if calibration is not None:
        kinds[CORRECTED] = calibration.correct(estimate(at=calibration.at), labels)
    table = torch.cat(exact)
    return FirstOrder(
        images=len(images),
        classes=len(labels),
        kinds=tuple(quality(name, scores, table) for name, scores in kinds.items()),
        passes=_passes(classifier, images, labels),
    )


def quality(name: str, estimates: Tensor, exact: Tensor) -> Quality:
    """Of `estimates` (B, N) of `exact` log-likelihoods (B, N)."""
    estimates, exact = (scores.double().cpu() for scores in (estimates, exact))
    best = estimates.gather(1, exact.argmax(1, keepdim=True))
    # What cannot be compared, NaN, counts as better.
    ahead = (~(estimates <= best)).sum(1)
    found = {k: int((ahead < k).sum()) for k in RECALL_AT if k < exact.shape[1]}
    a, b = (scores - scores.mean(1, keepdim=True) for scores in (estimates, exact))
    size = (a.square().sum(1) * b.square().sum(1)).sqrt()
    correlation = (a * b).sum(1) / size.clamp(min=torch.finfo(size.dtype).tiny)
    return Quality(name, correlation.mean().item(), found)


def _passes(classifier: VARClassifier, images: TokenMaps, labels: Tensor) -> float:
    """Time of first-order scores of all `labels` over that of exact scores of one, the median of a few repeats."""
    ways = (
        partial(classifier.first_order_log_likelihood, images, labels),
        partial(classifier.log_likelihood, images, labels[:1]),
    )
    for way in ways:  # what is built once is not counted
        way()
    return statistics.median(_seconds(ways[0]) / _seconds(ways[1]) for _ in range(REPEATS))


def _seconds(way: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    way().sum().item()  # waits for the device
    return time.perf_counter() - started
