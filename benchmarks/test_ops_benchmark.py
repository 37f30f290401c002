"""Every op at the sizes of the bundled model and of d16: checked against float64, then timed.

    python -m pytest benchmarks/test_ops_benchmark.py --benchmark-only

`extra_info` states the bytes that an op has to read and write at the least (every tensor once), the FLOPs of its
formula, and both per second of the median.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from varlik import ops
from varlik.flops import count_live
from varlik.models.config import VARConfig
from varlik.models.presets import get_preset

CLASSES = 10
EPS = 1e-6


@dataclass(frozen=True)
class Size:
    """A transformer, and how many rows (image, class) go through an op at a time."""

    name: str
    config: VARConfig
    rows: int


SIZES = (Size("fashion-mnist", get_preset("fashion-mnist").var, 10), Size("d16", get_preset("var-d16").var, 2))


@pytest.fixture(params=SIZES, ids=lambda size: size.name)
def size(request) -> Size:
    return request.param


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randint(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(0))


def randperm(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def num_bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure(benchmark, size: Size, op: Callable[[], object], moved: int) -> None:
    """Time `op`, which moves so many bytes, and state what that means per second."""
    flops = count_live(op)
    benchmark.group = f"{size.name}, {size.rows} rows"
    benchmark(op)
    benchmark.extra_info |= {"bytes": moved, "flops": flops}
    if benchmark.stats is not None:  # None with --benchmark-disable
        seconds = benchmark.stats.stats.median
        benchmark.extra_info |= {"GB/s": moved / seconds / 1e9, "GFLOP/s": flops / seconds / 1e9}


def layer_norm(x: Tensor, scale: Tensor, shift: Tensor, row_class: Tensor) -> Tensor:
    x, scale, shift = x.double(), scale.double(), shift.double()
    normal = F.layer_norm(x, x.shape[-1:], eps=EPS)
    return normal * (1 + scale[row_class]).unsqueeze(1) + shift[row_class].unsqueeze(1)


def test_ada_layer_norm(benchmark, size):
    config = size.config
    x = randn(size.rows, config.num_tokens - 1, config.embed_dim)
    scale, shift = (randn(CLASSES, config.embed_dim, seed=seed) for seed in (1, 2))
    row_class = randint(CLASSES, size.rows)
    out = ops.ada_layer_norm(x, scale, shift, row_class)
    torch.testing.assert_close(out.double(), layer_norm(x, scale, shift, row_class), rtol=1e-4, atol=1e-4)
    moved = num_bytes(x, out, scale, shift, row_class)
    measure(benchmark, size, lambda: ops.ada_layer_norm(x, scale, shift, row_class), moved)


def test_residual_ada_layer_norm(benchmark, size):
    config = size.config
    x, branch = (randn(size.rows, config.num_tokens - 1, config.embed_dim, seed=seed) for seed in (0, 1))
    gate, scale, shift = (randn(CLASSES, config.embed_dim, seed=seed) for seed in (2, 3, 4))
    row_class = randint(CLASSES, size.rows)
    y, out = ops.residual_ada_layer_norm(x, branch, gate, scale, shift, row_class)
    wanted = x.double() + gate.double()[row_class].unsqueeze(1) * branch.double()
    torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.double(), layer_norm(wanted, scale, shift, row_class), rtol=1e-4, atol=1e-4)
    moved = num_bytes(x, branch, y, out, gate, scale, shift, row_class)
    measure(benchmark, size, lambda: ops.residual_ada_layer_norm(x, branch, gate, scale, shift, row_class), moved)


def slots_of(where: str, rows: int, length: int) -> Tensor:
    """Slots (rows, length): in order, or all over the pages."""
    slots = rows * length
    order = torch.arange(slots) if where == "side by side" else randperm(slots)
    return order.view(rows, length)


WHERE = pytest.mark.parametrize("where", ["side by side", "in pages"])


@WHERE
def test_qk_norm(benchmark, size, where):
    config = size.config
    rows, tokens, heads, head_dim = size.rows, config.num_tokens - 1, config.num_heads, config.head_dim
    qkv = randn(rows, tokens, 3 * config.embed_dim)
    scale = torch.full((heads,), 4.0)
    k_pages, v_pages = (torch.full((rows * tokens, heads, head_dim), torch.nan) for _ in range(2))
    slots = slots_of(where, rows, tokens)
    arguments = (qkv, scale, k_pages, v_pages, None if where == "side by side" else slots)

    q = ops.qk_norm(*arguments)
    wanted_q, wanted_k, wanted_v = qkv.double().unflatten(-1, (3, heads, head_dim)).unbind(2)
    wanted_q, wanted_k = 4 * F.normalize(wanted_q, dim=-1), F.normalize(wanted_k, dim=-1)
    for found, wanted in ((q, wanted_q), (k_pages[slots], wanted_k), (v_pages[slots], wanted_v)):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    moved = num_bytes(qkv, q, k_pages, v_pages, scale, *(x for x in arguments[-1:] if x is not None))
    measure(benchmark, size, lambda: ops.qk_norm(*arguments), moved)


@WHERE
def test_scale_causal_attention(benchmark, size, where):
    config = size.config
    rows, length, heads, head_dim = size.rows, config.num_tokens, config.num_heads, config.head_dim
    q = 4 * F.normalize(randn(rows, length - 1, heads, head_dim), dim=-1)
    k_pages = F.normalize(randn(rows * length, heads, head_dim, seed=1), dim=-1)
    v_pages = randn(rows * length, heads, head_dim, seed=2)
    slots = slots_of(where, rows, length)
    given = None if where == "side by side" else slots

    def run() -> Tensor:
        return ops.scale_causal_attention(q, k_pages, v_pages, given, config.boundaries, softmax_scale=1.0)

    out = run()
    scale_of = torch.repeat_interleave(torch.tensor([b - a for a, b in pairwise(config.boundaries)]))
    allowed = scale_of[1:, None] >= scale_of
    keys, values = (pages[slots].double().transpose(1, 2) for pages in (k_pages, v_pages))
    scores = (q.double().transpose(1, 2) @ keys.mT).masked_fill(~allowed, -torch.inf)
    torch.testing.assert_close(out.double(), (scores.softmax(-1) @ values).transpose(1, 2), rtol=1e-4, atol=1e-4)
    measure(benchmark, size, run, num_bytes(q, k_pages, v_pages, slots, out))


@pytest.mark.parametrize("activation", ["none", "gelu_tanh"])
def test_linear(benchmark, size, activation):
    width = size.config.embed_dim
    x = randn(size.rows, size.config.num_tokens - 1, width)
    weight, bias = randn(4 * width, width, seed=1) / math.sqrt(width), randn(4 * width, seed=2)
    out = ops.linear(x, weight, bias, activation=activation)
    wanted = F.linear(x.double(), weight.double(), bias.double())
    wanted = F.gelu(wanted, approximate="tanh") if activation == "gelu_tanh" else wanted
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-4)
    measure(
        benchmark, size, lambda: ops.linear(x, weight, bias, activation=activation), num_bytes(x, weight, bias, out)
    )


def test_token_log_prob(benchmark, size):
    config = size.config
    hidden = randn(size.rows * (config.num_tokens - 1), config.embed_dim)
    weight = randn(config.vocab_size, config.embed_dim, seed=1) / math.sqrt(config.embed_dim)
    bias = randn(config.vocab_size, seed=2)
    targets = randint(config.vocab_size, len(hidden))
    out = ops.token_log_prob(hidden, weight, bias, targets)
    sample = slice(None, None, 7)  # float64 logits of all rows would take long
    logits = hidden[sample].double() @ weight.double().T + bias.double()
    wanted = logits.log_softmax(-1).gather(-1, targets[sample, None]).squeeze(-1)
    torch.testing.assert_close(out[sample].double(), wanted, rtol=1e-5, atol=1e-5)
    moved = num_bytes(hidden, weight, bias, targets, out)
    measure(benchmark, size, lambda: ops.token_log_prob(hidden, weight, bias, targets), moved)


def test_nearest_code(benchmark, size):
    config = size.config
    vectors = randn(size.rows * config.patch_nums[-1] ** 2, config.codebook_dim)
    codebook = randn(config.vocab_size, config.codebook_dim, seed=1)
    out = ops.nearest_code(vectors, codebook)
    distance = torch.cdist(vectors.double(), codebook.double())
    chosen = distance.gather(1, out[:, None]).squeeze(1)
    torch.testing.assert_close(chosen, distance.min(1).values, rtol=1e-6, atol=0)  # near ties may go either way
    measure(benchmark, size, lambda: ops.nearest_code(vectors, codebook), num_bytes(vectors, codebook, out))
