"""The Triton kernels against float64: in Triton's interpreter, or on a GPU where there is one.

Here they run only with TRITON_INTERPRET=1 set from the start; `test_interpreter.py` starts such a process. Errors are
at most twice those of plain torch in the same dtype, plus rounding. Inputs lie between guard bands of NaN, and outputs
start as NaN between guard bands that must stay as they were.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from op_cases import (
    BOUNDARIES,
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
    randint,
    randn,
    residual_inputs,
    scale_log_prob_inputs,
    token_log_prob_backward_inputs,
    token_log_prob_inputs,
)
from torch import Tensor

from varlik import ops

pytestmark = [pytest.mark.gpu, pytest.mark.interpreted]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter computes bfloat16 wrongly: only a GPU can test it.
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
GUARD = 64
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def guarded_outputs(monkeypatch):
    """`new_empty` gives NaN, or the largest integer, between guard bands that are looked at in the end."""
    holders = []

    def new_empty(self, *shape, dtype=None, device=None):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        dtype = dtype or self.dtype
        fill = math.nan if dtype.is_floating_point else torch.iinfo(dtype).max
        holder = torch.full((math.prod(shape) + 2 * GUARD,), fill, dtype=dtype, device=device or self.device)
        holders.append(holder)
        return holder[GUARD : holder.numel() - GUARD].view(shape)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_empty", new_empty)
        yield
    for holder in holders:
        ends = torch.cat((holder[:GUARD], holder[-GUARD:]))
        untouched = ends.isnan() if holder.is_floating_point() else ends == torch.iinfo(holder.dtype).max
        assert untouched.all(), "written outside an output"


def guarded(x: Tensor) -> Tensor:
    """The same values on the device, each row of the last dimension between bands of NaN or the largest integer."""
    fill = math.nan if x.is_floating_point() else torch.iinfo(x.dtype).max
    holder = torch.full((*x.shape[:-1], x.shape[-1] + 2 * GUARD), fill, dtype=x.dtype, device=DEVICE)
    view = holder[..., GUARD : GUARD + x.shape[-1]]
    return view.copy_(x)


def on_device(inputs, guard: bool = True) -> tuple:
    if guard:
        return tuple(guarded(x) if isinstance(x, Tensor) else x for x in inputs)
    return tuple(x.to(DEVICE) if isinstance(x, Tensor) else x for x in inputs)


def host(outputs):
    return [x if x is None else x.cpu() for x in (outputs if isinstance(outputs, tuple) else (outputs,))]


def check(op, inputs, plain, options=None, guard=True) -> None:
    """Every output of the kernel against float64, with the error of plain torch on the CPU as its budget."""
    options = options or {}
    ours = host(op(*on_device(inputs, guard), **options, impl="triton"))
    exact = plain(*double(inputs))
    rough = plain(*inputs)
    pairs = [(x,) if isinstance(x, Tensor) else x for x in (rough, exact)]
    for got, p, e in zip(ours, *pairs, strict=True):
        if got is not None:
            assert_as_good_as_torch(got, p, e)


def torch_path(op, **options):
    """The op's own torch path, which gradcheck has been over."""
    return lambda *inputs: op(*inputs, **options, impl="torch")


# AdaLN


@each_dtype
@pytest.mark.parametrize(
    "shape", [(3, 5, 24, 4), (1, 1, 1, 1), (7, 1, 33, 2), (2, 9, 130, 9), (0, 3, 8, 2), (2, 0, 8, 2), (2, 3, 600, 2)]
)
def test_ada_layer_norm(shape, dtype):
    check(ops.ada_layer_norm, ada_layer_norm_inputs(*shape, dtype=dtype), plain_ada_layer_norm)
    check(ops.residual_ada_layer_norm, residual_inputs(*shape, dtype=dtype), plain_residual_ada_layer_norm)


def test_ada_layer_norm_of_one_table_row_each_and_of_shared_inputs():
    x, branch, gate, scale, shift, row_class = residual_inputs(rows=5)
    row_input = torch.tensor([1, 0, 1, 1, 0])
    x = x[:2]
    tables = [table[row_class] for table in (gate, scale, shift)]
    for op, given in ((ops.ada_layer_norm, (x,)), (ops.residual_ada_layer_norm, (x, branch))):
        some = (gate, scale, shift)[3 - len(given) - 1 :] if len(given) == 2 else (scale, shift)
        expected = op(*given, *some, row_class, row_input=row_input)
        options = {"row_input": row_input.to(DEVICE), "impl": "triton"}
        ours = op(*on_device((*given, *some, row_class)), **options)
        torch.testing.assert_close(host(ours), host(expected), rtol=1e-5, atol=1e-5)
        alone = tables if len(given) == 2 else tables[1:]
        again = op(*on_device((*given, *alone)), None, **options)
        torch.testing.assert_close(host(again), host(ours), rtol=0, atol=0)


