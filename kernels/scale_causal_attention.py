"""Attention that is full inside a scale and causal across scales, over keys and values in pages.

    out[r, t, h] = sum_j p_j v[slot(r, j), h],   p = softmax_j(scale q[r, t, h] . k[slot(r, j), h]),   j < key_end[t]

`q` (R, T, H, D) are the queries of a row's last T tokens, `key_end[t]` is where the scale of token t ends. Queries are
cut into tiles that do not straddle scales; only leading scales that together fit one tile are merged, under the mask
above. A tile reads keys up to the end of its last scale, so dead work stays near the attended pairs (`work`).

Where the tokens of a launch fill a tile to a half or less, and rows are enough to keep a device busy all the same, a
tile takes several rows. Keys of a block that all of them read from the same slots (a shared page) are loaded once;
otherwise each row's are loaded in turn, and none sees another's.

Softmax is online, in float32, over key blocks that start at 0 whatever the tiles: for a query, blocks after its last
key change nothing, so neither the split of scales into launches nor other rows change a bit. Products of float32 are
float32, not TF32. Keys beyond a tile's last are read as 0; all others must have been written.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from varlik.kernels import _launch
from varlik.kernels._tiles import Limits, Tiles

LOG2_E = tl.constexpr(1.4426950408889634)
BUSY = 256  # programs that keep every multiprocessor of a device at work


@triton.jit
def _slots(slots_ptr, row, n, mask, stride_sr, stride_sl, length):
    """Where the keys of tokens `n` of `row` lie."""
    if slots_ptr is None:
        slot = row * length + n
    else:
        slot = tl.load(slots_ptr + row * stride_sr + n * stride_sl, mask=mask, other=0)
    return slot


@triton.jit(do_not_specialize=["rows", "tokens", "length", "num_tiles"])
def _attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    slots_ptr,
    tile_ptr,  # (num_tiles, 3): first query, end of queries, end of keys
    key_end_ptr,  # (T,)
    out_ptr,
    stride_qr,
    stride_qt,
    stride_qh,
    stride_kp,
    stride_kh,
    stride_vp,
    stride_vh,
    stride_sr,
    stride_sl,
    rows,
    tokens,
    length,
    num_tiles,
    softmax_scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile = tile_ptr + 3 * (tl.program_id(0) % num_tiles)
    first, end, keys = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    row0 = (tl.program_id(0) // num_tiles).to(tl.int64) * ROWS
    h = tl.program_id(1).to(tl.int64)
    SPAN: tl.constexpr = BLOCK_M // ROWS
    m = tl.arange(0, BLOCK_M)  # (BLOCK_M,): row by row, token by token
    row, t = row0 + m // SPAN, first + m % SPAN
    mask_m = (row < rows) & (t < end)
    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD_DIM
    place = row * stride_qr + t.to(tl.int64) * stride_qt + h * stride_qh
    q = tl.load(q_ptr + place[:, None] + d[None, :], mask=mask_m[:, None] & in_head[None, :], other=0.0)
    key_end = tl.load(key_end_ptr + t, mask=mask_m, other=0)
    k_ptr += h * stride_kh
    v_ptr += h * stride_vh

    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, keys, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        mask_n = n < keys
        mask_mn = n[None, :] < key_end[:, None]
        turns = 1
        if ROWS > 1:
            # Rows beyond the last stand for it: they neither end the sharing nor are stored.
            others = tl.minimum(row0 + tl.arange(0, ROWS), rows - 1)  # (ROWS,)
            slots = _slots(slots_ptr, others[:, None], n[None, :], mask_n[None, :], stride_sr, stride_sl, length)
            if tl.max(tl.max(slots, 0) - tl.min(slots, 0), 0) > 0:
                turns = ROWS
        for turn in range(turns):
            one = tl.minimum(row0 + turn, rows - 1)
            slot = _slots(slots_ptr, one, n, mask_n, stride_sr, stride_sl, length)
            mask_nd = mask_n[:, None] & in_head[None, :]
            k = tl.load(k_ptr + slot[:, None] * stride_kp + d[None, :], mask=mask_nd, other=0.0)  # (BLOCK_N, BLOCK_D)
            v = tl.load(v_ptr + slot[:, None] * stride_vp + d[None, :], mask=mask_nd, other=0.0)
            logits = tl.dot(q, tl.trans(k), input_precision="ieee") * (softmax_scale * LOG2_E)  # (BLOCK_M, BLOCK_N)
            reads = mask_mn
            if ROWS > 1:
                reads = mask_mn & ((m // SPAN == turn) | (turns == 1))[:, None]
            logits = tl.where(reads, logits, float("-inf"))
            new_top = tl.maximum(top, tl.max(logits, 1))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            decay = tl.exp2(top - base)
            p = tl.exp2(logits - base[:, None])
            added = tl.dot(p.to(v.dtype), v, total * decay[:, None], input_precision="ieee")
            if ROWS > 1:  # no weight times what is not finite in another row's values would be NaN
                added = tl.where(((m // SPAN == turn) | (turns == 1))[:, None], added, total)
            total = added
            norm = norm * decay + tl.sum(p, 1)
            top = new_top

    out = total / tl.where(norm == 0, 1.0, norm)[:, None]
    place = ((row * tokens + t) * HEADS + h) * HEAD_DIM
    mask_md = mask_m[:, None] & in_head[None, :]
    tl.store(out_ptr + place[:, None] + d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask_md)


def tiles_of(head_dim: int, itemsize: int, limits: Limits) -> Tiles:
    """m queries, n keys; the same for any number of rows and tokens, so that neither changes a bit.

    Warps and stages are those that compile without spilled registers. Products of float32 run on registers altogether,
    so their tiles are smaller.
    """
    block_d = max(16, triton.next_power_of_2(head_dim))
    if itemsize == 4 and block_d > 64:
        return Tiles(m=16, n=32, k=block_d, warps=16, stages=2)
    if itemsize == 4:
        return Tiles(m=32, n=32, k=block_d, warps=8, stages=1 if block_d > 32 else 2)
    if block_d > 64:
        return Tiles(m=64, n=64, k=block_d, warps=8, stages=1)
    return Tiles(m=64, n=64, k=block_d, warps=8 if block_d <= 32 else 4, stages=3)


@lru_cache(maxsize=256)
def query_tiles(boundaries: tuple[int, ...], tokens: int, size: int) -> tuple[tuple[int, int, int], ...]:
    """First query, end of queries (both of the last `tokens` tokens) and end of keys of each tile.

    Leading scales that together fit a tile share one; all others start a tile of their own.
    """
    start = boundaries[-1] - tokens
    scales = [(a - start, b - start, b) for a, b in pairwise(boundaries) if a >= start]
    merged = [scale for scale in scales if scale[1] <= size]
    tiles = [(0, merged[-1][1], merged[-1][2])] if merged else []
    for first, end, keys in scales[len(merged) :]:
        tiles.extend((a, min(a + size, end), keys) for a in range(first, end, size))
    return tuple(tiles)


@lru_cache(maxsize=256)
def key_ends(boundaries: tuple[int, ...], tokens: int) -> tuple[int, ...]:
    """For each of the last `tokens` tokens, where its scale ends."""
    return tuple(b for a, b in pairwise(boundaries) for _ in range(a, b))[boundaries[-1] - tokens :]


def work(boundaries: Sequence[int], tokens: int, tiles: Tiles) -> tuple[int, int]:
    """Pairs of query and key for one row and head: those attended, and those that tiles compute."""
    ends = key_ends(tuple(boundaries), tokens)
    computed = sum(
        tiles.m * triton.cdiv(keys, tiles.n) * tiles.n for *_, keys in query_tiles(tuple(boundaries), tokens, tiles.m)
    )
    return sum(ends), computed


@lru_cache(maxsize=256)
def _tables(
    boundaries: tuple[int, ...], tokens: int, size: int, device: torch.device
) -> tuple[tuple[tuple[int, int, int], ...], Tensor, Tensor]:
    """Query tiles, and they and the ends of keys on the device."""
    cut = query_tiles(boundaries, tokens, size)
    tile_table = _launch.constant(tuple(x for tile in cut for x in tile), device)
    return cut, tile_table, _launch.constant(key_ends(boundaries, tokens), device)


def scale_causal_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor | None, boundaries: Sequence[int], softmax_scale: float
) -> Tensor:
    """As `varlik.ops.scale_causal_attention`."""
    _launch.check(q=q, k_pages=k_pages, v_pages=v_pages, slots=slots)
    q, k_pages, v_pages = map(_launch.rows_contiguous, (q, k_pages, v_pages))
    rows, tokens, heads, head_dim = q.shape
    out = q.new_empty(q.shape)
    tiles = tiles_of(head_dim, q.element_size(), _launch.limits_of(q.device))
    cut, tile_table, end_table = _tables(tuple(boundaries), tokens, tiles.m, q.device)
    rows_of_tile = max(1, tiles.m // triton.next_power_of_2(max(end - first for first, end, _ in cut)))
    if slots is None or triton.cdiv(rows, rows_of_tile) * heads < BUSY:
        rows_of_tile = 1  # rows side by side share nothing
    _launch.launch(
        _attention_kernel,
        (triton.cdiv(rows, rows_of_tile) * len(cut), heads),
        tiles,
        q,
        k_pages,
        v_pages,
        slots,
        tile_table,
        end_table,
        out,
        *q.stride()[:3],
        *k_pages.stride()[:2],
        *v_pages.stride()[:2],
        *(slots.stride() if slots is not None else (0, 0)),
        rows,
        tokens,
        boundaries[-1],
        len(cut),
        softmax_scale,
        HEADS=heads,
        HEAD_DIM=head_dim,
        ROWS=rows_of_tile,
        BLOCK_M=tiles.m,
        BLOCK_N=tiles.n,
        BLOCK_D=tiles.k,
    )
    return out
