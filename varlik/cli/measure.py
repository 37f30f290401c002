"""Commands that check and measure: this installation, a model's first-order scores, arithmetic, speed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from varlik.cli.shared import (
    AsJson,
    CalibrationFile,
    CascadeText,
    Device,
    Model,
    VQVAEFile,
    cascade_of,
    console,
    print_json,
    progress_bar,
)

if TYPE_CHECKING:
    from varlik.evaluation.profile import OpTime


def doctor(
    images: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="IMAGE...",
            help="Pictures to see on how good first-order scores are; bundled models bring some.",
            show_default=False,
        ),
    ] = None,
    model: Model = "fashion-mnist",
    vqvae: VQVAEFile = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Check this installation and a model: bundled ones against stored results, any against its exact scores.

    Prints versions, devices and usable paths; whether a calibration is there and fits; and how near first-order scores
    come to exact ones, and what they cost, before screening is trusted.
    """
    from dataclasses import asdict

    from varlik.evaluation.doctor import diagnose

    with progress_bar() as progress:
        checks = diagnose(
            model, images or (), vqvae=vqvae, device=device, progress=lambda *done: progress("exact scores", *done)
        )
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        marks = {True: "[green]ok[/]", False: "[red]FAILED[/]", None: ""}
        table = Table("check", "", "finding")
        for check in checks:
            table.add_row(check.name, marks[check.ok], escape(check.detail))
        console.print(table)
    if any(check.ok is False for check in checks):
        raise typer.Exit(1)


def flops(
    model: Annotated[str, typer.Argument(help="A name from `varlik models`, or a folder; no weights are needed.")],
    classes: Annotated[int | None, typer.Option(help="How many classes to tell apart.", show_default="all")] = None,
    cascade: CascadeText = "full",
    calibration: CalibrationFile = None,
    as_json: AsJson = False,
) -> None:
    """Count the arithmetic of classifying one image, as released and without what is computed twice."""
    from varlik.evaluation import arithmetic
    from varlik.flops import UNITS

    counted = arithmetic.count(model, cascade_of(cascade), classes, calibration)
    if as_json:
        print_json(
            {
                **{key: getattr(counted, key) for key in ("model", "classes", "cascade", "calibration", "notes")},
                "units": UNITS,
                **{way: {kind: cost.as_dict() for kind, cost in costs.items()} for way, costs in counted.ways.items()},
                "class_table": {kind: cost.as_dict() for kind, cost in counted.class_table.items()},
            }
        )
        return
    table = Table("way", "step", title=f"{escape(model)}, {counted.classes} classes, {counted.cascade}: one image")
    for heading in ("rows", "paper convention, G multiply-adds", "true, GFLOP"):
        table.add_column(heading, justify="right")
    for way, costs in counted.ways.items():
        paper, true = costs["paper"], costs["true"]
        table.add_row(way, "all", str(paper.rows), _giga(paper.flops.total), _giga(true.flops.total), style="bold")
        for a, b in zip(paper.steps, true.steps, strict=True):
            table.add_row("", a.name, str(a.rows or ""), _giga(a.flops.total), _giga(b.flops.total))
        table.add_section()
    once = (_giga(cost.total) for cost in counted.class_table.values())
    table.add_row("once per model", "class table", str(counted.classes), *once)
    console.print(table)
    for note in counted.notes:
        console.print(escape(note), highlight=False, soft_wrap=True)


def benchmark(
    model: Model = "fashion-mnist",
    geometry: Annotated[
        str | None, typer.Option(help="d16, d20, ...: a public transformer's shape with random weights, no --model.")
    ] = None,
    depth: Annotated[int | None, typer.Option(min=1, help="Blocks of --geometry, to fit a small machine.")] = None,
    images: Annotated[int, typer.Option(min=1, help="How many images.")] = 4,
    classes: Annotated[
        int | None, typer.Option(min=1, help="How many classes.", show_default="all; 10 with --geometry")
    ] = None,
    scales: Annotated[int | None, typer.Option(min=1, help="Only the likelihood of the first so many scales.")] = None,
    cascade: Annotated[str | None, typer.Option(help='"avarc+" or stages such as 6:10,10:3,10x3:1.')] = None,
    naive_classes: Annotated[
        int | None, typer.Option(min=1, help="Time the naive way on so many classes and scale linearly.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often each way is timed; medians are reported.")] = 5,
    device: Device = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the engine's products: float16, bfloat16, float32.", show_default="as the device"),
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Print where the engine's time goes, op by op.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the result in this PNG file; needs varlik\\[plots].")] = None,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Measure peak memory too.")] = True,
    as_json: AsJson = False,
) -> None:
    """Time the engine beside the naive ways on this machine, after checking that all scores agree."""
    from dataclasses import asdict

    from varlik.evaluation import benchmark as benchmarks
    from varlik.evaluation import plot as plots
    from varlik.evaluation import ways

    plan = None if cascade is None else str(cascade_of(cascade))
    work = ways.Work(model, geometry, depth, images, classes, scales, plan, naive_classes, device, dtype)
    if plot is not None:
        plots.check_plot(plot)
    report = benchmarks.run(work, repeats, memory)
    if plot is not None:
        plots.plot(report, plot)
    if as_json:
        print_json(asdict(report))
        return
    table = Table("way", title=ways.title_of(work))
    for heading in ("seconds", "faster", "tokens", "GFLOP", "GFLOP/s", "of peak", "MB"):
        table.add_column(heading, justify="right")
    for row in report.rows:
        megabytes = "n/a" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}"
        speed = (f"{row.seconds:.4g}", f"{row.times_faster:.2f}", f"{row.tokens:.0f}", f"{row.flops / 1e9:.4g}")
        table.add_row(row.name, *speed, f"{row.gflops:.1f}", f"{100 * row.share:.0f} %", megabytes)
    console.print(table)
    if profile:
        console.print(_profile_table(report.profile, report.peak_gflops))
    where = report.machine
    lines = [
        f"seconds: medians of {report.repeats} for all images; tokens, GFLOP: per image; MB: peak beyond the weights",
        f"largest relative difference from the reference: {max(row.difference for row in report.rows):.1e}",
        f"peak: {report.peak_gflops:.1f} GFLOP/s of a large {report.dtype} matrix product, in turn with the ways; "
        f"class tables, once per model: {report.tables_seconds:.3g} s",
        f"{where.device}, {where.cpu}, threads: {where.threads}; Python {where.python}, torch {where.torch}, "
        f"varlik {where.varlik}" + (f", commit {where.commit}" if where.commit else ""),
    ]
    for line in (*report.notes, *lines):
        console.print(escape(line), highlight=False)


def _profile_table(profile: tuple[OpTime, ...], peak: float) -> Table:
    table = Table("op", title="engine, op by op")
    for heading in ("calls", "of time", "GFLOP/s", "of peak"):
        table.add_column(heading, justify="right")
    total = sum(op.seconds for op in profile)
    for op in profile:
        rate = op.flops / op.seconds / 1e9 if op.flops else 0.0
        speed = (f"{rate:.0f}", f"{100 * rate / peak:.0f} %") if rate else ("", "")
        table.add_row(op.name, str(op.calls), f"{100 * op.seconds / total:.1f} %", *speed)
    return table


def _giga(number: int) -> str:
    return f"{number / 1e9:.{1 if number >= 10**11 else 3}f}"
