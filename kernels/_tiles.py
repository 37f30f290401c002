"""What tiles are made of, and what bounds them: values that every kernel file computes its block sizes with."""

from __future__ import annotations

from dataclasses import dataclass

# The largest dynamic shared memory of a program, in bytes: CUDA C++ Programming Guide, table of technical
# specifications by compute capability (163, 99, 99, 227 and 227 KiB).
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448}
# What any other device is taken for.
SMALLEST = 86
# Local data share of AMD's CDNA 3, in bytes.
LDS_BYTES = 65_536


@dataclass(frozen=True)
class Limits:
    """What bounds a tile on one device.

    `architecture` is the compute capability, 90 for sm_90, 0 for AMD; `shared_memory` is in bytes for one program,
    `registers` counts those of 32 bits on one multiprocessor.
    """

    architecture: int
    shared_memory: int
    registers: int = 65_536

    @classmethod
    def of_architecture(cls, architecture: int) -> Limits:
        return cls(architecture, SHARED_MEMORY.get(architecture, SHARED_MEMORY[SMALLEST]))


@dataclass(frozen=True)
class Tiles:
    """Block sizes of a kernel, and how many warps and pipeline stages it runs with; sizes it lacks are 0."""

    m: int
    n: int = 0
    k: int = 0
    warps: int = 4
    stages: int = 1
