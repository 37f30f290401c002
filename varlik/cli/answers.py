"""Commands that classify pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

import varlik
from varlik.cli.shared import (
    AsJson,
    CalibrationFile,
    CascadeText,
    Classes,
    Complaints,
    Device,
    Model,
    VQVAEFile,
    cascade_of,
    console,
    percent,
    print_json,
    split,
)


def classify(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.", show_default=False)],
    model: Model = "fashion-mnist",
    vqvae: VQVAEFile = None,
    classes: Classes = None,
    cascade: CascadeText = "full",
    calibration: CalibrationFile = None,
    audit: Annotated[
        float, typer.Option(help="Score this share of the images in full as well, at random, and compare.")
    ] = 0.0,
    topk: Annotated[int, typer.Option(min=1, help="How many classes to print for each image.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the noise of stages with several samples.")] = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Classify image files. A file that cannot be read is named on stderr, and the others are still answered."""
    from varlik.evaluation import answers

    plan = cascade_of(cascade)
    classifier = varlik.load(model, vqvae=vqvae, device=device, calibration=calibration)
    labels = classifier.labels(split(classes, classifier.class_names))
    unreadable = Complaints()
    answer = answers.classify(classifier, images, labels, plan, complain=unreadable, topk=topk, seed=seed, audit=audit)
    if answer is not None and as_json:
        print_json(answer)
    elif answer is not None:
        _print_answer(answer, bool(audit))
    if unreadable.any:
        raise typer.Exit(2)


def demo(
    model: Model = "fashion-mnist",
    cascade: CascadeText = "full",
    as_json: AsJson = False,
) -> None:
    """Classify a dozen bundled test pictures beside the naive per-class pass, and time both."""
    from dataclasses import asdict

    from varlik.evaluation import demo as demos

    result = demos.run(model, cascade_of(cascade))
    if as_json:
        print_json(asdict(result))
        return
    table = Table("picture", "truth", "prediction", "posterior", "tokens", title=f"{result.model} on {result.device}")
    for row in result.rows:
        colour = "green" if row.correct else "red"
        predicted = Text(row.predicted, style=colour)  # no markup: a class may be called "\\" or "["
        table.add_row(row.file, Text(row.truth), predicted, f"{row.posterior:.3f}", str(row.tokens))
    console.print(table)
    naive = result.timings[0]
    times = Table("way", "ms per picture", "tokens", "times faster", title=f"{len(result.rows)} pictures")
    for timing in result.timings:
        milliseconds = 1000 * timing.seconds / len(result.rows)
        times.add_row(timing.name, f"{milliseconds:.1f}", str(timing.tokens), f"{naive.seconds / timing.seconds:.2f}")
    console.print(times)
    for note in result.notes:
        console.print(escape(note), highlight=False, soft_wrap=True)
    console.print(
        f"{sum(row.correct for row in result.rows)} of {len(result.rows)} right; "
        f"largest relative difference from the naive scores {result.difference:.1e}"
    )


def _print_answer(answer: dict[str, Any], audited: bool) -> None:
    screened = answer["images"][0]["top"][0]["estimate"] is not None
    table = Table("image", "class", "posterior", "log-likelihood", *(["estimate"] if screened else []))
    for image in answer["images"]:
        for rank, entry in enumerate(image["top"]):
            cells: list[str | Text] = [
                Text(image["image"] if rank == 0 else ""),
                Text(entry["name"]),
                f"{entry['posterior']:.4f}",
            ]
            table.add_row(*cells, _score(entry), *([f"{entry['estimate']:.2f}"] if screened else []))
    console.print(table)
    for line in _cost_lines(answer["cost"], len(answer["images"])):
        console.print(escape(line), highlight=False, soft_wrap=True)
    if audited:
        console.print(escape(_audit_line(answer["audit"])), highlight=False, soft_wrap=True)


def _score(entry: dict[str, Any]) -> str:
    if entry["dropped_by"] is not None:
        return "dropped"
    return "not scored" if entry["log_likelihood"] is None else f"{entry['log_likelihood']:.2f}"


def _cost_lines(cost: dict[str, Any], images: int) -> list[str]:
    forward, backward = cost["forward_tokens"] / images, cost["backward_tokens"] / images
    times = [("reading", cost["seconds"]["reading"])]
    times += [(f"{stage['stage']} of {stage['classes']:.3g} classes", stage["seconds"]) for stage in cost["stages"]]
    return [
        f"tokens per image: {forward:.0f} forwards, {backward:.0f} backwards; "
        f"{percent(cost['flops'] / cost['full_flops'])} of the FLOPs of a naive pass per class",
        "seconds: " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in times),
    ]


def _audit_line(audit: dict[str, Any] | None) -> str:
    if audit is None:
        return "audit: none of these images was drawn"
    promise = f"; at most {percent(audit['delta'])} was promised" if audit["delta"] else ""
    return (
        f"audit: {audit['disagreements']} of {audit['images']} images have another answer when scored in full "
        f"({percent(audit['low'])} to {percent(audit['high'])} of such images with 95 % confidence){promise}"
    )
