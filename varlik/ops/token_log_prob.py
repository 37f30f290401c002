"""Log-probability of one token per row, without the logits of all rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from varlik.ops import _registry
from varlik.ops._registry import INT64, Argument, Signature

_ARGUMENTS = Signature(
    hidden=Argument("M C"), weight=Argument("V C", "hidden"), bias=Argument("V"), targets=Argument("M", INT64)
)


def token_log_prob(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, *, impl: str = "auto") -> Tensor:
    """log_softmax(hidden @ weight^T + bias)[targets], natural logarithm.

    `hidden` (M, C), `weight` (V, C) in the dtype of `hidden`, `bias` (V,), `targets` (M,) int64 in [0, V) -> (M,) in
    float32, or float64 for float64. Memory is O(M): logits and their softmax exist for one tile of rows at a time.
    Softmax in float32 or wider, and the bias is added there.

    Raises `ValueError` for other shapes, several devices, an `impl` it lacks, or inputs that require grad; `TypeError`
    for other dtypes.

    Source: "Cut Your Losses in Large-Vocabulary Language Models", Wijmans et al. 2024, section 4, for the idea.
    """
    impl = _registry.choose_impl("token_log_prob", impl)
    sizes = _ARGUMENTS.check(hidden, weight, bias, targets)
    if sizes["V"] == 0:
        raise ValueError(f"weight: expected shape (V, C) with V >= 1, got {tuple(weight.shape)}")
    return _registry.call("token_log_prob", hidden, weight, bias, targets, impl)


def _token_log_prob(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    dtype = _registry.accumulation_dtype(hidden.dtype)
    bias = bias.to(dtype)
    out = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
    for rows in _registry.tiles(len(hidden), len(weight) * dtype.itemsize, hidden.device):
        logits = torch.mm(hidden[rows], weight.T).to(dtype).add_(bias)
        out[rows] = torch.log_softmax(logits, dim=1).gather(1, targets[rows, None])[:, 0]
        del logits  # before the next tile is computed
    return out


def _fake(hidden: Tensor, *_: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=_registry.accumulation_dtype(hidden.dtype))


def _flops(hidden: Sequence[int], weight: Sequence[int], bias: Sequence[int], targets: Sequence[int]) -> int:
    (rows, width), (vocabulary, _) = hidden, weight
    return 2 * rows * width * vocabulary


_registry.register(
    "token_log_prob",
    "(Tensor hidden, Tensor weight, Tensor bias, Tensor targets, str impl) -> Tensor",
    torch_path=_token_log_prob,
    fake=_fake,
    flops=_flops,
)