def test_ada_layer_norm_from_a_float32_stream_to_half_precision():
    x, branch, gate, scale, shift, row_class = residual_inputs()
    x = x + 100  # a mean far from zero
    inputs = x, branch.half(), gate, scale, shift, row_class
    y, out = ops.residual_ada_layer_norm(*on_device(inputs), dtype=torch.float16, impl="triton")
    assert (y.dtype, out.dtype) == (torch.float32, torch.float16)
    exact_y, exact = plain_residual_ada_layer_norm(*double(inputs))
    assert ((out.cpu().double() - exact).abs() <= 2e-3 * exact.abs().max()).all()
    torch.testing.assert_close(y.cpu(), exact_y.float(), rtol=1e-6, atol=1e-5)


@each_dtype
@pytest.mark.parametrize("shape", [(3, 5, 24, 4), (1, 1, 8, 1), (2, 70, 33, 3), (0, 3, 8, 2)])
def test_ada_layer_norm_backward(shape, dtype):
    inputs = ada_layer_norm_backward_inputs(*shape, dtype=dtype)
    check(ops.ada_layer_norm_backward, inputs, torch_path(ops.ada_layer_norm_backward))
    _, grad, x, _, _, scale, row_class = inputs
    alone = (None, grad, x, None, None, scale, row_class)
    grad_x, grad_branch, vectors = ops.ada_layer_norm_backward(*on_device(alone), impl="triton")
    expected = ops.ada_layer_norm_backward(*double(alone))
    assert grad_branch is None
    assert (vectors[:, 0] == 0).all()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(grad_x.cpu().double(), expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(vectors.cpu().double(), expected[2], rtol=tolerance, atol=tolerance)


# qk_norm


@each_dtype
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(
    "shape", [(2, 3, 2, 4), (1, 1, 1, 1), (3, 5, 3, 7), (2, 9, 16, 64), (1, 5, 3, 128), (0, 2, 1, 2)]
)
def test_qk_norm(shape, normalised, dtype):
    qkv, scale, k_pages, v_pages, slots = qk_norm_inputs(*shape, dtype=dtype, normalised=normalised)
    device = on_device((qkv, scale, k_pages, v_pages, slots))
    q = ops.qk_norm(*device, impl="triton")
    written = slots[:, 2:]
    ours = q.cpu(), device[2].cpu()[written], device[3].cpu()[written]
    plain, exact = plain_qkv(qkv, scale, shape[2]), plain_qkv(*double((qkv, scale)), shape[2])
    for parts in zip(ours, plain, exact, strict=True):
        assert_as_good_as_torch(*parts)
    untouched = torch.ones(len(k_pages), dtype=torch.bool).index_fill(0, written.flatten(), False)
    for pages in device[2:4]:
        assert pages.cpu()[untouched].isnan().all()
        holder = pages._base
        assert holder[..., :GUARD].isnan().all()
        assert holder[..., -GUARD:].isnan().all()


def test_qk_norm_of_rows_side_by_side_in_one_buffer():
    qkv, scale, _, _, slots = qk_norm_inputs()
    rows, length = slots.shape
    keys, values = torch.full((rows * length, 2, 2, 4), math.nan, device=DEVICE).unbind(1)
    q = ops.qk_norm(*on_device((qkv, scale)), keys, values, None, impl="triton")
    expected = [torch.full((rows * length, 2, 4), math.nan) for _ in range(2)]
    wanted = ops.qk_norm(qkv, scale, *expected, None)
    torch.testing.assert_close([q.cpu(), keys.cpu(), values.cpu()], [wanted, *expected], equal_nan=True)


def test_qk_norm_survives_zero_vectors():
    qkv, scale, k_pages, v_pages, slots = on_device(qk_norm_inputs())
    q = ops.qk_norm(torch.zeros_like(qkv), scale, k_pages, v_pages, slots, impl="triton")
    assert (q == 0).all()
    assert (k_pages[slots[:, 2:]] == 0).all()


@each_dtype
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 2, 4, 5), (1, 1, 1, 1, 1), (3, 5, 3, 7, 5), (2, 9, 16, 64, 9)])
def test_qk_norm_backward(shape, normalised, dtype):
    inputs = qk_norm_backward_inputs(*shape, dtype=dtype, normalised=normalised)
    check(ops.qk_norm_backward, inputs, torch_path(ops.qk_norm_backward))


