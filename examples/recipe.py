"""What the training scripts of bundled models share: from labelled images to the files in the package."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from varlik import images
from varlik.classifier import load
from varlik.datasets import LabelledImages, Split
from varlik.evaluation.doctor import write_fixture
from varlik.models import checkpoints
from varlik.models.config import Preprocessing, VARConfig, VQVAEConfig
from varlik.models.presets import BUNDLED
from varlik.models.var import VAR
from varlik.models.vqvae import VQVAE
from varlik.training.data import TrainingTokens
from varlik.training.loop import LoopConfig
from varlik.training.var import contrast_var, feature_maps, train_var
from varlik.training.vqvae import train_vqvae


@dataclass(frozen=True)
class Recipe:
    """A bundled model: its data, its parts and how long each stage trains.

    `data(split, folder)` reads a split, `samples` picks the test pictures that are bundled. Without `contrast_loop`
    training ends with the likelihood.
    """

    name: str
    data: Callable[[Split, Path | None], LabelledImages]
    preprocessing: Preprocessing
    vqvae: VQVAEConfig
    vqvae_loop: LoopConfig
    var: VARConfig
    var_loop: LoopConfig
    samples: slice
    contrast_loop: LoopConfig | None = None


def main(recipe: Recipe, description: str) -> None:
    """The command line of a training script."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and metrics")
    parser.add_argument("--data", type=Path, help="folder with the data set's files")
    parser.add_argument("--out", type=Path, help="where the model goes (default: into the package)")
    parser.add_argument(
        "--eager", action="store_true", help="do not compile the training step (slower, needs no C++ compiler)"
    )
    options = parser.parse_args()
    train(recipe, options.work, options.data, options.out, compiled=not options.eager)


def train(recipe: Recipe, work: Path, folder: Path | None, out: Path | None, compiled: bool) -> None:
    """Run all stages and write the model to `out`, by default into the package, with sample pictures and fixture."""
    training = recipe.data("train", folder)
    pixels = pixels_of(training, recipe.preprocessing)
    vqvae = train_vqvae(pixels, recipe.vqvae, recipe.vqvae_loop, work / "vqvae")
    labels = torch.from_numpy(training.labels)
    data = TrainingTokens.from_features(feature_maps(vqvae, pixels), labels, vqvae.quantize, training.class_names)
    del pixels
    var = train_var(data, recipe.var, recipe.var_loop, work / "var", compiled=compiled)
    if recipe.contrast_loop:
        var = contrast_var(var, data, recipe.contrast_loop, work / "contrast", compiled=compiled)
    target = out or BUNDLED / recipe.name
    checkpoints.save(target, var, vqvae, training.class_names, recipe.preprocessing, dtype=torch.float32)
    if out is None:
        write_samples(recipe.data("test", folder)[recipe.samples], target / "samples")
        write_fixture(load(recipe.name, device="cpu"), recipe.name)
    print(f"wrote {target}")


def pixels_of(data: LabelledImages, preprocessing: Preprocessing) -> Tensor:
    """(n, 1, S, S) in [-1, 1]."""
    return images.load_many(data.images[..., None], preprocessing)


def scoring_parameters(var: VAR, vqvae: VQVAE) -> int:
    """Of all that an image goes through when it is classified: the VQ-VAE without its decoder, and the transformer."""
    parts = (var, vqvae.encoder, vqvae.quant_conv, vqvae.quantize)
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


def write_samples(data: LabelledImages, folder: Path) -> None:
    """Test pictures as they come, not picked."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = {}
    for i, (image, label) in enumerate(zip(data.images, data.labels.tolist(), strict=True)):
        name = f"test_{i:02d}.png"
        Image.fromarray(image).save(folder / name)
        labels[name] = label
    (folder / "labels.json").write_text(json.dumps(labels, indent=1) + "\n")
