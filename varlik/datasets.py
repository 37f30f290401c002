"""Labelled images for training and evaluation, read from files that are already on this machine.

Nothing is downloaded. Fashion-MNIST (Xiao et al. 2017, MIT licence) is packaged by Debian as `dataset-fashion-mnist`;
any folder with the four IDX files of the MNIST family, gzipped or not, is read the same way.
"""

from __future__ import annotations

import gzip
import struct
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
HELD_OUT = 5_000  # the last images of the training files: for choices, never for training

Split = Literal["train", "held-out", "test"]


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
    if split not in ("train", "held-out", "test"):
        raise ValueError(f"split: expected 'train', 'held-out' or 'test', got {split!r}")
    folder = FASHION_MNIST_FOLDER if folder is None else Path(folder)
    prefix = "t10k" if split == "test" else "train"
    images = read_idx(_find(folder, f"{prefix}-images-idx3-ubyte"))
    labels = read_idx(_find(folder, f"{prefix}-labels-idx1-ubyte")).astype(np.int64)
    if len(images) != len(labels):
        raise ValueError(f"{folder}: {len(images)} images but {len(labels)} labels")
    data = LabelledImages(images, labels, FASHION_MNIST_CLASSES)
    return {"train": data[:-HELD_OUT], "held-out": data[-HELD_OUT:], "test": data}[split]


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
