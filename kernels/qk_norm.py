"""Normalised queries and keys of a joint projection; keys and values to their slots.

    q = q / max(|q|, 1e-12) * scale[h]     k = k / max(|k|, 1e-12)     v as it is

with norms over the D channels of each head, or all three as they are without a scale. A program takes a few (token,
head) pairs of one row, which lie side by side in `qkv` (R, T, 3, H, D), and writes q (R, T, H, D), and k and v to slot
`slots[r, L - T + t]` of their pages (P, H, D), or to slot r L + L - T + t without slots.

Backward, with n the normalised vector, s its length and g the gradient of n times what it was scaled by:

    d = (g - n (n . g)) / s,  or g / 1e-12 where the length was clamped;   dscale[h] = sum over tokens of n . gradient

The kernel gives n . gradient for every (token, head), from which the caller sums. Float32 inside; no two programs write
to one place, and nothing depends on other rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from varlik.kernels import _launch
from varlik.kernels._tiles import Limits, Tiles

MIN_NORM = tl.constexpr(1e-12)


@triton.jit(do_not_specialize=["tokens", "length", "parts"])
def _forward_kernel(
    qkv_ptr,
    scale_ptr,
    slots_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    stride_xr,
    stride_xt,
    stride_sr,
    stride_sl,
    stride_kp,
    stride_kh,
    stride_vp,
    stride_vh,
    tokens,
    length,
    parts,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = (tl.program_id(0) // parts).to(tl.int64)
    pair = (tl.program_id(0) % parts) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,): token by token, head by head
    t = (pair // HEADS).to(tl.int64)
    h = (pair % HEADS).to(tl.int64)
    in_row = t < tokens
    d = tl.arange(0, BLOCK_D)
    mask = in_row[:, None] & (d < HEAD_DIM)[None, :]

    place = row * stride_xr + t * stride_xt + h * HEAD_DIM
    source = qkv_ptr + place[:, None] + d[None, :]
    width: tl.constexpr = HEADS * HEAD_DIM
    q = tl.load(source, mask=mask, other=0.0)  # (BLOCK, BLOCK_D), as k and v
    k = tl.load(source + width, mask=mask, other=0.0)
    v = tl.load(source + 2 * width, mask=mask, other=0.0)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + h).to(tl.float32)
        q32, k32 = q.to(tl.float32), k.to(tl.float32)
        q_norm = tl.maximum(tl.sqrt(tl.sum(q32 * q32, 1)), MIN_NORM)
        k_norm = tl.maximum(tl.sqrt(tl.sum(k32 * k32, 1)), MIN_NORM)
        q = (q32 * (scale / q_norm)[:, None]).to(q_ptr.dtype.element_ty)
        k = (k32 / k_norm[:, None]).to(k_ptr.dtype.element_ty)

    out = ((row * tokens + t) * HEADS + h) * HEAD_DIM
    tl.store(q_ptr + out[:, None] + d[None, :], q, mask=mask)
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + row * stride_sr + (length - tokens + t) * stride_sl, mask=in_row, other=0)
    else:
        slot = row * length + length - tokens + t
    k_place = slot * stride_kp + h * stride_kh
    v_place = slot * stride_vp + h * stride_vh
    tl.store(k_ptr + k_place[:, None] + d[None, :], k, mask=mask)
    tl.store(v_ptr + v_place[:, None] + d[None, :], v, mask=mask)


@triton.jit
def _normalize_backward(x, grad, factor):
    """Gradient of x through factor * x / max(|x|, 1e-12), and normalised x . grad; (BLOCK, BLOCK_D), (BLOCK,)."""
    norm = tl.sqrt(tl.sum(x * x, 1))
    clamped = norm < MIN_NORM
    inverse = 1 / tl.maximum(norm, MIN_NORM)
    normed = x * inverse[:, None]
    along = tl.sum(normed * grad, 1)
    kept = tl.where(clamped, 0.0, along)
    return (grad - normed * kept[:, None]) * (factor * inverse)[:, None], along


@triton.jit(do_not_specialize=["tokens", "length", "parts"])
def _backward_kernel(
    grad_q_ptr,
    grad_k_ptr,
    grad_v_ptr,
    qkv_ptr,
    scale_ptr,
    grad_qkv_ptr,
    along_ptr,
    stride_xr,
    stride_xt,
    tokens,
    length,
    parts,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = (tl.program_id(0) // parts).to(tl.int64)
    pair = (tl.program_id(0) % parts) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    t = (pair // HEADS).to(tl.int64)
    h = pair % HEADS
    in_row = t < tokens
    d = tl.arange(0, BLOCK_D)
    mask = in_row[:, None] & (d < HEAD_DIM)[None, :]
    width: tl.constexpr = HEADS * HEAD_DIM

    of_token = ((row * tokens + t) * HEADS + h) * HEAD_DIM
    of_key = ((row * length + length - tokens + t) * HEADS + h) * HEAD_DIM
    grad_q = tl.load(grad_q_ptr + of_token[:, None] + d[None, :], mask=mask, other=0.0)  # (BLOCK, BLOCK_D)
    grad_k = tl.load(grad_k_ptr + of_key[:, None] + d[None, :], mask=mask, other=0.0)
    grad_v = tl.load(grad_v_ptr + of_key[:, None] + d[None, :], mask=mask, other=0.0)
    if scale_ptr is not None:
        source = qkv_ptr + (row * stride_xr + t * stride_xt + h * HEAD_DIM)[:, None] + d[None, :]
        q = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        k = tl.load(source + width, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + h).to(tl.float32)
        q_grad, along = _normalize_backward(q, grad_q.to(tl.float32), scale)
        k_grad, _ = _normalize_backward(k, grad_k.to(tl.float32), tl.full([BLOCK], 1.0, tl.float32))
        tl.store(along_ptr + (row * tokens + t) * HEADS + h, along, mask=in_row)
        grad_q = q_grad.to(grad_qkv_ptr.dtype.element_ty)
        grad_k = k_grad.to(grad_qkv_ptr.dtype.element_ty)
    out = grad_qkv_ptr + ((row * tokens + t) * 3 * width + h * HEAD_DIM)[:, None] + d[None, :]
    tl.store(out, grad_q, mask=mask)
    tl.store(out + width, grad_k, mask=mask)
    tl.store(out + 2 * width, grad_v, mask=mask)


def _tiles(head_dim: int, limits: Limits) -> Tiles:
    """Pairs of token and head for one program, whose q, k and v take 96 registers a thread at most; m is pairs."""
    block_d = max(16, triton.next_power_of_2(head_dim))
    return Tiles(m=max(1, 4096 // block_d), k=block_d, warps=4)


def qk_norm(qkv: Tensor, scale: Tensor | None, k_pages: Tensor, v_pages: Tensor, slots: Tensor | None) -> Tensor:
    """As `varlik.ops.qk_norm`."""
    _launch.check(qkv=qkv, scale=scale, k_pages=k_pages, v_pages=v_pages)
    qkv = _launch.rows_contiguous(qkv)
    scale = None if scale is None else scale.contiguous()
    if k_pages.stride(-1) != 1 or v_pages.stride(-1) != 1:
        raise ValueError("k_pages, v_pages: the Triton path writes pages whose last dimension is contiguous only")
    rows, tokens = qkv.shape[:2]
    heads, head_dim = k_pages.shape[1:]
    q = qkv.new_empty(rows, tokens, heads, head_dim)
    length = slots.shape[1] if slots is not None else len(k_pages) // max(rows, 1)
    tiles = _tiles(head_dim, _launch.limits_of(qkv.device))
    parts = triton.cdiv(tokens * heads, tiles.m)
    _launch.launch(
        _forward_kernel,
        (rows * parts,),
        tiles,
        qkv,
        scale,
        slots,
        q,
        k_pages,
        v_pages,
        *qkv.stride()[:2],
        *(slots.stride() if slots is not None else (0, 0)),
        *k_pages.stride()[:2],
        *v_pages.stride()[:2],
        tokens,
        length,
        parts,
        HEADS=heads,
        HEAD_DIM=head_dim,
        BLOCK=tiles.m,
        BLOCK_D=tiles.k,
    )
    return q


def qk_norm_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, qkv: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `varlik.ops.qk_norm_backward`: gradient of qkv, and of the scale for every token, (R, T, H) float32."""
    _launch.check(grad_q=grad_q, grad_k=grad_k, grad_v=grad_v, qkv=qkv, scale=scale)
    qkv = _launch.rows_contiguous(qkv)
    scale = None if scale is None else scale.contiguous()
    grad_q, grad_k, grad_v = (grad.contiguous() for grad in (grad_q, grad_k, grad_v))
    rows, tokens, heads, head_dim = grad_q.shape
    grad_qkv = qkv.new_empty(qkv.shape)
    along = grad_q.new_empty((rows, tokens, heads) if scale is not None else (0,), dtype=torch.float32)
    tiles = _tiles(head_dim, _launch.limits_of(qkv.device))
    parts = triton.cdiv(tokens * heads, tiles.m)
    _launch.launch(
        _backward_kernel,
        (rows * parts,),
        tiles,
        grad_q,
        grad_k,
        grad_v,
        qkv,
        scale,
        grad_qkv,
        along,
        *qkv.stride()[:2],
        tokens,
        len(grad_k) // max(rows, 1),
        parts,
        HEADS=heads,
        HEAD_DIM=head_dim,
        BLOCK=tiles.m,
        BLOCK_D=tiles.k,
    )
    return grad_qkv, along
