"""LayerNorm with a scale and a shift per class, alone or after a gated residual.

Rows name their class by an index into tables that are computed once per model, so that no row need hold a copy of its
class's vectors; or the tables have a row for each of them. Rows that read one input name it by an index too.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varlik.ops import _registry
from varlik.ops._registry import FLOATS, INT64, Argument, Signature

_TABLE = Argument("N C")
_ROW_CLASS, _ROW_INPUT = Argument("R", INT64, optional=True), Argument("R", INT64, optional=True)
_NORM = {"scale": _TABLE, "shift": _TABLE, "row_class": _ROW_CLASS, "row_input": _ROW_INPUT}
_RESIDUAL = {"branch": Argument("R T C"), "gate": _TABLE, **_NORM}
# With and without `row_input`, through which rows share what they read.
_ARGUMENTS = {
    shared: Signature(dict(x=Argument("M T C" if shared else "R T C"), **_NORM), differentiable=True)
    for shared in (True, False)
}
_RESIDUAL_ARGUMENTS = {
    shared: Signature(dict(x=Argument("M T C" if shared else "R T C"), **_RESIDUAL), differentiable=True)
    for shared in (True, False)
}
_BACKWARD_ARGUMENTS = Signature(
    {
        "grad_y": Argument("R T C", optional=True),
        "grad_out": Argument("R T C"),
        "y": Argument("R T C"),
        "branch": Argument("R T C", optional=True),
        "gate": Argument("N C", optional=True),
        "scale": _TABLE,
        "row_class": _ROW_CLASS,
    }
)


def ada_layer_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    row_class: Tensor | None,
    *,
    row_input: Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """LayerNorm(x[row_input]) * (1 + scale[row_class]) + shift[row_class].

    - `x` (M, T, C); `row_input` (R,) int64 in [0, M), None where every row has its own, M = R.
    - `scale`, `shift` (N, C), possibly of another floating dtype than `x`; `row_class` (R,) int64 in [0, N), None where
      the tables have a row for each row, N = R.
    - `dtype` of the result, that of `x` by default. Float32 inside for narrower types.

    Returns (R, T, C). Differentiable in `x`, `scale` and `shift`, but not through `row_input`.

    Raises `ValueError` for other shapes, several devices, an `impl` it lacks, or a gradient through `row_input`;
    `TypeError` for other dtypes.

    Source: "Scalable Diffusion Models with Transformers", Peebles and Xie 2023, section 3.2.
    """
    impl = _registry.choose_impl("ada_layer_norm", "torch" if _is_wide(dtype, impl) else impl, x, scale, shift)
    sizes = _ARGUMENTS[row_input is not None].check(x, scale, shift, row_class, row_input)
    _check_rows(sizes, x, scale, row_class, row_input)
    dtype = _check_dtype(x, dtype)
    return _registry.call("ada_layer_norm", x, scale, shift, row_class, row_input, eps, dtype, impl)


def residual_ada_layer_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    row_class: Tensor | None,
    *,
    row_input: Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Residual stream y = x[row_input] + gate[row_class] * branch, and `ada_layer_norm` of it.

    `branch` (R, T, C) and `gate` (N, C) of any floating dtype, all else as `ada_layer_norm` takes it -> y (R, T, C) in
    the dtype of `x`, and the normalised y, (R, T, C), in `dtype`.

    Raises as `ada_layer_norm` does.
    """
    name = "residual_ada_layer_norm"
    impl = _registry.choose_impl(name, "torch" if _is_wide(dtype, impl) else impl, x, branch, gate, scale, shift)
    sizes = _RESIDUAL_ARGUMENTS[row_input is not None].check(x, branch, gate, scale, shift, row_class, row_input)
    _check_rows(sizes, x, scale, row_class, row_input)
    dtype = _check_dtype(x, dtype)
    inputs = (x, branch, gate, scale, shift, row_class, row_input)
    return _registry.call(name, *inputs, eps, dtype, impl)


