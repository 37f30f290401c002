"""The transformer forwards and backwards, for the gradient of log-likelihoods with respect to what a class brings in.

A class enters a row's tokens from position 1 on in two ways: by its class vectors, and by the key and value of position
0 in every block. Both are inputs here, and both get a gradient; weights get none. The forward pass is the engine's own
(`run_blocks`), which keeps what the way back reads; or, to bound memory, it keeps the stream between blocks alone and
every block is run once more on the way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from varlik import ops
from varlik.scoring.class_tables import Conditions
from varlik.scoring.packed_weights import BlockActivations, PackedWeights, next_norm, run_blocks


@dataclass(frozen=True)
class Pass:
    """A forward pass over R rows, with what its backward pass reads.

    `log_prob` (R, T) of tokens 1 to T; `hidden` (R, T, C) is what the head reads.
    """

    weights: PackedWeights
    at: Conditions
    row_class: Tensor
    targets: Tensor
    boundaries: tuple[int, ...]
    checkpointed: bool
    log_prob: Tensor
    hidden: Tensor
    streams: list[Tensor]  # at the start of each block where checkpointed, else of the first
    tape: list[BlockActivations]
    heads: list[tuple[Tensor, Tensor, Tensor]]  # queries, keys and values of each block


def forward(
    weights: PackedWeights,
    inputs: Tensor,
    targets: Tensor,
    at: Conditions,
    row_class: Tensor,
    checkpointed: bool = False,
) -> Pass:
    """Score tokens 1 to T of R rows, all but position 0's, under the conditions in rows `row_class` (R,) of `at`.

    `inputs` (R, T, Cvae) is their teacher-forcing input, `targets` (R, T) are the tokens; T + 1 is where a scale ends.
    """
    length = targets.shape[1] + 1
    boundaries = tuple(b for b in weights.config.boundaries if b <= length)
    x = ops.linear(inputs, *weights.words, impl=weights.compute.product_impl) + weights.positions[1:length]
    streams: list[Tensor] = [x]
    tape: list[BlockActivations] = []
    heads: list[tuple[Tensor, Tensor, Tensor]] = []
    if checkpointed:
        for i in range(len(weights.blocks)):
            attend = partial(_attend, weights, at, row_class, boundaries, None)
            x, u = run_blocks(weights, x, at.vectors, row_class, attend, blocks=range(i, i + 1))
            streams.append(x)
    else:
        attend = partial(_attend, weights, at, row_class, boundaries, heads)
        x, u = run_blocks(weights, x, at.vectors, row_class, attend, tape=tape)
    log_prob = ops.token_log_prob(u.flatten(0, 1), *weights.head, targets.flatten(), impl=weights.compute.impl)
    return Pass(
        weights,
        at,
        row_class,
        targets,
        boundaries,
        checkpointed,
        log_prob.view(targets.shape),
        u,
        streams,
        tape,
        heads,
    )


def backward(done: Pass, scales: Sequence[int] | None = None) -> Conditions:
    """Gradient, for every row, of the summed log-probs of the tokens in `scales` (from 2 on; default: all).

    Returns `vectors` (R, 6 depth + 2, C) and `pages` (R, 2 depth, C) in float32 or wider.
    """
    weights, compute = done.weights, done.weights.compute
    rows, tokens = done.targets.shape
    wanted = torch.ones(rows, tokens, dtype=done.log_prob.dtype, device=done.log_prob.device)
    if scales is not None:
        wanted.zero_()
        for scale in scales:
            wanted[:, done.boundaries[scale - 1] - 1 : done.boundaries[scale] - 1] = 1
    grad_hidden, _, _ = ops.token_log_prob_backward(
        wanted.flatten(), done.hidden.flatten(0, 1), *weights.head, done.targets.flatten(), impl=compute.impl
    )
    grad_u = grad_hidden.view(done.hidden.shape)
    grad_x: Tensor = torch.zeros_like(done.streams[0])
    depth, width = len(weights.blocks), weights.config.embed_dim
    vectors = torch.empty(rows, 6 * depth + 2, width, dtype=done.log_prob.dtype, device=grad_u.device)
    pages = torch.empty(rows, 2 * depth, width, dtype=done.log_prob.dtype, device=grad_u.device)
    norm = partial(ops.ada_layer_norm_backward, impl=compute.impl)
    for i in reversed(range(depth)):
        block = weights.blocks[i]
        saved, heads = _again(done, i) if done.checkpointed else (done.tape[i], done.heads[i])
        gate1, gate2, _, scale2, _, _ = done.at.vectors[:, 6 * i : 6 * i + 6].unbind(1)
        next_scale, _ = next_norm(done.at.vectors, i)
        grad_x, grad_branch, found = norm(
            grad_x, grad_u, saved.end, saved.mlp_branch, gate2, next_scale, done.row_class
        )
        last = i + 1 == depth
        vectors[:, 6 * i + 1] = found[:, 0]
        vectors[:, -2 if last else 6 * i + 8] = found[:, 1]
        vectors[:, -1 if last else 6 * i + 10] = found[:, 2]
        grad_hidden = _times(weights, cast(Tensor, grad_branch), block.fc2[0]).mul_(saved.slope)
        grad_u = _times(weights, grad_hidden, block.fc1[0])
        grad_x, grad_branch, found = norm(grad_x, grad_u, saved.stream, saved.branch, gate1, scale2, done.row_class)
        vectors[:, 6 * i] = found[:, 0]
        vectors[:, 6 * i + 3] = found[:, 1]
        vectors[:, 6 * i + 5] = found[:, 2]
        grad_out = _times(weights, cast(Tensor, grad_branch), block.proj[0]).unflatten(-1, heads[0].shape[2:])
        grad_q, grad_k, grad_v = ops.scale_causal_attention_backward(
            grad_out, *heads, done.boundaries, softmax_scale=weights.softmax_scale, impl=compute.impl
        )
        pages[:, 2 * i] = grad_k.view(rows, tokens + 1, -1)[:, 0]
        pages[:, 2 * i + 1] = grad_v.view(rows, tokens + 1, -1)[:, 0]
        grad_qkv, _ = ops.qk_norm_backward(grad_q, grad_k, grad_v, saved.qkv, block.q_scale, impl=compute.impl)
        grad_u = _times(weights, grad_qkv, block.qkv[0])
        del saved, heads  # before the next block's are made
    _, _, found = norm(None, grad_u, done.streams[0], None, None, done.at.vectors[:, 2], done.row_class)
    vectors[:, 2] = found[:, 1]
    vectors[:, 4] = found[:, 2]
    return Conditions(vectors, pages)


# Activations of the rows that go through at a time. On a CPU, what malloc keeps for the next pass (see `memory`): page
# faults of more than that take longer than larger products save.
GOOD_BYTES = {"cpu": 56 * 2**20, "cuda": 2 * 2**30}


def activation_bytes(weights: PackedWeights, tokens: int, checkpointed: bool) -> int:
    """Memory that a row of `tokens` tokens takes in a forward and a backward pass, without the gradient itself."""
    config, itemsize = weights.config, weights.compute.dtype.itemsize
    # In units of C: the streams in float32; branches, projection, queries, keys, values and hidden in `dtype`.
    block = 2 * 4 + (2 + 3 + 3 + 4) * itemsize
    kept = config.depth * 4 + block if checkpointed else config.depth * block
    # Gradients of stream and branches, of hidden before and after GELU; heads side by side for attention's products.
    at_work = (2 + 12) * 4 + (4 + 4 + 3) * itemsize
    largest = max(b - a for a, b in pairwise(config.boundaries))
    weights_of_heads = 4 * 4 * config.num_heads * min(largest, tokens) * (tokens + 1)
    return tokens * config.embed_dim * (kept + at_work) + weights_of_heads


def _attend(
    weights: PackedWeights,
    at: Conditions,
    row_class: Tensor,
    boundaries: tuple[int, ...],
    heads: list[tuple[Tensor, Tensor, Tensor]] | None,
    i: int,
    qkv: Tensor,
) -> Tensor:
    """Attention of tokens 1 to T over themselves and position 0, whose key and value are given."""
    rows, shape = len(qkv), (weights.config.num_heads, weights.config.head_dim)
    keys, values = (qkv.new_empty(rows, boundaries[-1], *shape) for _ in range(2))
    keys[:, 0] = at.pages[row_class, 2 * i].view(rows, *shape)
    values[:, 0] = at.pages[row_class, 2 * i + 1].view(rows, *shape)
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    q = ops.qk_norm(qkv, weights.blocks[i].q_scale, keys, values, None, impl=weights.compute.impl)
    if heads is not None:
        heads.append((q, keys, values))
    out = ops.scale_causal_attention(
        q, keys, values, None, boundaries, softmax_scale=weights.softmax_scale, impl=weights.compute.impl
    )
    return out.flatten(2)


def _again(done: Pass, i: int) -> tuple[BlockActivations, tuple[Tensor, Tensor, Tensor]]:
    """One block's activations, from the stream before it."""
    tape: list[BlockActivations] = []
    heads: list[tuple[Tensor, Tensor, Tensor]] = []
    attend = partial(_attend, done.weights, done.at, done.row_class, done.boundaries, heads)
    run_blocks(
        done.weights, done.streams[i], done.at.vectors, done.row_class, attend, tape=tape, blocks=range(i, i + 1)
    )
    return tape[0], heads[0]


def _times(weights: PackedWeights, grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient (R, T, in) of a linear layer's input, from that of its output (R, T, out) and its weight (out, in)."""
    if weights.compute.deterministic:
        no_bias = weight.new_zeros(weight.shape[1])
        return ops.linear(grad, weight.T, no_bias, impl=weights.compute.product_impl)
    return torch.matmul(grad, weight)
