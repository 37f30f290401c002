"""The VAR transformer: teacher-forced, class-conditional next-scale prediction (Tian et al., NeurIPS 2024).

One pass over the token maps of an image under one class gives the logits of every token. Position t predicts the token
*at* t, because its input carries only coarser scales. Attention is full inside a scale and causal across scales.

The class enters through its class vectors alone, and those are an argument of `forward`: `VAR.class_vectors` makes them
from labels, and scores can be differentiated with respect to them. Tensor names follow the published checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from varlik.models.config import VARConfig

LAYER_NORM_EPS = 1e-6
MAX_LOG_SCALE = math.log(100)


@dataclass(frozen=True)
class ClassVectors:
    """Everything in the transformer that depends on the class, for N classes or R rows.

    - `blocks` (N, depth, 6, C): per block, in this order: gate of attention, gate of MLP, scale of attention, scale of
      MLP, shift of attention, shift of MLP.
    - `head` (N, 2, C): scale and shift before the output projection.
    - `start` (N, C): the embedding that stands at position 0.
    """

    blocks: Tensor
    head: Tensor
    start: Tensor

    def __getitem__(self, rows: slice | Tensor) -> ClassVectors:
        return ClassVectors(self.blocks[rows], self.head[rows], self.start[rows])

    def __len__(self) -> int:
        return len(self.start)


def _ada_layer_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LayerNorm without affine, then a scale and a shift per row: (R, L, C), (R, C), (R, C) -> (R, L, C)."""
    x = F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)
    return x * (1 + scale).unsqueeze(1) + shift.unsqueeze(1)


class SelfAttention(nn.Module):
    """Multi-head attention, block-causal over scales. (R, L, C) -> (R, L, C)."""

    def __init__(self, config: VARConfig):
        super().__init__()
        width = config.embed_dim
        self.num_heads, self.head_dim, self.l2_norm = config.num_heads, config.head_dim, config.attn_l2_norm
        # With normalised q and k the learned scale replaces 1/sqrt(D); without, VAR uses a quarter of it.
        self.softmax_scale = 1.0 if self.l2_norm else 0.25 / math.sqrt(self.head_dim)
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        if self.l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, self.num_heads, 1, 1), math.log(4)))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, boundaries: tuple[int, ...]) -> Tensor:
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = F.linear(x, self.mat_qkv.weight, bias.to(x.dtype))
        q, k, v = rearrange(qkv, "r l (three h d) -> three r h l d", three=3, h=self.num_heads)
        if self.l2_norm:
            q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp(max=MAX_LOG_SCALE).exp()
            k = F.normalize(k, dim=-1)
            q, k = q.to(v.dtype), k.to(v.dtype)
        # A scale attends to itself and to all coarser ones: no mask when taken scale by scale, and 38 % less work.
        out = [
            F.scaled_dot_product_attention(q[:, :, a:b], k[:, :, :b], v[:, :, :b], scale=self.softmax_scale)
            for a, b in pairwise(boundaries)
        ]
        return self.proj(rearrange(torch.cat(out, dim=2), "r h l d -> r l (h d)"))


class MLP(nn.Module):
    """Two layers with the tanh approximation of GELU between them."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP, each behind an AdaLN and a gate."""

    def __init__(self, config: VARConfig):
        super().__init__()
        width = config.embed_dim
        self.attn = SelfAttention(config)
        self.ffn = MLP(width)
        if config.shared_aln:
            self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, width))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, vectors: Tensor, boundaries: tuple[int, ...]) -> Tensor:
        """`x` (R, L, C), `vectors` (R, 6, C) -> (R, L, C)."""
        gate1, gate2, scale1, scale2, shift1, shift2 = vectors.unbind(1)
        x = x + gate1.unsqueeze(1) * self.attn(_ada_layer_norm(x, scale1, shift1), boundaries)
        return x + gate2.unsqueeze(1) * self.ffn(_ada_layer_norm(x, scale2, shift2))


class AdaLNBeforeHead(nn.Module):
    """Holds the projection that makes the head's scale and shift (in that order)."""

    def __init__(self, width: int):
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))


