"""Where the engine's time goes, op by op."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

OTHER = "other"


@dataclass(frozen=True)
class OpTime:
    """One op, with the width of its product where it has one: its `calls`, their `seconds` and `flops` together."""

    name: str
    calls: int
    seconds: float
    flops: int


class _Stopwatch(TorchDispatchMode):
    """Times every op of ours; what torch does outside of them is left to the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, tuple[int, float, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "varlik":
            return func(*args, **kwargs)
        started = _now(args)
        result = func(*args, **kwargs)
        seconds = _now(args) - started
        flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
        name = str(func.overloadpacket).removeprefix("varlik.")
        if name == "linear":
            name += f" {args[1].shape[1]} -> {args[1].shape[0]}"
        calls, before, counted = self.found.get(name, (0, 0.0, 0))
        self.found[name] = calls + 1, before + seconds, counted + flops
        return result


def profile(work: Callable[[], object]) -> list[OpTime]:
    """Time of every op in `work()`, the longest first, and last of what is none of ours: torch's and Python's.

    The rest is told from a second run, which nobody watches: watching slows down what is not watched.
    """
    with _Stopwatch() as watch:
        work()
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    total = time.perf_counter() - started
    ops = [OpTime(name, *numbers) for name, numbers in watch.found.items()]
    rest = max(0.0, total - sum(op.seconds for op in ops))
    return [*sorted(ops, key=lambda op: -op.seconds), OpTime(OTHER, 1, rest, 0)]


def _now(args: tuple[Any, ...]) -> float:
    """The clock, once the device of the first tensor has caught up."""
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
