"""Measure a model on images of its kind, and fit what the artefact holds. Labels are needed for posteriors only."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from varlik.calibration.artefact import Calibration, Fingerprint, Rules, SmoothingPlan
from varlik.calibration.conformal import MIN_IMAGES, Rule, fit_images, images_needed
from varlik.calibration.posterior import fit_scale_weights, fit_temperature
from varlik.models.config import Preprocessing
from varlik.models.vqvae import VQVAE
from varlik.race import on_table
from varlik.scoring.engine import Engine
from varlik.scoring.first_order import first_order_log_likelihood
from varlik.scoring.score_table import score_table
from varlik.smoothing import Smoothing, perturb
from varlik.tokens import TokenMaps

REACH = 4  # classes that smoothing re-scores
DELTAS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
# Classes far behind the best one matter little, but where they are all there is to go by.
FAR_WEIGHT = 0.01
STRICTNESS = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1)  # of the race beside the screen, of which the best is taken
BATCH = 64


class Classifier(Protocol):
    """What calibration asks of a `VARClassifier`."""

    vqvae: VQVAE
    preprocessing: Preprocessing

    @property
    def engine(self) -> Engine: ...
    @property
    def fingerprint(self) -> Fingerprint: ...
    def labels(self, classes: Any = None) -> Tensor: ...
    def tokenize(self, images: Any) -> TokenMaps: ...


@dataclass(frozen=True)
class Measured:
    """Scores of n images under N classes, float64.

    - `exact` (n, N, K): log-likelihoods of each scale. `first_order` (n, N): as they come.
    - `finalists` (n, M), `samples` (n, M, S): columns of the classes that are best by full likelihood, and their
      log-likelihoods under each sample, the clean one first; None without smoothing.
    - `truth` (n,): columns of the true classes, None without labels.
    """

    exact: Tensor
    first_order: Tensor
    finalists: Tensor | None = None
    samples: Tensor | None = None
    truth: Tensor | None = None

    def __len__(self) -> int:
        return len(self.exact)

    def __getitem__(self, rows: Tensor) -> Measured:
        others = (None if part is None else part[rows] for part in (self.finalists, self.samples, self.truth))
        return Measured(self.exact[rows], self.first_order[rows], *others)

    @property
    def best(self) -> Tensor:
        """Column of the best class by full likelihood, (n,)."""
        return self.exact.sum(-1).argmax(1)


def calibrate(
    classifier: Classifier,
    images: Any,
    classes: Sequence[int | str] | Tensor | None = None,
    *,
    truth: Sequence[int] | Tensor | None = None,
    samples: int = 1,
    sigma: float = 0.1,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Measure first-order scores, race and smoothing of a classifier on `images`, and fit what they need.

    The guarantees are for images exchangeable with these: take them at random from what is to be classified, none that
    the model was trained on. Their labels are not needed; with `truth` (n,), class indices, posteriors are calibrated
    too. With `samples` above 1, smoothing of so many samples with noise `sigma` is calibrated (and with `truth` it is
    seen whether it pays). Every image is scored exactly under every one of `classes` (default: all), which takes long:
    with a folder `cache`, finished parts are kept and found again. `progress` is told how many images are done.

    Raises `ValueError` for less than 6 images, labels of another number or outside the classes, and as
    `VARClassifier.log_likelihood`.
    """
    labels = classifier.labels(classes)
    tokens = classifier.tokenize(images)
    if samples < 1:
        raise ValueError(f"samples: expected 1 or more, got {samples}")
    if len(tokens) < MIN_IMAGES:
        raise ValueError(f"images: expected at least {MIN_IMAGES} to calibrate on, got {len(tokens)}")
    columns = None if truth is None else _columns(truth, labels, len(tokens))
    how = Smoothing(sigma, seed)
    folder = None if cache is None else Path(cache)
    measured = measure(classifier, tokens, labels, labels, samples, how, columns, folder, progress)
    return fit(measured, classifier.fingerprint, labels, labels, how)


