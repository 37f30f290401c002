"""Measure kernels, cascades and precision on a CUDA GPU: one command, under ten minutes.

    python -m benchmarks.gpu                      # writes benchmarks/results/gpu-<device>.json and .md
    python -m benchmarks.gpu --parts kernels      # or cascades, precision

Every result is checked before it is timed: kernels against plain torch in float32, cascades against the naive
reference. Kernels are timed with CUDA events over rotated inputs, so that no run finds its inputs in the L2 cache;
variants take turns, and medians are reported. With `--device cpu --tiny` the same code runs at toy sizes on the torch
path, to see that it works: such times mean nothing, and the file says so.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import varlik
from benchmarks import gpu_kernels
from benchmarks.gpu_kernels import Measured
from varlik.evaluation import benchmark as benchmarks
from varlik.evaluation.machine import machine
from varlik.evaluation.samples import samples
from varlik.evaluation.ways import DTYPES, ENGINE, Work

RESULTS = Path(__file__).parent / "results"
PARTS = ("kernels", "cascades", "precision")
A_VARC_PLUS = "6:10,10:3,10x3:1"
# The naive way is timed on so many classes, or images for a cascade, and one repeat of it takes seconds.
CASCADES = (
    Work(geometry="d16", images=4, classes=100, naive_classes=8),
    Work(geometry="d16", images=4, classes=100, scales=6, naive_classes=8),
    Work(geometry="d16", images=1, classes=100, cascade=A_VARC_PLUS),
    Work(geometry="d16", images=1, classes=1000, scales=6, naive_classes=8),
    Work(geometry="d16", images=1, classes=1000, naive_classes=4),
    Work(geometry="d30", images=1, classes=100, cascade=A_VARC_PLUS),
    Work(geometry="d30", images=1, classes=1000, scales=6, naive_classes=4),
)
TINY = (Work(images=1, classes=3), Work(images=1, classes=4, cascade="3:2,6:1"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=20, help="timings of each kernel")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that the script works")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the two files")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: there is no CUDA GPU here")
    options.out.mkdir(parents=True, exist_ok=True)
    for report in measure(device, options.parts, options.repeats, options.tiny):  # written after every part
        name = report["machine"]["device"].lower().replace(" ", "-")
        path = options.out / f"gpu-{name}{'-tiny' if options.tiny else ''}"
        path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        text = markdown(report)
        path.with_suffix(".md").write_text(text)
    print(text)
    print(f"wrote {path}.json and {path}.md")
    if any(note.startswith("FAILED") for note in report["notes"]):
        raise SystemExit(1)


def measure(device: torch.device, parts: Any, repeats: int, tiny: bool) -> Iterator[dict[str, Any]]:
    """The report as the JSON file has it, after each part that is asked for."""
    started = time.monotonic()
    report: dict[str, Any] = {"machine": asdict(machine(device)), "tiny": tiny, "notes": [], "seconds": 0.0}
    for part in parts:
        if part == "kernels":
            report["kernels"], report["peaks"] = kernels(device, repeats, tiny, report["notes"])
        elif part == "cascades":
            report["cascades"] = cascades(device, tiny, report["notes"])
        else:
            report["precision"] = precision(device)
        report["seconds"] = time.monotonic() - started
        yield report


def kernels(device: torch.device, repeats: int, tiny: bool, notes: list[str]) -> tuple[list[Any], dict[str, float]]:
    """Each kernel beside other ways to do it, and TFLOP/s of a large matrix product, by dtype."""
    rows, peaks = [], {}
    for name in ("float32",) if tiny else DTYPES:
        peaks[name] = gpu_kernels.peak_tflops(device, DTYPES[name], repeats, 256 if tiny else 8192)
        for problem in gpu_kernels.problems(device, DTYPES[name], tiny):
            try:
                measured = list(gpu_kernels.measure(problem, repeats, notes))
            except Exception as error:  # one wrong or failing kernel must not cost the rest of the run
                notes.append(f"FAILED {problem.name}, {name}: {str(error).splitlines()[0]}")
                continue
            for row in measured:
                rows.append(asdict(row) | {"dtype": name, "share_of_peak": share(row, peaks[name])})
                print(f"{row.problem:32s} {row.way:32s} {name:9s} {row.milliseconds:9.4f} ms", flush=True)
    return rows, peaks


def share(row: Measured, peak: float) -> float | None:
    """Of the matrix product's rate."""
    return row.tflops / peak if row.tflops else None


