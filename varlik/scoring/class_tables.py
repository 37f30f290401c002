"""Everything that depends on the class alone, computed once per model and class.

The class vectors of every block and of the head, the whole stream of position 0 (it attends to nothing but itself) as
its keys and values in every block, and log p(first token | class). After this, scoring needs neither the AdaLN weights
nor position 0, and scale 1 costs a look-up.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from varlik import ops
from varlik.models.var import VAR
from varlik.scoring.packed_weights import PackedWeights, mlp

CHUNK = 256  # classes built at a time: bounds the memory that building takes


class ClassTables:
    """Tables of the classes asked for so far; rows are in the order of asking.

    - `blocks[i][j]` (N, C): vector j of block i, in the order of `ClassVectors.blocks`; `head[j]` (N, C) likewise.
    - `keys[i]`, `values[i]` (N, H, D): of position 0 in block i.
    - `first_log_prob` (N, V): log p(r_1 | class), float32.
    - `seconds`: time spent building so far.
    """

    def __init__(self, var: VAR, weights: PackedWeights):
        self._var, self._weights = var, weights
        config = weights.config
        device, dtype = weights.positions.device, weights.positions.dtype
        empty = torch.empty(0, config.embed_dim, device=device, dtype=dtype)
        cells = torch.empty(0, config.num_heads, config.head_dim, device=device, dtype=dtype)
        self._row = torch.full((config.num_classes + 1,), -1, device=device)
        self.blocks = [[empty] * 6 for _ in range(config.depth)]
        self.head = [empty] * 2
        self.keys, self.values = [cells] * config.depth, [cells] * config.depth
        self.first_log_prob = torch.empty(0, config.vocab_size, device=device)
        self.seconds = 0.0

    def __len__(self) -> int:
        return len(self.first_log_prob)

    @property
    def num_bytes(self) -> int:
        """Memory the tables take."""
        tensors = [*(t for block in self.blocks for t in block), *self.head, *self.keys, *self.values]
        return sum(t.numel() * t.element_size() for t in (*tensors, self.first_log_prob))

    def rows(self, labels: Tensor) -> Tensor:
        """Table rows of `labels` (...). Raises `ValueError` for classes that are not in the tables."""
        rows = self._row[labels]
        if (rows < 0).any():
            absent = sorted(set(labels[rows < 0].flatten().tolist()))
            raise ValueError(f"labels: classes {absent[:8]} are not in the tables; prepare them first")
        return rows

    @torch.no_grad()
    def extend(self, labels: Tensor) -> Tensor:
        """Add those of `labels` (n,) that are missing and return the table rows that were added."""
        missing = labels[self._row[labels] < 0].unique()
        before, started = len(self), time.perf_counter()
        for chunk in missing.split(CHUNK) if len(missing) else ():  # an empty tensor splits into one empty chunk
            self._build(chunk)
        self.seconds += time.perf_counter() - started
        return torch.arange(before, len(self), device=missing.device)

    def _build(self, labels: Tensor) -> None:
        weights, config = self._weights, self._weights.config
        vectors = self._var.class_vectors(labels)
        blocks, head = vectors.blocks.permute(1, 2, 0, 3), vectors.head.unbind(1)
        own = torch.arange(len(labels), device=labels.device)
        slots = own.unsqueeze(1)
        x = (vectors.start + weights.start + weights.positions[0]).unsqueeze(1)  # (N, 1, C)
        u = ops.ada_layer_norm(x, blocks[0, 2], blocks[0, 4], own)
        for i, block in enumerate(weights.blocks):
            keys, values = (x.new_full((len(labels), config.num_heads, config.head_dim), torch.nan) for _ in range(2))
            ops.qk_norm(F.linear(u, block.qkv), block.q_bias, block.v_bias, block.log_scale, keys, values, slots)
            # One key: attention returns its value.
            branch = F.linear(values.flatten(1).unsqueeze(1), *block.proj)
            gate, mlp_gate, mlp_scale, mlp_shift = blocks[i, 0], blocks[i, 1], blocks[i, 3], blocks[i, 5]
            x, u = ops.residual_ada_layer_norm(x, branch, gate, mlp_scale, mlp_shift, own)
            branch = mlp(u, block)
            scale, shift = head if i + 1 == config.depth else (blocks[i + 1, 2], blocks[i + 1, 4])
            x, u = ops.residual_ada_layer_norm(x, branch, mlp_gate, scale, shift, own)
            self.blocks[i] = [torch.cat((old, new)) for old, new in zip(self.blocks[i], blocks[i], strict=True)]
            self.keys[i] = torch.cat((self.keys[i], keys))
            self.values[i] = torch.cat((self.values[i], values))
        self.head = [torch.cat((old, new)) for old, new in zip(self.head, head, strict=True)]
        first = F.linear(u[:, 0], *weights.head).float().log_softmax(-1)
        self._row[labels] = torch.arange(len(self), len(self) + len(labels), device=labels.device)
        self.first_log_prob = torch.cat((self.first_log_prob, first))
