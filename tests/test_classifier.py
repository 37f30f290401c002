"""The facade against the reference, and what it refuses."""

from __future__ import annotations

import pytest
import torch

import varlik
from varlik import reference
from varlik.models.config import Preprocessing
from varlik.scoring import memory
from varlik.smoothing import Smoothing, perturb
from varlik.tokens import TokenMaps


@pytest.fixture(scope="module")
def images(golden_classifier):
    classifier, expected = golden_classifier
    return classifier.tokenize_pixels(expected["image"])


@pytest.fixture(scope="module")
def classifier(golden_classifier):
    return golden_classifier[0]


def naive(classifier, images, scales=None):
    labels = list(range(classifier.var.config.num_classes))
    return reference.log_likelihood(classifier.var, images.tokens, images.teacher_forcing_input, labels, scales)


def test_log_likelihood_equals_reference(classifier, images):
    for scales in (None, 1, 2, 3):
        torch.testing.assert_close(
            classifier.log_likelihood(images, scales=scales), naive(classifier, images, scales), rtol=1e-5, atol=0
        )


def test_float64_reference(classifier, images):
    import copy

    var = copy.deepcopy(classifier.var).double()
    wanted = reference.log_likelihood(var, images.tokens, images.teacher_forcing_input.double(), [0, 3])
    torch.testing.assert_close(classifier.log_likelihood(images, [0, 3]).double(), wanted, rtol=1e-5, atol=0)


def test_classes_in_any_order_by_index_and_name(classifier, images):
    full = classifier.log_likelihood(images)
    some = classifier.log_likelihood(images, [5, classifier.class_names[2], "0"])
    torch.testing.assert_close(some, full[:, [5, 2, 0]], rtol=1e-5, atol=0)
    null = classifier.log_likelihood(images, [classifier.null_class])
    assert null.shape == (2, 1)


