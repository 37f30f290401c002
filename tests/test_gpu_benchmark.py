"""The GPU benchmark's own code, at toy sizes on the CPU: checked before timed, complete, and readable."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from conftest import ROOT

# The scripts of the checkout, behind what is installed.
sys.path.append(str(ROOT))
from benchmarks import gpu, gpu_kernels

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def without_compiler(monkeypatch):
    """What torch.compile makes of plain torch is not ours to test."""
    monkeypatch.setattr(gpu_kernels, "compiled", lambda function: {})


def test_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "TINY", gpu.TINY[:1])
    command = ["gpu", "--device", "cpu", "--tiny", "--repeats", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    gpu.main()
    report = json.loads((tmp_path / "gpu-cpu-tiny.json").read_text())
    assert {row["problem"] for row in report["kernels"]} == {
        *("residual_ada_layer_norm", "qk_norm", "scale_causal_attention"),
        *("token_log_prob", "linear with GELU", "nearest_code"),
    }
    assert all(row["difference"] < 1e-4 for row in report["kernels"])
    text = (tmp_path / "gpu-cpu-tiny.md").read_text()
    assert "these times mean nothing" in text
    assert "| float16 |" in text
    assert text in capsys.readouterr().out


def test_a_wrong_result_is_not_timed():
    problem = next(iter(gpu_kernels.problems(CPU, torch.float32, tiny=True)))

    def wrong(*inputs):
        y, out = problem.exact(*inputs)
        return y, out * 1.01

    bad = gpu_kernels.Problem("bad", torch.float32, problem.inputs, problem.exact, {"wrong": wrong}, 1.0, 1.0)
    with pytest.raises(ValueError, match="bad: wrong differs from float32 by"):
        list(gpu_kernels.measure(bad, 1, []))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_held_to_its_own_tolerance(dtype):
    for problem in gpu_kernels.problems(CPU, dtype, tiny=True):
        assert next(iter(gpu_kernels.measure(problem, 1, []))).way.startswith("varlik")


def test_what_fails_is_put_down_and_the_rest_goes_on(monkeypatch):
    def broken(*_):
        raise ValueError("wrong")

    monkeypatch.setattr(gpu_kernels, "measure", broken)
    notes = []
    rows, _ = gpu.kernels(CPU, 1, True, notes)
    assert rows == []
    assert len(notes) == 6
    assert all(note.startswith("FAILED") for note in notes)


def test_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit, match="there is no CUDA GPU here"):
        gpu.main()
