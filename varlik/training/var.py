"""Train the VAR transformer: cross-entropy of every token given all coarser token maps and the class."""

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
    noise: float = 0.0,
    compiled: bool = False,
    quiet: bool = False,
) -> VAR:
    """Train on the token maps of `features` (n, Cvae, h, w) with `labels` (n,) and return the model.

    Features are quantised afresh at every step after adding Gaussian noise whose standard deviation is drawn, image by
    image, from [0, `noise`]: the tokens then vary as they do between samples of a smoothed likelihood. A tenth of the
    labels becomes the null class. `compiled` runs the step through `torch.compile` (about 1.4 x faster on a CPU).
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
        random = generator(loop.seed, step)
        batch = features[rows]
        if noise:
            scale = noise * torch.rand((len(rows), 1, 1, 1), generator=random)
            batch = batch + scale * torch.randn(batch.shape, generator=random)
        with torch.no_grad():
            tokens, inputs = quantizer.tokenize(batch)
        dropped = torch.rand(len(rows), generator=random) < CLASS_DROPOUT
        return run(labels[rows].masked_fill(dropped, config.null_class), tokens, inputs), {}

    return train(model, loss_of_step, loop, folder, quiet=quiet).eval()
