"""Noise that depends on nothing but seed, image and sample; aggregation by either rule."""

from __future__ import annotations

import math

import pytest
import torch

from varlik import smoothing
from varlik.smoothing import Smoothing, noise


def test_noise_depends_on_seed_key_and_sample_only():
    first = noise(key=7, sample=1, seed=0, shape=(4, 3, 3))
    torch.manual_seed(99)
    assert torch.equal(first, noise(7, 1, 0, (4, 3, 3)))
    for other in (noise(8, 1, 0, (4, 3, 3)), noise(7, 2, 0, (4, 3, 3)), noise(7, 1, 1, (4, 3, 3))):
        assert (first - other).abs().max() > 0.5


def test_noise_is_standard_normal():
    values = torch.cat([noise(key, 1, 0, (1000,)) for key in range(50)])
    assert abs(values.mean().item()) < 0.02
    assert abs(values.std().item() - 1) < 0.02


def test_perturbed_samples_do_not_depend_on_the_batch(golden_classifier):
    classifier, expected = golden_classifier
    images = classifier.tokenize_pixels(expected["image"])
    together = smoothing.perturb(classifier.vqvae.quantize, images, 2, Smoothing(0.1, seed=3))
    alone = smoothing.perturb(classifier.vqvae.quantize, images[1:], 2, Smoothing(0.1, seed=3))
    torch.testing.assert_close(together.feature_map[1:], alone.feature_map)
    assert torch.equal(together.tokens[1:], alone.tokens)
    shift = together.feature_map - images.feature_map
    assert abs(shift.std().item() - 0.1) < 0.02
    assert smoothing.perturb(classifier.vqvae.quantize, images, 0, Smoothing(0.1, seed=3)) is images


def test_aggregate():
    scores = torch.tensor([[-1.0, -3.0]])
    assert Smoothing().combine(scores).item() == -2
    expected = math.log((math.exp(-1) + math.exp(-3)) / 2)
    assert Smoothing(aggregate="log-mean-exp").combine(scores).item() == pytest.approx(expected)
    with pytest.raises(ValueError, match="'median'"):
        Smoothing(aggregate="median")


def test_smoothed_log_likelihood_is_the_mean_over_samples(golden_classifier):
    classifier, expected = golden_classifier
    images = classifier.tokenize_pixels(expected["image"])
    each = [smoothing.perturb(classifier.vqvae.quantize, images, s, Smoothing(0.2, seed=5)) for s in range(4)]
    scores = torch.stack([classifier.log_likelihood(maps) for maps in each], -1)
    kwargs = {"samples": 3, "sigma": 0.2, "seed": 5}
    torch.testing.assert_close(classifier.smoothed_log_likelihood(images, **kwargs), scores[..., :3].mean(-1))
    noisy = classifier.smoothed_log_likelihood(images, **kwargs, include_clean=False)
    torch.testing.assert_close(noisy, scores[..., 1:].mean(-1))
    paper = classifier.smoothed_log_likelihood(images, **kwargs, aggregate="log-mean-exp", include_clean=False)
    torch.testing.assert_close(paper, scores[..., 1:].logsumexp(-1) - math.log(3))


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_sigma(golden_classifier, sigma):
    classifier, expected = golden_classifier
    with pytest.raises(ValueError, match="sigma"):
        classifier.smoothed_log_likelihood(classifier.tokenize_pixels(expected["image"]), sigma=sigma)
    with pytest.raises(ValueError, match="sigma"):
        classifier.classify(classifier.tokenize_pixels(expected["image"]), sigma=sigma)


def test_bad_samples(golden_classifier):
    classifier, expected = golden_classifier
    with pytest.raises(ValueError, match="samples"):
        classifier.smoothed_log_likelihood(classifier.tokenize_pixels(expected["image"]), samples=0)
