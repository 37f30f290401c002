"""Everything that depends on the class alone, computed once per model and class.

The class vectors of every block and of the head, the whole stream of position 0 (it attends to nothing but itself) as
its keys and values in every block, and log p(first token | class). After this, scoring needs neither the AdaLN weights
nor position 0, and scale 1 costs a look-up.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from varlik import ops
from varlik.models.var import VAR
from varlik.scoring.packed_weights import PackedWeights, run_blocks

CHUNK = 256  # classes built or read at a time: bounds the memory that takes


@dataclass(frozen=True)
class Conditions:
    """What classes bring into the rows of an image, a row for each class, or for each point between classes.

    `vectors` (N, 6 depth + 2, C) as `ClassTables` holds them, `pages` (N, 2 depth, C): key and value of position 0 in
    block i at 2 i and 2 i + 1, heads side by side.
    """

    vectors: Tensor
    pages: Tensor

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, rows: slice) -> Conditions:
        return Conditions(self.vectors[rows], self.pages[rows])

    @staticmethod
    def concatenate(parts: Sequence[Conditions]) -> Conditions:
        """The rows of all `parts`, one after another."""
        return Conditions(torch.cat([part.vectors for part in parts]), torch.cat([part.pages for part in parts]))


class ClassTables:
    """Tables of the classes asked for so far; rows are in the order of asking.

    - `vectors` (N, 6 depth + 2, C): the class vectors, those of block i from 6 i on, and those of the head last.
    - `pages[i]` (N, 2, H, D): key and value of position 0 in block i.
    - `first_log_prob` (N, V): log p(r_1 | class), float32.
    - `seconds`: time spent building so far.
    """

    def __init__(self, var: VAR, weights: PackedWeights):
        self._var, self._weights = var, weights
        config, like = weights.config, weights.positions
        self._row = torch.full((config.num_classes + 1,), -1, device=like.device)
        shapes = [(6 * config.depth + 2, config.embed_dim), *[(2, config.num_heads, config.head_dim)] * config.depth]
        vectors, *pages = (like.new_empty(0, *shape) for shape in shapes)
        pages = [page.to(weights.compute.dtype) for page in pages]
        self._tables = [vectors, torch.empty(0, config.vocab_size, dtype=torch.float32, device=like.device), *pages]
        # One class at a time where its vectors must not depend on which others came with it.
        self._chunk = 1 if weights.compute.deterministic else CHUNK
        self._point: tuple[tuple[int, ...], Conditions] | None = None
        self.seconds = 0.0

    @property
    def vectors(self) -> Tensor:
        return self._tables[0]

    @property
    def first_log_prob(self) -> Tensor:
        return self._tables[1]

    @property
    def pages(self) -> list[Tensor]:
        return self._tables[2:]

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def num_bytes(self) -> int:
        """Memory the tables take."""
        return sum(table.numel() * table.element_size() for table in self._tables)

    def rows(self, labels: Tensor) -> Tensor:
        """Table rows of `labels` (...). Raises `ValueError` for classes that are not in the tables."""
        self._check(labels)
        rows = self._row[labels]
        if (rows < 0).any():
            absent = sorted(set(labels[rows < 0].flatten().tolist()))
            raise ValueError(f"labels: classes {absent[:8]} are not in the tables; prepare them first")
        return rows

    def conditions(self, rows: Tensor) -> Conditions:
        """What the classes in `rows` (n,) of the tables bring in; pages in the precision of the vectors."""
        pages = torch.stack([page[rows].flatten(2) for page in self.pages], dim=1).flatten(1, 2)
        return Conditions(self.vectors[rows], pages.to(self.vectors.dtype))

    def mean(self, rows: Tensor, weights: Tensor) -> Conditions:
        """Means of the classes in `rows` (n,), weighted by `weights` (M, n), each row of which sums to 1."""
        vectors = self.vectors.new_zeros(len(weights), *self.vectors.shape[1:])
        pages = vectors.new_zeros(len(weights), 2 * len(self.pages), vectors.shape[-1])
        for chunk, part in zip(rows.split(CHUNK), weights.to(vectors).split(CHUNK, dim=1), strict=True):
            classes = self.conditions(chunk)
            vectors += torch.einsum("mn,nvc->mvc", part, classes.vectors)
            pages += torch.einsum("mn,nvc->mvc", part, classes.pages)
        return Conditions(vectors, pages)

    def point(self, labels: Tensor) -> Conditions:
        """The mean of classes `labels` (n,), one row; kept for the next call, which mostly asks for the same."""
        key = tuple(labels.tolist())
        if self._point is None or self._point[0] != key:
            even = torch.full((1, len(labels)), 1 / len(labels), device=labels.device)
            self._point = key, self.mean(self.rows(labels), even)
        return self._point[1]

    @torch.no_grad()
    def extend(self, labels: Tensor) -> None:
        """Add those of `labels` (n,) that are missing. Raises `ValueError` for labels that the model lacks."""
        self._check(labels)
        missing = labels[self._row[labels] < 0].unique()
        first, started = len(self), time.perf_counter()
        if len(missing):
            # Filled chunk by chunk, and taken into use when all of it is there.
            grown = [_grown(table, first + len(missing)) for table in self._tables]
            for start in range(0, len(missing), self._chunk):
                chunk = missing[start : start + self._chunk]
                for table, rows in zip(grown, self._build(chunk), strict=True):
                    table[first + start : first + start + len(chunk)] = rows
            self._tables = grown
            self._row[missing] = torch.arange(first, len(self), device=missing.device)
        self.seconds += time.perf_counter() - started

    def _check(self, labels: Tensor) -> None:
        last = len(self._row) - 1
        low, high = (int(labels.min()), int(labels.max())) if labels.numel() else (0, 0)
        if low < 0 or high > last:
            raise ValueError(f"labels: expected classes from 0 to {last}, got {low} to {high}")

    def _build(self, labels: Tensor) -> tuple[Tensor, ...]:
        """Rows of all tables for `labels` (n,)."""
        weights, config = self._weights, self._weights.config
        made = self._var.class_vectors(labels)
        vectors = torch.cat((made.blocks.flatten(1, 2), made.head), dim=1)
        pages = []

        def attend(i: int, qkv: Tensor) -> Tensor:
            page = qkv.new_full((len(labels), 2, config.num_heads, config.head_dim), torch.nan)
            ops.qk_norm(qkv, weights.blocks[i].q_scale, page[:, 0], page[:, 1], None, impl=weights.compute.impl)
            pages.append(page)
            return page[:, 1].flatten(1).unsqueeze(1)  # one key: attention returns its value

        x = (made.start + weights.start + weights.positions[0]).unsqueeze(1)  # (n, 1, C)
        _, u = run_blocks(weights, x, vectors, None, attend)
        head, bias = weights.head
        # In the model's precision: this is done once, and logits of half precision would be rounded.
        logits = F.linear(u[:, 0].to(vectors.dtype), head.to(vectors.dtype), bias.to(vectors.dtype))
        return vectors, logits.float().log_softmax(-1), *pages


def _grown(table: Tensor, rows: int) -> Tensor:
    grown = table.new_empty(rows, *table.shape[1:])
    grown[: len(table)] = table
    return grown
