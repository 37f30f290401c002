"""Parity with the original VAR and VQ-VAE modules, from tensors they produced."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from varlik import reference
from varlik.classifier import VARClassifier
from varlik.models import checkpoints
from varlik.models.quantizer import phi_of_scale

CASES = ("adaln", "shared_adaln")


@pytest.fixture(scope="module", params=CASES)
def case(request, data, tmp_path_factory):
    """A golden model through the loader, with what the originals gave."""
    folder = tmp_path_factory.mktemp(request.param)
    for part in ("var", "vqvae"):
        (folder / f"{part}.safetensors").symlink_to(data / f"{request.param}.{part}.safetensors")
    loaded = checkpoints.load_models(folder)
    classifier = VARClassifier(loaded.var, loaded.vqvae, loaded.class_names, loaded.preprocessing)
    return classifier, load_file(data / f"{request.param}.expected.safetensors")


def all_labels(classifier):
    return list(range(classifier.null_class + 1))


def test_feature_map_and_tokens(case):
    classifier, expected = case
    images = classifier.tokenize_pixels(expected["image"])
    assert (images.feature_map - expected["feature_map"]).abs().max() < 1e-4
    assert torch.equal(images.tokens, expected["tokens"])
    torch.testing.assert_close(images.teacher_forcing_input, expected["teacher_forcing_input"], atol=1e-5, rtol=0)


def test_teacher_forcing_input_from_tokens_alone(case):
    classifier, expected = case
    inputs = classifier.vqvae.quantize.teacher_forcing_input(expected["tokens"])
    torch.testing.assert_close(inputs, expected["teacher_forcing_input"], atol=1e-5, rtol=0)


def test_logits(case):
    classifier, expected = case
    vectors = classifier.var.class_vectors(torch.tensor([0, 1]))
    logits = classifier.var(vectors, expected["teacher_forcing_input"][:1].expand(2, -1, -1))
    torch.testing.assert_close(logits, expected["logits_image0_class01"], atol=2e-4, rtol=0)


def test_token_log_prob_of_classifier(case):
    classifier, expected = case
    scores = classifier.token_log_prob(classifier.tokenize_pixels(expected["image"]), all_labels(classifier))
    torch.testing.assert_close(scores, expected["token_log_prob"], atol=2e-4, rtol=0)


def test_token_log_prob_of_reference(case):
    classifier, expected = case
    for label in all_labels(classifier):
        scores = reference.token_log_prob(classifier.var, expected["tokens"], expected["teacher_forcing_input"], label)
        torch.testing.assert_close(scores, expected["token_log_prob"][:, label], atol=2e-4, rtol=0)


def test_perturbed_samples(case):
    classifier, expected = case
    for sample, noise in enumerate(expected["noise"]):
        tokens, inputs = classifier.vqvae.quantize.tokenize(expected["feature_map"] + noise)
        assert torch.equal(tokens, expected["tokens_perturbed"][:, sample])
        for label in all_labels(classifier):
            scores = reference.token_log_prob(classifier.var, tokens, inputs, label)
            wanted = expected["token_log_prob_perturbed"][:, sample, label]
            torch.testing.assert_close(scores, wanted, atol=2e-4, rtol=0)


def test_truncated_pass_is_a_prefix(case):
    classifier, expected = case
    images = classifier.tokenize_pixels(expected["image"])
    full = classifier.token_log_prob(images)
    for scales, end in enumerate(classifier.var.config.boundaries[1:], start=1):
        part = classifier.token_log_prob(images, scales=scales)
        torch.testing.assert_close(part, full[..., :end], atol=2e-6, rtol=1e-5)


def test_no_decoder_serves_all_but_reconstruct(case):
    classifier, expected = case
    with pytest.raises(ValueError, match="without its decoder"):
        classifier.reconstruct(classifier.tokenize_pixels(expected["image"]))


def test_phi_of_scale_follows_the_published_choice():
    assert phi_of_scale(10) == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    assert phi_of_scale(6) == (0, 0, 1, 2, 3, 3)
    assert len(phi_of_scale(14)) == 14
    assert phi_of_scale(14)[0] == 0
    assert phi_of_scale(14)[-1] == 3
