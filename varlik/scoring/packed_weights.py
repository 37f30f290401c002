"""The transformer's weights as the engine reads them: plain tensors, no modules, nothing copied that need not be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varlik.models.config import VARConfig
from varlik.models.var import VAR, Block


@dataclass(frozen=True)
class BlockWeights:
    """One block. `qkv` (3C, C) has no bias of its own: q and v get theirs (C,) after it, and k has none.

    `log_scale` (H,) is the learned logarithm of the query scale, None without q/k L2 normalisation.
    """

    qkv: Tensor
    q_bias: Tensor
    v_bias: Tensor
    log_scale: Tensor | None
    proj: tuple[Tensor, Tensor]
    fc1: tuple[Tensor, Tensor]
    fc2: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PackedWeights:
    """All weights that scoring reads, but for those that make class vectors.

    `words` embeds the teacher-forcing input, `positions` (L, C) is the sum of level and position embedding, `start`
    (C,) what position 0 adds to the class embedding, `head` the output projection.
    """

    config: VARConfig
    softmax_scale: float
    blocks: tuple[BlockWeights, ...]
    words: tuple[Tensor, Tensor]
    positions: Tensor
    start: Tensor
    head: tuple[Tensor, Tensor]


def mlp(u: Tensor, block: BlockWeights) -> Tensor:
    """Feed-forward branch of a block: (..., C) -> (..., C)."""
    return F.linear(_gelu_tanh(F.linear(u, *block.fc1)), *block.fc2)


def _gelu_tanh(x: Tensor) -> Tensor:
    """tanh-GELU. On a CPU as x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)): the same function, twice as fast there."""
    if x.device.type != "cpu":
        return F.gelu(x, approximate="tanh")
    slope = 2 * math.sqrt(2 / math.pi)
    return torch.addcmul(x.new_tensor(slope), x, x, value=0.044715 * slope).mul_(x).sigmoid_().mul_(x)


@torch.no_grad()
def pack(var: VAR) -> PackedWeights:
    """The weights of `var`, sharing its memory."""
    config = var.config
    sizes = torch.tensor([p * p for p in config.patch_nums], device=var.pos_start.device)
    levels = var.lvl_embed.weight.detach().repeat_interleave(sizes, dim=0, output_size=config.num_tokens)

    def linear(module: nn.Linear) -> tuple[Tensor, Tensor]:
        return module.weight.detach(), module.bias.detach()

    modules = [cast(Block, block) for block in var.blocks]
    blocks = tuple(
        BlockWeights(
            qkv=block.attn.mat_qkv.weight.detach(),
            q_bias=block.attn.q_bias.detach(),
            v_bias=block.attn.v_bias.detach(),
            log_scale=block.attn.scale_mul_1H11.detach().flatten() if config.attn_l2_norm else None,
            proj=linear(block.attn.proj),
            fc1=linear(block.ffn.fc1),
            fc2=linear(block.ffn.fc2),
        )
        for block in modules
    )
    return PackedWeights(
        config=config,
        softmax_scale=modules[0].attn.softmax_scale,
        blocks=blocks,
        words=linear(var.word_embed),
        positions=levels + var.pos_1LC.detach()[0],
        start=var.pos_start.detach()[0, 0],
        head=linear(var.head),
    )
