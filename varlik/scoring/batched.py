"""Token log-probs of many (image, class) rows: plain batches through the transformer.

Rows are independent, so they are scored in chunks whose widest activation stays within a budget.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varlik.models.var import VAR
from varlik.tokens import TokenMaps

ACTIVATION_BUDGET = {"cpu": 8 * 2**20, "cuda": 2**30}  # bytes: what a CPU's caches hold, what keeps a GPU busy


@torch.inference_mode()
def token_log_prob(var: VAR, images: TokenMaps, labels: Tensor, num_scales: int | None = None) -> Tensor:
    """log p(token | coarser token maps, class) for B images under N classes each.

    `labels` is (B, N), int64: row b holds the classes to score image b under. Returns (B, N, L_k) float32, where L_k
    counts the tokens of the first `num_scales` scales (default: all). Natural logarithm.
    Raises `ValueError` for a number of scales the model lacks and for labels of another shape or range.
    """
    config = var.config
    num_scales = config.num_scales if num_scales is None else num_scales
    if not 1 <= num_scales <= config.num_scales:
        raise ValueError(f"scales: expected 1 to {config.num_scales}, got {num_scales}")
    if labels.dim() != 2 or len(labels) != len(images):
        raise ValueError(f"labels: expected ({len(images)}, N), got {tuple(labels.shape)}")
    length = config.boundaries[num_scales]
    device = images.tokens.device
    classes, row_class = torch.unique(labels.to(device), return_inverse=True)
    vectors = var.class_vectors(classes)
    row_class = row_class.flatten()
    row_image = torch.arange(len(images), device=device).repeat_interleave(labels.shape[1])
    out = torch.full((labels.numel(), length), torch.nan, device=device)
    widest = 4 * length * max(config.vocab_size, 4 * config.embed_dim)
    chunk = max(1, ACTIVATION_BUDGET.get(device.type, ACTIVATION_BUDGET["cpu"]) // widest)
    for first in range(0, len(out), chunk):
        rows = slice(first, first + chunk)
        image = row_image[rows]
        logits = var(vectors[row_class[rows]], images.teacher_forcing_input[image], num_scales)
        target = logits.gather(-1, images.tokens[image, :length].unsqueeze(-1)).squeeze(-1)
        out[rows] = target - logits.logsumexp(-1)
    return out.view(*labels.shape, length)
