"""The benchmark's result as a picture."""

from __future__ import annotations

from pathlib import Path

from varlik.evaluation.benchmark import Report
from varlik.evaluation.ways import title_of


def check_plot(path: Path) -> None:
    """Whether `plot` can write there. Raises `ValueError` without matplotlib or for another ending than .png."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("plot: needs matplotlib: python -m pip install 'varlik[plots]'") from error
    if path.suffix.lower() != ".png":
        raise ValueError(f"plot: expected a .png file, got {path}")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"plot: no such folder: {path.resolve().parent}")


def plot(report: Report, path: Path) -> None:
    """Draw seconds and, where known, peak memory of every way as bars, in a PNG file. Raises as `check_plot`."""
    check_plot(path)
    from matplotlib.figure import Figure

    names = [row.name for row in report.rows]
    bars = [("seconds", [row.seconds for row in report.rows], [f"{row.times_faster:.2f} x" for row in report.rows])]
    known = [row.peak_bytes for row in report.rows if row.peak_bytes is not None]
    if len(known) == len(names):
        bars.append(("peak memory beyond the weights, MB", [b / 1e6 for b in known], [f"{b / 1e6:.0f}" for b in known]))
    figure = Figure(figsize=(5 * len(bars) + 2, 0.6 * len(names) + 1.4), layout="constrained")
    for axis, (title, values, texts) in zip(figure.subplots(1, len(bars), squeeze=False)[0], bars, strict=True):
        drawn = axis.barh(names, values, color=["#b0b0b0"] * (len(names) - 1) + ["#2a6f97"])
        axis.bar_label(drawn, texts, padding=3)
        axis.margins(x=0.15)
        axis.invert_yaxis()
        axis.set_xlabel(title)
        axis.spines[["top", "right"]].set_visible(False)
        if title != "seconds":
            axis.set_yticklabels([])
    figure.suptitle(f"{title_of(report.work)}; {report.machine.cpu}, threads: {report.machine.threads}", fontsize=9)
    figure.savefig(path, dpi=150)
