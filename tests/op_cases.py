"""Inputs of the ops and what plain torch gives for them, for the tests of the torch path and of the kernels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6
BOUNDARIES = [0, 1, 5, 14]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 7919 * len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def randint(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def strided(x: Tensor) -> Tensor:
    """The same values, in a tensor that is contiguous in no dimension."""
    holder = torch.full([2 * n + 1 for n in reversed(x.shape)], float("nan") if x.is_floating_point() else 10**9)
    view = holder.to(x.dtype).permute(*reversed(range(x.dim())))[tuple(slice(1, None, 2) for _ in x.shape)]
    return view.copy_(x)


def double(inputs: tuple) -> tuple:
    return tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


def assert_as_good_as_torch(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Error against float64 at most twice that of plain torch, plus rounding of the output."""
    assert exact.dtype == torch.float64
    assert ours.shape == exact.shape
    assert ours.is_contiguous()
    if not ours.numel():
        return
    # In float64 the reference is no more exact than ours: both err by a few roundings.
    roundings = 16 if ours.dtype == torch.float64 else 1
    rounding = roundings * torch.finfo(ours.dtype).eps * exact.abs().max()
    budget = 2 * (plain.double() - exact).abs().max() + rounding
    error = (ours.double() - exact).abs()
    assert error.max() <= budget, f"error {error.max():.3e}, budget {budget:.3e}, first at {error.argmax()}"


# Plain torch, in the dtype of its inputs.


def plain_ada_layer_norm(x, scale, shift, row_class):
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[row_class])[:, None] + shift[row_class][:, None]


def plain_residual_ada_layer_norm(x, branch, gate, scale, shift, row_class):
    y = x + gate[row_class][:, None] * branch
    return y, plain_ada_layer_norm(y, scale, shift, row_class)


