"""Cascades: which classes are scored how thoroughly, and who survives.

A stage scores the classes still alive on the first `scales` token maps of `samples` samples and keeps the best `keep`.
In text a stage is `scales:keep` or `scales x samples:keep`, stages are separated by commas: `"6:10,10:3,10x3:1"`
scores six scales of every class, all ten scales of the best ten, and three samples of the best three. Scales may be a
percentage of the model's, rounded down, so that one cascade fits models with different schedules.

Source: A-VARC, ICLR 2026, section on partial-scale pruning, in the shape of its released configuration.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from varlik.models.quantizer import MultiScaleQuantizer
from varlik.scoring.candidates import agreeing_scales
from varlik.scoring.engine import Engine
from varlik.smoothing import Smoothing, perturb
from varlik.tokens import TokenMaps

_STAGE = re.compile(r"^(?P<scales>\d+%?)(?:x(?P<samples>\d+))?:(?P<keep>\d+)$")


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
class Cascade:
    """Stages from cheap to thorough. Raises `ValueError` when one widens or the last keeps more than one class."""

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("cascade: expected at least one stage, got none")
        for before, after in pairwise(self.stages):
            if after.keep > before.keep:
                raise ValueError(
                    f"cascade: stage {after} keeps more classes than {before} before it; a cascade narrows"
                )
        if self.stages[-1].keep != 1:
            raise ValueError(
                f"cascade: the last stage must keep 1 class, {self.stages[-1]} keeps {self.stages[-1].keep}"
            )

    @classmethod
    def parse(cls, text: str) -> Cascade:
        """Read `"6:10,10:3,10x3:1"`. Raises `ValueError` naming the stage that cannot be read."""
        stages = []
        for part in text.split(","):
            match = _STAGE.match(part.strip())
            if match is None:
                raise ValueError(
                    f"cascade: cannot read stage {part.strip()!r}; expected scales:keep or scales x samples:keep, "
                    "such as 6:10 or 10x3:1"
                )
            scales = match["scales"]
            stages.append(
                Stage(scales if scales.endswith("%") else int(scales), int(match["keep"]), int(match["samples"] or 1))
            )
        return cls(tuple(stages))

    def scales_of(self, num_scales: int) -> tuple[int, ...]:
        """Scales that each stage reads of a model with `num_scales`.

        Raises `ValueError` when a stage wants more than the model has or fewer than the stage before it.
        """
        scales = tuple(stage.scales_of(num_scales) for stage in self.stages)
        for i, (before, after) in enumerate(pairwise(scales)):
            if after < before:
                raise ValueError(
                    f"cascade: stage {self.stages[i + 1]} reads fewer scales than {self.stages[i]} before it"
                )
        return scales

    @property
    def max_samples(self) -> int:
        """Most samples that a stage asks for."""
        return max(stage.samples for stage in self.stages)

    def __str__(self) -> str:
        return ",".join(map(str, self.stages))


VARC = Cascade.parse("100%:1")
"""Full likelihood of every class."""

AVARC_PLUS = Cascade.parse("60%:10,100%:3,100%x3:1")
"""The released cascade: with ten scales it is 6:10,10:3,10x3:1."""


@dataclass(frozen=True)
class StageResult:
    """What one stage of a cascade scored, for B images of n live classes each.

    `labels` (B, n) int64 and their `log_likelihood` (B, n), put together over samples and summed over the first
    `scales` token maps; `tokens` (B,) that this stage sent through the transformer for each image; `seconds` for the
    whole batch. A stage that drops nobody sends what the next one scores along with its own.
    """

    stage: Stage
    scales: int
    labels: Tensor
    log_likelihood: Tensor
    tokens: Tensor
    seconds: float


class SampleScores:
    """Log-likelihoods of the live classes of B images, stage after stage, on the engine's candidates.

    Scores go on where the last call stopped; classes left out of a call are dropped for good.
    """

    def __init__(
        self, engine: Engine, quantizer: MultiScaleQuantizer, images: TokenMaps, labels: Tensor, how: Smoothing
    ):
        self._engine, self._quantizer, self._images, self._how = engine, quantizer, images, how
        self._candidates = engine.open(images, labels)
        self._drawn = [images]
        self._samples = 1

    def __enter__(self) -> SampleScores:
        return self

    def __exit__(self, *_: object) -> None:
        """Give the pages back, whatever happened."""
        self._engine.close(self._candidates)

    def __call__(self, labels: Tensor, scales: int, samples: range, depth: int, retain: int | None) -> Tensor:
        """(B, n, S) log-likelihoods of `labels` (B, n) under each of `samples` (numbers from 0, the clean image).

        They cover the first `scales`; rows are scored up to scale `depth`, and keep keys and values of `retain` scales
        (default: all) for a later call. Rows of other samples are dropped.
        """
        engine, device = self._engine, labels.device
        live = torch.zeros(len(self._images), engine.config.num_classes + 1, dtype=torch.bool, device=device)
        live.scatter_(1, labels, True)
        rows = self._candidates
        self._keep(live[rows.image, rows.label])
        new = range(self._samples, samples.stop)
        if new and 0 in samples:  # scored first, so that its forks can share what it leaves
            engine.advance(self._candidates, depth, None if retain is None else max(retain, self.shared_scales(new)))
        for sample in new:
            self._candidates = engine.fork(self._candidates, self._sample(sample), sample)
        self._samples = samples.stop
        rows = self._candidates
        self._keep((rows.sample >= samples.start) & (rows.sample < samples.stop))
        rows = engine.advance(self._candidates, depth, retain)
        found = torch.full((*live.shape, samples.stop), torch.nan, dtype=torch.float32, device=device)
        found[rows.image, rows.label, rows.sample] = rows.total(scales)
        return found.gather(1, labels.unsqueeze(-1).expand(-1, -1, samples.stop))[..., samples.start :]

    def shared_scales(self, samples: range) -> int:
        """Up to which scale any image agrees with one of its `samples`: so much can forks of scored rows share."""
        config, clean = self._engine.config, self._images.tokens
        agreeing = [int(agreeing_scales(config, clean, self._sample(i).tokens).max()) for i in samples]
        return max(agreeing, default=0)

    def _sample(self, number: int) -> TokenMaps:
        while len(self._drawn) <= number:
            self._drawn.append(perturb(self._quantizer, self._images, len(self._drawn), self._how))
        return self._drawn[number]

    def _keep(self, wanted: Tensor) -> None:
        if not wanted.all():
            self._candidates = self._engine.keep(self._candidates, wanted.nonzero().flatten())

    def spent(self) -> Tensor:
        """Tokens (B,) that went through the transformer since this was last asked."""
        rows = self._candidates
        total = torch.zeros(len(self._images), dtype=torch.int64, device=rows.image.device)
        total.index_add_(0, rows.image, rows.evaluated)
        rows.evaluated.zero_()
        return total


def survivors(labels: Tensor, scores: Tensor, keep: int) -> Tensor:
    """The `keep` labels with the highest scores, best first: (B, n), (B, n) -> (B, keep). Ties go to the first."""
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    return labels.gather(1, order[:, :keep])


def run(
    cascade: Cascade,
    engine: Engine,
    quantizer: MultiScaleQuantizer,
    images: TokenMaps,
    labels: Tensor,
    log_prior: Tensor,
    how: Smoothing,
) -> tuple[StageResult, ...]:
    """Narrow down `labels` (N,) stage by stage for every image.

    `log_prior` (num_classes + 1,) is added when classes are ranked.
    """
    results = []
    alive = labels.expand(len(images), -1)
    depths = cascade.scales_of(engine.config.num_scales)
    with SampleScores(engine, quantizer, images, alive, how) as scores:
        for i, (stage, scales) in enumerate(zip(cascade.stages, depths, strict=True)):
            started = time.perf_counter()
            later = cascade.stages[i + 1 :]
            # Whoever surely goes on is scored in one pass with what comes next.
            goes_on = later and stage.keep >= alive.shape[1] and stage.samples == later[0].samples
            depth = depths[i + 1] if goes_on else scales
            retain = None
            if depth == depths[-1]:  # these rows are done: only new samples may share what they leave
                retain = scores.shared_scales(range(stage.samples, max((s.samples for s in later), default=0)))
            log_likelihood = how.combine(scores(alive, scales, range(stage.samples), depth, retain))
            seconds = time.perf_counter() - started
            results.append(StageResult(stage, scales, alive, log_likelihood, scores.spent(), seconds))
            alive = survivors(alive, log_likelihood + log_prior[alive], stage.keep)
    return tuple(results)
