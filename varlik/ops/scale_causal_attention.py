"""Attention that is full inside a scale and causal across scales, over keys and values in pages.

The last scales of a row attend to all coarser ones. Taken scale by scale that needs no mask; only small scales, which
are taken together, have one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varlik.ops import _registry
from varlik.ops._registry import INT64, Argument, Signature
from varlik.ops.qk_norm import row_length

_ARGUMENTS = Signature(
    {
        "q": Argument("R T H D"),
        "k_pages": Argument("P H D", "q"),
        "v_pages": Argument("P H D", "q"),
        "slots": Argument("R L", INT64, optional=True),
    },
    differentiable=True,
)
_BACKWARD_ARGUMENTS = Signature(
    {
        "grad": Argument("R T H D"),
        "q": Argument("R T H D", "grad"),
        "k_pages": Argument("P H D", "grad"),
        "v_pages": Argument("P H D", "grad"),
    }
)

# Leading scales that together have no more queries than this are taken as one, under a mask: at such sizes a call costs
# more than the masked pairs do.
MERGED_TOKENS = 64


def scale_causal_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor | None,
    boundaries: Sequence[int],
    *,
    softmax_scale: float,
    impl: str = "auto",
) -> Tensor:
    """softmax(softmax_scale * q k^T) v over the keys of all scales up to the query's own.

    - `q` (R, T, H, D): queries of the last T tokens, which are whole scales.
    - `k_pages`, `v_pages` (P, H, D), in the dtype of `q`.
    - `slots` (R, L) int64 in [0, P): where the keys and values of each row's tokens 0 to L - 1 lie. Rows may share.
      None stands for rows that lie side by side, P = R * L: token t of row r has slot r * L + t.
    - `boundaries`: token offsets of the scales, rising from 0 to L; T must start at one of them.

    Returns (R, T, H, D) in the dtype of `q`. Softmax in float32 or wider. Differentiable for rows side by side.

    Raises `ValueError` for other shapes or boundaries, several devices, an `impl` it lacks, and gradients
    with slots; `TypeError` for other dtypes.

    Source: "Visual Autoregressive Modeling", Tian et al. 2024, section 3.2 (block-wise causal attention).
    """
    impl = _registry.choose_impl("scale_causal_attention", impl, q, k_pages, v_pages)
    sizes = _ARGUMENTS.check(q, k_pages, v_pages, slots)
    boundaries = _check_boundaries(boundaries, row_length(sizes, slots), sizes["T"], q)
    if slots is not None and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k_pages, v_pages)):
        raise ValueError("slots: gradients are for rows side by side, which take no slots; use torch.no_grad()")
    return _registry.call("scale_causal_attention", q, k_pages, v_pages, slots, boundaries, softmax_scale, impl)


def scale_causal_attention_backward(
    grad: Tensor,
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    boundaries: Sequence[int],
    *,
    softmax_scale: float,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `scale_causal_attention` without slots: of q, (R, T, H, D), k and v, (P, H, D) each.

    `grad` (R, T, H, D) is the gradient of its output; all else as it went in. Attention weights are computed again,
    and sums run in a fixed order. Raises as `scale_causal_attention` does.
    """
    impl = _registry.choose_impl("scale_causal_attention_backward", impl, grad, q, k_pages, v_pages)
    sizes = _BACKWARD_ARGUMENTS.check(grad, q, k_pages, v_pages)
    boundaries = _check_boundaries(boundaries, row_length(sizes, None), sizes["T"], q)
    inputs = (grad, q, k_pages, v_pages, boundaries, softmax_scale)
    return _registry.call("scale_causal_attention_backward", *inputs, impl)


def _check_boundaries(boundaries: Sequence[int], length: int, tokens: int, q: Tensor) -> list[int]:
    boundaries = list(boundaries)
    if (
        len(boundaries) < 2
        or boundaries[0] != 0
        or boundaries[-1] != length
        or any(a >= b for a, b in pairwise(boundaries))
    ):
        raise ValueError(f"boundaries: expected to rise from 0 to L = {length}, got {boundaries}")
    if length - tokens not in boundaries[:-1]:
        raise ValueError(
            f"q: expected shape (R, T, H, D) with T = {length} - b for one b of {boundaries[:-1]}, got {tuple(q.shape)}"
        )
    return boundaries


def _scales(boundaries: Sequence[int], tokens: int) -> Iterator[tuple[int, int]]:
    """First token and end of each scale that the last `tokens` tokens hold."""
    start = boundaries[-1] - tokens
    return ((a, b) for a, b in pairwise(boundaries) if a >= start)


def _scale_causal_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor | None, boundaries: list[int], softmax_scale: float
) -> Tensor:
    rows, tokens, heads, head_dim = q.shape
    start = boundaries[-1] - tokens
    # Rows side by side, (R, L, H, D), read as (R, H, L, D); one copy of what is not so serves all scales.
    keys, values = (
        (pages.unflatten(0, (rows, -1)) if slots is None else _gather(pages, slots)).transpose(1, 2)
        if rows
        else pages.new_empty(0, heads, boundaries[-1], head_dim)
        for pages in (k_pages, v_pages)
    )
    queries = q.transpose(1, 2)
    parts = [
        F.scaled_dot_product_attention(
            queries[:, :, a - start : b - start], keys[:, :, :b], values[:, :, :b], mask, scale=softmax_scale
        ).transpose(1, 2)
        for a, b, mask in _runs(tuple(boundaries), tokens, q.dtype, q.device)
    ]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0].contiguous()


def _gather(pages: Tensor, slots: Tensor) -> Tensor:
    """(P, H, D), (R, L) -> (R, L, H, D)."""
    return F.embedding(slots, pages.flatten(1)).unflatten(-1, pages.shape[1:])


