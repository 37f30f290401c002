"""One pass of a chunk of rows through the transformer: pages in, token log-probs and their sums by scale out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from varlik import ops
from varlik.scoring.class_tables import ClassTables
from varlik.scoring.graphs import CUDACapture, Graphs, bucket
from varlik.scoring.kv_cache import ChunkKeys, InPlace, PagedCache, SideBySide
from varlik.scoring.packed_weights import PackedWeights, run_blocks

# Passes over at most so many tokens are launched as CUDA graphs where those are asked for.
GRAPHED_TOKENS = 16_384


class Passes:
    """Passes of one engine.

    `side_by_side`: whether the keys of a chunk lie in one buffer, as a CPU likes them, or in the pages themselves.
    `graphs`: captured passes, None where every pass is launched op by op.
    """

    def __init__(self, weights: PackedWeights, tables: ClassTables, cache: PagedCache):
        self._weights, self._tables, self._cache = weights, tables, cache
        on_cpu = weights.positions.device.type == "cpu"
        self.side_by_side = on_cpu and weights.compute.impl == "torch"
        self.graphs = Graphs(CUDACapture()) if weights.compute.cuda_graphs else None

    def forget(self) -> None:
        """Give up the memory of captured passes."""
        if self.graphs is not None:
            self.graphs.clear()

    def run(
        self,
        tokens: Tensor,
        inputs: Tensor,
        source: Tensor,
        row_class: Tensor,
        pages: Tensor,
        cached: int,
        to_scale: int,
    ) -> tuple[Tensor, Tensor]:
        """Token log-probs (n, T) of scales `cached` + 1 to `to_scale`, and their sums by scale, (n, scales).

        Row r scores the token maps `tokens[source[r]]`, of (M, L), reading `inputs[source[r]]`, of (M, L - 1, Cvae),
        under the class in row `row_class[r]` of the tables. Keys and values are read from and left in `pages` (n, k).
        """
        boundaries = self._weights.config.boundaries
        first, end = boundaries[cached], boundaries[to_scale]
        targets = tokens[source, first:end]
        inputs = inputs[:, first - 1 : end - 1]
        if self.graphs is not None and targets.numel() <= GRAPHED_TOKENS:
            return self._replay(self.graphs, inputs[source], row_class, targets, pages, cached, to_scale)
        # Inputs depend on the image alone: embedded once, however many classes read them.
        sources, own = source.unique(return_inverse=True)
        slots = self._cache.slots(pages)
        keys: ChunkKeys
        if self.side_by_side:
            keys = SideBySide(self._cache, slots[:, :first], slots[:, first:], end)
        else:
            keys = InPlace(self._cache, slots)
        return self._score(inputs[sources], own, keys, row_class, targets, cached, to_scale)

    def _replay(
        self,
        graphs: Graphs,
        inputs: Tensor,
        row_class: Tensor,
        targets: Tensor,
        pages: Tensor,
        cached: int,
        to_scale: int,
    ) -> tuple[Tensor, Tensor]:
        """A pass as captured, with `inputs` (n, T, Cvae) and `targets` (n, T) padded to a number of rows that graphs
        are captured for; rows beyond write to pages of their own.
        """
        count = len(targets)
        missing = bucket(count) - count
        spare = self._cache.allocate(range(cached, to_scale), missing, beyond_limit=True)
        try:
            # Rows beyond the last read what the first reads, for pages that were never written hold NaN.
            padding = torch.cat((pages[:1, :cached].expand(missing, -1), spare), dim=1)
            slots = self._cache.slots(torch.cat((pages, padding)))

            def score(inputs: Tensor, row_class: Tensor, targets: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
                return self._score(inputs, None, InPlace(self._cache, slots), row_class, targets, cached, to_scale)

            padded = [F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing)) for x in (inputs, row_class, targets)]
            places = (self._tables.vectors.data_ptr(), *(arena.data_ptr() for arena in self._cache.arenas))
            log_prob, sums = graphs.run((count + missing, cached, to_scale), places, score, *padded, slots)
        finally:
            self._cache.release(spare)
        return log_prob[:count].clone(), sums[:count].clone()

    def _score(
        self,
        inputs: Tensor,
        own: Tensor | None,
        keys: ChunkKeys,
        row_class: Tensor,
        targets: Tensor,
        cached: int,
        to_scale: int,
    ) -> tuple[Tensor, Tensor]:
        """The pass itself: row r reads `inputs[own[r]]`, of (M, T, Cvae), or the r-th without `own`."""
        weights, compute = self._weights, self._weights.compute
        boundaries = list(weights.config.boundaries[: to_scale + 1])
        first, end = boundaries[cached], boundaries[to_scale]
        stream = ops.linear(inputs, *weights.words, impl=compute.product_impl) + weights.positions[first:end]

        def attend(i: int, qkv: Tensor) -> Tensor:
            where = keys.open(i)
            q = ops.qk_norm(qkv, weights.blocks[i].q_scale, *where, impl=compute.impl)
            keys.close(i)
            out = ops.scale_causal_attention(
                q, *where, boundaries, softmax_scale=weights.softmax_scale, impl=compute.impl
            )
            return out.flatten(2)

        # A copy of each row's class vectors is smaller than its activations, and saves a CPU many small look-ups.
        if self.side_by_side:
            _, u = run_blocks(weights, stream, self._tables.vectors[row_class], None, attend, own)
        else:
            _, u = run_blocks(weights, stream, self._tables.vectors, row_class, attend, own)
        scales = [b - first for b in boundaries[cached:]]
        return ops.scale_log_prob(u, *weights.head, targets, scales, impl=compute.impl)
