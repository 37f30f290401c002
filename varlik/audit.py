"""Does a calibrated cascade keep its promise on these images? A random share of them, scored in full, tells."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

from varlik.calibration.conformal import share_bounds


@dataclass(frozen=True)
class Audit:
    """What scoring a random share of the images in full said about the answers of a calibrated cascade.

    `images` were scored in full, and `disagreements` of them have another answer then; the true share of such images
    lies between `low` and `high` with a confidence of 95 %. `delta` is what the calibration promised, None where it
    promised nothing. `keys` of the images: one that comes again is not counted again.
    """

    images: int
    disagreements: int
    delta: float | None
    keys: frozenset[int] = field(default=frozenset(), repr=False)

    @property
    def low(self) -> float:
        """Lower bound of the share of images with another answer."""
        return share_bounds(self.disagreements, self.images)[0]

    @property
    def high(self) -> float:
        """Upper bound of it."""
        return share_bounds(self.disagreements, self.images)[1]

    @property
    def exceeded(self) -> bool:
        """Whether the promise is very likely not kept, so that these images are not like those of the calibration.

        At 99.9 %, for it is asked again and again while images come in.
        """
        return self.delta is not None and share_bounds(self.disagreements, self.images, 0.998)[0] > self.delta

    def __add__(self, other: Audit) -> Audit:
        return Audit(
            self.images + other.images,
            self.disagreements + other.disagreements,
            other.delta,
            self.keys | other.keys,
        )


class Auditor:
    """The audits of one classifier, by what was asked: a cascade and its candidate classes, as text."""

    def __init__(self) -> None:
        self._audits: dict[str, Audit] = {}

    def clear(self) -> None:
        """Forget them all."""
        self._audits.clear()

    def draw(self, what: str, keys: Sequence[int], share: float, seed: int) -> list[int]:
        """Places of a random `share` of the images with these `keys`, none of which was audited before.

        Whether an image is drawn is a function of seed and image alone.
        """
        known = self._audits[what].keys if what in self._audits else frozenset()
        return [i for i, key in enumerate(keys) if key not in known and _number(key, seed) < share]

    def add(self, what: str, found: Audit) -> None:
        """Count on, and warn where the promise is very likely not kept."""
        audit = self._audits[what] = self._audits[what] + found if what in self._audits else found
        if audit.delta is not None and audit.exceeded:
            warnings.warn(
                f"{audit.disagreements} of {audit.images} audited images have another answer when scored in full, "
                f"and at most {100 * audit.delta:g} % was promised: they are not like the images of the calibration",
                stacklevel=4,
            )

    def of(self, what: str) -> Audit | None:
        """All that was found so far, None if nothing was drawn."""
        return self._audits.get(what)


def _number(key: int, seed: int) -> float:
    """In [0, 1)."""
    digest = hashlib.blake2b(f"audit/{seed}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
