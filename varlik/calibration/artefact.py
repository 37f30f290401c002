"""The artefact: what was measured about one model, and a fingerprint that says of which."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from varlik.calibration.conformal import Rule

FORMAT = "varlik calibration 1"


@dataclass(frozen=True)
class Fingerprint:
    """What a calibration depends on: digests of both models' weights, scales, precision and preparation of pictures."""

    transformer: str
    vqvae: str
    patch_nums: tuple[int, ...]
    dtype: str
    preprocessing: str

    def differences(self, other: Fingerprint) -> list[str]:
        """Fields in which `other` differs, each with both values."""
        mine, theirs = asdict(self), asdict(other)
        return [
            f"{name} (calibrated: {mine[name]}, here: {theirs[name]})" for name in mine if mine[name] != theirs[name]
        ]


@dataclass(frozen=True)
class Rules:
    """Conformal rules of the stages, all for one right answer: that of full or of smoothed likelihood.

    - `screen`: one step, gaps of corrected first-order scores.
    - `race`: a step after every scale, gaps of log-likelihoods of the scales so far.
    - `both`: the step of `screen` and those of `race`, under one number; how strict the race is beside the screen was
      chosen to evaluate the fewest tokens.
    - `smooth`: a step after every sample, gaps of the mean over the samples so far; None without smoothing.
    """

    screen: Rule
    race: Rule
    both: Rule
    smooth: Rule | None = None


@dataclass(frozen=True)
class SmoothingPlan:
    """What smoothing was calibrated for, and whether it pays.

    `samples` of noise `sigma`, the best `reach` classes of the clean image being smoothed; `gain` is how much of
    accuracy it brought on labelled calibration images, with its standard `error`, None without labels.
    """

    samples: int
    sigma: float
    reach: int
    gain: float | None
    error: float | None

    @property
    def pays(self) -> bool:
        """Whether accuracy surely gains by it; without labels it is taken on trust."""
        return self.gain is None or self.error is None or self.gain > 2 * self.error


