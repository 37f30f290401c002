"""What a model is made of: the numbers that fix every tensor shape.

Both configurations are plain values. `to_metadata` and `from_metadata` turn the pair into the string keys that a
safetensors header of ours carries (see `checkpoints.py`), so a file describes itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

VQVAEAttention = Literal["deepest level and mid", "mid only"]


@dataclass(frozen=True)
class VARConfig:
    """Shape of a class-conditional VAR transformer.

    `patch_nums[k]` is the side of token map k, so scale k holds `patch_nums[k] ** 2` tokens. The null class (no
    condition) has index `num_classes`. `attn_l2_norm` says whether queries and keys are L2-normalised.
    """

    depth: int
    embed_dim: int
    num_heads: int
    patch_nums: tuple[int, ...]
    vocab_size: int = 4096
    codebook_dim: int = 32
    num_classes: int = 1000
    shared_aln: bool = False
    attn_l2_norm: bool = True

    def __post_init__(self) -> None:
        _check_positive(self, ("depth", "embed_dim", "num_heads", "vocab_size", "codebook_dim", "num_classes"))
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        if len(self.patch_nums) < 2 or self.patch_nums[0] != 1:
            raise ValueError(f"patch_nums: expected two or more scales that start at 1, got {self.patch_nums}")
        _check_sides(self.patch_nums)

    @property
    def num_scales(self) -> int:
        """K."""
        return len(self.patch_nums)

    @property
    def boundaries(self) -> tuple[int, ...]:
        """(K + 1) token offsets: scale k is `tokens[boundaries[k]:boundaries[k + 1]]`."""
        return (0, *accumulate(p * p for p in self.patch_nums))

    @property
    def num_tokens(self) -> int:
        """L."""
        return self.boundaries[-1]

    @property
    def head_dim(self) -> int:
        """D."""
        return self.embed_dim // self.num_heads

    @property
    def null_class(self) -> int:
        """The label that means "unconditional"."""
        return self.num_classes


@dataclass(frozen=True)
class VQVAEConfig:
    """Shape of a multi-scale VQ-VAE.

    `channels * channel_multipliers[i]` channels at level i, each level but the last halves the resolution,
    `num_res_blocks` residual blocks a level in the encoder and one more in the decoder.
    """

    channels: int = 160
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    num_groups: int = 32
    in_channels: int = 3
    attention: VQVAEAttention = "deepest level and mid"
    codebook_dim: int = 32
    vocab_size: int = 4096
    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)

    def __post_init__(self) -> None:
        _check_positive(self, ("channels", "num_res_blocks", "num_groups", "in_channels", "codebook_dim", "vocab_size"))
        _check_sides(self.patch_nums)
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ValueError(f"channel_multipliers: expected positive numbers, got {self.channel_multipliers}")
        if self.attention not in ("deepest level and mid", "mid only"):
            raise ValueError(f"attention: expected 'deepest level and mid' or 'mid only', got {self.attention!r}")
        for multiplier in self.channel_multipliers:
            if self.channels * multiplier % self.num_groups:
                raise ValueError(
                    f"num_groups {self.num_groups} does not divide {self.channels * multiplier} channels "
                    f"(channels {self.channels} x multiplier {multiplier})"
                )

    @property
    def downsampling(self) -> int:
        """Side of the image over side of the feature map."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def resolution(self) -> int:
        """Side, in pixels, of the images the model takes."""
        return self.patch_nums[-1] * self.downsampling


def _check_positive(config: VARConfig | VQVAEConfig, names: Sequence[str]) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive whole number, got {value!r}")


def _check_sides(patch_nums: Sequence[int]) -> None:
    whole = bool(patch_nums) and all(isinstance(side, int) for side in patch_nums)
    if not whole or patch_nums[0] < 1 or any(a >= b for a, b in pairwise(patch_nums)):
        raise ValueError(f"patch_nums: expected positive whole sides that grow, got {patch_nums}")


