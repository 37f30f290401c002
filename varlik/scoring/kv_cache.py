"""Scale-paged keys and values.

A page holds the keys and values of one row at one scale, in every layer. Pages are runs of slots in one arena per
layer; a page's number is its first slot, so dropping, forking and sharing rows edits numbers and copies nothing.
Pages are counted, because rows may share them, and a page that nobody holds is given out again.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

NO_PAGE = -1


class PagedCache:
    """Arenas of keys and values, (slots, H, D) for each layer, that grow as pages are asked for.

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
        shape = (0, num_heads, head_dim)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self._holders: dict[int, int] = {}
        self._scale_of: dict[int, int] = {}
        self._free: dict[int, list[int]] = defaultdict(list)
        self._used_slots = 0  # high-water mark: slots below it belong to some page, held or free

    @property
    def capacity(self) -> int:
        """Slots that the arenas hold now."""
        return len(self.keys[0])

    @property
    def pages_held(self) -> int:
        """Pages that somebody holds."""
        return len(self._holders)

    def room(self, scales: range) -> int:
        """How many rows could still get a page at each of `scales`."""
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
        return torch.tensor(pages, dtype=torch.int64, device=self.keys[0].device)

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
        for arenas in (self.keys, self.values):
            for layer, old in enumerate(arenas):
                arena = torch.full((capacity, *old.shape[1:]), torch.nan, dtype=old.dtype, device=old.device)
                arena[: len(old)] = old
                arenas[layer] = arena
