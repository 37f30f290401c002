"""Condition contrastive alignment: fine-tune a VAR model to prefer an image's class to another image's class.

How much more likely than under a frozen reference has an image become? Up under its own class and down under that of
another image of the batch: contrast without sampling. Source: "Toward Guidance-Free AR Visual Generation via Condition
Contrastive Alignment", Chen et al., ICLR 2025, arXiv 2410.09347.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varlik.models.var import VAR
from varlik.models.weights import digest
from varlik.scoring.engine import Engine
from varlik.scoring.first_order import first_order_log_likelihood
from varlik.scoring.score_table import SHARD, score_table
from varlik.training import distributed
from varlik.training.data import TrainingTokens, check_every_class, check_fits, check_model, fingerprints
from varlik.training.likelihood import score_of
from varlik.training.loop import LoopConfig, Part, batch_indices, check_batch, check_looked_at, generator, train
from varlik.training.metrics import Metrics
from varlik.training.reference_scores import TABLE_BYTES, Reference

MOST_IN_FULL, FINALISTS = 40, 10  # classes that held-out images are scored under


@dataclass(frozen=True)
class CCAConfig:
    """What is contrasted, and how hard.

    `beta` multiplies log-likelihood ratios, in 1/nat: the smaller, the further the model may move from its reference.
    `weight` (lambda) is what a negative counts beside a positive. `null_rate` is the share of images whose label and
    negative both become the null class, which keeps log p(image | null class) meaningful.

    Raises `ValueError` for a value out of range.
    """

    beta: float = 0.02
    weight: float = 50.0
    null_rate: float = 0.1

    def __post_init__(self) -> None:
        for name in ("beta", "weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if not 0 <= self.null_rate < 1:
            raise ValueError(f"null_rate: expected 0 or more and less than 1, got {self.null_rate}")


@dataclass(frozen=True)
class CCAPreset:
    """Settings that go together; change single ones with `dataclasses.replace`."""

    cca: CCAConfig
    loop: LoopConfig


def _published(weight: float, images: int, weight_decay: float = 0.05) -> CCAPreset:
    """One epoch of ImageNet at a batch of 256, cut into parts of so many images for a process that is alone."""
    loop = LoopConfig(
        steps=5004,
        batch_size=256,
        learning_rate=2e-5,
        warmup=100,
        hold=0.07,
        weight_decay=weight_decay,
        clip=2.0,
        accumulate=256 // images,
        precision="float16",
    )
    return CCAPreset(CCAConfig(beta=0.02, weight=weight), loop)


# "d16" to "d30" are what the authors give for the ImageNet models of those depths, with AdamW's betas of (0.9, 0.95),
# no moving average of the weights, and pictures that are not mirrored. A part is as large as on one of their 8 GPUs: n
# processes take an n-th of `accumulate`, and more memory allows less. What differs from theirs: after its peak the
# learning rate falls along a cosine to zero, theirs along a line to a tenth (d16, d20) or a hundredth of the peak;
# their weight decay for d30 rises to 0.08 from 0.05; negatives come from the whole batch, theirs from the part at work;
# from d20 on they drop paths. "small" suits models of a few million parameters.
PRESETS: dict[str, CCAPreset] = {
    "d16": _published(weight=50, images=8),
    "d20": _published(weight=50, images=4),
    "d24": _published(weight=100, images=4),
    "d30": _published(weight=1000, images=2, weight_decay=0.08),
    "small": CCAPreset(
        CCAConfig(beta=0.05, weight=1.0), LoopConfig(steps=1000, batch_size=32, learning_rate=2e-4, warmup=50)
    ),
}


def cca_loss(
    log_ratio: Tensor,
    negative_log_ratio: Tensor,
    as_positive: Tensor,
    beta: float,
    weight: float,
    normalise: bool = True,
) -> Tensor:
    """The CCA loss of R images, a scalar, in nats.

    - `log_ratio` (R,): Δ = log p(image | label) - log p_reference(image | label), summed over tokens.
    - `negative_log_ratio` (R,): Δ', the same under the negative label.
    - `as_positive` (R,) bool: where the negative label is none, since it is the image's own or both are the null class.

    The mean over images of -log σ(β Δ), plus -log σ(β Δ') where `as_positive` and -λ log σ(-β Δ') elsewhere, with λ =
    `weight`; divided by max(λ, 1) to `normalise`. Differentiable in both ratios, and finite however large they are.

    Raises `TypeError` for other dtypes, `ValueError` for other shapes, no images, and `beta` or `weight` that is not
    positive.

    Source: Chen et al. 2025 (arXiv 2410.09347), and the authors' code for negatives that are none.
    """
    for name, ratio in (("log_ratio", log_ratio), ("negative_log_ratio", negative_log_ratio)):
        if not ratio.dtype.is_floating_point:
            raise TypeError(f"{name}: expected floating point, got {ratio.dtype}")
    if as_positive.dtype != torch.bool:
        raise TypeError(f"as_positive: expected bool, got {as_positive.dtype}")
    if log_ratio.dim() != 1 or not len(log_ratio):
        raise ValueError(f"log_ratio: expected (R,) with one image or more, got {tuple(log_ratio.shape)}")
    for name, other in (("negative_log_ratio", negative_log_ratio), ("as_positive", as_positive)):
        if other.shape != log_ratio.shape:
            raise ValueError(f"{name}: expected {tuple(log_ratio.shape)}, as log_ratio, got {tuple(other.shape)}")
    CCAConfig(beta, weight)
    positive = -F.logsigmoid(beta * log_ratio)
    negative = torch.where(
        as_positive, -F.logsigmoid(beta * negative_log_ratio), -weight * F.logsigmoid(-beta * negative_log_ratio)
    )
    loss = (positive + negative).mean()
    return loss / max(weight, 1.0) if normalise else loss


def train_cca(
    model: VAR,
    data: TrainingTokens,
    config: CCAConfig,
    loop: LoopConfig,
    folder: str | Path,
    reference: VAR | None = None,
    held_out: TrainingTokens | None = None,
    negatives: Tensor | None = None,
    compiled: bool = False,
    quiet: bool = False,
    table_bytes: int = TABLE_BYTES,
) -> VAR:
    """Fine-tune all weights of `model` on `data` by `cca_loss`, in place, and return it in evaluation mode.

    The negative label of an image is that of the next one in the batch, as published; with `negatives` (N, N) it is
    drawn from the row of its class, whose numbers are chances but for a factor: see `confusion`. `reference` (default:
    the model as it comes) is left alone; its scores are kept in a table of at most `table_bytes`, to be used again in
    later epochs. With a `config.null_rate` of 0 the loss is not normalised, as in the authors' code; unlike there, a
    neighbour of the same class is no negative then either. With `held_out`, top-1 `accuracy` there, found at the start
    and every `loop.evaluate_every` steps, decides which weights are kept and when to stop early.

    `folder` is as for `varlik.training.loop.train`, whose figures are joined by `log_ratio` and `negative_log_ratio`
    (means, in nats), `decided` (share of negatives less likely than the image's own class) and `nats_per_token`.
    To resume, call again with the weights that the run started from. As weights change in place, engines made of
    `model` before, a `VARClassifier`'s among them, are void afterwards and say so: make new ones. `compiled` runs the
    passes that are differentiated through `torch.compile` (steps about 1.1 x faster on a CPU).

    Raises `TypeError` or `ValueError`, naming the argument, for a model that is none, data of another number of classes
    or another codebook, classes without an image, batches of one class only, `negatives` that are no chances of other
    classes, a reference of another shape, and held-out images that are never looked at; and as `train`.
    """
    _check(model, data, loop, reference, held_out, negatives)
    if reference is None or reference is model:
        reference = copy.deepcopy(model)
    steps = min(loop.stop or loop.steps, loop.steps)
    scores = Reference(reference, data, steps > len(data) // loop.batch_size, table_bytes)
    settings: dict[str, Any] = {
        "cca": asdict(config),
        "model": digest(model),
        "reference": digest(reference),
        **fingerprints(data, held_out),
    }
    if negatives is not None:
        settings["negatives"] = negatives = negatives.detach().cpu()
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    loss_of_part = _loss_of_part(model, data, config, loop, scores, negatives, compiled=compiled)
    validate = None if held_out is None else lambda _: _shared_accuracy(model, held_out)
    model.train().requires_grad_(True)
    try:
        train(
            model, loss_of_part, loop, folder, len(data), validate=validate, settings=settings, quiet=quiet,
            validate_start=True,
        )  # fmt: skip
    finally:
        model.zero_grad(set_to_none=True)
        for parameter, flag in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(flag)
        model.eval()
    return model


def accuracy(model: VAR, data: TrainingTokens) -> float:
    """Share of the plain images whose own class has the highest likelihood under `model` as it is now.

    Of more than 40 classes, the ten of an image that first-order estimates put in front are scored in full, as scoring
    all of them would take longer than training.
    """
    return _count_right(model, data, torch.arange(len(data))) / len(data)


def _count_right(model: VAR, data: TrainingTokens, rows: Tensor) -> int:
    """How many of the images `rows` (b,) are classified as they are labelled."""
    engine, right = Engine(model), 0
    classes = torch.arange(model.config.num_classes, device=model.pos_start.device)
    for part in rows.split(SHARD):
        images, candidates = data.token_maps(part), classes.expand(len(part), -1)
        if len(classes) > MOST_IN_FULL:
            estimates = first_order_log_likelihood(engine, images, classes, classes)
            candidates = estimates.topk(FINALISTS, dim=1).indices
        best = score_table(engine, images, candidates).sum(2).argmax(1, keepdim=True)
        right += int((candidates.gather(1, best)[:, 0].cpu() == data.labels[part]).sum())
    return right


def _shared_accuracy(model: VAR, data: TrainingTokens) -> float:
    """`accuracy`, of which every process finds a part: all must call it."""
    world = distributed.world()
    own = torch.arange(len(data))[world.rank :: world.size]  # none where there are more processes than images
    right = torch.tensor(_count_right(model, data, own) if len(own) else 0)
    distributed.sum_(right)
    return right.item() / len(data)


def confusion(model: VAR, data: TrainingTokens, temperature: float = 5.0, least: float = 0.1) -> Tensor:
    """How likely each class is mistaken for each other one, (N, N) float64: rows sum to 1, zeros on the diagonal.

    Row y is the mean posterior of the other classes, log-likelihoods being divided by `temperature`, over the plain
    images of class y. A share `least` of the chances is spread evenly, so that every class is met. `train_cca` draws
    negatives by it: labels of other images are mostly far from an image's own, and telling those apart teaches little.

    Raises `TypeError` or `ValueError`, naming the argument, for values out of range, a model that is none or knows a
    single class, data that are not for it and classes without images.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    if not 0 <= least <= 1:
        raise ValueError(f"least: expected a share between 0 and 1, got {least}")
    check_model(model)
    check_fits("data", model.config, data, model.pos_start.device)
    count = model.config.num_classes
    if count < 2:
        raise ValueError(f"model: expected two classes or more, got {count}")
    check_every_class(data)
    total = torch.zeros(count, count, dtype=torch.float64)
    engine, classes = Engine(model), torch.arange(count, device=model.pos_start.device)
    for rows in torch.arange(len(data)).split(SHARD):
        scores = score_table(engine, data.token_maps(rows), classes).sum(2).cpu()
        total.index_add_(0, data.labels[rows], (scores.double() / temperature).softmax(1))
    total.fill_diagonal_(0.0)
    sums = total.sum(1, keepdim=True)
    even = (1 - torch.eye(count, dtype=torch.float64)) / (count - 1)
    # Where no class is ever mistaken for another, even chances are as good as any.
    chances = torch.where(sums > 0, total / sums, even)
    return (1 - least) * chances + least * even


def _loss_of_part(
    model: VAR,
    data: TrainingTokens,
    config: CCAConfig,
    loop: LoopConfig,
    reference: Reference,
    chances: Tensor | None,
    *,
    compiled: bool,
) -> Callable[[Part], tuple[Tensor, Metrics]]:
    null, device = model.config.null_class, model.pos_start.device

    score = score_of(model, compiled)

    def loss_of_part(part: Part) -> tuple[Tensor, Metrics]:
        labels, random = data.labels[part.rows], generator(loop.seed, part.step)
        dropped = torch.rand(len(labels), generator=random) < config.null_rate
        others = labels.roll(-1) if chances is None else torch.multinomial(chances[labels], 1, generator=random)[:, 0]
        pairs = torch.stack((labels, others), dim=1).masked_fill(dropped.unsqueeze(1), null)
        contrasted = pairs[:, 0] != pairs[:, 1]
        own, negatives = pairs[part.own], contrasted[part.own]
        variant = data.variant(part.rows, loop.seed, part.step)[part.own]
        images = data.token_maps(part.indices, variant)
        before = reference(images, part.indices, variant, own).to(device)

        tokens, inputs = images.tokens.repeat(2, 1), images.teacher_forcing_input.repeat(2, 1, 1)
        after = score(own.T.flatten().to(device), tokens, inputs).view(2, -1).T  # positives, then negatives
        ratio = after - before.double()
        loss = cca_loss(
            ratio[:, 0], ratio[:, 1], ~negatives.to(device), config.beta, config.weight, config.null_rate > 0
        )

        found, ratio = after.detach().cpu(), ratio.detach().cpu()
        # Parts differ in negatives, but the loop takes the mean over parts: hence the whole batch's count.
        share = len(labels) / (len(own) * max(1, int(contrasted.sum())))
        return loss, {
            "log_ratio": ratio[:, 0].mean().item(),
            "negative_log_ratio": ratio[negatives, 1].sum().item() * share,
            "decided": int((found[:, 0] > found[:, 1])[negatives].sum()) * share,
            "nats_per_token": -found[:, 0].mean().item() / model.config.num_tokens,
        }

    return loss_of_part


def _check(
    model: VAR,
    data: TrainingTokens,
    loop: LoopConfig,
    reference: VAR | None,
    held_out: TrainingTokens | None,
    negatives: Tensor | None,
) -> None:
    check_model(model)
    config, device = model.config, model.pos_start.device
    check_fits("data", config, data, device)
    if config.num_classes < 2:
        raise ValueError(f"model: expected two classes or more, got {config.num_classes}")
    check_batch(loop, len(data))
    if held_out is not None:
        check_fits("held_out", config, held_out, device)
        check_looked_at(loop)
    if reference is not None:
        check_model(reference, "reference")
        names = [f.name for f in fields(config) if getattr(reference.config, f.name) != getattr(config, f.name)]
        if names:
            told = ", ".join(f"{n} {getattr(config, n)}, got {getattr(reference.config, n)}" for n in names)
            raise ValueError(f"reference: expected the model's {told}")
        if reference.pos_start.device != device:
            raise ValueError(f"reference: expected it on {device}, as the model, got {reference.pos_start.device}")
    check_every_class(data)
    if negatives is not None:
        _check_negatives(negatives, data.num_classes)
        return
    for step in range(min(loop.stop or loop.steps, loop.steps)):
        labels = data.labels[batch_indices(loop, step, len(data))]
        if (labels == labels[0]).all():
            raise ValueError(
                f"loop: expected batches of two classes or more, as negatives are labels of others, got only class "
                f"{labels[0].item()} at step {step}: take a larger batch_size or another seed"
            )


def _check_negatives(negatives: Tensor, count: int) -> None:
    if not isinstance(negatives, Tensor) or not negatives.dtype.is_floating_point:
        kind = negatives.dtype if isinstance(negatives, Tensor) else type(negatives).__name__
        raise TypeError(f"negatives: expected a floating-point tensor, got {kind}")
    if negatives.shape != (count, count):
        raise ValueError(f"negatives: expected ({count}, {count}), got {tuple(negatives.shape)}")
    if not (negatives.isfinite().all() and (negatives >= 0).all() and (negatives.sum(1) > 0).all()):
        raise ValueError("negatives: expected chances, finite and not negative, some above zero in each row")
    if negatives.diagonal().any():
        raise ValueError("negatives: expected zeros on the diagonal, for a class is no negative of its own")
