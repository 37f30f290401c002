"""Recorded launches compiled for an architecture that need not be here, and what the compiled code takes.

A launch is compiled as Triton's JIT would compile it: types, integers that are 1 and multiples of 16 are read from its
arguments, but for those a kernel does not specialise on. Registers and spills come from `cuobjdump`, instructions from
`nvdisasm`; both come with triton.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from varlik.kernels._launch import Launch
from varlik.kernels._tiles import Tiles

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}
_ALIGNED = (("tt.divisibility", 16),)
# An instruction of a listing: its offset, a predicate or none, its name.
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
_TENSOR_CORE = re.compile(r"HMMA|HGMMA|UTC\w*MMA")
_HALF_DOT = re.compile(r"tt\.dot .*: tensor<\d+x\d+x(?:f16|bf16)>")


@dataclass(frozen=True)
class Compilation:
    """What one compilation depends on: equal ones give the same code. It can be sent to another process."""

    module: str
    function: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[int, Any], ...]
    aligned: tuple[int, ...]
    tiles: Tiles
    architecture: int | str

    @classmethod
    def of_launch(cls, launch: Launch, architecture: int | str) -> Compilation:
        """`architecture` is 80 for sm_80, or the name of an AMD one."""
        function = launch.kernel.fn
        signature, constants, aligned = {}, {}, []
        for i, parameter in enumerate(launch.kernel.params):
            name = parameter.name
            value = launch.constants[name] if parameter.is_constexpr else launch.arguments[name]
            is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or is_one:
                signature[name], constants[i] = "constexpr", value
                continue
            signature[name] = _type_of(value)
            if _is_aligned(value) and not parameter.do_not_specialize:
                aligned.append(i)
        return cls(
            function.__module__,
            function.__name__,
            tuple(signature.items()),
            tuple(constants.items()),
            tuple(aligned),
            launch.tiles,
            architecture,
        )

    @property
    def name(self) -> str:
        """File and kernel, such as "linear.linear"."""
        return f"{self.module.rpartition('.')[2]}.{self.function.strip('_').removesuffix('_kernel')}"

    def compile(self) -> Any:
        """What `triton.compile` gives."""
        kernel = getattr(importlib.import_module(self.module), self.function)
        constants = {(i,): value for i, value in self.constants}
        attributes = {(i,): [list(pair) for pair in _ALIGNED] for i in self.aligned}
        source = ASTSource(kernel, dict(self.signature), constants, attributes)
        cuda = isinstance(self.architecture, int)
        target = GPUTarget("cuda", self.architecture, 32) if cuda else GPUTarget("hip", self.architecture, 64)
        options = {"num_warps": self.tiles.warps, "num_stages": self.tiles.stages, "enable_fp_fusion": True}
        return triton.compile(source, target=target, options=options)


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _is_aligned(value: Any) -> bool:
    """Whether it is a multiple of 16: a tensor of the meta device has its offset for an address."""
    if isinstance(value, Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


@dataclass(frozen=True)
class Usage:
    """What compiled code takes.

    `registers` of a thread; `stack` and `local` bytes of a thread, which hold spilled registers; `shared` bytes and
    `tensor_memory` columns of a program. Then instructions in the listing: on tensor cores, loads of 16 bytes or more a
    thread, loads and stores of local memory. `half_dot`: whether its source has a product of 16-bit floats.
    """

    registers: int
    stack: int
    local: int
    shared: int
    tensor_memory: int
    tensor_core: int
    wide_loads: int
    local_memory: int
    half_dot: bool


def usage(compilation: Compilation) -> Usage | str:
    """What the compiled code takes, or why it does not compile."""
    try:
        compiled = compilation.compile()
    except Exception as error:  # whatever the compiler raises is the finding
        return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
    shared, columns = compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", None) or 0
    half_dot = _HALF_DOT.search(compiled.asm["ttir"]) is not None
    if "cubin" not in compiled.asm:
        return Usage(0, 0, 0, shared, columns, 0, 0, 0, half_dot)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(compiled.asm["cubin"])
        registers, stack, local = map(int, _RESOURCES.search(_output_of("cuobjdump", "-res-usage", file)).groups())
        listing = Counter(_INSTRUCTION.findall(_output_of("nvdisasm", "-c", file)))
    return Usage(
        registers,
        stack,
        local,
        shared,
        columns,
        tensor_core=sum(n for name, n in listing.items() if _TENSOR_CORE.match(name)),
        wide_loads=sum(n for name, n in listing.items() if _is_wide_load(name)),
        local_memory=sum(n for name, n in listing.items() if name.startswith(("LDL", "STL"))),
        half_dot=half_dot,
    )


def _is_wide_load(name: str) -> bool:
    operation, *modifiers = name.split(".")
    return operation in ("LDG", "LDGSTS") and not {"128", "256"}.isdisjoint(modifiers)


def _output_of(tool: str, *arguments: Any) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Multiprocessor:
    """What the programs on one multiprocessor share: warps, resident programs, bytes of shared memory."""

    warps: int
    programs: int
    shared: int


# CUDA C++ Programming Guide, table of technical specifications by compute capability.
MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 164 << 10),
    86: Multiprocessor(48, 16, 100 << 10),
    89: Multiprocessor(48, 24, 100 << 10),
    90: Multiprocessor(64, 32, 228 << 10),
    100: Multiprocessor(64, 32, 228 << 10),
}
REGISTERS = 65_536  # of a multiprocessor, a quarter for each of its four schedulers
REGISTER_UNIT = 256  # a warp gets registers in such units
RESERVED_SHARED = 1024  # bytes that the system takes for each program
TENSOR_MEMORY = 512  # columns, from sm_100 on


def occupancy(architecture: int, usage: Usage, warps: int) -> tuple[int, str]:
    """How many programs a multiprocessor holds at once at most, and what bounds them."""
    limit = MULTIPROCESSORS[architecture]
    of_warp = max(1, -(-32 * usage.registers // REGISTER_UNIT)) * REGISTER_UNIT
    bounds = {
        "warps": limit.warps // warps,
        "programs": limit.programs,
        "registers": 4 * (REGISTERS // 4 // of_warp) // warps,
        "shared memory": limit.shared // (usage.shared + RESERVED_SHARED),
    }
    if usage.tensor_memory:
        bounds["tensor memory"] = TENSOR_MEMORY // usage.tensor_memory
    name = min(bounds, key=bounds.__getitem__)
    return bounds[name], name
