"""The nearest entry of a codebook, without the distances of all vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from varlik.ops import _registry
from varlik.ops._registry import Argument, Signature

_ARGUMENTS = Signature({"vectors": Argument("n c"), "codebook": Argument("V c")})


def nearest_code(vectors: Tensor, codebook: Tensor, *, impl: str = "auto") -> Tensor:
    """argmin over e of |z|^2 + |e|^2 - 2 z.e for every vector z; ties go to the lowest index.

    `vectors` (n, c), `codebook` (V, c) -> (n,) int64. Computed in float32, or in float64 where an input is float64.
    |z|^2 does not change the exact answer, but near ties are settled by rounding, and published tokens were made so.

    Raises `ValueError` for other shapes, several devices, an `impl` it lacks, or inputs that require grad; `TypeError`
    for other dtypes.

    Source: "Visual Autoregressive Modeling", Tian et al. 2024, equation 5.
    """
    impl = _registry.choose_impl("nearest_code", impl, vectors, codebook)
    sizes = _ARGUMENTS.check(vectors, codebook)
    if sizes["V"] == 0:
        raise ValueError(f"codebook: expected shape (V, c) with V >= 1, got {tuple(codebook.shape)}")
    return _registry.call("nearest_code", vectors, codebook, impl)


def _nearest_code(vectors: Tensor, codebook: Tensor) -> Tensor:
    dtype = _registry.accumulation_dtype(torch.promote_types(vectors.dtype, codebook.dtype))
    vectors, codebook = vectors.to(dtype), codebook.to(dtype)
    codebook_squared = codebook.square().sum(1)
    out = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    for rows in _registry.tiles(len(vectors), len(codebook) * dtype.itemsize, vectors.device):
        z = vectors[rows]
        distance = z.square().sum(1, keepdim=True) + codebook_squared
        out[rows] = distance.addmm_(z, codebook.T, alpha=-2).argmin(1)
    return out


def _triton(vectors: Tensor, codebook: Tensor) -> Tensor:
    from varlik.kernels.nearest_code import nearest_code as kernel

    return kernel(vectors, codebook)


def _flops(vectors: Sequence[int], codebook: Sequence[int]) -> int:
    return 2 * vectors[0] * codebook[0] * codebook[1]


_registry.register(
    "nearest_code",
    "(Tensor vectors, Tensor codebook, str impl) -> Tensor",
    torch_path=_nearest_code,
    triton_path=_triton,
    fake=lambda vectors, *_: vectors.new_empty(vectors.shape[0], dtype=torch.int64),
    flops=_flops,
)
