"""What the commands have in common: options, names of cascades, tables, JSON, complaints."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.progress import Progress, TaskID

import varlik

console = Console()

CASCADES = {"full": varlik.VARC, "avarc+": varlik.AVARC_PLUS, "fast": varlik.FAST}
CASCADE_HELP = '"full", "avarc+", "fast", or stages such as 6:10,10:3,10x3:1 or screen:1%,race:1%.'

Model = Annotated[
    str, typer.Option("--model", "-m", help="A name from `varlik models`, a Hub repo id, a folder or a file.")
]
VQVAEFile = Annotated[
    str | None, typer.Option("--vqvae", help="VQ-VAE file, for a transformer given as a single file.")
]
Classes = Annotated[str | None, typer.Option(help="Only these classes: indices or names, separated by commas.")]
CascadeText = Annotated[str, typer.Option(help=CASCADE_HELP)]
CalibrationFile = Annotated[
    Path | None,
    typer.Option(help="What `varlik calibrate` made.", show_default="what lies beside the model, if it fits"),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...", show_default="the first GPU, else cpu")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of a table.")]

_PACKAGE = Path(varlik.__file__).resolve().parent
_show_any_warning = warnings.showwarning


def cascade_of(text: str) -> varlik.Cascade:
    """A cascade by name or in text. Raises `ValueError` naming the stage that cannot be read."""
    return CASCADES[text.lower()] if text.lower() in CASCADES else varlik.Cascade.parse(text)


def split(classes: str | None, names: tuple[str, ...]) -> list[str] | None:
    """Commas separate classes, but names may hold commas themselves: take the longest run of parts that is a name."""
    if classes is None:
        return None
    known = {name.casefold() for name in names}
    parts, found = [part.strip() for part in classes.split(",")], []
    while parts:
        for length in range(len(parts), 0, -1):
            candidate = ", ".join(parts[:length])
            if length == 1 or candidate.casefold() in known:
                found.append(candidate)
                parts = parts[length:]
                break
    return found


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """`tell(what, done, total)` keeps a bar on stderr for each kind of work; none where that is not a terminal, and
    nothing is left of them afterwards.
    """
    terminal = Console(stderr=True)
    with Progress(transient=True, console=terminal, disable=not terminal.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what)
            bar.update(tasks[what], completed=done, total=total)

        yield tell


def print_json(value: Any) -> None:
    """`value` for machines."""
    print(json.dumps(value, indent=2))


def percent(share: float) -> str:
    """A share for people."""
    return f"{100 * share:.3g} %"


def complain(error: Exception | Warning | str) -> None:
    """One line on stderr."""
    print(f"varlik: {' '.join(str(error).split())}", file=sys.stderr)


class Complaints:
    """Complains of errors as they are found, and remembers whether there were `any`."""

    def __init__(self) -> None:
        self.any = False

    def __call__(self, error: Exception) -> None:
        self.any = True
        complain(error)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our own warnings as one line, those of others as Python shows them; for `warnings.showwarning`."""
    if category is UserWarning and Path(filename).resolve().is_relative_to(_PACKAGE):
        complain(message)
    else:
        _show_any_warning(message, category, filename, lineno, file, line)
