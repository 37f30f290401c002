"""Scores under the model that fine-tuning starts from: found once, kept in a table."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from varlik.models.var import VAR
from varlik.scoring.engine import NO_ROW, Engine
from varlik.scoring.options import EngineOptions
from varlik.tokens import TokenMaps
from varlik.training.data import TrainingTokens

TABLE_BYTES = 2**30


class Reference:
    """Log-likelihoods under a model that stays as it is, each scored once as far as the table goes.

    The table has `table_bytes` at most, on the CPU: an entry per class for as many (image, variant) pairs as fit; none
    without `revisits`, when no pair is met again. On a CPU it changes no bit of a result: with `revisits`, rows are
    scored one at a time, so that a score does not depend on which others are asked for along with it.
    """

    def __init__(self, model: VAR, data: TrainingTokens, revisits: bool = True, table_bytes: int = TABLE_BYTES):
        if table_bytes < 0:
            raise ValueError(f"table_bytes: expected 0 or more, got {table_bytes}")
        device, dtype = model.pos_start.device, model.pos_start.dtype
        one_by_one = revisits and device.type == "cpu"  # takes twice as long as rows together
        # Float16, which the engine takes on GPUs by default, would blur the ratios.
        self._engine = Engine(model, EngineOptions(dtype=dtype, max_memory=0 if one_by_one else None))
        self._engine.prepare(torch.arange(model.config.num_classes + 1, device=device))
        self._device, self._variants = device, data.variants
        classes = model.config.num_classes + 1
        pairs = min(len(data) * data.variants, table_bytes // (4 * classes)) if revisits else 0
        # Zero stands for "not scored yet". NumPy's zeros, unlike torch's, take no memory before they are written.
        self._table = torch.from_numpy(np.zeros((pairs, classes), np.float32))

    def __call__(self, images: TokenMaps, rows: Tensor, variant: Tensor, labels: Tensor) -> Tensor:
        """log p(image | label), (b, 2) float32 on the CPU, of `labels` (b, 2).

        `images` are the token maps of the data's `rows` (b,) in their `variant` (b,).
        """
        place = (rows * self._variants + variant).unsqueeze(1)
        kept = (place < len(self._table)).expand_as(labels)
        known = torch.zeros(labels.shape, dtype=torch.float32)
        known[kept] = self._table[place.expand_as(labels)[kept], labels[kept]]
        wanted = labels.masked_fill(known != 0, NO_ROW)
        twice = labels[:, 0] == labels[:, 1]
        wanted[twice, 1] = NO_ROW
        if (wanted != NO_ROW).any():
            known[wanted != NO_ROW] = self._score(images, wanted)
            known[twice, 1] = known[twice, 0]
            self._table[place.expand_as(labels)[kept], labels[kept]] = known[kept]
        return known

    def _score(self, images: TokenMaps, labels: Tensor) -> Tensor:
        engine = self._engine
        candidates = engine.open(images, labels.to(self._device))
        try:
            engine.advance(candidates, engine.config.num_scales, retain=0)
            return candidates.total(engine.config.num_scales).cpu()
        finally:
            engine.close(candidates)
