"""First-order scores: exact where they must be, tangents everywhere else, and the same whatever the order of work."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from tiny_model import CONFIG, MANY, make_classifier, make_images

import varlik
from varlik import flops
from varlik.models import checkpoints
from varlik.models.presets import get_preset, list_models
from varlik.scoring import adjoint, class_tables, first_order
from varlik.scoring.class_tables import Conditions
from varlik.scoring.first_order import SHARPNESS, batch_rows, first_order_log_likelihood

KINDS = [MANY, replace(MANY, shared_aln=True), replace(MANY, attn_l2_norm=False)]
KIND_NAMES = ["plain", "shared", "no-l2"]
STEP = 1e-4


@pytest.fixture(scope="module")
def classifier():
    return make_classifier()


@pytest.fixture(scope="module")
def images(classifier):
    return make_images(classifier, 5)


@pytest.fixture(scope="module")
def double():
    """In float64, so that finite differences say something."""
    return make_classifier(double=True)


def mixture(classifier, weights):
    """The point between all classes and the null class with `weights` (n + 1,), one row."""
    labels = torch.arange(classifier.null_class + 1)
    classifier.engine.prepare(labels)
    tables = classifier.engine.tables
    all_of_them = tables.conditions(tables.rows(labels))
    weights = weights.to(all_of_them.vectors)
    vectors, pages = (
        torch.tensordot(weights, x, dims=1).unsqueeze(0) for x in (all_of_them.vectors, all_of_them.pages)
    )
    return Conditions(vectors, pages)


def one_hot(classifier, *labels):
    """Even weights of `labels`, none for the others."""
    weights = torch.zeros(classifier.null_class + 1, dtype=torch.float64)
    weights[list(labels)] = 1 / len(labels)
    return weights


def tangent(classifier, images, weights, scales):
    """Estimates (B, N) of all classes by finite differences around one point an image: nothing goes backwards here.

    `weights` (B, n + 1) are those of its mixtures.
    """
    engine, end = classifier.engine, MANY.boundaries[scales]
    found = torch.zeros(len(images), classifier.null_class, dtype=torch.float64)
    for b, label in itertools.product(range(len(images)), range(classifier.null_class)):
        point, one = mixture(classifier, weights[b]), mixture(classifier, one_hot(classifier, label))
        moved = [
            Conditions(point.vectors + t * (one.vectors - point.vectors), point.pages + t * (one.pages - point.pages))
            for t in (0, STEP, -STEP)
        ]
        at = Conditions(torch.cat([m.vectors for m in moved]), torch.cat([m.pages for m in moved]))
        inputs = images.teacher_forcing_input[b : b + 1, : end - 1].double().expand(3, -1, -1)
        done = adjoint.forward(engine.weights, inputs, images.tokens[b, 1:end].expand(3, -1), at, torch.arange(3))
        value, up, down = done.log_prob.sum(1)
        first = engine.tables.first_log_prob[engine.tables.rows(torch.tensor([label])), images.tokens[b, 0]]
        found[b, label] = value + (up - down) / (2 * STEP) + first.double()
    return found


@pytest.mark.parametrize("config", KINDS, ids=KIND_NAMES)
@pytest.mark.parametrize("scales", [None, 2, 3])
def test_the_class_it_is_expanded_at_gets_its_exact_score(config, scales):
    classifier = make_classifier(config)
    images = make_images(classifier, 3)
    exact = classifier.log_likelihood(images, range(classifier.null_class + 1), scales)
    for label in (0, 7, classifier.null_class):
        found = classifier.first_order_log_likelihood(images, [3, label], at=label, scales=scales)[:, 1]
        torch.testing.assert_close(found, exact[:, label], rtol=1e-5, atol=0)


def test_a_published_model_with_shared_vectors_gets_its_exact_score(data):
    loaded = checkpoints.load_models(*(data / f"shared_adaln.{part}.safetensors" for part in ("var", "vqvae")))
    classifier = varlik.VARClassifier(loaded.var, loaded.vqvae, loaded.class_names, loaded.preprocessing)
    assert classifier.var.config.shared_aln
    size = classifier.vqvae.config.resolution
    pixels = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = classifier.tokenize_pixels(pixels)
    for label in (0, classifier.null_class):
        found = classifier.first_order_log_likelihood(images, [label], at=label)
        torch.testing.assert_close(found, classifier.log_likelihood(images, [label]), rtol=1e-5, atol=0)


def test_the_first_scale_is_exact_wherever_it_is_expanded(classifier, images):
    exact = classifier.log_likelihood(images, scales=1)
    for at in ("mean", "null", 4):
        assert torch.equal(classifier.first_order_log_likelihood(images, at=at, scales=1), exact)
        parts = classifier.first_order_log_likelihood(images, at=at, per_scale=True)
        torch.testing.assert_close(parts[..., 0], exact)
        only = classifier.first_order_log_likelihood(images, at=at, scales=1, per_scale=True)
        assert torch.equal(only[..., 0], exact)


@pytest.mark.parametrize("expansions", [1, 3])
@pytest.mark.parametrize("scales", [4, 3, 2])
def test_parts_of_the_scales_sum_to_the_whole(classifier, images, scales, expansions):
    how = {"scales": scales, "expansions": expansions}
    parts = classifier.first_order_log_likelihood(images, per_scale=True, **how)
    assert parts.shape == (5, 12, scales)
    whole = classifier.first_order_log_likelihood(images, **how)
    torch.testing.assert_close(parts.sum(-1), whole, rtol=1e-5, atol=0)


def test_parts_are_those_of_their_scale(classifier, images):
    exact = torch.stack([classifier.log_likelihood(images, [6], scales)[:, 0] for scales in range(1, 5)], dim=-1)
    parts = classifier.first_order_log_likelihood(images, [6], at=[6], per_scale=True)[:, 0]
    torch.testing.assert_close(parts.cumsum(-1), exact, rtol=1e-5, atol=0)
    # Coarser scales know nothing of the finer ones: leaving these out changes nothing.
    shorter = classifier.first_order_log_likelihood(images, scales=3, per_scale=True)
    whole = classifier.first_order_log_likelihood(images, per_scale=True)
    torch.testing.assert_close(shorter, whole[..., :3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("at", ["mean", "null", "class 3", 7, [1, 4, 12], torch.tensor([2])], ids=str)
def test_estimates_are_the_tangent_at_the_point(double, at):
    images, null = make_images(double, 2), double.null_class
    members = {"mean": range(null), "null": [null], "class 3": [3], 7: [7]}.get(at if isinstance(at, str | int) else "")
    members = list(map(int, at)) if members is None else list(members)
    weights = one_hot(double, *members).expand(2, -1)
    for scales in (4, 2):
        found = double.first_order_log_likelihood(images, at=at, scales=scales)
        torch.testing.assert_close(found.double(), tangent(double, images, weights, scales), rtol=1e-6, atol=0)


def test_further_expansions_lean_towards_the_classes_that_look_best(double):
    """Each is a tangent at the image's own point, and the estimates are their average."""
    images = make_images(double, 2)
    weights = torch.full((2, 13), 1 / 12, dtype=torch.float64)
    weights[:, -1] = 0
    total = torch.zeros(2, 12, dtype=torch.float64)
    for expansions in (1, 2, 3):
        total += tangent(double, images, weights, 4)
        estimates = total / expansions
        found = double.first_order_log_likelihood(images, expansions=expansions)
        torch.testing.assert_close(found.double(), estimates, rtol=1e-6, atol=0)
        spread = estimates.std(1, correction=0, keepdim=True)
        weights[:, :-1] = (SHARPNESS * estimates / spread).softmax(1)


