"""Train the VQ-VAE: reconstruct images through the multi-scale codes, keep every code in use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from varlik.models.config import VQVAEConfig
from varlik.models.vqvae import VQVAE
from varlik.models.weights import tensors_digest
from varlik.tokens import ENCODE_BATCH
from varlik.training import distributed
from varlik.training.loop import LoopConfig, Part, batch_indices, generator, train
from varlik.training.metrics import Metrics
from varlik.training.pixels import Pixels

USE_DECAY = 0.9
DEAD_SHARE = 0.03  # a code is dead when it is used less than this share of an even use
RESTART_EVERY = 50
# Of the finished model's feature maps: gives sigma, the noise of smoothing, one meaning for all models.
FEATURE_STD = 0.5
FEATURE_IMAGES = 1000  # that it is measured on


def train_vqvae(
    pixels: Tensor | Pixels,
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
    whatever `loop.precision`. `folder`: see `loop.train`.

    Raises `TypeError` for pixels that are whole numbers, and as `loop.train`.
    """
    if isinstance(pixels, Tensor) and not pixels.is_floating_point():
        raise TypeError(f"pixels: expected floating-point numbers in [-1, 1], got {pixels.dtype}")
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
        return {"perplexity": perplexity} | restart_dead_codes(step, use)

    def restart_dead_codes(step: int, use: Tensor) -> Metrics:
        if step % RESTART_EVERY or step > restarts_until * loop.steps:
            return {}
        # The first step puts every code on data: random ones would lie far from the features.
        threshold = DEAD_SHARE / config.vocab_size if step else float("inf")
        dead = (use < threshold).nonzero().flatten()
        world = distributed.world()
        if len(dead) and world.main:
            with torch.no_grad():
                # Of the whole batch, whatever the number of processes, in parts as large as those that are trained on.
                rows = batch_indices(loop, step, len(pixels)).split(loop.batch_size // (world.size * loop.accumulate))
                cells = residual_cells(model, (pixels[part].to(device) for part in rows))
                chosen = torch.randint(len(cells), (len(dead),), generator=generator(loop.seed, step))
                model.quantize.embedding.weight[dead] = cells[chosen.to(device)]
                use[dead] = 1 / config.vocab_size
        # From one process to all, so that rounding cannot drive them apart.
        distributed.broadcast_([model.quantize.embedding.weight, use])
        return {"restarted": float(len(dead))}

    settings = asdict(config) | {"restarts_until": restarts_until}
    settings["data"] = pixels.fingerprint() if isinstance(pixels, Pixels) else tensors_digest({"pixels": pixels})
    train(model, loss_of_part, loop, folder, len(pixels), look_after_codes, settings=settings, quiet=quiet)
    del model.code_use
    rescale_features(model, pixels, seed=loop.seed)
    return model.eval()


@torch.no_grad()
def rescale_features(model: VQVAE, pixels: Tensor | Pixels, std: float = FEATURE_STD, seed: int = 0) -> None:
    """Give feature maps the standard deviation `std`; tokens and reconstructions stay what they were.

    It is measured over `FEATURE_IMAGES` of the `pixels` (n, channels, S, S), drawn from `seed` (all where there are no
    more). They may lie on another device.
    """
    device, rows = model.quantize.embedding.weight.device, torch.arange(len(pixels))
    if len(rows) > FEATURE_IMAGES:
        rows = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:FEATURE_IMAGES]
    features = torch.cat([model.encode(pixels[part].to(device)).cpu() for part in rows.split(ENCODE_BATCH)])
    factor = (std / features.std()).to(device)
    distributed.broadcast_([factor])
    scaled = [*model.quant_conv.parameters(), model.quantize.embedding.weight]
    for parameter in (*scaled, *(phi.bias for phi in model.quantize.quant_resi.qresi_ls)):
        parameter.mul_(factor)
    model.post_quant_conv.weight.div_(factor)


@torch.no_grad()
def residual_cells(model: VQVAE, batches: Iterable[Tensor]) -> Tensor:
    """What the nearest-code search sees of images in batches (b, channels, S, S), scale after scale: (n, Cvae)."""
    quantizer = model.quantize
    cells: list[list[Tensor]] = [[] for _ in quantizer.patch_nums]
    for pixels in batches:
        feature_map = model.encode(pixels)
        tokens, _ = quantizer.tokenize(feature_map)
        for k, side in enumerate(quantizer.patch_nums):
            rest = feature_map - quantizer.feature_map(tokens, k)
            cells[k].append(F.interpolate(rest, size=(side, side), mode="area").permute(0, 2, 3, 1).flatten(0, 2))
    return torch.cat([torch.cat(of_scale) for of_scale in cells])
