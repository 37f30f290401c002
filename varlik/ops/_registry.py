"""What all ops share: registration with torch, the choice of an implementation, checks of arguments, tiles.

An op is registered once, with the chosen implementation as its last argument. So eager code, `torch.compile` and the
FLOP counter see the same op whichever path runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

IMPLS = ("auto", "torch", "triton")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INT64 = (torch.int64,)

# Largest intermediate of a tiled op. On CPU a tile stays in the caches between passes, and is yet large enough for the
# matrix product that makes it; elsewhere it fills the device.
CPU_TILE_BYTES = 4 << 20
DEVICE_TILE_BYTES = 64 << 20

_PATHS: dict[str, dict[str, Callable[..., Any]]] = {}


def register(
    name: str,
    schema: str,
    *,
    torch_path: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int],
    triton_path: Callable[..., Any] | None = None,
) -> None:
    """Register `varlik::<name>`; `schema` ends with `str impl`, which the given functions do not take.

    `fake` returns empty outputs of the right shape, type and layout; `flops` takes shapes in place of tensors.
    `triton_path` imports its kernel when it is called.
    """
    _PATHS[name] = {"torch": torch_path} | ({"triton": triton_path} if triton_path else {})

    def run(*args: Any) -> Any:
        *inputs, impl = args
        # The types of the inputs decide, not an autocast region around the call: it would halve a norm's precision.
        device = inputs[0].device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            return _PATHS[name][impl](*inputs)

    torch.library.define(f"varlik::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"varlik::{name}", "default", run)
    torch.library.register_fake(f"varlik::{name}", lambda *args: fake(*args[:-1]))
    register_flop_formula(getattr(torch.ops.varlik, name))(lambda *args, **kwargs: flops(*args[:-1]))


def no_flops(*args: Any) -> int:
    """The FLOP formula of elementwise work: torch counts matrix products and attention only."""
    return 0


def choose_impl(name: str, impl: str) -> str:
    """The path that `impl` stands for: "torch" or "triton". An explicit request never falls back.

    Raises `ValueError` for an unknown `impl` or one that the op lacks.
    """
    if impl not in IMPLS:
        raise ValueError(f'impl: expected "auto", "torch" or "triton", got {impl!r}')
    if impl == "auto":
        return "torch"
    if impl not in _PATHS[name]:
        raise ValueError(f"impl: {name} has no Triton path in this version")
    return impl


class Argument(NamedTuple):
    """A tensor argument and what is expected of it.

    `shape` holds a number where the size is known and a letter where it is not; equal letters mean equal sizes.
    `dtypes` are those allowed, or the name of an earlier argument whose dtype it must have.
    """

    name: str
    tensor: Tensor
    shape: tuple[str | int, ...]
    dtypes: tuple[torch.dtype, ...] | str = FLOATS


def check(*arguments: Argument) -> dict[str, int]:
    """The size that each letter stands for.

    Raises `TypeError` for what is no tensor or has another dtype, `ValueError` for another shape, for tensors on
    several devices, and for tensors that require grad while grad mode is on.
    """
    sizes: dict[str, int] = {}
    seen: dict[str, torch.dtype] = {}
    for name, tensor, shape, dtypes in arguments:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        allowed = (seen[dtypes],) if isinstance(dtypes, str) else dtypes
        seen[name] = tensor.dtype
        if tensor.dtype not in allowed:
            expected = " or ".join(str(dtype) for dtype in allowed) + (
                f", as {dtypes} has," if isinstance(dtypes, str) else ","
            )
            raise TypeError(f"{name}: expected {expected} got {tensor.dtype}")
        if tensor.dim() != len(shape):
            raise _wrong_shape(name, tensor, shape, sizes)
        for size, letter in zip(tensor.shape, shape, strict=True):
            if size != (sizes.setdefault(letter, size) if isinstance(letter, str) else letter):
                raise _wrong_shape(name, tensor, shape, sizes)
        if tensor.device != arguments[0].tensor.device:
            raise ValueError(f"{name}: expected on {arguments[0].tensor.device}, got {tensor.device}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: requires grad, and gradients would be lost here; use torch.no_grad(), or varlik.models "
                "for the differentiable path"
            )
    return sizes


def _wrong_shape(name: str, tensor: Tensor, shape: tuple[str | int, ...], sizes: dict[str, int]) -> ValueError:
    known = ", ".join(str(sizes.get(size, size) if isinstance(size, str) else size) for size in shape)
    letters = ", ".join(str(size) for size in shape)
    meaning = "" if known == letters else f" = ({known}{',' if len(shape) == 1 else ''})"
    trailing = "," if len(shape) == 1 else ""
    return ValueError(f"{name}: expected shape ({letters}{trailing}){meaning}, got {tuple(tensor.shape)}")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms, softmax and sums over values of `dtype`: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)


def tiles(rows: int, row_bytes: int, device: torch.device) -> Iterator[slice]:
    """Cut `rows` into nearly equal slices of as many rows as a tile holds, at least one each."""
    budget = CPU_TILE_BYTES if device.type == "cpu" else DEVICE_TILE_BYTES
    count = -(-rows // max(1, budget // row_bytes))
    for i in range(count):
        yield slice(rows * i // count, rows * (i + 1) // count)
