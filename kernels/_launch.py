"""What all launchers share: device limits, the launch itself, and a record of launches in place of running them.

Integers that vary from call to call are not specialised on, so that a kernel is compiled once for each dtype and tile
(`DO_NOT_SPECIALIZE` names them, by convention). Every launch passes `enable_fp_fusion`, whose default differs between
releases of Triton: fused multiply-adds are on everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from varlik.kernels import _autotune
from varlik.kernels._tiles import LDS_BYTES, SMALLEST, Limits, Tiles


@dataclass(frozen=True)
class Launch:
    """One launch as it was asked for: tensors may be on the meta device."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    tiles: Tiles


_record: ContextVar[tuple[Limits, list[Launch]] | None] = ContextVar("record", default=None)


@contextmanager
def recording(limits: Limits) -> Iterator[list[Launch]]:
    """Collect launches, with the tiles that a device of these limits gets, instead of running them.

    Launchers may then be given tensors on the meta device; what they return is empty.
    """
    launches: list[Launch] = []
    token = _record.set((limits, launches))
    try:
        yield launches
    finally:
        _record.reset(token)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU."""
    return bool(triton.knobs.runtime.interpret)


def limits_of(device: torch.device) -> Limits:
    """Limits of the device that a kernel is about to run on."""
    record = _record.get()
    if record is not None:
        return record[0]
    return _device_limits(device) if device.type == "cuda" else Limits.of_architecture(SMALLEST)


@lru_cache(maxsize=16)
def _device_limits(device: torch.device) -> Limits:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Limits(0, LDS_BYTES)
    return Limits(10 * properties.major + properties.minor, properties.shared_memory_per_block_optin)


def check(**tensors: Tensor | None) -> None:
    """Refuse what no kernel can run on.

    Raises `ValueError` for tensors that are not on a CUDA device (nor on the CPU under the interpreter), `TypeError`
    for float64.
    """
    recorded = _record.get() is not None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        allowed = tensor.is_cuda or (tensor.is_meta and recorded) or (tensor.device.type == "cpu" and interpreted())
        if not allowed:
            raise ValueError(
                f'{name}: expected a CUDA tensor for impl="triton", got one on {tensor.device} '
                "(TRITON_INTERPRET=1, set before varlik is imported, runs kernels on the CPU for tests)"
            )
        if tensor.dtype == torch.float64:
            raise TypeError(f'{name}: float64 has no Triton path; use impl="torch"')


def rows_contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself where its last dimension has stride 1, else a copy: kernels take all other strides."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def launch(kernel: Any, grid: tuple[int, ...], tiles: Tiles, *arguments: Any, **constants: Any) -> None:
    """Run `kernel` on the device of its first tensor; nothing is run for an empty grid."""
    record = _record.get()
    if record is not None:
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        record[1].append(Launch(kernel, grid, named, constants, tiles))
        return
    if not all(grid):
        return
    device = next(a.device for a in arguments if isinstance(a, Tensor))

    def run(tiles: Tiles) -> None:
        kernel[grid](*arguments, **constants, num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=True)

    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        run(_autotune.tuned(kernel, tiles, arguments, constants, run))


@cache
def constant(values: tuple[int, ...], device: torch.device) -> Tensor:
    """A small table of int32, made once for each device and kept: captured graphs go on reading it."""
    return torch.tensor(values, dtype=torch.int32, device=device)
