"""Train the VQ-VAE: reconstruct images through the multi-scale codes, keep every code in use."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from varlik.models.config import VQVAEConfig
from varlik.models.vqvae import VQVAE
from varlik.training import distributed
from varlik.training.loop import LoopConfig, Part, batch_indices, generator, train
from varlik.training.metrics import Metrics

USE_DECAY = 0.9
DEAD_SHARE = 0.03  # a code is dead when it is used less than this share of an even use
RESTART_EVERY = 50
# Of the finished model's feature maps: gives sigma, the noise of smoothing, one meaning for all models.
FEATURE_STD = 0.5


def train_vqvae(
    pixels: Tensor,
    config: VQVAEConfig,
    loop: LoopConfig,
    folder: str | Path,
    restarts_until: float = 0.8,
    device: str | torch.device | None = None,
    quiet: bool = False,
) -> VQVAE:
    """Train on `pixels` (n, channels, S, S) in [-1, 1] and return the model.

    The loss is the mean squared error of the reconstruction plus the quantisation loss. Codes that are hardly used move
    onto random residuals of the current batch until `restarts_until` of the steps are done; then the codebook settles.
    `device` defaults to `distributed.own_device()`; the pixels may lie elsewhere. Quantisation stays in float32,
    whatever `loop.precision`. `folder`: see `loop.train`, whose errors are raised too.
    """
    torch.manual_seed(loop.seed)
    device = distributed.own_device(device)
    model = VQVAE(config)
    model.register_buffer("code_use", torch.full((config.vocab_size,), 1 / config.vocab_size))
    model.to(device)
    counts = torch.zeros(config.vocab_size, dtype=torch.int64, device=device)  # how often this step used each code

    def loss_of_part(part: Part) -> tuple[Tensor, Metrics]:
        batch = pixels[part.indices].to(device)
        feature_map = model.encode(batch)
        with torch.autocast(device.type, enabled=False):
            quantised, quantisation, tokens = model.quantize.straight_through(feature_map.float())
        error = F.mse_loss(model.decode(quantised), batch)
        counts.add_(torch.bincount(tokens.flatten(), minlength=config.vocab_size))
        return error + quantisation, {"mse": error.item(), "quantisation": quantisation.item()}

    def look_after_codes(step: int) -> Metrics:
        distributed.sum_(counts)
        use = model.code_use.lerp_(counts / counts.sum(), 1 - USE_DECAY)
        counts.zero_()
        perplexity = torch.exp(-(use * (use + 1e-12).log()).sum()).item()
        return {"perplexity": perplexity} | restart_dead_codes(step)

    def restart_dead_codes(step: int) -> Metrics:
        if step % RESTART_EVERY or step > restarts_until * loop.steps:
            return {}
        # The first step puts every code on data: random ones would lie far from the features.
        threshold = DEAD_SHARE / config.vocab_size if step else float("inf")
        dead = (model.code_use < threshold).nonzero().flatten()
        if len(dead):
            with torch.no_grad():
                # From the whole batch, so that every process decides alike.
                cells = residual_cells(model, pixels[batch_indices(loop, step, len(pixels))].to(device))
                chosen = torch.randint(len(cells), (len(dead),), generator=generator(loop.seed, step))
                model.quantize.embedding.weight[dead] = cells[chosen.to(device)]
                model.code_use[dead] = 1 / config.vocab_size
        return {"restarted": float(len(dead))}

    settings = asdict(config) | {"restarts_until": restarts_until}
    train(model, loss_of_part, loop, folder, len(pixels), look_after_codes, settings=settings, quiet=quiet)
    del model.code_use
    rescale_features(model, pixels[:1000].to(device))
    return model.eval()


@torch.no_grad()
def rescale_features(model: VQVAE, pixels: Tensor, std: float = FEATURE_STD) -> None:
    """Give feature maps of `pixels` the standard deviation `std`; tokens and reconstructions stay what they were."""
    factor = std / model.encode(pixels).std()
    scaled = [*model.quant_conv.parameters(), model.quantize.embedding.weight]
    for parameter in (*scaled, *(phi.bias for phi in model.quantize.quant_resi.qresi_ls)):
        parameter.mul_(factor)
    model.post_quant_conv.weight.div_(factor)


@torch.no_grad()
def residual_cells(model: VQVAE, pixels: Tensor) -> Tensor:
    """What the nearest-code search sees, over all scales: (n, Cvae)."""
    quantizer = model.quantize
    feature_map = model.encode(pixels)
    tokens, _ = quantizer.tokenize(feature_map)
    cells = []
    for k, side in enumerate(quantizer.patch_nums):
        rest = feature_map - quantizer.feature_map(tokens, k)
        cells.append(F.interpolate(rest, size=(side, side), mode="area").permute(0, 2, 3, 1).flatten(0, 2))
    return torch.cat(cells)
