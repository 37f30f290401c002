"""Warps and pipeline stages chosen by timing, where that was asked for.

Block sizes stay, so a row's result does not come to depend on other rows. But warps share out the sums of a reduction:
tuned results may differ in the last bits from those of what ships. What was found is kept for the life of the process,
for each kernel, its constants, the dtypes of its tensors and the device.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from varlik.kernels._tiles import Tiles

REPEATS = 10

_active: ContextVar[bool] = ContextVar("active", default=False)
_found: dict[Hashable, Tiles] = {}


@contextmanager
def autotuning() -> Iterator[None]:
    """Time candidates for every kernel that is launched meanwhile and has not been tuned yet."""
    token = _active.set(True)
    try:
        yield
    finally:
        _active.reset(token)


def tuned(
    kernel: Any, tiles: Tiles, arguments: tuple[Any, ...], constants: dict[str, Any], run: Callable[[Tiles], None]
) -> Tiles:
    """The tiles to launch with; `run(tiles)` launches once. Kernels may be run any number of times."""
    if not _found and not _active.get():
        return tiles
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    dtypes = tuple(tensor.dtype for tensor in tensors)
    key = (kernel.fn.__module__, kernel.fn.__name__, tiles, dtypes, *sorted(constants.items()), tensors[0].device)
    if key not in _found:
        if not _active.get():
            return tiles
        times = {candidate: _seconds(run, candidate, tensors[0].device) for candidate in candidates(tiles)}
        _found[key] = min(times, key=times.__getitem__)  # the first of equals: what ships
    return _found[key]


def candidates(tiles: Tiles) -> list[Tiles]:
    """What ships first, then half and twice its warps, and one stage less and more."""
    warps = [w for w in (tiles.warps, tiles.warps // 2, 2 * tiles.warps) if 1 <= w <= 16]
    stages = [s for s in (tiles.stages, tiles.stages - 1, tiles.stages + 1) if 1 <= s <= 5]
    return [replace(tiles, warps=w, stages=s) for w in warps for s in stages]


def _seconds(run: Callable[[Tiles], None], tiles: Tiles, device: torch.device) -> float:
    """Median time of one launch; infinite for tiles that do not fit the device."""
    try:
        run(tiles)  # compiles
    except OutOfResources:
        return float("inf")
    times = []
    for _ in range(REPEATS):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run(tiles)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        else:
            started = time.perf_counter()
            run(tiles)
            times.append(time.perf_counter() - started)
    return statistics.median(times)
