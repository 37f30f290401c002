"""Speed, arithmetic and memory of the engine beside the naive ways, on this machine and in one run.

Ways to do the same work, all on the same model and token maps:

- "naive, one class at a time": `varlik.reference`, image by image; a cascade's stages each start from scratch.
- "naive, batched": all classes of an image as rows of one forward pass, with full logits, log-softmax and gather.
- "engine": what `VARClassifier.classify` does.

All scores are compared with the reference before anything is timed. Times are medians over repeats in which the ways
take turns, so that a slow moment of the machine hits all alike; so does a large matrix product in the engine's dtype,
whose rate is the peak of this machine at that moment. FLOPs are those that torch counts in a real run.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from varlik import reference
from varlik.evaluation.machine import Machine, machine, physical_memory, status
from varlik.evaluation.profile import OpTime, profile
from varlik.evaluation.ways import BATCHED, ENGINE, NAIVE, VARIANTS, Bench, Scores, Work, prepare
from varlik.flops import count_live

# Largest relative difference from the reference that is no error, by the dtype of the engine's matrix products.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}
PEAK_SIZE = 2048


@dataclass(frozen=True)
class Row:
    """One way to do the work.

    `seconds` for all images, the median; `times_faster` than the naive way, one class at a time; `tokens` and `flops`
    per image; `gflops` reached per second and `share` of the machine's peak, the median over repeats; `peak_bytes`
    beyond the weights, in a process of its own, or None where that is not known; `difference`, the largest relative one
    from the reference.
    """

    name: str
    seconds: float
    times_faster: float
    tokens: float
    flops: float
    gflops: float
    share: float
    peak_bytes: int | None
    difference: float


@dataclass(frozen=True)
class Report:
    """Rows of one run, and what is needed to read them.

    `profile`: where the engine's time goes, op by op, from two more runs; `dtype` of its matrix products; `peak_gflops`
    per second of a matrix product in that dtype, the median; `tables_seconds` to build the tables of all classes, once
    per model, which is in no row.
    """

    work: Work
    machine: Machine
    repeats: int
    rows: tuple[Row, ...]
    profile: tuple[OpTime, ...]
    dtype: str
    peak_gflops: float
    tables_seconds: float
    notes: tuple[str, ...]


def run(work: Work, repeats: int = 5, memory: bool = True) -> Report:
    """Check every way against the reference, then measure all of them.

    With `memory` each way is run once more in a process of its own for its peak memory (Linux, on the CPU). Raises
    `ValueError` for work that the model cannot do, for `repeats` below 1, and for scores that differ from the
    reference by more than 1e-5 relative (float16: 5e-3, bfloat16: 5e-2).
    """
    if repeats < 1:
        raise ValueError(f"repeats: expected 1 or more, got {repeats}")
    bench = prepare(work)
    ways, notes = _ways(bench)
    tables_seconds = _seconds(bench, lambda: bench.classifier.engine.prepare(bench.labels))
    scores: dict[str, Scores] = {}
    flops = {}
    for name in ways:  # the run that is checked also warms up and is counted
        flops[name] = count_live(partial(lambda way: scores.update({way: VARIANTS[way](bench)}), name))
    differences = check(bench, scores)

    times: dict[str, list[float]] = {name: [] for name in ways}
    peaks = []
    for _ in range(repeats):
        for name in ways:
            times[name].append(_seconds(bench, partial(VARIANTS[name], bench)))
        peaks.append(_peak_gflops(bench))
    seconds = {name: statistics.median(values) for name, values in times.items()}
    scale = len(bench.labels) / len(bench.naive_labels)
    seconds[NAIVE], work_done = seconds[NAIVE] * scale, flops | {NAIVE: flops[NAIVE] * scale}

    memory_of: dict[str, int | None] = dict.fromkeys(ways)
    if memory and _can_tell_memory(bench):
        for name in ways:
            memory_of[name], complaint = _peak_in_own_process(name, work)
            notes += [complaint] if complaint else []
    rows = []
    for name in ways:
        gflops = work_done[name] / seconds[name] / 1e9
        slowdown = scale if name == NAIVE else 1
        shares = [work_done[name] / (slowdown * t) / 1e9 / p for t, p in zip(times[name], peaks, strict=True)]
        rows.append(
            Row(
                name=name,
                seconds=seconds[name],
                times_faster=seconds[NAIVE] / seconds[name],
                tokens=scores[name].tokens * (scale if name == NAIVE else 1),
                flops=work_done[name] / len(bench.images),
                gflops=gflops,
                share=statistics.median(shares),
                peak_bytes=memory_of[name],
                difference=differences[name],
            )
        )
    return Report(
        work=work,
        machine=machine(bench.classifier.device),
        repeats=repeats,
        rows=tuple(rows),
        profile=tuple(profile(partial(VARIANTS[ENGINE], bench))),
        dtype=str(bench.classifier.engine.compute.dtype).removeprefix("torch."),
        peak_gflops=statistics.median(peaks),
        tables_seconds=tables_seconds,
        notes=tuple(notes),
    )


def check(bench: Bench, scores: dict[str, Scores]) -> dict[str, float]:
    """Largest relative difference of each way from the reference; `ValueError` for one above what its dtype allows.

    Classes that the reference was spared are compared with the batched naive way, once that has been found right. In
    half precision stages may keep other classes than the reference: what both scored is compared.
    """
    dtype = bench.classifier.engine.compute.dtype
    differences: dict[str, float] = {}
    for name, found in scores.items():
        expected = [NAIVE]
        if name == ENGINE and BATCHED in scores and len(bench.naive_labels) < len(bench.labels):
            expected.append(BATCHED)
        tolerance = TOLERANCE[dtype if name == ENGINE else torch.float32]
        lenient = tolerance > TOLERANCE[torch.float32]
        differences[name] = max(_difference(bench, found, scores[other], lenient) for other in expected)
        if not differences[name] <= tolerance:
            raise ValueError(
                f"benchmark: scores of {name!r} differ from the reference by {differences[name]:.1e} relative, "
                f"more than {tolerance:.0e}: no figures"
            )
    return differences


def _ways(bench: Bench) -> tuple[list[str], list[str]]:
    """Which ways are measured, and notes on those that are not measured in full."""
    ways, notes = list(VARIANTS), []
    classes, spared = len(bench.labels), len(bench.naive_labels) < len(bench.labels)
    if not bench.plain:
        ways.remove(BATCHED)
    elif (needed := _batched_bytes(bench)) > _memory(bench) / 2:
        ways.remove(BATCHED)
        notes.append(f"{BATCHED}: left out, it would need about {needed / 1e9:.0f} GB")
    if spared:
        rest = "with the batched naive way" if BATCHED in ways else "with nothing"
        notes.append(
            f"{NAIVE}: timed and counted on {len(bench.naive_labels)} of {classes} classes and scaled linearly; "
            f"scores of the others are compared {rest}"
        )
    return ways, notes


def _memory(bench: Bench) -> float:
    """Bytes that the device has, or has free."""
    device = bench.classifier.device
    return physical_memory() if device.type == "cpu" else float(torch.cuda.mem_get_info(device)[0])


def _batched_bytes(bench: Bench) -> int:
    """Logits and their log-softmax, and the MLP's activations, of one image."""
    config = bench.classifier.var.config
    tokens = len(bench.labels) * config.boundaries[bench.stages[0][0]]
    return 4 * tokens * (2 * config.vocab_size + 10 * config.embed_dim)


