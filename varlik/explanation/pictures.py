"""Explanations as pictures, drawn with matplotlib: a row of heat maps, and what every scale adds.

Vermilion speaks for a class and blue against it; no evidence is nearly white. These and the colours of the curves are
Okabe and Ito's, which colour-blind people tell apart; curves differ in their markers as well.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from varlik.class_names import ClassNames
from varlik.explanation.information import MARGINAL, Explanation
from varlik.explanation.maps import by_scale, compose, heat

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure, SubFigure

FORMATS = (".png", ".svg")

_FOR, _AGAINST = "#D55E00", "#0072B2"
_AGAINST_TO_FOR = ((0, "#003A63"), (0.2, _AGAINST), (0.5, "#F7F7F7"), (0.8, _FOR), (1, "#7A2E00"))
_OTHERS = ("#000000", "#56B4E9", "#E69F00", "#009E73", "#CC79A7")
_MARKERS = "osD^vPX"
_DPI = 110
_SHOWN = 256  # pixels a side that heat is drawn with at least
_NAME = 140  # points that a class's name may take
_SIDE, _GAP, _MARGIN, _TITLE, _BELOW = 2.6, 0.25, 0.12, 0.7, 0.75  # of the panels, in inches
_SMALL = 8.5  # points
_LINEAR = 2  # nats behind the leader that are drawn on a linear scale


def check(file: str | Path) -> None:
    """Whether pictures can be written to such a file. Raises `ValueError` without matplotlib or for another ending."""
    _need_matplotlib()
    if Path(file).suffix.lower() not in FORMATS:
        raise ValueError(f"pictures: expected a file that ends in {' or '.join(FORMATS)}, got {file}")


def save(figure: Figure, file: str | Path) -> None:
    """Write a PNG or SVG file, as its name ends. Raises as `check`, and `OSError` where that cannot be written."""
    check(file)
    options: dict[str, Any] = {"pil_kwargs": {"optimize": True}} if Path(file).suffix.lower() == ".png" else {}
    figure.savefig(file, dpi=_DPI, **options)


def panels(
    explanation: Explanation, pixels: Tensor, names: Sequence[str], image: int = 0, *, released: bool = False
) -> Figure:
    """One image beside its heat maps: target against unconditional, rival likewise, target against rival.

    `pixels` (C, S, S) in [-1, 1] are those of the image, as `varlik.images.load` gives them; `names` those of the
    classes, the null class left out; `image` counts among those explained. Heat lies half and half over the picture in
    grey. Each map has a colour scale of its own, in nats for each cell of the last token map. With `released`, maps are
    those of the released code of A-VARC: put together by its rule, negative values cut off, and coloured from the
    smallest to the largest.

    Raises `ValueError` for shapes and an `image` that do not fit, for log-probs that are not finite, and without
    matplotlib.
    """
    one = _checked(explanation, pixels, names, image)
    from matplotlib.figure import Figure

    target, rival = _title(one.target, names), _title(one.rival, names)
    maps = [
        (f"{target}\nagainst {MARGINAL[one.kind]}", one.information),
        (f"{rival}\nagainst {MARGINAL[one.kind]}", one.rival_information),
        (f"{target}\nagainst {rival}", one.contrast),
    ]
    width, height = 4 * _SIDE + 3 * _GAP + 2 * _MARGIN, _TITLE + _SIDE + _BELOW
    figure = Figure(figsize=(width, height))

    def axes(column: int, bottom: float, tall: float) -> Axes:
        left = _MARGIN + column * (_SIDE + _GAP)
        return figure.add_axes((left / width, bottom / height, _SIDE / width, tall / height))

    picture = axes(0, _BELOW, _SIDE)
    picture.imshow(_rgb(pixels))
    _label(picture, f"{target}\nposterior {_share(one, one.target)}\n")
    for column, (title, values) in enumerate(maps, start=1):
        total = compose(values.double().cpu(), one.patch_nums, "nearest" if released else "area")
        shown, bar = axes(column, _BELOW, _SIDE), axes(column, _BELOW - 0.26, 0.16)
        _draw_heat(shown, bar, pixels, total, released)
        _label(shown, f"{title}\n{_nats(values.sum().item())} nats")
    return figure


def scales(explanation: Explanation, pixels: Tensor, names: Sequence[str], image: int = 0, *, top: int = 5) -> Figure:
    """What each scale adds for one image, and below it the race of the best classes over the scales.

    The maps are those of each scale, of the target against unconditional and against the rival; a row has one colour
    scale, in nats a token. The race is the log-likelihood of each class up to each scale, relative to the leader among
    all candidates there: of the `top` classes that end best, and of target and rival in any case. The other arguments
    are as for `panels`.

    Raises `ValueError` as `panels`, and for a `top` that is not from 1 to 5.
    """
    one = _checked(explanation, pixels, names, image)
    if not 1 <= top <= len(_OTHERS):
        raise ValueError(f"top: expected 1 to {len(_OTHERS)} classes, got {top}")
    from matplotlib.figure import Figure

    columns = len(one.patch_nums)
    figure = Figure(figsize=(max(10.0, 1.15 * columns + 3.6), 7.0), layout="constrained")
    halves: Any = figure.subfigures(2, 1)
    upper, lower = halves
    target, rival = _title(one.target, names), _title(one.rival, names)
    grid = upper.add_gridspec(2, columns + 1, width_ratios=[1.6] + [1.0] * columns)
    picture = upper.add_subplot(grid[:, 0])
    picture.imshow(_rgb(pixels))
    _label(picture, f"target: posterior\n{_share(one, one.target)}")
    rows = ((MARGINAL[one.kind], one.information), (rival, one.contrast))
    for row, (opponent, values) in enumerate(rows):
        axes = [upper.add_subplot(grid[row, 1 + column]) for column in range(columns)]
        maps = by_scale(values.double().cpu(), one.patch_nums)
        _draw_strip(upper, axes, f"{target} against {opponent}", [part[0] for part in maps])
    _draw_race(lower.subplots(), one, names, top)
    return figure


def _draw_heat(axis: Axes, bar: Axes, pixels: Tensor, total: Tensor, released: bool) -> None:
    """A map (1, P, P) half and half with the picture in grey, and its colour scale over dark and light grey."""
    from matplotlib import colormaps

    fold = -(-_SHOWN // pixels.shape[-1])
    values = heat(total, fold * pixels.shape[-1], signed=not released)[0].numpy()
    darkest = 0.0 if released else 0.45  # no evidence is light, and dark pictures are not to drown it
    grey = darkest + (1 - darkest) * _rgb(pixels).mean(-1, keepdims=True)
    line = np.linspace(0, 1, 256)
    if released:
        cut = total.clamp(min=0)
        low, high = cut.min().item(), cut.max().item()
        colours, shares = colormaps["viridis"], values
    else:
        high = total.abs().max().item()
        low, colours, shares = -high, _diverging(), (values + 1) / 2
    axis.imshow((grey.repeat(fold, 0).repeat(fold, 1) + colours(shares)[..., :3]) / 2)
    bands = (np.array([1, darkest])[:, None, None] + colours(line)[None, :, :3]) / 2
    bar.imshow(bands, aspect="auto", extent=(0, 1, 0, 1), interpolation="nearest")
    side = total.shape[-1]
    bar.set(xlim=(0, 1), yticks=[])
    bar.set_xlabel(f"nats in each of {side} × {side} cells", fontsize=_SMALL)
    texts = {0.0: _number(low), 1.0: _number(high)}
    if not released:
        texts[0.5] = "0"
    elif low == 0:
        texts[0.0] = "0 and less"
    bar.set_xticks(sorted(texts), [texts[at] for at in sorted(texts)], fontsize=_SMALL)
    bar.get_xticklabels()[0].set_horizontalalignment("left")
    bar.get_xticklabels()[-1].set_horizontalalignment("right")
    bar.spines[:].set_visible(False)


def _draw_strip(figure: SubFigure, axes: Sequence[Axes], title: str, maps: Sequence[Tensor]) -> None:
    """Token maps (p, p) of all scales side by side."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    high = max(part.abs().max().item() for part in maps) or 1.0
    norm, colours = Normalize(-high, high), _diverging()
    for axis, part in zip(axes, maps, strict=True):
        axis.imshow(part.numpy(), cmap=colours, norm=norm)
        _label(axis, f"{len(part)} × {len(part)}", frame=True)
        axis.set_xlabel(_nats(part.sum().item()), fontsize=_SMALL + 1)
    lines = textwrap.fill(title, 13, break_long_words=False)
    axes[0].set_ylabel(lines, rotation=0, ha="right", va="center", fontsize=_SMALL + 1)
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=list(axes), location="right", aspect=14, shrink=0.8)
    _tick(bar, (-high, 0.0, high))
    bar.set_label("nats a token", fontsize=_SMALL)


