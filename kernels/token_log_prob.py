"""Log-probability of one token per row: head product, log-sum-exp and target logit in one pass over the vocabulary.

    log_prob[m] = z[m, target[m]] - logsumexp_v z[m, v],   z = hidden @ weight^T + bias

`hidden` (M, C), `weight` (V, C), `bias` (V,). Logits live in registers, a tile at a time. The vocabulary is cut into
splits, whose number follows from V alone, so that few rows too keep the device busy; each program leaves a maximum, a
sum of exponentials and the target logit of its split, and a second kernel combines them from the first split to the
last. So the result of a row does not depend on the other rows. Products of float32 are float32, not TF32; all else is
float32, and sums over the tokens of a scale are float64.

Backward, with g the gradient of log_prob: dz = g (onehot(target) - softmax(z)), tiles of z computed again;
dhidden = dz @ weight by the fixed-tile product. dz exists for one tile of rows at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from varlik.kernels import _launch
from varlik.kernels._tiles import Limits, Tiles
from varlik.kernels.linear import linear

SPLIT_CODES = 1024
MAX_SPLITS = 16
COMBINED_ROWS = 128  # for one program of the second pass


@triton.jit
def _logits(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    m,
    v,
    stride_hm,
    stride_wv,
    stride_wc,
    count,
    codes,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of z, (BLOCK_M, BLOCK_V) float32; -inf beyond the vocabulary."""
    k = tl.arange(0, BLOCK_K)
    hidden_place = hidden_ptr + m[:, None] * stride_hm + k[None, :]
    weight_place = weight_ptr + v[None, :] * stride_wv + k[:, None] * stride_wc
    z = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        in_width = start + k < WIDTH
        hidden = tl.load(hidden_place, mask=(m < count)[:, None] & in_width[None, :], other=0.0)
        weight = tl.load(weight_place, mask=in_width[:, None] & (v < codes)[None, :], other=0.0)
        z = tl.dot(hidden, weight, z, input_precision="ieee")
        hidden_place += BLOCK_K
        weight_place += BLOCK_K * stride_wc
    z += tl.load(bias_ptr + v, mask=v < codes, other=0.0).to(tl.float32)[None, :]
    return tl.where((v < codes)[None, :], z, float("-inf"))


@triton.jit(do_not_specialize=["count"])
def _split_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    target_ptr,
    part_ptr,  # (splits, 3, M): maximum, sum of exponentials, target logit
    stride_hm,
    stride_wv,
    stride_wc,
    count,
    codes,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    split = tl.program_id(1).to(tl.int64)
    target = tl.load(target_ptr + m, mask=m < count, other=-1)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    target_logit = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, SPLIT, BLOCK_V):
        v = split * SPLIT + start + tl.arange(0, BLOCK_V)  # (BLOCK_V,)
        z = _logits(
            hidden_ptr, weight_ptr, bias_ptr, m, v, stride_hm, stride_wv, stride_wc, count, codes,
            WIDTH, BLOCK_M, BLOCK_V, BLOCK_K,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(z, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(z - base[:, None]), 1)
        top = new_top
        target_logit += tl.sum(tl.where(v[None, :] == target[:, None], z, 0.0), 1)
    part = part_ptr + split * 3 * count + m
    tl.store(part, top, mask=m < count)
    tl.store(part + count, total, mask=m < count)
    tl.store(part + 2 * count.to(tl.int64), target_logit, mask=m < count)


@triton.jit
def _combine(part_ptr, m, mask, count, splits):
    """Log-sum-exp and target logit of rows `m`, from the first split to the last."""
    top = tl.full(m.shape, float("-inf"), tl.float32)
    total = tl.zeros(m.shape, tl.float32)
    target_logit = tl.zeros(m.shape, tl.float32)
    part = part_ptr + m
    for _ in range(splits):
        split_top = tl.load(part, mask=mask, other=0.0)
        split_total = tl.load(part + count, mask=mask, other=1.0)
        target_logit += tl.load(part + 2 * count, mask=mask, other=0.0)
        new_top = tl.maximum(top, split_top)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - base) + split_total * tl.exp(split_top - base)
        top = new_top
        part += 3 * count
    return top + tl.log(total), target_logit


