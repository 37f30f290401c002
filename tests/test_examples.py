"""Scripts of experiments, from end to end, on noise and for a few steps: figures come out, and are found again."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT

import varlik
from varlik.datasets import FASHION_MNIST_CLASSES, LabelledImages
from varlik.models.presets import bundled_folder

# The scripts of the checkout, behind what is installed.
sys.path.append(str(ROOT))
from examples import class_incremental, fashion_mnist_cca, fashion_mnist_tables, robustness
from examples.report import loaded

COUNTS = {"train": 140, "held-out": 24, "test": 12}
SMALL = {"depth": 1, "embed_dim": 32, "num_heads": 2}


def noise(split, folder=None):
    """Images of a brightness for each class, whose labels go round."""
    random = np.random.default_rng(len(split))
    labels = np.arange(COUNTS[split]) % 10
    images = 20 * labels[:, None, None] + random.integers(0, 60, (len(labels), 28, 28))
    return LabelledImages(images.astype(np.uint8), labels, FASHION_MNIST_CLASSES)


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Runs a module's `main` with some of its constants changed; returns the report that it wrote."""
    out = tmp_path / "new" / "results"

    def run(module, name, *options, **constants):
        for constant, value in (constants | {"fashion_mnist": noise}).items():
            monkeypatch.setattr(module, constant, value)
        folders = ["--work", str(tmp_path / "work"), "--out", str(out)]
        command = [module.__name__, *folders, *map(str, options)]
        monkeypatch.setattr(sys, "argv", command)
        module.main()
        assert (out / f"{name}.md").read_text().startswith("# ")
        return json.loads((out / f"{name}.json").read_text())

    return run


def test_models_by_name_and_by_folder():
    found = dict(loaded(["fashion-mnist", f"mine={bundled_folder('glyphs-100')}"]))
    assert {name: len(classifier.class_names) for name, classifier in found.items()} == {
        "fashion-mnist": 10,
        "mine": 100,
    }


def test_robustness(script):
    few = {"SIGMAS": (0.1,), "QUALITIES": (10,), "CNN_LOOP": replace(robustness.CNN_LOOP, steps=2)}
    report = script(robustness, "robustness-fashion-mnist", "--images", 3, **few)
    assert report["images"] == 3
    assert set(report["top1"]) == {"network", "fashion-mnist"}
    assert {kind: len(values) for kind, values in report["top1"]["network"].items()} == {
        "clean": 1,
        "Gaussian noise": 1,
        "JPEG": 1,
    }


def test_tables(script):
    few = {"SAMPLES": 2, "SAMPLE_COUNTS": (1, 2), "SIGMAS": (0.1,)}
    few["CASCADES"] = {"full": varlik.VARC, "fast": varlik.FAST}
    options = ("--images", 4, "--smoothed", 3, "--swept", 2)
    report = script(fashion_mnist_tables, "fashion-mnist-tables", *options, **few)
    assert set(report["table"]) == {"fashion-mnist"}
    assert len(report["scales"]) == 6
    assert report["scales"][-1] == report["table"]["fashion-mnist"]["all images"]
    assert report["cascades"]["full"]["agreement"] == 1
    assert len(report["sweep"]) == 1


@pytest.mark.slow
def test_cca(script, monkeypatch):
    module = fashion_mnist_cca
    loops = ("PLAIN_LOOP", "SHORT_LOOP", "LONG_LOOP")
    changed = {name: replace(getattr(module, name), steps=3, batch_size=8, log_every=1) for name in loops}
    short, long = (module.Variant(0.05), module.Variant(0.2, learning_rate=1e-3)), (module.Variant(0.2, confused=True),)
    few = {"SHORT": short, "LONG": long, "CONFUSION_IMAGES": 20, "SEARCH_IMAGES": 10} | changed
    few["SEEDS"] = {"plain": (1, 7), "fashion-mnist": (1,)}
    few["VAR_CONFIG"] = replace(module.VAR_CONFIG, **SMALL)
    report = script(module, "fashion-mnist-cca", "--eager", **few)
    assert len(report["short"]) == 2 + len(short)
    assert len(report["long"]) == 1 + len(long)
    assert [len(values) for values in report["final"].values()] == [1, 2, 2, 1, 1, 1]
    assert report["best"] == str(long[0])
    assert [len(parts) for parts in report["course"].values()] == [3, 3]
    # All is found again.
    for name in ("train_cca", "train_var", "train", "accuracy"):
        monkeypatch.setattr(module, name, None)
    assert script(module, "fashion-mnist-cca", "--eager", **few) == report
    with pytest.raises(ValueError, match="no model is called 'plain-long'"):
        script(module, "fashion-mnist-cca", "--only", "plain-long", **few)


def test_class_incremental(script):
    steps = ("--vqvae-steps", 2, "--var-steps", 2, "--steps", 2, "--baseline-steps", 2, "--baseline-seeds", 1)
    few = {"VAR_CONFIG": replace(class_incremental.VAR_CONFIG, **SMALL), "CHECKED": 4}
    options = (*steps, "--images", 12, "--eager")
    report = script(class_incremental, "class-incremental", *options, **few)
    assert [row["method"] for row in report["rows"][:3]] == [f"varlik, {what}" for what in class_incremental.CHANGES]
    assert report["rows"][0]["drift"] == 0
    assert len(report["rows"]) == 5
