"""Cascades: which classes are scored how thoroughly, and who survives.

In text stages are separated by commas:

- `scales:keep` and `scales x samples:keep` score the classes still alive on the first token maps of one or more samples
  and keep the best. `"6:10,10:3,10x3:1"` scores six scales of every class, all ten scales of the best ten, and three
  samples of the best three. Scales may be a percentage of the model's, rounded down, so that one cascade fits models
  with different schedules.
- `screen:5` keeps the classes with the best first-order scores. `screen:0.5%` keeps as many as it takes, image by
  image, to lose the right one with a probability of half a percent at most.
- `race:0.5%` scores scale after scale and drops after each whoever is too far behind to win, with the same meaning. A
  screen and a race with the same percentage share it: together they lose the right class no more often.
- `smooth:0.5%` averages over perturbed samples, one after another, only between classes that are still close.

Percentages behind a colon need a calibration of the model (`varlik.calibrate`). The right class is the one that full
likelihood of all classes finds, or in a cascade that ends in smoothing, what smoothing finds among the best of those.

Source: A-VARC, ICLR 2026, section on partial-scale pruning, in the shape of its released configuration, for the first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise

from varlik.calibration.conformal import check_delta

_FIXED = re.compile(r"^(?P<scales>\d+%?)(?:x(?P<samples>\d+))?:(?P<keep>\d+)$")
_ADAPTIVE = re.compile(r"^(?P<kind>screen|race|smooth):(?P<value>\d+(?:\.\d+)?)(?P<percent>%?)$")


@dataclass(frozen=True)
class Stage:
    """One step of a cascade.

    `scales` counts token maps, or is a percentage of the model's such as `"60%"`; `samples` counts the clean sample;
    `keep` is how many classes survive.
    """

    scales: int | str
    keep: int
    samples: int = 1

    def __post_init__(self) -> None:
        percent = re.fullmatch(r"(\d+)%", self.scales) if isinstance(self.scales, str) else None
        if isinstance(self.scales, str):
            if percent is None or not 1 <= int(percent[1]) <= 100:
                raise ValueError(f"scales: expected a number or a percentage from 1% to 100%, got {self.scales!r}")
        elif self.scales < 1:
            raise ValueError(f"scales: expected 1 or more, got {self.scales}")
        if self.samples < 1:
            raise ValueError(f"samples: expected 1 or more, got {self.samples}")
        if self.keep < 1:
            raise ValueError(f"keep: expected 1 or more, got {self.keep}")

    def scales_of(self, num_scales: int) -> int:
        """How many of a model's `num_scales` scales this stage reads. Raises `ValueError` if it wants more."""
        if isinstance(self.scales, str):
            return max(1, num_scales * int(self.scales[:-1]) // 100)
        if self.scales > num_scales:
            raise ValueError(f"cascade: stage {self} wants {self.scales} scales, the model has {num_scales}")
        return self.scales

    def __str__(self) -> str:
        return f"{self.scales}{f'x{self.samples}' if self.samples > 1 else ''}:{self.keep}"


@dataclass(frozen=True)
class Screen:
    """First-order scores of all classes, from one forward and one backward pass.

    `keep` classes survive; or with `delta`, as many as it takes to lose the right one in a share `delta` of images at
    most. Raises `ValueError` unless one of the two is given, in range.
    """

    keep: int | None = None
    delta: float | None = None

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.delta is None):
            raise ValueError("screen: expected keep or delta, one of the two")
        if self.keep is not None and self.keep < 1:
            raise ValueError(f"keep: expected 1 or more, got {self.keep}")
        if self.delta is not None:
            check_delta(self.delta)

    def __str__(self) -> str:
        return f"screen:{self.keep if self.delta is None else _percent(self.delta)}"


@dataclass(frozen=True)
class Race:
    """All scales, one after another, without those that fall too far behind; one class is left.

    The right one is dropped in a share `delta` of images at most. Raises `ValueError` for a delta outside (0, 1).
    """

    delta: float

    def __post_init__(self) -> None:
        check_delta(self.delta)

    def __str__(self) -> str:
        return f"race:{_percent(self.delta)}"


@dataclass(frozen=True)
class Smooth:
    """Mean log-likelihood over perturbed samples, drawn until one class is out of reach of the others.

    Noise, number of samples, and whether it pays at all, are the calibration's. The answer differs from that of drawing
    all samples in a share `delta` of images at most. Raises `ValueError` for a delta outside (0, 1).
    """

    delta: float

    def __post_init__(self) -> None:
        check_delta(self.delta)

    def __str__(self) -> str:
        return f"smooth:{_percent(self.delta)}"


AnyStage = Stage | Screen | Race | Smooth

# What stands for a calibrated stage where there is no calibration: so many finalists, or such a share of many classes,
# all scored in full. On glyphs-100 the right class was among the best five uncorrected estimates in 98.4 % of images.
SCREENED, SCREENED_SHARE = 6, 0.009


