"""Scale-paged keys and values.

A page holds the keys and values of one row at one scale, in every layer. Pages are runs of slots in one arena per
layer; a page's number is its first slot, so dropping, forking and sharing rows edits numbers and copies nothing.
Pages are counted, because rows may share them; the slots of those that nobody holds are given out again, at any scale.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

NO_PAGE = -1


class PagedCache:
    """Arenas (slots, 2, H, D) of keys and values, one for each layer, that grow as pages are asked for.

    `page_sizes[k]` is how many slots a page of scale k takes. Fresh slots hold NaN, so that a read of what was never
    written shows. `max_slots` bounds what is held for longer than a chunk.
    """

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        page_sizes: tuple[int, ...],
        max_slots: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.page_sizes = page_sizes
        self.max_slots = max_slots
        shape = (0, 2, num_heads, head_dim)
        self.arenas = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self._holders: dict[int, int] = {}
        self._scale_of: dict[int, int] = {}
        self._gaps: list[tuple[int, int]] = []  # runs (first, end) of slots that no held page covers, in order

    @property
    def capacity(self) -> int:
        """Slots that all arenas hold now."""
        return min(len(arena) for arena in self.arenas)

    @property
    def pages_held(self) -> int:
        """Pages that somebody holds."""
        return len(self._holders)

    @property
    def slots_held(self) -> int:
        """Slots of the pages that somebody holds."""
        return sum(self.page_sizes[scale] for scale in self._scale_of.values())

    def room(self, scales: range) -> int:
        """How many rows could get a page at each of `scales`, of which there is at least one, within `max_slots`."""
        size = sum(self.page_sizes[k] for k in scales)
        ends = [(first, min(end, self.max_slots)) for first, end in self._open_gaps(self.max_slots)]
        return sum(max(0, end - first) // size for first, end in ends)

    def allocate(self, scales: range, count: int, beyond_limit: bool = False) -> Tensor:
        """Pages (count, len(scales)) of so many rows, one of each scale, each held once.

        Raises `MemoryError` when they would pass `max_slots`, unless they may go `beyond_limit`: pages of classes, and
        those of the chunk at work. Nothing is taken if that fails or the arenas cannot grow.
        """
        sizes = [self.page_sizes[k] for k in scales]
        if not count or not sizes:
            return torch.empty(count, len(sizes), dtype=torch.int64, device=self.arenas[0].device)
        if not beyond_limit and self.room(scales) < count:
            raise MemoryError(f"no room for pages of {count} rows at {len(sizes)} scales in {self.max_slots} slots")
        before = self.capacity
        limit = before + count * sum(sizes) if beyond_limit else self.max_slots
        firsts: list[int] = []
        gaps = []
        for first, end in self._open_gaps(limit):
            fitting = max(0, min(end, limit) - first) // sum(sizes)
            taken = min(count - len(firsts), fitting)
            firsts.extend(range(first, first + taken * sum(sizes), sum(sizes)))
            gaps.append((first + taken * sum(sizes), end))
        self._grow(firsts[-1] + sum(sizes))
        if limit > before:  # the last gap reached into slots still to come: it ends where the arenas now do
            gaps[-1] = (gaps[-1][0], self.capacity)
        self._gaps = [(first, end) for first, end in gaps if first < end]
        offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        pages = [[first + offset for offset in offsets] for first in firsts]
        for row in pages:
            for page, scale in zip(row, scales, strict=True):
                self._holders[page] = 1
                self._scale_of[page] = scale
        return torch.tensor(pages, dtype=torch.int64, device=self.arenas[0].device)

    def _open_gaps(self, limit: int) -> list[tuple[int, int]]:
        """Gaps, and the slots that the arenas could still grow by, up to `limit`."""
        gaps = list(self._gaps)
        if limit > self.capacity:
            first = gaps.pop()[0] if gaps and gaps[-1][1] == self.capacity else self.capacity
            gaps.append((first, limit))
        return gaps

    def share(self, pages: Tensor) -> None:
        """Hold each of `pages` (any shape) once more; `NO_PAGE` entries are passed over."""
        for page in pages.flatten().tolist():
            if page != NO_PAGE:
                self._holders[page] += 1

    def release(self, pages: Tensor) -> None:
        """Hold each of `pages` (any shape) once less; what nobody holds can be given out again."""
        freed = []
        for page in pages.flatten().tolist():
            if page == NO_PAGE:
                continue
            self._holders[page] -= 1
            if self._holders[page] == 0:
                del self._holders[page]
                freed.append((page, page + self.page_sizes[self._scale_of.pop(page)]))
        gaps: list[tuple[int, int]] = []
        for first, end in sorted([*self._gaps, *freed]) if freed else ():
            if gaps and gaps[-1][1] == first:
                gaps[-1] = (gaps[-1][0], end)
            else:
                gaps.append((first, end))
        self._gaps = gaps if freed else self._gaps

    def slots(self, pages: Tensor) -> Tensor:
        """Slots (R, tokens) of pages (R, k): those of the first k scales, token by token."""
        columns = [
            pages[:, k : k + 1] + torch.arange(self.page_sizes[k], device=pages.device) for k in range(pages.shape[1])
        ]
        return torch.cat(columns, dim=1)

    def _grow(self, needed: int) -> None:
        """Room for `needed` slots in every arena; those that have grown stay if a later one finds no memory."""
        before = self.capacity
        if needed <= before:
            return
        capacity = max(needed, min(self.max_slots, 2 * before))
        for layer, old in enumerate(self.arenas):
            if len(old) < capacity:
                arena = old.new_full((capacity, *old.shape[1:]), torch.nan)
                arena[: len(old)] = old
                self.arenas[layer] = arena
        # What has come on top is free.
        if self._gaps and self._gaps[-1][1] == before:
            self._gaps[-1] = (self._gaps[-1][0], self.capacity)
        else:
            self._gaps.append((before, self.capacity))


class ChunkKeys(Protocol):
    """Where the rows of a chunk find the keys and values of coarser scales, and leave those of the scales at hand."""

    def open(self, layer: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values (P, H, D) and slots (R, L) of one layer, as the ops take them."""

    def close(self, layer: int) -> None:
        """After the layer has written its keys and values."""


