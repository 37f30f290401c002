"""Render the data set glyphs-100, a hundred characters in hundreds of typefaces, from the fonts on this machine.

    python -m examples.glyphs_100 --out data/glyphs-100                      # fonts below /usr/share
    python -m examples.glyphs_100 --out data/glyphs-100 --fonts FOLDER...

The characters are the 94 of printable ASCII and six more. Debian packages open fonts as `fonts-*`, and several hundred
families in `texlive-fonts-extra`; which of them are found decides the data set, so the file written names every family.
Only that file leaves this script, never a font.

A family's faces are dropped where a character is missing, blank or does not fit, where more than three pairs of
characters look the same (as in fonts without lower case), and where all characters look much like those of a face that
is already taken. Families are put in a split by a hash of their name: 85 % train, 5 % held-out, 10 % test. One design
may go by several names: a held-out family with a face like one of a training family is left out with all its faces, and
so is a test family with a face like one of either. Characters stand on one baseline, at one size; every second training
face is rendered once more with small changes of size, place, slant and weight.

Needs Pillow and fontTools.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from rich.progress import track

from varlik.datasets import GLYPHS_100_FILE

CHARACTERS = "".join(chr(code) for code in range(0x21, 0x7F)) + "£€§©®ß"
SIZE, EM, BASELINE = 32, 21, 24
FACES = {"train": 4, "held-out": 3, "test": 3}  # of one family at most
SAME_PAIRS = 3  # pairs of equal-looking characters that a face may have, such as l and I
CLIPPED = 5  # characters that may reach beyond the picture
NEAR = 2.0  # mean difference of grey levels below which two faces count as one design
OTHER_LETTERS = {"ellhnikh"}  # Greek ones in the places of ASCII
STYLE_WORDS = re.compile(
    r"\b(ultra|extra|semi|demi)?[ -]?(thin|hairline|light|regular|book|medium|bold|heavy|black|italic|oblique|"
    r"condensed|narrow|expanded|wide|roman|caption|display|text|small caps|smallcaps|caps|sc|[0-9]+)\b"
)


@dataclass(frozen=True)
class Face:
    """One font file: where it lies, its family, and its characters as rendered, (100, 32, 32) uint8."""

    path: Path
    family: str
    glyphs: np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the file")
    parser.add_argument("--fonts", type=Path, nargs="+", default=[Path("/usr/share")], help="folders with fonts")
    options = parser.parse_args()
    faces = distinct(apart(list(usable(options.fonts))))
    arrays: dict[str, Any] = {"class_names": np.array(list(CHARACTERS))}
    for split, most in FACES.items():
        chosen = spread([face for face in faces if split_of(face.family) == split], most)
        again = chosen[::2] if split == "train" else []
        images = [face.glyphs for face in chosen]
        images += [changed(face, seed) for seed, face in enumerate(track(again, "changed", disable=not again))]
        names = [face.family for face in (*chosen, *again)]
        families, index = np.unique(names, return_inverse=True)
        arrays[f"{split}.images"] = np.concatenate(images)
        arrays[f"{split}.labels"] = np.tile(np.arange(len(CHARACTERS)), len(names))
        arrays[f"{split}.families"] = families
        arrays[f"{split}.family"] = np.repeat(index, len(CHARACTERS))  # of each image, in families
        print(f"{split}: {len(families)} families, {len(chosen)} faces, {len(arrays[f'{split}.labels'])} images")
    options.out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(options.out / GLYPHS_100_FILE, **arrays)
    print(f"wrote {options.out / GLYPHS_100_FILE}")


def split_of(family: str) -> str:
    """A function of the name alone, so that one more package moves no family."""
    share = int.from_bytes(hashlib.sha256(family.encode()).digest()[:4], "big") / 2**32
    return "train" if share < 0.85 else "held-out" if share < 0.9 else "test"


def usable(folders: list[Path]) -> Iterator[Face]:
    """Faces that have every character, in the order of their families and file names."""
    paths = sorted(
        {path for folder in folders for path in folder.rglob("*") if path.suffix.lower() in (".ttf", ".otf")}
    )
    found = []
    for path in track(paths, "fonts"):
        try:
            font = TTFont(path, lazy=True)
            codes = font.getBestCmap() or {}
            family = family_of(font)
            font.close()
            if not family or family in OTHER_LETTERS or any(ord(character) not in codes for character in CHARACTERS):
                continue
            glyphs = rendered(path, EM)
        except Exception as error:  # damaged and unusual files of all kinds
            print(f"passed over {path.name}: {error}")
            continue
        if glyphs is not None and is_legible(glyphs):
            found.append(Face(path, family, glyphs))
    yield from sorted(found, key=lambda face: (face.family, len(face.path.stem), face.path.name))


def family_of(font: TTFont) -> str:
    """The family's name, without words of style."""
    name = font["name"].getDebugName(16) or font["name"].getDebugName(1) or ""
    plain = STYLE_WORDS.sub(" ", name.lower())
    return " ".join(plain.split()) or name.lower()


