"""The ops against float64, and what torch asks of a registered op.

The error of ours is at most twice the error of plain torch in the same dtype, plus rounding. Outputs and pages start as
NaN, so that what was never written shows.
"""

from __future__ import annotations

import importlib
import json
import math
from itertools import accumulate, pairwise

import pytest
import torch
from op_cases import (
    BOUNDARIES,
    EPS,
    ada_layer_norm_backward_inputs,
    ada_layer_norm_inputs,
    assert_as_good_as_torch,
    attention_backward_inputs,
    attention_inputs,
    double,
    linear_inputs,
    nearest_code_inputs,
    plain_ada_layer_norm,
    plain_attention,
    plain_linear,
    plain_nearest_code,
    plain_qkv,
    plain_residual_ada_layer_norm,
    plain_token_log_prob,
    qk_norm_backward_inputs,
    qk_norm_inputs,
    randn,
    residual_inputs,
    scale_log_prob_inputs,
    strided,
    token_log_prob_backward_inputs,
    token_log_prob_inputs,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from varlik import ops
from varlik.ops import _registry

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def poisoned():
    """`torch.empty` gives NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def tiny_tiles(monkeypatch):
    """A budget of a few rows per tile, so that small problems take many tiles."""
    monkeypatch.setattr(_registry, "CPU_TILE_BYTES", 1000)


# AdaLN


AdaLN_SHAPES = ((3, 5, 24, 4), (1, 1, 1, 1), (7, 1, 33, 2), (2, 3, 130, 9), (0, 3, 8, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", AdaLN_SHAPES)
def test_ada_layer_norm(shape, dtype):
    inputs = ada_layer_norm_inputs(*shape, dtype=dtype)
    ours = ops.ada_layer_norm(*inputs)
    assert ours.dtype == dtype
    assert_as_good_as_torch(ours, plain_ada_layer_norm(*inputs), plain_ada_layer_norm(*double(inputs)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", AdaLN_SHAPES)
def test_residual_ada_layer_norm(shape, dtype):
    inputs = residual_inputs(*shape, dtype=dtype)
    before = inputs[0].clone()
    ours = ops.residual_ada_layer_norm(*inputs)
    assert torch.equal(inputs[0], before)
    plain, exact = plain_residual_ada_layer_norm(*inputs), plain_residual_ada_layer_norm(*double(inputs))
    for part in range(2):
        assert ours[part].dtype == dtype
        assert_as_good_as_torch(ours[part], plain[part], exact[part])


def test_ada_layer_norm_takes_a_narrow_branch_and_wide_tables():
    x, branch, gate, scale, shift, row_class = residual_inputs()
    y, normed = ops.residual_ada_layer_norm(x, branch.half(), gate, scale.double(), shift, row_class)
    expected = ops.residual_ada_layer_norm(x, branch.half().float(), gate, scale, shift, row_class)
    assert y.dtype == normed.dtype == torch.float32
    torch.testing.assert_close((y, normed), expected)


def test_ada_layer_norm_of_half_precision_is_rounded_once():
    # A mean far from zero: sums in the dtype of x would lose it.
    x, scale, shift, row_class = ada_layer_norm_inputs(2, 3, 512, dtype=torch.bfloat16)
    x = x + 100
    exact = plain_ada_layer_norm(*double((x, scale, shift, row_class)))
    ours = ops.ada_layer_norm(x, scale, shift, row_class)
    assert (ours.double() - exact).abs().max() <= 2**-8 * exact.abs().max() * 1.01


def test_ada_layer_norm_without_row_class_takes_one_table_row_each():
    x, branch, gate, scale, shift, row_class = residual_inputs()
    gathered = [table[row_class] for table in (gate, scale, shift)]
    expected = ops.residual_ada_layer_norm(x, branch, gate, scale, shift, row_class)
    torch.testing.assert_close(ops.residual_ada_layer_norm(x, branch, *gathered, None), expected, rtol=0, atol=0)
    expected = ops.ada_layer_norm(x, scale, shift, row_class)
    torch.testing.assert_close(ops.ada_layer_norm(x, *gathered[1:], None), expected, rtol=0, atol=0)
    with pytest.raises(ValueError) as error:
        ops.ada_layer_norm(x, scale, shift, None)
    assert str(error.value) == "scale: expected shape (R, C) with R = 3 and no row_class, got (4, 24)"


# linear


@pytest.mark.parametrize("activation", ["none", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(3, 5, 16, 24), (1, 1, 1, 1), (2, 3, 130, 9), (0, 3, 8, 2), (2, 0, 8, 2), (1, 9, 600, 500)]
)
def test_linear(shape, dtype, activation):
    inputs = linear_inputs(*shape, dtype=dtype)
    ours = ops.linear(*inputs, activation=activation)
    assert ours.dtype == dtype
    exact = plain_linear(*double(inputs), activation)
    assert_as_good_as_torch(ours, plain_linear(*inputs, activation), exact)
    # Weights as (in, out) in memory, as the engine keeps those of small models.
    x, weight, bias = inputs
    inputs = x, weight.t().contiguous().t(), bias
    ours = ops.linear(*inputs, activation=activation)
    assert_as_good_as_torch(ours, plain_linear(*inputs, activation), exact)


def test_linear_without_onednn(monkeypatch):
    module = importlib.import_module("varlik.ops.linear")
    inputs = linear_inputs()
    for activation in ("none", "gelu_tanh"):
        fused = ops.linear(*inputs, activation=activation)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_has_onednn", lambda: False)
            torch.testing.assert_close(ops.linear(*inputs, activation=activation), fused, rtol=1e-5, atol=1e-6)


def test_linear_refuses_an_activation():
    with pytest.raises(ValueError) as error:
        ops.linear(*linear_inputs(), activation="relu")
    assert str(error.value) == "activation: expected one of 'none', 'gelu_tanh', got 'relu'"


# qk_norm


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 2, 4), (1, 1, 1, 1), (3, 5, 3, 7), (0, 2, 1, 2)])
def test_qk_norm(shape, dtype, normalised):
    inputs = qk_norm_inputs(*shape, dtype=dtype, normalised=normalised)
    *given, k_pages, v_pages, slots = inputs
    q = ops.qk_norm(*inputs)
    assert q.dtype == dtype
    plain = plain_qkv(*given, shape[2])
    exact = plain_qkv(*double(tuple(given)), shape[2])
    written = slots[:, 2:]
    for ours, p, e in zip((q, k_pages[written], v_pages[written]), plain, exact, strict=True):
        assert_as_good_as_torch(ours, p, e)
    untouched = torch.ones(len(k_pages), dtype=torch.bool).index_fill(0, written.flatten(), False)
    assert k_pages[untouched].isnan().all()
    assert v_pages[untouched].isnan().all()


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_qk_norm_of_rows_side_by_side(dtype, normalised):
    qkv, scale, *_, slots = qk_norm_inputs(dtype=dtype, normalised=normalised)
    rows, length = slots.shape
    # Keys and values may be interleaved in one buffer.
    ours = torch.full((rows * length, 2, 2, 4), math.nan, dtype=dtype).unbind(1)
    wanted = [torch.full((rows * length, 2, 4), math.nan, dtype=dtype) for _ in range(2)]
    q = ops.qk_norm(qkv, scale, *ours, None)
    assert torch.equal(q, ops.qk_norm(qkv, scale, *wanted, torch.arange(rows * length).view(rows, length)))
    torch.testing.assert_close(list(ours), wanted, rtol=0, atol=0, equal_nan=True)


def test_qk_norm_survives_zero_vectors():
    qkv, scale, k_pages, v_pages, slots = qk_norm_inputs()
    q = ops.qk_norm(torch.zeros_like(qkv), scale, k_pages, v_pages, slots)
    assert (q == 0).all()
    assert (k_pages[slots[:, 2:]] == 0).all()


def test_qk_norm_refuses_rows_that_do_not_fit():
    qkv, scale, k_pages, v_pages, slots = qk_norm_inputs()
    with pytest.raises(ValueError) as error:
        ops.qk_norm(qkv, scale, k_pages, v_pages, slots[:, :2])
    assert str(error.value) == "qkv: expected shape (R, T, 3C) with T <= L = 2, got (2, 3, 24)"
    with pytest.raises(ValueError) as error:
        ops.qk_norm(qkv, scale, k_pages[:9], v_pages[:9], None)
    assert str(error.value) == "k_pages: expected shape (R * L, H, D) with R = 2 and no slots, got 9 of them"


# Attention


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", BOUNDARIES[:-1])
def test_attention(start, dtype):
    inputs = attention_inputs(start=start, dtype=dtype)
    ours = ops.scale_causal_attention(*inputs, softmax_scale=0.7)
    assert ours.dtype == dtype
    assert_as_good_as_torch(ours, plain_attention(*inputs, 0.7), plain_attention(*double(inputs), 0.7))


@pytest.mark.parametrize(("rows", "heads", "head_dim"), [(1, 1, 1), (3, 1, 7), (1, 3, 65), (0, 1, 4)])
@pytest.mark.parametrize("boundaries", [[0, 1], [0, 3], [0, 1, 2, 3, 10]])
def test_attention_of_odd_shapes(rows, heads, head_dim, boundaries):
    inputs = attention_inputs(rows, heads, head_dim, boundaries, boundaries[-2])
    ours = ops.scale_causal_attention(*inputs, softmax_scale=2.0)
    assert_as_good_as_torch(ours, plain_attention(*inputs, 2.0), plain_attention(*double(inputs), 2.0))


def test_attention_with_extreme_logits():
    q, *rest = attention_inputs()
    inputs = (1e4 * q, *rest)
    ours = ops.scale_causal_attention(*inputs, softmax_scale=1.0)
    assert_as_good_as_torch(ours, plain_attention(*inputs, 1.0), plain_attention(*double(inputs), 1.0))


def test_attention_split_over_calls_and_rows_that_share_pages():
    q, k_pages, v_pages, slots, _ = attention_inputs()
    slots = slots[:1].expand(2, -1)
    whole = ops.scale_causal_attention(q, k_pages, v_pages, slots, BOUNDARIES, softmax_scale=1.0)
    parts = [
        ops.scale_causal_attention(
            q[:, a:b], k_pages, v_pages, slots[:, :b], [c for c in BOUNDARIES if c <= b], softmax_scale=1.0
        )
        for a, b in ((0, 5), (5, 14))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", BOUNDARIES[:-1])
def test_attention_to_rows_side_by_side(start, dtype):
    q, k_pages, v_pages, slots, _ = attention_inputs(start=start, dtype=dtype)
    # Interleaved in one buffer, as the engine has them.
    keys, values = torch.stack((k_pages[slots.flatten()], v_pages[slots.flatten()]), dim=1).unbind(1)
    ours = ops.scale_causal_attention(q, keys, values, None, BOUNDARIES, softmax_scale=0.7)
    expected = ops.scale_causal_attention(q, k_pages, v_pages, slots, BOUNDARIES, softmax_scale=0.7)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("start", [0, 1, 5, 14])
def test_attention_with_scales_merged_and_not(start, monkeypatch):
    boundaries = [0, 1, 5, 14, 30]
    inputs = attention_inputs(boundaries=boundaries, start=start)
    module = importlib.import_module("varlik.ops.scale_causal_attention")
    plain, exact = plain_attention(*inputs, 0.7), plain_attention(*double(inputs), 0.7)
    for merged in (1, 13, 64):  # no scale, some, all that there are
        monkeypatch.setattr(module, "MERGED_TOKENS", merged)
        module._runs.cache_clear()
        assert_as_good_as_torch(ops.scale_causal_attention(*inputs, softmax_scale=0.7), plain, exact)
    module._runs.cache_clear()


# token_log_prob


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9, 16, 40), (1, 1, 1), (5, 3, 1001), (33, 7, 5), (0, 3, 4)])
def test_token_log_prob(shape, dtype):
    inputs = token_log_prob_inputs(*shape, dtype=dtype)
    ours = ops.token_log_prob(*inputs)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_as_good_as_torch(ours, plain_token_log_prob(*inputs), plain_token_log_prob(*double(inputs)))


@pytest.mark.usefixtures("tiny_tiles")
def test_token_log_prob_with_extreme_logits():
    hidden, weight, bias, _ = token_log_prob_inputs(rows=8)
    bias = bias.clone()
    bias[:4] = torch.tensor([1e4, -1e4, 1e4, -math.inf])
    targets = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7])
    ours = ops.token_log_prob(hidden, weight, bias, targets)
    exact = plain_token_log_prob(*double((hidden, weight, bias, targets)))
    assert ours[3] == -math.inf
    assert exact[3] == -math.inf
    finite = exact.isfinite()
    assert finite.sum() == 7
    plain = plain_token_log_prob(hidden, weight, bias, targets)
    assert_as_good_as_torch(ours[finite], plain[finite], exact[finite])


def test_token_log_prob_holds_one_tile_of_logits(tmp_path):
    inputs = token_log_prob_inputs(rows=3000, width=4, vocabulary=4096)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        ops.token_log_prob(*inputs)
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    changes = [event["args"]["Bytes"] for event in events if event["name"] == "[memory]"]
    peak = max(accumulate(changes))
    output = 3000 * 4
    assert output < peak <= 2 * _registry.CPU_TILE_BYTES + 2 * output


def test_token_log_prob_refuses_a_target_outside_the_vocabulary():
    hidden, weight, bias, targets = token_log_prob_inputs()
    with pytest.raises(RuntimeError, match="out of bounds"):
        ops.token_log_prob(hidden, weight, bias, targets + 40)


# nearest_code


@pytest.mark.parametrize("shape", [(50, 6, 40), (1, 1, 1), (0, 2, 3), (257, 32, 4096), (1021, 8, 1000)])
def test_nearest_code_is_bitwise_the_plain_formula(shape):
    inputs = nearest_code_inputs(*shape)
    assert torch.equal(ops.nearest_code(*inputs), plain_nearest_code(*inputs))


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("dtype", DTYPES)
def test_nearest_code_is_nearest(dtype):
    vectors, codebook = nearest_code_inputs(dtype=dtype)
    expected = torch.cdist(vectors.double(), codebook.double()).argmin(1)
    assert torch.equal(ops.nearest_code(vectors, codebook), expected)


@pytest.mark.usefixtures("tiny_tiles")
def test_nearest_code_takes_the_first_of_equals():
    vectors, codebook = nearest_code_inputs()
    once = ops.nearest_code(vectors, codebook)
    assert torch.equal(ops.nearest_code(vectors, codebook.repeat(3, 1)), once)
    assert torch.equal(ops.nearest_code(vectors, codebook.repeat_interleave(2, dim=0)), 2 * once)


def test_nearest_code_ignores_autocast():
    inputs = nearest_code_inputs(500, 32, 1000)
    with torch.autocast("cpu", torch.bfloat16):
        ours = ops.nearest_code(*inputs)
    assert torch.equal(ours, plain_nearest_code(*inputs))


@pytest.mark.parametrize(
    ("rows", "row_bytes", "sizes"),
    [(0, 8, []), (1, 10**9, [1]), (3, 10**9, [1, 1, 1]), (5, 500, [1, 2, 2]), (7, 200, [3, 4]), (4, 250, [4])],
)
@pytest.mark.usefixtures("tiny_tiles")
def test_tiles(rows, row_bytes, sizes):
    tiles = list(_registry.tiles(rows, row_bytes, torch.device("cpu")))
    assert [tile.stop - tile.start for tile in tiles] == sizes
    assert [i for tile in tiles for i in range(rows)[tile]] == list(range(rows))


# What holds for every op

CASES = {
    "ada_layer_norm": (ops.ada_layer_norm, ada_layer_norm_inputs, {}),
    "residual_ada_layer_norm": (ops.residual_ada_layer_norm, residual_inputs, {}),
    "ada_layer_norm_backward": (ops.ada_layer_norm_backward, ada_layer_norm_backward_inputs, {}),
    "qk_norm": (ops.qk_norm, qk_norm_inputs, {}),
    "split_qk_norm": (ops.split_qk_norm, lambda: (*qk_norm_inputs()[:2], 2), {}),
    "qk_norm_backward": (ops.qk_norm_backward, qk_norm_backward_inputs, {}),
    "scale_causal_attention": (ops.scale_causal_attention, lambda: attention_inputs(start=5), {"softmax_scale": 0.5}),
    "scale_causal_attention_backward": (
        ops.scale_causal_attention_backward,
        lambda: attention_backward_inputs(start=5),
        {"softmax_scale": 0.5},
    ),
    "linear": (ops.linear, linear_inputs, {"activation": "gelu_tanh"}),
    "token_log_prob": (ops.token_log_prob, token_log_prob_inputs, {}),
    "scale_log_prob": (ops.scale_log_prob, scale_log_prob_inputs, {}),
    "token_log_prob_backward": (ops.token_log_prob_backward, token_log_prob_backward_inputs, {"weights": True}),
    "nearest_code": (ops.nearest_code, nearest_code_inputs, {}),
}
# Those that autograd goes through, with the arguments it may go to.
DIFFERENTIABLE = {
    "ada_layer_norm": (0, 1, 2),
    "residual_ada_layer_norm": (0, 1, 2, 3, 4),
    "split_qk_norm": (0, 1),
    "scale_causal_attention": (0, 1, 2),
    "linear": (0, 1, 2),
    "token_log_prob": (0, 1, 2),
}
each_op = pytest.mark.parametrize("name", CASES)


def registered_arguments(name: str) -> tuple:
    """Arguments of the registered op, which takes everything by position."""
    _, make, options = CASES[name]
    inputs = make()
    of_norm = {"ada_layer_norm": (None, EPS, torch.float32), "ada_layer_norm_backward": (EPS,)}
    of_norm["residual_ada_layer_norm"] = of_norm["ada_layer_norm"]
    return (*inputs, *options.values(), *of_norm.get(name, ()), "torch")


@each_op
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.varlik, name).default, registered_arguments(name))


def test_opcheck_without_optional_tensors():
    qkv, _, k_pages, v_pages, slots = qk_norm_inputs(normalised=False)
    torch.library.opcheck(torch.ops.varlik.qk_norm.default, (qkv, None, k_pages, v_pages, slots, "torch"))
    pages = k_pages[: slots.numel()], v_pages[: slots.numel()]
    torch.library.opcheck(torch.ops.varlik.qk_norm.default, (qkv, None, *pages, None, "torch"))
    q, k_pages, v_pages, slots, boundaries = attention_inputs()
    pages = k_pages[slots.flatten()], v_pages[slots.flatten()]
    attention = torch.ops.varlik.scale_causal_attention.default
    torch.library.opcheck(attention, (q, *pages, None, boundaries, 1.0, "torch"))
    x, branch, gate, scale, shift, _ = residual_inputs(classes=3)
    residual = torch.ops.varlik.residual_ada_layer_norm.default
    torch.library.opcheck(residual, (x, branch, gate, scale, shift, None, None, EPS, torch.float16, "torch"))


@each_op
def test_direct_and_dispatched_calls_are_the_same(name):
    with FlopCounterMode(display=False):  # listens at the dispatcher
        dispatched = _registry.call(name, *registered_arguments(name))
    torch.testing.assert_close(_registry.call(name, *registered_arguments(name)), dispatched, rtol=0, atol=0)
    subclass = type("Subclass", (Tensor,), {})
    first, *rest = registered_arguments(name)
    assert isinstance(_registry.call(name, first.as_subclass(subclass), *rest), (Tensor, tuple))


@each_op
def test_compiles_in_one_graph(name):
    torch.compiler.reset()  # every case compiles the same function anew
    op, make, options = CASES[name]
    compiled = torch.compile(lambda *inputs: op(*inputs, **options), fullgraph=True, backend="aot_eager")
    inputs, same = make(), make()
    torch.testing.assert_close(compiled(*inputs), op(*same, **options), rtol=0, atol=0)
    # Pages too, where the op writes to them.
    torch.testing.assert_close(
        [x for x in inputs if isinstance(x, Tensor)],
        [x for x in same if isinstance(x, Tensor)],
        rtol=0,
        atol=0,
        equal_nan=True,
    )


@each_op
def test_takes_strides(name):
    op, make, options = CASES[name]
    inputs, spread = make(), tuple(strided(x) if isinstance(x, Tensor) else x for x in make())
    assert not any(x.is_contiguous() for x in spread if isinstance(x, Tensor))
    expected, ours = op(*inputs, **options), op(*spread, **options)
    torch.testing.assert_close(ours, expected)
    for output in ours if isinstance(ours, tuple) else (ours,):
        assert output.is_contiguous()
    for a, b in zip(inputs, spread, strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(b, a, equal_nan=True)


@each_op
def test_fake_agrees_on_meta_tensors(name):
    op, make, options = CASES[name]
    expected = op(*make(), **options)
    ours = op(*(x.to("meta") if isinstance(x, Tensor) else x for x in make()), **options)
    for a, b in zip(*((x,) if isinstance(x, Tensor) else x for x in (ours, expected)), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


FLOPS = {
    **dict.fromkeys(("ada_layer_norm", "residual_ada_layer_norm", "ada_layer_norm_backward"), 0),
    **dict.fromkeys(("qk_norm", "split_qk_norm", "qk_norm_backward"), 0),
    "linear": 2 * 3 * 5 * 16 * 24,
    # 2 rows, 2 heads of 8; the 9 queries of the last scale see 14 keys; products with keys and with values.
    "scale_causal_attention": 2 * 2 * (2 * 2 * 8) * 9 * 14,
    "scale_causal_attention_backward": 5 * 2 * (2 * 2 * 8) * 9 * 14,
    "token_log_prob": 2 * 9 * 16 * 40,
    "scale_log_prob": 2 * 3 * 14 * 16 * 40,
    "token_log_prob_backward": 3 * 2 * 9 * 16 * 40,
    "nearest_code": 2 * 50 * 6 * 40,
}


@each_op
def test_flops(name):
    op, make, options = CASES[name]
    with FlopCounterMode(display=False) as counter:
        op(*make(), **options)
    assert counter.get_total_flops() == FLOPS[name]
    assert set(counter.get_flop_counts()["Global"]) == {getattr(torch.ops.varlik, name)}


def test_flops_of_attention_count_the_attended_pairs():
    with FlopCounterMode(display=False) as counter:
        ops.scale_causal_attention(*attention_inputs(), softmax_scale=1.0)
    assert counter.get_total_flops() == 2 * 2 * (2 * 2 * 8) * (1 * 1 + 4 * 5 + 9 * 14)


@pytest.mark.parametrize("name", sorted(set(CASES) - set(DIFFERENTIABLE)))
def test_refuses_inputs_that_require_grad(name):
    op, make, options = CASES[name]
    first, *rest = make()
    first.requires_grad_()
    with pytest.raises(ValueError) as error:
        op(first, *rest, **options)
    assert "requires grad" in str(error.value)
    with torch.no_grad():
        op(first, *rest, **options)


def gradient_inputs(name: str) -> tuple:
    """Inputs in float64; rows lie side by side, which is what gradients are for."""
    if name == "scale_causal_attention":
        _, *inputs, boundaries = double(attention_backward_inputs(start=1))
        return *inputs, None, boundaries
    return double(CASES[name][1]())


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients(name):
    op, _, options = CASES[name]
    inputs = gradient_inputs(name)
    for i in DIFFERENTIABLE[name]:
        inputs[i].requires_grad_()
    assert torch.autograd.gradcheck(lambda *args: op(*args, **options), inputs)
    # As registered, for torch.compile and those who call it so.
    norm = (None, EPS, torch.float64) if "layer_norm" in name else ()
    arguments = (*inputs, *options.values(), *norm, "torch")
    torch.library.opcheck(getattr(torch.ops.varlik, name).default, arguments)


@pytest.mark.parametrize("name", ["split_qk_norm", "ada_layer_norm", "residual_ada_layer_norm"])
def test_gradients_without_optional_tensors(name):
    op, make, options = CASES[name]
    inputs = list(double(make()))
    if name == "split_qk_norm":
        inputs[1] = None
    else:
        inputs = [x[: len(inputs[0])] for x in inputs[:-1]] + [None]
    wanted = [x for x in inputs if isinstance(x, Tensor)]
    for x in wanted:
        x.requires_grad_()
    assert torch.autograd.gradcheck(lambda *args: op(*args, **options), inputs)


def test_gradient_of_a_norm_that_was_clamped():
    qkv = randn(1, 2, 24).double() * 1e-14
    grads = [randn(1, 2, 2, 4, seed=i).double() for i in range(3)]
    ours, _ = ops.qk_norm_backward(grads[0], *(g.flatten(0, 1) for g in grads[1:]), qkv, torch.ones(2).double())
    expected = torch.stack((grads[0] / 1e-12, grads[1] / 1e-12, grads[2]), dim=2)
    torch.testing.assert_close(ours, expected.flatten(2))


def test_ada_layer_norm_through_an_index_equals_a_copy():
    x, branch, gate, scale, shift, _ = residual_inputs(rows=5)
    row_input, row_class = torch.tensor([1, 0, 1, 1, 0]), torch.tensor([3, 0, 2, 1, 1])
    options = {"dtype": torch.float16}
    ours = ops.ada_layer_norm(x[:2], scale, shift, row_class, row_input=row_input, **options)
    assert ours.dtype == torch.float16
    assert torch.equal(ours, ops.ada_layer_norm(x[row_input], scale, shift, row_class, **options))
    ours = ops.residual_ada_layer_norm(x[:2], branch, gate, scale, shift, row_class, row_input=row_input, **options)
    copied = ops.residual_ada_layer_norm(x[row_input], branch, gate, scale, shift, row_class, **options)
    assert [y.dtype for y in ours] == [torch.float32, torch.float16]
    torch.testing.assert_close(ours, copied, rtol=0, atol=0)
    with pytest.raises(ValueError, match="row_input: no gradient flows"):
        ops.ada_layer_norm(x[:2].requires_grad_(), scale, shift, row_class, row_input=row_input)


@pytest.mark.parametrize("row_input", [[2, 0, 1], [1, 1, 0, 1]])
def test_gradients_of_tables_where_rows_share_inputs(row_input):
    rows = torch.tensor(row_input)
    x, branch, gate, scale, shift, _ = double(residual_inputs(rows=4))
    branch, row_class = branch[: len(rows)], torch.arange(len(rows))
    inputs = [t.requires_grad_() for t in (branch, gate, scale, shift)]
    for op, given in ((ops.ada_layer_norm, inputs[2:]), (ops.residual_ada_layer_norm, inputs)):
        assert torch.autograd.gradcheck(lambda *t, op=op: op(x[:3], *t, row_class, row_input=rows), given)


def test_gradients_need_rows_side_by_side():
    q, *rest = attention_inputs()
    with pytest.raises(ValueError, match="slots: gradients are for rows side by side"):
        ops.scale_causal_attention(q.requires_grad_(), *rest, softmax_scale=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("tiny_tiles")
def test_scale_log_prob_sums_token_log_probs(dtype):
    hidden, weight, bias, targets, boundaries = scale_log_prob_inputs(dtype=dtype)
    log_prob, sums = ops.scale_log_prob(hidden, weight, bias, targets, boundaries)
    assert torch.equal(log_prob.flatten(), ops.token_log_prob(hidden.flatten(0, 1), weight, bias, targets.flatten()))
    expected = [log_prob[:, a:b].double().sum(1) for a, b in pairwise(boundaries)]
    assert torch.equal(sums, torch.stack(expected, dim=1).to(log_prob.dtype))


@pytest.mark.parametrize("boundaries", [[0], [0, 5, 13], [1, 14], [0, 5, 5, 14]])
def test_scale_log_prob_refuses_boundaries(boundaries):
    *inputs, _ = scale_log_prob_inputs()
    with pytest.raises(ValueError, match="boundaries: expected to rise from 0 to T = 14"):
        ops.scale_log_prob(*inputs, boundaries)


@each_op
def test_takes_an_impl_it_has(name):
    op, make, options = CASES[name]
    torch.testing.assert_close(op(*make(), **options, impl="torch"), op(*make(), **options), rtol=0, atol=0)
    with pytest.raises(ValueError) as error:
        op(*make(), **options, impl="cuda")
    assert str(error.value) == 'impl: expected "auto", "torch" or "triton", got \'cuda\''


@each_op
def test_an_explicit_request_for_triton_never_falls_back(name, monkeypatch):
    op, make, options = CASES[name]
    monkeypatch.setattr(_registry, "has_triton", lambda: False)
    with pytest.raises(ValueError) as error:
        op(*make(), **options, impl="triton")
    assert str(error.value) == f"impl: {name} has a Triton path, but triton is not installed"
    op(*make(), **options)


@each_op
@pytest.mark.skipif(not _registry.has_triton(), reason="triton is not installed")
def test_triton_is_refused_on_a_cpu(name):
    op, make, options = CASES[name]
    with pytest.raises(ValueError, match='expected a CUDA tensor for impl="triton", got one on cpu'):
        op(*make(), **options, impl="triton")


@each_op
def test_refuses_every_argument_of_another_dtype_or_shape(name):
    op, make, options = CASES[name]
    inputs = make()
    for i, value in enumerate(inputs):
        if not isinstance(value, Tensor):
            continue
        for wrong, kind in (
            (value.bool(), TypeError),
            (value.tolist(), TypeError),
            (value[None], ValueError),
            (value.to("meta"), ValueError),
        ):
            with pytest.raises(kind) as error:
                op(*inputs[:i], wrong, *inputs[i + 1 :], **options)
            assert "expected" in str(error.value)


@pytest.mark.parametrize(
    ("name", "index", "shape", "message"),
    [
        ("ada_layer_norm", 1, (4, 23), "scale: expected shape (N, C) = (4, 24), got (4, 23)"),
        ("ada_layer_norm", 3, (2,), "row_class: expected shape (R,) = (3,), got (2,)"),
        ("residual_ada_layer_norm", 1, (3, 4, 24), "branch: expected shape (R, T, C) = (3, 5, 24), got (3, 4, 24)"),
        ("qk_norm", 0, (2, 3, 16), "qkv: expected shape (R, T, 3C) with 3C = 3HD = 24, got (2, 3, 16)"),
        ("qk_norm", 2, (9, 3, 4), "k_pages: expected shape (P, H, D) = (9, 2, D), got (9, 3, 4)"),
        ("qk_norm", 4, (3, 5), "slots: expected shape (R, L) = (2, L), got (3, 5)"),
        ("linear", 2, (23,), "bias: expected shape (O,) = (24,), got (23,)"),
        ("scale_causal_attention", 3, (3, 14), "slots: expected shape (R, L) = (2, L), got (3, 14)"),
        ("token_log_prob", 2, (39,), "bias: expected shape (V,) = (40,), got (39,)"),
        ("token_log_prob", 1, (0, 16), "weight: expected shape (V, C) with V >= 1, got (0, 16)"),
        ("nearest_code", 1, (40, 5), "codebook: expected shape (V, c) = (40, 6), got (40, 5)"),
    ],
)
def test_messages_name_the_argument_and_the_shapes(name, index, shape, message):
    op, make, options = CASES[name]
    inputs = list(make())
    inputs[index] = torch.zeros(shape, dtype=inputs[index].dtype)
    if shape == (0, 16):
        inputs[2] = torch.zeros(0)
    with pytest.raises(ValueError) as error:
        op(*inputs, **options)
    assert str(error.value) == message


def test_dtypes_that_must_agree():
    hidden, weight, bias, targets = token_log_prob_inputs()
    with pytest.raises(TypeError) as error:
        ops.token_log_prob(hidden, weight.half(), bias, targets)
    assert str(error.value) == "weight: expected torch.float32, as hidden has, got torch.float16"


@pytest.mark.parametrize("boundaries", [[], [14], [1, 5, 14], [0, 5, 5, 14], [0, 5, 13], [0, 9, 5, 14]])
def test_attention_refuses_boundaries(boundaries):
    *inputs, _ = attention_inputs(start=5)
    with pytest.raises(ValueError) as error:
        ops.scale_causal_attention(*inputs, boundaries, softmax_scale=1.0)
    assert str(error.value) == f"boundaries: expected to rise from 0 to L = 14, got {boundaries}"


def test_attention_refuses_a_part_of_a_scale():
    q, *rest = attention_inputs(start=5)
    for tokens in (8, 0):
        with pytest.raises(ValueError) as error:
            ops.scale_causal_attention(q[:, :tokens], *rest, softmax_scale=1.0)
        assert "with T = 14 - b for one b of [0, 1, 5]" in str(error.value)