def plain_qkv(qkv, scale, heads):
    """q, k and v, (R, T, H, D) each."""
    rows, tokens, width = qkv.shape
    q, k, v = qkv.reshape(rows, tokens, 3, heads, width // (3 * heads)).unbind(2)
    if scale is not None:
        q = F.normalize(q, dim=-1) * scale[:, None]
        k = F.normalize(k, dim=-1)
    return q, k, v


def plain_attention(q, k_pages, v_pages, slots, boundaries, softmax_scale):
    """With a dense mask."""
    length = slots.shape[1]
    scale_of = torch.bucketize(torch.arange(length), torch.tensor(boundaries[1:-1], dtype=torch.int64), right=True)
    mask = (scale_of[:, None] >= scale_of)[length - q.shape[1] :]
    logits = torch.einsum("rthd,rlhd->rhtl", q, k_pages[slots]) * softmax_scale
    weights = logits.masked_fill(~mask, -math.inf).softmax(-1)
    return torch.einsum("rhtl,rlhd->rthd", weights, v_pages[slots])


def plain_token_log_prob(hidden, weight, bias, targets):
    return F.log_softmax(F.linear(hidden, weight, bias), dim=-1).gather(1, targets[:, None])[:, 0]


def plain_nearest_code(vectors, codebook):
    distance = vectors.square().sum(1, keepdim=True) + codebook.square().sum(1)
    return torch.addmm(distance, vectors, codebook.T, alpha=-2).argmin(1)


# Inputs of each op.


def ada_layer_norm_inputs(rows=3, tokens=5, width=24, classes=4, dtype=torch.float32):
    return (
        3 * randn(rows, tokens, width, dtype=dtype) + 1,
        randn(classes, width, seed=1, dtype=dtype),
        randn(classes, width, seed=2, dtype=dtype),
        randint(classes, rows),
    )


def residual_inputs(rows=3, tokens=5, width=24, classes=4, dtype=torch.float32):
    x, scale, shift, row_class = ada_layer_norm_inputs(rows, tokens, width, classes, dtype)
    branch, gate = randn(rows, tokens, width, seed=3, dtype=dtype), randn(classes, width, seed=4, dtype=dtype)
    return x, branch, gate, scale, shift, row_class


def linear_inputs(rows=3, tokens=5, width=16, out=24, dtype=torch.float32):
    return (
        randn(rows, tokens, width, dtype=dtype),
        randn(out, width, seed=1, dtype=dtype),
        randn(out, seed=2, dtype=dtype),
    )


def plain_linear(x, weight, bias, activation):
    y = F.linear(x, weight, bias)
    return F.gelu(y, approximate="tanh") if activation == "gelu_tanh" else y


def qk_norm_inputs(rows=2, tokens=3, heads=2, head_dim=4, dtype=torch.float32, normalised=True):
    length = tokens + 2  # of which the first two are there already
    width, pages = heads * head_dim, rows * length + 5
    slots = torch.randperm(pages, generator=torch.Generator().manual_seed(5))[: rows * length].view(rows, length)
    return (
        randn(rows, tokens, 3 * width, dtype=dtype),
        randn(heads, seed=3, dtype=dtype) + 4 if normalised else None,
        torch.full((pages, heads, head_dim), math.nan, dtype=dtype),
        torch.full((pages, heads, head_dim), math.nan, dtype=dtype),
        slots,
    )


def attention_inputs(rows=2, heads=2, head_dim=8, boundaries=BOUNDARIES, start=0, dtype=torch.float32):
    length = boundaries[-1]
    pages = rows * length + 3
    slots = torch.randperm(pages, generator=torch.Generator().manual_seed(6))[: rows * length].view(rows, length)
    q = randn(rows, length - start, heads, head_dim, dtype=dtype)
    pages_of = [torch.full((pages, heads, head_dim), math.nan, dtype=dtype) for _ in range(2)]
    for i, tensor in enumerate(pages_of):
        tensor[slots] = randn(rows, length, heads, head_dim, seed=i + 1, dtype=dtype)
    return q, *pages_of, slots, boundaries


def token_log_prob_inputs(rows=9, width=16, vocabulary=40, dtype=torch.float32):
    return (
        randn(rows, width, dtype=dtype),
        randn(vocabulary, width, seed=1, dtype=dtype),
        randn(vocabulary, seed=2, dtype=dtype),
        randint(vocabulary, rows),
    )


def nearest_code_inputs(rows=50, width=6, vocabulary=40, dtype=torch.float32):
    return randn(rows, width, dtype=dtype), randn(vocabulary, width, seed=1, dtype=dtype)


def scale_log_prob_inputs(rows=3, width=16, vocabulary=40, boundaries=BOUNDARIES, dtype=torch.float32):
    hidden, weight, bias, targets = token_log_prob_inputs(rows * boundaries[-1], width, vocabulary, dtype)
    shape = rows, boundaries[-1]
    return hidden.view(*shape, width), weight, bias, targets.view(shape), boundaries


def ada_layer_norm_backward_inputs(rows=3, tokens=5, width=24, classes=4, dtype=torch.float32):
    x, branch, gate, scale, _, row_class = residual_inputs(rows, tokens, width, classes, dtype)
    grads = randn(rows, tokens, width, seed=5, dtype=dtype), randn(rows, tokens, width, seed=6, dtype=dtype)
    return *grads, x, branch, gate, scale, row_class


def qk_norm_backward_inputs(rows=2, tokens=3, heads=2, head_dim=4, length=5, dtype=torch.float32, normalised=True):
    qkv, scale, *_ = qk_norm_inputs(rows, tokens, heads, head_dim, dtype, normalised)
    keys = [randn(rows * length, heads, head_dim, seed=i, dtype=dtype) for i in (7, 8)]
    return randn(rows, tokens, heads, head_dim, seed=6, dtype=dtype), *keys, qkv, scale


def attention_backward_inputs(rows=2, heads=2, head_dim=8, boundaries=BOUNDARIES, start=0, dtype=torch.float32):
    q, k_pages, v_pages, slots, _ = attention_inputs(rows, heads, head_dim, boundaries, start, dtype)
    keys = k_pages[slots.flatten()], v_pages[slots.flatten()]
    return randn(*q.shape, seed=9, dtype=dtype), q, *keys, boundaries


def token_log_prob_backward_inputs(rows=9, width=16, vocabulary=40, dtype=torch.float32):
    return randn(rows, seed=4, dtype=torch.float32), *token_log_prob_inputs(rows, width, vocabulary, dtype)
