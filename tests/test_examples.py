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

# The scripts of the checkout, behind what is installed.
sys.path.append(str(ROOT))
from examples import class_incremental, fashion_mnist_cca, fashion_mnist_tables, robustness

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

    def run(module, name, *options, **constants):
        for constant, value in (constants | {"fashion_mnist": noise, "RESULTS": tmp_path}).items():
            monkeypatch.setattr(module, constant, value)
        command = [module.__name__, "--work", str(tmp_path / "work"), *map(str, options)]
        monkeypatch.setattr(sys, "argv", command)
        module.main()
        assert (tmp_path / f"{name}.md").read_text().startswith("# ")
        return json.loads((tmp_path / f"{name}.json").read_text())

    return run


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
    changed = {name: replace(getattr(module, name), steps=2, batch_size=8) for name in loops}
    short, long = (module.Variant(0.05), module.Variant(0.2, learning_rate=1e-3)), (module.Variant(0.2, confused=True),)
    few = {"SHORT": short, "LONG": long, "CONFUSION_IMAGES": 20, "SEARCH_IMAGES": 10} | changed
    few["SEEDS"] = (module.LONG_LOOP.seed, 7)
    few["VAR_CONFIG"] = replace(module.VAR_CONFIG, **SMALL)
    report = script(module, "fashion-mnist-cca", "--eager", **few)
    assert len(report["short"]) == 2 + len(short)
    assert len(report["long"]) == 1 + len(long)
    assert [len(values) for values in report["final"].values()] == [1, 2, 2] * 2
    assert report["best"] == str(long[0])
    # All is found again.
    for name in ("train_cca", "train_var", "train", "accuracy"):
        monkeypatch.setattr(module, name, None)
    assert script(module, "fashion-mnist-cca", "--eager", **few) == report
    with pytest.raises(ValueError, match="no model is called 'plain-long'"):
        script(module, "fashion-mnist-cca", "--only", "plain-long", **few)


def test_class_incremental(script, tmp_path):
    steps = ("--vqvae-steps", 2, "--var-steps", 2, "--steps", 2, "--baseline-steps", 2, "--baseline-seeds", 1)
    few = {"VAR_CONFIG": replace(class_incremental.VAR_CONFIG, **SMALL), "CHECKED": 4}
    options = (*steps, "--images", 12, "--out", tmp_path, "--eager")
    report = script(class_incremental, "class-incremental", *options, **few)
    assert [row["method"] for row in report["rows"][:3]] == [f"varlik, {what}" for what in class_incremental.CHANGES]
    assert report["rows"][0]["drift"] == 0
    assert len(report["rows"]) == 5
