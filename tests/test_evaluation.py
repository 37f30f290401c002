"""Accuracy tables against counts by hand, and the bundled model against the reference."""

from __future__ import annotations

import pytest
import torch

import varlik
from varlik import reference
from varlik.cascade import Cascade
from varlik.datasets import FASHION_MNIST_FOLDER, fashion_mnist
from varlik.evaluation.accuracy import calibration_error, evaluate, evaluate_cascade, partial_log_likelihoods
from varlik.evaluation.samples import samples


def test_report_counts_what_the_classifier_says(golden_classifier):
    classifier, expected = golden_classifier
    images = classifier.tokenize_pixels(expected["image"])
    full = classifier.log_likelihood(images)
    labels = torch.stack([full[0].argmax(), full[1].argmin()])
    cascade = Cascade.parse("2:3,4:1")
    report = evaluate(classifier, images, labels)
    assert torch.equal(report.predictions, full.argmax(1))
    assert report.images == 2
    assert report.by_scales[-1] == 0.5
    for scales in range(1, 5):
        hits = classifier.log_likelihood(images, scales=scales).argmax(1) == labels
        assert report.by_scales[scales - 1] == hits.double().mean().item()
    answer = classifier.classify(images, cascade=cascade).classes
    row = evaluate_cascade(classifier, images, labels, report.predictions, cascade)
    assert row.accuracy == (answer == labels).double().mean().item()
    assert row.agreement == (answer == full.argmax(1)).double().mean().item()
    assert row.tokens == 7 * 4 + 3 * 25
    truth = full[torch.arange(2), labels]
    assert report.nats_per_token == pytest.approx(-truth.mean().item() / 30, rel=1e-5)


def test_partial_likelihoods_come_from_one_pass(golden_classifier):
    classifier, expected = golden_classifier
    images = classifier.tokenize_pixels(expected["image"])
    partial = partial_log_likelihoods(classifier, images)
    for scales in range(1, 5):
        wanted = classifier.log_likelihood(images, scales=scales).double()
        torch.testing.assert_close(partial[..., scales - 1], wanted, rtol=1e-5, atol=0)


def test_calibration_error_by_hand():
    posterior = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    labels = torch.tensor([0, 1, 1, 1])
    # confidence 0.9 with accuracy 0.5, confidence 0.6 with accuracy 1: gaps 0.4 and 0.4, half of the images each
    assert calibration_error(posterior, labels) == pytest.approx(0.4)
    assert calibration_error(torch.eye(2), torch.tensor([0, 1])) == 0


def test_samples_are_only_for_bundled_models():
    pictures = samples("fashion-mnist")
    assert len(pictures.paths) == len(pictures.labels) == 12
    with pytest.raises(ValueError, match="not bundled"):
        samples("var-d16")


@pytest.mark.slow
@pytest.mark.skipif(not FASHION_MNIST_FOLDER.exists(), reason="needs Debian's dataset-fashion-mnist")
def test_bundled_model_equals_the_reference_on_200_test_images():
    classifier = varlik.load("fashion-mnist", device="cpu")
    data = fashion_mnist("test")[:200]
    images = classifier.tokenize(data.images[..., None])
    labels = list(range(10))
    wanted = reference.log_likelihood(classifier.var, images.tokens, images.teacher_forcing_input, labels)
    scores = classifier.log_likelihood(images)
    torch.testing.assert_close(scores, wanted, rtol=1e-5, atol=0)
    truth = torch.from_numpy(data.labels)
    assert (scores.argmax(1) == truth).double().mean() > 0.8
    cascade = classifier.classify(images[:20], cascade="3:4,6:1")
    coarse = reference.log_likelihood(classifier.var, images.tokens, images.teacher_forcing_input, labels, 3)
    for i in range(20):
        alive = coarse[i].argsort(descending=True, stable=True)[:4]
        assert cascade.classes[i] == alive[wanted[i, alive].argmax()]
