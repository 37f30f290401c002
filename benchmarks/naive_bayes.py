"""A floor for token classifiers: smoothed counts of every code at every position, independent given the class."""

from __future__ import annotations

import torch
from torch import Tensor


def fit(tokens: Tensor, labels: Tensor, num_classes: int, vocab_size: int, pseudo_count: float = 0.5) -> Tensor:
    """log p(token at a position | class), (num_classes, L, V), from tokens (n, L) with labels (n,)."""
    length = tokens.shape[1]
    counts = torch.full((num_classes, length, vocab_size), pseudo_count, dtype=torch.float64)
    positions = torch.arange(length).expand_as(tokens)
    counts.index_put_(
        (labels.unsqueeze(1).expand_as(tokens), positions, tokens), torch.ones(()).double(), accumulate=True
    )
    return (counts / counts.sum(-1, keepdim=True)).log()


def log_likelihood(log_prob: Tensor, tokens: Tensor) -> Tensor:
    """log p(tokens | class), (n, num_classes), of tokens (n, L) under a fitted table."""
    positions = torch.arange(tokens.shape[1])
    return torch.stack([table[positions, tokens].sum(-1) for table in log_prob], dim=1)