@dataclass(frozen=True)
class Calibration:
    """Measured on `images` images of one model.

    - `labels` (N,): the classes it is for. `at` (n,): those whose mean the first-order scores are expanded around.
    - `slope`, `offset` (N,): corrected scores are slope * first-order score + offset.
    - `full`: rules under which the answer is that of full likelihood; `smoothed`: that of smoothing the classes that
      are best by full likelihood, as `smoothing` says. None where that was not calibrated.
    - `temperature` (K,): posteriors of the first k scales are calibrated when their log-likelihoods are divided by its
      k-th entry; `scale_weights` (K,): or when those of each scale are multiplied by these. None without labels.
    - `recall` (10,): how often the right class was among the best 1 to 10 corrected scores. `correlation`: of corrected
      and exact scores over the classes of an image, on average.
    - `deltas` (D,), `race_rows` (D, K): for some delta, how many classes on average go through each scale of a race
      that shares this delta with a screen before it; through scale 1, all that pass screening. `smoothed_rows`
      (D, K), `smooth_rows` (D,): the same in a cascade that ends in smoothing, and how many (perturbed sample, class)
      rows that takes on top. None where that was not calibrated.
    """

    fingerprint: Fingerprint
    images: int
    labels: Tensor
    at: Tensor
    slope: float
    offset: Tensor
    full: Rules
    recall: Tensor
    correlation: float
    deltas: Tensor
    race_rows: Tensor
    smoothing: SmoothingPlan | None = None
    smoothed: Rules | None = None
    temperature: Tensor | None = None
    scale_weights: Tensor | None = None
    smoothed_rows: Tensor | None = None
    smooth_rows: Tensor | None = None

    def check(self, fingerprint: Fingerprint) -> None:
        """Raise `ValueError` naming the fields in which `fingerprint` differs."""
        differing = self.fingerprint.differences(fingerprint)
        if differing:
            raise ValueError(f"calibration: made for another model or use; differs in {'; '.join(differing)}")

    def columns(self, labels: Tensor) -> Tensor:
        """Places of `labels` (n,) among those calibrated. Raises `ValueError` for classes it is not for."""
        found = labels.unsqueeze(1) == self.labels.to(labels.device)
        absent = labels[~found.any(1)].tolist()
        if absent:
            raise ValueError(f"classes: {absent[:8]} are not among the {len(self.labels)} that were calibrated")
        return found.int().argmax(1)

    def correct(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Corrected first-order scores of (B, n), for `labels` (n,). Raises as `columns`."""
        return self.slope * scores + self.offset.to(scores)[self.columns(labels).to(self.offset.device)].to(scores)

    def rules(self, smooth: bool) -> Rules:
        """The rules of a cascade that ends in smoothing, or does not; without smoothing where that does not pay."""
        if smooth and self.smoothed is not None and self.smoothing is not None and self.smoothing.pays:
            return self.smoothed
        return self.full

    def smooths(self, cascade_smooths: bool) -> bool:
        """Whether a cascade that would end in smoothing does."""
        return self.rules(cascade_smooths).smooth is not None

    def expected_finalists(self, delta: float, smooth: bool = False) -> float:
        """How many classes pass screening at `delta`, on average; more with smoothing to come."""
        return self.expected_race_rows(delta, smooth)[0]

    def expected_race_rows(self, delta: float, smooth: bool = False) -> tuple[float, ...]:
        """How many go through each scale of a race that shares `delta` with a screen before it: (K,)."""
        rows = self.smoothed_rows if smooth and self.smoothed_rows is not None else self.race_rows
        return tuple(_between(self.deltas, rows, delta).tolist())

    def expected_smooth_rows(self, delta: float) -> float:
        """How many rows of perturbed samples are scored after that; 0 without smoothing."""
        return 0.0 if self.smooth_rows is None else float(_between(self.deltas, self.smooth_rows, delta))

    def posterior_weights(self, kind: str, scales: int) -> Tensor:
        """What the log-likelihoods of each of the first `scales` are multiplied by, (scales,) float64.

        `kind` is "temperature" or "scale weights". Raises `ValueError` for another, for a calibration without labels,
        and for weights of fewer scales than all.
        """
        if self.temperature is None or self.scale_weights is None:
            raise ValueError("calibrated: this takes a calibration made with labels (truth=...)")
        if kind == "temperature":
            return torch.full((scales,), 1 / float(self.temperature[scales - 1]), dtype=torch.float64)
        if kind != "scale weights":
            raise ValueError(f"calibrated: expected 'temperature', 'scale weights' or None, got {kind!r}")
        if scales != len(self.scale_weights):
            raise ValueError(f"scales: weights are for all {len(self.scale_weights)} scales, got {scales}")
        return self.scale_weights.double()

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all. Raises `OSError`."""
        tensors = {name: getattr(self, name) for name in ("labels", "at", "offset", "recall", "deltas", "race_rows")}
        for name in ("temperature", "scale_weights", "smoothed_rows", "smooth_rows"):
            if getattr(self, name) is not None:
                tensors[name] = getattr(self, name)
        for kind in ("full", "smoothed"):
            for stage, rule in _stages(getattr(self, kind)):
                tensors[f"{kind}.{stage}.spread"], tensors[f"{kind}.{stage}.scores"] = rule.spread, rule.scores
        plain = {name: getattr(self, name) for name in ("images", "slope", "correlation")}
        about = {
            **plain,
            "fingerprint": asdict(self.fingerprint),
            "smoothing": None if self.smoothing is None else asdict(self.smoothing),
        }
        path = Path(path)
        partial = path.with_name(path.name + ".part")
        save_file(
            # Copies, for one tensor may stand for two of them, which the format refuses.
            {name: tensor.cpu().clone().contiguous() for name, tensor in tensors.items()},
            partial,
            metadata={"format": FORMAT, "calibration": json.dumps(about)},
        )
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote. Raises `FileNotFoundError`, and `ValueError` for another kind of file."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such calibration; make one with varlik calibrate")
        try:
            with safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
            if metadata.get("format") != FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
            about = json.loads(metadata["calibration"])
            return cls(
                fingerprint=_fingerprint(about.pop("fingerprint")),
                smoothing=_plan(about.pop("smoothing")),
                full=_rules(tensors, "full"),
                smoothed=_rules(tensors, "smoothed") if "smoothed.screen.spread" in tensors else None,
                **{name: tensors[name] for name in _TENSORS if name in tensors},
                **about,
            )
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError, ValueError) as error:
            raise ValueError(f"{path}: not a calibration that can be read ({error})") from error


_STAGES = tuple(field.name for field in fields(Rules))
_TENSORS = tuple(field.name for field in fields(Calibration) if "Tensor" in str(field.type))


def _stages(rules: Rules | None) -> list[tuple[str, Rule]]:
    if rules is None:
        return []
    named = [(name, getattr(rules, name)) for name in _STAGES]
    return [(name, rule) for name, rule in named if rule is not None]


def _rules(tensors: dict[str, Tensor], kind: str) -> Rules:
    found = {
        stage: Rule(tensors[f"{kind}.{stage}.spread"], tensors[f"{kind}.{stage}.scores"])
        for stage in _STAGES
        if f"{kind}.{stage}.spread" in tensors
    }
    return Rules(**found)


def _fingerprint(about: dict) -> Fingerprint:
    return Fingerprint(**{**about, "patch_nums": tuple(about["patch_nums"])})


def _plan(about: dict | None) -> SmoothingPlan | None:
    return None if about is None else SmoothingPlan(**about)


def _between(at: Tensor, values: Tensor, wanted: float) -> Tensor:
    """`values` (D, ...) known at rising places `at` (D,), linearly between them, at `wanted`."""
    right = int(torch.searchsorted(at, torch.tensor(wanted, dtype=at.dtype)).clamp(1, len(at) - 1))
    left = right - 1
    share = ((wanted - at[left]) / (at[right] - at[left])).clamp(0, 1)
    return values[left] + share * (values[right] - values[left])
