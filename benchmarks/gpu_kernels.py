"""Kernels beside other ways to compute the same: what `benchmarks.gpu` times.

A problem has several ways; each is a function of one set of inputs. All are compared with the first, which is plain
torch in float32, before any is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varlik import ops

BOUNDARIES = [0, 1, 5, 14, 30, 55, 91, 155, 255, 424, 680]
SCORED = 6  # scales that are there already where attention continues
L2_BYTES = 128 << 20  # more than the L2 cache of any GPU so far: inputs are rotated over so much
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Problem:
    """Something to compute from `inputs`: the `exact` way in float32, and others by name.

    `gigabytes` that have to be moved and `tflop` that have to be done at least. `dtype` is that of matrix products.
    """

    name: str
    dtype: torch.dtype
    inputs: Inputs
    exact: Callable[..., Any]
    ways: dict[str, Callable[..., Any]]
    gigabytes: float
    tflop: float


@dataclass(frozen=True)
class Measured:
    """One way to do one problem: median time, and the rates that it means; 0 TFLOP/s where nothing is counted."""

    problem: str
    way: str
    milliseconds: float
    gigabytes_per_second: float
    tflops: float
    difference: float


def problems(device: torch.device, dtype: torch.dtype, tiny: bool) -> Iterator[Problem]:
    """One block of VAR-d16 under 100 classes, continuing after scale 6; at toy sizes if `tiny`."""
    rows, width, heads, codes, boundaries = (3, 64, 2, 96, [0, 1, 5, 14]) if tiny else (100, 1024, 16, 4096, BOUNDARIES)
    first = boundaries[1 if tiny else SCORED]
    tokens, length = boundaries[-1] - first, boundaries[-1]
    impl = "triton" if device.type == "cuda" else "torch"
    new = partial(torch.randn, device=device)
    size = torch.empty(0, dtype=dtype).element_size()
    activations = rows * tokens * width

    x, branch = new(rows, tokens, width), new(rows, tokens, width).to(dtype)
    vectors, row_class = 0.1 * new(rows, 6, width), torch.arange(rows, device=device)
    tables = [vectors[:, i] for i in range(3)]

    def plain_norm(x, branch, gate, scale, shift, row_class):
        y = x + gate[row_class][:, None] * branch
        out = F.layer_norm(y, y.shape[-1:], eps=1e-6) * (1 + scale[row_class][:, None]) + shift[row_class][:, None]
        return y, out.to(dtype)

    norm = partial(ops.residual_ada_layer_norm, dtype=dtype)
    yield Problem(
        "residual_ada_layer_norm",
        dtype,
        (x, branch, *tables, row_class),
        plain_norm,
        {"varlik": partial(norm, impl=impl), "torch eager": partial(norm, impl="torch")} | compiled(plain_norm),
        activations * (8 + 2 * size) / 1e9,
        0.0,
    )

    qkv = new(rows, tokens, 3 * width).to(dtype)
    scale = torch.full((heads,), 4.0, device=device)
    pages = [new(rows * length, heads, width // heads).to(dtype) for _ in range(2)]
    slots = torch.arange(rows * length, device=device).view(rows, length)  # pages are runs of slots

    def plain_qk(qkv, scale, k_pages, v_pages, slots):
        q, k, v = qkv.float().unflatten(-1, (3, heads, -1)).unbind(2)
        return F.normalize(q, dim=-1) * scale[:, None], F.normalize(k, dim=-1), v

    def with_pages(impl, qkv, scale, k_pages, v_pages, slots):
        q = ops.qk_norm(qkv, scale, k_pages, v_pages, slots, impl=impl)
        place = slots.shape[0], slots.shape[1], *k_pages.shape[1:]  # views: the slots are in order
        return q, *(pages.view(place)[:, -q.shape[1] :] for pages in (k_pages, v_pages))

    yield Problem(
        "qk_norm",
        dtype,
        (qkv, scale, *pages, slots),
        plain_qk,
        {"varlik": partial(with_pages, impl), "torch eager": partial(with_pages, "torch")},
        activations * 6 * size / 1e9,
        0.0,
    )

    q = F.normalize(new(rows, tokens, heads, width // heads), dim=-1).mul(4).to(dtype)
    keys = F.normalize(new(rows * length, heads, width // heads), dim=-1).to(dtype)
    gathered = (x[slots].transpose(1, 2).contiguous() for x in (keys, pages[1]))
    contiguous = q.transpose(1, 2).contiguous(), *gathered
    ends = torch.tensor([b for a, b in pairwise(boundaries) for _ in range(a, b)], device=device)[first:]
    unseen = torch.arange(length, device=device) >= ends[:, None]
    bias = torch.zeros(tokens, length, device=device).masked_fill(unseen, -torch.inf)
    attention = partial(ops.scale_causal_attention, boundaries=boundaries, softmax_scale=1.0)

    def dense(q, k_pages, v_pages, slots, precision=dtype):
        parts = (x.to(precision) for x in contiguous)
        return F.scaled_dot_product_attention(*parts, bias.to(precision), scale=1.0).transpose(1, 2)

    pairs = int(ends.sum())
    yield Problem(
        "scale_causal_attention",
        dtype,
        (q, keys, pages[1], slots),
        partial(dense, precision=torch.float32),
        {
            "varlik": partial(attention, impl=impl),
            "torch eager, scale by scale": partial(attention, impl="torch"),
            "SDPA with a dense bias": dense,
        }
        | flex_attention(contiguous, ends, device),
        (2 * activations + 2 * rows * length * width) * size / 1e9,
        4 * rows * width * pairs / 1e12,
    )

    hidden, weight = new(rows * tokens, width).to(dtype), (0.05 * new(codes, width)).to(dtype)
    head_bias, targets = new(codes), torch.randint(codes, (rows * tokens,), device=device)

    def plain_head(hidden, weight, bias, targets):
        logits = F.linear(hidden, weight).float() + bias
        return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    def exact_head(hidden, weight, bias, targets):
        parts = zip(hidden.split(4096), targets.split(4096), strict=True)
        return torch.cat([plain_head(part.float(), weight.float(), bias, found) for part, found in parts])

    head = ops.token_log_prob
    yield Problem(
        "token_log_prob",
        dtype,
        (hidden, weight, head_bias, targets),
        exact_head,
        {"varlik": partial(head, impl=impl), "torch eager": partial(head, impl="torch"), "all logits": plain_head}
        | linear_cross_entropy()
        | compiled(plain_head),
        (hidden.numel() + weight.numel()) * size / 1e9,
        2 * rows * tokens * width * codes / 1e12,
    )

    fc1, fc1_bias = (0.05 * new(4 * width, width)).to(dtype), new(4 * width).to(dtype)
    gelu = {"activation": "gelu_tanh"}
    few = hidden.view(rows, tokens, width)
    yield Problem(
        "linear with GELU",
        dtype,
        (few, fc1, fc1_bias),
        lambda x, w, b: F.gelu(F.linear(x.float(), w.float(), b.float()), approximate="tanh"),
        {
            "varlik, deterministic": partial(ops.linear, impl=impl, **gelu),
            "cuBLAS": partial(ops.linear, impl="torch", **gelu),
        },
        (5 * activations + fc1.numel()) * size / 1e9,
        2 * activations * 4 * width / 1e12,
    )

    if dtype == torch.float32:
        vectors, codebook = new(256 if tiny else 64 * 256, 32), new(codes, 32)
        yield Problem(
            "nearest_code",
            dtype,
            (vectors, codebook),
            lambda z, e: ops.nearest_code(z.double(), e.double(), impl="torch"),
            {"varlik": partial(ops.nearest_code, impl=impl), "torch eager": partial(ops.nearest_code, impl="torch")},
            (vectors.numel() + codebook.numel()) * 4 / 1e9,
            2 * len(vectors) * codes * 32 / 1e12,
        )


def compiled(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """`torch.compile` of plain torch, under its name."""
    return {"torch.compile": torch.compile(function, dynamic=False)}


def linear_cross_entropy() -> dict[str, Callable[..., Any]]:
    """torch's own fused head, where this torch has it."""
    fused = getattr(F, "linear_cross_entropy", None)
    if fused is None:
        return {}
    return {
        "F.linear_cross_entropy": lambda hidden, weight, bias, targets: (
            -fused(hidden, weight, targets, linear_bias=bias.to(weight.dtype), reduction="none").float()
        )
    }


