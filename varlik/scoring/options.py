"""How an engine computes: memory, precision, implementation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from varlik.ops import IMPLS, runs_kernels

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class EngineOptions:
    """Options of the scoring engine, as `varlik.load`, `VARClassifier` and `varlik.accelerate` take them by name.

    - `max_memory`: bytes that scoring may take beyond the weights and the tables of the classes; 30 % of what is free
      by default.
    - `dtype`: of matrix products, and of keys and values. By default float16 on a CUDA device (float64 for float64
      weights), elsewhere that of the weights. Norms, softmax, sums and the residual stream are float32 at least.
    - `impl`: "torch", "triton", or "auto" for Triton kernels on a CUDA device and torch elsewhere.
    - `deterministic`: the same bits whatever else is in the batch. Products of a pass then take a kernel of fixed tiles
      in place of cuBLAS, and tables are built class by class. Needs Triton's path; a CPU's scores agree to 1e-5.
    - `cuda_graphs`: launch a pass over few rows as one captured graph, padded to a few numbers of rows. For a CUDA
      device; it pays where launching takes longer than computing.

    Raises `TypeError` for values of another kind, `ValueError` for those out of range.
    """

    max_memory: int | None = None
    dtype: torch.dtype | None = None
    impl: str = "auto"
    deterministic: bool = False
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        memory = self.max_memory
        if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int)):
            raise TypeError(f"max_memory: expected a whole number of bytes, got {memory!r}")
        if memory is not None and memory < 0:
            raise ValueError(f"max_memory: expected a number of bytes, 0 or more, got {memory}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise TypeError(f"dtype: expected one of {', '.join(map(str, DTYPES))} or None, got {self.dtype!r}")
        if self.impl not in IMPLS:
            raise ValueError(f'impl: expected "auto", "torch" or "triton", got {self.impl!r}')

    def compute(self, device: torch.device, weights: torch.dtype) -> Compute:
        """What these options mean on `device` for weights of a dtype.

        Raises `ValueError` for weights in half precision, and for what the device or dtype cannot do.
        """
        if weights not in (torch.float32, torch.float64):
            raise ValueError(f"var: expected float32 or float64 weights, got {weights}; call var.float()")
        cuda = device.type == "cuda"
        dtype = self.dtype or (torch.float16 if cuda and weights == torch.float32 else weights)
        impl = self.impl
        if impl == "auto":
            impl = "triton" if cuda and runs_kernels(device) and torch.float64 not in (dtype, weights) else "torch"
        if impl == "triton" and torch.float64 in (dtype, weights):
            raise ValueError("impl: Triton kernels do not compute in float64")
        if impl == "triton" and not runs_kernels(device):
            raise ValueError(f"impl: Triton kernels cannot run on {device} here")
        if self.deterministic and impl != "triton":
            raise ValueError(f"deterministic: needs Triton kernels, which {device.type} with {dtype} does not take")
        if self.cuda_graphs and not cuda:
            raise ValueError(f"cuda_graphs: needs a CUDA device, got {device}")
        if self.cuda_graphs and impl != "triton":
            raise ValueError("cuda_graphs: needs Triton kernels")
        return Compute(dtype, impl, "triton" if self.deterministic else "torch", self.cuda_graphs)


@dataclass(frozen=True)
class Compute:
    """Decided options: `dtype` of products, implementation of the ops and of matrix products, CUDA graphs or not."""

    dtype: torch.dtype
    impl: str = "torch"
    product_impl: str = "torch"
    cuda_graphs: bool = False

    @property
    def deterministic(self) -> bool:
        """Whether products do not depend on the number of rows."""
        return self.product_impl == "triton"
