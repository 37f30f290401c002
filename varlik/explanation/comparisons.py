"""Other ways to say which pixels matter, to compare maps of mutual information with.

Each takes `pixels` (B, C, S, S) in [-1, 1] and returns importance (B, S, S), higher for what speaks more for the class.
Occlusion, ablation, LIME and SHAP ask a `score` for the class in `column` (B,) of its answers, as `faithfulness.curves`
does, over the same square cells of the picture; random order, the centre and edges look at no classifier at all.

Sources: "Visualizing and Understanding Convolutional Networks", Zeiler and Fergus 2014 (occlusion); "Why Should I Trust
You?", Ribeiro et al. 2016 (LIME); "A Unified Approach to Interpreting Model Predictions", Lundberg and Lee 2017 (SHAP).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from varlik.explanation.faithfulness import Baseline, Score, blank

Method = Literal["FeatureAblation", "KernelShap", "Lime"]

CELLS = 8  # cells a side, for methods that change a cell at a time
SAMPLES = 128  # pictures that LIME and SHAP look at


def random_order(pixels: Tensor, seed: int = 0, cells: int | None = None) -> Tensor:
    """Noise, of every pixel or of so many square cells a side."""
    size = pixels.shape[-1]
    mask = cell_mask(pixels, size if cells is None else cells)
    values = torch.rand(len(pixels), int(mask.max()) + 1, generator=torch.Generator().manual_seed(seed))
    return values.to(pixels)[:, mask]


def centre(pixels: Tensor) -> Tensor:
    """Nearness to the middle of the picture."""
    side = torch.linspace(-1, 1, pixels.shape[-1], dtype=pixels.dtype, device=pixels.device)
    near = -(side.square().unsqueeze(1) + side.square())
    return near.expand(len(pixels), -1, -1)


def edges(pixels: Tensor) -> Tensor:
    """Magnitude of the Sobel gradient of the mean of the channels."""
    grey = F.pad(pixels.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=pixels.dtype, device=pixels.device)
    both = F.conv2d(grey, torch.stack((kernel, kernel.T)).unsqueeze(1))
    return both.square().sum(1).sqrt()


def occlusion(score: Score, pixels: Tensor, column: Tensor, baseline: Baseline = "blur", cells: int = CELLS) -> Tensor:
    """How far the probability falls when a window of two cells a side is covered, on average over the windows."""
    mask, empty, size = cell_mask(pixels, cells), blank(pixels, baseline), pixels.shape[-1]
    row, place = mask // cells, mask % cells
    total, count = pixels.new_zeros(len(pixels), size, size), pixels.new_zeros(size, size)
    whole = _probability(score, pixels, column)
    for i in range(-1, cells):
        for j in range(-1, cells):
            window = (row >= i) & (row <= i + 1) & (place >= j) & (place <= j + 1)
            fall = whole - _probability(score, torch.where(window, empty, pixels), column)
            total += window * fall.view(-1, 1, 1)
            count += window
    return total / count


def captum(
    method: Method, score: Score, pixels: Tensor, column: Tensor, baseline: Baseline = "blur", cells: int = CELLS
) -> Tensor:
    """A method of captum over the cells: what covering one changes, or a surrogate model fitted to random coverings.

    Image by image, for surrogate models are fitted to one at a time. Raises `ImportError` without captum, `ValueError`
    for another method.
    """
    if method not in get_args(Method):
        raise ValueError(f"method: expected one of {', '.join(map(repr, get_args(Method)))}, got {method!r}")
    try:
        import captum.attr
    except ImportError as error:
        raise ImportError("captum: is not installed: python -m pip install 'varlik[explain]'") from error

    options = {"perturbations_per_eval": 64}
    if method != "FeatureAblation":
        options["n_samples"] = SAMPLES
    mask = cell_mask(pixels, cells).expand(1, pixels.shape[1], -1, -1)
    explainer = getattr(captum.attr, method)(score)
    found = []
    for i in range(len(pixels)):
        one, target = pixels[i : i + 1], int(column[i])
        found.append(
            explainer.attribute(one, baselines=blank(one, baseline), target=target, feature_mask=mask, **options)
        )
    return torch.cat(found).sum(1)


def cell_mask(pixels: Tensor, cells: int) -> Tensor:
    """Number of the square cell of each pixel, (S, S) int64. Raises `ValueError` for more cells than pixels."""
    size = pixels.shape[-1]
    if not 1 <= cells <= size:
        raise ValueError(f"cells: expected 1 to {size}, got {cells}")
    line = torch.arange(size, device=pixels.device) * cells // size
    return line.unsqueeze(1) * cells + line


def _probability(score: Score, pixels: Tensor, column: Tensor) -> Tensor:
    return score(pixels).gather(1, column.unsqueeze(1))[:, 0]
