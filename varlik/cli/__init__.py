"""The command line: parses, calls, prints.

Exit codes: 0 all went well; 1 a check failed; 2 the input was wrong (one line on stderr says how);
130 a training was interrupted.
"""

from __future__ import annotations

import sys
import warnings
from typing import Annotated

import typer

import varlik
from varlik.cli.answers import classify, demo
from varlik.cli.calibration import calibrate
from varlik.cli.checkpoints import convert, models
from varlik.cli.explanations import explain
from varlik.cli.measure import benchmark, doctor, flops
from varlik.cli.shared import complain, console, show_warning
from varlik.cli.training import train

__all__ = ["app", "console", "main"]

app = typer.Typer(
    name="varlik",
    help="Exact class likelihoods of images from visual autoregressive (VAR) models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (classify, explain, models, demo, doctor, calibrate, convert, flops, benchmark):
    app.command()(command)
app.add_typer(train, name="train")


def main() -> None:
    """Run the command line; wrong input ends in one line on stderr and exit code 2."""
    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        try:
            app()
        except (ValueError, TypeError, OSError) as error:
            complain(error)
            sys.exit(2)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(varlik.__version__)
        raise typer.Exit
