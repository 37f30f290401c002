"""The transformer's weights as the engine reads them: plain tensors, no modules, nothing copied that need not be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varlik import ops
from varlik.models.config import VARConfig
from varlik.models.var import MAX_LOG_SCALE, VAR, Block
from varlik.scoring.options import Compute

# Matrices laid out as (in, out) are multiplied up to 1.08 times faster on a CPU; below this size the copy costs little.
COPIED_PARAMETERS = 2**23

# Hidden activations of one part of the MLP: what stays in a CPU's caches, but with tokens enough to make good use of a
# weight.
HIDDEN_BYTES = {"cpu": 6 << 20, "cuda": 256 << 20}
MIN_HIDDEN_TOKENS = 2048

# GELU by its tanh approximation is x sigmoid(GELU_LINEAR x + GELU_CUBIC x^3).
GELU_LINEAR = 2 * math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715 * GELU_LINEAR
GELU_ELEMENTS = 2**16  # at a time: what one pass writes is still in a core's caches in the next


@dataclass(frozen=True)
class BlockWeights:
    """One block; linear layers as (weight, bias).

    `qkv` is the joint projection (3C, C), whose bias is zero for k. `q_scale` (H,) is what normalised queries are
    multiplied by, None without q/k L2 normalisation.
    """

    qkv: tuple[Tensor, Tensor]
    q_scale: Tensor | None
    proj: tuple[Tensor, Tensor]
    fc1: tuple[Tensor, Tensor]
    fc2: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PackedWeights:
    """All weights that scoring reads, but for those that make class vectors, and how to compute with them.

    `words` embeds the teacher-forcing input, `positions` (L, C) is the sum of level and position embedding, `start`
    (C,) what position 0 adds to the class embedding, `head` the output projection. Matrices of blocks and head are in
    `compute.dtype`, with the biases of the blocks; all else is in the dtype of the model.
    """

    config: VARConfig
    compute: Compute
    softmax_scale: float
    blocks: tuple[BlockWeights, ...]
    words: tuple[Tensor, Tensor]
    positions: Tensor
    start: Tensor
    head: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class BlockActivations:
    """What a backward pass reads of one block, all (R, T, ...), beside what `attend` keeps itself.

    `qkv` (3C) is the joint projection, `branch` and `stream` (C) are attention's branch and the residual stream after
    it, `slope` (4C) the derivative of GELU, `mlp_branch` and `end` (C) the MLP's branch and the stream after it.
    """

    qkv: Tensor
    branch: Tensor
    stream: Tensor
    slope: Tensor
    mlp_branch: Tensor
    end: Tensor


def run_blocks(
    weights: PackedWeights,
    x: Tensor,
    vectors: Tensor,
    row_class: Tensor | None,
    attend: Callable[[int, Tensor], Tensor],
    row_input: Tensor | None = None,
    tape: list[BlockActivations] | None = None,
    blocks: range | None = None,
) -> tuple[Tensor, Tensor]:
    """From the residual stream `x` through `blocks` (default: all): the stream after them, and its norm.

    `x` (M, T, C) is the stream at the start, of which row r reads `row_input[r]`, or the r-th without `row_input`.
    `vectors` (N, 6 depth + 2, C) are class vectors as `ClassTables` holds them, of which row r takes `row_class[r]`,
    or the r-th without `row_class`. `attend` is called once for each block, with its number and its joint projection
    (R, T, 3C), and returns (R, T, C). The norm, (R, T, C) in `weights.compute.dtype`, is what the next block or the
    head reads. Activations are appended to `tape`, if there is one.
    """
    dtype, impl = weights.compute.dtype, weights.compute.impl
    linear = partial(ops.linear, impl=weights.compute.product_impl)
    norm = partial(ops.residual_ada_layer_norm, dtype=dtype, impl=impl)
    blocks = range(len(weights.blocks)) if blocks is None else blocks
    # In the order of `ClassVectors.blocks`: gates, scales, shifts of attention and MLP.
    first = 6 * blocks.start
    u = ops.ada_layer_norm(
        x, vectors[:, first + 2], vectors[:, first + 4], row_class, row_input=row_input, dtype=dtype, impl=impl
    )
    for i in blocks:
        block = weights.blocks[i]
        gate1, gate2, _, scale2, _, shift2 = vectors[:, 6 * i : 6 * i + 6].unbind(1)
        qkv = linear(u, *block.qkv)
        branch = linear(attend(i, qkv), *block.proj)
        x, u = norm(x, branch, gate1, scale2, shift2, row_class, row_input=row_input)
        row_input = None  # from here on every row has a stream of its own
        scale, shift = next_norm(vectors, i)
        if tape is None:
            x, u = norm(x, _mlp(u, block, linear), gate2, scale, shift, row_class)
        else:
            hidden, slope = _gelu_with_slope(linear(u, *block.fc1))
            mlp_branch = linear(hidden, *block.fc2)
            end, u = norm(x, mlp_branch, gate2, scale, shift, row_class)
            tape.append(BlockActivations(qkv, branch, x, slope, mlp_branch, end))
            x = end
    return x, u


def next_norm(vectors: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Scale and shift of the norm after a block, (N, C) each: those of the next block's attention, or of the head."""
    if 6 * block + 8 == vectors.shape[1]:
        return vectors[:, -2], vectors[:, -1]
    return vectors[:, 6 * block + 8], vectors[:, 6 * block + 10]


