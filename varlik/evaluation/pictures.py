"""Picture files as people keep them: single ones, folders of them, folders named after classes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from varlik import images as image_files
from varlik.classifier import VARClassifier
from varlik.datasets import PICTURE_SUFFIXES
from varlik.models.presets import imagenet_class_names, imagenet_synset_ids
from varlik.tokens import ENCODE_BATCH, TokenMaps


@dataclass(frozen=True)
class Pictures:
    """Token maps `images` of the picture files `paths`, none that could be read being left out."""

    paths: tuple[Path, ...]
    images: TokenMaps


def find(places: Iterable[str | Path]) -> tuple[Path, ...]:
    """Files as they are named, and pictures in and below the folders, sorted; each once, hidden ones left out.

    Raises `FileNotFoundError` for what is not there and `ValueError` for a folder without pictures.
    """
    found: dict[Path, None] = {}
    for place in map(Path, places):
        if not place.is_dir():
            if not place.exists():
                raise FileNotFoundError(f"{place}: no such file or folder")
            found[place] = None
            continue
        below = sorted(path for path in place.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())
        below = [path for path in below if not any(part.startswith(".") for part in path.relative_to(place).parts)]
        if not below:
            raise ValueError(f"{place}: no pictures in this folder or below it")
        found.update(dict.fromkeys(below))
    return tuple(found)


def read(
    classifier: VARClassifier,
    paths: Sequence[Path],
    complain: Callable[[Exception], None],
    progress: Callable[[int, int], None] | None = None,
) -> Pictures | None:
    """Token maps of picture files; those that cannot be read are told to `complain`. None if no file is left.

    `progress` is told how many of all files are done.
    """
    readable: list[Path] = []
    parts: list[TokenMaps] = []
    for first in range(0, len(paths), ENCODE_BATCH):
        pixels = []
        for path in paths[first : first + ENCODE_BATCH]:
            try:
                pixels.append(image_files.load(path, classifier.preprocessing))
                readable.append(path)
            except (ValueError, TypeError, OSError) as error:
                complain(error)
        if pixels:
            parts.append(classifier.tokenize_pixels(torch.stack(pixels)))
        if progress is not None:
            progress(min(first + ENCODE_BATCH, len(paths)), len(paths))
    return Pictures(tuple(readable), TokenMaps.concatenate(parts)) if parts else None


def truth(classifier: VARClassifier, paths: Sequence[Path]) -> Tensor:
    """Class indices (n,) of pictures, each in a folder named after its class: by name, index or ImageNet's synset id.

    A name's slashes may be written as underscores. Raises `ValueError` naming a folder that is no class.
    """
    folders = [Path(os.path.abspath(path)).parent for path in paths]
    known = {folder: _class_of(classifier, folder) for folder in dict.fromkeys(folders)}
    return torch.tensor([known[folder] for folder in folders])


def of_classes(classifier: VARClassifier, paths: Sequence[Path], labels: Tensor) -> tuple[Path, ...]:
    """Those of the pictures whose classes are among `labels`. Raises as `truth`."""
    wanted = set(labels.tolist())
    return tuple(path for path, label in zip(paths, truth(classifier, paths).tolist(), strict=True) if label in wanted)


def class_index(classifier: VARClassifier, written: str) -> int:
    """Index of a class as people write it: by name, with underscores for slashes too, index or ImageNet's synset id.

    Raises `ValueError` for what is no class.
    """
    names = classifier.class_names
    if names == imagenet_class_names() and written in imagenet_synset_ids():
        return imagenet_synset_ids().index(written)
    slashed = [name for name in names if "/" in name and name.replace("/", "_").casefold() == written.casefold()]
    if len(slashed) == 1 and written not in names:
        written = slashed[0]
    return int(classifier.labels([written])[0])


def _class_of(classifier: VARClassifier, folder: Path) -> int:
    try:
        return class_index(classifier, folder.name)
    except ValueError as error:
        raise ValueError(f"{folder}: expected a folder named after a class; {error}") from error
