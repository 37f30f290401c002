"""The problems whose kernels are compiled and looked at: every launcher, in the shapes of models and their variants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from varlik.kernels import (
    _launch,
    ada_layer_norm,
    linear,
    nearest_code,
    qk_norm,
    scale_causal_attention,
    scale_causal_attention_backward,
    token_log_prob,
)
from varlik.kernels._launch import Launch
from varlik.kernels._tiles import Limits

BOUNDARIES = (0, 1, 5, 14, 30, 55, 91, 155, 255, 424, 680)
SCORED = 6  # scales that are there already, where a problem continues
EPS = 1e-6
# What the transformer gets where nothing else is said.
ROWS, TOKENS, LENGTH = 8, BOUNDARIES[-1] - BOUNDARIES[SCORED], BOUNDARIES[-1]
MANY_ROWS = 4096  # so many that tiles of attention take several

empty = partial(torch.empty, device="meta")


@dataclass(frozen=True)
class Model:
    """Sizes that a kernel can see; codes are those of the vocabulary."""

    name: str
    heads: int
    head_dim: int
    codes: int
    code_dim: int = 32

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


VAR_D16 = Model("var-d16", heads=16, head_dim=64, codes=4096)
BUNDLED = Model("bundled", heads=4, head_dim=32, codes=256)
USUAL = (VAR_D16, BUNDLED)
OTHERS = (
    Model("var-d30", heads=30, head_dim=64, codes=4096),  # a width that is no power of two
    Model("wide heads", heads=16, head_dim=128, codes=4096, code_dim=64),
    Model("large vocabulary", heads=16, head_dim=64, codes=65_536),
)

Case = tuple[str, Callable[..., Any], tuple[Any, ...]]


def recorded(model: Model, dtype: torch.dtype, limits: Limits) -> Iterator[tuple[str, Launch]]:
    """What each launch is for, and the launch, for all kernels on tensors of `dtype` where they have a choice."""
    for cases in (_norm_cases, _head_norm_cases, _attention_cases, _linear_cases, _vocabulary_cases):
        for label, launcher, arguments in cases(model, dtype):
            with _launch.recording(limits) as launches:
                launcher(*arguments)
            for launch in launches:
                yield f"{model.name}, {label}", launch


def _norm_cases(model: Model, dtype: torch.dtype) -> Iterator[Case]:
    """AdaLN: the stream is float32, class vectors lie in a table of all blocks or one row for each row."""
    stream = empty(ROWS, TOKENS, model.width, dtype=torch.float32)
    branch = stream.to(dtype)
    table = empty(100, 6, model.width, dtype=torch.float32)[:, 1]
    vectors = empty(ROWS, 6, model.width, dtype=torch.float32)[:, 1]
    index = empty(ROWS, dtype=torch.int64)
    plain, residual = ada_layer_norm.ada_layer_norm, ada_layer_norm.residual_ada_layer_norm
    backward = ada_layer_norm.ada_layer_norm_backward
    yield "row_class", plain, (stream, table, table, index, None, EPS, dtype)
    yield "shared input", plain, (stream, vectors, vectors, None, index, EPS, dtype)
    yield "narrow stream", plain, (branch, table, table, index, None, EPS, dtype)
    yield "residual, row_class", residual, (stream, branch, table, table, table, index, None, EPS, dtype)
    yield "residual, shared input", residual, (stream, branch, vectors, vectors, vectors, None, index, EPS, dtype)
    yield "residual, row_class", backward, (stream, branch, stream, branch, table, table, index, EPS)
    yield "no branch", backward, (None, branch, stream, None, None, vectors, None, EPS)


def _head_norm_cases(model: Model, dtype: torch.dtype) -> Iterator[Case]:
    heads = (model.heads, model.head_dim)
    pages, slots = empty(ROWS * LENGTH, 2, *heads, dtype=dtype), empty(ROWS, LENGTH, dtype=torch.int64)
    qkv, scale = empty(ROWS, TOKENS, 3 * model.width, dtype=dtype), empty(model.heads, dtype=torch.float32)
    yield "slots", qk_norm.qk_norm, (qkv, scale, pages[:, 0], pages[:, 1], slots)
    yield "side by side, not normalised", qk_norm.qk_norm, (qkv, None, pages[:, 0], pages[:, 1], None)
    grads = (empty(ROWS, TOKENS, *heads, dtype=dtype), *[empty(ROWS * LENGTH, *heads, dtype=dtype)] * 2)
    yield "normalised", qk_norm.qk_norm_backward, (*grads, qkv, scale)
    yield "not normalised", qk_norm.qk_norm_backward, (*grads, qkv, None)


def _attention_cases(model: Model, dtype: torch.dtype) -> Iterator[Case]:
    attention = scale_causal_attention.scale_causal_attention
    heads = (model.heads, model.head_dim)
    pages, slots = empty(MANY_ROWS * LENGTH, 2, *heads, dtype=dtype), empty(MANY_ROWS, LENGTH, dtype=torch.int64)
    keys = pages[:, 0], pages[:, 1]
    q = empty(MANY_ROWS, LENGTH, *heads, dtype=dtype)
    yield "slots", attention, (q[:, -TOKENS:], *keys, slots, BOUNDARIES, 1.0)
    yield "side by side", attention, (q, *keys, None, BOUNDARIES, 1.0)
    # Few tokens: several rows share a tile where there are many, and not where there are few.
    for scales in range(1, SCORED + 1):
        first, end = BOUNDARIES[scales - 1 : scales + 1]
        cut = BOUNDARIES[: scales + 1]
        yield f"slots, scale {scales} alone", attention, (q[:, first:end], *keys, slots[:, :end], cut, 1.0)
        yield f"slots, to scale {scales}", attention, (q[:, :end], *keys, slots[:, :end], cut, 1.0)
        few = empty(MANY_ROWS * end, *heads, dtype=dtype)
        yield f"side by side, to scale {scales}", attention, (q[:, :end], few, few, None, cut, 1.0)
    backward = scale_causal_attention_backward.scale_causal_attention_backward
    side_by_side = [empty(MANY_ROWS * LENGTH, *heads, dtype=dtype)] * 2
    yield "side by side", backward, (q, q, *side_by_side, BOUNDARIES, 1.0)


def _linear_cases(model: Model, dtype: torch.dtype) -> Iterator[Case]:
    """The layers of a block, and their gradients: products with the transposed weights."""
    c = model.width
    for name, outputs, inputs in (("qkv", 3 * c, c), ("proj", c, c), ("fc1", 4 * c, c), ("fc2", c, 4 * c)):
        weight, bias = empty(outputs, inputs, dtype=dtype), empty(outputs, dtype=dtype)
        activation = "gelu_tanh" if name == "fc1" else "none"
        yield name, linear.linear, (empty(ROWS, TOKENS, inputs, dtype=dtype), weight, bias, activation)
        no_bias = empty(inputs, dtype=dtype)
        grad = empty(ROWS, TOKENS, outputs, dtype=dtype)
        yield f"gradient of {name}", linear.linear, (grad, weight.T, no_bias, "none")


def _vocabulary_cases(model: Model, dtype: torch.dtype) -> Iterator[Case]:
    hidden, targets = empty(ROWS, TOKENS, model.width, dtype=dtype), empty(ROWS, TOKENS, dtype=torch.int64)
    head = empty(model.codes, model.width, dtype=dtype), empty(model.codes, dtype=torch.float32)
    flat = hidden.flatten(0, 1), *head, targets.flatten()
    after = tuple(b - BOUNDARIES[SCORED] for b in BOUNDARIES[SCORED:])
    yield "tokens", token_log_prob.token_log_prob, flat
    yield "scales", token_log_prob.scale_log_prob, (hidden, *head, targets, after)
    grad = empty(ROWS * TOKENS, dtype=torch.float32)
    yield "gradient", token_log_prob.token_log_prob_backward, (grad, *flat, False, 8192)
    vectors = empty(ROWS * LENGTH, model.code_dim, dtype=torch.float32)
    yield "codes", nearest_code.nearest_code, (vectors, empty(model.codes, model.code_dim, dtype=torch.float32))
