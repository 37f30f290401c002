"""What a classifier answers: the best classes, their scores and what it took to find them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from varlik import flops
from varlik.audit import Audit
from varlik.models.config import VARConfig, VQVAEConfig
from varlik.run import StageResult


@dataclass(frozen=True)
class Cost:
    """What a prediction took, for B images, N candidate classes and K scales; see `StageResult` for every stage.

    - `tokens_by_class` (B, N), `tokens_by_scale` (B, K): tokens that went forwards through the transformer; a pass that
      all classes share counts in the second alone. `tokens` (B,): of all scales.
    - `backward_tokens` (B,): tokens that went backwards.
    - `flops` (B,) int64: what that is in FLOPs, without encoding; `encode_flops`: to make an image's token maps.
    - `full_tokens`, `full_flops`: what a naive pass per candidate class would send and take for one image.
    - `seconds`: for the whole batch, tokenising included.
    """

    tokens_by_class: Tensor
    tokens_by_scale: Tensor
    backward_tokens: Tensor
    flops: Tensor
    encode_flops: int
    full_tokens: int
    full_flops: int
    seconds: float

    @property
    def tokens(self) -> Tensor:
        """Tokens (B,) that went forwards through the transformer for each image."""
        return self.tokens_by_scale.sum(1)

    @classmethod
    def of(
        cls, stages: Sequence[StageResult], var: VARConfig, vqvae: VQVAEConfig, classes: int, seconds: float
    ) -> Cost:
        """The cost of all `stages` together."""
        by_scale = torch.stack([stage.tokens_by_scale for stage in stages]).sum(0)
        backward = torch.stack([stage.backward_tokens for stage in stages]).sum(0)
        per_token = torch.tensor(flops.token_flops(var), device=by_scale.device)
        back = flops.first_order_backward(var, "true").total // (var.num_tokens - 1)
        product = flops.first_order_product(var, classes, "true").total * (backward > 0)
        return cls(
            tokens_by_class=torch.stack([stage.tokens_by_class for stage in stages]).sum(0),
            tokens_by_scale=by_scale,
            backward_tokens=backward,
            flops=(by_scale * per_token).sum(1) + back * backward + product,
            encode_flops=flops.encode(vqvae, "true").total,
            full_tokens=classes * var.num_tokens,
            full_flops=classes * flops.class_pass(var, None, "true").total,
            seconds=seconds,
        )


@dataclass(frozen=True)
class Prediction:
    """Answer for B images among N candidate classes.

    - `classes` (B,) int64: the best class of each image, `names` likewise as text.
    - `labels` (N,): the candidate classes; the columns below follow it.
    - `log_likelihood` (B, N): scores of the last stage in natural log, of the classes that got to its end; NaN for the
      others. Estimates if that stage is a `Screen`.
    - `posterior` (B, N): probability of each class under the prior; 0 for dropped classes.
    - `ranking` (B, N): all candidate classes, best first; a class dropped earlier stands behind those that went
      further.
    - `stages`: what every stage of the cascade scored. `cost`: what it took. `audit`: see `VARClassifier.classify`.
    """

    classes: Tensor
    names: tuple[str, ...]
    labels: Tensor
    log_likelihood: Tensor
    posterior: Tensor
    ranking: Tensor
    stages: tuple[StageResult, ...]
    cost: Cost
    audit: Audit | None = None

    def __len__(self) -> int:
        return len(self.classes)


def from_stages(
    labels: Tensor, log_prior: Tensor, stages: Sequence[StageResult], cost: Cost, name_of: Callable[[int], str]
) -> Prediction:
    """The answer that `stages` of a cascade give on candidate classes `labels` (N,) under `log_prior` (N,).

    `name_of` names a class.
    """
    last = stages[-1]
    finished = (last.reached > 0) & (last.reached == last.reached.amax(1, keepdim=True))
    log_likelihood = last.log_likelihood.masked_fill(~finished, torch.nan)
    posterior = (last.log_likelihood + log_prior).masked_fill(~finished, -torch.inf).softmax(-1)
    # Later stages overwrite earlier ones: a class is ranked by the last stage it was scored in, by how far it got
    # there, then by its score.
    progress = torch.zeros_like(last.reached)
    score = torch.zeros_like(last.log_likelihood)
    most = 1 + max(int(stage.reached.max()) for stage in stages)
    for number, stage in enumerate(stages, start=1):
        scored = stage.reached > 0
        progress = torch.where(scored, number * most + stage.reached, progress)
        score = torch.where(scored, stage.log_likelihood + log_prior, score)
    by_score = torch.argsort(score, dim=1, descending=True, stable=True)
    by_progress = torch.argsort(progress.gather(1, by_score), dim=1, descending=True, stable=True)
    ranking = labels[by_score.gather(1, by_progress)]
    names = tuple(name_of(int(i)) for i in ranking[:, 0])
    return Prediction(ranking[:, 0], names, labels, log_likelihood, posterior, ranking, tuple(stages), cost)


def merge_batches(parts: tuple[StageResult, ...]) -> StageResult:
    """One stage's results on several batches, as one."""
    names = ("log_likelihood", "reached", "tokens_by_class", "tokens_by_scale", "backward_tokens")
    merged: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return replace(parts[0], **merged, seconds=sum(part.seconds for part in parts))


def log_of_prior(prior: Sequence[float] | Tensor | None, count: int, device: torch.device) -> Tensor:
    """Log of a prior over `count` classes, normalised: (count,) float32; zeros for None, which is uniform.

    Raises `ValueError` for another length, and for values that are negative, not finite or all zero.
    """
    if prior is None:
        return torch.zeros(count, dtype=torch.float32, device=device)
    values = torch.as_tensor(prior, dtype=torch.float32, device=device)
    if values.shape != (count,):
        raise ValueError(f"prior: expected {count} values, one per class, got shape {tuple(values.shape)}")
    if not torch.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
        raise ValueError("prior: expected finite, non-negative values with a positive sum")
    return (values / values.sum()).log()
