"""Guarantees by counting: the one-number conformal rule, and how sure a counted share is.

Source: "A Tutorial on Conformal Prediction", Shafer and Vovk 2008, for the quantile; "The use of confidence or fiducial
limits illustrated in the case of the binomial", Clopper and Pearson 1934, for the bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_IMAGES = 6
FIT_SHARE = 1 / 3


@dataclass(frozen=True)
class Rule:
    """Whom to drop after each of several steps, by one number that holds for all of them.

    A class is dropped after step k when it lies more than a margin of `quantile * spread[k]` behind the best one. The
    right class of an image gets through all steps if that quantile is at least the image's own number: the largest of
    its gaps, each in units of `spread`. So one quantile of these numbers bounds the share of images that lose the right
    class at any step, with no union over steps.

    - `spread` (steps,): the unit of each step's gaps, 0 where the right class is always the best.
    - `scores` (n,): the numbers of n calibration images, in ascending order.
    """

    spread: Tensor
    scores: Tensor

    @classmethod
    def fit(cls, gaps: Tensor, unit: Tensor | None = None) -> Rule:
        """The rule of `gaps` (n, steps): how far the right class of each image lies behind the best one.

        Units are standard deviations of `unit` (m, steps), gaps of other images (default: of these; then the guarantee
        is approximate).
        """
        return cls.of_units(gaps, (gaps if unit is None else unit).double().std(0, correction=0))

    @classmethod
    def joint(cls, rules: Sequence[Rule], gaps: Sequence[Tensor], strictness: Sequence[float]) -> Rule:
        """One rule for the steps of several, with the units of each divided by its `strictness`.

        `gaps` (n, steps) are those that each of `rules` is to be applied to.
        """
        spread = torch.cat([rule.spread / strict for rule, strict in zip(rules, strictness, strict=True)])
        return cls.of_units(torch.cat(tuple(gaps), dim=1), spread)

    @classmethod
    def of_units(cls, gaps: Tensor, spread: Tensor) -> Rule:
        """The rule of `gaps` (n, steps) in given units (steps,)."""
        inside = torch.where(spread > 0, gaps.double() / spread.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
        # Without any spread to go by, a gap is out of reach.
        numbers = torch.where((spread == 0) & (gaps > 0), torch.inf, inside).amax(1)
        return cls(spread, numbers.sort().values)

    def margins(self, delta: float) -> Tensor:
        """Margins (steps,) under which at most a share `delta` of exchangeable images loses the right class.

        Raises `ValueError` for a delta outside (0, 1) and one that so few images cannot give.
        """
        number = quantile(self.scores, delta)
        # Where so many images have a gap at a step without spread, nobody may be dropped there.
        return torch.full_like(self.spread, torch.inf) if math.isinf(number) else number * self.spread


def quantile(scores: Tensor, delta: float) -> float:
    """The number that one more score, exchangeable with `scores` (n,), exceeds with probability `delta` at most.

    Raises `ValueError` for a delta outside (0, 1), and where that takes more scores.
    """
    check_delta(delta)
    count = len(scores)
    # Rounding must not ask for one more.
    rank = math.ceil((count + 1) * (1 - delta) - 1e-9)
    if rank > count:
        raise ValueError(
            f"delta: {100 * delta:g} % takes a calibration on at least {calibration_images_needed(delta)} images, "
            f"{images_needed(delta)} of them to count on; this one has {count} to count on"
        )
    return float(scores.sort().values[rank - 1])


def images_needed(delta: float) -> int:
    """How many images a guarantee of `delta` is counted on at least."""
    check_delta(delta)
    return math.ceil(1 / delta - 1 - 1e-9)


def calibration_images_needed(delta: float) -> int:
    """How many images a calibration takes at least, so that enough are left for `delta` after fitting."""
    count = max(MIN_IMAGES, math.floor(images_needed(delta) / (1 - FIT_SHARE)) - 2)
    while count - fit_images(count) < images_needed(delta):
        count += 1
    return count


def fit_images(count: int) -> int:
    """How many of `count` images fit slope, offsets and units; the others are counted on, so that the counts hold."""
    return max(2, round(FIT_SHARE * count))


def check_delta(delta: float) -> float:
    """`delta`. Raises `ValueError` unless it is a share between 0 and 1."""
    if not 0 < delta < 1:
        raise ValueError(f"delta: expected a share between 0 and 1, got {delta}")
    return delta


def share_bounds(hits: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """Confidence interval of a share of which `hits` of `count` were seen, two-sided at `level`, exact."""
    if not 0 <= hits <= count or count < 1:
        raise ValueError(f"hits: expected 0 to {count} of at least one, got {hits}")
    tail = (1 - level) / 2
    low = 0.0 if hits == 0 else _solve(lambda p: 1 - _binomial_cdf(hits - 1, count, p), tail)
    high = 1.0 if hits == count else _solve(lambda p: 1 - _binomial_cdf(hits, count, p), 1 - tail)
    return low, high


def _solve(rising: Callable[[float], float], wanted: float) -> float:
    """Where a function that rises on [0, 1] takes the value `wanted`."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < wanted else (low, middle)
    return (low + high) / 2


def _binomial_cdf(hits: int, count: int, share: float) -> float:
    """P(at most `hits` of `count`) for a share strictly between 0 and 1."""
    logs = [
        math.lgamma(count + 1) - math.lgamma(i + 1) - math.lgamma(count - i + 1)
        + i * math.log(share) + (count - i) * math.log1p(-share)
        for i in range(hits + 1)
    ]  # fmt: skip
    top = max(logs)
    return math.exp(top) * math.fsum(math.exp(x - top) for x in logs)