def test_qk_norm_backward_of_a_clamped_norm():
    grad_q, grad_k, grad_v, qkv, scale = qk_norm_backward_inputs()
    inputs = grad_q, grad_k, grad_v, qkv * 1e-14, scale
    ours, _ = ops.qk_norm_backward(*on_device(inputs), impl="triton")
    expected, _ = ops.qk_norm_backward(*double(inputs))
    torch.testing.assert_close(ours.cpu().double(), expected, rtol=1e-5, atol=0)


# Attention

PYRAMID = [0, 1, 5, 14, 30, 55, 91, 155]  # scales that are merged, one that is a tile of its own, one of two tiles


@each_dtype
@pytest.mark.parametrize("start", BOUNDARIES[:-1])
@pytest.mark.parametrize("head_dim", [32, 64, 128, 7])
def test_attention(start, head_dim, dtype):
    inputs = attention_inputs(head_dim=head_dim, start=start, dtype=dtype)
    attention = torch_free(ops.scale_causal_attention, softmax_scale=0.3)
    check(attention, inputs, lambda *args: plain_attention(*args, 0.3))


def torch_free(op, **options):
    """The op with some options given."""
    return lambda *inputs, impl: op(*inputs, **options, impl=impl)


@each_dtype
@pytest.mark.parametrize("start", [0, 91])
def test_attention_of_scales_merged_and_single(start, dtype):
    inputs = attention_inputs(1, 1, 32, PYRAMID, start, dtype=dtype)
    check(torch_free(ops.scale_causal_attention, softmax_scale=1.0), inputs, lambda *args: plain_attention(*args, 1.0))


@pytest.mark.parametrize(("rows", "heads"), [(0, 1), (1, 3), (9, 1)])
@pytest.mark.parametrize("boundaries", [[0, 1], [0, 3], [0, 1, 2, 3, 10]])
def test_attention_of_odd_shapes(rows, heads, boundaries):
    inputs = attention_inputs(rows, heads, 16, boundaries, boundaries[-2])
    check(torch_free(ops.scale_causal_attention, softmax_scale=2.0), inputs, lambda *args: plain_attention(*args, 2.0))


@pytest.fixture
def rows_together(monkeypatch):
    """Few rows too stand together in a tile."""
    monkeypatch.setattr("varlik.kernels.scale_causal_attention.BUSY", 0)


