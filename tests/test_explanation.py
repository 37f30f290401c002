"""Token-wise mutual information and its maps, against sums, explicit loops and plain probabilities."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_model import make_classifier, make_images

import varlik
from varlik import reference
from varlik.classifier import VARClassifier
from varlik.evaluation.samples import samples
from varlik.explanation.information import Unconditional, explain, mixture_log_prob, others_log_prob
from varlik.explanation.maps import by_scale, compose, heat
from varlik.models import checkpoints
from varlik.smoothing import Smoothing, perturb

SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
KINDS = get_args(Unconditional)


@pytest.fixture(scope="module", params=("adaln", "shared_adaln"))
def golden(request, data):
    """A golden model with its images, and the token log-probs (2, N + 1, L) of the original modules."""
    files = [data / f"{request.param}.{part}.safetensors" for part in ("var", "vqvae")]
    loaded = checkpoints.load_models(*files)
    classifier = VARClassifier(loaded.var, loaded.vqvae, loaded.class_names, loaded.preprocessing)
    expected = load_file(data / f"{request.param}.expected.safetensors")
    return classifier, classifier.tokenize_pixels(expected["image"]), expected["token_log_prob"].double()


@pytest.fixture(scope="module")
def tiny():
    """A classifier of 12 classes with random weights, and three images."""
    classifier = make_classifier()
    return classifier, make_images(classifier, 3)


@pytest.fixture(scope="module")
def glyphs():
    """The bundled glyphs-100 and the token maps of its 20 pictures."""
    classifier = varlik.load("glyphs-100")
    return classifier, classifier.tokenize(list(samples("glyphs-100").paths))


def random_values(sides, count=2, seed=0):
    length = sum(p * p for p in sides)
    return torch.randn(count, length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def brute_force_mixture(log_prob):
    """log p(token | tokens before it) of (N, L), from plain probabilities."""
    found = []
    products = [1.0] * len(log_prob)
    for token in range(log_prob.shape[1]):
        before = sum(products)
        products = [p * math.exp(row[token]) for p, row in zip(products, log_prob.tolist(), strict=True)]
        found.append(math.log(sum(products) / before))
    return torch.tensor(found, dtype=torch.float64)


def brute_force_map(values, sides, rule, weights=None):
    """One map of values (L,), cell by cell."""
    side = sides[-1]
    total = torch.zeros(side, side, dtype=torch.float64)
    first = 0
    for k, p in enumerate(sides):
        weight = 1.0 if weights is None else weights[k]
        for i in range(side):
            for j in range(side):
                if rule == "nearest":
                    token = first + (i * p // side) * p + j * p // side
                    total[i, j] += weight * values[token] * (p / side) ** 2
                    continue
                for y in range(p):
                    for x in range(p):
                        # Shares of the token's square that lie in the cell, in units of 1 / (p side).
                        down = max(0, min((i + 1) * p, (y + 1) * side) - max(i * p, y * side))
                        across = max(0, min((j + 1) * p, (x + 1) * side) - max(j * p, x * side))
                        total[i, j] += weight * values[first + y * p + x] * down * across / side**2
        first += p * p
    return total


def bilinear(values, size):
    """Values (P, P) enlarged as `align_corners=False` does."""
    side = len(values)
    found = torch.zeros(size, size, dtype=values.dtype)
    for i in range(size):
        for j in range(size):
            y, x = (min(max((at + 0.5) * side / size - 0.5, 0), side - 1) for at in (i, j))
            top, left = int(y), int(x)
            bottom, right = min(top + 1, side - 1), min(left + 1, side - 1)
            above = values[top, left] * (1 - x + left) + values[top, right] * (x - left)
            below = values[bottom, left] * (1 - x + left) + values[bottom, right] * (x - left)
            found[i, j] = above * (1 - y + top) + below * (y - top)
    return found


# The identity: TMI summed over the tokens is log p(x | y) - log p(x).


def check_identity(classifier, images, classes, scores):
    """`scores` (B, N + 1) are log-likelihoods of `classes` and the null class, made without `explain`."""
    scores = scores.double()
    for kind in KINDS:
        found = explain(classifier, images, classes=classes, unconditional=kind)
        for information, label in ((found.information, found.target), (found.rival_information, found.rival)):
            chosen = found.labels == label[:, None]
            own = scores[:, :-1][chosen]
            marginal = {
                "others": scores[:, :-1][~chosen].view(len(own), -1).logsumexp(1) - math.log(len(classes) - 1),
                "mixture": scores[:, :-1].logsumexp(1) - math.log(len(classes)),
                "null": scores[:, -1],
            }[kind]
            unconditional = found.unconditional if label is found.target else found.rival_unconditional
            unconditional = unconditional.double().sum(1)
            torch.testing.assert_close(unconditional, marginal, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(information.double().sum(1), own - marginal, rtol=1e-4, atol=1e-4)


def test_identity_on_fashion_mnist(fashion):
    classifier, images, _ = fashion
    labels = list(range(classifier.null_class + 1))
    naive = reference.log_likelihood(classifier.var, images.tokens, images.teacher_forcing_input, labels)
    check_identity(classifier, images, labels[:-1], naive)


def test_identity_on_glyphs(glyphs):
    classifier, images = glyphs
    classes = list(range(0, 100, 8))
    check_identity(classifier, images, classes, classifier.log_likelihood(images, [*classes, classifier.null_class]))


# The mixture of the classes.


def test_mixture_equals_plain_probabilities():
    generator = torch.Generator().manual_seed(3)
    log_prob = -3 * torch.rand(2, 5, 40, dtype=torch.float64, generator=generator)
    found = mixture_log_prob(log_prob)
    assert found.dtype == torch.float64
    for own, wanted in zip(found, map(brute_force_mixture, log_prob), strict=True):
        torch.testing.assert_close(own, wanted, rtol=0, atol=1e-12)


def test_mixture_of_one_class_is_the_class():
    log_prob = -random_values((1, 2, 3)).abs().unsqueeze(1)
    torch.testing.assert_close(mixture_log_prob(log_prob), log_prob[:, 0])


def test_mixture_where_probabilities_vanish():
    log_prob = -200 * torch.rand(1, 4, 300, generator=torch.Generator().manual_seed(0))
    total = log_prob.double().sum(-1).logsumexp(1) - math.log(4)
    torch.testing.assert_close(mixture_log_prob(log_prob).sum(1), total, rtol=1e-10, atol=0)


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_mixture_at_a_temperature_is_a_distribution(temperature):
    """Summed over all sequences of three tokens, what it gives to each adds up to 1."""
    generator = torch.Generator().manual_seed(1)
    by_class = torch.rand(4, 3, 5, dtype=torch.float64, generator=generator).log_softmax(-1)  # class, place, token
    sequences = torch.cartesian_prod(*[torch.arange(5)] * 3)
    log_prob = by_class[:, torch.arange(3), sequences].transpose(0, 1)
    tempered = mixture_log_prob(log_prob, temperature)
    torch.testing.assert_close(tempered.sum(1).exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    assert not torch.allclose(tempered, mixture_log_prob(log_prob))
    even = log_prob.exp().mean(1).log()
    torch.testing.assert_close(mixture_log_prob(log_prob, 1e9), even, rtol=1e-6, atol=1e-6)


# Golden cases: the original modules' token log-probs, then loops.


@pytest.mark.parametrize("kind", KINDS)
def test_golden_explanation_equals_loops(golden, kind):
    classifier, images, original = golden
    found = explain(classifier, images, unconditional=kind)
    sides = classifier.var.config.patch_nums
    assert (found.kind, found.patch_nums, len(found)) == (kind, sides, 2)
    assert torch.equal(found.tokens, images.tokens)
    for i in range(2):
        by_class = original[i, :-1]
        ranking = by_class.sum(1).argsort(descending=True).tolist()
        marginals = [
            {
                "others": brute_force_mixture(torch.cat((by_class[:own], by_class[own + 1 :]))),
                "mixture": brute_force_mixture(by_class),
                "null": original[i, -1],
            }[kind]
            for own in ranking[:2]
        ]
        assert (int(found.target[i]), int(found.rival[i])) == tuple(ranking[:2])
        wanted = {
            "information": by_class[ranking[0]] - marginals[0],
            "rival_information": by_class[ranking[1]] - marginals[1],
            "contrast": by_class[ranking[0]] - by_class[ranking[1]],
        }
        torch.testing.assert_close(found.posterior[i].double(), by_class.sum(1).softmax(0), atol=2e-3, rtol=0)
        for name, values in wanted.items():
            tokens = getattr(found, name)
            torch.testing.assert_close(tokens[i].double(), values, atol=5e-4, rtol=0)
            for rule in ("area", "nearest"):
                map_ = brute_force_map(values, sides, rule)
                torch.testing.assert_close(compose(tokens, sides, rule)[i].double(), map_, atol=2e-3, rtol=0)


# Maps.


@pytest.mark.parametrize("rule", ["area", "nearest"])
@pytest.mark.parametrize("sides", [(1, 2, 3, 4, 6, 8), (1, 3, 5, 7)])
def test_maps_equal_loops(rule, sides):
    values, weights = random_values(sides), [0.5, -1.0, 0.0, 2.0, 1.0, 3.0][: len(sides)]
    for given in (None, weights):
        found = compose(values, sides, rule, given)
        wanted = torch.stack([brute_force_map(row, sides, rule, given) for row in values])
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_area_keeps_sums_whatever_the_side():
    values = random_values(SIDES)
    torch.testing.assert_close(compose(values, SIDES).sum((1, 2)), values.sum(1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("p", SIDES[:-1])
def test_nearest_keeps_sums_exactly_where_sides_divide(p):
    values = random_values((p, 16))
    values[:, p * p :] = 0
    kept = torch.allclose(compose(values, (p, 16), "nearest").sum((1, 2)), values.sum(1), rtol=1e-10, atol=1e-10)
    assert kept == (16 % p == 0)


def test_maps_of_each_scale_are_row_major():
    parts = by_scale(torch.arange(14.0).unsqueeze(0), (1, 2, 3))
    assert [part.shape for part in parts] == [(1, 1, 1), (1, 2, 2), (1, 3, 3)]
    assert parts[2][0].tolist() == [[5, 6, 7], [8, 9, 10], [11, 12, 13]]


@pytest.mark.parametrize("rule", ["area", "nearest"])
def test_compose_is_linear_in_values_and_weights(rule):
    a, b = random_values(SIDES, seed=1), random_values(SIDES, seed=2)
    torch.testing.assert_close(
        compose(a - b, SIDES, rule), compose(a, SIDES, rule) - compose(b, SIDES, rule), rtol=0, atol=1e-10
    )
    one_by_one = [compose(a, SIDES, rule, [float(k == own) for k in range(len(SIDES))]) for own in range(len(SIDES))]
    torch.testing.assert_close(sum(one_by_one), compose(a, SIDES, rule), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "bilinear"}, "rule: expected 'area' or 'nearest', got 'bilinear'"),
        ({"scale_weights": [1, 2]}, "scale_weights: expected 3 numbers, got 2"),
        ({"values": torch.zeros(2, 13)}, "values: expected (B, 14), got (2, 13)"),
        ({"values": torch.zeros(14)}, "values: expected (B, 14), got (14,)"),
    ],
)
def test_compose_refuses(arguments, message):
    with pytest.raises(ValueError) as error:
        compose(**{"values": torch.zeros(2, 14), "patch_nums": (1, 2, 3), **arguments})
    assert message in str(error.value)


def test_heat_as_released():
    maps = compose(random_values((1, 2, 3, 4)), (1, 2, 3, 4), "nearest")
    for own, found in zip(maps, heat(maps, 12), strict=True):
        cut = own.clamp(min=0)
        wanted = bilinear((cut - cut.min()) / (cut.max() - cut.min()), 12)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    positive = heat(torch.tensor([[[1.0, 2.0], [3.0, 5.0]]]), 2)
    assert positive.tolist() == [[[0.0, 0.25], [0.5, 1.0]]]


def test_signed_heat_keeps_zero_and_signs():
    maps = compose(random_values((1, 2, 3, 4)), (1, 2, 3, 4))
    for own, found in zip(maps, heat(maps, 12, signed=True), strict=True):
        torch.testing.assert_close(found, bilinear(own / own.abs().max(), 12), rtol=0, atol=1e-12)
    same_size = heat(torch.tensor([[[0.0, 2.0], [-4.0, 1.0]]]), 2, signed=True)
    assert same_size.tolist() == [[[0.0, 0.5], [-1.0, 0.25]]]


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_heat_of_an_even_map_is_zero(value):
    even = torch.full((2, 4, 4), value)
    assert torch.equal(heat(even, 8), torch.zeros(2, 8, 8))
    assert torch.equal(heat(torch.zeros(1, 4, 4), 8, signed=True), torch.zeros(1, 8, 8))


def test_heat_of_one_image_does_not_depend_on_another():
    maps = compose(random_values((1, 2, 3, 4), count=3), (1, 2, 3, 4))
    for signed in (False, True):
        assert torch.equal(heat(maps, 8, signed)[1:2], heat(maps[1:2], 8, signed))


# What is explained, against what.


def test_contrast_is_the_difference_of_two_classes(tiny):
    classifier, images = tiny
    found = explain(classifier, images, target=[4, "class 0", 7], contrast="class 9")
    log_prob = classifier.token_log_prob(images)
    assert (found.target.tolist(), found.rival.tolist()) == ([4, 0, 7], [9, 9, 9])
    difference = torch.stack([log_prob[i, y] for i, y in enumerate((4, 0, 7))]) - log_prob[:, 9]
    torch.testing.assert_close(found.contrast, difference, rtol=0, atol=1e-5)
    for kind in ("mixture", "null"):
        one = explain(classifier, images, [4, 0, 7], 9, unconditional=kind)
        torch.testing.assert_close(one.information - one.rival_information, difference, rtol=0, atol=1e-5)


def test_by_default_the_best_class_against_the_runner_up(tiny):
    classifier, images = tiny
    ranking = classifier.log_likelihood(images).argsort(1, descending=True)
    found = explain(classifier, images)
    assert torch.equal(found.target, ranking[:, 0])
    assert torch.equal(found.rival, ranking[:, 1])
    given = explain(classifier, images, target=ranking[:, 2])
    assert torch.equal(given.target, ranking[:, 2])
    assert torch.equal(given.rival, ranking[:, 0])
    given = explain(classifier, images, contrast=ranking[:, 3].tolist())
    assert torch.equal(given.target, ranking[:, 0])
    assert torch.equal(given.rival, ranking[:, 3])


def test_candidates_are_those_named_in_their_order(tiny):
    classifier, images = tiny
    classes = [7, "class 3", classifier.null_class, 11]
    found = explain(classifier, images, classes=classes, unconditional="mixture")
    log_prob = classifier.token_log_prob(images, classes)
    assert found.labels.tolist() == [7, 3, 12, 11]
    torch.testing.assert_close(found.token_log_prob, log_prob, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.unconditional, mixture_log_prob(log_prob).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.posterior, log_prob.double().sum(-1).softmax(1).float(), rtol=1e-3, atol=1e-6)
    assert set(found.target.tolist()) | set(found.rival.tolist()) <= {7, 3, 12, 11}


def test_null_class_among_the_candidates(tiny):
    classifier, images = tiny
    classes = [classifier.null_class, 2, 5]
    found = explain(classifier, images, target=2, classes=classes, unconditional="null")
    torch.testing.assert_close(found.unconditional, found.token_log_prob[:, 0])
    alone = explain(classifier, images, target=2, classes=[2, 5], unconditional="null")
    torch.testing.assert_close(alone.information, found.information, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["others", "mixture"])
def test_contrast_and_mixtures_take_no_null_class(tiny, kind):
    """Whatever the null class says, or if it says nothing, these stay as they are."""
    classifier, images = tiny
    broken = copy.deepcopy(classifier.var)
    with torch.no_grad():
        broken.class_emb.weight[classifier.null_class] = torch.nan
    without = VARClassifier(broken, classifier.vqvae, classifier.class_names, classifier.preprocessing)
    found, wanted = (explain(one, images, unconditional=kind) for one in (without, classifier))
    torch.testing.assert_close(found.information, wanted.information)
    torch.testing.assert_close(found.contrast, wanted.contrast)
    with pytest.raises(ValueError, match="unconditional: the null class of custom gives no finite log-probs"):
        explain(without, images, unconditional="null")


@pytest.mark.parametrize("kind", KINDS)
def test_batch_independence(tiny, kind):
    classifier, images = tiny
    together = explain(classifier, images, unconditional=kind, samples=2)
    for i in range(3):
        alone = explain(classifier, images[i : i + 1], unconditional=kind, samples=2)
        for name in ("information", "rival_information", "contrast", "posterior"):
            torch.testing.assert_close(
                getattr(alone, name), getattr(together[i : i + 1], name), rtol=1e-4, atol=1e-5, msg=name
            )


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_averaged(golden, kind):
    classifier, images, _ = golden
    found = explain(classifier, images, target=0, contrast=1, samples=3, sigma=0.3, seed=5, unconditional=kind)
    quantizer, how = classifier.vqvae.quantize, Smoothing(0.3, 5)
    each = [perturb(quantizer, images, sample, how) for sample in range(3)]
    assert any((one.tokens != images.tokens).any() for one in each[1:])
    labels = list(range(classifier.null_class + 1))
    samples = torch.stack([classifier.token_log_prob(one, labels) for one in each]).double()
    marginal = {
        "others": lambda one: mixture_log_prob(one[:, 1:-1]),
        "mixture": lambda one: mixture_log_prob(one[:, :-1]),
        "null": lambda one: one[:, -1],
    }[kind]
    information = torch.stack([one[:, 0] - marginal(one) for one in samples]).mean(0)
    by_class = samples.mean(0)
    torch.testing.assert_close(found.token_log_prob.double(), by_class[:, :-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.information.double(), information, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.contrast.double(), by_class[:, 0] - by_class[:, 1], rtol=1e-4, atol=1e-5)
    assert torch.equal(found.tokens, images.tokens)
    smoothed = classifier.smoothed_log_likelihood(images, samples=3, sigma=0.3, seed=5)
    torch.testing.assert_close(found.token_log_prob.sum(-1), smoothed, rtol=1e-5, atol=0)


def test_weight_of_evidence_between_two_candidates_is_the_contrast(tiny):
    classifier, images = tiny
    found = explain(classifier, images, classes=[2, 5])
    assert found.kind == "others"
    torch.testing.assert_close(found.information, found.contrast)
    torch.testing.assert_close(found.rival_information, -found.contrast)


@pytest.mark.parametrize("kind", KINDS)
def test_slices(tiny, kind):
    classifier, images = tiny
    found = explain(classifier, images, unconditional=kind)
    part = found[1:3]
    torch.testing.assert_close(part.rival_information, found.rival_information[1:3])
    assert (len(part), part.kind, part.patch_nums) == (2, found.kind, found.patch_nums)
    assert torch.equal(part.labels, found.labels)
    assert torch.equal(part.contrast, found.contrast[1:3])
    assert torch.equal(replace(part, rival=part.target).contrast, torch.zeros_like(part.contrast))
    with pytest.raises(TypeError, match="rows: expected a slice, got int"):
        found[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": [3]}, "classes: an explanation takes two candidates or more, got 1"),
        ({"classes": [3, 99]}, "classes: expected indices from 0 to 11"),
        ({"target": "boat"}, "target: tiny knows no class 'boat'"),
        ({"contrast": 13}, "contrast: expected indices from 0 to 11"),
        ({"target": 3, "contrast": 3}, "contrast: expected another class than the target"),
        ({"target": [1, 2, 3], "contrast": [4, 5, "class 3"]}, "contrast: expected another class than the target"),
        ({"target": [1, 2]}, "target: expected one class or 3, got 2"),
        ({"contrast": [1, 2, 3, 4]}, "contrast: expected one class or 3, got 4"),
        ({"target": 3, "classes": [1, 2]}, "target: classes [3] are not among the candidates"),
        ({"contrast": [1, 5, 4], "classes": [1, 2]}, "contrast: classes [4, 5] are not among the candidates"),
        ({"target": [1, 2, "boat"]}, "target: tiny knows no class 'boat'"),
        ({"samples": 0}, "samples: expected 1 or more, got 0"),
        ({"samples": 2, "sigma": 0.0}, "sigma: expected a positive standard deviation, got 0.0"),
        ({"unconditional": "nil"}, "unconditional: expected 'others' or 'mixture' or 'null', got 'nil'"),
    ],
)
def test_explain_refuses(tiny, arguments, message):
    classifier, images = tiny
    with pytest.raises(ValueError) as error:
        explain(classifier, images, **arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 3.5}, "target: expected a class or a list of classes, got float"),
        ({"contrast": [1, None, 2]}, "contrast: expected"),
        ({"samples": "2"}, "samples: expected an int, got str"),
        ({"samples": True}, "samples: expected an int, got bool"),
    ],
)
def test_explain_refuses_other_types(tiny, arguments, message):
    classifier, images = tiny
    with pytest.raises(TypeError) as error:
        explain(classifier, images, **arguments)
    assert str(error.value).startswith(message)


def test_classes_as_arrays(tiny):
    classifier, images = tiny
    wanted = explain(classifier, images, target=[3, 3, 3], contrast=[1, 2, 4])
    for target, contrast in (
        (np.int64(3), np.array([1, 2, 4])),
        (torch.tensor(3), torch.tensor([1, 2, 4])),
    ):
        found = explain(classifier, images, target, contrast)
        assert torch.equal(found.contrast, wanted.contrast)


def test_others_at_a_temperature_leave_the_class_out():
    log_prob = -3 * torch.rand(2, 4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = others_log_prob(log_prob, torch.tensor([0, 2]), 2.5)
    torch.testing.assert_close(found[0], mixture_log_prob(log_prob[:1, 1:], 2.5)[0])
    torch.testing.assert_close(found[1], mixture_log_prob(log_prob[1:, [0, 1, 3]], 2.5)[0])


def test_wrong_classes_are_refused_before_any_work(tiny, monkeypatch):
    classifier, images = tiny
    monkeypatch.setattr(VARClassifier, "token_log_prob", lambda *_: pytest.fail("scored"))
    for arguments in ({"target": 99}, {"contrast": "boat"}):
        with pytest.raises(ValueError):
            explain(classifier, images, **arguments)
