"""From one number a token to a map of the image.

Token maps of all scales are laid over one another at the size of the last one. A token of a coarse map stands for a
large part of the image, and its number is spread over that part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Rule = Literal["area", "nearest"]


def by_scale(values: Tensor, patch_nums: Sequence[int]) -> list[Tensor]:
    """Values of tokens, (B, L), as maps (B, p, p) of each scale. Raises `ValueError` for another L."""
    sizes = [p * p for p in patch_nums]
    if values.dim() != 2 or values.shape[1] != sum(sizes):
        raise ValueError(f"values: expected (B, {sum(sizes)}), got {tuple(values.shape)}")
    return [part.view(-1, p, p) for part, p in zip(values.split(sizes, dim=1), patch_nums, strict=True)]


def compose(
    values: Tensor,
    patch_nums: Sequence[int],
    rule: Rule = "area",
    scale_weights: Sequence[float] | None = None,
) -> Tensor:
    """One map (B, P, P) of values of tokens (B, L), at the side P of the last scale; signed, and not normalised.

    - "area": every token spreads its value evenly over its part of the image, so that sums are kept.
    - "nearest": the released rule. Maps are resized by taking the nearest token, floor(i p / P), and weighted with
      (p / P)^2: where p does not divide P, some tokens count more than others.

    `scale_weights` (K,) multiply the scales (default: 1 each). Raises `ValueError` for an unknown rule and shapes that
    do not fit.
    """
    if rule not in get_args(Rule):
        raise ValueError(f"rule: expected 'area' or 'nearest', got {rule!r}")
    weights = [1.0] * len(patch_nums) if scale_weights is None else [float(w) for w in scale_weights]
    if len(weights) != len(patch_nums):
        raise ValueError(f"scale_weights: expected {len(patch_nums)} numbers, got {len(weights)}")
    side = patch_nums[-1]
    total = values.new_zeros(len(values), side, side)
    for part, weight in zip(by_scale(values, patch_nums), weights, strict=True):
        spread = _area(part.shape[-1], side) if rule == "area" else _nearest(part.shape[-1], side)
        total += weight * torch.einsum("ip,bpq,jq->bij", spread.to(values), part, spread.to(values))
    return total


def heat(maps: Tensor, size: int, signed: bool = False) -> Tensor:
    """Maps (B, P, P) as (B, size, size) for display, bilinearly enlarged.

    As released: negative values cut off, then scaled to [0, 1], an even map being 0. With `signed`, scaled to [-1, 1]
    by the largest magnitude, 0 staying 0.
    """
    if signed:
        scaled = maps / maps.abs().amax((1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
    else:
        cut = maps.clamp(min=0)
        low, high = cut.amin((1, 2), keepdim=True), cut.amax((1, 2), keepdim=True)
        scaled = (cut - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)
    return F.interpolate(scaled.unsqueeze(1), size=(size, size), mode="bilinear", align_corners=False)[:, 0]


def _area(own: int, side: int) -> Tensor:
    """Share (side, own) of each of `own` cells of a line that lies in each of `side` cells of it; columns sum to 1."""
    fine, coarse = torch.arange(side, dtype=torch.float64), torch.arange(own, dtype=torch.float64)
    low = torch.maximum(fine.unsqueeze(1) / side, coarse / own)
    high = torch.minimum((fine.unsqueeze(1) + 1) / side, (coarse + 1) / own)
    return (high - low).clamp(min=0) * own


def _nearest(own: int, side: int) -> Tensor:
    """Taking cell floor(i own / side) for cell i, times own / side: (side, own)."""
    chosen = torch.arange(side) * own // side
    return F.one_hot(chosen, own).double() * own / side
