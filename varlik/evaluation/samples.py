"""Pictures that are bundled with a model: real test images, with their classes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from varlik.models.presets import bundled_folder, get_preset, list_models


@dataclass(frozen=True)
class Samples:
    """Bundled pictures of one model: `paths` of image files and the index of the class of each in `labels`."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]


def samples(model: str) -> Samples:
    """Sample pictures of a bundled model. Raises `ValueError` for a model that is not bundled or has none."""
    index = _index(model)
    if not index.is_file():
        raise ValueError(f"model: {model} has no sample pictures")
    labels = json.loads(index.read_text())
    return Samples(tuple(index.parent / name for name in labels), tuple(labels.values()))


def is_bundled(model: str) -> bool:
    """Whether `--model` means a bundled model: by name, and there is no file or folder of that name here."""
    return model in list_models() and get_preset(model).bundled and not Path(model).expanduser().exists()


def has_samples(model: str) -> bool:
    """Whether a bundled model has sample pictures. Raises `ValueError` for a model that is not bundled."""
    return _index(model).is_file()


def _index(model: str) -> Path:
    """The file that lists the pictures and their classes."""
    return bundled_folder(model) / "samples" / "labels.json"
