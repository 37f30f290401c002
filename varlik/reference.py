"""The naive way: one class at a time, all logits, log-softmax, gather.

The oracle of every test and the baseline of every benchmark, written to be obviously right and done as the released
A-VARC code does it. Nothing here is shared with the fast path but the model itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varlik.models.var import VAR


@torch.no_grad()
def token_log_prob(
    var: VAR, tokens: Tensor, teacher_forcing_input: Tensor, label: int, num_scales: int | None = None
) -> Tensor:
    """log p(token | coarser token maps, class `label`), (B, L_k), for tokens (B, L) and inputs (B, L - 1, Cvae)."""
    labels = torch.full((len(tokens),), label, device=tokens.device)
    logits = var(var.class_vectors(labels), teacher_forcing_input, num_scales)
    log_prob = torch.log_softmax(logits, dim=-1)
    return log_prob.gather(-1, tokens[:, : logits.shape[1], None]).squeeze(-1)


@torch.no_grad()
def log_likelihood(
    var: VAR, tokens: Tensor, teacher_forcing_input: Tensor, labels: list[int], num_scales: int | None = None
) -> Tensor:
    """log p(x | class) for every class of `labels`, one class at a time: (B, N)."""
    scores = [token_log_prob(var, tokens, teacher_forcing_input, label, num_scales).sum(-1) for label in labels]
    return torch.stack(scores, dim=1)


@torch.no_grad()
def cascade(
    var: VAR,
    samples: list[tuple[Tensor, Tensor]],
    labels: list[int],
    stages: list[tuple[int, int, int]],
) -> tuple[list[int], list[tuple[list[int], Tensor]]]:
    """Classify one image by a cascade, each stage from scratch and one class at a time.

    `samples[s]` is (tokens (1, L), teacher-forcing input (1, L - 1, Cvae)) of sample s, the clean one first; a stage is
    (scales, samples, survivors). Returns the survivors of the last stage, best first, and for every stage its classes
    and their log-likelihoods averaged over samples.
    """
    alive, record = list(labels), []
    for num_scales, num_samples, keep in stages:
        scores = torch.stack(
            [log_likelihood(var, tokens, inputs, alive, num_scales)[0] for tokens, inputs in samples[:num_samples]]
        ).mean(0)
        record.append((alive, scores))
        order = torch.argsort(scores, descending=True, stable=True).tolist()
        alive = [alive[i] for i in order[:keep]]
    return alive, record