def test_one_class_alone_is_exact_however_often_it_is_expanded(classifier, images):
    exact = classifier.log_likelihood(images, [3])
    for expansions in (1, 2, 3):
        found = classifier.first_order_log_likelihood(images, [3], expansions=expansions)
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=0)


def test_the_error_shrinks_with_the_square_of_the_distance():
    errors = []
    for spread in (1 / 8, 1 / 16, 1 / 32):
        classifier = make_classifier(spread=spread, double=True)
        images = make_images(classifier, 4)
        estimates, exact = classifier.first_order_log_likelihood(images), classifier.log_likelihood(images)
        assert exact.std(1).min() > 0.01  # there is something to estimate
        errors.append((estimates - exact).abs().max().item())
    assert 3.7 < errors[0] / errors[1] < 4.3
    assert 3.7 < errors[1] / errors[2] < 4.3


@pytest.mark.parametrize("how", [{}, {"expansions": 2}, {"per_scale": True}, {"at": "null", "scales": 3}], ids=str)
def test_estimates_do_not_depend_on_chunks_batch_or_order(classifier, images, how, monkeypatch):
    whole = classifier.first_order_log_likelihood(images, **how)
    same = {"rtol": 1e-5, "atol": 0} if "per_scale" not in how else {"rtol": 1e-5, "atol": 1e-4}
    alone = [classifier.first_order_log_likelihood(images[i : i + 1], **how) for i in range(5)]
    torch.testing.assert_close(torch.cat(alone), whole, **same)
    scales = how.get("scales", 4)
    row = adjoint.activation_bytes(classifier.engine.weights, MANY.boundaries[scales], checkpointed=False)
    for memory, expected in ((0, (1, True)), (4 * row, (1, False)), (4 * 2 * row, (2, False))):
        small = make_classifier(max_memory=memory)
        assert batch_rows(small.engine, scales) == expected
        torch.testing.assert_close(small.first_order_log_likelihood(images, **how), whole, **same)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    found = make_classifier().first_order_log_likelihood(images, order, **how)
    torch.testing.assert_close(found, whole[:, order], **same)
    for module in (class_tables, first_order):
        monkeypatch.setattr(module, "CHUNK", 5)
    torch.testing.assert_close(make_classifier().first_order_log_likelihood(images, **how), whole, **same)


