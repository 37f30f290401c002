"""Likelihood smoothing: score an image on several perturbed samples and average.

A sample is the image's feature map plus Gaussian noise, quantised again. The released code of A-VARC averages
log-likelihoods over the clean sample and S - 1 perturbed ones ("mean", the default here); the paper's equation sums
probabilities ("log-mean-exp"). Noise is a function of (seed, image, sample) alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from varlik.models.quantizer import MultiScaleQuantizer
from varlik.tokens import ENCODE_BATCH, TokenMaps

Aggregate = Literal["mean", "log-mean-exp"]


def noise(key: int, sample: int, seed: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise of one sample of one image, float32 on the CPU."""
    digest = hashlib.blake2b(f"{seed}/{key}/{sample}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.randn(tuple(shape), generator=generator)


@torch.inference_mode()
def perturb(quantizer: MultiScaleQuantizer, images: TokenMaps, sample: int, sigma: float, seed: int) -> TokenMaps:
    """Sample number `sample` of every image: 0 is the clean image itself, the others are quantised after noise.

    `sigma` is the standard deviation of the noise, in units of the feature map.
    Raises `ValueError` for a negative sample or a sigma that is not positive and finite.
    """
    if sample < 0:
        raise ValueError(f"sample: expected 0 or more, got {sample}")
    check_sigma(sigma)
    if sample == 0:
        return images
    shape = images.feature_map.shape[1:]
    noises = torch.stack([noise(key, sample, seed, shape) for key in images.keys])
    feature_map = images.feature_map + sigma * noises.to(images.feature_map)
    parts = [quantizer.tokenize(batch) for batch in feature_map.split(ENCODE_BATCH)]
    tokens, inputs = (torch.cat(part) for part in zip(*parts, strict=True))
    return replace(images, tokens=tokens, teacher_forcing_input=inputs, feature_map=feature_map)


def check_sigma(sigma: float) -> None:
    """Refuse a standard deviation that is not positive and finite."""
    if not (math.isfinite(sigma) and sigma > 0):
        raise ValueError(f"sigma: expected a positive standard deviation, got {sigma}")


def aggregate(log_likelihood: Tensor, how: Aggregate = "mean") -> Tensor:
    """Smoothed log-likelihood (...) of log-likelihoods (..., S) over samples. Raises `ValueError` for another `how`."""
    check_aggregate(how)
    if how == "mean":
        return log_likelihood.mean(-1)
    return log_likelihood.logsumexp(-1) - math.log(log_likelihood.shape[-1])


def check_aggregate(how: str) -> None:
    """Refuse a rule that is not one of `Aggregate`."""
    if how not in get_args(Aggregate):
        raise ValueError(f"aggregate: expected one of {', '.join(map(repr, get_args(Aggregate)))}, got {how!r}")
