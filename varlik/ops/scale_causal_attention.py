"""Attention that is full inside a scale and causal across scales, over keys and values in pages.

The last scales of a row attend to all coarser ones. Taken scale by scale that needs no mask; only small scales, which
are taken together, have one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from varlik.ops import _registry
from varlik.ops._registry import INT64, Argument, Signature
from varlik.ops.qk_norm import row_length

_ARGUMENTS = Signature(
    q=Argument("R T H D"),
    k_pages=Argument("P H D", "q"),
    v_pages=Argument("P H D", "q"),
    slots=Argument("R L", INT64, optional=True),
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

    Returns (R, T, H, D) in the dtype of `q`. Softmax in float32 or wider.

    Raises `ValueError` for other shapes or boundaries, several devices, an `impl` it lacks, or inputs that require
    grad; `TypeError` for other dtypes.

    Source: "Visual Autoregressive Modeling", Tian et al. 2024, section 3.2 (block-wise causal attention).
    """
    impl = _registry.choose_impl("scale_causal_attention", impl)
    sizes = _ARGUMENTS.check(q, k_pages, v_pages, slots)
    boundaries = list(boundaries)
    length, tokens = row_length(sizes, slots), sizes["T"]
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
    return _registry.call("scale_causal_attention", q, k_pages, v_pages, slots, boundaries, softmax_scale, impl)


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
    fake=lambda q, *_: q.new_empty(q.shape),
    flops=_flops,
)
