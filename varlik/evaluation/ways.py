"""The same likelihoods computed in several ways, for the benchmark: naive, batched, and by the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from varlik import reference
from varlik.cascade import Cascade, Stage
from varlik.classifier import VARClassifier, load
from varlik.evaluation.samples import samples
from varlik.flops import check_classes
from varlik.models.config import VQVAEConfig
from varlik.models.presets import default_class_names, default_preprocessing, get_preset
from varlik.models.var import VAR
from varlik.models.vqvae import VQVAE
from varlik.smoothing import Smoothing, perturb
from varlik.tokens import TokenMaps

GEOMETRY_CLASSES = 10
NAIVE, BATCHED, ENGINE = "naive, one class at a time", "naive, batched", "engine"
SMOOTHING = Smoothing()
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Work:
    """What is measured: `images` under the first `classes` classes of a model (default: all).

    `geometry` ("d16", "d20", ...) takes the transformer of that preset with random weights in place of `model`, with
    `depth` blocks (default: the preset's) and 10 classes by default. `scales` scores the first token maps only,
    `cascade` is a cascade's text. The naive way is timed on the first `naive_classes` and scaled up linearly. `dtype`
    ("float16", ...) is that of the engine's matrix products, see `EngineOptions`; the naive ways run in float32.
    """

    model: str = "fashion-mnist"
    geometry: str | None = None
    depth: int | None = None
    images: int = 4
    classes: int | None = None
    scales: int | None = None
    cascade: str | None = None
    naive_classes: int | None = None
    device: str | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Bench:
    """A `Work` made ready: a classifier, token maps of B images, labels (N,), and of them those of the naive way."""

    classifier: VARClassifier
    images: TokenMaps
    labels: Tensor
    naive_labels: Tensor
    cascade: Cascade

    @property
    def plain(self) -> bool:
        """Whether it is a likelihood of the clean image, with no stage after it."""
        return len(self.cascade.stages) == self.cascade.max_samples == 1

    @property
    def stages(self) -> list[tuple[int, int, int]]:
        """(scales, samples, survivors) of every stage. Raises `ValueError` for stages that the naive ways lack."""
        scales = self.cascade.scales_of(self.classifier.var.config.num_scales)
        found = []
        for k, stage in zip(scales, self.cascade.stages, strict=True):
            if not isinstance(stage, Stage):
                raise ValueError(f"cascade: {stage} has no naive counterpart to time; give fixed stages")
            found.append((k, stage.samples, stage.keep))
        return found


@dataclass(frozen=True)
class Scores:
    """What one way found: (labels (B, n), log-likelihoods (B, n)) for every stage, and tokens evaluated per image."""

    stages: list[tuple[Tensor, Tensor]]
    tokens: float


def prepare(work: Work) -> Bench:
    """Load or make the model and the images. Raises `ValueError` for work that the model cannot do."""
    for name in ("images", "depth", "classes", "naive_classes"):
        value = getattr(work, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}")
    if work.scales is not None and work.cascade is not None:
        raise ValueError("scales: a cascade says itself which scales it reads; give one of the two")
    if work.depth is not None and work.geometry is None:
        raise ValueError("depth: only a geometry can be had with another depth")
    if work.dtype not in (None, *DTYPES):
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {work.dtype!r}")
    dtype = DTYPES.get(work.dtype or "")
    if work.geometry is None:
        classifier = load(work.model, device=work.device, dtype=dtype)
    else:
        classifier = _random_classifier(work, dtype)
    config = classifier.var.config
    default = config.num_classes if work.geometry is None else min(GEOMETRY_CLASSES, config.num_classes)
    classes = check_classes(config, default if work.classes is None else work.classes)
    cascade = (
        Cascade((Stage("100%" if work.scales is None else work.scales, 1),))
        if work.cascade is None
        else Cascade.parse(work.cascade)
    )
    cascade.scales_of(config.num_scales)
    naive_classes = classes if work.naive_classes is None else min(classes, work.naive_classes)
    labels = classifier.labels(range(classes))
    bench = Bench(classifier, _images(work, classifier), labels, labels[:naive_classes], cascade)
    if naive_classes < classes and not bench.plain:
        raise ValueError("naive_classes: the time of a cascade is not linear in its classes; leave it out")
    return bench


def title_of(work: Work) -> str:
    """The work in one line."""
    model = work.model if work.geometry is None else f"{work.geometry} with random weights"
    depth = f", depth {work.depth}" if work.depth is not None else ""
    classes = "" if work.classes is None else f", {work.classes} class{'es' * (work.classes > 1)}"
    what = work.cascade or ("full likelihood" if work.scales is None else f"likelihood of {work.scales} scales")
    return f"{model}{depth}, {work.images} image{'s' * (work.images > 1)}{classes}, {what}"


def naive(bench: Bench) -> Scores:
    """Image by image and class by class; a cascade's samples are drawn once for each image, its stages from scratch."""
    var, labels = bench.classifier.var, bench.naive_labels.tolist()
    boundaries, stages, by_image = var.config.boundaries, bench.stages, []
    for i in range(len(bench.images)):
        image = bench.images[i : i + 1]
        if bench.plain:
            scales = stages[0][0]
            found = reference.log_likelihood(var, image.tokens, image.teacher_forcing_input, labels, scales)[0]
            by_image.append([(labels, found)])
            continue
        quantizer = bench.classifier.vqvae.quantize
        drawn = [perturb(quantizer, image, sample, SMOOTHING) for sample in range(bench.cascade.max_samples)]
        pairs = [(sample.tokens, sample.teacher_forcing_input) for sample in drawn]
        by_image.append(reference.cascade(var, pairs, labels, stages)[1])
    merged = [
        (torch.tensor([live for live, _ in stage], device=bench.labels.device), torch.stack([s for _, s in stage]))
        for stage in zip(*by_image, strict=True)
    ]
    tokens = sum(
        found.shape[1] * count * boundaries[scales]
        for (found, _), (scales, count, _) in zip(merged, stages, strict=True)
    )
    return Scores(merged, float(tokens))


@torch.no_grad()
def batched(bench: Bench) -> Scores:
    """All classes of an image as rows of one forward pass. For plain likelihoods only."""
    var, labels, scales = bench.classifier.var, bench.labels, bench.stages[0][0]
    length, rows = var.config.boundaries[scales], len(bench.labels)
    found = []
    for i in range(len(bench.images)):
        tokens, inputs = bench.images.tokens[i], bench.images.teacher_forcing_input[i]
        logits = var(var.class_vectors(labels), inputs.expand(rows, -1, -1), scales)
        targets = tokens[:length, None].expand(rows, -1, -1)
        found.append(torch.log_softmax(logits, dim=-1).gather(-1, targets).squeeze(-1).sum(-1))
    return Scores([(labels.expand(len(found), -1), torch.stack(found))], float(rows * length))


def engine(bench: Bench) -> Scores:
    """The classifier as users call it."""
    prediction = bench.classifier.classify(bench.images, bench.labels, bench.cascade)
    labels = prediction.labels.expand(len(prediction), -1)
    stages = [(labels, stage.log_likelihood) for stage in prediction.stages]
    return Scores(stages, prediction.cost.tokens.double().mean().item())


VARIANTS: dict[str, Callable[[Bench], Scores]] = {NAIVE: naive, BATCHED: batched, ENGINE: engine}
"""The ways by name, in the order in which they are checked."""


def _random_classifier(work: Work, dtype: torch.dtype | None) -> VARClassifier:
    """A preset's transformer with random weights. Its VQ-VAE is a stand-in of which only the quantiser is used."""
    preset = get_preset(f"var-{str(work.geometry).removeprefix('var-')}")
    config = replace(preset.var, depth=preset.var.depth if work.depth is None else work.depth)
    small = VQVAEConfig(
        channels=32,
        channel_multipliers=(1,) * 5,
        num_res_blocks=1,
        codebook_dim=config.codebook_dim,
        vocab_size=config.vocab_size,
        patch_nums=config.patch_nums,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vqvae, var = VQVAE(small, decoder=False), VAR(config)
        # Classes, gates and head of the size they have in a trained model: with those that training starts from, the
        # blocks and the class would count for so little that a wrong score could pass for right.
        var.reset_parameters(gate=1.0)
        with torch.no_grad():
            var.class_emb.weight.mul_(32)
            var.head.weight.mul_(50)
    names = default_class_names(config.num_classes)
    preprocessing = default_preprocessing(small)
    classifier = VARClassifier(var, vqvae, names, preprocessing, name=f"{preset.name}, random", dtype=dtype)
    return classifier.to(work.device or ("cuda" if torch.cuda.is_available() else "cpu"))


@torch.no_grad()
def _images(work: Work, classifier: VARClassifier) -> TokenMaps:
    """Sample pictures of a bundled model, over and over if need be; noise for other models."""
    vqvae = classifier.vqvae
    generator = torch.Generator().manual_seed(1)
    if work.geometry is not None:
        side = vqvae.config.patch_nums[-1]
        feature_map = torch.randn(work.images, vqvae.config.codebook_dim, side, side, generator=generator)
        feature_map = feature_map.to(classifier.device)
        tokens, inputs = vqvae.quantize.tokenize(feature_map)
        return TokenMaps(tokens, inputs, feature_map, tuple(range(work.images)), vqvae.config.patch_nums)
    try:
        paths = samples(work.model).paths
    except ValueError:
        side, channels = vqvae.config.resolution, vqvae.config.in_channels
        pixels = torch.rand(work.images, channels, side, side, generator=generator)
        return classifier.tokenize_pixels(2 * pixels - 1)
    return classifier.tokenize([paths[i % len(paths)] for i in range(work.images)])
