"""Log-likelihoods that can be differentiated with respect to the weights, without logits of all rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from varlik import ops
from varlik.models.var import VAR, ClassVectors
from varlik.training.data import TrainingTokens

Score = Callable[[Tensor, Tensor, Tensor], Tensor]  # labels, tokens, inputs -> log-likelihoods (R,)
VALIDATION_BATCH = 64


def log_likelihood(model: VAR, vectors: ClassVectors, tokens: Tensor, inputs: Tensor) -> Tensor:
    """log p(image | class), summed over tokens in float64: (R,), differentiable in weights and class vectors.

    `vectors` hold R rows; `tokens` (R, L) int64, `inputs` (R, L - 1, Cvae). Obeys autocast. Logits (R, L, V) never
    exist, only one tile of them at a time, forwards and backwards. Raises as the model and `varlik.ops.token_log_prob`.
    """
    hidden = model.hidden(vectors, inputs)
    scale, shift = vectors.head.unbind(1)
    device, head = hidden.device.type, model.head
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    # Inside the ops autocast would cast once more, and to half precision what is float32 with good reason.
    with torch.autocast(device, enabled=False):
        normed = ops.ada_layer_norm(hidden, scale, shift, None, dtype=dtype)
        log_prob = ops.token_log_prob(normed.flatten(0, 1), head.weight.to(dtype), head.bias, tokens.flatten())
    return log_prob.view(tokens.shape).double().sum(1)


def score_of(model: VAR, compiled: bool = False) -> Score:
    """`log_likelihood` of labels under `model` as it is when called, through `torch.compile` where `compiled`."""

    def score(labels: Tensor, tokens: Tensor, inputs: Tensor) -> Tensor:
        return log_likelihood(model, model.class_vectors(labels), tokens, inputs)

    return torch.compile(score) if compiled else score


@torch.no_grad()
def mean_log_likelihood(score: Score, data: TrainingTokens) -> float:
    """Of the plain images under their own classes, per image, in nats."""
    total = 0.0
    for rows in torch.arange(len(data)).split(VALIDATION_BATCH):
        tokens, inputs, labels = data.batch(rows)
        total += score(labels, tokens, inputs).double().sum().item()
    return total / len(data)
