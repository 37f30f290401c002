"""Log-probability of one token per row, without the logits of all rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from varlik.ops import _registry
from varlik.ops._registry import INT64, Argument, Signature

_HEAD = {"weight": Argument("V C", "hidden"), "bias": Argument("V")}
_ARGUMENTS = Signature(dict(hidden=Argument("M C"), **_HEAD, targets=Argument("M", INT64)), differentiable=True)
_SCALE_ARGUMENTS = Signature(dict(hidden=Argument("R T C"), **_HEAD, targets=Argument("R T", INT64)))
_BACKWARD_ARGUMENTS = Signature(dict(grad=Argument("M"), hidden=Argument("M C"), **_HEAD, targets=Argument("M", INT64)))


def token_log_prob(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, *, impl: str = "auto") -> Tensor:
    """log_softmax(hidden @ weight^T + bias)[targets], natural logarithm.

    `hidden` (M, C), `weight` (V, C) in the dtype of `hidden`, `bias` (V,), `targets` (M,) int64 in [0, V) -> (M,) in
    float32, or float64 for float64. Memory is O(M): logits and their softmax exist for one tile of rows at a time.
    Softmax in float32 or wider, and the bias is added there. Differentiable in `hidden`, `weight` and `bias`.

    Raises `ValueError` for other shapes, several devices or an `impl` it lacks; `TypeError` for other dtypes.

    Source: "Cut Your Losses in Large-Vocabulary Language Models", Wijmans et al. 2024, section 4, for the idea.
    """
    impl = _registry.choose_impl("token_log_prob", impl, hidden, weight, bias)
    _check_vocabulary(_ARGUMENTS.check(hidden, weight, bias, targets), weight)
    return _registry.call("token_log_prob", hidden, weight, bias, targets, impl)


def scale_log_prob(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, boundaries: Sequence[int], *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`token_log_prob` of whole rows, and its sums over the tokens of each scale.

    `hidden` (R, T, C), `targets` (R, T), `weight` and `bias` as for `token_log_prob`; `boundaries` are the token
    offsets of S scales, rising from 0 to T. Returns (R, T) and the sums (R, S), added up in float64, both in float32,
    or float64 for float64.

    Raises `ValueError` for other boundaries, and as `token_log_prob`; also for inputs that require grad.
    """
    impl = _registry.choose_impl("scale_log_prob", impl, hidden, weight, bias)
    sizes = _SCALE_ARGUMENTS.check(hidden, weight, bias, targets)
    _check_vocabulary(sizes, weight)
    boundaries = list(boundaries)
    ends = [0, sizes["T"]]
    if len(boundaries) < 2 or [boundaries[0], boundaries[-1]] != ends or any(a >= b for a, b in pairwise(boundaries)):
        raise ValueError(f"boundaries: expected to rise from 0 to T = {sizes['T']}, got {boundaries}")
    return _registry.call("scale_log_prob", hidden, weight, bias, targets, boundaries, impl)


