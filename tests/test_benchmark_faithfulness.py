"""The benchmark of maps: its ways are what they are called, and its tables hold what was measured."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import ROOT

import varlik
from varlik.evaluation.samples import samples
from varlik.explanation.information import explain
from varlik.explanation.maps import compose, heat
from varlik.images import load_many

# The scripts of the checkout, behind what is installed.
sys.path.append(str(ROOT))
from benchmarks import faithfulness

SLOW = ("occlusion", "captum FeatureAblation", "captum KernelShap", "captum Lime")


@pytest.fixture(scope="module")
def picture():
    classifier = varlik.load("fashion-mnist", device="cpu")
    pixels = load_many(list(samples("fashion-mnist").paths[:1]), classifier.preprocessing)
    return faithfulness.Picture(classifier, pixels, seed=3, temperature=4.5)


def test_ways_are_what_they_are_called(picture):
    found = {name: way(picture) for name, way in faithfulness.WAYS.items() if name not in SLOW}
    assert all(values.shape == (1, 32, 32) for values in found.values())
    sides = picture.maps.patch_nums
    for kind, name in (("others", "others"), ("mixture", "mixture"), ("null", "null class")):
        information = explain(picture.classifier, picture.maps, unconditional=kind).information
        torch.testing.assert_close(found[name], picture.map_of(information), rtol=1e-4, atol=1e-5)
    null = explain(picture.classifier, picture.maps, unconditional="null").information
    torch.testing.assert_close(found["null class, as released"], heat(compose(null, sides, "nearest"), 32))
    again = faithfulness.Picture(picture.classifier, picture.pixels, seed=4, temperature=4.5)
    assert not torch.equal(faithfulness.WAYS["random pixels"](again), found["random pixels"])


def test_what_is_known_is_not_measured_again(picture):
    found = faithfulness.measure(picture, 2, set(faithfulness.WAYS) - {"centre", "others"})
    assert set(found) == {"centre", "others"}
    assert all(0 <= value <= 1 for values in found.values() for value in values)


def test_tables():
    summary = faithfulness.summary([{"a": (0.5, 0.25)}, {"a": (1.0, 0.25)}])
    assert summary["a"]["insertion"] == 0.75
    assert summary["a"]["difference"] == 0.5
    assert summary["a"]["difference error"] == pytest.approx(0.25)
    assert summary["a"]["deletion error"] == 0
    about = {"model": "m", "images": 2, "steps": 10, "temperature": 4.5, "candidates": 3, "machine": {"commit": "c"}}
    assert "| a | 0.750 ± 0.250 | 0.250 ± 0.000 | 0.500 ± 0.250 |" in faithfulness.as_markdown(
        {**about, "auc": summary}
    )
