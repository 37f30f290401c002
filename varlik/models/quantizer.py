"""Multi-scale residual quantisation: a feature map becomes token maps from coarse to fine, and back.

Scale k averages what is left of the feature map down to (p_k, p_k), takes the nearest code of every cell, brings the
codes back to full size (bicubic), passes them through one of four shared convolutions phi and subtracts the result.
The running sum, resized to the next scale, is what the transformer reads there, so tokenising yields the
teacher-forcing input too.

Source: "Visual Autoregressive Modeling", Tian et al. 2024, algorithms 1 and 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from varlik import ops
from varlik.models.config import VQVAEConfig

RESIDUAL_RATIO = 0.5
COMMITMENT = 0.25
NUM_PHI = 4

# Which phi serves scale k of K: the one whose tick is nearest to k / (K - 1). Some scales lie exactly between two ticks
# (k = 2 and 7 of 10) and the published models took what float64 rounding gave them, so the choice is written down.
_PHI_OF_SCALE = {
    2: (0, 3),
    3: (0, 2, 3),
    4: (0, 1, 2, 3),
    5: (0, 1, 2, 2, 3),
    6: (0, 0, 1, 2, 3, 3),
    7: (0, 0, 1, 2, 2, 3, 3),
    8: (0, 0, 1, 1, 2, 2, 3, 3),
    9: (0, 0, 1, 1, 2, 2, 2, 3, 3),
    10: (0, 0, 1, 1, 1, 2, 2, 3, 3, 3),
    11: (0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3),
    12: (0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3),
}


def phi_of_scale(num_scales: int) -> tuple[int, ...]:
    """Index of the phi convolution of every scale, (K,)."""
    if num_scales in _PHI_OF_SCALE:
        return _PHI_OF_SCALE[num_scales]
    ticks = torch.linspace(1 / 12, 11 / 12, NUM_PHI, dtype=torch.float64)
    return tuple(int((ticks - k / (num_scales - 1)).abs().argmin()) for k in range(num_scales))


class _SharedPhi(nn.Module):
    """The four 3x3 convolutions that smooth upsampled codes."""

    def __init__(self, channels: int):
        super().__init__()
        self.qresi_ls = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(NUM_PHI))


class MultiScaleQuantizer(nn.Module):
    """One codebook, used at K scales."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.patch_nums = config.patch_nums
        self.embedding = nn.Embedding(config.vocab_size, config.codebook_dim)
        self.quant_resi = _SharedPhi(config.codebook_dim)
        self._phi_of_scale = phi_of_scale(len(config.patch_nums))

    def tokenize(self, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, L) int64 and teacher-forcing input (B, L - 1, Cvae) of `feature_map` (B, Cvae, h, w).

        Float32 outside of autocast whatever the caller runs in: near ties between codes must not depend on it.
        Raises `ValueError` for a feature map of another shape.
        """
        with torch.autocast(feature_map.device.type, enabled=False):
            tokens, inputs, _, _ = self._quantise(feature_map)
        return tokens, inputs

    def teacher_forcing_input(self, tokens: Tensor) -> Tensor:
        """What the transformer reads, (B, L - 1, Cvae), from tokens (B, L) alone."""
        f_hat, inputs = self._zeros(tokens), []
        for k, codes in enumerate(self._split(tokens)[:-1]):
            f_hat = f_hat + self._contribution(codes, k)
            inputs.append(self._next_input(f_hat, k))
        return torch.cat(inputs, dim=1)

    def feature_map(self, tokens: Tensor, num_scales: int | None = None) -> Tensor:
        """Quantised feature map (B, Cvae, h, w) that the first `num_scales` (default: all) token maps stand for."""
        f_hat = self._zeros(tokens)
        for k, codes in enumerate(self._split(tokens)[:num_scales]):
            f_hat = f_hat + self._contribution(codes, k)
        return f_hat

    def straight_through(self, feature_map: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For training: quantised feature map, quantisation loss (scalar) and tokens (B, L).

        The loss averages over scales: codes move to the features, features (weight 0.25) to the codes. The returned map
        has the codes' value and the features' gradient.
        """
        tokens, _, f_hat, loss = self._quantise(feature_map)
        return feature_map + (f_hat - feature_map).detach(), loss, tokens

    def nearest_code(self, vectors: Tensor) -> Tensor:
        """Index (n,) of the codebook entry nearest to each of `vectors` (n, Cvae); ties go to the lowest index."""
        # An index has no gradient, so the search takes none in training either.
        return ops.nearest_code(vectors.detach(), self.embedding.weight.detach())

    def _quantise(self, feature_map: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch, channels, height, width = feature_map.shape
        side = self.patch_nums[-1]
        if (channels, height, width) != (self.embedding.embedding_dim, side, side):
            raise ValueError(
                f"feature_map: expected (B, {self.embedding.embedding_dim}, {side}, {side}), "
                f"got {tuple(feature_map.shape)}"
            )
        last = len(self.patch_nums) - 1
        target = feature_map.detach()
        rest, f_hat = target, torch.zeros_like(feature_map)
        loss = feature_map.new_zeros(())
        tokens, inputs = [], []
        for k, p in enumerate(self.patch_nums):
            cells = rest if k == last else F.interpolate(rest, size=(p, p), mode="area")
            codes = self.nearest_code(rearrange(cells, "b c h w -> (b h w) c")).view(batch, p * p)
            contribution = self._contribution(codes, k)
            f_hat = f_hat + contribution
            rest = rest - contribution.detach()
            tokens.append(codes)
            if k != last:
                inputs.append(self._next_input(f_hat, k))
            if torch.is_grad_enabled():
                loss = loss + F.mse_loss(f_hat, target) + COMMITMENT * F.mse_loss(f_hat.detach(), feature_map)
        return torch.cat(tokens, dim=1), torch.cat(inputs, dim=1), f_hat, loss / len(self.patch_nums)

    def _contribution(self, codes: Tensor, k: int) -> Tensor:
        """What the codes (B, p_k^2) of scale k add to the feature map, (B, Cvae, h, w)."""
        p, side = self.patch_nums[k], self.patch_nums[-1]
        vectors = rearrange(self.embedding(codes), "b (h w) c -> b c h w", h=p)
        if p != side:
            vectors = F.interpolate(vectors, size=(side, side), mode="bicubic")
        vectors = vectors.contiguous()
        phi = self.quant_resi.qresi_ls[self._phi_of_scale[k]]
        return vectors * (1 - RESIDUAL_RATIO) + phi(vectors) * RESIDUAL_RATIO

    def _next_input(self, f_hat: Tensor, k: int) -> Tensor:
        p = self.patch_nums[k + 1]
        return F.interpolate(f_hat, size=(p, p), mode="area").flatten(2).mT

    def _split(self, tokens: Tensor) -> Sequence[Tensor]:
        sizes = [p * p for p in self.patch_nums]
        if tokens.dim() != 2 or tokens.shape[1] != sum(sizes):
            raise ValueError(f"tokens: expected (B, {sum(sizes)}), got {tuple(tokens.shape)}")
        return tokens.split(sizes, dim=1)

    def _zeros(self, tokens: Tensor) -> Tensor:
        side = self.patch_nums[-1]
        return self.embedding.weight.new_zeros(len(tokens), self.embedding.embedding_dim, side, side)
