"""What a training run tells of itself: metrics.jsonl, a progress bar and, if asked for, TensorBoard."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Metrics = dict[str, float]


class MetricsLog:
    """Writes a run's records into `folder`, from after step `first` to step `end`; a context manager.

    Records of later steps, left by a run that was killed after its last checkpoint, are removed first, and so is a torn
    line. Raises `ImportError` if TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, first: int, end: int, tensorboard: bool = False, quiet: bool = False):
        self._path = folder / "metrics.jsonl"
        self._board = summary_writer()(str(folder / "tensorboard"), purge_step=first + 1) if tensorboard else None
        _cut_back(self._path, first)
        columns = (
            TextColumn("{task.description}", markup=False),  # a folder may be called [bold] or {x}
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=Console(stderr=True), disable=quiet)
        self._bar = self._progress.add_task(folder.name, total=end, completed=first, note="")

    def __enter__(self) -> MetricsLog:
        self._file = open(self._path, "a")
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def advance(self, step: int) -> None:
        """Move the progress bar to `step`."""
        self._progress.update(self._bar, completed=step)

    def write(self, record: Metrics) -> None:
        """Add a line; `record` holds at least the step. What is not finite, which JSON does not know, becomes null."""
        plain = {name: value if math.isfinite(value) else None for name, value in record.items()}
        self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        self._file.flush()
        if "loss" in record:
            self._progress.update(self._bar, note=f"loss {record['loss']:.4f}")
        if self._board is not None:
            for name, value in record.items():
                if name != "step":
                    self._board.add_scalar(name, value, record["step"])


def _cut_back(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if step == 0 or record["step"] > step:  # step 0 is looked at anew
            break
        kept.append(line + "\n")
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept))
    os.replace(partial, path)


def summary_writer() -> Any:
    """The class that writes for TensorBoard. Raises `ImportError` where that is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard: is not installed: python -m pip install 'varlik[train]'") from error
    return SummaryWriter