def _draw_race(axis: Axes, one: Explanation, names: Sequence[str], top: int) -> None:
    """Log-likelihoods up to each scale, relative to the leader there."""
    sizes = [p * p for p in one.patch_nums]
    by_class = one.token_log_prob[0].double().cpu()
    added = torch.stack([part.sum(1) for part in by_class.split(sizes, dim=1)], dim=1)
    running = torch.cat((torch.zeros(len(added), 1), added.cumsum(1)), dim=1)
    behind = running - running.amax(0)
    labels = one.labels.tolist()
    columns = behind[:, -1].argsort(descending=True, stable=True).tolist()
    target, rival = (labels.index(int(label)) for label in (one.target, one.rival))
    shown = [column for rank, column in enumerate(columns) if rank < top or column in (target, rival)]
    fixed = {target: (_FOR, _MARKERS[0]), rival: (_AGAINST, _MARKERS[1])}
    others = iter(zip(_OTHERS, _MARKERS[2:], strict=True))
    lines, texts = [], []
    for column in shown:
        colour, marker = fixed[column] if column in fixed else next(others)
        (line,) = axis.plot(behind[column].numpy(), color=colour, marker=marker, linewidth=1.8, zorder=3, clip_on=False)
        lines.append(line)
        role = {target: " (target)", rival: " (rival)"}.get(column, "")
        share = _share(one, one.labels[column])
        texts.append(f"{share}  {_title(one.labels[column], names)}{role}")
    axis.set_xticks(range(len(sizes) + 1), ["start", *(f"{p} × {p}" for p in one.patch_nums)])
    axis.set_xlabel("after scale")
    # Early scales decide by a few nats, and late ones leave the losers hundreds behind.
    lowest = min(-_LINEAR, 1.1 * behind[shown].min().item())
    axis.set_yscale("symlog", linthresh=_LINEAR, linscale=0.8)
    ticks = [tick for tick in (0, 1, *(n * 10**power for power in range(7) for n in (2, 5, 10))) if -tick >= lowest]
    axis.set_yticks([-tick for tick in ticks], [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_ylim(lowest, 0.25)
    axis.set_ylabel(f"nats behind the leader\n(logarithmic from {_LINEAR} on)")
    axis.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(
        lines, texts, title="posterior", alignment="left", loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False
    )


def _label(axis: Axes, title: str, frame: bool = False) -> None:
    """A picture's title, without ticks."""
    axis.set_title(title, fontsize=_SMALL + 1.5)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set(visible=frame, color="#888888")


def _diverging() -> Colormap:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("against to for", _AGAINST_TO_FOR)


def _rgb(pixels: Tensor) -> np.ndarray:
    """Pixels (C, S, S) in [-1, 1] as (S, S, 3) in [0, 1]."""
    shown = (pixels.detach().float().cpu() + 1).div(2).clamp(0, 1)
    return shown.expand(3, -1, -1).permute(1, 2, 0).numpy()


def _tick(bar: Colorbar, values: Sequence[float]) -> None:
    bar.set_ticks(values, labels=[_number(value) for value in values], fontsize=_SMALL)
    bar.outline.set_visible(False)


def _nats(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}".replace("-", "−")


def _number(value: float) -> str:
    """With a sign, and two digits that count."""
    if not value:
        return "0"
    digits = 1 - math.floor(math.log10(abs(value)))
    text = f"{value:+.{max(digits, 0)}f}" if digits < 5 else f"{value:+.1e}"
    return text.replace("-", "−")


def _share(one: Explanation, label: Tensor) -> str:
    """Posterior of a class."""
    share = one.posterior[0, one.labels == label].item()
    if share < 0.0005:
        return "< 0.1 %"
    return "> 99.9 %" if share >= 0.9995 else f"{100 * share:.1f} %"


def _title(label: Tensor, names: Sequence[str]) -> str:
    """A class's name, in quotes and not too long; a dollar is no mathematics."""
    name = " ".join(ClassNames(names, "").name(int(label)).split())
    if _width(name) > _NAME:
        name = name.split(",")[0][:100]  # ImageNet's names are lists of synonyms
        while _width(name) > _NAME:
            name = name[:-1].rstrip()
        name += "…"
    return f"“{name}”".replace("$", r"\$")


def _width(name: str) -> float:
    """Points that a name takes in a title."""
    from matplotlib.textpath import TextPath

    return float(TextPath((0, 0), name.replace("$", r"\$"), size=_SMALL + 1.5).get_extents().width)


def _checked(explanation: Explanation, pixels: Tensor, names: Sequence[str], image: int) -> Explanation:
    """The explanation of one image, if all the rest fits."""
    _need_matplotlib()
    if not 0 <= image < len(explanation):
        raise ValueError(f"image: expected 0 to {len(explanation) - 1}, got {image}")
    if pixels.dim() != 3 or pixels.shape[0] not in (1, 3) or pixels.shape[1] != pixels.shape[2]:
        raise ValueError(f"pixels: expected (1, S, S) or (3, S, S), got {tuple(pixels.shape)}")
    most = int(explanation.labels.max())
    if len(names) < most:  # the null class comes after the last name
        raise ValueError(f"names: expected one for each class up to {most}, got {len(names)}")
    one = explanation[image : image + 1]
    beside = torch.stack((one.unconditional, one.rival_unconditional))
    if not (one.token_log_prob.isfinite().all() and beside.isfinite().all()):
        raise ValueError("explanation: expected finite log-probs, got NaN or infinity")
    return one


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("pictures: need matplotlib: python -m pip install 'varlik[plots]'") from error
