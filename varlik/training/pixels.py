"""Pixels of labelled images as training reads them: in augmentation variants, and batch by batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from varlik import images
from varlik.datasets import ImageSource
from varlik.models.config import Preprocessing

PLAIN, FLIP, CROP = "plain", "flip", "crop"
SHIFT = 1 / 16  # of the side, by which a crop moves a picture that preprocessing does not cut
UNREADABLE = (ValueError, TypeError, OSError)  # what `images.load` raises

Read = TypeVar("Read")


def check_variants(variants: Sequence[str]) -> None:
    """Refuse what is no list of variants: "plain" first, then any of "flip", "crop" and "flip+crop".

    A variant may be named several times where it holds a crop: every one is drawn anew.
    """
    if isinstance(variants, str) or not variants or variants[0] != PLAIN:
        raise ValueError(f"variants: expected a list that starts with {PLAIN!r}, got {variants!r}")
    for name in variants[1:]:
        if not set(name.split("+")) <= {FLIP, CROP}:
            raise ValueError(f"variants: expected 'flip', 'crop' or 'flip+crop' after the first, got {name!r}")


def variants_of(
    image: images.ImageLike, preprocessing: Preprocessing, variants: Sequence[str], seed: int = 0, index: int = 0
) -> Tensor:
    """One image in each of its variants, (A, C, S, S) in [-1, 1].

    "flip" mirrors left and right. "crop" moves what is cut out: to any place of the resized picture's central square
    where preprocessing cuts it smaller than it resizes it (as in VAR's own training), else by up to 1/16 of the side,
    with black for what comes in. Places are drawn from (seed, index, place in `variants`). Raises as `images.load` and
    for `variants` that `check_variants` refuses.
    """
    check_variants(variants)
    plain = images.load(image, preprocessing)
    whole = None
    pixels = [plain]
    for place, name in enumerate(variants[1:], 1):
        shown = plain
        if CROP in name:
            if whole is None:
                whole, slack = _uncut(image, preprocessing)
            top, left = np.random.default_rng((seed, index, place)).integers(0, slack + 1, 2)
            shown = _cut(whole, preprocessing, slack, int(top), int(left))
        pixels.append(shown.flip(-1) if FLIP in name else shown)
    return torch.stack(pixels)


def _uncut(image: images.ImageLike, preprocessing: Preprocessing) -> tuple[Tensor, int]:
    """The picture that crops are cut from, and by how many pixels they may move."""
    slack = preprocessing.resize - preprocessing.crop
    if slack:
        return images.load(image, replace(preprocessing, crop=preprocessing.resize, padding=0)), slack
    margin = max(1, round(SHIFT * preprocessing.crop))
    return images.load(image, replace(preprocessing, padding=preprocessing.padding + margin)), 2 * margin


def _cut(whole: Tensor, preprocessing: Preprocessing, slack: int, top: int, left: int) -> Tensor:
    side = whole.shape[-1] - slack
    shown = whole[:, top : top + side, left : left + side]
    return F.pad(shown, ((preprocessing.resolution - side) // 2,) * 4, value=-1.0)


class Pixels:
    """The images of `source`, indexed as a tensor (n, C, S, S) in [-1, 1] would be; what is asked for is read then.

    An image that cannot be read is told to `complain`, once, and the next one that can takes its place; without
    `complain` it raises what `images.load` raises.
    """

    def __init__(
        self, source: ImageSource, preprocessing: Preprocessing, complain: Callable[[Exception], None] | None = None
    ):
        self.source, self.preprocessing, self._complain = source, preprocessing, complain
        self._unreadable: set[int] = set()

    def __len__(self) -> int:
        return len(self.source)

    def fingerprint(self) -> str:
        """Stands for the source's images and how they are prepared."""
        return f"{self.source.fingerprint()} {self.preprocessing}"

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        """(b, C, S, S) float32 on the CPU."""
        wanted: Iterable[int] = range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()
        found = []
        for row, pixels in in_threads(self._read, wanted):
            following = row
            while isinstance(pixels, Exception):
                self._tell(following, pixels)
                following = (following + 1) % len(self)
                if following == row:
                    raise ValueError("source: expected at least one image that can be read, got none")
                pixels = self._read(following)
            found.append(pixels)
        return torch.stack(found)

    def _read(self, row: int) -> Tensor | Exception:
        try:
            return images.load(self.source.image(row), self.preprocessing)
        except UNREADABLE as error:
            return error

    def _tell(self, row: int, error: Exception) -> None:
        if self._complain is None:
            raise error
        if row not in self._unreadable:
            self._unreadable.add(row)
            self._complain(error)


def in_threads(read: Callable[[int], Read], rows: Iterable[int]) -> list[tuple[int, Read]]:
    """(row, read(row)) of every row; PIL decodes and resizes without holding Python's lock."""
    rows = list(rows)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(zip(rows, pool.map(read, rows), strict=True))
