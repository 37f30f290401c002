"""A linear layer whose result for a row does not depend on how many rows there are.

    out = activation(x @ weight^T + bias),   activation none or tanh-GELU

`x` (M, C), `weight` (O, C), `bias` (O,). Every output element is one sum over C in steps of BLOCK_K, in float32, in an
order that tiles fix and only C, O and dtype choose: no split of C, no atomics. tanh-GELU is x sigmoid(2 u) with
u = sqrt(2 / pi) (x + 0.044715 x^3), which does not cancel. Products of float32 are float32, not TF32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from varlik.kernels import _launch
from varlik.kernels._tiles import Limits, Tiles

GROUP = tl.constexpr(8)  # tiles of rows that share the weights in the L2 cache


@triton.jit
def _gelu_tanh(x):
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit(do_not_specialize=["count"])
def _linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    stride_xm,
    stride_wo,
    stride_wc,
    count,
    outputs,
    WIDTH: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Tiles of GROUP row tiles by all column tiles, column by column, so that neighbours in time read the same weights.
    row_tiles = tl.cdiv(count, BLOCK_M)
    column_tiles = tl.cdiv(outputs, BLOCK_N)
    group = tl.program_id(0) // (GROUP * column_tiles)
    group_rows = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * column_tiles)
    m = (group * GROUP + within % group_rows).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    o = (within // group_rows).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    k = tl.arange(0, BLOCK_K)
    x_place = x_ptr + m[:, None] * stride_xm + k[None, :]
    weight_place = weight_ptr + k[:, None] * stride_wc + o[None, :] * stride_wo

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        in_width = start + k < WIDTH
        x = tl.load(x_place, mask=(m < count)[:, None] & in_width[None, :], other=0.0)
        weight = tl.load(weight_place, mask=in_width[:, None] & (o < outputs)[None, :], other=0.0)
        total = tl.dot(x, weight, total, input_precision="ieee")
        x_place += BLOCK_K
        weight_place += BLOCK_K * stride_wc
    if bias_ptr is not None:
        total += tl.load(bias_ptr + o, mask=o < outputs, other=0.0).to(tl.float32)[None, :]
    if GELU:
        total = _gelu_tanh(total)
    out = out_ptr + m[:, None] * outputs + o[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(m < count)[:, None] & (o < outputs)[None, :])


def _tiles(outputs: int, width: int, itemsize: int, limits: Limits) -> Tiles:
    """By the size of a weight and its dtype alone: the number of rows must not change a tile."""
    if itemsize == 4:
        return Tiles(m=128, n=64, k=32, warps=8, stages=2)
    wide = 128 if outputs >= 128 else 64
    stage = (128 + wide) * 64 * itemsize
    return Tiles(m=128, n=wide, k=64, warps=8, stages=max(2, min(4, limits.shared_memory // stage)))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """As `varlik.ops.linear`; any leading dimensions."""
    _launch.check(x=x, weight=weight, bias=bias)
    outputs, width = weight.shape
    flat = _launch.rows_contiguous(x.reshape(-1, width))
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty(*x.shape[:-1], outputs)
    tiles = _tiles(outputs, width, x.element_size(), _launch.limits_of(x.device))
    _launch.launch(
        _linear_kernel,
        (triton.cdiv(len(flat), tiles.m) * triton.cdiv(outputs, tiles.n),),
        tiles,
        flat,
        weight,
        bias,
        out,
        flat.stride(0),
        *weight.stride(),
        len(flat),
        outputs,
        WIDTH=width,
        GELU=activation == "gelu_tanh",
        BLOCK_M=tiles.m,
        BLOCK_N=tiles.n,
        BLOCK_K=tiles.k,
    )
    return out
