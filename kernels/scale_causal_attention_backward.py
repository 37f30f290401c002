"""Gradients of `scale_causal_attention` for rows whose keys and values lie side by side.

With p the attention weights, o = p v and g the gradient of o:

    dp = g v^T,   ds = p (dp - delta),  delta = rowsum(p dp)
    dq = scale ds k,   dk = scale ds^T q,   dv = p^T g

Weights are never stored. The first kernel goes through a query tile's keys twice: once for log-sum-exp and delta, which
it keeps for every query, once for dq. The second takes a tile of keys through all queries that see it. Each output has
one writer and sums run in a fixed order, over blocks that start at multiples of the tile: deterministic, and the same
whatever the other rows. Softmax and sums are float32; products of float32 are float32, not TF32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from varlik.kernels import _launch
from varlik.kernels._tiles import Limits, Tiles
from varlik.kernels.scale_causal_attention import LOG2_E, key_ends, query_tiles


@triton.jit(do_not_specialize=["tokens", "length", "num_tiles"])
def _query_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    tile_ptr,  # (num_tiles, 3): first query, end of queries, end of keys
    key_end_ptr,  # (T,)
    grad_q_ptr,
    lse_ptr,  # (R, H, T), in units of log 2
    delta_ptr,  # (R, H, T)
    tokens,
    length,
    num_tiles,
    softmax_scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile = tile_ptr + 3 * (tl.program_id(0) % num_tiles)
    first, end, keys = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    row = (tl.program_id(0) // num_tiles).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    t = first + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    mask_m = t < end
    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD_DIM
    mask_md = mask_m[:, None] & in_head[None, :]
    place = ((row * tokens + t) * HEADS + h)[:, None] * HEAD_DIM + d[None, :]
    q = tl.load(q_ptr + place, mask=mask_md, other=0.0)  # (BLOCK_M, BLOCK_D)
    grad = tl.load(grad_ptr + place, mask=mask_md, other=0.0)
    key_end = tl.load(key_end_ptr + t, mask=mask_m, other=0)
    factor = softmax_scale * LOG2_E

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    delta = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, keys, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        mask_nd = (n < keys)[:, None] & in_head[None, :]
        key_place = ((row * length + n) * HEADS + h)[:, None] * HEAD_DIM + d[None, :]
        k = tl.load(k_ptr + key_place, mask=mask_nd, other=0.0)  # (BLOCK_N, BLOCK_D)
        v = tl.load(v_ptr + key_place, mask=mask_nd, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
        logits = tl.where(n[None, :] < key_end[:, None], logits, float("-inf"))  # (BLOCK_M, BLOCK_N)
        new_top = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        decay = tl.exp2(top - base)
        p = tl.exp2(logits - base[:, None])
        norm = norm * decay + tl.sum(p, 1)
        grad_p = tl.dot(grad, tl.trans(v), input_precision="ieee")
        delta = delta * decay + tl.sum(p * grad_p, 1)
        top = new_top
    norm = tl.where(norm == 0, 1.0, norm)
    delta = delta / norm
    lse = tl.where(top == float("-inf"), 0.0, top) + tl.log2(norm)
    of_query = (row * HEADS + h) * tokens + t
    tl.store(lse_ptr + of_query, lse, mask=mask_m)
    tl.store(delta_ptr + of_query, delta, mask=mask_m)

    grad_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, keys, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        mask_nd = (n < keys)[:, None] & in_head[None, :]
        key_place = ((row * length + n) * HEADS + h)[:, None] * HEAD_DIM + d[None, :]
        k = tl.load(k_ptr + key_place, mask=mask_nd, other=0.0)
        v = tl.load(v_ptr + key_place, mask=mask_nd, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
        p = tl.where(n[None, :] < key_end[:, None], tl.exp2(logits - lse[:, None]), 0.0)
        grad_p = tl.dot(grad, tl.trans(v), input_precision="ieee")
        grad_s = p * (grad_p - delta[:, None])
        grad_q = tl.dot(grad_s.to(k.dtype), k, grad_q, input_precision="ieee")
    tl.store(grad_q_ptr + place, (grad_q * softmax_scale).to(grad_q_ptr.dtype.element_ty), mask=mask_md)


@triton.jit(do_not_specialize=["tokens", "length", "num_tiles"])
def _key_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    first_query_ptr,  # (num_tiles,): first query that sees a key of the tile
    key_end_ptr,
    lse_ptr,
    delta_ptr,
    grad_k_ptr,
    grad_v_ptr,
    tokens,
    length,
    num_tiles,
    softmax_scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile = tl.program_id(0) % num_tiles
    row = (tl.program_id(0) // num_tiles).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask_n = n < length
    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD_DIM
    mask_nd = mask_n[:, None] & in_head[None, :]
    key_place = ((row * length + n) * HEADS + h)[:, None] * HEAD_DIM + d[None, :]
    k = tl.load(k_ptr + key_place, mask=mask_nd, other=0.0)  # (BLOCK_N, BLOCK_D)
    v = tl.load(v_ptr + key_place, mask=mask_nd, other=0.0)

    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(tl.load(first_query_ptr + tile) // BLOCK_M * BLOCK_M, tokens, BLOCK_M):
        t = start + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
        mask_m = t < tokens
        place = ((row * tokens + t) * HEADS + h)[:, None] * HEAD_DIM + d[None, :]
        mask_md = mask_m[:, None] & in_head[None, :]
        q = tl.load(q_ptr + place, mask=mask_md, other=0.0)  # (BLOCK_M, BLOCK_D)
        grad = tl.load(grad_ptr + place, mask=mask_md, other=0.0)
        of_query = (row * HEADS + h) * tokens + t
        lse = tl.load(lse_ptr + of_query, mask=mask_m, other=0.0)
        delta = tl.load(delta_ptr + of_query, mask=mask_m, other=0.0)
        key_end = tl.load(key_end_ptr + t, mask=mask_m, other=0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * (softmax_scale * LOG2_E)
        p = tl.where(n[None, :] < key_end[:, None], tl.exp2(logits - lse[:, None]), 0.0)  # (BLOCK_M, BLOCK_N)
        grad_v = tl.dot(tl.trans(p.to(grad.dtype)), grad, grad_v, input_precision="ieee")
        grad_p = tl.dot(grad, tl.trans(v), input_precision="ieee")
        grad_s = p * (grad_p - delta[:, None])
        grad_k = tl.dot(tl.trans(grad_s.to(q.dtype)), q, grad_k, input_precision="ieee")
    tl.store(grad_k_ptr + key_place, (grad_k * softmax_scale).to(grad_k_ptr.dtype.element_ty), mask=mask_nd)
    tl.store(grad_v_ptr + key_place, grad_v.to(grad_v_ptr.dtype.element_ty), mask=mask_nd)


def _tiles(head_dim: int, itemsize: int, limits: Limits) -> Tiles:
    """m queries, n keys: as large as registers hold. Products of float32 run on registers altogether."""
    block_d = max(16, triton.next_power_of_2(head_dim))
    if itemsize == 4:
        block = 32 if block_d <= 64 else 16
        return Tiles(m=block, n=block, k=block_d, warps=8, stages=1)
    return Tiles(m=64, n=32, k=block_d, warps=4 if block_d == 64 else 8, stages=1)


def scale_causal_attention_backward(
    grad: Tensor, q: Tensor, k_pages: Tensor, v_pages: Tensor, boundaries: Sequence[int], softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `varlik.ops.scale_causal_attention_backward`."""
    _launch.check(grad=grad, q=q, k_pages=k_pages, v_pages=v_pages)
    grad, q, k_pages, v_pages = (x.contiguous() for x in (grad, q, k_pages, v_pages))
    rows, tokens, heads, head_dim = q.shape
    length = boundaries[-1]
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k_pages, v_pages))
    lse, delta = (q.new_empty(rows, heads, tokens, dtype=torch.float32) for _ in range(2))
    tiles = _tiles(head_dim, q.element_size(), _launch.limits_of(q.device))
    ends = key_ends(tuple(boundaries), tokens)
    cut = query_tiles(tuple(boundaries), tokens, tiles.m)
    key_end = _launch.constant(ends, q.device)
    constants = {
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "BLOCK_M": tiles.m,
        "BLOCK_N": tiles.n,
        "BLOCK_D": tiles.k,
    }
    _launch.launch(
        _query_kernel,
        (rows * len(cut), heads),
        tiles,
        grad,
        q,
        k_pages,
        v_pages,
        _launch.constant(tuple(x for tile in cut for x in tile), q.device),
        key_end,
        grad_q,
        lse,
        delta,
        tokens,
        length,
        len(cut),
        softmax_scale,
        **constants,
    )
    firsts = tuple(next(t for t, end in enumerate(ends) if end > n) for n in range(0, length, tiles.n))
    _launch.launch(
        _key_kernel,
        (rows * len(firsts), heads),
        tiles,
        grad,
        q,
        k_pages,
        v_pages,
        _launch.constant(firsts, q.device),
        key_end,
        lse,
        delta,
        grad_k,
        grad_v,
        tokens,
        length,
        len(firsts),
        softmax_scale,
        **constants,
    )
    return grad_q, grad_k, grad_v
