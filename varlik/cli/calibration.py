"""The command that calibrates a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

import varlik
from varlik.cli.shared import (
    AsJson,
    Classes,
    Complaints,
    Device,
    Model,
    VQVAEFile,
    console,
    percent,
    print_json,
    progress_bar,
    split,
)

if TYPE_CHECKING:
    from varlik.evaluation.calibrate import Report


def calibrate(
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE_OR_FOLDER...", help="Pictures, or folders of them.", show_default=False),
    ],
    model: Model,
    vqvae: VQVAEFile = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The file to write.", show_default="calibration.safetensors in the model's folder, if it is yours"
        ),
    ] = None,
    classes: Classes = None,
    labelled: Annotated[
        bool,
        typer.Option(
            "--labelled",
            help="Pictures lie in folders named after classes: calibrate posteriors too, and see whether "
            "smoothing pays.",
        ),
    ] = False,
    samples: Annotated[
        int, typer.Option(min=1, help="Samples of an image that smoothing is to average over, the clean one included.")
    ] = 1,
    sigma: Annotated[float, typer.Option(help="Standard deviation of the noise of the other samples.")] = 0.1,
    cache: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Keep exact scores in this folder as they are found, so that a stopped run goes on where it was and "
            "another one on the same pictures need not score them again.",
            show_default="they are not kept",
        ),
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure on pictures how far a model's cheap scores can be trusted, for screen, race and smoothing.

    Take pictures at random from what is to be classified, some hundreds, none that the model was trained on. Every one
    is scored exactly under every class, which takes long.
    """
    from dataclasses import asdict

    from varlik.evaluation import calibrate as calibrating
    from varlik.evaluation import pictures

    file = calibrating.place(model, out)
    paths = pictures.find(images)
    classifier = varlik.load(model, vqvae=vqvae, device=device)
    labels = classifier.labels(split(classes, classifier.class_names))
    unreadable = Complaints()
    with progress_bar() as progress:
        report = calibrating.run(
            classifier,
            paths,
            file,
            labels,
            labelled=labelled,
            samples=samples,
            sigma=sigma,
            cache=cache,
            complain=unreadable,
            progress=progress,
        )
    if as_json:
        print_json(asdict(report))
    else:
        _print_report(report)
    if unreadable.any:
        raise typer.Exit(2)


def _print_report(report: Report) -> None:
    table = Table("measured", "value", title=f"{escape(report.model)}, {report.classes} classes")
    table.add_row("images", f"{report.images}, of which {report.counted} were left out of fitting")
    table.add_row("correlation of first-order scores with exact ones", f"{report.correlation:.3f}")
    for k, share in report.recall.items():
        table.add_row(f"exact best among the best {k} estimates", percent(share))
    for row in report.finalists:
        found = f"takes {row.images_needed} images" if row.expected is None else f"{row.expected:.2f} on average"
        table.add_row(f"finalists at delta {percent(row.delta)}", found)
    table.add_row("smoothing", _smoothing(report))
    table.add_row(
        "temperature", "unknown without labels" if report.temperature is None else f"{report.temperature:.2f}"
    )
    console.print(table)
    for line in (*report.notes, f"wrote {report.file}"):
        console.print(escape(line), highlight=False, soft_wrap=True)


def _smoothing(report: Report) -> str:
    plan = report.smoothing
    if plan is None:
        return "not calibrated (--samples)"
    how = f"{plan.samples} samples, sigma {plan.sigma:g}"
    if plan.gain is None or plan.error is None:
        return f"{how}: gain unknown without labels"
    verdict = "pays" if plan.pays else "does not surely pay, and is left out"
    return f"{how}: accuracy {100 * plan.gain:+.2f} ± {100 * plan.error:.2f} %, {verdict}"