def rendered(path: Path, em: int, shift: tuple[float, float] = (0, 0)) -> np.ndarray | None:
    """Every character on the baseline, centred by its advance, white on black; None if too many do not fit."""
    font = ImageFont.truetype(str(path), em)
    glyphs = np.zeros((len(CHARACTERS), SIZE, SIZE), np.uint8)
    clipped = 0
    for i, character in enumerate(CHARACTERS):
        place = (SIZE - font.getlength(character)) / 2 + shift[0], BASELINE + shift[1]
        left, top, right, bottom = font.getbbox(character, anchor="ls")
        clipped += (
            left + place[0] < -1 or right + place[0] > SIZE + 1 or top + place[1] < -1 or bottom + place[1] > SIZE + 1
        )
        image = Image.new("L", (SIZE, SIZE))
        ImageDraw.Draw(image).text(place, character, fill=255, font=font, anchor="ls")
        glyphs[i] = np.asarray(image)
    return None if clipped > CLIPPED else glyphs


def is_legible(glyphs: np.ndarray) -> bool:
    """No character is blank, and few look the same."""
    if (glyphs.max((1, 2)) < 96).any():
        return False
    different = len({glyph.tobytes() for glyph in glyphs})
    return len(glyphs) - different <= SAME_PAIRS


def apart(faces: list[Face]) -> list[Face]:
    """Without the families that have a face like one of an earlier split."""
    looks, splits = coarse(faces), np.array([split_of(face.family) for face in faces])
    left_out: set[str] = set()
    earlier = splits == "train"
    for split in ("held-out", "test"):
        members = np.flatnonzero(splits == split)
        left_out |= {faces[i].family for i in members if np.abs(looks[earlier] - looks[i]).mean(1).min() < NEAR}
        earlier |= splits == split
    return [face for face in faces if face.family not in left_out]


def distinct(faces: list[Face]) -> list[Face]:
    """Those that differ from every earlier one, whatever its family."""
    looks = coarse(faces)
    kept: list[int] = []
    for i in track(range(len(faces)), "distinct"):
        if not kept or np.abs(looks[kept] - looks[i]).mean(1).min() > NEAR:
            kept.append(i)
    return [faces[i] for i in kept]


def coarse(faces: list[Face]) -> np.ndarray:
    """All characters of a face on an 8 x 8 grid each, (n, 6400) float32."""
    return np.stack([face.glyphs.reshape(-1, 8, 4, 8, 4).mean((2, 4), dtype=np.float32).ravel() for face in faces])


def spread(faces: list[Face], most: int) -> list[Face]:
    """At most so many faces of a family, evenly from its list."""
    chosen = []
    for family in sorted({face.family for face in faces}):
        own = [face for face in faces if face.family == family]
        count = min(most, len(own))
        chosen += [own[i * len(own) // count] for i in range(count)]
    return chosen


def changed(face: Face, seed: int) -> np.ndarray:
    """The face's characters, each with a size, place, slant and weight a little off."""
    random = np.random.default_rng(seed)
    out = np.empty_like(face.glyphs)
    sizes: dict[int, np.ndarray | None] = {}
    for i in range(len(CHARACTERS)):
        em = int(random.integers(19, 24))
        if em not in sizes:
            sizes[em] = rendered(face.path, em)
        base = sizes[em]
        if base is None:
            base = face.glyphs
        slant, turn = random.normal(0, 0.06), random.normal(0, 0.04)
        x, y = random.uniform(-1, 1, 2)
        # From a place in the picture to the place that is shown there; upright lines stay on the baseline.
        matrix = (1, slant + turn, -(slant + turn) * BASELINE + x, -turn, 1, turn * SIZE / 2 + y)
        image = Image.fromarray(base[i]).transform(
            (SIZE, SIZE), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
        )
        if random.random() < 0.3:
            soft = np.asarray(image.filter(ImageFilter.GaussianBlur(0.6)), np.float32)
            image = Image.fromarray(np.clip(soft * random.uniform(0.9, 1.5), 0, 255).astype(np.uint8))
        out[i] = np.asarray(image)
    return out


if __name__ == "__main__":
    main()
