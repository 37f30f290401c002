"""LayerNorm with a scale and a shift per class, alone or after a gated residual.

Rows name their class by an index into tables that are computed once per model, so no row holds a copy of its class's
vectors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from varlik.ops import _registry
from varlik.ops._registry import INT64, Argument


def ada_layer_norm(
    x: Tensor, scale: Tensor, shift: Tensor, row_class: Tensor, *, eps: float = 1e-6, impl: str = "auto"
) -> Tensor:
    """LayerNorm(x) * (1 + scale[row_class]) + shift[row_class].

    `x` (R, T, C), `scale` and `shift` (N, C), `row_class` (R,) int64 in [0, N) -> (R, T, C) in the dtype of `x`.
    Float32 inside for narrower types. `scale` and `shift` may have another floating dtype than `x`.

    Raises `ValueError` for other shapes, several devices, an `impl` it lacks, or inputs that require grad; `TypeError`
    for other dtypes.

    Source: "Scalable Diffusion Models with Transformers", Peebles and Xie 2023, section 3.2.
    """
    impl = _registry.choose_impl("ada_layer_norm", impl)
    _registry.check(
        Argument("x", x, ("R", "T", "C")),
        Argument("scale", scale, ("N", "C")),
        Argument("shift", shift, ("N", "C")),
        Argument("row_class", row_class, ("R",), INT64),
    )
    return torch.ops.varlik.ada_layer_norm(x, scale, shift, row_class, eps, impl)


def residual_ada_layer_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    row_class: Tensor,
    *,
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Residual stream y = x + gate[row_class] * branch, and `ada_layer_norm` of it.

    `x` and `branch` (R, T, C), `gate`, `scale` and `shift` (N, C), `row_class` (R,) int64 in [0, N) -> y and the
    normalised y, both (R, T, C) in the dtype of `x`. The other floating inputs may have another dtype than `x`.

    Raises as `ada_layer_norm` does.
    """
    impl = _registry.choose_impl("residual_ada_layer_norm", impl)
    _registry.check(
        Argument("x", x, ("R", "T", "C")),
        Argument("branch", branch, ("R", "T", "C")),
        Argument("gate", gate, ("N", "C")),
        Argument("scale", scale, ("N", "C")),
        Argument("shift", shift, ("N", "C")),
        Argument("row_class", row_class, ("R",), INT64),
    )
    return torch.ops.varlik.residual_ada_layer_norm(x, branch, gate, scale, shift, row_class, eps, impl)


def _ada_layer_norm(x: Tensor, scale: Tensor, shift: Tensor, row_class: Tensor, eps: float) -> Tensor:
    dtype = _registry.accumulation_dtype(x.dtype)
    factor = 1 + _rows(scale, row_class, dtype)
    out = F.layer_norm(x.to(dtype), x.shape[-1:], eps=eps)
    # In place, and in one pass over a tensor that is larger than the caches.
    torch.addcmul(_rows(shift, row_class, dtype), out, factor, out=out)
    return out.to(x.dtype)


def _residual_ada_layer_norm(
    x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, row_class: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    dtype = _registry.accumulation_dtype(x.dtype)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    torch.addcmul(x.to(dtype), _rows(gate, row_class, dtype), branch.to(dtype), out=y)
    y = y.to(x.dtype)
    return y, _ada_layer_norm(y, scale, shift, row_class, eps)


def _rows(table: Tensor, row_class: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, C), (R,) -> (R, 1, C)."""
    return table.index_select(0, row_class).to(dtype).unsqueeze(1)


def _empty(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_registry.register(
    "ada_layer_norm",
    "(Tensor x, Tensor scale, Tensor shift, Tensor row_class, float eps, str impl) -> Tensor",
    torch_path=_ada_layer_norm,
    fake=lambda x, *_: _empty(x),
    flops=_registry.no_flops,
)
_registry.register(
    "residual_ada_layer_norm",
    "(Tensor x, Tensor branch, Tensor gate, Tensor scale, Tensor shift, Tensor row_class, float eps, str impl)"
    " -> (Tensor, Tensor)",
    torch_path=_residual_ada_layer_norm,
    fake=lambda x, *_: (_empty(x), _empty(x)),
    flops=_registry.no_flops,
)
