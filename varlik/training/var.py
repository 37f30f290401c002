"""Train the VAR transformer: cross-entropy of every token given coarser token maps and class, then class contrast."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varlik.models.config import VARConfig
from varlik.models.var import VAR
from varlik.models.vqvae import VQVAE
from varlik.models.weights import digest
from varlik.training import distributed
from varlik.training.data import TrainingTokens, check_every_class, check_fits, check_model, fingerprints
from varlik.training.likelihood import mean_log_likelihood, score_of
from varlik.training.loop import LoopConfig, Part, batch_indices, check_looked_at, generator, train
from varlik.training.metrics import Metrics

CLASS_DROPOUT = 0.1
CONFUSION_RATE = 0.05  # how fast the record of mistaken classes forgets
MIN_CONFUSION = 0.18  # least sum over all wrong classes, so that each is met now and then


@torch.no_grad()
def feature_maps(vqvae: VQVAE, pixels: Tensor, batch_size: int = 500) -> Tensor:
    """(n, Cvae, h, w) of `pixels` (n, channels, S, S) in [-1, 1], in batches; where the pixels are."""
    device = vqvae.quantize.embedding.weight.device
    return torch.cat([vqvae.encode(batch.to(device)).to(pixels.device) for batch in pixels.split(batch_size)])


def drop_labels(labels: Tensor, part: Part, seed: int, null_class: int) -> Tensor:
    """`labels` of a part's own rows, a tenth of the whole batch's made the null class."""
    dropped = torch.rand(len(part.rows), generator=generator(seed, part.step)) < CLASS_DROPOUT
    return labels.masked_fill(dropped[part.own].to(labels.device), null_class)


def train_var(
    data: TrainingTokens,
    config: VARConfig,
    loop: LoopConfig,
    folder: str | Path,
    compiled: bool = False,
    quiet: bool = False,
    held_out: TrainingTokens | None = None,
) -> VAR:
    """Train a new model on `data`, on the device of its quantizer, and return it.

    A tenth of the labels becomes the null class. `compiled` runs the step through `torch.compile` (about 1.3 x faster
    on a CPU). With `held_out`, the mean log-likelihood of its images under their own classes, found every
    `loop.evaluate_every` steps, decides which weights are kept and when to stop early. `folder`: see `loop.train`.

    Raises `TypeError` or `ValueError`, naming the argument, for data of other token maps or another number of classes
    than `config`, classes without an image and held-out images that are never looked at; and as `loop.train`.
    """
    device = data.quantizer.embedding.weight.device
    check_fits("data", config, data, device)
    check_every_class(data)
    if held_out is not None:
        check_fits("held_out", config, held_out, device)
        check_looked_at(loop)
    torch.manual_seed(loop.seed)
    model = VAR(config)
    model.reset_parameters()
    model.to(device)

    score = score_of(model, compiled)

    def loss_of_part(part: Part) -> tuple[Tensor, Metrics]:
        variant = data.variant(part.rows, loop.seed, part.step)
        tokens, inputs, labels = data.batch(part.indices, variant[part.own])
        labels = drop_labels(labels, part, loop.seed, config.null_class)
        return -score(labels, tokens, inputs).mean() / config.num_tokens, {}

    validate = None if held_out is None else lambda _: mean_log_likelihood(score_of(model), held_out)
    settings = asdict(config) | fingerprints(data, held_out)
    return train(model, loss_of_part, loop, folder, len(data), validate=validate, settings=settings, quiet=quiet).eval()


def contrast_var(
    model: VAR,
    data: TrainingTokens,
    loop: LoopConfig,
    folder: str | Path,
    weight: float = 0.3,
    temperature: float = 5.0,
    compiled: bool = False,
    quiet: bool = False,
) -> VAR:
    """Go on training with a term that tells classes apart, and return the model.

    To the cross-entropy, `weight` times softplus(-(log p(x | y) - log p(x | y')) / temperature) is added: the loss of
    deciding between the true class y and one wrong class y'. Wrong classes are drawn as often as they have lately been
    mistaken for the true one. The null class, a tenth of the labels, takes no part in this. A hybrid of generative and
    discriminative training in the sense of Lasserre, Bishop and Minka (2006); likelihoods stay normalised.

    Raises `TypeError` or `ValueError`, naming the argument, for a model that is none or knows a single class, data of
    other token maps or another number of classes, `weight` and `temperature` that are not positive; as `loop.train`.
    """
    check_model(model)
    config = model.config
    for name, value in (("weight", weight), ("temperature", temperature)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    if config.num_classes < 2:
        raise ValueError(f"model: expected two classes or more, got {config.num_classes}")
    check_fits("data", config, data, model.pos_start.device)
    settings: dict[str, Any] = {"model": digest(model)}
    model.train()
    # The draws are made on the CPU, so what they depend on stays there.
    model.register_buffer("confusion", 0.5 * (1 - torch.eye(config.num_classes)))
    mistaken = torch.zeros(loop.batch_size)  # of this step, how likely each wrong class was to be chosen

    score = score_of(model, compiled)

    def draw(rows: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """True class, wrong class and whether the label is dropped, of a whole batch."""
        random, truth = generator(loop.seed, step), data.labels[rows]
        chances = model.confusion[truth].clamp(min=MIN_CONFUSION / max(1, config.num_classes - 1))
        chances = chances.scatter(1, truth.unsqueeze(1), 0.0)
        wrong = torch.multinomial(chances, 1, generator=random).squeeze(1)
        return truth, wrong, torch.rand(len(rows), generator=random) < CLASS_DROPOUT

    def loss_of_part(part: Part) -> tuple[Tensor, Metrics]:
        truth, wrong, dropped = draw(part.rows, part.step)
        kept = ~dropped[part.own]
        variant = data.variant(part.rows, loop.seed, part.step)
        tokens, inputs, labels = data.batch(part.indices, variant[part.own])
        targets = torch.cat((truth.masked_fill(dropped, config.null_class)[part.own], wrong[part.own]))
        scores = score(targets.to(labels.device), tokens.repeat(2, 1), inputs.repeat(2, 1, 1))
        right, other = scores.chunk(2)
        margin = ((right - other) / temperature)[kept.to(labels.device)]
        # Parts keep unequal numbers of labels; over all parts these means are those of the whole batch.
        share = len(part.rows) / (len(kept) * max(1, (~dropped).sum().item()))
        contrast = F.softplus(-margin).sum() * share
        mistaken[part.own] = mistaken.new_zeros(len(kept)).masked_scatter(
            kept, (-margin).detach().sigmoid().to(mistaken)
        )
        loss = -right.mean() / config.num_tokens
        metrics = {"nats_per_token": loss.item(), "contrast": contrast.item()}
        return loss + weight * contrast, metrics | {"decided": (margin > 0).sum().item() * share}

    def record_mistakes(step: int) -> Metrics:
        rows = batch_indices(loop, step, len(data))
        truth, wrong, dropped = draw(rows, step)
        distributed.sum_(mistaken)
        cells = (truth[~dropped], wrong[~dropped])
        model.confusion.index_put_(cells, model.confusion[cells].lerp(mistaken[~dropped], CONFUSION_RATE))
        mistaken.zero_()
        return {}

    settings |= {"weight": weight, "temperature": temperature, "data": data.fingerprint()}
    try:
        train(model, loss_of_part, loop, folder, len(data), record_mistakes, settings=settings, quiet=quiet)
    finally:
        # A run that is refused leaves the model as it came: with the record it would be another start.
        del model.confusion
        model.eval()
    return model
