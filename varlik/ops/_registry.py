"""What all ops share: registration with torch, the choice of an implementation, checks of arguments, tiles.

An op is registered once, with the chosen implementation as its last argument. So `torch.compile` and the FLOP counter
see the same op whichever path runs; where nobody listens, `call` goes to the path directly.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

IMPLS = ("auto", "torch", "triton")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INT64 = (torch.int64,)

# Largest intermediate of a tiled op. On CPU a tile stays in the caches between passes, and is yet large enough for the
# matrix product that makes it; elsewhere it fills the device.
CPU_TILE_BYTES = 8 << 20
DEVICE_TILE_BYTES = 64 << 20

_PATHS: dict[str, dict[str, Callable[..., Any]]] = {}


def register(
    name: str,
    schema: str,
    *,
    torch_path: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int],
    triton_path: Callable[..., Any],
    backward: Callable[..., tuple[Any, ...]] | None = None,
) -> None:
    """Register `varlik::<name>`; `schema` ends with `str impl`, which the given functions do not take.

    `fake` returns empty outputs of the right shape, type and layout; `flops` takes shapes in place of tensors.
    `triton_path` imports its kernel when it is called. `backward(inputs, output, needs, impl, *grads)` returns the
    gradient of every input, None for those that `needs` calls False or that have none.
    """
    _PATHS[name] = {"torch": torch_path, "triton": triton_path}

    torch.library.define(f"varlik::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"varlik::{name}", "default", partial(_run, name))
    torch.library.register_fake(f"varlik::{name}", lambda *args: fake(*args[:-1]))
    register_flop_formula(getattr(torch.ops.varlik, name))(lambda *args, **kwargs: flops(*args[:-1]))
    if backward is not None:
        _register_backward(name, backward)


def _register_backward(name: str, backward: Callable[..., tuple[Any, ...]]) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        tensors = [x if isinstance(x, Tensor) else None for x in (*inputs, *outputs)]
        ctx.save_for_backward(*tensors)
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]

    def run_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved, count = ctx.saved_tensors, len(ctx.others)
        inputs = [tensor if tensor is not None else x for tensor, x in zip(saved, ctx.others, strict=False)]
        *inputs, impl = inputs
        found = backward(inputs, saved[count:], ctx.needs_input_grad[:-1], impl, *grads)
        return (*found, None)

    torch.library.register_autograd(f"varlik::{name}", run_backward, setup_context=setup_context)


def call(name: str, *args: Any) -> Any:
    """`varlik::<name>` of its inputs and the chosen implementation.

    Through torch's dispatcher where somebody listens there (torch.compile, a FLOP counter, autograd, meta, fake and
    other special tensors); directly otherwise, for the dispatcher's way into Python and back takes as long as a small
    op.
    """
    listening = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    grad = torch.is_grad_enabled()
    for arg in args:
        if isinstance(arg, Tensor):
            plain = type(arg) in (Tensor, Parameter) and not arg.is_meta
            listening = listening or not plain or (grad and arg.requires_grad)
    return getattr(torch.ops.varlik, name)(*args) if listening else _run(name, *args)


def _run(name: str, *args: Any) -> Any:
    *inputs, impl = args
    # The types of the inputs decide, not an autocast region around the call: it would halve a norm's precision.
    first = inputs[0] if inputs[0] is not None else inputs[1]
    device = first.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return _PATHS[name][impl](*inputs)
    return _PATHS[name][impl](*inputs)


def no_flops(*args: Any) -> int:
    """The FLOP formula of elementwise work: torch counts matrix products and attention only."""
    return 0


def choose_impl(name: str, impl: str, *tensors: Tensor | None) -> str:
    """The path that `impl` stands for on these tensors: "torch" or "triton". An explicit request never falls back.

    "auto" is "triton" for tensors on a CUDA device that runs kernels, but for float64, else "torch". Raises
    `ValueError` for an unknown `impl` and for "triton" where triton is not installed.
    """
    if impl not in IMPLS:
        raise ValueError(f'impl: expected "auto", "torch" or "triton", got {impl!r}')
    if impl == "triton" and not has_triton():
        raise ValueError(f"impl: {name} has a Triton path, but triton is not installed")
    if impl != "auto":
        return impl
    present = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    suits = all(tensor.is_cuda and tensor.dtype != torch.float64 for tensor in present)
    return "triton" if suits and runs_kernels(present[0].device) else "torch"


@cache
def runs_kernels(device: torch.device) -> bool:
    """Whether Triton kernels run on a device: a CUDA device of compute capability 8.0 or later, or AMD's.

    A CPU counts where Triton's interpreter is on.
    """
    if not has_triton():
        return False
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def autotuning() -> AbstractContextManager[None]:
    """While it is open, Triton kernels time their numbers of warps and pipeline stages when first launched."""
    from varlik.kernels._autotune import autotuning

    return autotuning()


@cache
def has_triton() -> bool:
    """Whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


