"""Labelled images for training and evaluation, read from files that are already on this machine.

Nothing is downloaded. Fashion-MNIST (Xiao et al. 2017, MIT licence) is packaged by Debian as `dataset-fashion-mnist`;
any folder with the four IDX files of the MNIST family, gzipped or not, is read the same way. Glyphs-100 is rendered
from fonts by `examples/glyphs_100.py`.
"""

from __future__ import annotations

import gzip
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
GLYPHS_100_FILE = "glyphs-100.npz"
HELD_OUT = 5_000  # the last images of the training files: for choices, never for training

Split = Literal["train", "held-out", "test"]
SPLITS = ("train", "held-out", "test")


@dataclass(frozen=True)
class LabelledImages:
    """`images` (n, H, W) uint8, `labels` (n,) int64 indexing `class_names`."""

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice) -> LabelledImages:
        return LabelledImages(self.images[rows], self.labels[rows], self.class_names)


def fashion_mnist(split: Split, folder: str | Path | None = None) -> LabelledImages:
    """Fashion-MNIST, 28 x 28 greyscale: 55,000 images to train on, 5,000 held out, 10,000 to test.

    `folder` holds the IDX files (default: where Debian's `dataset-fashion-mnist` puts them).
    Raises `FileNotFoundError` saying what is absent and `ValueError` for an unknown split or a damaged file.
    """
    _check_split(split)
    folder = FASHION_MNIST_FOLDER if folder is None else Path(folder)
    prefix = "t10k" if split == "test" else "train"
    images = read_idx(_find(folder, f"{prefix}-images-idx3-ubyte"))
    labels = read_idx(_find(folder, f"{prefix}-labels-idx1-ubyte")).astype(np.int64)
    if len(images) != len(labels):
        raise ValueError(f"{folder}: {len(images)} images but {len(labels)} labels")
    data = LabelledImages(images, labels, FASHION_MNIST_CLASSES)
    return {"train": data[:-HELD_OUT], "held-out": data[-HELD_OUT:], "test": data}[split]


def glyphs_100(split: Split, folder: str | Path) -> LabelledImages:
    """A hundred characters in many typefaces, 32 x 32 greyscale; no family of typefaces is in two splits.

    `folder` holds what `examples/glyphs_100.py` wrote. Raises `FileNotFoundError` saying how to make it and
    `ValueError` for an unknown split or a damaged file.
    """
    _check_split(split)
    path = Path(folder) / GLYPHS_100_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} not found: make it with python -m examples.glyphs_100 --out {folder}")
    try:
        with np.load(path) as arrays:
            images, labels = arrays[f"{split}.images"], arrays[f"{split}.labels"]
            class_names = tuple(str(name) for name in arrays["class_names"])
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a file of examples/glyphs_100.py, or cut short ({error})") from error
    if images.dtype != np.uint8 or images.ndim != 3 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{path}: expected (n, H, W) uint8 images and (n,) labels, "
            f"got {images.shape} {images.dtype} and {labels.shape}"
        )
    if labels.size and not 0 <= labels.min() <= labels.max() < len(class_names):
        raise ValueError(f"{path}: labels outside the {len(class_names)} classes")
    return LabelledImages(images, labels.astype(np.int64), class_names)


DATA_SETS: dict[str, Callable[..., LabelledImages]] = {"fashion-mnist": fashion_mnist, "glyphs-100": glyphs_100}
"""By the bundled model trained on them; each takes a split and the folder with its files."""


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split: expected 'train', 'held-out' or 'test', got {split!r}")


def read_idx(path: str | Path) -> np.ndarray:
    """Array of unsigned bytes in an IDX file, gzipped or not. Raises `ValueError` naming the file if it is damaged."""
    path = Path(path)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zero, kind, dimensions = struct.unpack_from(">HBB", raw)
        shape = struct.unpack_from(f">{dimensions}I", raw, 4)
    except (OSError, EOFError, struct.error) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path}: not a readable IDX file ({error})") from error
    data = np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions)
    if zero != 0 or kind != 0x08 or data.size != int(np.prod(shape)):
        raise ValueError(f"{path}: not an IDX file of unsigned bytes, or cut short")
    return data.reshape(shape)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise FileNotFoundError(
        f"{folder / name}[.gz] not found: install Debian's dataset-fashion-mnist or name a folder with the IDX files"
    )
