"""Accuracy of a classifier on labelled images: full likelihood, each partial scale, cascades."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, track
from torch import Tensor

from varlik.cascade import Cascade
from varlik.classifier import VARClassifier
from varlik.scoring.score_table import score_table
from varlik.tokens import TokenMaps

BATCH = 64


@dataclass(frozen=True)
class CascadeAccuracy:
    """Top-1 accuracy of one cascade, its agreement with full likelihood and the tokens it evaluates per image."""

    cascade: Cascade
    accuracy: float
    agreement: float
    tokens: float


@dataclass(frozen=True)
class AccuracyReport:
    """Top-1 accuracy over `images` images by number of scales; the last is full likelihood.

    `predictions` (B,) are those of full likelihood, `nats_per_token` is the mean negative log-likelihood of the true
    class, `calibration_error` the expected calibration error of the full posterior in 15 bins.
    """

    images: int
    by_scales: tuple[float, ...]
    predictions: Tensor
    nats_per_token: float
    calibration_error: float


def tokenize_arrays(classifier: VARClassifier, images: np.ndarray) -> TokenMaps:
    """Token maps of many greyscale images (n, H, W) uint8, some at a time."""
    parts = [classifier.tokenize(images[i : i + 500, ..., None]) for i in range(0, len(images), 500)]
    return TokenMaps.concatenate(parts)


def evaluate(classifier: VARClassifier, images: TokenMaps, labels: Tensor, cache: Path | None = None) -> AccuracyReport:
    """Score `images` under every class; `labels` (B,) are the true classes. `cache` as for `score_table`."""
    config = classifier.var.config
    partial = partial_log_likelihoods(classifier, images, cache)
    predictions = partial.argmax(1)  # (B, K)
    truth = partial[torch.arange(len(labels)), labels, -1]
    return AccuracyReport(
        images=len(labels),
        by_scales=tuple(_share(predictions[:, k] == labels) for k in range(config.num_scales)),
        predictions=predictions[:, -1],
        nats_per_token=-truth.mean().item() / config.num_tokens,
        calibration_error=calibration_error(partial[:, :, -1].softmax(1), labels),
    )


def evaluate_cascade(
    classifier: VARClassifier, images: TokenMaps, labels: Tensor, full: Tensor, cascade: Cascade, sigma: float = 0.1
) -> CascadeAccuracy:
    """Classify `images` by a cascade; `labels` (B,) are the true classes, `full` (B,) those of full likelihood."""
    answers = [classifier.classify(batch, cascade=cascade, sigma=sigma) for batch in _batches(images, str(cascade))]
    classes = torch.cat([answer.classes for answer in answers])
    tokens = torch.cat([answer.cost.tokens for answer in answers]).double().mean().item()
    return CascadeAccuracy(cascade, _share(classes == labels), _share(classes == full), tokens)


def partial_log_likelihoods(classifier: VARClassifier, images: TokenMaps, cache: Path | None = None) -> Tensor:
    """log p(first k token maps | class) for every k, (B, N, K), from one full pass. `cache` as for `score_table`."""
    with Progress(transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task("full likelihood", total=len(images))
        parts = score_table(
            classifier.engine, images, classifier.labels(), cache, lambda done, _: bar.update(task, completed=done)
        )
    return parts.double().cumsum(-1)


def calibration_error(posterior: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error of (B, N) posteriors: mean gap of confidence and accuracy over equal-width bins."""
    confidence, predicted = posterior.max(1)
    correct = (predicted == labels).to(confidence)
    index = (confidence * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=confidence.dtype).index_add_(0, index, confidence - correct)
    return gaps.abs().sum().item() / len(labels)


def _batches(images: TokenMaps, what: str) -> Iterator[TokenMaps]:
    console = Console(stderr=True)
    for first in track(range(0, len(images), BATCH), what, transient=True, console=console):
        yield images[first : first + BATCH]


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()
