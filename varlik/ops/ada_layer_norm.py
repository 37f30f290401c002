"""LayerNorm with a scale and a shift per class, alone or after a gated residual.

Rows name their class by an index into tables that are computed once per model, so that no row need hold a copy of its
class's vectors; or the tables have a row for each of them.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from varlik.ops import _registry
from varlik.ops._registry import INT64, Argument, Signature

_TABLE, _ROW_CLASS = Argument("N C"), Argument("R", INT64, optional=True)
_ARGUMENTS = Signature(x=Argument("R T C"), scale=_TABLE, shift=_TABLE, row_class=_ROW_CLASS)
_RESIDUAL_ARGUMENTS = Signature(
    x=Argument("R T C"), branch=Argument("R T C"), gate=_TABLE, scale=_TABLE, shift=_TABLE, row_class=_ROW_CLASS
)


def ada_layer_norm(
    x: Tensor, scale: Tensor, shift: Tensor, row_class: Tensor | None, *, eps: float = 1e-6, impl: str = "auto"
) -> Tensor:
    """LayerNorm(x) * (1 + scale[row_class]) + shift[row_class].

    `x` (R, T, C), `scale` and `shift` (N, C), `row_class` (R,) int64 in [0, N) -> (R, T, C) in the dtype of `x`.
    Float32 inside for narrower types. `scale` and `shift` may have another floating dtype than `x`. Without `row_class`
    the tables have a row for each row of `x`, N = R.

    Raises `ValueError` for other shapes, several devices, an `impl` it lacks, or inputs that require grad; `TypeError`
    for other dtypes.

    Source: "Scalable Diffusion Models with Transformers", Peebles and Xie 2023, section 3.2.
    """
    impl = _registry.choose_impl("ada_layer_norm", impl)
    _check_rows(_ARGUMENTS.check(x, scale, shift, row_class), scale, row_class)
    return _registry.call("ada_layer_norm", x, scale, shift, row_class, eps, impl)


def residual_ada_layer_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    row_class: Tensor | None,
    *,
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Residual stream y = x + gate[row_class] * branch, and `ada_layer_norm` of it.

    `x` and `branch` (R, T, C), `gate`, `scale` and `shift` (N, C), `row_class` (R,) int64 in [0, N) or None -> y and
    the normalised y, both (R, T, C) in the dtype of `x`. The other floating inputs may have another dtype than `x`.

    Raises as `ada_layer_norm` does.
    """
    impl = _registry.choose_impl("residual_ada_layer_norm", impl)
    _check_rows(_RESIDUAL_ARGUMENTS.check(x, branch, gate, scale, shift, row_class), scale, row_class)
    return _registry.call("residual_ada_layer_norm", x, branch, gate, scale, shift, row_class, eps, impl)


def _check_rows(sizes: dict[str, int], scale: Tensor, row_class: Tensor | None) -> None:
    if row_class is None and sizes["N"] != sizes["R"]:
        raise ValueError(
            f"scale: expected shape (R, C) with R = {sizes['R']} and no row_class, got {tuple(scale.shape)}"
        )


def _ada_layer_norm(x: Tensor, scale: Tensor, shift: Tensor, row_class: Tensor | None, eps: float) -> Tensor:
    dtype = _registry.accumulation_dtype(x.dtype)
    out = F.layer_norm(x.to(dtype), x.shape[-1:], *_identity(x.shape[-1], dtype, x.device), eps=eps)
    # In place, and in one pass over a tensor that is larger than the caches.
    torch.addcmul(_rows(shift, row_class, dtype), out, _rows(scale, row_class, dtype) + 1, out=out)
    return out.to(x.dtype)


def _residual_ada_layer_norm(
    x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, row_class: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    dtype = _registry.accumulation_dtype(x.dtype)
    y = torch.addcmul(x.to(dtype), _rows(gate, row_class, dtype), branch.to(dtype)).to(x.dtype).contiguous()
    return y, _ada_layer_norm(y, scale, shift, row_class, eps)


@lru_cache(maxsize=64)
def _identity(width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weight one and bias zero: torch's LayerNorm is vectorised on a CPU only where it has both."""
    return torch.ones(width, dtype=dtype, device=device), torch.zeros(width, dtype=dtype, device=device)


def _rows(table: Tensor, row_class: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(N, C), (R,) -> (R, 1, C)."""
    rows = table if row_class is None else table.index_select(0, row_class)
    return rows.to(dtype).unsqueeze(1)


def _empty(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_registry.register(
    "ada_layer_norm",
    "(Tensor x, Tensor scale, Tensor shift, Tensor? row_class, float eps, str impl) -> Tensor",
    torch_path=_ada_layer_norm,
    fake=lambda x, *_: _empty(x),
    flops=_registry.no_flops,
)
_registry.register(
    "residual_ada_layer_norm",
    "(Tensor x, Tensor branch, Tensor gate, Tensor scale, Tensor shift, Tensor? row_class, float eps, str impl)"
    " -> (Tensor, Tensor)",
    torch_path=_residual_ada_layer_norm,
    fake=lambda x, *_: (_empty(x), _empty(x)),
    flops=_registry.no_flops,
)
