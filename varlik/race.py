"""The race: elimination after one scale after another, by margins that a calibration vouches for.

What the scales so far say about the gap between two classes is what all scales will say, up to a spread that shrinks:
a class that lies far enough behind will not come back. How far that is comes from `varlik.calibration`.
"""

from __future__ import annotations

import torch
from torch import Tensor

# After a scale the race stops to drop classes of an image if the next scale of all of them takes at least so many times
# the tokens of one class's whole pass. A stop costs a pass of its own.
STOP_SHARE = 1 / 2


def due(alive: Tensor, boundaries: tuple[int, ...], scale: int) -> Tensor:
    """Images (B,) at which the race stops after `scale`, of classes `alive` (B, N) and token offsets (K + 1) of scales.

    Everywhere after the last one. Decided image by image, so that an answer does not depend on what else is in the
    batch.
    """
    if scale == len(boundaries) - 1:
        return torch.ones(len(alive), dtype=torch.bool, device=alive.device)
    following = boundaries[scale + 1] - boundaries[scale]
    return alive.sum(1) * following >= STOP_SHARE * boundaries[-1]


def within_margin(scores: Tensor, alive: Tensor, margin: Tensor | float) -> Tensor:
    """Those of `alive` (B, N) whose `scores` (B, N) lie at most `margin` behind the best one alive: (B, N).

    The best one itself, the first of several, always stays.
    """
    scores = scores.masked_fill(~alive, -torch.inf)
    best = scores.max(1, keepdim=True)
    kept = scores >= best.values - margin
    return alive & kept.scatter(1, best.indices, True)


def best_only(scores: Tensor, alive: Tensor) -> Tensor:
    """Of `alive` (B, N) the one with the highest of `scores` (B, N), the first of several: (B, N)."""
    best = scores.masked_fill(~alive, -torch.inf).argmax(1, keepdim=True)
    return torch.zeros_like(alive).scatter_(1, best, True) & alive


def best(scores: Tensor, keep: int) -> Tensor:
    """Those with the `keep` highest of `scores` (B, N), NaN for classes out of the running; ties go to the first."""
    order = torch.argsort(scores.nan_to_num(-torch.inf), dim=1, descending=True, stable=True)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :keep], True)
    return kept & ~scores.isnan()


def on_table(estimates: Tensor, exact: Tensor, margins: Tensor, boundaries: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """What screen and race do, from exact scores in place of an engine: rows by scale (n, K), and who wins (n,).

    `estimates` (n, N), `exact` (n, N, K) log-likelihoods of each scale, `margins` (1 + K) of the screen and after each
    scale, `boundaries` (K + 1) token offsets of the scales.
    """
    alive = within_margin(estimates, torch.ones_like(estimates, dtype=torch.bool), margins[0])
    sums, rows = exact.cumsum(-1), []
    for scale in range(1, len(boundaries)):
        rows.append(alive.sum(1))
        if 1 < scale < len(boundaries) - 1:
            kept = within_margin(sums[..., scale - 1], alive, margins[scale])
            alive = torch.where(due(alive, boundaries, scale).unsqueeze(1), kept, alive)
    return torch.stack(rows, dim=1), best_only(sums[..., -1], alive).int().argmax(1)