def ada_layer_norm_backward(
    grad_y: Tensor | None,
    grad_out: Tensor,
    y: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    row_class: Tensor | None,
    *,
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of `residual_ada_layer_norm`, or without a branch of `ada_layer_norm`, from the stream `y` (R, T, C).

    `grad_out` (R, T, C) is the gradient of the normalised output, `grad_y` that of y itself; `grad_y`, `branch` and
    `gate` are None together. Returns the gradients of x and branch, (R, T, C) each (None without a branch), and of the
    vectors of every row, (R, 3, C): gate (zero without a branch), scale and shift, in float32 or wider, summed over
    the row's tokens in a fixed order.

    Raises `ValueError` for other shapes and several devices, `TypeError` for other dtypes.
    """
    impl = _registry.choose_impl("ada_layer_norm_backward", impl, grad_y, grad_out, y, branch, gate, scale)
    inputs = (grad_y, grad_out, y, branch, gate, scale, row_class)
    _BACKWARD_ARGUMENTS.check(*inputs)
    if len({grad_y is None, branch is None, gate is None}) > 1:
        raise ValueError("grad_y, branch, gate: expected all or none of them")
    grad_x, grad_branch, rows = _registry.call("ada_layer_norm_backward", *inputs, eps, impl)
    return grad_x, grad_branch if branch is not None else None, rows


def _check_rows(
    sizes: dict[str, int], x: Tensor, scale: Tensor, row_class: Tensor | None, row_input: Tensor | None
) -> None:
    if row_input is not None and x.requires_grad and torch.is_grad_enabled():
        raise ValueError("row_input: no gradient flows to an input that rows share; index x before the call")
    if row_class is None and sizes["N"] != sizes["R"]:
        raise ValueError(
            f"scale: expected shape (R, C) with R = {sizes['R']} and no row_class, got {tuple(scale.shape)}"
        )


def _is_wide(dtype: torch.dtype | None, impl: str) -> bool:
    """Whether a choice is left and the result is to be float64, which kernels do not compute."""
    return impl == "auto" and dtype == torch.float64


def _check_dtype(x: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"dtype: expected {' or '.join(map(str, FLOATS))}, got {dtype}")
    return x.dtype if dtype is None else dtype


def _ada_layer_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    row_class: Tensor | None,
    row_input: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    inner = _registry.accumulation_dtype(torch.promote_types(x.dtype, dtype))
    width = x.shape[-1]
    out = F.layer_norm(x.to(inner), (width,), *_identity(width, inner, x.device), eps=eps)
    if row_input is not None:  # each input is normalised once
        out = out.index_select(0, row_input)
    # In place, and in one pass over a tensor that is larger than the caches.
    torch.addcmul(_rows(shift, row_class, inner), out, _rows(scale, row_class, inner) + 1, out=out)
    return out.to(dtype)


def _residual_ada_layer_norm(
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
    inner = _registry.accumulation_dtype(x.dtype)
    x = x if row_input is None else x.index_select(0, row_input)
    y = torch.addcmul(x.to(inner), _rows(gate, row_class, inner), branch.to(inner)).to(x.dtype).contiguous()
    return y, _ada_layer_norm(y, scale, shift, row_class, None, eps, dtype)


def _ada_layer_norm_backward(
    grad_y: Tensor | None,
    grad_out: Tensor,
    y: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    row_class: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    inner = _registry.accumulation_dtype(y.dtype)
    grad_out, stream, width = grad_out.to(inner), y.to(inner), y.shape[-1]
    normed, mean, rstd = torch.native_layer_norm(stream, (width,), *_identity(width, inner, y.device), eps)
    sums = normed.new_zeros(len(y), 3, width)
    # One buffer for all products, each used as soon as it is there: what counts here are passes over memory.
    torch.sum(normed.mul_(grad_out), 1, out=sums[:, 1])
    torch.sum(grad_out, 1, out=sums[:, 2])
    scaled = torch.mul(grad_out, _rows(scale, row_class, inner) + 1, out=normed)
    grad_x = torch.ops.aten.native_layer_norm_backward(
        scaled, stream, (width,), mean, rstd, None, None, [True, False, False]
    )[0]
    if branch is None or gate is None or grad_y is None:
        return grad_x.to(y.dtype), y.new_empty(0), sums
    grad_x += grad_y
    torch.sum(torch.mul(grad_x, branch, out=scaled), 1, out=sums[:, 0])
    grad_branch = (grad_x * _rows(gate, row_class, inner)).to(branch.dtype)
    return grad_x.to(y.dtype), grad_branch, sums


@lru_cache(maxsize=64)
def _identity(width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weight one and bias zero: torch's LayerNorm is vectorised on a CPU only where it has both."""
    return torch.ones(width, dtype=dtype, device=device), torch.zeros(width, dtype=dtype, device=device)


def _rows(table: Tensor, row_class: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(N, C), (R,) -> (R, 1, C)."""
    rows = table if row_class is None else table.index_select(0, row_class)
    return rows.to(dtype).unsqueeze(1)


def _of_table(grad_rows: Tensor, table: Tensor, row_class: Tensor | None) -> Tensor:
    """Gradient of a table (N, C) from that of its rows (R, C)."""
    if row_class is None:
        return grad_rows.to(table.dtype)
    # A product with the rows of each class as a matrix: a fixed order of sums, where an indexed addition has none.
    members = F.one_hot(row_class, len(table)).T.to(grad_rows.dtype)
    return (members @ grad_rows).to(table.dtype)


def _autograd(inputs: list[Any], output: Any, needs: Any, impl: str, grad: Tensor) -> tuple[Any, ...]:
    x, scale, shift, row_class, row_input, eps, _ = inputs
    y = x if row_input is None else x.index_select(0, row_input)
    grad_x, _, rows = ada_layer_norm_backward(None, grad, y, None, None, scale, row_class, eps=eps, impl=impl)
    return (
        grad_x if row_input is None else None,
        _of_table(rows[:, 1], scale, row_class),
        _of_table(rows[:, 2], shift, row_class),
        *[None] * 4,
    )


def _residual_autograd(
    inputs: list[Any], output: Any, needs: Any, impl: str, grad_y: Tensor, grad_out: Tensor
) -> tuple[Any, ...]:
    _, branch, gate, scale, shift, row_class, row_input, eps, _ = inputs
    grad_x, grad_branch, rows = ada_layer_norm_backward(
        grad_y, grad_out, output[0], branch, gate, scale, row_class, eps=eps, impl=impl
    )
    tables = [_of_table(rows[:, i], table, row_class) for i, table in enumerate((gate, scale, shift))]
    return grad_x if row_input is None else None, grad_branch, *tables, *[None] * 4


def _triton(*inputs: Any) -> Tensor:
    from varlik.kernels import ada_layer_norm as kernels

    return kernels.ada_layer_norm(*inputs)


def _residual_triton(*inputs: Any) -> tuple[Tensor, Tensor]:
    from varlik.kernels import ada_layer_norm as kernels

    return kernels.residual_ada_layer_norm(*inputs)


def _backward_triton(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    from varlik.kernels import ada_layer_norm as kernels

    return kernels.ada_layer_norm_backward(*inputs)


def _norm_fake(
    x: Tensor, scale: Tensor, shift: Tensor, row_class: Any, row_input: Tensor | None, *others: Any
) -> Tensor:
    rows = x.shape[0] if row_input is None else row_input.shape[0]
    return x.new_empty(rows, x.shape[1], x.shape[2], dtype=others[-1])


def _empty(x: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(like.shape, dtype=dtype)


def _backward_fake(grad_y: Tensor | None, grad_out: Tensor, y: Tensor, branch: Tensor | None, *_: Any) -> Any:
    rows, width = y.shape[0], y.shape[2]
    vectors = y.new_empty(rows, 3, width, dtype=_registry.accumulation_dtype(y.dtype))
    return y.new_empty(y.shape), y.new_empty(0) if branch is None else branch.new_empty(branch.shape), vectors


_registry.register(
    "ada_layer_norm",
    "(Tensor x, Tensor scale, Tensor shift, Tensor? row_class, Tensor? row_input, float eps,"
    " ScalarType dtype, str impl) -> Tensor",
    torch_path=_ada_layer_norm,
    triton_path=_triton,
    fake=_norm_fake,
    flops=_registry.no_flops,
    backward=_autograd,
)
_registry.register(
    "residual_ada_layer_norm",
    "(Tensor x, Tensor branch, Tensor gate, Tensor scale, Tensor shift, Tensor? row_class, Tensor? row_input,"
    " float eps, ScalarType dtype, str impl) -> (Tensor, Tensor)",
    torch_path=_residual_ada_layer_norm,
    triton_path=_residual_triton,
    fake=lambda x, branch, *others: (_empty(x, branch, x.dtype), _empty(x, branch, others[-1])),
    flops=_registry.no_flops,
    backward=_residual_autograd,
)
_registry.register(
    "ada_layer_norm_backward",
    "(Tensor? grad_y, Tensor grad_out, Tensor y, Tensor? branch, Tensor? gate, Tensor scale, Tensor? row_class,"
    " float eps, str impl) -> (Tensor, Tensor, Tensor)",
    torch_path=_ada_layer_norm_backward,
    triton_path=_backward_triton,
    fake=_backward_fake,
    flops=_registry.no_flops,
)