def test_scores_do_not_depend_on_batch_or_chunks(classifier, images, monkeypatch):
    full = classifier.log_likelihood(images)
    alone = torch.cat([classifier.log_likelihood(images[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(alone, full, rtol=1e-5, atol=0)
    monkeypatch.setitem(memory.CHUNK_BYTES, "cpu", 1)
    monkeypatch.setattr(memory, "CHUNK_TOKENS", 1)
    torch.testing.assert_close(classifier.log_likelihood(images), full, rtol=1e-5, atol=0)


def test_classify_full_and_posterior(classifier, images):
    prediction = classifier.classify(images)
    scores = naive(classifier, images)
    assert prediction.classes.tolist() == scores.argmax(1).tolist()
    assert prediction.names == tuple(classifier.class_names[i] for i in prediction.classes)
    torch.testing.assert_close(prediction.posterior, scores.softmax(1), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(classifier.posterior(images), prediction.posterior, rtol=1e-4, atol=1e-6)
    assert torch.equal(prediction.ranking, scores.argsort(1, descending=True))
    assert prediction.cost.tokens.tolist() == [7 * 29] * 2  # scale 1 is a look-up
    assert prediction.cost.full_tokens == 7 * 30


def test_prior_enters_by_bayes_rule(classifier, images):
    scores = naive(classifier, images)
    prior = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    wanted = (scores + (prior / 28).log()).softmax(1)
    torch.testing.assert_close(classifier.posterior(images, prior=prior), wanted, rtol=1e-3, atol=1e-5)
    only = [0.0] * 7
    only[4] = 1.0
    assert classifier.classify(images, prior=only).classes.tolist() == [4, 4]
    assert classifier.classify(images, [6, 4], prior=[0, 1], cascade="2:1").classes.tolist() == [4, 4]


def scored(stage, image):
    """Columns of the classes that a stage scored for an image."""
    assert torch.equal(stage.reached[image] > 0, stage.log_likelihood[image].isfinite())
    return stage.reached[image].nonzero().flatten().tolist()


def test_cascade_equals_reference_cascade(classifier, images):
    seed, sigma = 11, 0.2
    stages = [(2, 1, 5), (3, 1, 3), (4, 3, 1)]
    prediction = classifier.classify(images, cascade="2:5,3:3,4x3:1", seed=seed, sigma=sigma)
    samples = [perturb(classifier.vqvae.quantize, images, s, Smoothing(sigma, seed)) for s in range(3)]
    for i in range(len(images)):
        rows = [(maps.tokens[i : i + 1], maps.teacher_forcing_input[i : i + 1]) for maps in samples]
        survivors, record = reference.cascade(classifier.var, rows, list(range(7)), stages)
        assert prediction.classes[i].item() == survivors[0]
        assert prediction.ranking[i, 0].item() == survivors[0]
        for stage, (labels, scores) in zip(prediction.stages, record, strict=True):
            assert scored(stage, i) == sorted(labels)
            torch.testing.assert_close(stage.log_likelihood[i, labels], scores, rtol=1e-5, atol=0)
        finalists = record[-1][0]
        assert sorted(prediction.ranking[i, :3].tolist()) == sorted(finalists)
        finite = torch.isfinite(prediction.log_likelihood[i])
        assert prediction.labels[finite].tolist() == sorted(finalists)
        assert prediction.posterior[i][~finite].eq(0).all()
        assert prediction.posterior[i].sum().item() == pytest.approx(1)
    assert sorted(prediction.ranking[0].tolist()) == list(range(7))
    # clean rows go on where they stopped; the two perturbed samples start from what they share with the clean one
    clean = 7 * 4 + 5 * 9 + 3 * 16
    for i in range(len(images)):
        equal = [(maps.tokens[i] == images.tokens[i]).tolist() for maps in samples[1:]]
        shared = [max(1, sum(all(e[:end]) for end in (1, 5, 14, 30))) for e in equal]
        forked = sum(3 * (30 - (1, 5, 14, 30)[k - 1]) for k in shared)
        assert prediction.cost.tokens[i].item() == clean + forked


def test_token_maps_by_scale(classifier, images):
    assert images.token_map(3).shape == (2, 3, 3)
    assert torch.equal(images.token_map(1).flatten(), images.tokens[:, 0])
    with pytest.raises(ValueError, match="scale: expected 1 to 4, got 5"):
        images.token_map(5)
    joined = TokenMaps.concatenate([images[:1], images[1:]])
    assert torch.equal(joined.tokens, images.tokens)
    assert joined.keys == images.keys


@pytest.mark.parametrize(
    ("classes", "error", "message"),
    [
        ([], ValueError, "at least one"),
        ([7, 8], ValueError, "from 0 to 6"),
        ([-1], ValueError, "from 0 to 6"),
        (["boat"], ValueError, "knows no class 'boat'"),
        ([1, 1], ValueError, "more than once"),
        ([1.5], TypeError, "indices or names"),
        ([True], TypeError, "indices or names"),
        ("0", TypeError, "list"),
        (3, TypeError, "list"),
    ],
)
def test_bad_classes(classifier, images, classes, error, message):
    with pytest.raises(error, match=message):
        classifier.log_likelihood(images, classes)


@pytest.mark.parametrize("scales", [0, 5, -1])
def test_bad_scales(classifier, images, scales):
    with pytest.raises(ValueError, match="scales: expected 1 to 4"):
        classifier.log_likelihood(images, scales=scales)


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        ([1, 2], "expected 7 values"),
        ([-1] + [1] * 6, "non-negative"),
        ([0] * 7, "positive sum"),
        ([float("nan")] * 7, "finite"),
    ],
)
def test_bad_prior(classifier, images, prior, message):
    with pytest.raises(ValueError, match=message):
        classifier.classify(images, prior=prior)


def test_bad_cascades(classifier, images):
    with pytest.raises(ValueError, match="the model has 4"):
        classifier.classify(images, cascade="5:1")
    with pytest.raises(ValueError, match="narrows"):
        classifier.classify(images, cascade="2:2,3:4,4:1")


def test_bad_pixels(classifier, golden_classifier):
    pixels = golden_classifier[1]["image"]
    with pytest.raises(ValueError, match="NaN"):
        classifier.tokenize_pixels(pixels * torch.nan)
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        classifier.tokenize_pixels(pixels * 255)
    with pytest.raises(ValueError, match=r"expected \(B, 3, 64, 64\)"):
        classifier.tokenize_pixels(pixels[:, :, :32, :32])
    with pytest.raises(TypeError, match="floating-point"):
        classifier.tokenize_pixels((pixels * 100).to(torch.uint8))
    with pytest.raises(ValueError, match="at least one"):
        classifier.tokenize([])


def test_parts_that_do_not_fit(classifier):
    with pytest.raises(ValueError, match="class_names"):
        varlik.VARClassifier(classifier.var, classifier.vqvae, ["a"], classifier.preprocessing)
    with pytest.raises(ValueError, match="preprocessing"):
        varlik.VARClassifier(classifier.var, classifier.vqvae, classifier.class_names, Preprocessing(8, 8))


def test_token_maps_of_another_model(classifier, images):
    import dataclasses

    with pytest.raises(ValueError, match="another model"):
        classifier.log_likelihood(dataclasses.replace(images, patch_nums=(1, 2)))


def test_prior_takes_part_in_every_elimination(classifier, images):
    scores = naive(classifier, images, 2)
    worst = int(scores.sum(0).argmin())
    prior = torch.ones(7)
    prior[worst] = 1e30  # 69 nats
    margin = (scores.max() - scores.min()).item()
    assert margin < 60
    for i in range(2):
        assert worst in scored(classifier.classify(images, cascade="2:2,4:1", prior=prior).stages[1], i)
    without = classifier.classify(images, cascade="2:2,4:1").stages[1]
    for i in range(2):
        assert scored(without, i) == sorted(scores[i].topk(2).indices.tolist())


def test_callers_modes_do_not_matter(golden_classifier):
    classifier, expected = golden_classifier
    fresh = varlik.VARClassifier(classifier.var, classifier.vqvae, classifier.class_names, classifier.preprocessing)
    wanted = classifier.log_likelihood(classifier.tokenize_pixels(expected["image"]))
    with torch.inference_mode():
        first = fresh.log_likelihood(fresh.tokenize_pixels(expected["image"]), [0, 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        second = fresh.log_likelihood(fresh.tokenize_pixels(expected["image"]), [2, 3])
    third = fresh.log_likelihood(fresh.tokenize_pixels(expected["image"]), [4, 5, 6])
    torch.testing.assert_close(torch.cat((first, second, third), dim=1), wanted, rtol=1e-5, atol=0)


def test_cascade_whose_samples_go_down_and_up_again(classifier, images):
    seed, sigma = 2, 0.2
    prediction = classifier.classify(images, cascade="2x3:5,3:4,4x2:1", seed=seed, sigma=sigma)
    samples = [perturb(classifier.vqvae.quantize, images, s, Smoothing(sigma, seed)) for s in range(3)]
    for i in range(len(images)):
        rows = [(maps.tokens[i : i + 1], maps.teacher_forcing_input[i : i + 1]) for maps in samples]
        _, record = reference.cascade(classifier.var, rows, list(range(7)), [(2, 3, 5), (3, 1, 4), (4, 2, 1)])
        for stage, (labels, scores) in zip(prediction.stages, record, strict=True):
            assert scored(stage, i) == sorted(labels)
            torch.testing.assert_close(stage.log_likelihood[i, labels], scores, rtol=1e-5, atol=0)


def test_pages_come_back_even_after_an_interruption(classifier, images, monkeypatch):
    classifier.classify(images, cascade="2:5,4:1")
    held = classifier.engine.cache.pages_held

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("varlik.run.best", interrupted)
        with pytest.raises(KeyboardInterrupt):
            classifier.classify(images, cascade="2:5,4:1")
    assert classifier.engine.cache.pages_held == held


def test_a_stage_that_drops_nobody_is_scored_with_the_next(classifier, images):
    prediction = classifier.classify(images, cascade="2:7,3:2,4:1")
    first, second, third = prediction.stages
    assert [stage.tokens.tolist() for stage in prediction.stages] == [[7 * 13] * 2, [0, 0], [2 * 16] * 2]
    for stage, scales in ((first, 2), (second, 3)):
        expected = classifier.log_likelihood(images, scales=scales)
        torch.testing.assert_close(stage.log_likelihood, expected, rtol=1e-5, atol=0)
    expected = classifier.log_likelihood(images)
    for i in range(2):
        left = scored(third, i)
        assert left == sorted(second.log_likelihood[i].topk(2).indices.tolist())
        torch.testing.assert_close(third.log_likelihood[i, left], expected[i, left], rtol=1e-5, atol=0)
    assert classifier.engine.cache.pages_held == len(classifier.engine.tables)


def test_samples_equal_to_the_clean_image_cost_nothing(classifier, images):
    """With next to no noise all tokens agree, and every sample shares the clean one's scores."""
    tokens = classifier.tokenize(images)
    once = classifier.classify(tokens, cascade="4:1")
    thrice = classifier.classify(tokens, cascade="4:3,4x3:1", sigma=1e-9)
    assert thrice.cost.tokens.tolist() == once.cost.tokens.tolist()
    best = thrice.classes.unsqueeze(1)
    torch.testing.assert_close(
        thrice.log_likelihood.gather(1, best), once.log_likelihood.gather(1, best), rtol=1e-6, atol=0
    )
    smoothed = classifier.smoothed_log_likelihood(tokens, samples=3, sigma=1e-9)
    torch.testing.assert_close(smoothed, once.log_likelihood, rtol=1e-6, atol=0)


def test_no_image_is_refused(classifier, images):
    tokens = classifier.tokenize(images)
    for call in (classifier.log_likelihood, classifier.classify, classifier.token_log_prob):
        with pytest.raises(ValueError, match="at least one image"):
            call(tokens[:0])
