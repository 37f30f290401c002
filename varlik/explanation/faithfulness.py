"""Does a map show what the classifier looks at? Insertion and deletion curves.

Pixels are taken in the order of a map, the most important first. Deletion replaces them by a baseline, and the
probability of the class should fall soon; insertion puts them into the baseline, and it should rise soon. Both are
summed up by the area under the curve of probability over the share of pixels.

Source: "RISE: Randomized Input Sampling for Explanation of Black-box Models", Petsiuk et al. 2018, section 4.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from varlik.classifier import VARClassifier

Baseline = Literal["blur", "grey", "black"]
BLUR = 11  # side of the Gaussian kernel, for pictures of 32 pixels; it grows with them
GREY = 0.0  # in pixels of [-1, 1]
BATCH = 256  # pictures tokenised and scored at a time

Score = Callable[[Tensor], Tensor]
"""Probability of every candidate class, (n, N), of pixels (n, C, S, S) in [-1, 1]."""


@dataclass(frozen=True)
class Curves:
    """Probability of the explained class over the share of pixels changed, for B images.

    `shares` (T + 1,) rise from 0 to 1; `insertion`, `deletion` (B, T + 1) are probabilities, all on their device.
    """

    shares: Tensor
    insertion: Tensor
    deletion: Tensor

    @property
    def insertion_auc(self) -> Tensor:
        """Area under the insertion curve, (B,): higher is better."""
        return torch.trapezoid(self.insertion, self.shares)

    @property
    def deletion_auc(self) -> Tensor:
        """Area under the deletion curve, (B,): lower is better."""
        return torch.trapezoid(self.deletion, self.shares)


def posterior_score(classifier: VARClassifier, classes: Tensor, temperature: float = 1.0) -> Score:
    """Posterior over `classes` (N,) under full likelihood, log-likelihoods being divided by `temperature`.

    At a temperature of 1 posteriors are close to 0 or 1 and curves are steps; a calibrated temperature spreads them.
    Raises `ValueError` for a temperature that is not positive and finite.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")

    def score(pixels: Tensor) -> Tensor:
        parts = [
            classifier.log_likelihood(classifier.tokenize_pixels(batch.clamp(-1, 1)), classes)
            for batch in pixels.split(BATCH)
        ]
        return (torch.cat(parts).double() / temperature).softmax(-1).float()

    return score


def curves(
    score: Score,
    pixels: Tensor,
    importance: Tensor,
    column: Tensor,
    steps: int = 16,
    insertion_baseline: Baseline = "blur",
    deletion_baseline: Baseline = "grey",
) -> Curves:
    """Insertion and deletion curves of B images.

    The default baselines are of the kinds that RISE takes; its blur is of 11 pixels whatever the picture, while ours
    grows with it (11 pixels for 32), and it takes a step for every row of pixels.

    `pixels` (B, C, S, S) in [-1, 1]; `importance` (B, S, S), higher for what speaks more for the class, ties being
    broken from left to right and top to bottom; `column` (B,) of the explained class in the answers of `score`. In each
    of `steps` steps an equal share of the pixels is changed.

    Raises `ValueError` for shapes that do not fit, importance that is NaN, columns outside the answers, less than one
    step and an unknown baseline.
    """
    if pixels.dim() != 4 or importance.shape != (len(pixels), *pixels.shape[2:]):
        raise ValueError(
            f"importance: expected (B, S, S) for pixels {tuple(pixels.shape)}, got {tuple(importance.shape)}"
        )
    if importance.isnan().any():
        raise ValueError("importance: expected numbers, got NaN")
    if column.shape != (len(pixels),) or column.is_floating_point():
        raise ValueError(f"column: expected integers ({len(pixels)},), got {tuple(column.shape)} {column.dtype}")
    if steps < 1:
        raise ValueError(f"steps: expected 1 or more, got {steps}")
    start, end = blank(pixels, insertion_baseline), blank(pixels, deletion_baseline)
    count = importance[0].numel()
    rank = torch.argsort(torch.argsort(importance.flatten(1), dim=1, descending=True, stable=True), dim=1)
    rank = rank.to(pixels.device)
    inserted, deleted = [], []
    for step in range(steps + 1):
        chosen = (rank < round(step / steps * count)).view(len(pixels), 1, *importance.shape[1:])
        inserted.append(torch.where(chosen, pixels, start))
        deleted.append(torch.where(chosen, end, pixels))
    # All steps of all images in one call, for the classifier batches them better than a loop would.
    probability = score(torch.cat((*inserted, *deleted)))
    most = probability.shape[1] - 1
    if ((column < 0) | (column > most)).any():
        raise ValueError(f"column: expected 0 to {most}, got {column.tolist()}")
    column = column.to(probability.device, torch.int64).repeat(2 * (steps + 1))
    own = probability.gather(1, column.unsqueeze(1)).view(2, steps + 1, len(pixels))
    shares = torch.linspace(0, 1, steps + 1, device=probability.device)
    return Curves(shares, own[0].T.contiguous(), own[1].T.contiguous())


def blank(pixels: Tensor, baseline: Baseline) -> Tensor:
    """What stands where nothing is shown, (B, C, S, S): the blurred picture, mid-grey or black."""
    if baseline not in get_args(Baseline):
        raise ValueError(f"baseline: expected {' or '.join(map(repr, get_args(Baseline)))}, got {baseline!r}")
    if baseline != "blur":
        return torch.full_like(pixels, GREY if baseline == "grey" else -1.0)
    side = max(3, round(BLUR * pixels.shape[-1] / 32) // 2 * 2 + 1)
    places = torch.arange(side, dtype=pixels.dtype, device=pixels.device) - side // 2
    kernel = torch.exp(-places.square() / (2 * (side / 4) ** 2))
    kernel = kernel / kernel.sum()
    channels = pixels.shape[1]
    padded = F.pad(pixels, (side // 2,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel.view(1, 1, -1, 1).expand(channels, -1, -1, -1), groups=channels)
    return F.conv2d(rows, kernel.view(1, 1, 1, -1).expand(channels, -1, -1, -1), groups=channels)
