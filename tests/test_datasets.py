"""Data sets: files read as they are, refused by name when damaged."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest

from varlik import datasets


def write_idx(path, array):
    raw = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "HELD_OUT", 3)
    generator = np.random.default_rng(0)
    for prefix, count, suffix in (("train", 10, ".gz"), ("t10k", 4, "")):
        images = generator.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte{suffix}", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte{suffix}", np.arange(count, dtype=np.uint8) % 10)
    return tmp_path


def test_splits(folder):
    train, held_out, test = (datasets.fashion_mnist(split, folder) for split in ("train", "held-out", "test"))
    assert (len(train), len(held_out), len(test)) == (7, 3, 4)
    assert held_out.labels.tolist() == [7, 8, 9]
    assert train.images.shape == (7, 28, 28)
    whole = datasets.read_idx(folder / "train-images-idx3-ubyte.gz")
    assert np.array_equal(np.concatenate([train.images, held_out.images]), whole)
    assert len(test.class_names) == 10


def test_absent_and_unknown(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        datasets.fashion_mnist("test", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="split"):
        datasets.fashion_mnist("validation", folder)


@pytest.mark.parametrize("damage", ["short", "not gzip", "empty", "kind", "damaged"])
def test_damaged_files_are_named(tmp_path, damage):
    path = tmp_path / "images.gz"
    write_idx(path, np.zeros((2, 3, 3), np.uint8))
    raw = gzip.decompress(path.read_bytes())
    contents = {
        "short": gzip.compress(raw[:-1]),
        "not gzip": raw,
        "empty": b"",
        "damaged": path.read_bytes()[:15] + b"\xff\xff" + path.read_bytes()[17:],
        "kind": gzip.compress(raw[:2] + b"\x0d" + raw[3:]),
    }
    path.write_bytes(contents[damage])
    with pytest.raises(ValueError, match=r"images\.gz"):
        datasets.read_idx(path)


def test_images_and_labels_that_differ_in_number(folder):
    write_idx(folder / "t10k-labels-idx1-ubyte", np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match=r"\(n, H, W\) images and \(n,\) labels, got \(4, .* and \(3,\)"):
        datasets.fashion_mnist("test", folder)


@pytest.mark.parametrize("shape", [(4,), (4, 784), (4, 28, 28, 1)])
def test_images_of_another_shape(folder, shape):
    write_idx(folder / "t10k-images-idx3-ubyte", np.zeros(shape, np.uint8))
    for read in (datasets.fashion_mnist, lambda split, folder: datasets.idx_folder(folder, split)):
        with pytest.raises(ValueError, match=r"expected \(n, H, W\) images"):
            read("test", folder)


GLYPH_COUNTS = {"train": 6, "held-out": 2, "test": 4}


@pytest.fixture
def glyphs(tmp_path):
    generator = np.random.default_rng(1)
    arrays = {"class_names": np.array(["!", "€"])}
    for split, count in GLYPH_COUNTS.items():
        arrays[f"{split}.images"] = generator.integers(0, 256, (count, 32, 32)).astype(np.uint8)
        arrays[f"{split}.labels"] = np.arange(count) % 2
    np.savez_compressed(tmp_path / datasets.GLYPHS_100_FILE, **arrays)
    return tmp_path, arrays


@pytest.mark.parametrize("split", datasets.SPLITS)
def test_splits_of_glyphs(glyphs, split):
    folder, arrays = glyphs
    data = datasets.glyphs_100(split, str(folder))
    assert np.array_equal(data.images, arrays[f"{split}.images"])
    assert data.images.dtype == np.uint8
    assert data.labels.tolist() == [0, 1] * (GLYPH_COUNTS[split] // 2)
    assert data.labels.dtype == np.int64
    assert data.class_names == ("!", "€")


def test_absent_glyphs_and_unknown_split(glyphs, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m examples\.glyphs_100 --out"):
        datasets.glyphs_100("test", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="split"):
        datasets.glyphs_100("validation", glyphs[0])


@pytest.mark.parametrize(
    "damage", ["short", "not zip", "empty", "another archive", "labels", "label", "shape", "dtype"]
)
def test_damaged_glyphs_are_named(glyphs, damage):
    folder, arrays = glyphs
    path = folder / datasets.GLYPHS_100_FILE
    raw = path.read_bytes()
    contents = {"short": raw[: len(raw) // 2], "not zip": b"fonts" * 100, "empty": b""}
    changes = {
        "labels": {"test.labels": arrays["test.labels"][1:]},
        "label": {"test.labels": arrays["test.labels"] + 1},
        "shape": {"test.images": arrays["test.images"][0]},
        "dtype": {"test.images": arrays["test.images"].astype(np.float32)},
    }
    if damage in contents:
        path.write_bytes(contents[damage])
    elif damage == "another archive":
        np.savez_compressed(path, images=arrays["test.images"])
    else:
        np.savez_compressed(path, **(arrays | changes[damage]))
    with pytest.raises(ValueError, match=datasets.GLYPHS_100_FILE):
        datasets.glyphs_100("test", folder)
