"""The facade: load a model, ask how likely images are under classes, classify them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from varlik import images as image_files
from varlik.audit import Audit, Auditor
from varlik.calibration import Calibration, Fingerprint
from varlik.cascade import SCREENED, VARC, Cascade, Screen
from varlik.class_names import ClassNames
from varlik.models import checkpoints
from varlik.models.config import Preprocessing
from varlik.models.var import VAR
from varlik.models.vqvae import VQVAE
from varlik.models.weights import digest
from varlik.prediction import Cost, Prediction, from_stages, log_of_prior, merge_batches
from varlik.run import Plan, SampleScores, run
from varlik.scoring.engine import Engine
from varlik.scoring.first_order import first_order_log_likelihood
from varlik.scoring.options import EngineOptions
from varlik.scoring.score_table import score_table
from varlik.smoothing import Aggregate, Smoothing
from varlik.tokens import TokenMaps, tokenize

IMAGE_BATCH = 256

Images = Any
"""What `varlik.images` reads (paths, PIL images, tensors, arrays, lists of them), or `TokenMaps`."""

Classes = Sequence[int | str] | Tensor | None
"""Classes by index or name; None means every class of the model."""


def load(
    source: str | Path,
    vqvae: str | Path | None = None,
    device: str | torch.device | None = None,
    calibration: Calibration | str | Path | None = None,
    **options: Any,
) -> VARClassifier:
    """Load a classifier.

    `source` is a name from `varlik.list_models()`, a Hub repo id, a folder with `var.safetensors` and
    `vqvae.safetensors`, or a `.safetensors` or `.pth` file of a VAR transformer; `vqvae` names the file of its VQ-VAE
    where it does not lie beside it. `device` defaults to the first CUDA GPU, else the CPU. `calibration` is one or its
    file; by default `calibration.safetensors` beside the transformer is taken where it fits. `options` are those of
    `EngineOptions`: `max_memory`, `dtype`, `impl`, `deterministic`, `cuda_graphs`.

    Raises `FileNotFoundError` when something is neither here nor to be had, `ValueError` for an unknown name, a
    checkpoint that does not fit, with the tensors that differ, or a `calibration` that does not, with the differing
    fields, and as `EngineOptions` for options.
    """
    EngineOptions(**options)  # what is wrong with them is said before anything is fetched
    device = _device(device)
    if isinstance(calibration, str | Path):
        calibration = Calibration.load(calibration)
    loaded = checkpoints.load_models(source, vqvae)
    classifier = VARClassifier(
        loaded.var.to(device),
        loaded.vqvae.to(device),
        loaded.class_names,
        loaded.preprocessing,
        name=loaded.name,
        **options,
    )
    if calibration is not None:
        classifier.calibration = calibration
    else:
        classifier.calibration_file = loaded.calibration
    return classifier


class VARClassifier:
    """A VAR model used as a classifier: log p(image | class) for every class, and what follows from it.

    Wherever images are taken, `TokenMaps` (see `tokenize`) are taken too, so that an image is encoded once.
    Results do not depend on the batch an image stands in (float32: to 1e-5 relative; to the bit on a CUDA device with
    `deterministic=True`, for given token maps).
    """

    def __init__(
        self,
        var: VAR,
        vqvae: VQVAE,
        class_names: Sequence[str],
        preprocessing: Preprocessing,
        name: str = "custom",
        **options: Any,
    ):
        """`class_names` has one name per class, the null class left out; `options` as `load` takes them.

        Raises `ValueError` when parts do not fit and for options out of range, `TypeError` for unknown ones.
        """
        self._options = EngineOptions(**options)
        if len(class_names) != var.config.num_classes:
            raise ValueError(f"class_names: expected {var.config.num_classes} names, got {len(class_names)}")
        if var.config.patch_nums != vqvae.config.patch_nums:
            raise ValueError(
                f"vqvae: scales {vqvae.config.patch_nums} differ from the transformer's {var.config.patch_nums}"
            )
        if preprocessing.resolution != vqvae.config.resolution or preprocessing.channels != vqvae.config.in_channels:
            raise ValueError(
                f"preprocessing: {preprocessing} does not make {vqvae.config.resolution}-pixel images "
                f"with {vqvae.config.in_channels} channels"
            )
        self.var = var.eval()
        self.vqvae = vqvae.eval()
        self._names = ClassNames(class_names, name)
        self.preprocessing = preprocessing
        self.name = name
        self.calibration_file: Path | None = None  # read when first needed, and used if it fits
        self._engine: Engine | None = None
        self._vqvae_digest: str | None = None
        self._calibration: Calibration | None = None
        self._told = False
        self._auditor = Auditor()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.var.pos_start.device

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes by index, the null class left out."""
        return self._names.names

    @property
    def null_class(self) -> int:
        """Index of the class that means "unconditional"; accepted wherever class indices are."""
        return self.var.config.null_class

    @property
    def engine(self) -> Engine:
        """The scoring engine, made when first asked for; see `varlik.scoring.engine`."""
        if self._engine is None:
            self._engine = Engine(self.var, self._options)
        return self._engine

    @property
    def fingerprint(self) -> Fingerprint:
        """What a calibration of this classifier depends on."""
        if self._vqvae_digest is None:
            self._vqvae_digest = digest(self.vqvae)
        return Fingerprint(
            transformer=self.engine.weights_digest,
            vqvae=self._vqvae_digest,
            patch_nums=self.var.config.patch_nums,
            dtype=str(self.engine.compute.dtype).removeprefix("torch."),
            preprocessing=str(self.preprocessing),
        )

    @property
    def calibration(self) -> Calibration | None:
        """What `varlik.calibrate` measured, or what lies beside the model and fits; None without. See `FAST`."""
        if self._calibration is None and self.calibration_file is not None:
            file = self.calibration_file
            found = Calibration.load(file)
            self.calibration_file = None
            self._calibration = found if self._fits(found, str(file)) else None
        return self._calibration

    @calibration.setter
    def calibration(self, calibration: Calibration | None) -> None:
        """Use another one, or none.

        Raises `ValueError` for one of another model, naming the differing fields, `TypeError` for something else.
        """
        if calibration is not None and not isinstance(calibration, Calibration):
            raise TypeError(f"calibration: expected a Calibration (see Calibration.load), got {calibration!r}")
        if calibration is not None:
            calibration.check(self.fingerprint)
        self._calibration, self.calibration_file = calibration, None
        self._auditor.clear()

    def to(self, device: str | torch.device) -> VARClassifier:
        """Move the model and return it."""
        self.var.to(device)
        self.vqvae.to(device)
        self._engine = None
        if self._calibration is not None and not self._fits(self._calibration, f"calibration, on {device}"):
            self.calibration = None  # another device may mean another precision
        return self

    def warmup(self, rows: int = 1, autotune: bool = False) -> None:
        """Do once what first use would pay for: compile kernels, build the tables of all classes, capture graphs.

        Scores `rows` rows (image, class) scale by scale and all scales at once. With `cuda_graphs`, name the numbers of
        rows that are to come. With `autotune`, kernels time their numbers of warps and pipeline stages meanwhile, which
        stay for the process. Raises `ValueError` for less than one row, and for `autotune` without Triton's path.
        """
        self.engine.warmup(rows, autotune)
        size = self.vqvae.config.resolution
        blank = torch.zeros(1, self.vqvae.config.in_channels, size, size, device=self.device)
        self.tokenize_pixels(blank)

    def tokenize(self, images: Images) -> TokenMaps:
        """Token maps of images of any kind that `varlik.images` reads; token maps are returned as they are.

        Raises `ValueError`, `TypeError` or `FileNotFoundError` naming the image that cannot be used.
        """
        if isinstance(images, TokenMaps):
            if images.patch_nums != self.var.config.patch_nums:
                raise ValueError(f"images: token maps of another model, with scales {images.patch_nums}")
            return images
        return tokenize(self.vqvae, image_files.load_many(images, self.preprocessing))

    def tokenize_pixels(self, pixels: Tensor) -> TokenMaps:
        """Token maps of ready pixels (B, C, S, S) in [-1, 1]; raises as `varlik.tokens.tokenize`."""
        return tokenize(self.vqvae, pixels)

    def token_log_prob(self, images: Images, classes: Classes = None, scales: int | None = None) -> Tensor:
        """log p(token | coarser token maps, class), (B, N, L_k) float32, over the first `scales` scales (default: all).

        Raises `ValueError` for unknown classes and scales out of range, and as `tokenize`.
        """
        images, labels, scales = self._checked(images, classes, scales)
        parts = []
        for batch in self._batches(images, len(labels), 1, scales):
            rows = self.engine.open(batch, labels.expand(len(batch), -1), per_token=True)
            self.engine.advance(rows, scales, retain=0)
            length = self.var.config.boundaries[scales]
            parts.append(rows.per_token()[:, :length].view(len(batch), len(labels), length))
        return torch.cat(parts)

    def log_likelihood(self, images: Images, classes: Classes = None, scales: int | None = None) -> Tensor:
        """log p(image | class) in natural log, (B, N) float32; with `scales`, of the first token maps only.

        Raises as `token_log_prob`.
        """
        images, labels, scales = self._checked(images, classes, scales)
        return self._sample_scores(images, labels, scales, range(1), Smoothing())[..., 0]

    def smoothed_log_likelihood(
        self,
        images: Images,
        classes: Classes = None,
        *,
        samples: int = 10,
        sigma: float = 0.1,
        seed: int = 0,
        scales: int | None = None,
        aggregate: Aggregate = "mean",
        include_clean: bool = True,
    ) -> Tensor:
        """Log-likelihood averaged over `samples` perturbed samples of each image, (B, N) float32.

        `sigma` is the standard deviation of the noise on the feature map; noise depends on (seed, image, sample) only.
        With `include_clean` the unperturbed image is one of the samples. `aggregate` is "mean" (of log-likelihoods, as
        the released A-VARC does) or "log-mean-exp" (the paper's equation).

        Raises `ValueError` for samples below 1, a sigma that is not positive, an unknown `aggregate`, and as above.
        """
        if samples < 1:
            raise ValueError(f"samples: expected 1 or more, got {samples}")
        how = Smoothing(sigma, seed, aggregate)
        images, labels, scales = self._checked(images, classes, scales)
        numbers = range(samples) if include_clean else range(1, samples + 1)
        return how.combine(self._sample_scores(images, labels, scales, numbers, how))

    def posterior(
        self,
        images: Images,
        classes: Classes = None,
        *,
        scales: int | None = None,
        prior: Sequence[float] | Tensor | None = None,
        calibrated: Literal["temperature", "scale weights"] | None = None,
    ) -> Tensor:
        """p(class | image) over the given classes, (B, N), by Bayes' rule.

        `prior` (N,) follows `classes` and need not sum to one; default uniform. Summed log-likelihoods are
        over-confident: expect values near 0 and 1. With `calibrated`, log-likelihoods are divided by the "temperature"
        of so many scales, or those of each scale are multiplied by "scale weights", as a calibration on labelled images
        found them; the first leaves the ranking as it is.

        Raises `ValueError` for a prior of another length or with negative entries, for `calibrated` without such a
        calibration, and for weights of fewer scales than all.
        """
        images, labels, scales = self._checked(images, classes, scales)
        log_prior = log_of_prior(prior, len(labels), self.device)
        if calibrated is None:
            return (self.log_likelihood(images, labels, scales) + log_prior).softmax(-1)
        if self.calibration is None:
            raise ValueError("calibrated: this takes a calibration made with labels (truth=...)")
        weights = self.calibration.posterior_weights(calibrated, scales)
        by_scale = score_table(self.engine, images, labels)[..., :scales]
        return (by_scale.double() @ weights.to(by_scale.device) + log_prior).softmax(-1).float()

    def first_order_log_likelihood(
        self,
        images: Images,
        classes: Classes = None,
        *,
        at: int | str | Classes = "mean",
        scales: int | None = None,
        per_scale: bool = False,
        expansions: int = 1,
    ) -> Tensor:
        """Estimates of log p(image | class) of all classes, from one forward and one backward pass: (B, N) float32.

        Scores are expanded to first order in what the class brings into the transformer, `at` the "mean" of `classes`,
        at the "null" class, at another class, or at the mean of a list of them. Scale 1 is exact. The ranking is good,
        with the right class nearly always near its top; distances are off by a constant for each class, which a
        calibration corrects (`calibration.correct`). Each further one of `expansions` is around a point nearer to the
        classes that look best for the image; the average of the estimates is better than the first.
        With `per_scale`, estimates of log p(token map | coarser ones, class), (B, N, K'), at one backward pass a scale.

        Raises `ValueError` for less than one expansion, and as `token_log_prob`.
        """
        labels = self.labels(classes)
        if isinstance(at, str) and at in ("mean", "null"):
            point = labels if at == "mean" else torch.tensor([self.null_class], device=self.device)
        else:
            point = self.labels([at] if isinstance(at, int | str) else at)
        images, labels, scales = self._checked(images, classes, scales)
        return first_order_log_likelihood(
            self.engine, images, labels, point, scales=scales, per_scale=per_scale, expansions=expansions
        )

    def classify(
        self,
        images: Images,
        classes: Classes = None,
        cascade: Cascade | str = VARC,
        *,
        prior: Sequence[float] | Tensor | None = None,
        sigma: float | None = None,
        seed: int = 0,
        aggregate: Aggregate = "mean",
        audit: float = 0.0,
    ) -> Prediction:
        """The most likely class of each image, found by a cascade (default: full likelihood of every class).

        `cascade` is a `Cascade` such as `varlik.FAST`, or its text, such as "6:10,10:3,10x3:1" or
        "screen:0.5%,race:0.5%"; `prior` (N,) follows `classes`; `sigma` (default: what smoothing was calibrated for,
        else 0.1), `seed` and `aggregate` concern stages with more than one sample.

        Stages with a percentage take this classifier's `calibration`. Without one they fall back to fixed counts
        (`Cascade.fixed`), with a warning. What a calibration promises holds for all classes that it is for, a uniform
        prior, and images like its own, on average over calibrations of that size. A share `audit` of the images, at
        random, is scored in full as well: `prediction.audit` says how many answers differed, over all calls with this
        cascade and these classes, and there is a warning when those are very likely more than was promised. That work
        is not part of `prediction.cost`.

        Raises `ValueError` for a cascade that widens or asks for more scales than there are, for classes that were not
        calibrated, a calibration on too few images, another `sigma` or `aggregate` than smoothing was calibrated for,
        an `audit` that is no share (`TypeError` if it is no number), and as the methods above.
        """
        started = time.perf_counter()
        cascade = Cascade.parse(cascade) if isinstance(cascade, str) else cascade
        if isinstance(audit, bool) or not isinstance(audit, int | float):
            raise TypeError(f"audit: expected a share from 0 to 1, got {audit!r}")
        if not 0 <= audit <= 1:
            raise ValueError(f"audit: expected a share from 0 to 1, got {audit}")
        stage_scales = cascade.scales_of(self.var.config.num_scales)
        how = Smoothing(self._sigma(cascade) if sigma is None else sigma, seed, aggregate)
        plan = self._plan(cascade, self.labels(classes), how)
        images, labels, _ = self._checked(images, classes, None)
        log_prior = log_of_prior(prior, len(labels), self.device)
        first = cascade.stages[0]
        rows = min(len(labels), first.keep or SCREENED) if isinstance(first, Screen) else len(labels)
        results = []
        for batch in self._batches(images, rows, plan.samples, stage_scales[0]):
            with SampleScores(self.engine, self.vqvae.quantize, batch, labels, how) as scores:
                results.append(run(plan, scores, log_prior))
        stages = tuple(merge_batches(parts) for parts in zip(*results, strict=True))
        seconds = time.perf_counter() - started
        cost = Cost.of(stages, self.var.config, self.vqvae.config, len(labels), seconds)
        prediction = from_stages(labels, log_prior, stages, cost, self._names.name)
        return replace(prediction, audit=self._audit(plan, prediction, images, log_prior, how, audit))

    def reconstruct(self, images: Images, scales: int | None = None) -> Tensor:
        """Images decoded from their first `scales` token maps (default: all): (B, C, S, S) in [0, 1].

        Raises `ValueError` when the VQ-VAE was loaded without its decoder or for scales out of range.
        """
        images = self.tokenize(images)
        if scales is not None and not 1 <= scales <= self.var.config.num_scales:
            raise ValueError(f"scales: expected 1 to {self.var.config.num_scales}, got {scales}")
        with torch.no_grad():
            decoded = self.vqvae.decode(self.vqvae.quantize.feature_map(images.tokens, scales))
        return decoded.clamp(-1, 1).add(1).div(2)

    def labels(self, classes: Classes = None) -> Tensor:
        """Indices (N,) int64 of classes given by index or name, in their order; all but the null class for None.

        Raises `ValueError` for an empty list, an unknown or repeated class, `TypeError` for other kinds of values.
        """
        if classes is None:
            return torch.arange(self.var.config.num_classes, device=self.device)
        return torch.tensor(self._names.indices(classes), device=self.device)

    def _checked(self, images: Images, classes: Classes, scales: int | None) -> tuple[TokenMaps, Tensor, int]:
        """Token maps, labels (N,) whose tables are built, and a number of scales that the model has."""
        count = self.var.config.num_scales
        scales = count if scales is None else scales
        if not 1 <= scales <= count:
            raise ValueError(f"scales: expected 1 to {count}, got {scales}")
        labels = self.labels(classes)
        images = self.tokenize(images)
        if not len(images):
            raise ValueError("images: expected at least one image, got none")
        self.engine.prepare(labels)
        return images, labels, scales

    def _batches(self, images: TokenMaps, classes: int, samples: int, scales: int) -> Iterator[TokenMaps]:
        """Images in batches whose pages up to `scales` fit the cache."""
        slots = classes * samples * self.var.config.boundaries[scales]
        size = max(1, min(IMAGE_BATCH, self.engine.cache.max_slots // slots))
        for first in range(0, len(images), size):
            yield images[first : first + size]

    def _fits(self, calibration: Calibration, name: str) -> bool:
        """Whether it is for this model; says so where it is not."""
        differing = calibration.fingerprint.differences(self.fingerprint)
        if differing:
            warnings.warn(f"{name}: not used, it differs in {'; '.join(differing)}", stacklevel=3)
        return not differing

    def _sigma(self, cascade: Cascade) -> float:
        """Noise of perturbed samples where none is given."""
        smoothing = self.calibration.smoothing if self.calibration is not None and cascade.smooths else None
        return Smoothing.sigma if smoothing is None else smoothing.sigma

    def _plan(self, cascade: Cascade, labels: Tensor, how: Smoothing) -> Plan:
        """The cascade with what it takes of the calibration, or with fixed counts where there is none."""
        calibration = self.calibration
        if calibration is None:
            if cascade.calibrated and not self._told:
                self._told = True
                warnings.warn(
                    f"{self.name} has no calibration for {cascade}: running {cascade.fixed(len(labels))} instead; "
                    "make one with varlik calibrate",
                    stacklevel=3,
                )
            return Plan(cascade.fixed(len(labels)))
        return Plan.of(cascade, calibration, labels, how)

    def _audit(
        self, plan: Plan, prediction: Prediction, images: TokenMaps, log_prior: Tensor, how: Smoothing, share: float
    ) -> Audit | None:
        """Score a random share of the images in full; None where there is nothing to audit so far."""
        what = f"{plan.cascade} {prediction.labels.tolist()}"
        chosen = self._auditor.draw(what, images.keys, share, how.seed)
        if chosen:
            picked = TokenMaps.concatenate([images[i : i + 1] for i in chosen])
            options: dict[str, Any] = {"prior": log_prior.exp(), "sigma": how.sigma, "seed": how.seed}
            right = self.classify(picked, prediction.labels, plan.agrees_with, **options).classes
            wrong = int((prediction.classes[chosen] != right).sum())
            self._auditor.add(what, Audit(len(chosen), wrong, plan.delta, frozenset(picked.keys)))
        return self._auditor.of(what) if share else None

    def _sample_scores(self, images: TokenMaps, labels: Tensor, scales: int, samples: range, how: Smoothing) -> Tensor:
        """Log-likelihoods (B, N, S) of labels (N,) under each of `samples`."""
        parts = []
        for batch in self._batches(images, len(labels), len(samples), scales):
            alive = torch.ones(len(batch), len(labels), dtype=torch.bool, device=labels.device)
            with SampleScores(self.engine, self.vqvae.quantize, batch, labels, how) as scores:
                parts.append(scores(alive, scales, samples, depth=scales, retain=0))
        return torch.cat(parts)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # torch refuses an absent GPU by AssertionError
        raise ValueError(f"device: {str(device)!r} cannot be used here ({str(error).splitlines()[0]})") from error
    return found