@pytest.mark.usefixtures("rows_together")
def test_attention_is_not_touched_by_other_rows_of_a_tile():
    q, k_pages, v_pages, slots, _ = attention_inputs(4, 1, 16, start=5)
    expected = plain_attention(q, k_pages, v_pages, slots, BOUNDARIES, 0.5)
    for bad in (math.nan, math.inf):
        for pages in (k_pages, v_pages):
            spoiled = [x.clone() for x in (k_pages, v_pages)]
            spoiled[pages is v_pages][slots[1]] = bad
            inputs = on_device((q, *spoiled, slots, BOUNDARIES))
            ours = ops.scale_causal_attention(*inputs, softmax_scale=0.5, impl="triton").cpu()
            torch.testing.assert_close(ours[[0, 2, 3]], expected[[0, 2, 3]], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("rows_together")
@pytest.mark.parametrize("rows", [2, 9])
@pytest.mark.parametrize("shared", [0, 5, 14])
def test_attention_of_rows_that_share_pages(rows, shared):
    q, k_pages, v_pages, slots, _ = attention_inputs(rows, 2, 16, start=5)
    slots[:, :shared] = slots[:1, :shared].clone()
    inputs = q, k_pages, v_pages, slots, BOUNDARIES
    check(torch_free(ops.scale_causal_attention, softmax_scale=0.5), inputs, lambda *args: plain_attention(*args, 0.5))
    # Bit for bit what each row gets alone.
    whole = ops.scale_causal_attention(*on_device(inputs), softmax_scale=0.5, impl="triton")
    for row in range(rows):
        alone = on_device((q[row : row + 1], k_pages, v_pages, slots[row : row + 1], BOUNDARIES))
        one = ops.scale_causal_attention(*alone, softmax_scale=0.5, impl="triton")
        assert torch.equal(one[0], whole[row])


def test_attention_to_rows_side_by_side():
    q, k_pages, v_pages, slots, boundaries = attention_inputs(rows=3, head_dim=16, start=5)
    keys, values = torch.stack((k_pages[slots.flatten()], v_pages[slots.flatten()]), dim=1).to(DEVICE).unbind(1)
    ours = ops.scale_causal_attention(q.to(DEVICE), keys, values, None, boundaries, softmax_scale=0.7, impl="triton")
    paged = on_device((q, k_pages, v_pages, slots, boundaries))
    assert torch.equal(ours, ops.scale_causal_attention(*paged, softmax_scale=0.7, impl="triton"))


def test_attention_split_over_calls_is_bitwise_the_same():
    q, k_pages, v_pages, slots, _ = attention_inputs(2, 1, 32, PYRAMID)
    device = on_device((q, k_pages, v_pages, slots))
    whole = ops.scale_causal_attention(*device, PYRAMID, softmax_scale=1.0, impl="triton")
    parts = []
    for a, b in ((0, 5), (5, 30), (30, 155)):
        cut = device[0][:, a:b], device[1], device[2], device[3][:, :b], [c for c in PYRAMID if c <= b]
        parts.append(ops.scale_causal_attention(*cut, softmax_scale=1.0, impl="triton"))
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_attention_with_extreme_logits():
    q, *rest = attention_inputs(head_dim=16)
    inputs = (1e4 * q, *rest)
    check(torch_free(ops.scale_causal_attention, softmax_scale=1.0), inputs, lambda *args: plain_attention(*args, 1.0))


@each_dtype
@pytest.mark.parametrize(
    ("rows", "heads", "head_dim", "boundaries", "start"),
    [
        (2, 2, 16, BOUNDARIES, 0),
        (2, 1, 32, BOUNDARIES, 5),
        (1, 1, 7, [0, 1], 0),
        (1, 1, 64, PYRAMID, 0),
        (1, 2, 128, [0, 4, 40], 4),
    ],
)
def test_attention_backward(rows, heads, head_dim, boundaries, start, dtype):
    inputs = attention_backward_inputs(rows, heads, head_dim, boundaries, start, dtype=dtype)
    options = {"softmax_scale": 0.2}
    backward = ops.scale_causal_attention_backward
    check(torch_free(backward, **options), inputs, torch_path(backward, **options))


# linear


@each_dtype
@pytest.mark.parametrize("activation", ["none", "gelu_tanh"])
@pytest.mark.parametrize(
    "shape", [(3, 5, 16, 24), (1, 1, 1, 1), (2, 3, 130, 9), (0, 3, 8, 2), (2, 0, 8, 2), (1, 140, 70, 150)]
)
def test_linear(shape, activation, dtype):
    inputs = linear_inputs(*shape, dtype=dtype)
    fixed = torch_free(ops.linear, activation=activation)
    check(fixed, inputs, lambda *args: plain_linear(*args, activation))
    x, weight, bias = inputs
    turned = x, weight.t().contiguous().t(), bias
    check(fixed, turned, lambda *args: plain_linear(*args, activation), guard=False)


def test_gelu_far_from_zero():
    x = torch.linspace(-40, 40, 161).view(1, 161, 1)
    weight, bias = torch.ones(1, 1), torch.zeros(1)
    ours = ops.linear(*on_device((x, weight, bias)), activation="gelu_tanh", impl="triton").cpu()
    exact = plain_linear(x.double(), weight.double(), bias.double(), "gelu_tanh")
    assert (ours - exact).abs().max() <= 1e-6 * exact.abs().max()


@each_dtype
def test_linear_does_not_depend_on_other_rows(dtype):
    x, weight, bias = on_device(linear_inputs(1, 150, 40, 20, dtype=dtype), guard=False)
    whole = ops.linear(x, weight, bias, impl="triton")
    for rows in (slice(0, 1), slice(3, 100), slice(149, 150)):
        assert torch.equal(ops.linear(x[:, rows], weight, bias, impl="triton"), whole[:, rows])


# token_log_prob


@each_dtype
@pytest.mark.parametrize(
    "shape", [(9, 16, 40), (1, 1, 1), (5, 3, 1001), (33, 7, 5), (0, 3, 4), (130, 70, 129), (3, 9, 2500)]
)
def test_token_log_prob(shape, dtype):
    check(ops.token_log_prob, token_log_prob_inputs(*shape, dtype=dtype), plain_token_log_prob)


@each_dtype
def test_token_log_prob_of_targets_at_the_borders_of_tiles(dtype):
    hidden, weight, bias, _ = token_log_prob_inputs(10, 5, 2500, dtype=dtype)
    targets = torch.tensor([0, 31, 32, 63, 64, 127, 128, 1023, 1024, 2499])
    check(ops.token_log_prob, (hidden, weight, bias, targets), plain_token_log_prob)


def test_token_log_prob_of_a_large_vocabulary():
    check(ops.token_log_prob, token_log_prob_inputs(2, 4, 65_536), plain_token_log_prob)


def test_token_log_prob_with_extreme_logits():
    hidden, weight, bias, _ = token_log_prob_inputs(rows=8)
    bias = bias.clone()
    bias[:4] = torch.tensor([1e4, -1e4, 1e4, -math.inf])
    inputs = hidden, weight, bias, torch.arange(8)
    ours = ops.token_log_prob(*on_device(inputs), impl="triton").cpu()
    exact, plain = plain_token_log_prob(*double(inputs)), plain_token_log_prob(*inputs)
    assert ours[3] == exact[3] == -math.inf
    finite = exact.isfinite()
    assert_as_good_as_torch(ours[finite], plain[finite], exact[finite])
    # A whole split of -inf before the first finite logit.
    bias = torch.full((2500,), -math.inf)
    bias[2400:] = 0
    inputs = randn(3, 4), randn(2500, 4, seed=1), bias, torch.tensor([2400, 2450, 2499])
    check(ops.token_log_prob, inputs, plain_token_log_prob)


@each_dtype
@pytest.mark.parametrize("boundaries", [BOUNDARIES, [0, 3], [0, 150, 301]])
def test_scale_log_prob(boundaries, dtype):
    inputs = scale_log_prob_inputs(2, 8, 12, boundaries, dtype=dtype)
    check(ops.scale_log_prob, inputs, torch_path(ops.scale_log_prob))


def test_token_log_prob_does_not_depend_on_other_rows():
    hidden, weight, bias, targets = on_device(token_log_prob_inputs(150, 16, 2500), guard=False)
    whole = ops.token_log_prob(hidden, weight, bias, targets, impl="triton")
    for rows in (slice(0, 1), slice(3, 100), slice(149, 150)):
        assert torch.equal(ops.token_log_prob(hidden[rows], weight, bias, targets[rows], impl="triton"), whole[rows])


@each_dtype
@pytest.mark.parametrize("shape", [(9, 16, 40), (1, 1, 1), (70, 33, 130), (0, 3, 4)])
def test_token_log_prob_backward(shape, dtype, monkeypatch):
    monkeypatch.setattr("varlik.ops._registry.CPU_TILE_BYTES", 4000)
    inputs = token_log_prob_backward_inputs(*shape, dtype=dtype)
    backward = ops.token_log_prob_backward
    check(torch_free(backward, weights=True), inputs, torch_path(backward, weights=True))
    alone = backward(*on_device(inputs), impl="triton")
    assert alone[1:] == (None, None)


# nearest_code


@pytest.mark.parametrize("shape", [(50, 6, 40), (1, 1, 1), (0, 2, 3), (130, 32, 300), (21, 16, 129), (5, 70, 33)])
def test_nearest_code(shape):
    vectors, codebook = nearest_code_inputs(*shape)
    ours = ops.nearest_code(*on_device((vectors, codebook)), impl="triton").cpu()
    assert torch.equal(ours, plain_nearest_code(vectors.double(), codebook.double()))


def test_nearest_code_takes_the_first_of_equals():
    vectors, codebook = nearest_code_inputs()
    once = ops.nearest_code(vectors, codebook)
    repeated = on_device((vectors, codebook.repeat(3, 1)))
    assert torch.equal(ops.nearest_code(*repeated, impl="triton").cpu(), once)
    doubled = on_device((vectors, codebook.repeat_interleave(2, dim=0)))
    assert torch.equal(ops.nearest_code(*doubled, impl="triton").cpu(), 2 * once)


# Autograd, addresses beyond 32 bits


def test_gradients_flow_through_the_kernels():
    hidden, weight, bias, targets = on_device(token_log_prob_inputs(), guard=False)
    grads = []
    for impl in ("triton", "torch"):
        inputs = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        ops.token_log_prob(*inputs, targets, impl=impl).sum().backward()
        grads.append([x.grad for x in inputs])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.fixture
def huge():
    """A tensor (3, ..., C) whose rows lie 2^30 elements apart, so that the last is out of reach of 32 bits."""
    if INTERPRETED:  # address space only: what is not touched takes no memory
        storage = torch.UntypedStorage(2 * (2**31 + 2**20))
    else:
        storage = torch.UntypedStorage(2 * (2**31 + 2**20), device="cuda")

    def make(values: Tensor) -> Tensor:
        whole = torch.empty(0, dtype=torch.float16, device=storage.device).set_(storage)
        view = whole.as_strided(values.shape, (2**30, *values[0].contiguous().stride()))
        return view.copy_(values)

    return make


def test_addresses_beyond_32_bits(huge):
    x, scale, shift, row_class = ada_layer_norm_inputs(dtype=torch.float16)
    others = on_device((scale, shift, row_class))
    ours = ops.ada_layer_norm(huge(x), *others, impl="triton").cpu()
    assert_as_good_as_torch(ours, *(plain_ada_layer_norm(*args) for args in each_precision(x, scale, shift, row_class)))

    qkv, scale, k_pages, v_pages, slots = qk_norm_inputs(rows=3, tokens=1, dtype=torch.float16)
    expected = ops.qk_norm(qkv, scale, k_pages, v_pages, slots)
    q = ops.qk_norm(huge(qkv), *on_device((scale, k_pages, v_pages, slots)), impl="triton")
    torch.testing.assert_close(q.cpu(), expected, rtol=2e-3, atol=2e-3)

    hidden, weight, bias, targets = token_log_prob_inputs(rows=3, dtype=torch.float16)
    ours = ops.token_log_prob(huge(hidden), *on_device((weight, bias, targets)), impl="triton").cpu()
    exact = plain_token_log_prob(*double((hidden, weight, bias, targets)))
    torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-3)

    x, weight, bias = linear_inputs(rows=3, tokens=1, dtype=torch.float16)
    ours = ops.linear(huge(x), *on_device((weight, bias)), impl="triton").cpu()
    exact = plain_linear(*double((x, weight, bias)), "none")
    torch.testing.assert_close(ours.double(), exact, rtol=1e-2, atol=1e-2)

    vectors, codebook = randn(3, 6).half(), randn(40, 6, seed=1).half()
    ours = ops.nearest_code(huge(vectors), codebook.to(DEVICE), impl="triton").cpu()
    assert torch.equal(ours, plain_nearest_code(vectors.double(), codebook.double()))


