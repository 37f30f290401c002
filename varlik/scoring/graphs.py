"""CUDA graphs of scoring passes: captured once for each shape, launched as one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

Pass = Callable[..., tuple[Tensor, ...]]
Capture = Callable[[Pass, tuple[Tensor, ...]], tuple[Callable[[], None], tuple[Tensor, ...]]]

MAX_GRAPHS = 32  # each holds the activations of its pass


class Graphs:
    """Passes that are captured when first run, by key; the least recently run are given up."""

    def __init__(self, capture: Capture):
        """`capture(function, inputs)` returns a replay, which reads `inputs` anew, and the outputs it writes."""
        self._capture = capture
        self._captured: OrderedDict[Hashable, tuple[tuple[Tensor, ...], Callable[[], None], tuple[Tensor, ...]]]
        self._captured = OrderedDict()

    def __len__(self) -> int:
        return len(self._captured)

    def run(self, key: Hashable, function: Pass, *inputs: Tensor) -> tuple[Tensor, ...]:
        """`function(*inputs)`, captured under `key`; the next run under this key overwrites the outputs.

        A key stands for the shapes of the inputs and for all else that `function` reads by address.
        """
        found = self._captured.pop(key, None)
        if found is None:
            static = tuple(tensor.clone() for tensor in inputs)
            found = (static, *self._capture(function, static))
        static, replay, outputs = found
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


def capture_cuda(function: Pass, inputs: tuple[Tensor, ...]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """Capture on the device of the inputs, after a run that compiles kernels and makes their constant tables."""
    device = inputs[0].device
    with torch.cuda.device(device):
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            function(*inputs)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = function(*inputs)
    return graph.replay, outputs