@dataclass(frozen=True)
class Cascade:
    """Stages from cheap to thorough.

    Raises `ValueError` when one widens, the last keeps more than one class, or stages stand in no sensible order.
    """

    stages: tuple[AnyStage, ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("cascade: expected at least one stage, got none")
        counted = [stage for stage in self.stages if isinstance(stage, Stage | Screen) and stage.keep is not None]
        for before, after in pairwise(counted):
            if (after.keep or 0) > (before.keep or 0):
                raise ValueError(
                    f"cascade: stage {after} keeps more classes than {before} before it; a cascade narrows"
                )
        for i, stage in enumerate(self.stages):
            _check_place(stage, self.stages[:i], self.stages[i + 1 :])
        last = self.stages[-1]
        if isinstance(last, Stage | Screen) and last.keep != 1:
            raise ValueError(
                f"cascade: the last stage must keep 1 class, {last} keeps {last.keep or 'as many as it takes'}"
            )

    @classmethod
    def parse(cls, text: str) -> Cascade:
        """Read `"6:10,10:3,10x3:1"`. Raises `ValueError` naming the stage that cannot be read."""
        return cls(tuple(_parse(part.strip()) for part in text.split(",")))

    def scales_of(self, num_scales: int) -> tuple[int, ...]:
        """Scales that each stage reads of a model with `num_scales`; all of them but for fixed stages.

        Raises `ValueError` when a stage wants more than the model has or fewer than one before it.
        """
        scales = tuple(s.scales_of(num_scales) if isinstance(s, Stage) else num_scales for s in self.stages)
        after = [i for i, stage in enumerate(self.stages) if not isinstance(stage, Screen)]
        for i, j in pairwise(after):
            if scales[j] < scales[i]:
                raise ValueError(f"cascade: stage {self.stages[j]} reads fewer scales than {self.stages[i]} before it")
        return scales

    @property
    def max_samples(self) -> int:
        """Most samples that a fixed stage asks for."""
        return max((stage.samples for stage in self.stages if isinstance(stage, Stage)), default=1)

    @property
    def smooths(self) -> bool:
        """Whether it ends in calibrated smoothing."""
        return isinstance(self.stages[-1], Smooth)

    @property
    def shares_delta(self) -> bool:
        """Whether a screen and a race have the same delta, and so share it."""
        first, races = self.stages[0], [stage for stage in self.stages if isinstance(stage, Race)]
        return isinstance(first, Screen) and any(race.delta == first.delta for race in races)

    @property
    def delta(self) -> float:
        """Probability that a calibrated stage loses the right class, all stages together; 0 without such stages."""
        deltas = [stage.delta or 0 for stage in self.stages if not isinstance(stage, Stage)]
        return sum(deltas[1:] if self.shares_delta else deltas)

    @property
    def calibrated(self) -> bool:
        """Whether it needs a calibration."""
        return self.delta > 0

    def fixed(self, classes: int = 100) -> Cascade:
        """The same with counts for N `classes` in place of what needs a calibration, without calibrated smoothing."""
        most = max(SCREENED, round(SCREENED_SHARE * classes))
        stages: list[AnyStage] = []
        for stage in self.stages:
            if isinstance(stage, Screen):
                following = max((later.keep for later in self.stages if isinstance(later, Stage)), default=0)
                stages.append(Screen(keep=max(most, following)) if stage.keep is None else stage)
            elif isinstance(stage, Stage):
                stages.append(stage)
        left = [stage.keep for stage in stages[-1:] if isinstance(stage, Stage | Screen)]
        if left != [1] or any(isinstance(stage, Race) for stage in self.stages):
            stages.append(Stage("100%", 1))
        return Cascade(tuple(stages))

    def __str__(self) -> str:
        return ",".join(map(str, self.stages))


def _percent(share: float) -> str:
    """As a percentage, in as many digits as it takes to read the same number again."""
    return f"{Decimal(repr(float(share))).scaleb(2).normalize():f}%"


def _check_place(stage: AnyStage, before: tuple[AnyStage, ...], after: tuple[AnyStage, ...]) -> None:
    if isinstance(stage, Screen) and before:
        raise ValueError(f"cascade: {stage} comes first or not at all, not after {before[-1]}")
    if isinstance(stage, Race) and any(not isinstance(s, Smooth) for s in after):
        raise ValueError(f"cascade: {stage} leaves one class; only smoothing comes after it, not {after[0]}")
    if isinstance(stage, Race) and any(isinstance(s, Stage) and s.samples > 1 for s in before):
        raise ValueError(f"cascade: {stage} runs on the clean image, not after a stage with several samples")
    if isinstance(stage, Smooth) and (after or any(isinstance(s, Stage) and s.samples > 1 for s in before)):
        raise ValueError(f"cascade: {stage} comes last, after stages with one sample")


def _parse(text: str) -> AnyStage:
    fixed, adaptive = _FIXED.match(text), _ADAPTIVE.match(text)
    if fixed is not None:
        scales = fixed["scales"]
        return Stage(scales if scales.endswith("%") else int(scales), int(fixed["keep"]), int(fixed["samples"] or 1))
    if adaptive is not None and adaptive["percent"]:
        delta = float(Decimal(adaptive["value"]).scaleb(-2))
        if adaptive["kind"] == "screen":
            return Screen(delta=delta)
        return Race(delta) if adaptive["kind"] == "race" else Smooth(delta)
    if adaptive is not None and adaptive["kind"] == "screen" and adaptive["value"].isdecimal():
        return Screen(keep=int(adaptive["value"]))
    raise ValueError(
        f"cascade: cannot read stage {text!r}; expected scales:keep or scales x samples:keep, such as 6:10 or 10x3:1, "
        "or screen:5, screen:0.5%, race:0.5%, smooth:0.5%"
    )


VARC = Cascade.parse("100%:1")
"""Full likelihood of every class."""

AVARC_PLUS = Cascade.parse("60%:10,100%:3,100%x3:1")
"""The released cascade: with ten scales it is 6:10,10:3,10x3:1."""

FAST = Cascade.parse("screen:0.5%,race:0.5%,smooth:0.5%")
"""Screening, a race among the finalists, and smoothing between those that stay close where it was seen to pay."""
