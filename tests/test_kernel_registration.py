"""What torch and the tuner ask of the kernels: in the interpreter, or on a GPU (see `test_kernels.py`)."""

from __future__ import annotations

import pytest
import torch
from op_cases import linear_inputs, token_log_prob_inputs
from test_kernels import on_device
from test_ops import CASES, registered_arguments

from varlik import ops

pytestmark = [pytest.mark.gpu, pytest.mark.interpreted]


@pytest.mark.parametrize("name", CASES)
def test_opcheck_and_one_graph(name):
    """As registered, with the kernel behind it; and compiled as one graph."""
    op, make, options = CASES[name]
    *arguments, _ = registered_arguments(name)
    arguments = on_device(arguments, guard=False)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.varlik, name).default, (*arguments, "triton"), test_utils=tests)
    torch.compiler.reset()
    graph = torch.compile(lambda *args: op(*args, **options, impl="triton"), fullgraph=True, backend="aot_eager")
    inputs = on_device(make(), guard=False)
    torch.testing.assert_close(graph(*inputs), op(*on_device(make(), guard=False), **options, impl="triton"))


def test_autotuning_changes_times_not_results(monkeypatch):
    from varlik.kernels import _autotune

    monkeypatch.setattr(_autotune, "REPEATS", 1)
    monkeypatch.setattr(_autotune, "_found", {})
    inputs = on_device(linear_inputs())
    plain = ops.linear(*inputs, impl="triton")
    assert not _autotune._found
    with ops.autotuning():
        tuning = ops.linear(*inputs, impl="triton")
    (found,) = _autotune._found.values()
    assert torch.equal(tuning, plain)
    (key,) = _autotune._found
    assert found in _autotune.candidates(key[2])
    assert torch.equal(ops.linear(*inputs, impl="triton"), plain)
    ops.token_log_prob(*on_device(token_log_prob_inputs()), impl="triton")  # is not tuned any more
    assert len(_autotune._found) == 1


def test_autotuning_passes_over_tiles_that_do_not_fit(monkeypatch):
    from triton.runtime.errors import OutOfResources

    from varlik.kernels import _autotune
    from varlik.kernels._tiles import Tiles

    monkeypatch.setattr(_autotune, "_found", {})
    shipped = Tiles(64, 64, 32, warps=4, stages=2)

    def run(tiles):
        if tiles != shipped:
            raise OutOfResources(2, 1, "shared memory")

    kernel = type("Kernel", (), {"fn": run})
    with ops.autotuning():
        assert _autotune.tuned(kernel, shipped, (torch.ones(1),), {}, run) == shipped
    assert [c.warps for c in _autotune.candidates(shipped)] == [4, 4, 4, 2, 2, 2, 8, 8, 8]
