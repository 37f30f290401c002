"""Train the VAR transformer: cross-entropy of every token given coarser token maps and class, then class contrast."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from varlik.models.config import VARConfig
from varlik.models.quantizer import MultiScaleQuantizer
from varlik.models.var import VAR
from varlik.models.vqvae import VQVAE
from varlik.training.loop import LoopConfig, Metrics, batch_indices, generator, train

CLASS_DROPOUT = 0.1
CONFUSION_RATE = 0.05  # how fast the record of mistaken classes forgets
MIN_CONFUSION = 0.02  # so that every wrong class is met now and then


@torch.no_grad()
def feature_maps(vqvae: VQVAE, pixels: Tensor, batch_size: int = 500) -> Tensor:
    """(n, Cvae, h, w) of `pixels` (n, channels, S, S) in [-1, 1], in batches."""
    return torch.cat([vqvae.encode(batch) for batch in pixels.split(batch_size)])


def train_var(
    features: Tensor,
    labels: Tensor,
    quantizer: MultiScaleQuantizer,
    config: VARConfig,
    loop: LoopConfig,
    folder: str | Path,
    compiled: bool = False,
    quiet: bool = False,
) -> VAR:
    """Train on the token maps of `features` (n, Cvae, h, w) with `labels` (n,) and return the model.

    A tenth of the labels becomes the null class. `compiled` runs the step through `torch.compile` (about 1.4 x faster
    on a CPU).
    """
    torch.manual_seed(loop.seed)
    model = VAR(config)
    model.reset_parameters()

    def cross_entropy(targets: Tensor, tokens: Tensor, inputs: Tensor) -> Tensor:
        logits = model(model.class_vectors(targets), inputs)
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    run = torch.compile(cross_entropy) if compiled else cross_entropy

    def loss_of_step(step: int) -> tuple[Tensor, Metrics]:
        rows = batch_indices(loop, step, len(labels))
        with torch.no_grad():
            tokens, inputs = quantizer.tokenize(features[rows])
        dropped = torch.rand(len(rows), generator=generator(loop.seed, step)) < CLASS_DROPOUT
        return run(labels[rows].masked_fill(dropped, config.null_class), tokens, inputs), {}

    return train(model, loss_of_step, loop, folder, quiet=quiet).eval()


def contrast_var(
    model: VAR,
    features: Tensor,
    labels: Tensor,
    quantizer: MultiScaleQuantizer,
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
    """
    config = model.config
    model.train()
    model.register_buffer("confusion", 0.5 * (1 - torch.eye(config.num_classes)))

    def losses(targets: Tensor, tokens: Tensor, inputs: Tensor) -> Tensor:
        logits = model(model.class_vectors(targets), inputs)
        return F.cross_entropy(logits.mT, tokens, reduction="none")

    run = torch.compile(losses) if compiled else losses

    def loss_of_step(step: int) -> tuple[Tensor, Metrics]:
        rows, random = batch_indices(loop, step, len(labels)), generator(loop.seed, step)
        with torch.no_grad():
            tokens, inputs = quantizer.tokenize(features[rows])
        truth = labels[rows]
        chances = model.confusion[truth].clamp(min=MIN_CONFUSION)
        chances = chances.scatter(1, truth.unsqueeze(1), 0.0)
        wrong = torch.multinomial(chances, 1, generator=random).squeeze(1)
        dropped = torch.rand(len(rows), generator=random) < CLASS_DROPOUT
        targets = torch.cat((truth.masked_fill(dropped, config.null_class), wrong))
        per_token = run(targets, tokens.repeat(2, 1), inputs.repeat(2, 1, 1))
        right, other = per_token.chunk(2)
        margin = ((other.sum(1) - right.sum(1)) / temperature)[~dropped]
        contrast = F.softplus(-margin).mean()
        with torch.no_grad():
            mistaken, cells = (-margin).sigmoid(), (truth[~dropped], wrong[~dropped])
            model.confusion.index_put_(cells, model.confusion[cells].lerp(mistaken, CONFUSION_RATE))
        likelihood = right.mean()
        metrics = {"nats_per_token": likelihood.item(), "contrast": contrast.item()}
        return likelihood + weight * contrast, metrics | {"decided": (margin > 0).float().mean().item()}

    train(model, loss_of_step, loop, folder, quiet=quiet)
    del model.confusion
    return model.eval()