def test_blocks_are_run_again_only_where_memory_asks_for_it(classifier):
    weights = classifier.engine.weights
    kept, again = (adjoint.activation_bytes(weights, 30, checkpointed) for checkpointed in (False, True))
    rows, checkpointed = batch_rows(classifier.engine, 4)
    assert not checkpointed
    assert 5 < rows <= classifier.engine.chunk_bytes // kept
    assert again < kept
    # A quarter of the memory is a chunk's.
    assert batch_rows(make_classifier(max_memory=4 * kept).engine, 4) == (1, False)
    assert batch_rows(make_classifier(max_memory=4 * kept - 4).engine, 4) == (kept // again, True)


def test_callers_modes_do_not_matter(classifier, images):
    wanted = classifier.first_order_log_likelihood(images)
    with torch.inference_mode():
        fresh = make_classifier()
        found = fresh.first_order_log_likelihood(make_images(fresh, 5))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(fresh.first_order_log_likelihood(images), wanted, rtol=1e-5, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = make_classifier().first_order_log_likelihood(images)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


def test_in_half_precision_estimates_are_as_good_as_exact_scores(classifier, images):
    half = make_classifier(dtype=torch.bfloat16)
    errors = [
        (call(half, images) - call(classifier, images)).abs().mean()
        for call in (varlik.VARClassifier.first_order_log_likelihood, varlik.VARClassifier.log_likelihood)
    ]
    assert 0 < errors[0] < 2 * errors[1]


def test_estimates_follow_the_exact_scores_of_a_trained_model(fashion):
    """Measured on the bundled pictures: on average 0.96, 0.85 for the worst of them."""
    classifier, images, exact = fashion
    estimates = classifier.first_order_log_likelihood(images).double()
    each = [torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in zip(estimates, exact.sum(-1), strict=True)]
    assert sum(each) / len(each) > 0.95
    assert min(each) > 0.8
    best = exact.sum(-1).argmax(1)
    assert (estimates.argmax(1) == best).sum() >= 11
    assert (estimates.topk(2).indices == best.unsqueeze(1)).any(1).all()


@pytest.mark.parametrize("config", KINDS, ids=KIND_NAMES)
def test_its_cost_is_what_torch_counts(config):
    """To the last FLOP: on torch's path the ops count by the formulas that are registered with them."""
    classifier = make_classifier(config)
    images = make_images(classifier, 3)
    tight = make_classifier(config, max_memory=0)
    for made in (classifier, tight):
        made.first_order_log_likelihood(images)  # the tables are made once, and do not count
    predicted = flops.first_order(config, "true").total + flops.first_order_product(config, 12, "true").total
    assert flops.count_live(lambda: classifier.first_order_log_likelihood(images)) == 3 * predicted
    # Without memory every block goes forwards once more; not so embeddings and head.
    forward = flops._tokens(config, 1, 4, "true")
    again = forward.blocks + forward.attention
    assert flops.count_live(lambda: tight.first_order_log_likelihood(images)) == 3 * (predicted + again)


@pytest.mark.parametrize("name", list_models())
def test_its_cost_is_at_most_that_of_two_or_three_passes_forwards(name):
    config = get_preset(name).var
    for convention in flops.CONVENTIONS:
        passes = flops.first_order(config, convention).total / flops.class_pass(config, None, convention).total
        assert 1.9 < passes <= 2.3


def test_wrong_input(classifier, images):
    call = classifier.first_order_log_likelihood
    for scales in (0, 5):
        with pytest.raises(ValueError, match=f"scales: expected 1 to 4, got {scales}"):
            call(images, scales=scales)
    with pytest.raises(ValueError, match="expansions: expected 1 or more, got 0"):
        call(images, expansions=0)
    with pytest.raises(ValueError, match="classes: expected at least one class, got none"):
        call(images, [])
    with pytest.raises(ValueError, match="classes: expected at least one class, got none"):
        call(images, at=[])
    with pytest.raises(ValueError, match="knows no class 'median'"):
        call(images, at="median")
    with pytest.raises(ValueError, match=r"from 0 to 11 \(12: null\), got 13"):
        call(images, at=13)
    with pytest.raises(TypeError, match="expected a list"):
        call(images, at=1.5)
    with pytest.raises(ValueError, match="at least one image"):
        call(images[:0])
    with pytest.raises(ValueError, match="another model"):
        call(replace(images, patch_nums=(1, 2)))
    learning = replace(images, teacher_forcing_input=images.teacher_forcing_input.clone().requires_grad_())
    with pytest.raises(ValueError, match="require grad"):
        call(learning)


def test_wrong_input_of_the_function_itself(classifier, images):
    labels = torch.arange(CONFIG.num_classes)
    for wrong in ({"scales": 0}, {"scales": 5}, {"expansions": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            first_order_log_likelihood(classifier.engine, images, labels, labels, **wrong)
    for name, wrong in (("labels", (labels[:0], labels)), ("at", (labels, labels[:0])), ("at", (labels, labels[None]))):
        with pytest.raises(ValueError, match=f"{name}: expected one class or more, got shape"):
            first_order_log_likelihood(classifier.engine, images, *wrong)
