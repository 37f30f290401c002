"""What only a CUDA GPU can show; `test_kernels.py` and `test_kernel_engine.py` run on one too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import varlik
from varlik import ops
from varlik.evaluation.samples import samples
from varlik.scoring import memory as memory_module

pytestmark = pytest.mark.gpu

MODEL = "fashion-mnist"


@pytest.fixture(scope="module")
def exact():
    """Log-likelihoods of the sample pictures in float32 on the CPU."""
    return varlik.load(MODEL, device="cpu").log_likelihood(list(samples(MODEL).paths))


def clean_tokens() -> varlik.TokenMaps:
    """Token maps of the sample pictures as the CPU makes them, on the GPU."""
    made = varlik.load(MODEL, device="cpu").tokenize(list(samples(MODEL).paths))
    tensors = (made.tokens, made.teacher_forcing_input, made.feature_map)
    return varlik.TokenMaps(*(tensor.cuda() for tensor in tensors), made.keys, made.patch_nums)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"dtype": torch.float32}, 1e-5),
        ({"dtype": torch.float32, "impl": "torch"}, 1e-5),
        ({}, 2e-3),  # float16
        ({"dtype": torch.bfloat16}, 2e-2),
        ({"dtype": torch.float16, "deterministic": True}, 2e-3),
        ({"dtype": torch.float16, "cuda_graphs": True}, 2e-3),
    ],
)
def test_the_bundled_model(exact, options, tolerance):
    classifier = varlik.load(MODEL, device="cuda", **options)
    assert classifier.engine.compute.impl == options.get("impl", "triton")
    images = clean_tokens()
    for _ in range(2):
        found = classifier.log_likelihood(images).cpu()
        torch.testing.assert_close(found, exact, rtol=tolerance, atol=0)


def test_auto_takes_the_kernels(monkeypatch):
    calls = []
    monkeypatch.setattr("varlik.kernels._launch.launch", lambda kernel, *_, **__: calls.append(kernel.__name__))
    ops.nearest_code(torch.ones(3, 4, device="cuda"), torch.ones(5, 4, device="cuda"))
    assert calls == ["_nearest_code_kernel"]


def test_chunks_shrink_until_memory_suffices(exact, monkeypatch):
    """A limit below what the first chunk takes: it is halved until it fits, and the scores are right."""
    monkeypatch.setitem(memory_module.CHUNK_BYTES, "cuda", 2**40)
    classifier = varlik.load(MODEL, device="cuda", dtype=torch.float32, max_memory=2**40)
    images = clean_tokens()
    images = varlik.TokenMaps.concatenate([images] * 8)
    classifier.warmup()
    shrunk = []
    empty_cache = torch.cuda.empty_cache
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: (shrunk.append(1), empty_cache()))
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 300 * 2**20) / total)
    try:
        found = classifier.log_likelihood(images).cpu()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.testing.assert_close(found, exact.repeat(8, 1), rtol=1e-5, atol=0)
    assert shrunk


def test_tensors_of_more_than_2_to_31_elements():
    rows, width = 2**31 // 512 + 5, 512
    if torch.cuda.mem_get_info()[0] < 3 * 2 * rows * width:
        pytest.skip("needs 14 GB of GPU memory")
    hidden = torch.zeros(rows, width, dtype=torch.float16, device="cuda")
    hidden[-3:] = torch.randn(3, width, device="cuda").half()
    weight, bias = torch.randn(64, width, device="cuda").half(), torch.zeros(64, device="cuda")
    targets = torch.arange(rows, device="cuda") % 64
    ours = ops.token_log_prob(hidden, weight, bias, targets, impl="triton")
    few = ops.token_log_prob(hidden[-3:].clone(), weight, bias, targets[-3:], impl="triton")
    assert torch.equal(ours[-3:], few)
    tables = bias.new_zeros(1, width), bias.new_ones(1, width)
    normed = ops.ada_layer_norm(hidden[:, None], *tables, targets * 0)
    assert torch.equal(normed[-1:], ops.ada_layer_norm(hidden[-1:, None], *tables, None))


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
def test_no_access_outside_of_tensors():
    """One case of every kernel under compute-sanitizer, which sees what guard bands do not."""
    tests = Path(__file__).parent
    command = [
        "compute-sanitizer",
        "--error-exitcode",
        "9",
        "--report-api-errors",
        "no",
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
    ]
    command += [str(tests / "test_kernel_registration.py"), "-k", "opcheck"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=tests.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
