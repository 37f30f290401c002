"""Run the stages of a cascade on one batch of images: who is scored, on what, and who survives."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from varlik.calibration import Calibration
from varlik.calibration.artefact import Rules
from varlik.calibration.conformal import quantile
from varlik.cascade import VARC, AnyStage, Cascade, Race, Screen, Smooth, Stage
from varlik.models.quantizer import MultiScaleQuantizer
from varlik.race import best, best_only, due, within_margin
from varlik.scoring.candidates import agreeing_scales
from varlik.scoring.engine import Engine
from varlik.scoring.first_order import first_order_log_likelihood
from varlik.smoothing import Smoothing, perturb
from varlik.tokens import TokenMaps


@dataclass(frozen=True)
class StageResult:
    """What one stage of a cascade did, for B images and N candidate classes, whose order the columns follow.

    - `log_likelihood` (B, N): the last score of each class in this stage, NaN for classes that it did not score:
      put together over samples and summed over scales; estimates, corrected if there is a calibration, from `Screen`.
    - `reached` (B, N) int64: over how many scales, or for `Smooth` samples, that score goes; 0 for classes not scored.
    - `scales`: most scales that the stage reads.
    - `tokens_by_class` (B, N), `tokens_by_scale` (B, K) int64: tokens that the stage sent forwards through the
      transformer; `Screen` shares one pass among all classes, and counts in the second alone.
    - `backward_tokens` (B,) int64: tokens that it sent backwards.
    - `seconds`: for the whole batch. A stage that drops nobody does what the next one needs along with its own work.
    """

    stage: AnyStage
    scales: int
    log_likelihood: Tensor
    reached: Tensor
    tokens_by_class: Tensor
    tokens_by_scale: Tensor
    backward_tokens: Tensor
    seconds: float

    @property
    def tokens(self) -> Tensor:
        """Tokens (B,) sent forwards for each image."""
        return self.tokens_by_scale.sum(1)


class SampleScores:
    """Log-likelihoods of the samples of a batch of images, sample 0 being the clean one.

    Scores go on where the last call stopped; classes left out of a call are dropped for good.
    """

    def __init__(
        self, engine: Engine, quantizer: MultiScaleQuantizer, images: TokenMaps, labels: Tensor, how: Smoothing
    ):
        """`labels` (N,): the candidate classes, whose order all columns follow."""
        self.engine, self.images, self.labels, self.how = engine, images, labels, how
        self._quantizer = quantizer
        self._column = torch.full((engine.config.num_classes + 1,), -1, device=labels.device)
        self._column[labels] = torch.arange(len(labels), device=labels.device)
        self._candidates = engine.open(images, labels.new_empty(len(images), 0))
        self._opened = False
        self._drawn = [images]
        self._samples = 1
        self._tokens = self._no_tokens()

    def __enter__(self) -> SampleScores:
        return self

    def __exit__(self, *_: object) -> None:
        """Give the pages back, whatever happened."""
        self.engine.close(self._candidates)

    def __call__(self, alive: Tensor, scales: int, samples: range, depth: int, retain: int | None = None) -> Tensor:
        """(B, N, S) log-likelihoods of the classes `alive` (B, N) under each of `samples`, NaN for the others.

        They cover the first `scales`; rows are scored up to scale `depth`, and keep keys and values of `retain` scales
        (default: all) for a later call. Rows of other samples are dropped.
        """
        engine = self.engine
        if not self._opened:
            self._candidates = engine.open(self.images, self.labels.where(alive, -1))
            self._opened = True
        self._keep(alive[self._candidates.image, self._column[self._candidates.label]])
        new = range(self._samples, samples.stop)
        if new and 0 in samples:  # scored first, so that its forks can share what it leaves
            engine.advance(self._candidates, depth, None if retain is None else max(retain, self.shared_scales(new)))
        for sample in new:
            self._candidates = engine.fork(self._candidates, self._sample(sample), sample)
        self._samples = samples.stop
        rows = self._candidates
        self._keep((rows.sample >= samples.start) & (rows.sample < samples.stop))
        rows = engine.advance(self._candidates, depth, retain)
        found = torch.full((*alive.shape, samples.stop), torch.nan, dtype=torch.float32, device=alive.device)
        found[rows.image, self._column[rows.label], rows.sample] = rows.total(scales)
        return found[..., samples.start :]

    def shared_scales(self, samples: range) -> int:
        """Up to which scale any image agrees with one of its `samples`: so much can forks of scored rows share."""
        config, clean = self.engine.config, self.images.tokens
        agreeing = [int(agreeing_scales(config, clean, self._sample(i).tokens).max()) for i in samples]
        return max(agreeing, default=0)

    def spent(self) -> tuple[Tensor, Tensor]:
        """Tokens that went through the transformer since this was last asked, by class (B, N) and by scale (B, K)."""
        self._count()
        found, self._tokens = self._tokens, self._no_tokens()
        return found

    def _sample(self, number: int) -> TokenMaps:
        while len(self._drawn) <= number:
            self._drawn.append(perturb(self._quantizer, self.images, len(self._drawn), self.how))
        return self._drawn[number]

    def _keep(self, wanted: Tensor) -> None:
        if not wanted.all():
            self._count()
            self._candidates = self.engine.keep(self._candidates, wanted.nonzero().flatten())

    def _no_tokens(self) -> tuple[Tensor, Tensor]:
        shape = len(self.images), len(self.labels)
        by_class = torch.zeros(shape, dtype=torch.int64, device=self.labels.device)
        return by_class, by_class.new_zeros(shape[0], self.engine.config.num_scales)

    def _count(self) -> None:
        rows = self._candidates
        by_class, by_scale = self._tokens
        by_class.index_put_((rows.image, self._column[rows.label]), rows.evaluated.sum(1), accumulate=True)
        by_scale.index_add_(0, rows.image, rows.evaluated)
        rows.evaluated.zero_()


@dataclass(frozen=True)
class Plan:
    """A cascade, ready for one model: `rules` of its calibrated stages, None without any; `calibration` likewise.

    `whole`: whether the candidates are all classes that were calibrated.
    """

    cascade: Cascade
    calibration: Calibration | None = None
    rules: Rules | None = None
    whole: bool = True

    @classmethod
    def of(cls, cascade: Cascade, calibration: Calibration, labels: Tensor, how: Smoothing) -> Plan:
        """The cascade with what it takes of a calibration, for candidate classes `labels` (N,).

        Raises `ValueError` for classes outside the calibration where the cascade needs it, one on too few images for a
        stage, and other noise than smoothing was calibrated for.
        """
        if cascade.calibrated:
            calibration.columns(labels)
        rules, smoothing = calibration.rules(cascade.smooths), calibration.smoothing
        noise = None if smoothing is None or rules.smooth is None else smoothing.sigma
        if noise is not None and (how.sigma, how.aggregate) != (noise, "mean"):
            raise ValueError(
                f"sigma, aggregate: smoothing was calibrated for {noise} and 'mean', "
                f"got {how.sigma} and {how.aggregate!r}"
            )
        for stage in cascade.stages:  # what the calibration cannot promise is said before any work
            if not isinstance(stage, Stage) and stage.delta is not None:
                quantile(rules.both.scores, stage.delta)
        covered = bool(torch.isin(labels, calibration.labels.to(labels.device)).all())
        return cls(cascade, calibration if covered else None, rules, whole=len(labels) == len(calibration.labels))

    @property
    def agrees_with(self) -> Cascade:
        """The cascade whose answers this one is to give, at less cost."""
        smoothing = None if self.calibration is None else self.calibration.smoothing
        if self.rules is None or self.rules.smooth is None or smoothing is None:
            return VARC
        return Cascade((Stage("100%", smoothing.reach), Stage("100%", 1, smoothing.samples)))

    def screen_margin(self, stage: Screen) -> float:
        """How far behind the best estimate a class may lie."""
        if self.rules is None or stage.delta is None:
            raise ValueError(f"cascade: {stage} needs a calibration")
        rule = self.rules.both if self.cascade.shares_delta else self.rules.screen
        return float(rule.margins(stage.delta)[0])

    def race_margins(self, stage: Race) -> Tensor:
        """How far behind the best one a class may lie after each scale, (K,)."""
        if self.rules is None:
            raise ValueError(f"cascade: {stage} needs a calibration")
        if self.cascade.shares_delta:
            return self.rules.both.margins(stage.delta)[1:]
        return self.rules.race.margins(stage.delta)

    @property
    def delta(self) -> float | None:
        """What is promised: the probability that a stage that runs loses the right class; None without a promise.

        There is none where a stage with a fixed count may drop the right class or averages over samples, and for a part
        of the calibrated classes: the best of a few is another kind of best than the best of all.
        """
        if not self.cascade.calibrated or self.rules is None or self.calibration is None or not self.whole:
            return None
        count = len(self.calibration.fingerprint.patch_nums)
        fixed = [stage for stage in self.cascade.stages if isinstance(stage, Stage)]
        first = self.cascade.stages[0]
        if any(stage.samples > 1 or stage.scales_of(count) < count for stage in fixed) or (
            isinstance(first, Screen) and first.delta is None
        ):
            return None
        last = self.cascade.stages[-1]
        unused = last.delta if isinstance(last, Smooth) and self.rules.smooth is None else 0.0
        return self.cascade.delta - unused

    @property
    def samples(self) -> int:
        """Most samples that a stage may score."""
        smoothed = self.rules is not None and self.rules.smooth is not None and self.calibration is not None
        plan = self.calibration.smoothing if smoothed and self.calibration is not None else None
        return max(self.cascade.max_samples, 1 if plan is None else plan.samples)


def run(plan: Plan, scores: SampleScores, log_prior: Tensor) -> tuple[StageResult, ...]:
    """Narrow down the candidate classes of every image stage by stage; `log_prior` (N,) is added to rank them."""
    engine = scores.engine
    shape = len(scores.images), len(scores.labels)
    alive = torch.ones(shape, dtype=torch.bool, device=scores.labels.device)
    depths = plan.cascade.scales_of(engine.config.num_scales)
    scored, results = 1, []
    for i, (stage, scales) in enumerate(zip(plan.cascade.stages, depths, strict=True)):
        started = time.perf_counter()
        backward = 0
        if isinstance(stage, Screen):
            found, alive, backward = _screen(plan, stage, scores, alive, log_prior)
            reached = alive.new_full(shape, scales, dtype=torch.int64)
        elif isinstance(stage, Race):
            found, reached, alive = _race(plan, stage, scores, alive, log_prior, scored)
        elif isinstance(stage, Smooth):
            found, reached, alive = _smooth(plan, stage, scores, alive, log_prior)
        else:
            depth, retain = _foresight(plan.cascade, i, depths, alive, scores)
            found = scores.how.combine(scores(alive, scales, range(stage.samples), depth, retain))
            reached = alive * scales
            alive = best(found + log_prior, stage.keep)
            scored = depth
        by_class, by_scale = scores.spent()
        if isinstance(stage, Screen):
            by_scale = by_scale + _screened_tokens(engine)
        spent = (by_class, by_scale, by_scale.new_full((shape[0],), backward))
        results.append(StageResult(stage, scales, found, reached, *spent, time.perf_counter() - started))
    return tuple(results)


def _foresight(
    cascade: Cascade, i: int, depths: tuple[int, ...], alive: Tensor, scores: SampleScores
) -> tuple[int, int | None]:
    """How deep the i-th stage, a fixed one, scores, and of how many scales (None: all) rows keep keys and values."""
    stage, later = cascade.stages[i], cascade.stages[i + 1 :]
    following = later[0] if later else None
    if not isinstance(stage, Stage):
        raise TypeError(f"stage: expected a fixed one, got {stage}")
    # Whoever surely goes on is scored in one pass with what comes next.
    goes_on = isinstance(following, Stage) and stage.keep >= alive.shape[1] and stage.samples == following.samples
    depth = depths[i + 1] if goes_on else depths[i]
    if depth != depths[-1]:
        return depth, None
    if any(isinstance(s, Smooth) for s in later):
        return depth, None
    # These rows are done: only new samples may share what they leave.
    most = max((s.samples for s in later if isinstance(s, Stage)), default=0)
    return depth, scores.shared_scales(range(stage.samples, most))


def _screen(
    plan: Plan, stage: Screen, scores: SampleScores, alive: Tensor, log_prior: Tensor
) -> tuple[Tensor, Tensor, int]:
    """Estimates (B, N), who survives, and tokens of an image that went backwards."""
    engine, labels, calibration = scores.engine, scores.labels, plan.calibration
    at = labels if calibration is None else calibration.at.to(labels.device)
    found = first_order_log_likelihood(engine, scores.images, labels, at)
    found = found if calibration is None else calibration.correct(found, labels)
    if stage.keep is not None:
        alive = best(found + log_prior, stage.keep)
    else:
        alive = within_margin(found + log_prior, alive, plan.screen_margin(stage))
    return found, alive, engine.config.num_tokens - 1


def _screened_tokens(engine: Engine) -> Tensor:
    """Tokens by scale (K,) of a first-order pass: all but position 0's, once."""
    config = engine.config
    sizes = torch.tensor([p * p for p in config.patch_nums], device=engine.weights.positions.device)
    sizes[0] = 0
    return sizes


