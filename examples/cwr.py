"""Discriminative baselines for new classes without old data: a small CNN, fine-tuned or with copied weights (CWR).

- Fine-tuning goes on with all weights and all outputs on the images of the second task alone.
- CWR: after the first task all layers but the head are frozen. The head of each task is trained by itself, from zero,
  and its weights, less their mean, are copied beside those of earlier tasks.

Source: "CORe50", Lomonaco and Maltoni 2017, section 4 (CWR); "Continuous learning in single-incremental-task
scenarios", Maltoni and Lomonaco 2019, section 3 (CWR+: heads that start at zero and are centred).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varlik.datasets import LabelledImages
from varlik.training.loop import LoopConfig, Part, train
from varlik.training.metrics import Metrics

LOOP = LoopConfig(
    steps=1200, batch_size=64, learning_rate=1e-3, warmup=50, weight_decay=0.01, checkpoint_every=200, log_every=50
)
SIDE, HIDDEN = 28, 896


class CNN(nn.Module):
    """Three convolutions and two linear layers, (B, 1, 28, 28) -> (B, classes); no bias in the head."""

    def __init__(self, classes: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.GELU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.GELU(),
            nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.GroupNorm(8, 128), nn.GELU(),
            nn.MaxPool2d(2, ceil_mode=True), nn.Flatten(),
            nn.Linear(128 * 16, HIDDEN), nn.GELU(),
        )  # fmt: skip
        self.head = nn.Linear(HIDDEN, classes, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.body(pixels))


def pixels_of(data: LabelledImages) -> Tensor:
    """(n, 1, 28, 28) in [-1, 1]."""
    return torch.from_numpy(data.images.copy()).unsqueeze(1).float() / 127.5 - 1


def fit(
    model: CNN, pixels: Tensor, labels: Tensor, loop: LoopConfig, folder: Path, trained: nn.Module | None = None
) -> None:
    """Train `trained` (default: all of `model`) with cross-entropy over the model's outputs."""

    def loss_of_part(part: Part) -> tuple[Tensor, Metrics]:
        return F.cross_entropy(model(pixels[part.indices]), labels[part.indices]), {}

    train(trained or model, loss_of_part, loop, folder, len(labels))


@torch.no_grad()
def predict(model: CNN, pixels: Tensor) -> Tensor:
    """Most likely output of each of (n, 1, 28, 28)."""
    return torch.cat([model(part).argmax(1) for part in pixels.split(500)])


def baselines(
    data: LabelledImages, test: LabelledImages, first: int, steps: int, seed: int, work: Path
) -> dict[str, tuple[Tensor, Tensor]]:
    """Predictions on `test` after both tasks, by method; the first task are the classes below `first`."""
    loop = replace(LOOP, steps=steps, seed=seed)
    pixels, labels, pictures = pixels_of(data), torch.from_numpy(data.labels), pixels_of(test)
    old = labels < first
    total = len(data.class_names)

    torch.manual_seed(seed)
    model = CNN(first)
    fit(model, pixels[old], labels[old], loop, work / "first")
    after_first, body = predict(model, pictures), {k: v.clone() for k, v in model.body.state_dict().items()}
    first_head = model.head.weight.detach().clone()

    model.head = _head(torch.cat((first_head, torch.zeros(total - first, HIDDEN))))
    fit(model, pixels[~old], labels[~old], loop, work / "fine-tuned")
    fine_tuned = predict(model, pictures)

    model.body.load_state_dict(body)
    model.body.requires_grad_(False)
    model.head = _head(torch.zeros(total - first, HIDDEN))
    fit(model, pixels[~old], labels[~old] - first, loop, work / "cwr", trained=model.head)
    heads = [head - head.mean() for head in (first_head, model.head.weight.detach())]
    model.head = _head(torch.cat(heads))
    return {"fine-tuning": (after_first, fine_tuned), "CWR": (after_first, predict(model, pictures))}


def _head(weight: Tensor) -> nn.Linear:
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    head.weight.data.copy_(weight)
    return head