def token_log_prob_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    *,
    weights: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of `token_log_prob`: of `hidden` (M, C) and, if asked for, of `weight` (V, C) and `bias` (V,).

    `grad` (M,) is the gradient of its output; all else as it went in. Logits are computed again; their gradient exists
    for one tile of rows at a time. Raises as `token_log_prob`.
    """
    impl = _registry.choose_impl("token_log_prob_backward", impl, hidden, weight, bias)
    _check_vocabulary(_BACKWARD_ARGUMENTS.check(grad, hidden, weight, bias, targets), weight)
    found = _registry.call("token_log_prob_backward", grad, hidden, weight, bias, targets, weights, impl)
    return found if weights else (found[0], None, None)


def _check_vocabulary(sizes: Mapping[str, int], weight: Tensor) -> None:
    if sizes["V"] == 0:
        raise ValueError(f"weight: expected shape (V, C) with V >= 1, got {tuple(weight.shape)}")


def _token_log_prob(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    dtype = _registry.accumulation_dtype(hidden.dtype)
    bias = bias.to(dtype)
    out = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
    for rows in _registry.tiles(len(hidden), len(weight) * dtype.itemsize, hidden.device):
        logits = torch.mm(hidden[rows], weight.T).to(dtype).add_(bias)
        out[rows] = torch.log_softmax(logits, dim=1).gather(1, targets[rows, None])[:, 0]
        del logits  # before the next tile is computed
    return out


def _scale_log_prob(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, boundaries: list[int]
) -> tuple[Tensor, Tensor]:
    log_prob = _token_log_prob(hidden.flatten(0, 1), weight, bias, targets.flatten()).view(targets.shape)
    parts = log_prob.double().split([b - a for a, b in pairwise(boundaries)], dim=1)
    return log_prob, torch.stack([part.sum(1) for part in parts], dim=1).to(log_prob.dtype)


def _backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _registry.accumulation_dtype(hidden.dtype)
    bias = bias.to(dtype)
    grad_hidden = hidden.new_empty(hidden.shape)
    grad_weight = torch.zeros(weight.shape if weights else 0, dtype=dtype, device=weight.device)
    grad_bias = torch.zeros(len(weight) if weights else 0, dtype=dtype, device=weight.device)
    for rows in _registry.tiles(len(hidden), len(weight) * dtype.itemsize, hidden.device):
        grad_logits = torch.mm(hidden[rows], weight.T).to(dtype).add_(bias).softmax(1).neg_()
        index = targets[rows, None]
        grad_logits.scatter_add_(1, index, torch.ones_like(index, dtype=dtype)).mul_(grad[rows, None].to(dtype))
        narrow = grad_logits.to(hidden.dtype)
        torch.mm(narrow, weight, out=grad_hidden[rows])
        if weights:
            grad_weight += narrow.T @ hidden[rows]
            grad_bias += grad_logits.sum(0)
    return grad_hidden, grad_weight.to(weight.dtype), grad_bias


def _autograd(inputs: list[Any], output: Any, needs: Any, impl: str, grad: Tensor) -> tuple[Any, ...]:
    hidden, weight, bias, targets = inputs
    found = token_log_prob_backward(grad, hidden, weight, bias, targets, weights=any(needs[1:3]), impl=impl)
    return found[0], found[1], None if found[2] is None else found[2].to(bias.dtype), None


def _triton(*inputs: Any) -> Tensor:
    from varlik.kernels.token_log_prob import token_log_prob as kernel

    return kernel(*inputs)


def _scale_triton(*inputs: Any) -> tuple[Tensor, Tensor]:
    from varlik.kernels.token_log_prob import scale_log_prob as kernel

    return kernel(*inputs)


def _backward_triton(grad: Tensor, hidden: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    from varlik.kernels.token_log_prob import token_log_prob_backward as kernel

    rows = max(1, _registry.tile_bytes(hidden.device) // (len(weight) * hidden.element_size()))
    return kernel(grad, hidden, weight, *others, rows)


def _backward_fake(grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, weights: bool) -> Any:
    dtype = _registry.accumulation_dtype(hidden.dtype)
    grad_bias = bias.new_empty(bias.shape if weights else (0,), dtype=dtype)
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape if weights else (0,)), grad_bias


def _scale_fake(hidden: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    rows, tokens, _ = hidden.shape
    dtype = _registry.accumulation_dtype(hidden.dtype)
    return hidden.new_empty(rows, tokens, dtype=dtype), hidden.new_empty(rows, len(others[-1]) - 1, dtype=dtype)


def _fake(hidden: Tensor, *_: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=_registry.accumulation_dtype(hidden.dtype))


def _flops(hidden: Sequence[int], weight: Sequence[int], *_: Any) -> int:
    return 2 * math.prod(hidden) * weight[0]


def _backward_flops(
    grad: Sequence[int], hidden: Sequence[int], weight: Sequence[int], bias: Any, targets: Any, weights: bool
) -> int:
    return (3 if weights else 2) * _flops(hidden, weight)


_registry.register(
    "token_log_prob",
    "(Tensor hidden, Tensor weight, Tensor bias, Tensor targets, str impl) -> Tensor",
    torch_path=_token_log_prob,
    triton_path=_triton,
    fake=_fake,
    flops=_flops,
    backward=_autograd,
)
_registry.register(
    "scale_log_prob",
    "(Tensor hidden, Tensor weight, Tensor bias, Tensor targets, int[] boundaries, str impl) -> (Tensor, Tensor)",
    torch_path=_scale_log_prob,
    triton_path=_scale_triton,
    fake=_scale_fake,
    flops=_flops,
)
_registry.register(
    "token_log_prob_backward",
    "(Tensor grad, Tensor hidden, Tensor weight, Tensor bias, Tensor targets, bool weights, str impl)"
    " -> (Tensor, Tensor, Tensor)",
    torch_path=_backward,
    triton_path=_backward_triton,
    fake=_backward_fake,
    flops=_backward_flops,
)