class InPlace:
    """In the arenas themselves: for kernels that follow slots."""

    def __init__(self, cache: PagedCache, slots: Tensor):
        """`slots` (R, L) of all pages, those still to be written included."""
        self._cache, self._slots = cache, slots

    def open(self, layer: int) -> tuple[Tensor, Tensor, Tensor | None]:
        keys, values = self._cache.arenas[layer].unbind(1)
        return keys, values, self._slots

    def close(self, layer: int) -> None:
        pass


class SideBySide:
    """In one buffer that each layer uses anew: for a CPU, which attends to a row's keys in one run.

    Pages are copied in, and of what the layer writes only that which a later stage may read is copied out.
    """

    def __init__(self, cache: PagedCache, cached: Tensor, kept: Tensor, length: int):
        """For rows of `length` tokens: `cached` (R, n) are slots to read, `kept` (R, m) to write those right after."""
        self._cache, self._cached, self._kept = cache, cached, kept.flatten()
        arena, rows = cache.arenas[0], len(cached)
        buffer = arena.new_full((rows, length, *arena.shape[1:]), torch.nan)
        self._keys, self._values = buffer.flatten(0, 1).unbind(1)
        self._in, self._out = buffer.split([cached.shape[1], length - cached.shape[1]], dim=1)
        self._out = self._out[:, : kept.shape[1]]

    def open(self, layer: int) -> tuple[Tensor, Tensor, Tensor | None]:
        self._in.copy_(self._cache.arenas[layer][self._cached])
        return self._keys, self._values, None

    def close(self, layer: int) -> None:
        if len(self._kept):
            self._cache.arenas[layer].index_copy_(0, self._kept, self._out.flatten(0, 1))
