"""Train the bundled model `glyphs-100` from the rendered data set to the files in the package.

    python -m examples.glyphs_100 --out data/glyphs-100          # render it first
    python -m examples.train_glyphs_100 --work runs/glyphs-100 --data data/glyphs-100    # 40 minutes of one CPU core

Stages that are done are skipped and a killed run goes on where it was, so the command can be repeated until it prints
the folder it wrote. `--out` names another one.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from examples import recipe
from examples import train_fashion_mnist as fashion
from varlik.datasets import LabelledImages, Split, glyphs_100
from varlik.models.config import Preprocessing
from varlik.training.loop import LoopConfig


def data(split: Split, folder: Path | None) -> LabelledImages:
    if folder is None:
        raise SystemExit("--data: name the folder that examples/glyphs_100.py wrote to")
    return glyphs_100(split, folder)


# No class contrast: with a hundred classes its record of mistaken ones stays too even to find the hard pairs.
VAR_LOOP = LoopConfig(
    steps=3_400,
    batch_size=32,
    learning_rate=3e-3,
    muon_rate=4e-3,
    hold=0.3,
    average=0.998,
    checkpoint_every=250,
)
RECIPE = recipe.Recipe(
    name="glyphs-100",
    data=data,
    preprocessing=Preprocessing(resize=32, crop=32, padding=0, channels=1),
    vqvae=fashion.VQVAE_CONFIG,
    vqvae_loop=replace(fashion.VQVAE_LOOP, steps=2000),
    var=replace(fashion.VAR_CONFIG, num_classes=100),
    var_loop=VAR_LOOP,
    samples=slice(7, 1900, 97),  # one of each of twenty faces, another character each
)

if __name__ == "__main__":
    recipe.main(RECIPE, __doc__.splitlines()[0])
