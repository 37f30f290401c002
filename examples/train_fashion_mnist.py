"""Train the bundled model `fashion-mnist` from the data set to the files in the package.

    python -m examples.train_fashion_mnist --work runs/fashion-mnist        # about two and a half hours of one CPU core
    python -m examples.train_fashion_mnist --work runs/fashion-mnist --data FOLDER_WITH_IDX_FILES

Needs Debian's `dataset-fashion-mnist`, or a folder with the four IDX files. Stages that are done are skipped and a
killed run goes on where it was, so the command can be repeated until it prints the folder it wrote. `--out` names
another one.
"""

from __future__ import annotations

from examples import recipe
from varlik.datasets import fashion_mnist
from varlik.models.config import Preprocessing, VARConfig, VQVAEConfig
from varlik.training.loop import LoopConfig

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
RECIPE = recipe.Recipe(
    name="fashion-mnist",
    data=fashion_mnist,
    preprocessing=PREPROCESSING,
    vqvae=VQVAE_CONFIG,
    vqvae_loop=VQVAE_LOOP,
    var=VAR_CONFIG,
    var_loop=VAR_LOOP,
    contrast_loop=CONTRAST_LOOP,
    samples=slice(12),
)

if __name__ == "__main__":
    recipe.main(RECIPE, __doc__.splitlines()[0])
