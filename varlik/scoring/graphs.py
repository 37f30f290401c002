"""CUDA graphs of scoring passes: captured once for each shape, launched as one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

Pass = Callable[..., tuple[Tensor, ...]]
Capture = Callable[[Pass, tuple[Tensor, ...]], tuple[Callable[[], None], tuple[Tensor, ...]]]
Captured = tuple[Hashable, tuple[Tensor, ...], Callable[[], None], tuple[Tensor, ...]]

MAX_GRAPHS = 64


class Graphs:
    """Passes that are captured when first run, by key; the least recently run are given up."""

    def __init__(self, capture: Capture):
        """`capture(function, inputs)` returns a replay, which reads `inputs` anew, and the outputs it writes.

        Outputs may be overwritten by any later run: they share memory where the capture lets them.
        """
        self._capture = capture
        self._captured: OrderedDict[Hashable, Captured] = OrderedDict()

    def __len__(self) -> int:
        return len(self._captured)

    def clear(self) -> None:
        """Give up all of them, and the memory they hold."""
        self._captured.clear()

    def run(self, key: Hashable, places: Hashable, function: Pass, *inputs: Tensor) -> tuple[Tensor, ...]:
        """`function(*inputs)`, captured under `key`, which stands for the shapes of the inputs.

        `places` are the addresses of all else that `function` reads: with others it is captured anew.
        """
        found = self._captured.pop(key, None)
        if found is None or found[0] != places:
            del found  # its memory first
            static = tuple(tensor.clone() for tensor in inputs)
            found = (places, static, *self._capture(function, static))
        _, static, replay, outputs = found
        for mine, given in zip(static, inputs, strict=True):
            mine.copy_(given)
        replay()
        self._captured[key] = found
        while len(self._captured) > MAX_GRAPHS:
            self._captured.popitem(last=False)
        return outputs


def bucket(rows: int) -> int:
    """The number of rows that `rows` are padded to: powers of two and their halves between, 1 2 3 4 6 8 12 16 24."""
    power = 1 << max(0, (rows - 1).bit_length())
    return power * 3 // 4 if power >= 4 and rows <= power * 3 // 4 else power


class CUDACapture:
    """Captures on one device, into one pool of memory: passes run one after the other, so they can share it."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Pass, inputs: tuple[Tensor, ...]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        """Capture, after a run that compiles kernels and makes their constant tables."""
        device = inputs[0].device
        with torch.cuda.device(device):
            # A stream of this device: the one that torch would take belongs to the first device that captured.
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                function(*inputs)
            torch.cuda.current_stream(device).wait_stream(stream)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=stream):
                outputs = function(*inputs)
        return graph.replay, outputs
