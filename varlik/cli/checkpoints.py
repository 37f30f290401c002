"""Commands about models: which there are, and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

import varlik
from varlik.cli.shared import AsJson, VQVAEFile, console, print_json


def models(
    pattern: Annotated[str, typer.Argument(help="Shell pattern, such as 'var-*'.")] = "*",
    as_json: AsJson = False,
) -> None:
    """List the models that `--model` knows by name."""
    from varlik.models.presets import get_preset

    presets = [get_preset(name) for name in varlik.list_models(pattern)]
    if not presets:
        raise ValueError(f"pattern: no model matches {pattern!r}")
    if as_json:
        keys = ("name", "description", "bundled", "licence")
        print_json([{key: getattr(preset, key) for key in keys} for preset in presets])
        return
    table = Table("model", "what", "where", "licence")
    for preset in presets:
        where = "bundled" if preset.bundled else f"Hub: {preset.repo_id}"
        table.add_row(preset.name, escape(preset.description), escape(where), preset.licence)
    console.print(table)


def convert(
    source: Annotated[str, typer.Argument(help="What to convert: anything that --model takes.")],
    folder: Annotated[Path, typer.Argument(help="Where var.safetensors and vqvae.safetensors go.")],
    vqvae: VQVAEFile = None,
) -> None:
    """Convert a checkpoint to a folder of safetensors files that describe themselves."""
    from varlik.models.checkpoints import convert as convert_checkpoint

    convert_checkpoint(source, folder, vqvae=vqvae)
    console.print(f"wrote {escape(str(folder / 'var.safetensors'))} and {escape(str(folder / 'vqvae.safetensors'))}")
