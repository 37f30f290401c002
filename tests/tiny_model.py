"""A tiny model and token maps for the tests of the engine."""

from __future__ import annotations

import torch

from varlik.models.config import VARConfig, VQVAEConfig
from varlik.models.quantizer import MultiScaleQuantizer
from varlik.models.var import VAR
from varlik.tokens import TokenMaps

PATCH_NUMS = (1, 2, 3, 4)
CONFIG = VARConfig(
    depth=2, embed_dim=32, num_heads=2, patch_nums=PATCH_NUMS, vocab_size=20, codebook_dim=8, num_classes=6
)
CLASSES, IMAGES, SAMPLES = 6, 3, 3


def make_model(config=CONFIG):
    torch.manual_seed(0)
    var = VAR(config)
    with torch.no_grad():
        for parameter in var.parameters():
            parameter.normal_(std=0.2)
    return var.eval()


def make_samples():
    """Token maps of three images, clean and twice perturbed: sample 1 agrees on two scales, sample 2 on none."""
    torch.manual_seed(1)
    quantizer = MultiScaleQuantizer(VQVAEConfig(channels=32, codebook_dim=8, vocab_size=20, patch_nums=PATCH_NUMS))
    length = CONFIG.num_tokens
    clean = torch.randint(20, (IMAGES, length))
    some = clean.clone()
    some[:, 7:] = torch.randint(20, (IMAGES, length - 7))
    other = (clean + 1) % 20
    keys, features = tuple(range(IMAGES)), torch.zeros(IMAGES, 8, 4, 4)
    with torch.no_grad():
        return [
            TokenMaps(tokens, quantizer.teacher_forcing_input(tokens), features, keys, PATCH_NUMS)
            for tokens in (clean, some, other)
        ]
