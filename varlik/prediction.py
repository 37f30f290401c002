"""What a classifier answers: the best classes, their scores and what it took to find them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from varlik.cascade import StageResult


@dataclass(frozen=True)
class Cost:
    """What a prediction took.

    `tokens` (B,) that went through the transformer for each image, `full_tokens` that a naive pass per candidate class
    would send, `seconds` for the whole batch, tokenising included.
    """

    tokens: Tensor
    full_tokens: int
    seconds: float


@dataclass(frozen=True)
class Prediction:
    """Answer for B images among N candidate classes.

    - `classes` (B,) int64: the best class of each image, `names` likewise as text.
    - `labels` (N,): the candidate classes; the columns below follow it.
    - `log_likelihood` (B, N): scores of the last stage in natural log; NaN for classes that an earlier stage dropped.
    - `posterior` (B, N): probability of each class under the prior; 0 for dropped classes.
    - `ranking` (B, N): all candidate classes, best first; a class dropped earlier stands behind those that went
      further.
    - `stages`: what every stage of the cascade scored. `cost`: what it took.
    """

    classes: Tensor
    names: tuple[str, ...]
    labels: Tensor
    log_likelihood: Tensor
    posterior: Tensor
    ranking: Tensor
    stages: tuple[StageResult, ...]
    cost: Cost

    def __len__(self) -> int:
        return len(self.classes)


def from_stages(
    labels: Tensor, log_prior: Tensor, stages: Sequence[StageResult], cost: Cost, name_of: Callable[[int], str]
) -> Prediction:
    """The answer that `stages` of a cascade give on candidate classes `labels` (N,).

    `log_prior` has an entry for every class of the model, the null class included; `name_of` names a class.
    """
    column = torch.full_like(log_prior, -1, dtype=torch.int64)
    column[labels] = torch.arange(len(labels), device=labels.device)
    last = stages[-1]
    shape = (len(last.labels), len(labels))
    log_likelihood = torch.full(shape, torch.nan, dtype=torch.float32, device=labels.device)
    log_likelihood.scatter_(1, column[last.labels], last.log_likelihood)
    posterior = torch.zeros(shape, dtype=torch.float32, device=labels.device)
    posterior.scatter_(1, column[last.labels], (last.log_likelihood + log_prior[last.labels]).softmax(-1))
    # Later stages overwrite earlier ones: a class is ranked by the last stage it reached, then by its score there.
    reached = torch.zeros(shape, dtype=torch.float32, device=labels.device)
    score = torch.zeros(shape, dtype=torch.float32, device=labels.device)
    for number, stage in enumerate(stages, start=1):
        columns = column[stage.labels]
        reached.scatter_(1, columns, float(number))
        score.scatter_(1, columns, stage.log_likelihood + log_prior[stage.labels])
    by_score = torch.argsort(score, dim=1, descending=True, stable=True)
    by_stage = torch.argsort(reached.gather(1, by_score), dim=1, descending=True, stable=True)
    ranking = labels[by_score.gather(1, by_stage)]
    names = tuple(name_of(int(i)) for i in ranking[:, 0])
    return Prediction(ranking[:, 0], names, labels, log_likelihood, posterior, ranking, tuple(stages), cost)


def merge_batches(parts: tuple[StageResult, ...]) -> StageResult:
    """One stage's results on several batches, as one."""
    return replace(
        parts[0],
        labels=torch.cat([part.labels for part in parts]),
        log_likelihood=torch.cat([part.log_likelihood for part in parts]),
        tokens=torch.cat([part.tokens for part in parts]),
        seconds=sum(part.seconds for part in parts),
    )
