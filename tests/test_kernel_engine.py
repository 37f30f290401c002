"""The whole engine on Triton kernels: in the interpreter, or on a GPU where there is one (see `test_kernels.py`)."""

from __future__ import annotations

import os

import pytest
import torch
from tiny_model import CLASSES, make_model, make_samples

from varlik.cascade import Cascade
from varlik.models.config import VQVAEConfig
from varlik.models.quantizer import MultiScaleQuantizer
from varlik.run import Plan, SampleScores, run
from varlik.scoring.engine import Engine
from varlik.scoring.first_order import first_order_log_likelihood
from varlik.scoring.graphs import Graphs
from varlik.scoring.options import EngineOptions
from varlik.smoothing import Smoothing
from varlik.tokens import TokenMaps

pytestmark = [pytest.mark.gpu, pytest.mark.interpreted]

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
IMAGES = 2  # the interpreter is slow
PRECISE = {"dtype": torch.float32, "impl": "triton"}


@pytest.fixture(scope="module")
def var():
    return make_model().to(DEVICE)


@pytest.fixture(scope="module")
def samples():
    def move(maps: TokenMaps) -> TokenMaps:
        tensors = (maps.tokens, maps.teacher_forcing_input, maps.feature_map)
        return TokenMaps(*(tensor.to(DEVICE) for tensor in tensors), maps.keys, maps.patch_nums)

    return [move(maps[:IMAGES]) for maps in make_samples()]


def engine_of(var, **options) -> Engine:
    engine = Engine(var, EngineOptions(**options))
    engine.prepare(torch.arange(CLASSES, device=DEVICE))
    return engine


def labels(count=IMAGES):
    return torch.arange(CLASSES, device=DEVICE).expand(count, -1)


def staged(engine, samples, per_token=True):
    """Stages with rows dropped and samples forked: log-likelihoods in the end."""
    rows = engine.open(samples[0], labels(), per_token=per_token)
    rows = engine.advance(rows, 2)
    rows = engine.keep(rows, torch.tensor([0, 2, 7, 8, 11], device=DEVICE))
    rows = engine.fork(rows, samples[1], 1)
    rows = engine.advance(rows, 3)
    rows = engine.fork(rows, samples[2], 2)
    return engine.advance(rows, 4)


def test_stages_equal_the_torch_path(var, samples):
    ours = staged(engine_of(var, **PRECISE), samples)
    wanted = staged(engine_of(var, impl="torch", dtype=torch.float32), samples)
    torch.testing.assert_close(ours.log_likelihood, wanted.log_likelihood, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.per_token(), wanted.per_token(), rtol=1e-5, atol=1e-5)


def test_rows_with_a_shared_prefix_equal_the_torch_path(var, samples):
    found = []
    for options in (PRECISE, {"impl": "torch", "dtype": torch.float32}):
        engine = engine_of(var, **options)
        rows = engine.advance(engine.open(samples[0], labels(), shared_prefix=2), 4)
        found.append(rows.log_likelihood)
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)


def test_a_cascade_equals_the_torch_path(var):
    quantizer = MultiScaleQuantizer(VQVAEConfig(channels=32, codebook_dim=8, vocab_size=20, patch_nums=(1, 2, 3, 4)))
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(3), std=0.3)
        quantizer = quantizer.to(DEVICE)
        features = torch.randn(IMAGES, 8, 4, 4, generator=torch.Generator().manual_seed(4)).to(DEVICE)
        images = TokenMaps(*quantizer.tokenize(features), features, tuple(range(IMAGES)), (1, 2, 3, 4))
    prior, how = torch.zeros(CLASSES, device=DEVICE), Smoothing(0.1, 0, "mean")
    results = []
    for options in (PRECISE, {"impl": "torch", "dtype": torch.float32}):
        engine = engine_of(var, **options)
        with SampleScores(engine, quantizer, images, labels(1)[0], how) as scores:
            results.append(run(Plan(Cascade.parse("screen:5,2:4,4:2,4x3:1")), scores, prior))
    for ours, wanted in zip(*results, strict=True):
        assert torch.equal(ours.reached, wanted.reached)
        torch.testing.assert_close(ours.log_likelihood, wanted.log_likelihood, rtol=1e-5, atol=0, equal_nan=True)


def test_first_order_scores_equal_the_torch_path(var, samples):
    found = []
    for options in (PRECISE, {"impl": "torch", "dtype": torch.float32}):
        engine = engine_of(var, **options)
        scores = first_order_log_likelihood(engine, samples[0], labels(1)[0], labels(1)[0], per_scale=True)
        found.append(scores)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_half_precision_is_close(var, samples):
    half = staged(engine_of(var, impl="triton", dtype=torch.float16), samples, per_token=False)
    wanted = staged(engine_of(var, impl="torch", dtype=torch.float32), samples)
    torch.testing.assert_close(half.log_likelihood, wanted.log_likelihood, rtol=5e-3, atol=0)


def test_deterministic_scores_are_the_same_to_the_bit(var, samples):
    """Whatever the order of classes, the other images, the split of scales, the chunks and what was prepared before."""
    options = {"impl": "triton", "dtype": torch.float16, "deterministic": True}
    engine = engine_of(var, **options)
    whole = engine.advance(engine.open(samples[0], labels()), 4).log_likelihood.view(IMAGES, CLASSES, -1)
    other = Engine(var, EngineOptions(max_memory=0, **options))  # a row at a time
    order = torch.tensor([4, 1, 0], device=DEVICE)
    other.prepare(order.flip(0))
    rows = other.open(samples[0][1:2], order.unsqueeze(0))
    for scale in (2, 3, 4):
        rows = other.advance(rows, scale)
    assert torch.equal(rows.log_likelihood, whole[1, order])
    one = engine.advance(engine.open(samples[0][:1], labels(1)[:, 3:4]), 4)
    assert torch.equal(one.log_likelihood, whole[0, 3:4])


def test_rows_that_pad_a_captured_pass_touch_no_other(var, samples, monkeypatch):
    """Five rows, padded to six, several of them in one tile; with a stand-in for CUDA's capture."""
    monkeypatch.setattr("varlik.kernels.scale_causal_attention.BUSY", 0)
    engine = engine_of(var, **PRECISE)
    few = labels(1)[:, :5]
    wanted = engine.advance(engine.open(samples[0][:1], few), 3).log_likelihood
    engine.passes.graphs = Graphs(lambda function, inputs: (lambda: None, function(*inputs)))
    for scale in (2, 3):
        rows = engine.advance(engine.open(samples[0][:1], few), scale)
        torch.testing.assert_close(rows.log_likelihood[:, :scale], wanted[:, :scale], rtol=1e-6, atol=0)


if DEVICE == "cuda":  # there is nothing to capture in the interpreter

    def test_cuda_graphs_replay(var, samples):
        options = {"deterministic": True, **PRECISE}
        wanted = staged(engine_of(var, **options), samples).log_likelihood
        engine = engine_of(var, cuda_graphs=True, **options)
        for _ in range(3):
            torch.testing.assert_close(staged(engine, samples).log_likelihood, wanted, rtol=0, atol=0, equal_nan=True)
        assert len(engine.passes.graphs) > 0