def measure(
    classifier: Classifier,
    images: TokenMaps,
    labels: Tensor,
    at: Tensor,
    samples: int = 1,
    how: Smoothing | None = None,
    truth: Tensor | None = None,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Score `images` under `labels` (N,) exactly and to first order at the mean of `at`, and with smoothing."""
    engine = classifier.engine
    exact = score_table(engine, images, labels, cache, progress).double().cpu()
    first_order = first_order_log_likelihood(engine, images, labels, at).double().cpu()
    if samples < 2:
        return Measured(exact, first_order, truth=truth)
    finalists = exact.sum(-1).topk(min(REACH, len(labels)), dim=1).indices
    chosen = labels[finalists.to(labels.device)]
    parts = [exact.sum(-1).gather(1, finalists)]
    for sample in range(1, samples):
        parts.append(_sample_scores(classifier, images, chosen, sample, how or Smoothing()))
    return Measured(exact, first_order, finalists, torch.stack(parts, dim=-1), truth)


def fit(measured: Measured, fingerprint: Fingerprint, labels: Tensor, at: Tensor, how: Smoothing) -> Calibration:
    """The calibration that `measured` gives for classes `labels` (N,), expanded around the mean of `at`."""
    order = torch.randperm(len(measured), generator=torch.Generator().manual_seed(0))
    first = fit_images(len(measured))
    part, held = measured[order[:first]], measured[order[first:]]
    slope, offset = fit_correction(part.first_order, part.exact.sum(-1))
    corrected, held_corrected = (slope * m.first_order + offset for m in (part, held))
    full = _rules(part, held, corrected, held_corrected, part.best, held.best, fingerprint.patch_nums)
    smoothed, plan, smoothed_rows, smooth_rows = None, None, None, None
    deltas = [delta for delta in DELTAS if images_needed(delta) <= len(held)]
    if part.samples is not None and held.samples is not None and measured.samples is not None:
        patch_nums = fingerprint.patch_nums
        winners = winner(part), winner(held)
        smoothed = _rules(part, held, corrected, held_corrected, *winners, patch_nums, smooth=True)
        rows = [_expected(held, held_corrected, smoothed.both.margins(delta), patch_nums) for delta in deltas]
        smoothed_rows = torch.stack(rows)
        smooth_rows = torch.stack([_expected_smooth(held, smoothed, delta) for delta in deltas])
        plan = SmoothingPlan(measured.samples.shape[-1], how.sigma, measured.samples.shape[1], *_gain(measured))
    counts = [_expected(held, held_corrected, full.both.margins(delta), fingerprint.patch_nums) for delta in deltas]
    behind = held_corrected > held_corrected.gather(1, held.best.unsqueeze(1))
    truth = measured.truth
    return Calibration(
        fingerprint=fingerprint,
        images=len(measured),
        labels=labels.cpu(),
        at=at.cpu(),
        slope=slope,
        offset=offset.float(),
        full=full,
        recall=torch.stack([(behind.sum(1) < k).double().mean() for k in range(1, 11)]),
        correlation=correlation(held_corrected, held.exact.sum(-1)),
        deltas=torch.tensor(deltas, dtype=torch.float64),
        race_rows=torch.stack(counts),
        smoothing=plan,
        smoothed=smoothed,
        smoothed_rows=smoothed_rows,
        smooth_rows=smooth_rows,
        temperature=None if truth is None else fit_temperature(measured.exact, truth),
        scale_weights=None if truth is None else fit_scale_weights(measured.exact, truth),
    )


def fit_correction(first_order: Tensor, exact: Tensor) -> tuple[float, Tensor]:
    """Slope and offsets (N,) that bring first-order scores (n, N) near exact ones, up to a constant for each image.

    Least squares in which a class counts the more, the nearer it comes to the best one of an image: what screening has
    to tell apart. Near is what the unweighted fit leaves open.
    """
    far = torch.ones_like(exact)
    slope, offset, left_open = _least_squares(first_order, exact, far)
    near = ((exact - exact.amax(1, keepdim=True)) / max(left_open, 1e-6)).exp()
    slope, offset, _ = _least_squares(first_order, exact, near + FAR_WEIGHT)
    return slope, offset


def _least_squares(x: Tensor, y: Tensor, weights: Tensor) -> tuple[float, Tensor, float]:
    """y ~ slope * x + offset[class] + constant[image]: the first two, and the root mean square of what is left."""
    total = weights.sum(1, keepdim=True)

    def centred(values: Tensor) -> Tensor:
        return values - (weights * values).sum(1, keepdim=True) / total

    def size(values: Tensor) -> float:
        return float(((weights * values.square()).sum() / total.sum()).sqrt())

    # Normal equations of (slope - 1, offset) without the constants, x in units of its size. Their solution of least
    # norm leaves the slope at 1 where nothing tells it, and the mean offset, which nothing does, at 0.
    across, rest = centred(x), centred(y - x)
    unit = size(across)
    if unit <= 1e-9 * float(x.abs().max()):  # rounding errors
        across, unit = torch.zeros_like(across), 1.0
    across = across / unit
    mixed = (weights * across).sum(0)
    between = weights.sum(0).diag() - weights.T @ (weights / total)
    top = torch.cat(((weights * across.square()).sum().view(1), mixed))
    equations = torch.cat((top.unsqueeze(0), torch.cat((mixed.unsqueeze(1), between), dim=1)))
    wanted = torch.cat(((weights * across * rest).sum().view(1), (weights * rest).sum(0)))
    found = torch.linalg.lstsq(equations, wanted, driver="gelsd").solution
    return 1 + float(found[0]) / unit, found[1:], size(centred(rest - found[0] * across - found[1:]))


def _rules(
    part: Measured,
    held: Measured,
    corrected: Tensor,
    held_corrected: Tensor,
    right: Tensor,
    held_right: Tensor,
    patch_nums: tuple[int, ...],
    smooth: bool = False,
) -> Rules:
    """Rules for right answers: units from those of one part of the images, quantiles from those of the others."""
    screened = gaps(held_corrected.unsqueeze(-1), held_right), gaps(corrected.unsqueeze(-1), right)
    raced = gaps(held.exact.cumsum(-1), held_right), gaps(part.exact.cumsum(-1), right)
    screen, race = Rule.fit(*screened), Rule.fit(*raced)
    strictness = _strictness(part, corrected, screen, race, (screened[1], raced[1]), patch_nums)
    both = Rule.joint((screen, race), (screened[0], raced[0]), strictness)
    smoothing = None
    if smooth:
        steps = [gaps(_running_mean(m), _winner_place(m)) for m in (held, part)]
        smoothing = Rule.fit(*steps)
    return Rules(screen, race, both, smoothing)


def _strictness(
    part: Measured,
    corrected: Tensor,
    screen: Rule,
    race: Rule,
    seen: tuple[Tensor, Tensor],
    patch_nums: tuple[int, ...],
) -> tuple[float, float]:
    """How strict the race is to be beside the screen, so that fewest tokens are evaluated: seen on gaps of `part`."""
    delta = max(0.005, 1 / (len(part) + 1))
    tried = []
    for strict in STRICTNESS:
        rule = Rule.joint((screen, race), seen, (1.0, strict))
        tried.append((float(_expected(part, corrected, rule.margins(delta), patch_nums).sum()), strict))
    return 1.0, min(tried)[1]


def gaps(scores: Tensor, right: Tensor) -> Tensor:
    """How far class `right` (n,) lies behind the best one of `scores` (n, N, steps) at each step: (n, steps)."""
    own = scores.gather(1, right.view(-1, 1, 1).expand(-1, 1, scores.shape[-1]))[:, 0]
    return scores.amax(1) - own


def _running_mean(measured: Measured) -> Tensor:
    """Means over the first 1, 2, ... samples, (n, M, S)."""
    samples = measured.samples
    if samples is None:
        raise ValueError("measured: no samples to smooth over")
    return samples.cumsum(-1) / torch.arange(1, samples.shape[-1] + 1, dtype=samples.dtype)


def _winner_place(measured: Measured) -> Tensor:
    return _running_mean(measured)[..., -1].argmax(1)


def winner(measured: Measured) -> Tensor:
    """Column of the class that is best after smoothing, (n,)."""
    if measured.finalists is None:
        raise ValueError("measured: no finalists to smooth")
    return measured.finalists.gather(1, _winner_place(measured).unsqueeze(1))[:, 0]


def _gain(measured: Measured) -> tuple[float | None, float | None]:
    """What smoothing adds to accuracy, and the standard error of that."""
    if measured.truth is None:
        return None, None
    after, before = (answer == measured.truth for answer in (winner(measured), measured.best))
    change = after.double() - before.double()
    return change.mean().item(), (change.std() / len(change) ** 0.5).item()


def _expected(measured: Measured, corrected: Tensor, margins: Tensor, patch_nums: tuple[int, ...]) -> Tensor:
    """How many classes go through each scale, on average, when they are screened and raced: (K,)."""
    boundaries = (0, *itertools.accumulate(p * p for p in patch_nums))
    return on_table(corrected, measured.exact, margins, boundaries)[0].double().mean(0)


def _expected_smooth(measured: Measured, rules: Rules, delta: float) -> Tensor:
    """How many rows of perturbed samples smoothing takes, on average."""
    if rules.smooth is None:
        raise ValueError("rules: none for smoothing")
    means, margins = _running_mean(measured), rules.smooth.margins(delta)
    alive, rows = torch.ones_like(means[..., 0], dtype=torch.bool), torch.zeros(len(means), dtype=torch.float64)
    for s in range(means.shape[-1]):
        rows += alive.sum(1) * (s > 0)
        scores = means[..., s].masked_fill(~alive, -torch.inf)
        alive &= scores >= scores.amax(1, keepdim=True) - margins[s]
        alive &= alive.sum(1, keepdim=True) > 1
    return rows.mean()


def correlation(a: Tensor, b: Tensor) -> float:
    """Of two scores over the classes of an image, (n, N) each, averaged over images."""
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    size = a.square().sum(1) * b.square().sum(1)
    return ((a * b).sum(1) / size.sqrt().clamp(min=torch.finfo(size.dtype).tiny)).mean().item()


def _sample_scores(classifier: Classifier, images: TokenMaps, labels: Tensor, sample: int, how: Smoothing) -> Tensor:
    """Log-likelihoods of sample number `sample` of each image under its own `labels` (n, M): (n, M) float64."""
    engine, scales = classifier.engine, classifier.engine.config.num_scales
    engine.prepare(labels.flatten())
    found = []
    for first in range(0, len(images), BATCH):
        noisy = perturb(classifier.vqvae.quantize, images[first : first + BATCH], sample, how)
        rows = engine.open(noisy, labels[first : first + BATCH])
        engine.advance(rows, scales, retain=0)
        found.append(rows.total(scales).view(len(noisy), -1).double().cpu())
        engine.close(rows)
    return torch.cat(found)


def _columns(wanted: Sequence[int] | Tensor, labels: Tensor, count: int) -> Tensor:
    if not isinstance(wanted, Tensor) and not all(hasattr(label, "__index__") for label in wanted):
        raise TypeError("truth: expected class indices, one an image")
    truth = torch.as_tensor(wanted)
    if truth.shape != (count,):
        raise ValueError(f"truth: expected {count} labels, one an image, got shape {tuple(truth.shape)}")
    found = truth.unsqueeze(1) == labels.cpu()
    if not found.any(1).all():
        raise ValueError(f"truth: labels {sorted(set(truth[~found.any(1)].tolist()))[:8]} are not among the classes")
    return found.int().argmax(1)
