"""Tiny models and data for the tests of training, and training runs in processes of their own, as torchrun starts them.

Runs are functions of a folder, so that they can be done here, in one other process or in several.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
from dataclasses import replace
from unittest import mock

import pytest
import torch

from varlik.models.config import VARConfig, VQVAEConfig
from varlik.models.quantizer import MultiScaleQuantizer
from varlik.training import distributed, vqvae
from varlik.training.data import TrainingTokens
from varlik.training.loop import LoopConfig, generator, train
from varlik.training.var import contrast_var, train_var
from varlik.training.vqvae import train_vqvae

PATCH_NUMS = (1, 2)
VQ = VQVAEConfig(
    channels=8, channel_multipliers=(1, 1), num_res_blocks=1, num_groups=4, in_channels=1, attention="mid only",
    codebook_dim=4, vocab_size=16, patch_nums=PATCH_NUMS,
)  # fmt: skip
VAR = VARConfig(depth=1, embed_dim=16, num_heads=2, patch_nums=PATCH_NUMS, vocab_size=16, codebook_dim=4, num_classes=2)


def pictures(n=64):
    """Two classes: bright left half, bright top half, with noise. (n, 1, 4, 4) and labels (n,)."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 2
    pixels = -0.8 * torch.ones(n, 1, 4, 4)
    pixels[labels == 0, :, :, :2] = 0.8
    pixels[labels == 1, :, :2, :] = 0.8
    return (pixels + 0.1 * torch.randn(pixels.shape, generator=generator)).clamp(-1, 1), labels


def loop(steps, **changes):
    values = {"batch_size": 16, "learning_rate": 5e-3, "warmup": 5, "checkpoint_every": 10, "log_every": 10, "seed": 3}
    return LoopConfig(steps=steps, **(values | changes))


def tokens(n=64, classes=2, variants=2):
    """Token maps of `classes` kinds of feature maps under a quantizer with random codes."""
    torch.manual_seed(0)
    quantizer = MultiScaleQuantizer(VQ)
    labels = torch.arange(n) % classes
    features = torch.randn(variants * n, VQ.codebook_dim, 2, 2) + 2 * labels.repeat(variants).view(-1, 1, 1, 1)
    with torch.no_grad():
        codes = quantizer.tokenize(features)[0].view(variants, n, -1)
    return TrainingTokens(codes.transpose(0, 1).numpy(), labels, tuple(map(str, range(classes))), quantizer)


def run_var(folder, **changes):
    return train_var(tokens(), VAR, loop(20, average=0.9, log_every=1, **changes), folder, quiet=True)


def run_contrast(folder, **changes):
    data, config = tokens(classes=6), replace(VAR, num_classes=6)
    model = train_var(data, config, loop(2, **changes), folder / "before", quiet=True)
    settings = loop(20, log_every=1, **changes)
    with mock.patch("varlik.training.var.CONFUSION_RATE", 0.9):  # fast enough for the record to steer the draws
        return contrast_var(model, data, settings, folder, weight=1.0, quiet=True)


def run_vqvae(folder, **changes):
    pixels, _ = pictures()
    pixels = pixels.to(torch.get_default_dtype())
    # Only process 0 chooses new codes, the others take them over.
    cells = vqvae.residual_cells if distributed.world().main else None
    with mock.patch("varlik.training.vqvae.RESTART_EVERY", 4), mock.patch.object(vqvae, "residual_cells", cells):
        return train_vqvae(pixels, VQ, loop(12, log_every=1, **changes), folder, device="cpu", quiet=True)


def run_stopping(folder, at_step=None, **changes):
    """Noisy linear regression, validated every third step and ended by patience; `at_step(step)` interferes."""
    torch.manual_seed(5 + distributed.world().rank)  # process 0 has to set the others right
    model = torch.nn.Linear(3, 1)
    random = torch.Generator().manual_seed(7)
    x, held_out = torch.randn(24, 3, generator=random), torch.randn(24, 3, generator=random)
    y, true = (v.sum(1, keepdim=True) + torch.randn(24, 1, generator=random) for v in (x, held_out))

    def loss_of_part(part):
        assert model.training
        if at_step:
            at_step(part.step)
        noise = torch.randn(len(part.rows), 3, generator=generator(1, part.step))[part.own]
        error = (model(x[part.indices] + 0.1 * noise) - y[part.indices]).square().mean()
        return error, {"twice": 2 * error.item()}

    def validate(step):
        assert not model.training
        assert not torch.is_grad_enabled()
        if not distributed.world().main:
            return float(step)  # process 0 decides
        return -(model(held_out) - true).square().mean().item() - 0.01 * step

    settings = {
        "batch_size": 8, "learning_rate": 0.1, "warmup": 1, "average": 0.5, "evaluate_every": 3, "patience": 3,
        "checkpoint_every": 5, "log_every": 1,
    }  # fmt: skip
    return train(model, loss_of_part, loop(60, **(settings | changes)), folder, 24, validate=validate, quiet=True)


def kill_at(step):
    """SIGKILL of this process when it comes to `step`; with several processes, of the last one only."""

    def at_step(now):
        world = distributed.world()
        if now == step and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    return at_step


def run_killed(folder):
    return run_stopping(folder, kill_at(13))


def run_killed_while_saving(folder):
    """Killed with the second checkpoint written but not yet in its place."""
    calls, real = iter(range(10)), os.replace

    def replace(source, target):
        if str(target).endswith("checkpoint.pt") and next(calls) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)

    os.replace = replace
    return run_stopping(folder)


def weights(folder, rank=0):
    """The weights with which a process of `start` ended."""
    return torch.load(folder / f"result_{rank}.pt", weights_only=True)


def start(jobs, size=1):
    """Start `size` processes that run `jobs`, a list of (function, folder, changes), in float64; returns them."""
    context = multiprocessing.get_context("forkserver")
    # Imported once for all of them; optimisers need the second.
    context.set_forkserver_preload(["torch", "torch._dynamo", "training_case"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(size):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
        environment = {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in variables.items()}
        processes.append(context.Process(target=_work, args=(environment, jobs), daemon=True))
        processes[-1].start()
    return processes


def finish(processes, code=0):
    """Wait for processes of `start`, which have to end with `code`."""
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [code] * len(processes)


def records(folder):
    """What metrics.jsonl in a folder says."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_course(one, other):
    """The same figures at every step, to the rounding of float64."""
    one, other = records(one), records(other)
    assert [record["step"] for record in one] == [record["step"] for record in other]
    for a, b in zip(one, other, strict=True):
        a.pop("seconds"), b.pop("seconds")
        assert a == pytest.approx(b, rel=1e-8, abs=1e-10)


def assert_equal(one, other):
    """The same weights, to the bit."""
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def assert_two_processes_equal_one(run, one, two):
    """A `run` in the folder `two` by two processes went as the same here, in the folder `one`, goes; in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        whole = run(one).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_course(one, two)
    torch.testing.assert_close(weights(two), whole, rtol=1e-7, atol=1e-9)
    assert_equal(weights(two, 0), weights(two, 1))


def _work(environment, jobs):
    os.environ.update(environment)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    for function, folder, changes in jobs:
        model = function(folder, **changes)
        torch.save(model.state_dict(), folder / f"result_{environment['RANK']}.pt")
    distributed.leave()
