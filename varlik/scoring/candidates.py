"""Candidates: the live rows of an engine, what they have scored and where their keys and values lie."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from varlik.models.config import VARConfig

if TYPE_CHECKING:
    from varlik.scoring.engine import Engine


@dataclass
class Candidates:
    """R rows (image, sample, class) of one engine: what they have scored so far and where their keys and values lie.

    - `image`, `sample`, `label`, `source` (R,): the row's image, sample number, class, and token maps in `tokens`.
    - `log_likelihood` (R, K): natural log, summed over the tokens of each scale; NaN where not scored yet.
    - `token_log_prob` (R, L): kept when asked for at `open`, NaN where not scored yet.
    - `scored` (R,): scales scored; `cached` (R,): scales whose keys and values are in `pages` (R, K).
    - `tokens` (M, L), `inputs` (M, L - 1, Cvae): token maps and teacher-forcing input of M (image, sample) pairs.
    - `evaluated` (R, K): tokens of each scale that went through the transformer for the row.
    - `shared_prefix`: scales whose pages are the null class's, see `Engine.open`.
    """

    engine: Engine | None = field(repr=False)  # None when used up
    image: Tensor
    sample: Tensor
    label: Tensor
    source: Tensor
    log_likelihood: Tensor
    token_log_prob: Tensor | None
    scored: Tensor
    cached: Tensor
    pages: Tensor
    evaluated: Tensor
    tokens: Tensor
    inputs: Tensor
    shared_prefix: int = 0

    def __len__(self) -> int:
        return len(self.label)

    def per_token(self) -> Tensor:
        """log p(token | coarser token maps, class), (R, L). Raises `ValueError` if not asked for at `open`."""
        if self.token_log_prob is None:
            raise ValueError("candidates: opened without per_token")
        return self.token_log_prob

    def total(self, scales: int) -> Tensor:
        """log p(first `scales` token maps | class), (R,); NaN for rows not scored so far."""
        return self.log_likelihood[:, :scales].double().sum(1).float()


# The tensors that have an entry for each row.
PER_ROW = ("image", "sample", "label", "source", "log_likelihood", "scored", "cached", "pages", "evaluated")


def agreeing_scales(config: VARConfig, clean: Tensor, other: Tensor) -> Tensor:
    """How many leading scales agree in every token, (n,), of tokens (n, L)."""
    equal = clean == other
    whole = [equal[:, a:b].all(1) for a, b in itertools.pairwise(config.boundaries)]
    return torch.stack(whole, dim=1).long().cumprod(1).sum(1)
