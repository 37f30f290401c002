"""Accuracy of a classifier on labelled images: full likelihood, each partial scale, cascades."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.progress import track
from torch import Tensor

from varlik.cascade import Cascade
from varlik.classifier import VARClassifier
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
    """Top-1 accuracy over `images` images: by number of scales (the last is full likelihood) and by cascade.

    `nats_per_token` is the mean negative log-likelihood of the true class, `calibration_error` the expected calibration
    error of the posterior in 15 bins.
    """

    images: int
    by_scales: tuple[float, ...]
    nats_per_token: float
    calibration_error: float
    cascades: tuple[CascadeAccuracy, ...]


def evaluate(
    classifier: VARClassifier, images: TokenMaps, labels: Tensor, cascades: tuple[Cascade, ...] = (), sigma: float = 0.1
) -> AccuracyReport:
    """Score `images` under every class and under each of `cascades`; `labels` (B,) are the true classes."""
    config = classifier.var.config
    batches = range(0, len(images), BATCH)
    partial = torch.cat(
        [
            partial_log_likelihoods(classifier, images[i : i + BATCH])
            for i in track(batches, "full likelihood", transient=True)
        ]
    )
    predictions = partial.argmax(1)  # (B, K)
    full = predictions[:, -1]
    results = []
    for cascade in cascades:
        answers = [
            classifier.classify(images[i : i + BATCH], cascade=cascade, sigma=sigma)
            for i in track(batches, str(cascade), transient=True)
        ]
        classes = torch.cat([answer.classes for answer in answers])
        results.append(
            CascadeAccuracy(
                cascade,
                _share(classes == labels),
                _share(classes == full),
                _mean([answer.cost.tokens for answer in answers]),
            )
        )
    truth = partial[torch.arange(len(labels)), labels, -1]
    return AccuracyReport(
        images=len(labels),
        by_scales=tuple(_share(predictions[:, k] == labels) for k in range(config.num_scales)),
        nats_per_token=-truth.mean().item() / config.num_tokens,
        calibration_error=calibration_error(partial[:, :, -1].softmax(1), labels),
        cascades=tuple(results),
    )


def partial_log_likelihoods(classifier: VARClassifier, images: TokenMaps) -> Tensor:
    """log p(first k token maps | class) for every k, (B, N, K), from one full pass."""
    token_log_prob = classifier.token_log_prob(images)
    ends = [end - 1 for end in classifier.var.config.boundaries[1:]]
    return token_log_prob.double().cumsum(-1)[..., ends]


def calibration_error(posterior: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error of (B, N) posteriors: mean gap of confidence and accuracy over equal-width bins."""
    confidence, predicted = posterior.max(1)
    correct = (predicted == labels).to(confidence)
    index = (confidence * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=confidence.dtype).index_add_(0, index, confidence - correct)
    return gaps.abs().sum().item() / len(labels)


def _mean(parts: list[Tensor]) -> float:
    return torch.cat(parts).double().mean().item()


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()
