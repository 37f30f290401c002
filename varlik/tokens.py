"""Token maps of images, with what is needed to score and to perturb them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from varlik.models.vqvae import VQVAE

ENCODE_BATCH = 64


@dataclass(frozen=True)
class TokenMaps:
    """Token maps of B images.

    - `tokens` (B, L) int64: scale after scale, row-major inside a scale.
    - `teacher_forcing_input` (B, L - 1, Cvae): what the transformer reads; position 0 has none.
    - `feature_map` (B, Cvae, h, w): encoder output before quantisation, where perturbed samples start from.
    - `keys` (B,): a number that stands for the pixels of each image, so that its noise does not depend on the batch.
    - `patch_nums`: side of each of the K token maps.
    """

    tokens: Tensor
    teacher_forcing_input: Tensor
    feature_map: Tensor
    keys: tuple[int, ...]
    patch_nums: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> TokenMaps:
        """The images of a slice."""
        if not isinstance(rows, slice):
            raise TypeError(f"rows: expected a slice, got {type(rows).__name__}")
        return replace(
            self,
            tokens=self.tokens[rows],
            teacher_forcing_input=self.teacher_forcing_input[rows],
            feature_map=self.feature_map[rows],
            keys=self.keys[rows],
        )

    def token_map(self, scale: int) -> Tensor:
        """Token map of one scale, (B, p, p); scales count from 1. Raises `ValueError` for one the model lacks."""
        if not 1 <= scale <= len(self.patch_nums):
            raise ValueError(f"scale: expected 1 to {len(self.patch_nums)}, got {scale}")
        side = self.patch_nums[scale - 1]
        first = sum(p * p for p in self.patch_nums[: scale - 1])
        return self.tokens[:, first : first + side * side].view(-1, side, side)

    @staticmethod
    def concatenate(parts: Sequence[TokenMaps]) -> TokenMaps:
        """The images of several token maps of one model, one after another."""
        return replace(
            parts[0],
            tokens=torch.cat([part.tokens for part in parts]),
            teacher_forcing_input=torch.cat([part.teacher_forcing_input for part in parts]),
            feature_map=torch.cat([part.feature_map for part in parts]),
            keys=tuple(key for part in parts for key in part.keys),
        )


def _no_tf32() -> AbstractContextManager[None]:
    cudnn = torch.backends.cudnn
    return cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False)


@torch.no_grad()
def tokenize(vqvae: VQVAE, pixels: Tensor) -> TokenMaps:
    """Token maps of `pixels` (B, C, S, S) in [-1, 1].

    Raises `TypeError` for pixels that are not floating point, `ValueError` for another shape, for pixels that are not
    finite and for pixels outside [-1, 1].
    """
    check_pixels(pixels)
    weight = vqvae.quant_conv.weight
    parts = []
    for batch in pixels.split(ENCODE_BATCH):
        # Outside of autocast, and without TF32: tokens must not depend on the precision the caller happens to run in.
        with torch.autocast(weight.device.type, enabled=False), _no_tf32():
            feature_map = vqvae.encode(batch.to(weight.device, weight.dtype))
        tokens, inputs = vqvae.quantize.tokenize(feature_map)
        parts.append(TokenMaps(tokens, inputs, feature_map, image_keys(batch), vqvae.config.patch_nums))
    return TokenMaps.concatenate(parts)


def check_pixels(pixels: Tensor) -> None:
    """Refuse what is no batch of finite pixels in [-1, 1]."""
    if not isinstance(pixels, Tensor) or not pixels.dtype.is_floating_point:
        raise TypeError(
            f"pixels: expected a floating-point tensor, got {getattr(pixels, 'dtype', type(pixels).__name__)}"
        )
    if pixels.dim() != 4 or len(pixels) == 0:
        raise ValueError(f"pixels: expected (B, C, S, S) with at least one image, got {tuple(pixels.shape)}")
    if not torch.isfinite(pixels).all():
        raise ValueError("pixels: expected finite values, got NaN or infinity")
    low, high = pixels.min().item(), pixels.max().item()
    if low < -1 - 1e-4 or high > 1 + 1e-4:
        raise ValueError(f"pixels: expected values in [-1, 1], got [{low:.3g}, {high:.3g}]")


def image_keys(pixels: Tensor) -> tuple[int, ...]:
    """One 64-bit number for each image of (B, C, S, S), equal for equal pictures at 8 bits a channel."""
    rendered = ((pixels.detach().float() + 1) * 127.5).round().to(torch.uint8).cpu().contiguous().numpy()
    return tuple(int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=8).digest(), "big") for image in rendered)
