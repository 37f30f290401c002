"""The VQ-VAE around the quantiser: an image becomes a feature map, a feature map an image.

A convolutional encoder and decoder of the VQGAN family (Esser et al., CVPR 2021) with the multi-scale residual
quantiser of VAR between them. Tensor names follow the published checkpoint. Classification needs the encoder half
only, so the decoder may be absent.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from varlik.models.config import VQVAEConfig
from varlik.models.quantizer import MultiScaleQuantizer


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two 3x3 convolutions with a residual connection. (B, in, h, w) -> (B, out, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = _norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head attention over the pixels of a feature map. (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = _norm(channels, groups)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (three c) h w -> three b (h w) c", three=3)
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(out, "b (h w) c -> b c h w", h=x.shape[2]))


class Mid(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    """3x3 convolution of stride 2 after one zero row below and one zero column to the right."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, with attention after each where asked for."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, groups: int, attention: bool):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(ResBlock(a, b, groups) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttnBlock(out_channels, groups) for _ in range(num_blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x


class Encoder(nn.Module):
    """(B, in_channels, S, S) -> (B, Cvae, S / downsampling, S / downsampling)."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        widths = [config.channels * m for m in config.channel_multipliers]
        last, groups = len(widths) - 1, config.num_groups
        self.conv_in = nn.Conv2d(config.in_channels, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (before, width) in enumerate(zip([config.channels, *widths], widths, strict=False)):
            attention = i == last and config.attention == "deepest level and mid"
            level = Level(before, width, config.num_res_blocks, groups, attention)
            if i != last:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Mid(widths[-1], groups)
        self.norm_out = _norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], config.codebook_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """(B, Cvae, h, w) -> (B, in_channels, h * downsampling, w * downsampling)."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        widths = [config.channels * m for m in config.channel_multipliers]
        last, groups = len(widths) - 1, config.num_groups
        self.conv_in = nn.Conv2d(config.codebook_dim, widths[-1], 3, padding=1)
        self.mid = Mid(widths[-1], groups)
        self.up = nn.ModuleList()  # stored by level, run from the deepest to the shallowest
        for i, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
            attention = i == last and config.attention == "deepest level and mid"
            level = Level(before, width, config.num_res_blocks + 1, groups, attention)
            if i != 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = _norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VQVAE(nn.Module):
    """Encoder, multi-scale quantiser and, if present, decoder."""

    def __init__(self, config: VQVAEConfig, decoder: bool = True):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.codebook_dim, config.codebook_dim, 3, padding=1)
        self.quantize = MultiScaleQuantizer(config)
        if decoder:
            self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.codebook_dim, 3, padding=1)
            self.decoder = Decoder(config)

    @property
    def has_decoder(self) -> bool:
        """Whether `decode` can be called."""
        return hasattr(self, "decoder")

    def encode(self, pixels: Tensor) -> Tensor:
        """Feature map (B, Cvae, h, w) of `pixels` (B, in_channels, S, S) in [-1, 1].

        Raises `ValueError` for another shape.
        """
        side = self.config.resolution
        expected = (self.config.in_channels, side, side)
        if tuple(pixels.shape[1:]) != expected:
            raise ValueError(f"pixels: expected (B, {', '.join(map(str, expected))}), got {tuple(pixels.shape)}")
        return self.quant_conv(self.encoder(pixels))

    def decode(self, feature_map: Tensor) -> Tensor:
        """Image (B, in_channels, S, S), not clamped, from a quantised feature map (B, Cvae, h, w).

        Raises `ValueError` when the model was loaded without its decoder.
        """
        if not self.has_decoder:
            raise ValueError("this VQ-VAE was loaded without its decoder: it can tokenise but not reconstruct")
        return self.decoder(self.post_quant_conv(feature_map))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For training: reconstruction, quantisation loss (scalar), tokens (B, L); gradients pass straight through."""
        quantised, loss, tokens = self.quantize.straight_through(self.encode(pixels))
        return self.decode(quantised), loss, tokens
