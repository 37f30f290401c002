"""Insertion and deletion curves, what maps are compared with, and maps in captum's form."""

from __future__ import annotations

import sys

import pytest
import torch

from varlik.evaluation.samples import samples
from varlik.explanation import comparisons
from varlik.explanation.attribution import TokenAttribution
from varlik.explanation.faithfulness import blank, curves, posterior_score
from varlik.explanation.information import explain
from varlik.explanation.maps import compose, heat
from varlik.images import load_many

SIZE = 8
FIRST = torch.zeros(2, dtype=torch.int64)
BLACK = {"insertion_baseline": "black", "deletion_baseline": "black"}


def corner(pixels):
    """Two classes; the first is as likely as the upper left quarter is bright."""
    share = (pixels[:, 0, : SIZE // 2, : SIZE // 2].mean((1, 2)) + 1) / 2
    return torch.stack((share, 1 - share), dim=1)


@pytest.fixture
def pixels():
    return torch.ones(2, 1, SIZE, SIZE)


@pytest.fixture
def importance():
    """The quarter first for the first image, last for the second."""
    quarter = torch.zeros(SIZE, SIZE)
    quarter[: SIZE // 2, : SIZE // 2] = 1
    return torch.stack((quarter, -quarter))


def test_curves_by_hand(pixels, importance):
    found = curves(corner, pixels, importance, FIRST, steps=4, **BLACK)
    assert found.shares.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert found.insertion.tolist() == [[0, 1, 1, 1, 1], [0, 0, 0, 0, 1]]
    assert found.deletion.tolist() == [[1, 0, 0, 0, 0], [1, 1, 1, 1, 0]]
    assert found.insertion_auc.tolist() == [0.875, 0.125]
    assert found.deletion_auc.tolist() == [0.125, 0.875]
    # Against the other class the same curves stand on their heads.
    other = curves(corner, pixels, importance, FIRST + 1, steps=4, **BLACK)
    torch.testing.assert_close(other.insertion, 1 - found.insertion)


def test_images_have_classes_of_their_own(pixels, importance):
    mixed = curves(corner, pixels, importance, torch.tensor([0, 1]), steps=3, **BLACK)
    each = [curves(corner, pixels[i : i + 1], importance[i : i + 1], torch.tensor([i]), 3, **BLACK) for i in range(2)]
    torch.testing.assert_close(mixed.insertion, torch.cat([one.insertion for one in each]))


def test_ties_go_from_left_to_right_and_down(pixels):
    seen = []

    def score(shown):
        seen.append(shown)
        return corner(shown)

    curves(score, pixels[:1], torch.zeros(1, SIZE, SIZE), FIRST[:1], steps=SIZE, **BLACK)
    second = seen[0][1, 0]  # after one of eight steps
    assert second[0].eq(1).all()
    assert second[1:].eq(-1).all()


def test_insertion_begins_and_deletion_ends_with_their_baselines(pixels):
    picture = pixels.clone()
    picture[:, :, : SIZE // 2] = -1
    seen = []

    def score(shown):
        seen.append(shown)
        return corner(shown)

    curves(score, picture, torch.zeros(2, SIZE, SIZE), FIRST, steps=2)
    inserted, deleted = seen[0].split(6)
    assert torch.equal(inserted[:2], blank(picture, "blur"))
    assert torch.equal(inserted[-2:], picture)
    assert torch.equal(deleted[:2], picture)
    assert torch.equal(deleted[-2:], blank(picture, "grey"))


def test_baselines(pixels):
    assert blank(pixels, "grey").eq(0).all()
    assert blank(pixels, "black").eq(-1).all()
    torch.testing.assert_close(blank(pixels, "blur"), pixels)  # nothing to blur
    dot = torch.full((1, 3, SIZE, SIZE), -1.0)
    dot[:, 1, 4, 4] = 1
    blurred = blank(dot, "blur")
    assert -1 < blurred[0, 1, 4, 4] < 0
    assert blurred[0, 1, 4, 3] > -1
    assert blurred[0, [0, 2]].eq(-1).all()  # channels stay apart


@pytest.mark.gpu
def test_curves_on_a_gpu_are_those_on_the_cpu(pixels, importance):
    """Wherever importance and columns lie."""
    wanted = curves(corner, pixels, importance, FIRST, steps=4, **BLACK)
    for device in ("cpu", "cuda"):
        found = curves(corner, pixels.cuda(), importance.to(device), FIRST.to(device), steps=4, **BLACK)
        torch.testing.assert_close(found.insertion_auc.cpu(), wanted.insertion_auc)
        torch.testing.assert_close(found.deletion_auc.cpu(), wanted.deletion_auc)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: expected 1 or more"),
        ({"column": FIRST + 2}, "column: expected 0 to 1, got"),
        ({"column": FIRST - 1}, "column: expected 0 to 1, got"),
        ({"column": FIRST[:1]}, "column: expected integers"),
        ({"column": FIRST.float()}, "column: expected integers"),
        ({"importance": torch.full((2, SIZE, SIZE), torch.nan)}, "importance: expected numbers, got NaN"),
        ({"insertion_baseline": "pink"}, "baseline: expected 'blur' or 'grey' or 'black', got 'pink'"),
        ({"deletion_baseline": "pink"}, "baseline: expected 'blur' or 'grey' or 'black', got 'pink'"),
    ],
)
def test_curves_refuse(pixels, importance, options, message):
    with pytest.raises(ValueError, match=message):
        curves(corner, pixels, **{"importance": importance, "column": FIRST, **options})
    with pytest.raises(ValueError, match="importance: expected"):
        curves(corner, pixels, importance[:1], FIRST)


def test_ways_that_look_at_no_classifier(pixels):
    assert torch.equal(comparisons.random_order(pixels, 3), comparisons.random_order(pixels, 3))
    assert not torch.equal(comparisons.random_order(pixels, 3), comparisons.random_order(pixels, 4))
    cells = comparisons.random_order(pixels, cells=2)
    assert cells.shape == (2, SIZE, SIZE)
    assert len(cells[0].unique()) == 4
    assert len(cells[0, : SIZE // 2, : SIZE // 2].unique()) == 1
    middle = comparisons.centre(pixels)[0]
    assert middle[3, 3] == middle.max()
    assert middle[0, 0] == middle.min()
    half = pixels.clone()
    half[..., SIZE // 2 :] = -1
    strength = comparisons.edges(half)[0]
    assert strength[:, 3:5].min() > 0
    assert strength[:, [0, 1, 6, 7]].eq(0).all()


def test_occlusion_finds_what_counts(pixels):
    found = comparisons.occlusion(corner, pixels, FIRST, "black", cells=4)[0]
    inside = found[: SIZE // 2, : SIZE // 2]
    assert inside.min() > found[SIZE // 2 + 2 :, SIZE // 2 + 2 :].max()
    assert found[SIZE // 2 + 2 :, SIZE // 2 + 2 :].eq(0).all()


@pytest.mark.parametrize("method", ["FeatureAblation", "KernelShap", "Lime"])
def test_captum_finds_what_counts(pixels, method):
    pytest.importorskip("captum")
    torch.manual_seed(0)
    found = comparisons.captum(method, corner, pixels[:1], FIRST[:1], "black", cells=4)[0]
    assert found.shape == (SIZE, SIZE)
    inside, outside = found[: SIZE // 2, : SIZE // 2], found[SIZE // 2 :, SIZE // 2 :]
    assert inside.mean() > 5 * outside.abs().mean()
    if method == "FeatureAblation":
        torch.testing.assert_close(inside, torch.full_like(inside, 0.25))
        assert outside.eq(0).all()


def test_without_captum_it_says_what_to_install(pixels, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(ImportError, match=r"pip install 'varlik\[explain\]'"):
        comparisons.captum("Lime", corner, pixels, FIRST)


def test_unknown_methods_and_cells(pixels):
    with pytest.raises(ValueError, match="method: expected one of 'FeatureAblation'"):
        comparisons.captum("Guess", corner, pixels, FIRST)
    with pytest.raises(ValueError, match="cells: expected 1 to 8"):
        comparisons.cell_mask(pixels, 9)


def test_posterior_score_is_the_classifiers(fashion):
    classifier = fashion[0]
    pixels = load_many(list(samples("fashion-mnist").paths[:3]), classifier.preprocessing)
    classes = torch.tensor([7, 2, 9])
    wanted = (classifier.log_likelihood(classifier.tokenize_pixels(pixels), classes).double() / 4).softmax(-1)
    torch.testing.assert_close(posterior_score(classifier, classes, 4.0)(pixels), wanted.float())
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature: expected a positive number"):
            posterior_score(classifier, classes, temperature)


def test_attribution_is_the_map(fashion):
    classifier = fashion[0]
    pixels = load_many(list(samples("fashion-mnist").paths[:2]), classifier.preprocessing)
    found = TokenAttribution(classifier).attribute(pixels, target=torch.tensor([9, 2]))
    assert found.shape == (2, 1, *pixels.shape[2:])
    explanation = explain(classifier, classifier.tokenize_pixels(pixels), [9, 2])
    maps = compose(explanation.information, explanation.patch_nums)
    torch.testing.assert_close(found[:, 0], heat(maps, pixels.shape[-1], signed=True))
    ways = TokenAttribution(classifier)
    against = ways.attribute(pixels, target=9, contrast=7)
    contrast = explain(classifier, classifier.tokenize_pixels(pixels), 9, 7).contrast
    wanted = heat(compose(contrast, explanation.patch_nums), pixels.shape[-1], signed=True)
    torch.testing.assert_close(against[:, 0], wanted)
    assert against.abs().max() <= 1
    torch.testing.assert_close(ways.attribute(pixels, target=9, contrast=7, against=True), against)
    torch.testing.assert_close(ways.attribute(pixels, torch.tensor(9), torch.tensor(7)), against)
    torch.testing.assert_close(ways.attribute(pixels, [9, 9], torch.tensor([7, 7])), against)
    rival = explain(classifier, classifier.tokenize_pixels(pixels), [9, 2]).contrast
    wanted = heat(compose(rival, explanation.patch_nums), pixels.shape[-1], signed=True)
    torch.testing.assert_close(ways.attribute(pixels, [9, 2], against=True)[:, 0], wanted)
    torch.testing.assert_close(ways.attribute(pixels, [9, 2], [7, 7], against=False), found)
