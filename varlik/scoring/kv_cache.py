"""Scale-paged keys and values.

A page holds the keys and values of one row at one scale, in every layer. Pages are runs of slots in one arena per
layer; a page's number is its first slot, so dropping, forking and sharing rows edits numbers and copies nothing.
Pages are counted, because rows may share them, and a page that nobody holds is given out again.
"""

from __future__ import annotations

from collections import defaultdict
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
        self._free: dict[int, list[int]] = defaultdict(list)
        self._used_slots = 0  # high-water mark: slots below it belong to some page, held or free

    @property
    def capacity(self) -> int:
        """Slots that the arenas hold now."""
        return len(self.arenas[0])

    @property
    def pages_held(self) -> int:
        """Pages that somebody holds."""
        return len(self._holders)

    def room(self, scales: range) -> int:
        """How many rows could still get a page at each of `scales`, of which there is at least one."""
        fresh = max(0, self.max_slots - self._used_slots) // sum(self.page_sizes[k] for k in scales)
        return fresh + min(len(self._free[k]) for k in scales)

    def allocate(self, scale: int, count: int, beyond_limit: bool = False) -> Tensor:
        """First slots (count,) of `count` pages of one scale, each held once.

        Raises `MemoryError` when they would pass `max_slots`, unless they may go `beyond_limit`: pages of classes, and
        those of the chunk at work.
        """
        free = self._free[scale]
        reused = [free.pop() for _ in range(min(count, len(free)))]
        size = self.page_sizes[scale]
        first = self._used_slots
        needed = first + (count - len(reused)) * size
        if needed > max(first, self.max_slots) and not beyond_limit:
            free.extend(reused)
            raise MemoryError(f"{count} pages of scale {scale + 1} need {needed} slots of {self.max_slots}")
        self._grow(needed)
        pages = reused + list(range(first, needed, size))
        self._used_slots = needed
        for page in pages:
            self._holders[page] = 1
            self._scale_of[page] = scale
        return torch.tensor(pages, dtype=torch.int64, device=self.arenas[0].device)

    def share(self, pages: Tensor) -> None:
        """Hold each of `pages` (any shape) once more; `NO_PAGE` entries are passed over."""
        for page in pages.flatten().tolist():
            if page != NO_PAGE:
                self._holders[page] += 1

    def release(self, pages: Tensor) -> None:
        """Hold each of `pages` (any shape) once less; what nobody holds can be given out again."""
        for page in pages.flatten().tolist():
            if page == NO_PAGE:
                continue
            self._holders[page] -= 1
            if self._holders[page] == 0:
                del self._holders[page]
                self._free[self._scale_of.pop(page)].append(page)

    def slots(self, pages: Tensor) -> Tensor:
        """Slots (R, tokens) of pages (R, k): those of the first k scales, token by token."""
        columns = [
            pages[:, k : k + 1] + torch.arange(self.page_sizes[k], device=pages.device) for k in range(pages.shape[1])
        ]
        return torch.cat(columns, dim=1)

    def _grow(self, needed: int) -> None:
        if needed <= self.capacity:
            return
        capacity = max(needed, min(self.max_slots, 2 * self.capacity))
        for layer, old in enumerate(self.arenas):
            arena = old.new_full((capacity, *old.shape[1:]), torch.nan)
            arena[: len(old)] = old
            self.arenas[layer] = arena


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
