"""LayerNorm with a scale and a shift per class, alone or after a gated residual.

    y = x + gate[c] * branch                    (only with a branch; rounded to the dtype of x)
    out = (y - mean) / sqrt(var + eps) * (1 + scale[c]) + shift[c]

over the C channels of every token of `x` (R, T, C), where c is the class row of row r. A program takes a few tokens of
one row and holds that row's class vectors in registers meanwhile. Rows may read their input through an index.

Backward, with g the gradient of `out` and h = (y - mean) / sqrt(var + eps):

    dy = (g (1 + scale) - mean(g (1 + scale)) - h mean(g (1 + scale) h)) / sqrt(var + eps)  [+ gradient of y]
    dbranch = gate dy,   dgate[r] = sum_t dy branch,   dscale[r] = sum_t g h,   dshift[r] = sum_t g

Mean and variance are computed again, in two passes over registers. Everything is float32 inside. Sums over tokens run
in a fixed order: within a program token by token, then over programs first to last. Nothing depends on other rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from varlik.kernels import _launch
from varlik.kernels._tiles import Limits, Tiles

FORWARD_TOKENS = 4  # of one row for each program: class vectors are read once for so many
BACKWARD_TOKENS = 32


@triton.jit(do_not_specialize=["tokens", "parts"])
def _forward_kernel(
    x_ptr,
    branch_ptr,
    gate_ptr,
    scale_ptr,
    shift_ptr,
    row_class_ptr,
    row_input_ptr,
    y_ptr,
    out_ptr,
    stride_xr,
    stride_xt,
    stride_br,
    stride_bt,
    stride_gn,
    stride_sn,
    stride_hn,
    tokens,
    parts,
    width,
    eps,
    TOKENS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = (tl.program_id(0) // parts).to(tl.int64)
    first = (tl.program_id(0) % parts) * TOKENS
    source = row
    table_row = row
    if row_input_ptr is not None:
        source = tl.load(row_input_ptr + row)
    if row_class_ptr is not None:
        table_row = tl.load(row_class_ptr + row)

    c = tl.arange(0, BLOCK_C)  # (BLOCK_C,)
    in_width = c < width
    scale = 1 + tl.load(scale_ptr + table_row * stride_sn + c, mask=in_width, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + table_row * stride_hn + c, mask=in_width, other=0.0).to(tl.float32)
    if branch_ptr is not None:
        gate = tl.load(gate_ptr + table_row * stride_gn + c, mask=in_width, other=0.0).to(tl.float32)

    for i in range(TOKENS):
        t = (first + i).to(tl.int64)
        mask = c < tl.where(t < tokens, width, 0)
        x = tl.load(x_ptr + source * stride_xr + t * stride_xt + c, mask=mask, other=0.0).to(tl.float32)
        place = (row * tokens + t) * width + c
        if branch_ptr is not None:
            branch = tl.load(branch_ptr + row * stride_br + t * stride_bt + c, mask=mask, other=0.0).to(tl.float32)
            y = (x + gate * branch).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + place, y, mask=mask)
            x = y.to(tl.float32)
        mean = tl.sum(x, 0) / width
        centred = tl.where(in_width, x - mean, 0.0)
        variance = tl.sum(centred * centred, 0) / width
        out = centred * (1 / tl.sqrt(variance + eps)) * scale + shift
        tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "parts"])
def _backward_kernel(
    grad_y_ptr,
    grad_out_ptr,
    y_ptr,
    branch_ptr,
    gate_ptr,
    scale_ptr,
    row_class_ptr,
    grad_x_ptr,
    grad_branch_ptr,
    part_ptr,  # (R, parts, 3, C): sums for gate, scale and shift
    stride_gr,
    stride_gt,
    stride_or,
    stride_ot,
    stride_yr,
    stride_yt,
    stride_br,
    stride_bt,
    stride_gn,
    stride_sn,
    tokens,
    parts,
    width,
    eps,
    TOKENS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    table_row = row
    if row_class_ptr is not None:
        table_row = tl.load(row_class_ptr + row)

    c = tl.arange(0, BLOCK_C)  # (BLOCK_C,)
    in_width = c < width
    scale = 1 + tl.load(scale_ptr + table_row * stride_sn + c, mask=in_width, other=0.0).to(tl.float32)
    if branch_ptr is not None:
        gate = tl.load(gate_ptr + table_row * stride_gn + c, mask=in_width, other=0.0).to(tl.float32)
    sum_gate = tl.zeros([BLOCK_C], tl.float32)
    sum_scale = tl.zeros([BLOCK_C], tl.float32)
    sum_shift = tl.zeros([BLOCK_C], tl.float32)

    for i in range(TOKENS):
        t = (part * TOKENS + i).to(tl.int64)
        mask = c < tl.where(t < tokens, width, 0)
        y = tl.load(y_ptr + row * stride_yr + t * stride_yt + c, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_out_ptr + row * stride_or + t * stride_ot + c, mask=mask, other=0.0).to(tl.float32)
        centred = tl.where(in_width, y - tl.sum(y, 0) / width, 0.0)
        rstd = 1 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
        normed = centred * rstd
        sum_scale += grad * normed
        sum_shift += grad
        grad *= scale
        along = tl.sum(grad * normed, 0) / width
        grad_x = rstd * (grad - tl.sum(grad, 0) / width - normed * along)
        place = (row * tokens + t) * width + c
        if branch_ptr is not None:
            grad_x += tl.load(grad_y_ptr + row * stride_gr + t * stride_gt + c, mask=mask, other=0.0).to(tl.float32)
            branch = tl.load(branch_ptr + row * stride_br + t * stride_bt + c, mask=mask, other=0.0).to(tl.float32)
            sum_gate += tl.where(mask, grad_x * branch, 0.0)
            grad_branch = (grad_x * gate).to(grad_branch_ptr.dtype.element_ty)
            tl.store(grad_branch_ptr + place, grad_branch, mask=mask)
        tl.store(grad_x_ptr + place, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)

    sums = part_ptr + (row * parts + part) * 3 * width + c
    tl.store(sums, sum_gate, mask=in_width)
    tl.store(sums + width, sum_scale, mask=in_width)
    tl.store(sums + 2 * width, sum_shift, mask=in_width)


@triton.jit(do_not_specialize=["parts", "columns"])
def _sum_parts_kernel(part_ptr, sum_ptr, parts, columns, BLOCK: tl.constexpr):
    """(R, parts, columns) -> (R, columns), first part to last."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    mask = column < columns
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        total += tl.load(part_ptr + (row * parts + part) * columns + column, mask=mask, other=0.0)
    tl.store(sum_ptr + row * columns + column, total, mask=mask)