def cascades(device: torch.device, tiny: bool, notes: list[str]) -> list[dict[str, Any]]:
    """Likelihoods and cascades of whole images, engine beside naive ways; what finds no memory is noted."""
    reports = []
    works = TINY if tiny else [replace(work, dtype=name) for work in CASCADES for name in dtypes_of(work)]
    for work in works:
        try:
            report = benchmarks.run(replace(work, device=str(device)), repeats=3, memory=False)
        except Exception as error:  # out of memory, or scores that differ: the rest of the run goes on
            notes.append(f"FAILED {work}: {str(error).splitlines()[0]}")
            continue
        engine = next(row for row in report.rows if row.name == ENGINE)
        reports.append(asdict(report) | {"images_per_second": work.images / engine.seconds})
        print(f"{work}: {1000 * engine.seconds / work.images:.1f} ms per image", flush=True)
    return reports


def dtypes_of(work: Work) -> tuple[str, ...]:
    """Both for d16; of d30, which takes a minute to make, the default only."""
    return ("float16", "float32") if work.geometry == "d16" else ("float16",)


def precision(device: torch.device) -> list[dict[str, Any]]:
    """The bundled model in every dtype beside float32: difference in nats, and images with the same best class."""
    model = "fashion-mnist"
    paths = list(samples(model).paths)
    exact = varlik.load(model, device=device, dtype=torch.float32).log_likelihood(paths)
    rows = []
    for name, dtype in DTYPES.items():
        found = varlik.load(model, device=device, dtype=dtype).log_likelihood(paths)
        gap = (found - exact).abs()
        agreement = (found.argmax(1) == exact.argmax(1)).double().mean().item()
        rows.append({"dtype": name, "mean_nats": gap.mean().item(), "largest_nats": gap.max().item()})
        rows[-1] |= {"top1_agreement": agreement, "images": len(paths)}
    return rows


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    where = report["machine"]
    lines = [f"# {where['device']}, torch {where['torch']}, varlik {where['varlik']}, commit {where['commit']}", ""]
    if report["tiny"]:
        lines += ["Toy sizes, to see that the script works: **these times mean nothing.**", ""]
    if "kernels" in report:
        peaks = ", ".join(f"{name} {peak:.1f}" for name, peak in report["peaks"].items())
        lines += [f"Peak of a large matrix product, TFLOP/s: {peaks}.", ""]
        lines += ["| problem | way | dtype | ms | GB/s | TFLOP/s | of peak |", "|---|---|---|---|---|---|---|"]
        for row in report["kernels"]:
            of_peak = "" if row["share_of_peak"] is None else f"{100 * row['share_of_peak']:.0f} %"
            rate = f"{row['gigabytes_per_second']:.0f} | {row['tflops']:.2f} | {of_peak}"
            lines.append(f"| {row['problem']} | {row['way']} | {row['dtype']} | {row['milliseconds']:.4f} | {rate} |")
        lines.append("")
    if "cascades" in report:
        lines += [
            "| work | dtype | way | ms per image | images/s | faster than naive | of peak |",
            "|---|" + "---|" * 6,
        ]
        for entry in report["cascades"]:
            work, count = entry["work"], entry["work"]["images"]
            what = work["cascade"] or ("all scales" if work["scales"] is None else f"{work['scales']} scales")
            title = f"{work['geometry'] or work['model']}, N = {work['classes']}, {what}"
            for row in entry["rows"]:
                times = (
                    f"{1000 * row['seconds'] / count:.2f} | {count / row['seconds']:.2f} | {row['times_faster']:.2f}"
                )
                dtype = entry["dtype"] if row["name"] == ENGINE else "float32"
                lines.append(f"| {title} | {dtype} | {row['name']} | {times} | {100 * row['share']:.0f} % |")
        lines.append("")
    if "precision" in report:
        lines += ["| dtype | mean difference, nats | largest | same top-1 | images |", "|---|---|---|---|---|"]
        for row in report["precision"]:
            nats = f"{row['mean_nats']:.2g} | {row['largest_nats']:.2g}"
            lines.append(f"| {row['dtype']} | {nats} | {100 * row['top1_agreement']:.1f} % | {row['images']} |")
        lines.append("")
    lines += [*report["notes"], f"{report['seconds']:.0f} s in all."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