@lru_cache(maxsize=64)  # every block of a transformer asks for the same
def _runs(
    boundaries: tuple[int, ...], tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[int, int, Tensor | None], ...]:
    """First token, end and mask of each part that is one call: a scale, or the leading scales that are merged."""
    scales = list(_scales(boundaries, tokens))
    first = scales[0][0]
    merged = [(a, b) for a, b in scales if b - first <= MERGED_TOKENS]
    if len(merged) < 2:
        return tuple((a, b, None) for a, b in scales)
    end = merged[-1][1]
    mask = torch.zeros(end - first, end, dtype=dtype, device=device)
    for a, b in merged:
        mask[a - first : b - first, b:] = -torch.inf
    return ((first, end, mask), *((a, b, None) for a, b in scales[len(merged) :]))


def _backward(
    grad: Tensor, q: Tensor, k_pages: Tensor, v_pages: Tensor, boundaries: list[int], softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale by scale, so that the weights of one scale exist at a time; from the last, whose queries see every key."""
    rows, tokens, heads, head_dim = q.shape
    length, inner = boundaries[-1], _registry.accumulation_dtype(q.dtype)
    start = length - tokens
    # The factor goes to the queries and, at the end, to their gradient: both are smaller than the logits.
    queries, grads = _by_head(q.to(inner) * softmax_scale), _by_head(grad.to(inner))
    keys, values = (_by_head(x.reshape(rows, length, heads, head_dim).to(inner)) for x in (k_pages, v_pages))
    grad_q = q.new_empty(q.shape)
    grad_keys, grad_values = keys.new_empty(0), keys.new_empty(0)
    for a, b, mask in reversed(_runs(tuple(boundaries), tokens, inner, q.device)):
        q_part, grad_part = (x.narrow(1, a - start, b - a) for x in (queries, grads))
        k_part, v_part = (x.narrow(1, 0, b) for x in (keys, values))
        # Every product comes as soon as it can, while what it reads is in a CPU's caches.
        logits = torch.bmm(q_part, k_part.mT) if mask is None else torch.baddbmm(mask, q_part, k_part.mT)
        weights = logits.softmax(-1)
        found_values = torch.bmm(weights.mT, grad_part)
        grad_logits = torch._softmax_backward_data(torch.bmm(grad_part, v_part.mT), weights, -1, inner)
        found_keys = torch.bmm(grad_logits.mT, q_part)
        found_q = _by_token(torch.bmm(grad_logits, k_part), rows)
        torch.mul(found_q, softmax_scale, out=grad_q.narrow(1, a - start, b - a))
        if b == length:
            grad_keys, grad_values = found_keys, found_values
        else:
            grad_keys.narrow(1, 0, b).add_(found_keys)
            grad_values.narrow(1, 0, b).add_(found_values)
    grad_k, grad_v = (_by_token(x, rows).to(q.dtype).contiguous() for x in (grad_keys, grad_values))
    return grad_q, grad_k.view(k_pages.shape), grad_v.view(v_pages.shape)


def _by_head(x: Tensor) -> Tensor:
    """(R, T, H, D) -> (R H, T, D), copied: batched products of other layouts are slower than the copy."""
    return x.transpose(1, 2).reshape(x.shape[0] * x.shape[2], x.shape[1], x.shape[3])


def _by_token(x: Tensor, rows: int) -> Tensor:
    """(R H, T, D) -> (R, T, H, D), a view."""
    return x.view(rows, len(x) // max(rows, 1), x.shape[1], x.shape[2]).transpose(1, 2)


def _autograd(inputs: list[Any], output: Any, needs: Any, impl: str, grad: Tensor) -> tuple[Any, ...]:
    q, k_pages, v_pages, _, boundaries, softmax_scale = inputs
    found = scale_causal_attention_backward(
        grad, q, k_pages, v_pages, boundaries, softmax_scale=softmax_scale, impl=impl
    )
    return *found, None, None, None


def _triton(*inputs: Any) -> Tensor:
    from varlik.kernels.scale_causal_attention import scale_causal_attention as kernel

    return kernel(*inputs)


def _backward_triton(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    from varlik.kernels.scale_causal_attention_backward import scale_causal_attention_backward as kernel

    return kernel(*inputs)


def _flops(
    q: Sequence[int],
    k_pages: Sequence[int],
    v_pages: Sequence[int],
    slots: Sequence[int] | None,
    boundaries: list[int],
    softmax_scale: float,
) -> int:
    rows, tokens, heads, head_dim = q
    pairs = sum((b - a) * b for a, b in _scales(boundaries, tokens))
    return 2 * 2 * rows * heads * head_dim * pairs


_registry.register(
    "scale_causal_attention",
    "(Tensor q, Tensor k_pages, Tensor v_pages, Tensor? slots, int[] boundaries, float softmax_scale, str impl)"
    " -> Tensor",
    torch_path=_scale_causal_attention,
    triton_path=_triton,
    fake=lambda q, *_: q.new_empty(q.shape),
    flops=_flops,
    backward=_autograd,
)
_registry.register(
    "scale_causal_attention_backward",
    "(Tensor grad, Tensor q, Tensor k_pages, Tensor v_pages, int[] boundaries, float softmax_scale, str impl)"
    " -> (Tensor, Tensor, Tensor)",
    torch_path=_backward,
    triton_path=_backward_triton,
    fake=lambda grad, q, k, v, *_: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)),
    # Logits again, and the gradients of weights, values, queries and keys: five products where forward has two.
    flops=lambda grad, q, k, v, boundaries, scale: 5 * _flops(q, k, v, None, boundaries, scale) // 2,
)
