"""Explanations of picture files for the command line: numbers, pictures in a folder, a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from varlik import images as image_files
from varlik.classifier import VARClassifier
from varlik.evaluation import pictures
from varlik.explanation import pictures as drawing
from varlik.explanation import report
from varlik.explanation.information import Explanation, Unconditional
from varlik.explanation.information import explain as explain_images

TOKENS = 3
"""Tokens that are named for and against the target."""


@dataclass(frozen=True)
class Explained:
    """Picture files, none that could not be read among them, and why they are of their classes."""

    paths: tuple[Path, ...]
    explanation: Explanation


def check(folder: Path | None, ending: str, page: Path | None) -> None:
    """Whether pictures with such an `ending`, png or svg, can go to `folder`, and a page to a file.

    Raises `ValueError` without matplotlib, for another ending and for places that cannot be.
    """
    if f".{ending.lower()}" not in drawing.FORMATS:
        raise ValueError(f"format: expected png or svg, got {ending!r}")
    if folder is not None:
        drawing.check(f"picture.{ending}")
        nearest = next(place for place in (folder, *folder.parents) if place.exists())
        if not nearest.is_dir():
            raise ValueError(f"out: {nearest} is no folder")
    if page is not None and page.is_dir():
        raise ValueError(f"html: {page} is a folder")
    if page is not None and not page.resolve().parent.is_dir():
        raise ValueError(f"html: no such folder: {page.parent}")


def explain(
    classifier: VARClassifier,
    paths: Sequence[Path],
    labels: Tensor,
    *,
    complain: Callable[[Exception], None],
    target: str | None = None,
    contrast: str | None = None,
    samples: int = 1,
    unconditional: str = "others",
) -> Explained | None:
    """Explain picture files; those that cannot be read are told to `complain`. None if no file is left.

    `labels` are the candidate classes, the others as for `varlik.explanation.information.explain`. Raises as that.
    """
    found = pictures.read(classifier, paths, complain)
    if found is None:
        return None
    kind = cast("Unconditional", unconditional)  # another one is refused there
    explanation = explain_images(
        classifier, found.images, target, contrast, classes=labels, samples=samples, unconditional=kind
    )
    return Explained(found.paths, explanation)


def answer(classifier: VARClassifier, explained: Explained) -> dict[str, Any]:
    """What `varlik explain --json` prints.

    Of each image: target and rival; `information` and `contrast` of all tokens and of each scale; and the tokens that
    say most for the target against the rival (`for`) and for the rival (`against`), none that say nothing. Scales, rows
    and columns count from 1; numbers are in nats.
    """
    return {
        "model": classifier.name,
        "unconditional": explained.explanation.kind,
        "images": [
            _image(classifier, explained.explanation[i : i + 1], path) for i, path in enumerate(explained.paths)
        ],
    }


def draw(classifier: VARClassifier, explained: Explained, folder: Path, ending: str) -> list[Path]:
    """Write panels and scales of every image into a folder, which is made if need be; returns the files.

    They are named after the picture files, and all are numbered once two of those have one name. Raises `OSError` for
    a folder that cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stems = [path.stem for path in explained.paths]
    if len({stem.casefold() for stem in stems}) < len(stems):  # there are file systems that do not tell "A" from "a"
        stems = [f"{i}-{stem}" for i, stem in enumerate(stems, start=1)]
    written = []
    for i, path in enumerate(explained.paths):
        pixels = image_files.load(path, classifier.preprocessing)
        for kind, drawn in (("panels", drawing.panels), ("scales", drawing.scales)):
            written.append(folder / f"{stems[i]}-{kind}.{ending}")
            drawing.save(drawn(explained.explanation, pixels, classifier.class_names, i), written[-1])
    return written


def write_page(classifier: VARClassifier, explained: Explained, file: Path) -> None:
    """Write the page of all images. Raises as `varlik.explanation.report.report`, and `OSError`."""
    report.write_report(file, report.report(classifier, list(explained.paths), explained.explanation))


def _image(classifier: VARClassifier, one: Explanation, path: Path) -> dict[str, Any]:
    information, contrast = one.information[0].double(), one.contrast[0].double()
    sizes = [p * p for p in one.patch_nums]
    by_scale = zip(one.patch_nums, information.split(sizes), contrast.split(sizes), strict=True)
    ranking = contrast.argsort(descending=True, stable=True).tolist()
    return {
        "image": str(path),
        "target": _class(classifier, one, one.target),
        "rival": _class(classifier, one, one.rival),
        "information": information.sum().item(),
        "contrast": contrast.sum().item(),
        "scales": [
            {"scale": k, "side": p, "information": own.sum().item(), "contrast": against.sum().item()}
            for k, (p, own, against) in enumerate(by_scale, start=1)
        ],
        "for": [_token(one, t) for t in ranking[:TOKENS] if contrast[t] > 0],
        "against": [_token(one, t) for t in ranking[: -TOKENS - 1 : -1] if contrast[t] < 0],
    }


def _class(classifier: VARClassifier, one: Explanation, label: Tensor) -> dict[str, Any]:
    column, number = one.labels == label, int(label)
    return {
        "class": number,
        "name": "null" if number == classifier.null_class else classifier.class_names[number],
        "posterior": one.posterior[0, column].item(),
        "log_likelihood": one.token_log_prob[0, column].double().sum().item(),
    }


def _token(one: Explanation, position: int) -> dict[str, Any]:
    """Where a token is, and what it says."""
    scale, before = 0, 0
    while position >= before + one.patch_nums[scale] ** 2:
        before += one.patch_nums[scale] ** 2
        scale += 1
    row, column = divmod(position - before, one.patch_nums[scale])
    return {
        "scale": scale + 1,
        "row": row + 1,
        "column": column + 1,
        "code": int(one.tokens[0, position]),
        "information": one.information[0, position].item(),
        "contrast": one.contrast[0, position].item(),
    }