@dataclass(frozen=True)
class Preprocessing:
    """How any picture becomes the pixels a model was trained on.

    The shorter side is resized to `resize` (Lanczos), the centre cut out at `crop`, and `padding` black pixels put
    around it; `channels` is 3 (RGB) or 1 (greyscale). Pixels end in [-1, 1].
    """

    resize: int
    crop: int
    padding: int = 0
    channels: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.crop <= self.resize or self.padding < 0 or self.channels not in (1, 3):
            raise ValueError(f"preprocessing: expected 0 < crop <= resize, padding >= 0, 1 or 3 channels, got {self}")

    @property
    def resolution(self) -> int:
        """Side of the result, in pixels."""
        return self.crop + 2 * self.padding

    @classmethod
    def imagenet(cls, resolution: int, channels: int = 3) -> Preprocessing:
        """The rule of the public ImageNet models for every data set: resize to 9/8 of the side, cut the centre."""
        return cls(resize=round(1.125 * resolution), crop=resolution, channels=channels)


def to_metadata(var: VARConfig, vqvae: VQVAEConfig) -> dict[str, str]:
    """The pair as safetensors metadata: all keys and values are strings."""
    values: dict[str, object] = {
        "depth": var.depth,
        "embed_dim": var.embed_dim,
        "num_heads": var.num_heads,
        "patch_nums": list(var.patch_nums),
        "vocab_size": var.vocab_size,
        "codebook_dim": var.codebook_dim,
        "num_classes": var.num_classes,
        "shared_aln": var.shared_aln,
        "attn_l2_norm": var.attn_l2_norm,
        "vqvae_ch": vqvae.channels,
        "vqvae_ch_mult": list(vqvae.channel_multipliers),
        "vqvae_num_res_blocks": vqvae.num_res_blocks,
        "vqvae_num_groups": vqvae.num_groups,
        "vqvae_in_channels": vqvae.in_channels,
        "vqvae_attention": vqvae.attention,
    }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def from_metadata(metadata: Mapping[str, str]) -> tuple[VARConfig, VQVAEConfig]:
    """Read the pair back. Raises `ValueError` naming keys that are absent or unreadable."""
    missing = [key for key in _REQUIRED_KEYS if key not in metadata]
    if missing:
        raise ValueError(f"metadata lacks {', '.join(missing)}")
    # Python writes True and False, JSON true and false: both are found in files.
    value = {key: _read(key, text) for key, text in metadata.items() if key in _KNOWN_KEYS}
    common = {
        "patch_nums": tuple(value["patch_nums"]),
        "vocab_size": value["vocab_size"],
        "codebook_dim": value["codebook_dim"],
    }
    names = ("depth", "embed_dim", "num_heads", "num_classes", "shared_aln", "attn_l2_norm")
    var = VARConfig(**{name: value[name] for name in names}, **common)
    vqvae = VQVAEConfig(
        channels=value["vqvae_ch"],
        channel_multipliers=tuple(value.get("vqvae_ch_mult", VQVAEConfig.channel_multipliers)),
        num_res_blocks=value.get("vqvae_num_res_blocks", VQVAEConfig.num_res_blocks),
        num_groups=value.get("vqvae_num_groups", VQVAEConfig.num_groups),
        in_channels=value.get("vqvae_in_channels", VQVAEConfig.in_channels),
        attention=value.get("vqvae_attention", VQVAEConfig.attention),
        **common,
    )
    return var, vqvae


_REQUIRED_KEYS = (
    "depth",
    "embed_dim",
    "num_heads",
    "patch_nums",
    "vocab_size",
    "codebook_dim",
    "num_classes",
    "shared_aln",
    "attn_l2_norm",
    "vqvae_ch",
)
_OPTIONAL_KEYS = ("vqvae_ch_mult", "vqvae_num_res_blocks", "vqvae_num_groups", "vqvae_in_channels", "vqvae_attention")
_KNOWN_KEYS = frozenset(_REQUIRED_KEYS + _OPTIONAL_KEYS)


def _read(key: str, text: str):
    if key == "vqvae_attention":
        return text
    if text in ("True", "False"):
        return text == "True"
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"metadata key {key}: cannot read {text!r}") from error
