"""A VQ-VAE that has no transformer yet, as a file that describes itself."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from varlik.models import checkpoints, weights
from varlik.models.config import Preprocessing, VQVAEConfig
from varlik.models.presets import VAR_FILE, VQVAE_FILE
from varlik.models.vqvae import VQVAE


def save_vqvae(folder: str | Path, model: VQVAE, preprocessing: Preprocessing) -> None:
    """Write `model` and what it is made of into `folder`; nobody ever sees a file half written."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"vqvae": json.dumps(asdict(model.config)), "preprocessing": json.dumps(asdict(preprocessing))}
    partial = folder / f"{VQVAE_FILE}.partial"
    save_file({name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}, partial, metadata)
    partial.replace(folder / VQVAE_FILE)


def load_vqvae(source: str | Path) -> tuple[VQVAE, Preprocessing]:
    """A VQ-VAE that `save_vqvae` wrote, by folder or file, or that of any model that `varlik.load` takes.

    It is in eval mode on the CPU, and comes with its preprocessing. Raises as `checkpoints.load_models`.
    """
    path = Path(source).expanduser()
    file = path / VQVAE_FILE if path.is_dir() and not (path / VAR_FILE).exists() else path
    contents = weights.read(file) if file.is_file() and file.suffix == ".safetensors" else None
    if contents is None or "vqvae" not in contents.metadata:
        loaded = checkpoints.load_models(source)
        return loaded.vqvae, loaded.preprocessing
    try:
        stored = json.loads(contents.metadata["vqvae"]).items()
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in stored}
        config = VQVAEConfig(**fields)
        preprocessing = Preprocessing(**json.loads(contents.metadata["preprocessing"]))
    except (KeyError, TypeError, ValueError) as error:
        raise checkpoints.CheckpointError(f"{file}: metadata cannot be understood: {error}") from error
    with torch.device("meta"):
        model = VQVAE(config)
    weights.fill(model, contents.tree, file, "the VQ-VAE of its metadata")
    return model, preprocessing