def flex_attention(contiguous: Inputs, ends: Tensor, device: torch.device) -> dict[str, Callable[..., Any]]:
    """FlexAttention under the same mask, on a GPU."""
    if device.type != "cuda":
        return {}
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, _ = contiguous
    mask = create_block_mask(lambda b, h, i, j: j < ends[i], None, None, q.shape[2], k.shape[2], device=device)
    run = torch.compile(flex_attention, dynamic=False)
    return {"FlexAttention": lambda *_: run(*contiguous, block_mask=mask, scale=1.0).transpose(1, 2)}


def measure(problem: Problem, repeats: int, notes: list[str]) -> Iterator[Measured]:
    """Every way, checked and then timed in turns; ways of others that fail are put down in `notes`.

    Raises `ValueError` for one whose result is wrong: no figure of the problem is given then.
    """
    exact = problem.exact(*problem.inputs)
    working, differences = {}, {}
    for name, way in problem.ways.items():
        try:
            differences[name] = difference(way(*problem.inputs), exact)
        except Exception as error:  # other ways may need another torch or device; ours may not fail
            if name.startswith("varlik"):
                raise
            notes.append(f"{problem.name}: {name} left out: {str(error).splitlines()[0]}")
            continue
        working[name] = way
        if differences[name] > TOLERANCE[problem.dtype]:
            raise ValueError(f"{problem.name}: {name} differs from float32 by {differences[name]:.1e}: no figures")
    del exact
    rotated = copies(problem.inputs)
    times: dict[str, list[float]] = {name: [] for name in working}
    for i in range(repeats):
        for name, way in working.items():
            times[name].append(milliseconds(partial(way, *rotated[i % len(rotated)]), rotated[0]))
    for name, values in times.items():
        median = statistics.median(values)
        rates = 1000 * problem.gigabytes / median, 1000 * problem.tflop / median
        yield Measured(problem.name, name, median, *rates, differences[name])


