"""What scripts of experiments share: models by name, and where and how their results are written."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import varlik

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def add_out(parser: argparse.ArgumentParser) -> None:
    """The option `--out`, a folder for `write`."""
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="where the results go (default: benchmarks/results)", metavar="FOLDER"
    )


def add_models(parser: argparse.ArgumentParser) -> None:
    """The option `--models`, names for `loaded`."""
    parser.add_argument("--models", nargs="+", default=["fashion-mnist"], metavar="NAME[=FOLDER]")


def loaded(models: list[str]) -> Iterator[tuple[str, varlik.VARClassifier]]:
    """Name and classifier of each NAME[=FOLDER], loaded on the CPU when its turn comes."""
    for named in models:
        name, _, place = named.partition("=")
        yield name, varlik.load(place or name, device="cpu")


def write(out: Path, name: str, report: dict[str, Any], text: str) -> None:
    """Write `report` to `name`.json and `text` to `name`.md in the folder `out`, and print the text."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / f"{name}.md").write_text(text)
    print(text)
