"""Pictures that are bundled with a model: real test images, with their classes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from varlik.models.presets import bundled_folder


@dataclass(frozen=True)
class Samples:
    """Bundled pictures of one model: `paths` of image files and the index of the class of each in `labels`."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]


def samples(model: str) -> Samples:
    """Sample pictures of a bundled model. Raises `ValueError` for a model that is not bundled or has none."""
    folder = bundled_folder(model) / "samples"
    index = folder / "labels.json"
    if not index.is_file():
        raise ValueError(f"model: {model} has no sample pictures")
    labels = json.loads(index.read_text())
    return Samples(tuple(folder / name for name in labels), tuple(labels.values()))