def _tiles(width: int, limits: Limits) -> Tiles:
    """All channels of a token at a time, at most 16 of them a thread, so that three class vectors stay in registers."""
    block = max(16, triton.next_power_of_2(width))
    return Tiles(m=block, warps=min(16, max(1, block // 512)))


def ada_layer_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    row_class: Tensor | None,
    row_input: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """As `varlik.ops.ada_layer_norm`."""
    return _forward(x, None, None, scale, shift, row_class, row_input, eps, dtype)[1]


def residual_ada_layer_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    row_class: Tensor | None,
    row_input: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """As `varlik.ops.residual_ada_layer_norm`."""
    return _forward(x, branch, gate, scale, shift, row_class, row_input, eps, dtype)


def _forward(x, branch, gate, scale, shift, row_class, row_input, eps, dtype) -> tuple[Tensor, Tensor]:
    _launch.check(x=x, branch=branch, gate=gate, scale=scale, shift=shift)
    x, scale, shift = map(_launch.rows_contiguous, (x, scale, shift))
    if branch is not None:
        branch, gate = _launch.rows_contiguous(branch), _launch.rows_contiguous(gate)
    rows, (tokens, width) = len(x) if row_input is None else len(row_input), x.shape[1:]
    out = x.new_empty(rows, tokens, width, dtype=dtype)
    y = x.new_empty(rows, tokens, width) if branch is not None else None
    parts = triton.cdiv(tokens, FORWARD_TOKENS)
    tiles = _tiles(width, _launch.limits_of(x.device))
    _launch.launch(
        _forward_kernel,
        (rows * parts,),
        tiles,
        x,
        branch,
        gate,
        scale,
        shift,
        row_class,
        row_input,
        y,
        out,
        x.stride(0),
        x.stride(1),
        *((branch.stride(0), branch.stride(1), gate.stride(0)) if branch is not None else (0, 0, 0)),
        scale.stride(0),
        shift.stride(0),
        tokens,
        parts,
        width,
        eps,
        TOKENS=FORWARD_TOKENS,
        BLOCK_C=tiles.m,
    )
    return y if y is not None else out, out


def ada_layer_norm_backward(
    grad_y: Tensor | None,
    grad_out: Tensor,
    y: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    row_class: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `varlik.ops.ada_layer_norm_backward`: gradients of x, of branch, and of gate, scale and shift, (R, 3, C)."""
    _launch.check(grad_y=grad_y, grad_out=grad_out, y=y, branch=branch, gate=gate, scale=scale)
    grad_out, y, scale = map(_launch.rows_contiguous, (grad_out, y, scale))
    rows, tokens, width = y.shape
    grad_x = y.new_empty(y.shape)
    grad_branch = y.new_empty(0)
    residual_strides = (0, 0), (0, 0), (0,)
    if branch is not None:
        grad_y, branch, gate = map(_launch.rows_contiguous, (grad_y, branch, gate))
        grad_branch = branch.new_empty(branch.shape)
        residual_strides = grad_y.stride()[:2], branch.stride()[:2], gate.stride()[:1]
    parts = max(1, triton.cdiv(tokens, BACKWARD_TOKENS))
    sums = y.new_empty(rows, parts, 3, width, dtype=torch.float32)
    tiles = _tiles(width, _launch.limits_of(y.device))
    _launch.launch(
        _backward_kernel,
        (rows * parts,),
        tiles,
        grad_y,
        grad_out,
        y,
        branch,
        gate,
        scale,
        row_class,
        grad_x,
        grad_branch if branch is not None else None,
        sums,
        *residual_strides[0],
        *grad_out.stride()[:2],
        *y.stride()[:2],
        *residual_strides[1],
        *residual_strides[2],
        scale.stride(0),
        tokens,
        parts,
        width,
        eps,
        TOKENS=BACKWARD_TOKENS,
        BLOCK_C=tiles.m,
    )
    if parts == 1:
        return grad_x, grad_branch, sums[:, 0]
    total = y.new_empty(rows, 3, width, dtype=torch.float32)
    block = Tiles(m=1024)
    grid = (rows, triton.cdiv(3 * width, block.m))
    _launch.launch(_sum_parts_kernel, grid, block, sums, total, parts, 3 * width, BLOCK=block.m)
    return grad_x, grad_branch, total