class Argument(NamedTuple):
    """What is expected of a tensor argument.

    `shape` names its sizes, such as "R T C"; equal letters mean equal sizes. `dtypes` are those allowed, or the name of
    an earlier argument whose dtype it must have. An `optional` one may be None.
    """

    shape: str
    dtypes: tuple[torch.dtype, ...] | str = FLOATS
    optional: bool = False


class Signature:
    """The tensor arguments of an op, by name and in order."""

    def __init__(self, arguments: Mapping[str, Argument], differentiable: bool = False):
        """A `differentiable` op may be given tensors that require grad."""
        self._differentiable = differentiable
        # As flat tuples: scoring a few rows comes here so often that attribute look-ups would show.
        self._arguments = tuple((name, tuple(a.shape.split()), *a[1:]) for name, a in arguments.items())

    def check(self, *tensors: Tensor | None) -> dict[str, int]:
        """The size that each letter stands for.

        Raises `TypeError` for what is no tensor or has another dtype, `ValueError` for another shape, for tensors on
        several devices, and for tensors that require grad while grad mode is on.
        """
        sizes: dict[str, int] = {}
        seen: dict[str, torch.dtype] = {}
        device = None
        grad = not self._differentiable and torch.is_grad_enabled()
        for (name, letters, dtypes, optional), tensor in zip(self._arguments, tensors, strict=True):
            if tensor is None and optional:
                continue
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
            dtype = seen[name] = tensor.dtype
            if isinstance(dtypes, str):
                if dtype != seen[dtypes]:
                    raise TypeError(f"{name}: expected {seen[dtypes]}, as {dtypes} has, got {dtype}")
            elif dtype not in dtypes:
                raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {dtype}")
            shape = tensor.shape
            if len(shape) != len(letters):
                raise _wrong_shape(name, tensor, letters, sizes)
            for size, letter in zip(shape, letters, strict=True):
                if size != sizes.setdefault(letter, size):
                    raise _wrong_shape(name, tensor, letters, sizes)
            device = tensor.device if device is None else device
            if tensor.device != device:
                raise ValueError(f"{name}: expected on {device}, got {tensor.device}")
            if grad and tensor.requires_grad:
                raise ValueError(
                    f"{name}: requires grad, and gradients would be lost here; use torch.no_grad(), or varlik.models "
                    "for the differentiable path"
                )
        return sizes


def _wrong_shape(name: str, tensor: Tensor, letters: tuple[str, ...], sizes: dict[str, int]) -> ValueError:
    known = ", ".join(str(sizes.get(letter, letter)) for letter in letters)
    expected = ", ".join(letters)
    trailing = "," if len(letters) == 1 else ""
    meaning = "" if known == expected else f" = ({known}{trailing})"
    return ValueError(f"{name}: expected shape ({expected}{trailing}){meaning}, got {tuple(tensor.shape)}")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms, softmax and sums over values of `dtype`: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)


def tile_bytes(device: torch.device) -> int:
    """The largest intermediate of a tiled op on `device`."""
    return CPU_TILE_BYTES if device.type == "cpu" else DEVICE_TILE_BYTES


def tiles(rows: int, row_bytes: int, device: torch.device) -> Iterator[slice]:
    """Cut `rows` into nearly equal slices of as many rows as a tile holds, at least one each."""
    count = -(-rows // max(1, tile_bytes(device) // row_bytes))
    for i in range(count):
        yield slice(rows * i // count, rows * (i + 1) // count)