def _difference(bench: Bench, found: Scores, expected: Scores, lenient: bool = False) -> float:
    """Largest relative difference over the classes that `expected` scored.

    Infinite where `found` lacks one, unless `lenient`, and where the two have none in common.
    """

    def table(labels: Tensor, scores: Tensor) -> Tensor:
        empty = torch.full((len(labels), bench.classifier.null_class + 1), torch.nan, device=labels.device)
        return empty.scatter_(1, labels, scores.to(empty))

    worst = 0.0
    for ours, theirs in zip(found.stages, expected.stages, strict=True):
        wanted = table(*theirs)
        given = table(*ours)
        there = ~(wanted.isnan() | given.isnan()) if lenient else ~wanted.isnan()
        if not there.any():
            return float("inf")
        gaps = ((given - wanted) / wanted).abs()[there]
        worst = max(worst, gaps.nan_to_num(nan=torch.inf).max().item())
    return worst


def _seconds(bench: Bench, work: Callable[[], object]) -> float:
    on_gpu = bench.classifier.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _peak_gflops(bench: Bench) -> float:
    """GFLOP/s of a large matrix product in the engine's dtype, the best of three."""
    dtype = bench.classifier.engine.compute.dtype
    device = bench.classifier.device
    size = PEAK_SIZE if device.type == "cpu" else 4 * PEAK_SIZE  # milliseconds, beside which a launch is nothing
    a, b = (torch.rand(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    best = min(_seconds(bench, lambda: torch.mm(a, b, out=out)) for _ in range(3))
    return 2 * size**3 / best / 1e9


def _can_tell_memory(bench: Bench) -> bool:
    return sys.platform == "linux" and bench.classifier.device.type == "cpu"


def _peak_in_own_process(name: str, work: Work) -> tuple[int | None, str]:
    """Peak memory in bytes of one way in a fresh process, and a note if there is none."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    code = "import sys; from varlik.evaluation import benchmark; benchmark.print_peak(*sys.argv[1:])"
    command = [sys.executable, "-c", code, name, json.dumps(asdict(work)), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return None, f"{name}: no memory figure, the process ended with code {done.returncode} {last}".strip()
    peak = json.loads(done.stdout)
    return peak, "" if peak is not None else f"{name}: no memory figure, the system does not tell"


def print_peak(name: str, work: str, threads: str) -> None:
    """Print the memory that one way takes at most beyond the loaded model, in bytes; what a fresh process runs.

    `work` is a `Work` in JSON. The engine's class tables and pages count.
    """
    torch.set_num_threads(int(threads))
    bench = prepare(Work(**json.loads(work)))
    # Touches all weights, which may be mapped from a file, and starts what torch starts late.
    images = bench.images[:1]
    label = bench.labels[:1].tolist()
    reference.log_likelihood(bench.classifier.var, images.tokens, images.teacher_forcing_input, label, 2)
    with suppress(OSError, AttributeError):  # give back what loading has freed (glibc)
        ctypes.CDLL(None).malloc_trim(0)
    try:
        # ru_maxrss would not do: it includes what the parent held before exec, and the peak of loading.
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        VARIANTS[name](bench)
        print(json.dumps(max(0, status("VmHWM") - before)))
    except OSError:
        print(json.dumps(None))
