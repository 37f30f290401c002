"""Likelihood smoothing: score an image on several perturbed samples and average.

A sample is the image's feature map plus Gaussian noise, quantised again. The released code of A-VARC averages
log-likelihoods over the clean sample and S - 1 perturbed ones ("mean", the default here); the paper's equation sums
probabilities ("log-mean-exp"). Noise is a function of (seed, image, sample) alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from varlik.models.quantizer import MultiScaleQuantizer
from varlik.tokens import ENCODE_BATCH, TokenMaps

Aggregate = Literal["mean", "log-mean-exp"]


@dataclass(frozen=True)
class Smoothing:
    """How samples are drawn and put together.

    `sigma` is the standard deviation of the noise in units of the feature map, `seed` its seed, `aggregate` the rule.
    Raises `ValueError` for a sigma that is not positive and finite and for an unknown rule.
    """

    sigma: float = 0.1
    seed: int = 0
    aggregate: Aggregate = "mean"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            raise ValueError(f"sigma: expected a positive standard deviation, got {self.sigma}")
        if self.aggregate not in get_args(Aggregate):
            rules = ", ".join(map(repr, get_args(Aggregate)))
            raise ValueError(f"aggregate: expected one of {rules}, got {self.aggregate!r}")

    def combine(self, log_likelihood: Tensor) -> Tensor:
        """Smoothed log-likelihood (...) of log-likelihoods (..., S) over samples."""
        if self.aggregate == "mean":
            return log_likelihood.mean(-1)
        return log_likelihood.logsumexp(-1) - math.log(log_likelihood.shape[-1])


def noise(key: int, sample: int, seed: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise of one sample of one image, float32 on the CPU."""
    digest = hashlib.blake2b(f"{seed}/{key}/{sample}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.randn(tuple(shape), generator=generator)


@torch.no_grad()
def perturb(quantizer: MultiScaleQuantizer, images: TokenMaps, sample: int, smoothing: Smoothing) -> TokenMaps:
    """Sample number `sample` of every image: 0 is the clean image itself, the others are quantised after noise.

    Raises `ValueError` for a negative sample.
    """
    if sample < 0:
        raise ValueError(f"sample: expected 0 or more, got {sample}")
    if sample == 0:
        return images
    shape = images.feature_map.shape[1:]
    noises = torch.stack([noise(key, sample, smoothing.seed, shape) for key in images.keys])
    feature_map = images.feature_map + smoothing.sigma * noises.to(images.feature_map)
    parts = [quantizer.tokenize(batch) for batch in feature_map.split(ENCODE_BATCH)]
    tokens, inputs = (torch.cat(part) for part in zip(*parts, strict=True))
    return replace(images, tokens=tokens, teacher_forcing_input=inputs, feature_map=feature_map)
