"""Attention that is full inside a scale and causal across scales, over keys and values in pages.

The last scales of a row attend to all coarser ones. Taken scale by scale that needs no mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from varlik.ops import _registry
from varlik.ops._registry import INT64, Argument


def scale_causal_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    boundaries: Sequence[int],
    *,
    softmax_scale: float,
    impl: str = "auto",
) -> Tensor:
    """softmax(softmax_scale * q k^T) v over the keys of all scales up to the query's own.

    - `q` (R, T, H, D): queries of the last T tokens, which are whole scales.
    - `k_pages`, `v_pages` (P, H, D), in the dtype of `q`.
    - `slots` (R, L) int64 in [0, P): where the keys and values of each row's tokens 0 to L - 1 lie. Rows may share.
    - `boundaries`: token offsets of the scales, rising from 0 to L; T must start at one of them.

    Returns (R, T, H, D) in the dtype of `q`. Softmax in float32 or wider.

    Raises `ValueError` for other shapes or boundaries, several devices, an `impl` it lacks, or inputs that require
    grad; `TypeError` for other dtypes.

    Source: "Visual Autoregressive Modeling", Tian et al. 2024, section 3.2 (block-wise causal attention).
    """
    impl = _registry.choose_impl("scale_causal_attention", impl)
    sizes = _registry.check(
        Argument("q", q, ("R", "T", "H", "D")),
        Argument("k_pages", k_pages, ("P", "H", "D"), "q"),
        Argument("v_pages", v_pages, ("P", "H", "D"), "q"),
        Argument("slots", slots, ("R", "L"), INT64),
    )
    boundaries = list(boundaries)
    length, tokens = sizes["L"], sizes["T"]
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
    return torch.ops.varlik.scale_causal_attention(q, k_pages, v_pages, slots, boundaries, softmax_scale, impl)


def _scales(boundaries: Sequence[int], tokens: int) -> Iterator[tuple[int, int]]:
    """First token and end of each scale that the last `tokens` tokens hold."""
    start = boundaries[-1] - tokens
    return ((a, b) for a, b in pairwise(boundaries) if a >= start)


def _scale_causal_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor, boundaries: list[int], softmax_scale: float
) -> Tensor:
    start = boundaries[-1] - q.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # One copy of the rows' keys and values, (R, H, L, D) in the order (R, L, H, D), serves all scales.
    keys, values = (
        F.embedding(slots, pages.flatten(1)).unflatten(-1, pages.shape[1:]).transpose(1, 2)
        for pages in (k_pages, v_pages)
    )
    queries = q.transpose(1, 2)
    for a, b in _scales(boundaries, q.shape[1]):
        part = slice(a - start, b - start)
        attended = F.scaled_dot_product_attention(
            queries[:, :, part], keys[:, :, :b], values[:, :, :b], scale=softmax_scale
        )
        out[:, part] = attended.transpose(1, 2)
    return out


def _flops(
    q: Sequence[int],
    k_pages: Sequence[int],
    v_pages: Sequence[int],
    slots: Sequence[int],
    boundaries: list[int],
    softmax_scale: float,
) -> int:
    rows, tokens, heads, head_dim = q
    pairs = sum((b - a) * b for a, b in _scales(boundaries, tokens))
    return 2 * 2 * rows * heads * head_dim * pairs


_registry.register(
    "scale_causal_attention",
    "(Tensor q, Tensor k_pages, Tensor v_pages, Tensor slots, int[] boundaries, float softmax_scale, str impl)"
    " -> Tensor",
    torch_path=_scale_causal_attention,
    fake=lambda q, *_: q.new_empty(q.shape),
    flops=_flops,
)
