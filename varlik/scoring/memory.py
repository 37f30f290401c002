"""How much memory scoring takes: pages, which outlive a chunk of rows, and the chunk at work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from varlik.models.config import VARConfig

SHARE = 0.3  # of the memory that is free, by default
PAGES_SHARE = 0.75  # of the budget; the rest is for a chunk
UNKNOWN = 4 * 2**30  # taken for free where the system does not say

# Activations of a chunk in bytes: what a CPU's caches help with, what keeps a GPU busy. More if it takes more for a
# product to make good use of its weights.
CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 2**30}
CHUNK_TOKENS = 1536


@dataclass(frozen=True)
class Budget:
    """Bytes for `pages` and for the `chunk` at work."""

    pages: int
    chunk: int

    @classmethod
    def of(cls, device: torch.device, max_memory: int | None) -> Budget:
        """`max_memory` bytes (default: a share of what is free), divided."""
        total = int(SHARE * available_bytes(device)) if max_memory is None else max_memory
        pages = int(PAGES_SHARE * total)
        return cls(pages, total - pages)

    def chunk_rows(
        self, config: VARConfig, cached: int, to_scale: int, layers: int, itemsize: int, device: torch.device
    ) -> int:
        """Rows that go through scales `cached` + 1 to `to_scale` at a time, at least one.

        A token takes 2 C numbers of float32 (stream, before and after) and 6 C of `itemsize` bytes (norm, joint
        projection, queries, branch), a key and a value 2 C in each of the `layers` that hold theirs at a time.
        """
        new, seen = config.boundaries[to_scale] - config.boundaries[cached], config.boundaries[to_scale]
        wide = max(4, itemsize)
        row_bytes = (2 * new * wide + (6 * new + 2 * layers * seen) * itemsize) * config.embed_dim
        good = max(CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // row_bytes, -(-CHUNK_TOKENS // new))
        return max(1, min(good, self.chunk // row_bytes))


def available_bytes(device: torch.device) -> int:
    """Memory that is free on `device`, 4 GiB where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return UNKNOWN


def let_malloc_keep_memory() -> None:
    """Spare chunks the page faults of memory that was given back to the system and is asked for again.

    glibc gives back what lies free beyond twice the largest block freed so far, of blocks up to 32 MiB: mallopt(3),
    M_TRIM_THRESHOLD. Freeing one such block, which is never touched, lets it keep 62 MiB. A small model's chunks ran
    1.15 times faster for it. Without effect on other allocators, and where the user has set the threshold.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)
