"""Calibrated posteriors: summed log-likelihoods are over-confident, for the tokens of an image are not independent."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS = 100


def fit_temperature(exact: Tensor, truth: Tensor) -> Tensor:
    """Temperatures (K,): posteriors of the first k scales are softmax(log-likelihood / temperature[k - 1]).

    Of log-likelihoods (n, N, K) of each scale and true columns (n,), by maximum likelihood. Source: "On Calibration of
    Modern Neural Networks", Guo et al. 2017, section 4.2.
    """
    sums = exact.cumsum(-1)

    def loss(log_temperature: Tensor) -> Tensor:
        logits = sums / log_temperature.exp()
        return F.cross_entropy(logits, truth.unsqueeze(1).expand(-1, logits.shape[-1]))

    return _minimise(loss, torch.ones(exact.shape[-1], dtype=exact.dtype)).exp()


def fit_scale_weights(exact: Tensor, truth: Tensor) -> Tensor:
    """Weights (K,) of the scales: posteriors are softmax(sum of weights[k] * log-likelihood of scale k)."""

    def loss(weights: Tensor) -> Tensor:
        return F.cross_entropy(exact @ weights, truth)

    return _minimise(loss, torch.full((exact.shape[-1],), 0.3, dtype=exact.dtype))


def _minimise(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Where a convex function of few numbers is least."""
    values = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([values], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss(values)
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(closure)
    return values.detach()
