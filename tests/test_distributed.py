"""Several processes, or several parts, train the model that one would; a killed run goes on where it was."""

from __future__ import annotations

import signal

import pytest
import torch
from training_case import (
    VAR,
    assert_equal,
    assert_same_course,
    assert_two_processes_equal_one,
    finish,
    loop,
    records,
    run_contrast,
    run_killed,
    run_killed_while_saving,
    run_stopping,
    run_var,
    run_vqvae,
    start,
    tokens,
    weights,
)

from varlik.training import distributed
from varlik.training.distributed import World
from varlik.training.var import train_var

RUNS = {"var": run_var, "contrast": run_contrast, "vqvae": run_vqvae, "stopping": run_stopping}


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Folders of all runs, each done by two processes."""
    folder = tmp_path_factory.mktemp("two")
    finish(start([(run, folder / name, {}) for name, run in RUNS.items()], size=2))
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(two, tmp_path, name):
    assert_two_processes_equal_one(RUNS[name], tmp_path, two / name)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", RUNS)
def test_two_parts_equal_one(tmp_path, name):
    whole = RUNS[name](tmp_path / "whole").state_dict()
    parts = RUNS[name](tmp_path / "parts", accumulate=2).state_dict()
    assert_same_course(tmp_path / "whole", tmp_path / "parts")
    torch.testing.assert_close(parts, whole, rtol=1e-7, atol=1e-9)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("killed", [run_killed, run_killed_while_saving])
def test_sigkill_loses_no_more_than_the_interval(tmp_path, killed):
    """Interval of 5 steps; killed in step 13 and, the second time, while the checkpoint of step 10 is put in place."""
    whole = run_stopping(tmp_path / "whole").state_dict()
    finish(start([(killed, tmp_path / "parts", {})]), -signal.SIGKILL)
    saved = torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)
    assert saved["step"] == (10 if killed is run_killed else 5)
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write('{"step": 14, "lo')  # a line torn by the kill
    parts = run_stopping(tmp_path / "parts").state_dict()
    assert_equal(whole, parts)
    left_out = {"seconds"}
    assert [{k: v for k, v in r.items() if k not in left_out} for r in records(tmp_path / "parts")] == [
        {k: v for k, v in r.items() if k not in left_out} for r in records(tmp_path / "whole")
    ]


def test_two_processes_go_on_after_one_was_killed(two, tmp_path):
    first, last = start([(run_killed, tmp_path, {})], size=2)
    last.join(120)
    first.kill()  # what torchrun does to the others
    first.join()
    assert last.exitcode == -signal.SIGKILL
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 10
    finish(start([(run_stopping, tmp_path, {})], size=2))
    assert_equal(weights(two / "stopping"), weights(tmp_path))
    assert [r["loss"] for r in records(tmp_path)] == [r["loss"] for r in records(two / "stopping")]


@pytest.mark.usefixtures("float64")
def test_a_checkpoint_of_two_processes_is_taken_over_by_one(two, tmp_path):
    """How a run is carried out may change on the way."""
    for name in ("checkpoint.pt", "metrics.jsonl"):
        (tmp_path / name).write_bytes((two / "var" / name).read_bytes())
    model = train_var(tokens(), VAR, loop(20, average=0.9, log_every=7, accumulate=4), tmp_path, quiet=True)
    torch.testing.assert_close(weights(two / "var"), model.state_dict(), rtol=1e-6, atol=1e-6)


def test_one_process_needs_no_group(tmp_path, monkeypatch):
    import torch.distributed

    for name in ("init_process_group", "all_reduce", "broadcast", "is_initialized"):
        monkeypatch.delattr(torch.distributed, name)
    run_stopping(tmp_path)
    distributed.leave()


def test_a_batch_that_cannot_be_cut_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"batch_size: expected a multiple of 3 .*, got 8"):
        run_stopping(tmp_path, accumulate=3)
    for name, value in (("WORLD_SIZE", "3"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match=r"batch_size: expected a multiple of 6 \(3 processes, 2 parts in each\), got 8"
    ):
        run_stopping(tmp_path, accumulate=2)


def test_the_world_is_what_torchrun_says(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.world() == World(0, 1, 0)
    assert distributed.world().main
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="RANK: expected a number, as torchrun sets it, got None"):
        distributed.world()
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.world() == World(3, 4, 1)
    assert not distributed.world().main
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(ValueError, match="expected values in"):
        distributed.world()
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ValueError, match="got 'first'"):
        distributed.world()


def test_every_process_has_its_own_gpu(monkeypatch):
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.own_device() == distributed.own_device("cuda") == torch.device("cuda", 1)
    assert distributed.own_device("cuda:0") == torch.device("cuda", 0)
    assert distributed.own_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="finds 2 CUDA GPUs, no cuda:7"):
        distributed.own_device("cuda:7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="process 1 of this machine finds 1 CUDA GPUs"):
        distributed.own_device()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.own_device() == torch.device("cpu")
    for name in ("gpu", "xpu"):
        with pytest.raises(ValueError, match=f"device: '{name}' cannot be used here"):
            distributed.own_device(name)
