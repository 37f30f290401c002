"""A tiny model and token maps for the tests of the engine and of what stands on it."""

from __future__ import annotations

from dataclasses import replace

import torch

from varlik.classifier import VARClassifier
from varlik.models.config import Preprocessing, VARConfig, VQVAEConfig
from varlik.models.quantizer import MultiScaleQuantizer
from varlik.models.var import VAR
from varlik.models.vqvae import VQVAE
from varlik.tokens import TokenMaps

PATCH_NUMS = (1, 2, 3, 4)
CONFIG = VARConfig(
    depth=2, embed_dim=32, num_heads=2, patch_nums=PATCH_NUMS, vocab_size=20, codebook_dim=8, num_classes=6
)
CLASSES, IMAGES, SAMPLES = 6, 3, 3

# A classifier of more classes, with a VQ-VAE that takes pictures of 8 grey pixels a side.
MANY = replace(CONFIG, num_classes=12)
VQVAE_CONFIG = VQVAEConfig(
    channels=4,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    num_groups=2,
    in_channels=1,
    codebook_dim=8,
    vocab_size=20,
    patch_nums=PATCH_NUMS,
)


def make_model(config=CONFIG, seed=0):
    torch.manual_seed(seed)
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


def make_classifier(config=MANY, spread=1.0, seed=0, double=False, **options):
    """A classifier with random weights; its class embeddings lie `spread` times as far from their mean as they fall."""
    var = make_model(config, seed)
    var = var.double() if double else var
    with torch.no_grad():
        embeddings = var.class_emb.weight
        embeddings.copy_(embeddings.mean(0).lerp(embeddings, spread))
    torch.manual_seed(0)  # one VQ-VAE, whatever the transformer
    names = [f"class {i}" for i in range(config.num_classes)]
    return VARClassifier(var, VQVAE(VQVAE_CONFIG), names, Preprocessing(8, 8, channels=1), name="tiny", **options)


def make_images(classifier, count, seed=1):
    """Token maps of `count` random feature maps, which can be perturbed."""
    features = torch.randn(count, 8, 4, 4, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        tokens, inputs = classifier.vqvae.quantize.tokenize(features)
    return TokenMaps(tokens, inputs, features, tuple(range(1000 * seed, 1000 * seed + count)), PATCH_NUMS)