def _mlp(u: Tensor, block: BlockWeights, linear: Callable[..., Tensor]) -> Tensor:
    """Feed-forward branch of a block, (R, T, C) -> (R, T, C), a part of the tokens at a time.

    The hidden activation is the widest there is: on a CPU, parts of it fit the caches; anywhere, they bound the memory.
    """
    tokens = u.flatten(0, 1).unsqueeze(0)
    cached = HIDDEN_BYTES.get(u.device.type, HIDDEN_BYTES["cpu"]) // (len(block.fc1[1]) * u.element_size())
    parts = tokens.chunk(max(1, -(-tokens.shape[1] // max(MIN_HIDDEN_TOKENS, cached))), dim=1)
    out = [linear(linear(part, *block.fc1, activation="gelu_tanh"), *block.fc2) for part in parts]
    return torch.cat(out, dim=1).view(u.shape) if len(out) > 1 else out[0].view(u.shape)


def _gelu_with_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    """GELU of `x` by its tanh approximation, and its derivative, which may take the place of `x`.

    On a CPU torch takes longer for either than for the matrix product that makes `x`. There both come from one sigmoid
    s = sigmoid(z), z = x (GELU_LINEAR + GELU_CUBIC x^2), in place of a tanh: x s and s + x s (1 - s) z'.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return F.gelu(x, approximate="tanh"), torch.ops.aten.gelu_backward(x.new_ones(()), x, approximate="tanh")
    value, linear, one = torch.empty_like(x), x.new_tensor(GELU_LINEAR), x.new_ones(())
    for part, out in zip(x.view(-1).split(GELU_ELEMENTS), value.view(-1).split(GELU_ELEMENTS), strict=True):
        s = torch.addcmul(linear, part, part, value=GELU_CUBIC).mul_(part).sigmoid_()
        torch.mul(part, s, out=out)
        rise = torch.addcmul(linear, part, part, value=3 * GELU_CUBIC).mul_(out)
        torch.lerp(rise, one, s, out=part)
    return value, x


@torch.no_grad()
def pack(var: VAR, compute: Compute) -> PackedWeights:
    """The weights of `var`, sharing its memory but for vectors, what has another dtype than its weights and, on a CPU,
    the matrices of a small model.
    """
    config = var.config
    parameters = sum(parameter.numel() for parameter in var.blocks.parameters())
    copied = var.pos_start.device.type == "cpu" and parameters <= COPIED_PARAMETERS
    sizes = torch.tensor([p * p for p in config.patch_nums], device=var.pos_start.device)
    levels = var.lvl_embed.weight.detach().repeat_interleave(sizes, dim=0, output_size=config.num_tokens)

    def matrix(weight: Tensor) -> Tensor:
        weight = weight.detach().to(compute.dtype)
        return weight.t().contiguous().t() if copied else weight

    def linear(module: nn.Linear) -> tuple[Tensor, Tensor]:
        return matrix(module.weight), module.bias.detach().to(compute.dtype)

    def qkv_bias(block: Block) -> Tensor:
        q_bias, v_bias = block.attn.q_bias.detach(), block.attn.v_bias.detach()
        return torch.cat((q_bias, torch.zeros_like(q_bias), v_bias)).to(compute.dtype)

    modules = [cast(Block, block) for block in var.blocks]
    blocks = tuple(
        BlockWeights(
            qkv=(matrix(block.attn.mat_qkv.weight), qkv_bias(block)),
            q_scale=block.attn.scale_mul_1H11.detach().flatten().clamp(max=MAX_LOG_SCALE).exp()
            if config.attn_l2_norm
            else None,
            proj=linear(block.attn.proj),
            fc1=linear(block.ffn.fc1),
            fc2=linear(block.ffn.fc2),
        )
        for block in modules
    )
    return PackedWeights(
        config=config,
        compute=compute,
        softmax_scale=modules[0].attn.softmax_scale,
        blocks=blocks,
        words=(var.word_embed.weight.detach(), var.word_embed.bias.detach()),
        positions=levels + var.pos_1LC.detach()[0],
        start=var.pos_start.detach()[0, 0],
        head=(matrix(var.head.weight), var.head.bias.detach()),
    )