def difference(found: Any, exact: Any) -> float:
    """Largest difference relative to the largest value; the share that differs, for integers."""
    pairs = zip(*((x,) if isinstance(x, Tensor) else x for x in (found, exact)), strict=True)
    worst = 0.0
    for ours, wanted in pairs:
        if not wanted.is_floating_point():
            worst = max(worst, (ours != wanted).double().mean().item())
        else:
            gap = (ours.double() - wanted.double()).abs().max() / wanted.abs().max()
            worst = max(worst, gap.nan_to_num(nan=torch.inf).item())
    return worst


def copies(inputs: Inputs) -> list[Inputs]:
    """As many sets of the inputs as it takes to fill more than an L2 cache."""
    size = sum(x.numel() * x.element_size() for x in inputs if isinstance(x, Tensor))
    count = max(1, min(16, -(-L2_BYTES // max(1, size)))) if inputs[0].is_cuda else 1
    return [tuple(x.clone() if isinstance(x, Tensor) else x for x in inputs) for _ in range(count)]


def milliseconds(work: Callable[[], object], inputs: Inputs) -> float:
    """Time of one call, by events on a GPU."""
    if not inputs[0].is_cuda:
        started = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - started)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000)  # a millisecond: the call is enqueued meanwhile, so that only the device is timed
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_tflops(device: torch.device, dtype: torch.dtype, repeats: int, size: int) -> float:
    """TFLOP/s of a square matrix product of `size`, the median."""
    a, b = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    times = [milliseconds(lambda: torch.mm(a, b, out=out), (a,)) for _ in range(repeats + 3)][3:]
    return 2 * size**3 / statistics.median(times) / 1e9