def _race(
    plan: Plan, stage: Race, scores: SampleScores, alive: Tensor, log_prior: Tensor, scored: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Last scores (B, N), how many scales they go over, and who is left: one, or with smoothing to come a few."""
    rules, config = _rules(plan, stage), scores.engine.config
    margins = plan.race_margins(stage)
    found = torch.full(alive.shape, torch.nan, dtype=torch.float32, device=alive.device)
    reached = torch.zeros(alive.shape, dtype=torch.int64, device=alive.device)
    # Where stages before it have scored all scales, the last one is looked at once more.
    for scale in range(min(scored + 1, config.num_scales), config.num_scales + 1):
        stopping, last = due(alive, config.boundaries, scale), scale == config.num_scales
        if not stopping.any():  # what comes next is scored in one pass with this
            continue
        now = scores(alive, scale, range(1), scale, None if not last or rules.smooth is not None else 0)[..., 0]
        found, reached = torch.where(alive, now, found), torch.where(alive, scale, reached)
        if last and rules.smooth is None:
            alive = best_only(now + log_prior, alive)
        else:
            kept = within_margin(now + log_prior, alive, float(margins[scale - 1]))
            alive = torch.where(stopping.unsqueeze(1), kept, alive)
    return found, reached, alive


def _smooth(
    plan: Plan, stage: Smooth, scores: SampleScores, alive: Tensor, log_prior: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Last mean scores (B, N), over how many samples, and who is left: one."""
    rules, scales = _rules(plan, stage), scores.engine.config.num_scales
    found = scores(alive, scales, range(1), scales)[..., 0]
    reached = alive.long()
    calibration = plan.calibration
    if rules.smooth is not None and calibration is not None and calibration.smoothing is not None:
        margins = rules.smooth.margins(stage.delta)
        alive = alive & best(found + log_prior, calibration.smoothing.reach)
        alive = within_margin(found + log_prior, alive, float(margins[0]))
        for samples in range(2, calibration.smoothing.samples + 1):
            open_ones = alive & (alive.sum(1, keepdim=True) > 1)
            if not open_ones.any():
                break
            now = scores(open_ones, scales, range(samples), scales).mean(-1)
            found, reached = torch.where(open_ones, now, found), torch.where(open_ones, samples, reached)
            kept = within_margin(now.nan_to_num(-torch.inf) + log_prior, open_ones, float(margins[samples - 1]))
            alive = torch.where(open_ones.any(1, keepdim=True), kept, alive)
    return found, reached, best_only(found.nan_to_num(-torch.inf) + log_prior, alive)


def _rules(plan: Plan, stage: AnyStage) -> Rules:
    if plan.rules is None:
        raise ValueError(f"cascade: {stage} needs a calibration")
    return plan.rules
