"""Explanations as one HTML file that people open: no server, no network, nothing beside it.

The page is `page/report.html` with its style, its script and the data put in. Data is one JSON block that the script
reads; text from outside (names of files and classes) reaches the page through it alone, and never as markup.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from varlik import images as image_files
from varlik.cascade import AVARC_PLUS, FAST, AnyStage, Cascade, Race, Screen, Smooth, Stage
from varlik.classifier import Images, VARClassifier
from varlik.explanation.information import Explanation, explain
from varlik.explanation.maps import compose
from varlik.prediction import Cost, Prediction
from varlik.run import StageResult
from varlik.tokens import TokenMaps

SHOWN = 6
"""Classes of which a page shows numbers, for each image; it has a colour and a mark for so many."""

SURVIVORS = 10
"""Survivors of a stage that a page names."""

_PAGE = Path(__file__).with_name("page")
_SMALL = 128  # pixels a side of a picture that is enlarged as squares
_LARGEST = 256  # pixels a side; larger pictures are made smaller
_PICTURE_BYTES = 1 << 15  # of a picture, so that a page of ten photographs takes less than a megabyte
_UNSAFE = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}  # what could end a script block, or a line of one


@dataclass(frozen=True)
class Report:
    """What a page shows of B images.

    - `names` (B,): what to call each. `pictures` (B, C, S, S) in [0, 1]: what the model sees, or with `decoded` what it
      makes of its own tokens. `truth` (B,): the class of each, None where it is not known.
    - `explanation`: its `labels` (N,) are the candidate classes. `prediction`: what a `cascade` made of them;
      `stage_costs`: the `Cost` of each of its stages.
    - `class_names`: by index, the null class last. `model`: its name.
    """

    model: str
    class_names: tuple[str, ...]
    names: tuple[str, ...]
    pictures: Tensor
    decoded: bool
    truth: tuple[int | None, ...]
    explanation: Explanation
    cascade: Cascade
    prediction: Prediction
    stage_costs: tuple[Cost, ...]

    def __len__(self) -> int:
        return len(self.names)

    def data(self) -> dict[str, Any]:
        """All of it as what JSON can hold; `page/*.js` read it.

        Of each image the numbers of `SHOWN` classes at most: target, rival, the truth, and the most likely others.
        Log-probs of tokens are whole thousandths of a nat.
        """
        explanation, cost = self.explanation, self.prediction.cost
        images = [self._image(i) for i in range(len(self))]
        named = {label for image in images for label in _labels_in(image)}
        return {
            "model": self.model,
            "kind": explanation.kind,
            "patch_nums": list(explanation.patch_nums),
            "candidates": len(explanation.labels),
            "class_names": {str(label): self.class_names[label] for label in sorted(named)},
            "decoded": self.decoded,
            "small": self.pictures.shape[-1] <= _SMALL,
            "images": images,
            "cascade": str(self.cascade),
            "stages": [_stage(result, len(explanation.patch_nums)) for result in self.prediction.stages],
            "cost": {
                "full_tokens": cost.full_tokens,
                "full_flops": cost.full_flops,
                "encode_flops": cost.encode_flops,
                "seconds": round(cost.seconds, 4),
            },
        }

    def _image(self, i: int) -> dict[str, Any]:
        one = self.explanation[i : i + 1]
        shown = self._shown(i)
        column = {label: j for j, label in enumerate(one.labels.tolist())}
        columns = [column[label] for label in shown]
        log_prob = one.token_log_prob[0].double()
        race = _by_scale(log_prob, one.patch_nums).cumsum(-1)
        posterior = log_prob.sum(-1).softmax(-1)
        values = {"target": one.information, "rival": one.rival_information, "contrast": one.contrast}
        return {
            "name": self.names[i],
            "picture": _data_uri(self.pictures[i]),
            "truth": self.truth[i],
            "best": int(one.labels[posterior.argmax()]),
            "answer": int(self.prediction.classes[i]),
            "classes": shown,
            "posterior": [float(f"{posterior[column[label]].item():.4g}") for label in shown],
            "tokens": one.tokens[0].tolist(),
            "log_prob": _thousandths(log_prob[columns]),
            "unconditional": _thousandths(torch.cat((one.unconditional, one.rival_unconditional))),
            "race": _rounded(race[columns]),
            "leader": _rounded(race.amax(0)),  # of all candidates, at each scale
            "maps": {kind: _rounded(compose(found, one.patch_nums)[0]) for kind, found in values.items()},
            "sums": {kind: _rounded(_by_scale(found[0].double(), one.patch_nums)) for kind, found in values.items()},
            "stages": self._stages(i),
            "flops": int(self.prediction.cost.flops[i]),
        }

    def _shown(self, i: int) -> list[int]:
        """Classes of which numbers are shown: target and rival first, then by posterior."""
        explanation = self.explanation
        scores = explanation.token_log_prob[i].double().sum(-1)
        ranking = explanation.labels[scores.argsort(descending=True, stable=True)].tolist()
        first = [int(explanation.target[i]), int(explanation.rival[i])]
        truth = self.truth[i]
        wanted = first + [truth] * (truth in ranking and truth not in first)
        wanted += [label for label in ranking if label not in wanted][: SHOWN - len(wanted)]
        return first + [label for label in ranking if label in wanted[2:]]

    def _stages(self, i: int) -> list[dict[str, Any]]:
        """What every stage of the cascade did with one image."""
        found, labels = [], self.prediction.labels
        results = self.prediction.stages
        for result, following, cost in zip(results, (*results[1:], None), self.stage_costs, strict=True):
            left = labels == self.prediction.classes[i] if following is None else following.reached[i] > 0
            order = result.log_likelihood[i].nan_to_num(-torch.inf).masked_fill(~left, -torch.inf)
            best = labels[order.argsort(descending=True, stable=True)]
            found.append(
                {
                    "entered": int((result.reached[i] > 0).sum()),
                    "left": int(left.sum()),
                    "survivors": best[: min(SURVIVORS, int(left.sum()))].tolist(),
                    "forward_tokens": int(result.tokens[i]),
                    "backward_tokens": int(result.backward_tokens[i]),
                    "flops": int(cost.flops[i]),
                }
            )
        return found


def report(
    classifier: VARClassifier,
    images: Images,
    explanation: Explanation | None = None,
    *,
    cascade: Cascade | str | None = None,
    names: Sequence[str] | None = None,
    truth: Sequence[int | str | None] | None = None,
    seed: int = 0,
) -> Report:
    """What a page on B images shows: their explanation, and how a cascade classifies them among the same candidates.

    The cascade is FAST by default, and A-VARC+ for a model without a calibration.

    `explanation` (default: `explain(classifier, images)`) is of these images, in this order. `names` (B,) default to
    the names of the files, with as many folders as tell them apart; `truth` (B,) are classes by index or name, None
    where one is not known. Of `TokenMaps` the page shows what the decoder makes of them.

    Raises `ValueError` for an explanation of another number of images or other scales, names or truth of another
    length, an unknown class, and as `explain` and `VARClassifier.classify`.
    """
    if cascade is None:
        cascade = AVARC_PLUS if classifier.calibration is None else FAST
    cascade = Cascade.parse(cascade) if isinstance(cascade, str) else cascade
    decoded = isinstance(images, TokenMaps)
    if isinstance(images, TokenMaps):
        maps, pictures = classifier.tokenize(images), classifier.reconstruct(images)
    else:
        pixels = image_files.load_many(images, classifier.preprocessing)
        maps, pictures = classifier.tokenize_pixels(pixels), pixels.add(1).div(2)
    count = len(maps)
    known = _truth(classifier, truth, count)
    called = _names(images, count) if names is None else tuple(map(str, names))
    if len(called) != count:
        raise ValueError(f"names: expected one for each of {count} images, got {len(called)}")
    explanation = explain(classifier, maps) if explanation is None else explanation
    if (len(explanation), explanation.patch_nums) != (count, maps.patch_nums):
        raise ValueError(
            f"explanation: expected one of {count} images with scales {maps.patch_nums}, "
            f"got {len(explanation)} with {explanation.patch_nums}"
        )
    beside = torch.stack((explanation.unconditional, explanation.rival_unconditional))
    if not (explanation.token_log_prob.isfinite().all() and beside.isfinite().all()):
        raise ValueError("explanation: expected finite log-probs, got NaN or infinity")
    prediction = classifier.classify(maps, explanation.labels, cascade, seed=seed)
    configs = classifier.var.config, classifier.vqvae.config
    return Report(
        model=classifier.name,
        class_names=(*classifier.class_names, "null"),
        names=called,
        pictures=pictures.float().cpu(),
        decoded=decoded,
        truth=known,
        explanation=explanation,
        cascade=cascade,
        prediction=prediction,
        stage_costs=tuple(
            Cost.of((stage,), *configs, len(explanation.labels), stage.seconds) for stage in prediction.stages
        ),
    )


def page(report: Report) -> str:
    """The report as one HTML document.

    Ten photographs take less than a megabyte with the 680 tokens of VAR at 256 pixels, and 1.8 megabytes with the
    2240 tokens at 512 pixels; pictures are shown at 256 pixels a side at most.
    """
    text = (_PAGE / "report.html").read_text("utf-8")
    data = json.dumps(report.data(), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    title = f"{report.model}: why these classes"
    parts = {
        "/* style */": (_PAGE / "report.css").read_text("utf-8"),
        "/* script */": "\n".join((_PAGE / name).read_text("utf-8") for name in ("map.js", "report.js")),
        "<!-- title -->": html.escape(title),
        "<!-- data -->": data.translate(_UNSAFE),  # last: whatever stands in it is put in, and not looked at again
    }
    for place, content in parts.items():
        text = text.replace(place, content)
    return text


def write_report(path: str | Path, report: Report) -> None:
    """Write the report as an HTML file. Raises `ValueError` for a folder that is not there."""
    path = Path(path)
    if not path.resolve().parent.is_dir():
        raise ValueError(f"path: no such folder: {path.resolve().parent}")
    path.write_text(page(report), "utf-8")


def _stage(result: StageResult, scales: int) -> dict[str, Any]:
    """A stage of the cascade, whatever the image; `seconds` are for all of them."""
    return {
        "stage": str(result.stage),
        "meaning": _meaning(result.stage, result.scales, scales),
        "seconds": round(result.seconds, 4),
    }


def _meaning(stage: AnyStage, read: int, scales: int) -> str:
    if isinstance(stage, Screen):
        return "first-order estimates"
    if isinstance(stage, Race):
        return "scale after scale"
    if isinstance(stage, Smooth):
        return "perturbed samples while it is close"
    samples = f", {stage.samples} samples" if isinstance(stage, Stage) and stage.samples > 1 else ""
    return (f"all {scales} scales" if read == scales else f"{read} of {scales} scales") + samples


def _labels_in(image: dict[str, Any]) -> set[int]:
    named = {image["best"], image["answer"], *image["classes"]}
    named |= {label for stage in image["stages"] for label in stage["survivors"]}
    return named if image["truth"] is None else named | {image["truth"]}


def _truth(classifier: VARClassifier, truth: Sequence[int | str | None] | None, count: int) -> tuple[int | None, ...]:
    values = [None] * count if truth is None else list(truth)
    if len(values) != count:
        raise ValueError(f"truth: expected one class for each of {count} images, got {len(values)}")
    return tuple(None if value is None else int(classifier.labels([value])[0]) for value in values)


def _names(images: Images, count: int) -> tuple[str, ...]:
    """Names of files, with as many folders as tell them apart; other images are numbered."""
    listed = list(images) if isinstance(images, list | tuple) else [images] * count
    files = [Path(image).parts if isinstance(image, str | os.PathLike) else None for image in listed]

    def tail(own: tuple[str, ...]) -> str:
        others = [parts for parts in files if parts is not None and parts != own]
        told = (n for n in range(1, len(own)) if all(parts[-n:] != own[-n:] for parts in others))
        return str(Path(*own[-next(told, len(own)) :]))

    return tuple(f"image {i}" if parts is None else tail(parts) for i, parts in enumerate(files, start=1))


def _by_scale(values: Tensor, patch_nums: Sequence[int]) -> Tensor:
    """Sums (..., K) over each scale of values of tokens (..., L)."""
    return torch.stack([part.sum(-1) for part in values.split([p * p for p in patch_nums], -1)], -1)


def _thousandths(values: Tensor) -> Any:
    """Nested lists of whole thousandths: the digits that the page shows, in few characters."""
    return (1000 * values.double()).round().long().tolist()


def _rounded(values: Tensor) -> Any:
    """Nested lists of numbers with four digits behind the point."""
    numbers = values.double().cpu().tolist()
    return _round_all(numbers)


def _round_all(numbers: Any) -> Any:
    return [_round_all(part) for part in numbers] if isinstance(numbers, list) else round(numbers, 4)


def _data_uri(picture: Tensor) -> str:
    """A picture (C, S, S) in [0, 1] as the address of its own bytes: PNG, or the best JPEG that is not too large."""
    array = (picture * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    image.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    content, kind = _encoded(image, "PNG", optimize=True), "png"
    for quality in (85, 70, 50, 30):
        if len(content) > _PICTURE_BYTES:
            content, kind = _encoded(image, "JPEG", quality=quality), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
