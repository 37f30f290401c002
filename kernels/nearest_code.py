"""The nearest entry of a codebook for each vector, without the matrix of distances.

    argmin over v of |z|^2 + |e_v|^2 - 2 z . e_v,  ties to the lowest v

A program takes a tile of vectors (n, c) and goes through the codebook (V, c) tile by tile, first to last; within a tile
`argmin` prefers the left, across tiles only a smaller distance wins. Float32 inside, products too (no TF32): published
tokens were settled by rounding of float32. Nothing depends on other vectors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from varlik.kernels import _launch
from varlik.kernels._tiles import Limits, Tiles


@triton.jit(do_not_specialize=["count"])
def _nearest_code_kernel(
    vectors_ptr,
    codebook_ptr,
    out_ptr,
    stride_zn,
    stride_ev,
    count,
    codes,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    c = tl.arange(0, BLOCK_C)
    in_width = c < WIDTH
    z_mask = (n < count)[:, None] & in_width[None, :]
    z = tl.load(vectors_ptr + n[:, None] * stride_zn + c[None, :], mask=z_mask, other=0.0).to(tl.float32)
    z_squared = tl.sum(z * z, 1)  # (BLOCK_N,)

    nearest = tl.full([BLOCK_N], float("inf"), tl.float32)
    index = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, codes, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)  # (BLOCK_V,)
        e_mask = (v < codes)[:, None] & in_width[None, :]
        place = v.to(tl.int64)[:, None] * stride_ev + c[None, :]
        e = tl.load(codebook_ptr + place, mask=e_mask, other=0.0).to(tl.float32)  # (BLOCK_V, BLOCK_C)
        product = tl.dot(z, tl.trans(e), input_precision="ieee")
        distance = (z_squared[:, None] + tl.sum(e * e, 1)[None, :]) - 2 * product  # (BLOCK_N, BLOCK_V)
        distance = tl.where((v < codes)[None, :], distance, float("inf"))
        tile_nearest, tile_index = tl.min(distance, 1, return_indices=True, return_indices_tie_break_left=True)
        closer = tile_nearest < nearest
        index = tl.where(closer, tile_index + start, index)
        nearest = tl.where(closer, tile_nearest, nearest)
    tl.store(out_ptr + n, index.to(tl.int64), mask=n < count)


def _tiles(width: int, limits: Limits) -> Tiles:
    """Whole vectors at a time; n is codes, k channels."""
    block_c = max(16, triton.next_power_of_2(width))
    block = 64 if block_c <= 32 else 32
    return Tiles(m=block, n=32, k=block_c, warps=4 if block_c <= 32 else 8)


def nearest_code(vectors: Tensor, codebook: Tensor) -> Tensor:
    """As `varlik.ops.nearest_code`."""
    _launch.check(vectors=vectors, codebook=codebook)
    vectors, codebook = _launch.rows_contiguous(vectors), _launch.rows_contiguous(codebook)
    count, width = vectors.shape
    out = vectors.new_empty(count, dtype=torch.int64)
    tiles = _tiles(width, _launch.limits_of(vectors.device))
    _launch.launch(
        _nearest_code_kernel,
        (triton.cdiv(count, tiles.m),),
        tiles,
        vectors,
        codebook,
        out,
        vectors.stride(0),
        codebook.stride(0),
        count,
        len(codebook),
        WIDTH=width,
        BLOCK_N=tiles.m,
        BLOCK_V=tiles.n,
        BLOCK_C=tiles.k,
    )
    return out
