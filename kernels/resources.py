"""What the shipped kernels take on each architecture, found by compiling them; needs no GPU.

    python -m varlik.kernels.resources                            # everything: some ten minutes of two cores
    python -m varlik.kernels.resources --arch 80,90 --dtype float16 --kernel attention
    python -m varlik.kernels.resources --usual                    # the shapes of var-d16 and of the bundled models

A line for each compiled kernel, then a roofline estimate of var-d16 under a hundred classes, predicted from data sheets
and not measured. Ends with status 1 and a line for each breach when a kernel spills registers, wants more shared memory
than the architecture has, does a product of 16-bit floats without tensor cores, or does not load 16 bytes at a time on
a hot path. `--amd` compiles for gfx942 instead, and asks only that it compiles.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

if __name__ == "__main__" and importlib.util.find_spec("triton") is None:
    sys.exit("varlik.kernels.resources: triton is not installed, and nothing can be compiled without it")

from varlik.kernels import _catalogue, _compile, _launch
from varlik.kernels._compile import Compilation, Usage
from varlik.kernels._tiles import LDS_BYTES, SHARED_MEMORY, Limits
from varlik.kernels.scale_causal_attention import key_ends

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
AMD = "gfx942"
# Kernels that a pass spends its time in: their loads are to be as wide as they can be.
HOT = (
    "ada_layer_norm.forward",
    "linear.linear",
    "qk_norm.forward",
    "scale_causal_attention.attention",
    "token_log_prob.split",
)


@dataclass(frozen=True)
class Entry:
    """One compiled kernel: the first problem that launches it, and what it takes, or why it does not compile."""

    problem: str
    dtype: str
    compilation: Compilation
    usage: Usage | str


def collect(
    architectures: list[int | str], dtypes: list[str], kernel: str = "", usual: bool = False
) -> list[tuple[str, str, Compilation]]:
    """Problem, dtype and compilation of everything that is launched, each compilation once."""
    found: dict[Compilation, tuple[str, str]] = {}
    models = _catalogue.USUAL if usual else (*_catalogue.USUAL, *_catalogue.OTHERS)
    for architecture in architectures:
        amd = not isinstance(architecture, int)
        limits = Limits(0, LDS_BYTES) if amd else Limits.of_architecture(architecture)
        for name in dtypes:
            for model in models:
                for problem, launch in _catalogue.recorded(model, DTYPES[name], limits):
                    compilation = Compilation.of_launch(launch, architecture)
                    if kernel in compilation.name:
                        found.setdefault(compilation, (problem, name))
    return [(problem, name, compilation) for compilation, (problem, name) in found.items()]


def examine(wanted: list[tuple[str, str, Compilation]], workers: int = 2) -> Iterator[Entry]:
    """Compile all of them, several at a time."""
    compilations = [compilation for *_, compilation in wanted]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        usages = pool.map(_compile.usage, compilations, chunksize=4)
        for (problem, dtype, compilation), usage in zip(wanted, usages, strict=True):
            yield Entry(problem, dtype, compilation, usage)


def breaches(entry: Entry) -> list[str]:
    """What is over budget, in words."""
    usage, compilation = entry.usage, entry.compilation
    if isinstance(usage, str):
        return [f"does not compile: {usage}"]
    found = []
    if not isinstance(compilation.architecture, int):
        return found
    if usage.stack or usage.local or usage.local_memory:
        found.append(f"spills {usage.stack + usage.local} bytes of registers")
    limit = SHARED_MEMORY[compilation.architecture]
    if usage.shared > limit:
        found.append(f"wants {usage.shared} bytes of shared memory, of {limit}")
    if usage.tensor_memory > _compile.TENSOR_MEMORY:
        found.append(f"wants {usage.tensor_memory} columns of tensor memory, of {_compile.TENSOR_MEMORY}")
    if usage.half_dot and not usage.tensor_core:
        found.append("does a product of 16-bit floats without tensor cores")
    if compilation.name in HOT and not usage.wide_loads:
        found.append("has no load of 16 bytes")
    return found


def line_of(entry: Entry) -> str:
    """One row of the table."""
    c, usage = entry.compilation, entry.usage
    target = f"sm_{c.architecture}" if isinstance(c.architecture, int) else c.architecture
    sizes = "x".join(str(size) for size in (c.tiles.m, c.tiles.n, c.tiles.k) if size)
    tiles = f"{sizes} w{c.tiles.warps} s{c.tiles.stages}"
    head = f"{c.name:40s} {entry.dtype:9s} {target:7s} {tiles:18s}"
    if isinstance(usage, str):
        return f"{head} {usage}"
    if not isinstance(c.architecture, int):
        return f"{head} compiles; {usage.shared} bytes of shared memory"
    programs, bound = _compile.occupancy(c.architecture, usage, c.tiles.warps)
    memory = f"{usage.shared:6d} of {SHARED_MEMORY[c.architecture]}"
    counts = f"{usage.tensor_core:4d} {usage.wide_loads:4d} {usage.local_memory:4d}"
    return f"{head} {usage.registers:4d} {usage.stack + usage.local:5d} {memory:16s} {programs:3d} ({bound}) {counts}"


@dataclass(frozen=True)
class Roofline:
    """One kernel at a stated size: bytes that have to move, FLOPs that have to be done."""

    name: str
    gigabytes: float
    tflop: float
    half: bool


@dataclass(frozen=True)
class Device:
    """Data-sheet peaks: dense TFLOP/s of 16-bit tensor cores and of float32, GB/s of memory."""

    name: str
    half_tflops: float
    float_tflops: float
    gigabytes_per_second: float


# NVIDIA A100 80GB SXM and H100 SXM data sheets.
DEVICES = (Device("A100 SXM", 312.0, 19.5, 2039.0), Device("H100 SXM", 989.4, 67.0, 3350.0))


def rooflines() -> Iterator[Roofline]:
    """One block, the head and the code search of var-d16 in float16: 100 classes, scales 7 to 10 after 1 to 6."""
    rows, model = 100, _catalogue.VAR_D16
    tokens, length, width = _catalogue.TOKENS, _catalogue.LENGTH, model.width
    numbers = rows * tokens * width
    pairs = sum(key_ends(_catalogue.BOUNDARIES, tokens))
    yield Roofline("residual_ada_layer_norm", numbers * 12 / 1e9, 0.0, True)
    yield Roofline("qk_norm", numbers * 12 / 1e9, 0.0, True)
    keys = 2 * rows * length * width
    yield Roofline("scale_causal_attention", 2 * (2 * numbers + keys) / 1e9, 4 * rows * width * pairs / 1e12, True)
    for name, outputs, inputs in (("qkv", 3, 1), ("proj", 1, 1), ("fc1", 4, 1), ("fc2", 1, 4)):
        moved = 2 * (numbers * (outputs + inputs) + outputs * inputs * width**2)
        yield Roofline(f"linear {name}", moved / 1e9, 2 * numbers * outputs * inputs * width / 1e12, True)
    moved = 2 * (numbers + model.codes * width)
    yield Roofline("token_log_prob", moved / 1e9, 2 * numbers * model.codes / 1e12, True)
    vectors = 64 * length
    moved = 4 * model.code_dim * (vectors + model.codes)
    yield Roofline("nearest_code, 64 images", moved / 1e9, 2 * vectors * model.codes * model.code_dim / 1e12, False)


def predicted() -> list[str]:
    """The roofline table, in lines."""
    lines = [
        "Predicted from data sheets, not measured: one block, the head and the code search of var-d16, 100 classes,",
        f"T = {_catalogue.TOKENS} new of L = {_catalogue.LENGTH} tokens, float16 (code search: float32).",
        f"{'':26s} {'GB':>8s} {'TFLOP':>8s} {'FLOP/B':>8s}"
        + "".join(f"  {device.name:>12s} ms, bound by" for device in DEVICES),
    ]
    for item in rooflines():
        row = f"{item.name:26s} {item.gigabytes:8.3f} {item.tflop:8.3f} {1000 * item.tflop / item.gigabytes:8.1f}"
        for device in DEVICES:
            memory = item.gigabytes / device.gigabytes_per_second
            compute = item.tflop / (device.half_tflops if item.half else device.float_tflops)
            bound = "memory" if memory > compute else "compute"
            row += f"  {1000 * max(memory, compute):12.3f}   {bound:8s}"
        lines.append(row)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="varlik.kernels.resources", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default=",".join(map(str, SHARED_MEMORY)), help="such as 80,90")
    parser.add_argument("--dtype", default=",".join(DTYPES), help="such as float16,float32")
    parser.add_argument("--kernel", default="", help="only kernels with this in their name")
    parser.add_argument("--usual", action="store_true", help="only the shapes of var-d16 and of the bundled models")
    parser.add_argument("--amd", action="store_true", help=f"compile for {AMD}, and ask no more")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    options = parser.parse_args()
    if _launch.interpreted():
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    try:
        architectures: list[int | str] = [AMD] if options.amd else [int(a) for a in options.arch.split(",")]
    except ValueError:
        parser.error(f"--arch: expected numbers such as 80,90, got {options.arch}")
    if unknown := [a for a in architectures if a != AMD and a not in SHARED_MEMORY]:
        parser.error(f"--arch: expected some of {', '.join(map(str, SHARED_MEMORY))}, got {unknown[0]}")
    dtypes = options.dtype.split(",")
    if unknown := [name for name in dtypes if name not in DTYPES]:
        parser.error(f"--dtype: expected some of {', '.join(DTYPES)}, got {unknown[0]}")
    wanted = collect(architectures, dtypes, options.kernel, options.usual)
    if not wanted:
        parser.error(f"--kernel: no kernel has {options.kernel!r} in its name")
    print(
        f"{'kernel':40s} {'dtype':9s} {'target':7s} {'tiles':18s} {'regs':>4s} {'spill':>5s} {'shared memory':16s} "
        "programs (bound), instructions: tensor cores, wide loads, local memory"
    )
    entries, broken = [], []
    for entry in examine(wanted):
        print(line_of(entry), flush=True)
        entries.append(entry)
        broken += [f"{line_of(entry)[:77]} [{entry.problem}] {breach}" for breach in breaches(entry)]
    print(f"{len(entries)} kernels compiled")
    if not options.amd:
        print("\n" + "\n".join(predicted()))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(entry) for entry in entries], indent=1) + "\n")
    print("\n".join(["", *broken]) if broken else "no budget is broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