@triton.jit(do_not_specialize=["count", "splits"])
def _combine_kernel(part_ptr, out_ptr, lse_ptr, count, splits, BLOCK: tl.constexpr):
    m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    mask = m < count
    lse, target_logit = _combine(part_ptr, m, mask, count.to(tl.int64), splits)
    if out_ptr is not None:
        tl.store(out_ptr + m, target_logit - lse, mask=mask)
    if lse_ptr is not None:
        tl.store(lse_ptr + m, lse, mask=mask)


@triton.jit(do_not_specialize=["count", "splits", "tokens"])
def _combine_scales_kernel(
    part_ptr, boundary_ptr, out_ptr, sum_ptr, count, splits, tokens, SCALES: tl.constexpr, BLOCK: tl.constexpr
):
    """As `_combine_kernel`, one scale of one row for each program, and the sum over its tokens."""
    row = (tl.program_id(0) // SCALES).to(tl.int64)
    scale = tl.program_id(0) % SCALES
    first, end = tl.load(boundary_ptr + scale), tl.load(boundary_ptr + scale + 1)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(first, end, BLOCK):
        t = start + tl.arange(0, BLOCK)  # (BLOCK,)
        m = row * tokens + t
        lse, target_logit = _combine(part_ptr, m, t < end, count.to(tl.int64), splits)
        tl.store(out_ptr + m, target_logit - lse, mask=t < end)
        total += tl.where(t < end, target_logit - lse, 0.0).to(tl.float64)
    tl.store(sum_ptr + row * SCALES + scale, tl.sum(total, 0).to(tl.float32))


@triton.jit(do_not_specialize=["count"])
def _grad_logits_kernel(
    grad_ptr,
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    target_ptr,
    lse_ptr,
    out_ptr,
    stride_hm,
    stride_wv,
    stride_wc,
    count,
    codes,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    v = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)  # (BLOCK_V,)
    grad = tl.load(grad_ptr + m, mask=m < count, other=0.0).to(tl.float32)
    target = tl.load(target_ptr + m, mask=m < count, other=-1)
    lse = tl.load(lse_ptr + m, mask=m < count, other=0.0)
    z = _logits(
        hidden_ptr, weight_ptr, bias_ptr, m, v, stride_hm, stride_wv, stride_wc, count, codes,
        WIDTH, BLOCK_M, BLOCK_V, BLOCK_K,
    )  # fmt: skip
    hit = tl.where(v[None, :] == target[:, None], 1.0, 0.0)
    grad_z = grad[:, None] * (hit - tl.exp(z - lse[:, None]))  # (BLOCK_M, BLOCK_V)
    place = out_ptr + m[:, None] * codes + v[None, :]
    tl.store(place, grad_z.to(out_ptr.dtype.element_ty), mask=(m < count)[:, None] & (v < codes)[None, :])


def _tiles(itemsize: int, limits: Limits) -> Tiles:
    """By dtype and device alone: the number of rows must not change a tile. m is rows, n codes, k channels."""
    if itemsize == 4:
        return Tiles(m=64, n=64, k=16, warps=4, stages=2)
    stage = (128 + 128) * 64 * itemsize
    return Tiles(m=128, n=128, k=64, warps=8, stages=max(2, min(4, limits.shared_memory // stage)))


def _splits(codes: int, tile: int) -> tuple[int, int]:
    """Number of splits and codes in each: whole tiles."""
    wanted = max(1, min(MAX_SPLITS, codes // SPLIT_CODES))
    size = triton.cdiv(triton.cdiv(codes, wanted), tile) * tile
    return triton.cdiv(codes, size), size


def _parts(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Maximum, sum of exponentials and target logit of every split, (splits, 3, M)."""
    count, width = hidden.shape
    tiles = _tiles(hidden.element_size(), _launch.limits_of(hidden.device))
    splits, size = _splits(len(weight), tiles.n)
    parts = hidden.new_empty(splits, 3, count, dtype=torch.float32)
    _launch.launch(
        _split_kernel,
        (triton.cdiv(count, tiles.m), splits),
        tiles,
        hidden,
        weight,
        bias,
        targets,
        parts,
        hidden.stride(0),
        *weight.stride(),
        count,
        len(weight),
        WIDTH=width,
        SPLIT=size,
        BLOCK_M=tiles.m,
        BLOCK_V=tiles.n,
        BLOCK_K=tiles.k,
    )
    return parts


def _ready(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _launch.check(hidden=hidden, weight=weight, bias=bias, targets=targets)
    return _launch.rows_contiguous(hidden), weight, bias.contiguous(), targets.contiguous()


def token_log_prob(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """As `varlik.ops.token_log_prob`."""
    parts = _parts(*_ready(hidden, weight, bias, targets))
    splits, _, count = parts.shape
    out = hidden.new_empty(count, dtype=torch.float32)
    grid = (triton.cdiv(count, COMBINED_ROWS),)
    _launch.launch(_combine_kernel, grid, Tiles(COMBINED_ROWS), parts, out, None, count, splits, BLOCK=COMBINED_ROWS)
    return out


def scale_log_prob(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, boundaries: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """As `varlik.ops.scale_log_prob`."""
    rows, tokens, width = hidden.shape
    parts = _parts(*_ready(hidden.reshape(-1, width), weight, bias, targets.reshape(-1)))
    scales = len(boundaries) - 1
    out = hidden.new_empty(rows, tokens, dtype=torch.float32)
    sums = hidden.new_empty(rows, scales, dtype=torch.float32)
    _launch.launch(
        _combine_scales_kernel,
        (rows * scales,),
        Tiles(COMBINED_ROWS),
        parts,
        _launch.constant(tuple(boundaries), hidden.device),
        out,
        sums,
        rows * tokens,
        len(parts),
        tokens,
        SCALES=scales,
        BLOCK=COMBINED_ROWS,
    )
    return out, sums


def token_log_prob_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, weights: bool, rows_at_a_time: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `varlik.ops.token_log_prob_backward`; `rows_at_a_time` rows of dz exist together."""
    hidden, weight, bias, targets = _ready(hidden, weight, bias, targets)
    grad = grad.contiguous()
    count, width = hidden.shape
    codes = len(weight)
    parts = _parts(hidden, weight, bias, targets)
    lse = hidden.new_empty(count, dtype=torch.float32)
    grid = (triton.cdiv(count, COMBINED_ROWS),)
    _launch.launch(
        _combine_kernel, grid, Tiles(COMBINED_ROWS), parts, None, lse, count, len(parts), BLOCK=COMBINED_ROWS
    )
    del parts
    tiles = _tiles(hidden.element_size(), _launch.limits_of(hidden.device))
    grad_hidden = hidden.new_empty(count, width)
    grad_weight = hidden.new_zeros((codes, width) if weights else (0,), dtype=torch.float32)
    grad_bias = hidden.new_zeros(codes if weights else 0, dtype=torch.float32)
    for first in range(0, count, rows_at_a_time):
        rows = slice(first, min(count, first + rows_at_a_time))
        part = hidden[rows]
        grad_logits = part.new_empty(len(part), codes)
        _launch.launch(
            _grad_logits_kernel,
            (triton.cdiv(len(part), tiles.m), triton.cdiv(codes, tiles.n)),
            tiles,
            grad[rows],
            part,
            weight,
            bias,
            targets[rows],
            lse[rows],
            grad_logits,
            part.stride(0),
            *weight.stride(),
            len(part),
            codes,
            WIDTH=width,
            BLOCK_M=tiles.m,
            BLOCK_V=tiles.n,
            BLOCK_K=tiles.k,
        )
        grad_hidden[rows] = linear(grad_logits, weight.T, None, "none")
        if weights:
            grad_weight += grad_logits.T @ part
            grad_bias += grad_logits.sum(0, dtype=torch.float32)
    return grad_hidden, grad_weight.to(weight.dtype), grad_bias