def each_precision(*inputs):
    return inputs, double(inputs)


def test_pages_beyond_32_bits(huge):
    q = randn(2, 1, 2, 16, dtype=torch.float16)
    keys, values = randn(3, 2, 16, seed=1, dtype=torch.float16), randn(3, 2, 16, seed=2, dtype=torch.float16)
    slots = torch.tensor([[2, 0], [1, 2]])
    expected = plain_attention(q.double(), keys.double(), values.double(), slots, [0, 1, 2], 0.5)
    far, near = huge(keys), values.to(DEVICE)
    for pages in ((far, near), (near, far)):
        if pages[0] is near:
            expected = plain_attention(q.double(), values.double(), keys.double(), slots, [0, 1, 2], 0.5)
        ours = ops.scale_causal_attention(
            q.to(DEVICE), *pages, slots.to(DEVICE), [0, 1, 2], softmax_scale=0.5, impl="triton"
        )
        torch.testing.assert_close(ours.cpu().double(), expected, rtol=2e-3, atol=2e-3)
    qkv, scale = randn(3, 1, 96, dtype=torch.float16), randn(2, seed=3).half() + 4
    pages = [randn(3, 2, 16, dtype=torch.float16) for _ in range(2)]
    wanted = ops.qk_norm(qkv, scale, *pages, randint(1, 3, 1) + torch.arange(3)[:, None])
    far = huge(torch.zeros_like(pages[0]))
    q = ops.qk_norm(
        *on_device((qkv, scale)), far, torch.zeros_like(far.contiguous()), torch.arange(3)[:, None].to(DEVICE),
        impl="triton",
    )  # fmt: skip
    torch.testing.assert_close((q.cpu(), far.cpu()), (wanted, pages[0]), rtol=2e-3, atol=2e-3)


def test_refuses_float64():
    with pytest.raises(TypeError, match="float64 has no Triton path"):
        ops.ada_layer_norm(*on_device(double(ada_layer_norm_inputs())), impl="triton")
