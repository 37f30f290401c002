"""Muon: momentum whose matrix updates are orthogonalised (Jordan et al. 2024).

`torch.optim.Muon` does the same in bfloat16, which a CPU without bfloat16 arithmetic emulates: fifty times slower there
than this float32 version. Learning rates mean what they mean for AdamW, since updates are scaled to its usual size
(0.2 RMS; Liu et al. 2025, "Muon is scalable for LLM training", section 2.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic that pushes singular values towards 1; from Jordan et al.
NEWTON_SCHULZ_STEPS = 5
UPDATE_RMS = 0.2


def orthogonalise(matrix: Tensor) -> Tensor:
    """Nearly the closest matrix of (m, n) with all singular values equal: they end between about 0.7 and 1.2."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay. For matrices only.

    Raises `ValueError` for parameters that are no matrices.
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.05, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() != 2:
                    raise ValueError(f"Muon: expected matrices, got a parameter of shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure=None):
        """One update from the gradients."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                average = state["momentum"].lerp_(parameter.grad, 1 - momentum)
                update = orthogonalise(parameter.grad.lerp(average, momentum))
                size = UPDATE_RMS * max(parameter.shape) ** 0.5
                parameter.mul_(1 - rate * group["weight_decay"]).add_(update, alpha=-rate * size)
        return loss
