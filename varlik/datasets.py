"""Labelled images for training and evaluation: those of the bundled models, IDX files, folders, Hugging Face data sets.

Fashion-MNIST (Xiao et al. 2017, MIT licence) is packaged by Debian as `dataset-fashion-mnist`; any folder with the four
IDX files of the MNIST family, gzipped or not, is read the same way. Glyphs-100 is rendered from fonts by
`examples/glyphs_100.py`. Nothing is downloaded, but what `datasets.load_dataset` fetches where it is asked to.

Every kind is an `ImageSource`: labels at once, images one at a time.
"""

from __future__ import annotations

import gzip
import hashlib
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

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

PICTURE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".jp2", ".gif", ".bmp", ".tif", ".tiff"),
    *(".pbm", ".pgm", ".ppm", ".pnm"),
)
"""What a file in a folder must end in to be taken for a picture, in any case."""
_FINGERPRINTED = 32  # files whose contents a fingerprint looks at

Split = Literal["train", "held-out", "test"]
SPLITS = ("train", "held-out", "test")


class ImageSource(Protocol):
    """Labelled images that need not fit in memory: `labels` (n,) int64 indexing `class_names`."""

    @property
    def labels(self) -> np.ndarray: ...

    @property
    def class_names(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def image(self, index: int) -> Any:
        """One image, as `varlik.images.load` takes it. It may turn out not to be readable."""

    def fingerprint(self) -> str:
        """Hexadecimal digits that stand for the images and their labels."""


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

    def image(self, index: int) -> np.ndarray:
        """(H, W) uint8."""
        return self.images[index]

    def fingerprint(self) -> str:
        """Of all pixels and labels."""
        return _digest(self.images.shape, self.images, self.labels, self.class_names)


@dataclass(frozen=True)
class PictureFiles:
    """Picture files `paths` (n) below `root`, read when asked for; `labels` (n,) int64 indexing `class_names`."""

    root: Path
    paths: tuple[Path, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Path:
        """The file's path."""
        return self.paths[index]

    def fingerprint(self) -> str:
        """Of all files' names and sizes, what at most 32 of them hold, evenly spaced, and the labels.

        So it stays the same wherever the folder lies, whenever it was copied. Files that cannot be opened count by name
        and size alone. Raises `OSError` for a file that is gone.
        """
        files = [f"{path.relative_to(self.root).as_posix()} {path.stat().st_size}" for path in self.paths]
        some = self.paths[:: max(1, -(-len(self) // _FINGERPRINTED))]
        contents = [_contents(path) for path in some]
        return _digest(files, contents, self.labels, self.class_names)


@dataclass(frozen=True)
class TableImages:
    """The rows of a Hugging Face `datasets.Dataset`, decoded when asked for; `column` holds the images."""

    table: Any
    column: str
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Any:
        """A PIL image."""
        return self.table[index][self.column]

    def fingerprint(self) -> str:
        """The one that `datasets` keeps of a table, and the labels."""
        return _digest(self.table._fingerprint, self.column, self.labels, self.class_names)


def image_folder(folder: str | Path) -> PictureFiles:
    """Pictures in folders named after their classes, one sub-folder of `folder` a class, in the order of their names.

    Pictures may lie deeper. Hidden files and folders and what has no picture's name are left out. Raises
    `FileNotFoundError` for a folder that is not there, `ValueError` for one without sub-folders or a class without
    pictures.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    classes = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise ValueError(f"{root}: expected one sub-folder for each class, found none")
    paths, labels = [], []
    for label, sub in enumerate(classes):
        found = sorted(path for path in sub.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())
        found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts)]
        if not found:
            raise ValueError(f"{sub}: expected pictures of the class {sub.name!r}, found none")
        paths += found
        labels += [label] * len(found)
    return PictureFiles(root, tuple(paths), np.array(labels, np.int64), tuple(path.name for path in classes))


def hugging_face(
    name: str | Path, split: str | None = None, image: str | None = None, label: str | None = None
) -> TableImages:
    """One split of a Hugging Face data set: a name for `datasets.load_dataset`, or a folder that `save_to_disk` wrote.

    `split` is "train" by default, and of a table that was saved alone, whatever it is; one that does not say which
    split it is may be called "train", but nothing else.
    `image` and `label` name the columns (default: the one of type `Image`, the one of type `ClassLabel`). A label
    column of integers without names is taken too where it is named; classes are then called by their numbers.
    Raises `ImportError` without `datasets`, `ValueError` for a split or column that is not there, images of a wrong
    type, a row without a label, and where a column has to be named.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Hugging Face data sets need the extra: pip install 'varlik[train]'") from error

    wanted = split or "train"
    saved = any((Path(name) / file).is_file() for file in ("dataset_dict.json", "dataset_info.json"))
    table = datasets.load_from_disk(str(name)) if saved else datasets.load_dataset(str(name), split=wanted)
    if isinstance(table, dict):
        if wanted not in table:
            raise ValueError(f"split: {name} has {', '.join(table)}, got {wanted!r}")
        table = table[wanted]
    elif saved and split:
        own = "train" if table.split is None else str(table.split)
        if split != own:
            raise ValueError(f"split: {name} is a single table, taken for {own!r}, got {split!r}")
    column = _column(table.features, image, datasets.Image, "image", name)
    labels = _column(table.features, label, datasets.ClassLabel, "label", name)
    if not isinstance(table.features[column], datasets.Image):
        raise ValueError(f"image: column {column!r} of {name} holds {table.features[column]}, no images")
    found = list(table[labels])
    if not all(isinstance(value, int) and value >= 0 for value in found):
        raise ValueError(f"label: column {labels!r} of {name} has rows without a class (only 0, 1, 2, ... are classes)")
    feature = table.features[labels]
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(feature.names)
    else:
        names = tuple(map(str, range(max(found, default=-1) + 1)))
    return TableImages(table, column, np.array(found, np.int64), names)


def _column(features: Any, named: str | None, kind: type, what: str, name: str | Path) -> str:
    if named is not None:
        if named not in features:
            raise ValueError(f"{what}: {name} has columns {', '.join(features)}, got {named!r}")
        return named
    fitting = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(fitting) != 1:
        found = ", ".join(fitting) or "none"
        raise ValueError(
            f"{what}: name the column, one of {', '.join(features)}; of type {kind.__name__} there is {found}. "
            f"In Python varlik.datasets.hugging_face takes {what}=; for a command, save the table (save_to_disk) with "
            "one column of that type (cast_column)"
        )
    return fitting[0]


def _contents(path: Path) -> str:
    """Digits that stand for what a file holds; none for one that may not be read."""
    try:
        return hashlib.blake2b(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def _digest(*parts: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else repr(part).encode())
    return digest.hexdigest()


def idx_folder(folder: str | Path, split: str = "train") -> LabelledImages:
    """A folder with the IDX files of the MNIST family; `split` is "train" or "test". Classes are called by numbers.

    Raises `FileNotFoundError` saying what is absent and `ValueError` for an unknown split, a damaged file or a class
    without images.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    images, labels = _idx_pair(Path(folder), "t10k" if split == "test" else "train")
    counts = np.bincount(labels)
    if (counts == 0).any():
        raise ValueError(f"{folder}: no image of class {counts.argmin()}, though labels go up to {len(counts) - 1}")
    return LabelledImages(images, labels, tuple(map(str, range(len(counts)))))


def fashion_mnist(split: Split, folder: str | Path | None = None) -> LabelledImages:
    """Fashion-MNIST, 28 x 28 greyscale: 55,000 images to train on, 5,000 held out, 10,000 to test.

    `folder` holds the IDX files (default: where Debian's `dataset-fashion-mnist` puts them).
    Raises `FileNotFoundError` saying what is absent and `ValueError` for an unknown split or a damaged file.
    """
    _check_split(split)
    folder = FASHION_MNIST_FOLDER if folder is None else Path(folder)
    images, labels = _idx_pair(folder, "t10k" if split == "test" else "train")
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
    except (OSError, EOFError, struct.error, zlib.error) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path}: not a readable IDX file ({error})") from error
    data = np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions)
    if zero != 0 or kind != 0x08 or data.size != int(np.prod(shape)):
        raise ValueError(f"{path}: not an IDX file of unsigned bytes, or cut short")
    return data.reshape(shape)


def _idx_pair(folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    images = read_idx(_find(folder, f"{prefix}-images-idx3-ubyte"))
    labels = read_idx(_find(folder, f"{prefix}-labels-idx1-ubyte")).astype(np.int64)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise ValueError(
            f"{folder}: expected (n, H, W) images and (n,) labels, got {images.shape} and {labels.shape} ({prefix})"
        )
    return images, labels


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise FileNotFoundError(
        f"{folder / name}[.gz] not found: install Debian's dataset-fashion-mnist or name a folder with the IDX files"
    )
