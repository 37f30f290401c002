"""The command that explains pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

import varlik
from varlik.cli.shared import AsJson, Classes, Complaints, Device, Model, VQVAEFile, console, print_json, split


def explain(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.", show_default=False)],
    model: Model = "fashion-mnist",
    vqvae: VQVAEFile = None,
    target: Annotated[
        str | None, typer.Option(metavar="CLASS", help="The class to explain.", show_default="the most likely one")
    ] = None,
    contrast: Annotated[
        str | None,
        typer.Option(
            metavar="CLASS", help="The rival it is set against.", show_default="the most likely of the others"
        ),
    ] = None,
    classes: Classes = None,
    unconditional: Annotated[
        str,
        typer.Option(
            help="What a class is compared with: others (the mean of the other classes: weight of evidence), mixture "
            "(of all classes: TMI) or null (the null class)."
        ),
    ] = "others",
    samples: Annotated[
        int, typer.Option(min=1, help="Average over so many samples of an image, the clean one included.")
    ] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Draw two pictures of each image into this folder; needs varlik\\[plots].")
    ] = None,
    ending: Annotated[str, typer.Option("--format", help="Of the pictures in --out: png or svg.")] = "png",
    html: Annotated[Path | None, typer.Option(help="Write a page to look through in a browser.")] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Show which tokens of image files speak for their classes, and how much. A file that cannot be read is named on
    stderr, and the others are still answered.
    """
    from varlik.evaluation import explanations

    explanations.check(out, ending, html)
    classifier = varlik.load(model, vqvae=vqvae, device=device)
    labels = classifier.labels(split(classes, classifier.class_names))
    unreadable = Complaints()
    explained = explanations.explain(
        classifier,
        images,
        labels,
        complain=unreadable,
        target=target,
        contrast=contrast,
        samples=samples,
        unconditional=unconditional,
    )
    if explained is not None:
        drawn = [] if out is None else explanations.draw(classifier, explained, out, ending)
        if html is not None:
            explanations.write_page(classifier, explained, html)
        files = [str(file) for file in (*drawn, html) if file is not None]
        answer = explanations.answer(classifier, explained)
        if as_json:
            print_json({**answer, "files": files})
        else:
            _print(answer, files)
    if unreadable.any:
        raise typer.Exit(2)


def _print(answer: dict[str, Any], files: list[str]) -> None:
    from varlik.explanation.information import MARGINAL

    for image in answer["images"]:
        target, rival = (f"{image[of]['name']} ({image[of]['posterior']:.4f})" for of in ("target", "rival"))
        console.print(escape(f"{image['image']}: {target} against {rival}"), highlight=False, soft_wrap=True)
        nats = (f"against {MARGINAL[answer['unconditional']]}", escape(f"against {image['rival']['name']}"))
        scales = Table("scale", *nats, title=escape(f"nats for {image['target']['name']}, by scale"))
        for scale in image["scales"]:
            scales.add_row(f"{scale['scale']}: {scale['side']} × {scale['side']}", *_nats(scale))
        scales.add_section()
        scales.add_row("all", *_nats(image))
        console.print(scales)
        title = escape(f"nats for {image['target']['name']}, by token")
        tokens = Table("token for", "scale", "row", "column", "code", *nats, title=title)
        for side, of in (("for", "target"), ("against", "rival")):
            for token in image[side]:
                place = (str(token[key]) for key in ("scale", "row", "column", "code"))
                tokens.add_row(escape(image[of]["name"]), *place, *_nats(token))
        console.print(tokens)
    for file in files:
        console.print(escape(f"wrote {file}"), highlight=False, soft_wrap=True)


def _nats(values: dict[str, Any]) -> tuple[str, str]:
    information, contrast = (round(values[key], 2) + 0.0 for key in ("information", "contrast"))  # no minus zero
    return f"{information:+.2f}", f"{contrast:+.2f}"
