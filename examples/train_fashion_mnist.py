"""Train the bundled model `fashion-mnist` from the data set to the files in the package.

    python examples/train_fashion_mnist.py --work runs/fashion-mnist            # about two and a half hours of one
    CPU core python examples/train_fashion_mnist.py --work runs/fashion-mnist --data FOLDER_WITH_IDX_FILES

Needs Debian's `dataset-fashion-mnist`, or a folder with the four IDX files. Stages that are done are skipped and a
killed run goes on where it was, so the command can be repeated until it prints the folder it wrote. `--out` names
another one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from varlik import images
from varlik.classifier import load
from varlik.datasets import LabelledImages, fashion_mnist
from varlik.evaluation.doctor import write_fixture
from varlik.models import checkpoints
from varlik.models.config import Preprocessing, VARConfig, VQVAEConfig
from varlik.models.presets import BUNDLED
from varlik.training.loop import LoopConfig
from varlik.training.var import contrast_var, feature_maps, train_var
from varlik.training.vqvae import train_vqvae

NAME = "fashion-mnist"
PREPROCESSING = Preprocessing(resize=28, crop=28, padding=2, channels=1)
PATCH_NUMS = (1, 2, 3, 4, 6, 8)
VQVAE_CONFIG = VQVAEConfig(
    channels=16,
    channel_multipliers=(1, 2, 2),
    num_res_blocks=1,
    num_groups=8,
    in_channels=1,
    attention="mid only",
    codebook_dim=16,
    vocab_size=256,
    patch_nums=PATCH_NUMS,
)
VQVAE_LOOP = LoopConfig(
    steps=3500, batch_size=32, learning_rate=2e-3, warmup=100, weight_decay=0.01, clip=1.0, log_every=25
)
VAR_CONFIG = VARConfig(
    depth=5, embed_dim=128, num_heads=4, patch_nums=PATCH_NUMS, vocab_size=256, codebook_dim=16, num_classes=10
)
VAR_LOOP = LoopConfig(
    steps=8_000,
    stop=5_250,
    batch_size=32,
    learning_rate=3e-3,
    muon_rate=4e-3,
    hold=0.3,
    average=0.999,
    checkpoint_every=250,
)
CONTRAST_LOOP = LoopConfig(
    steps=2_600,
    stop=2_250,
    batch_size=16,
    learning_rate=1.5e-3,
    muon_rate=2e-3,
    warmup=50,
    average=0.998,
    seed=1,
    checkpoint_every=250,
)
SAMPLES = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and metrics")
    parser.add_argument("--data", type=Path, help="folder with the IDX files")
    parser.add_argument("--out", type=Path, help="where the model goes (default: into the package)")
    parser.add_argument(
        "--eager", action="store_true", help="do not compile the training step (slower, needs no C++ compiler)"
    )
    options = parser.parse_args()

    training = fashion_mnist("train", options.data)
    pixels = pixels_of(training)
    vqvae = train_vqvae(pixels, VQVAE_CONFIG, VQVAE_LOOP, options.work / "vqvae")
    features = feature_maps(vqvae, pixels)
    labels = torch.from_numpy(training.labels)
    var = train_var(
        features, labels, vqvae.quantize, VAR_CONFIG, VAR_LOOP, options.work / "var", compiled=not options.eager
    )
    var = contrast_var(
        var, features, labels, vqvae.quantize, CONTRAST_LOOP, options.work / "contrast", compiled=not options.eager
    )
    out = options.out or BUNDLED / NAME
    checkpoints.save(out, var, vqvae, training.class_names, PREPROCESSING, dtype=torch.float32)
    if options.out is None:
        write_samples(fashion_mnist("test", options.data)[:SAMPLES], out / "samples")
        write_fixture(load(NAME, device="cpu"), NAME)
    print(f"wrote {out}")


def pixels_of(data: LabelledImages) -> Tensor:
    """(n, 1, 32, 32) in [-1, 1]."""
    return images.load_many(data.images[..., None], PREPROCESSING)


def write_samples(data: LabelledImages, folder: Path) -> None:
    """The first test pictures as they come, not picked."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = {}
    for i, (image, label) in enumerate(zip(data.images, data.labels.tolist(), strict=True)):
        name = f"test_{i:02d}.png"
        Image.fromarray(image).save(folder / name)
        labels[name] = label
    (folder / "labels.json").write_text(json.dumps(labels, indent=1) + "\n")


if __name__ == "__main__":
    main()