class VAR(nn.Module):
    """Class-conditional VAR transformer.

    Source: "Visual Autoregressive Modeling", Tian et al. 2024; parity with the published modules is tested.
    """

    def __init__(self, config: VARConfig):
        super().__init__()
        self.config = config
        width = config.embed_dim
        self.word_embed = nn.Linear(config.codebook_dim, width)
        self.class_emb = nn.Embedding(config.num_classes + 1, width)
        self.pos_start = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_1LC = nn.Parameter(torch.zeros(1, config.num_tokens, width))
        self.lvl_embed = nn.Embedding(config.num_scales, width)
        if config.shared_aln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_nm = AdaLNBeforeHead(width)
        self.head = nn.Linear(width, config.vocab_size)

    def class_vectors(self, labels: Tensor) -> ClassVectors:
        """Class vectors of `labels` (N,), int64 in [0, num_classes]; `num_classes` is the null class.

        Raises `TypeError` for labels that are not integers and `ValueError` for another shape or range.
        """
        if labels.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"labels: expected int64, got {labels.dtype}")
        if labels.dim() != 1:
            raise ValueError(f"labels: expected shape (N,), got {tuple(labels.shape)}")
        if (
            not torch.compiler.is_compiling()
            and len(labels)
            and not 0 <= int(labels.min()) <= int(labels.max()) <= self.config.num_classes
        ):
            raise ValueError(f"labels: expected values in [0, {self.config.num_classes}], got {labels.tolist()}")
        start = self.class_emb(labels)
        if self.config.shared_aln:
            shared = self.shared_ada_lin(start).view(-1, 6, self.config.embed_dim)
            blocks = torch.stack([block.ada_gss[0] + shared for block in self.blocks], dim=1)
        else:
            per_block = [block.ada_lin(start).view(-1, 6, self.config.embed_dim) for block in self.blocks]
            blocks = torch.stack(per_block, dim=1)
        head = self.head_nm.ada_lin(start).view(-1, 2, self.config.embed_dim)
        return ClassVectors(blocks, head, start)

    def forward(
        self, class_vectors: ClassVectors, teacher_forcing_input: Tensor, num_scales: int | None = None
    ) -> Tensor:
        """Logits of the first `num_scales` scales (default: all K), float32 or wider.

        `class_vectors` hold R rows; `teacher_forcing_input` is (R, >= L_k - 1, Cvae), where L_k counts the tokens of
        those scales. Returns (R, L_k, V). A truncated pass is an exact prefix of the full one. Differentiable in both
        inputs.

        Raises `ValueError` for a number of scales the model lacks or inputs of another shape.
        """
        hidden = self.hidden(class_vectors, teacher_forcing_input, num_scales)
        return self.logits(class_vectors, hidden)

    def hidden(
        self, class_vectors: ClassVectors, teacher_forcing_input: Tensor, num_scales: int | None = None
    ) -> Tensor:
        """The residual stream after the last block, (R, L_k, C); arguments as in `forward`."""
        boundaries = self._boundaries(class_vectors, teacher_forcing_input, num_scales)
        length = boundaries[-1]
        # Embeddings stay out of autocast: half precision here would cost log-likelihood for no speed.
        with torch.autocast(teacher_forcing_input.device.type, enabled=False):
            words = self.word_embed(teacher_forcing_input[:, : length - 1])
            x = torch.cat((class_vectors.start.unsqueeze(1) + self.pos_start, words), dim=1)
            sizes = torch.tensor([b - a for a, b in pairwise(boundaries)], device=x.device)
            levels = self.lvl_embed.weight[: len(sizes)].repeat_interleave(sizes, dim=0, output_size=length)
            x = x + (levels + self.pos_1LC[0, :length])
        for i, block in enumerate(self.blocks):
            x = block(x, class_vectors.blocks[:, i], boundaries)
        return x

    def logits(self, class_vectors: ClassVectors, hidden: Tensor) -> Tensor:
        """Head of the network: (R, L, C) -> (R, L, V) in float32 or wider."""
        scale, shift = class_vectors.head.unbind(1)
        logits = self.head(_ada_layer_norm(hidden, scale, shift))
        return logits if logits.dtype == torch.float64 else logits.float()

    def _boundaries(self, vectors: ClassVectors, inputs: Tensor, num_scales: int | None) -> tuple[int, ...]:
        config = self.config
        num_scales = config.num_scales if num_scales is None else num_scales
        if not 1 <= num_scales <= config.num_scales:
            raise ValueError(f"num_scales: expected 1 to {config.num_scales}, got {num_scales}")
        boundaries = config.boundaries[: num_scales + 1]
        shape = tuple(inputs.shape)
        if (
            len(shape) != 3
            or shape[0] != len(vectors)
            or shape[1] < boundaries[-1] - 1
            or shape[2] != config.codebook_dim
        ):
            raise ValueError(
                f"teacher_forcing_input: expected ({len(vectors)}, at least {boundaries[-1] - 1}, "
                f"{config.codebook_dim}), got {shape}"
            )
        return boundaries

    @torch.no_grad()
    def reset_parameters(self, gate: float = 0.0) -> None:
        """Initialise for training: truncated normals of variance 1/(3C), smaller where branches join the stream.

        `gate` is the starting value of the AdaLN gates, the same for every class.
        """
        config = self.config
        std = math.sqrt(1 / (3 * config.embed_dim))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        for parameter in (self.pos_start, self.pos_1LC):
            nn.init.trunc_normal_(parameter, std=std)
        for block in self.blocks:
            for output in (block.attn.proj, block.ffn.fc2):
                output.weight.div_(math.sqrt(2 * config.depth))
            if config.shared_aln:
                nn.init.trunc_normal_(block.ada_gss[:, :, 2:], std=std)
                block.ada_gss[:, :, :2] = gate
            else:
                block.ada_lin[1].weight.mul_(0.5)
                block.ada_lin[1].bias[: 2 * config.embed_dim] = gate
        self.head.weight.mul_(0.02)
        self.head_nm.ada_lin[1].weight.mul_(0.5)
