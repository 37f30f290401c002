"""Models known by name: the public ImageNet ones, fetched from the Hub, and the small ones bundled with varlik.

A preset says what a model is made of and where its files lie. Loading is the business of `checkpoints.py`.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open

from varlik.models.config import Preprocessing, VARConfig, VQVAEConfig, from_metadata
from varlik.models.var import VAR

SCHEDULES = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}
"""`patch_nums` of the public models, by resolution in pixels. (No weights are public for the last.)"""

VAR_FILE, VQVAE_FILE = "var.safetensors", "vqvae.safetensors"
CALIBRATION_FILE = "calibration.safetensors"
PUBLIC_VQVAE_REPO, PUBLIC_VQVAE_FILE = "FoundationVision/var", "vae_ch160v4096z32.pth"

_HERE = Path(__file__).parent
BUNDLED = _HERE / "bundled"
"""Where the bundled models lie, a folder each."""
_CLASS_FILE = _HERE / "imagenet_classes.txt"


@dataclass(frozen=True)
class Preset:
    """A model that has a name.

    A bundled one lies in `folder`; for another `folder` is None, and `repo_id` and `vqvae_repo_id` name the Hub
    repositories of `var_file` and `vqvae_file`.
    """

    name: str
    description: str
    var: VARConfig
    vqvae: VQVAEConfig
    preprocessing: Preprocessing
    licence: str
    repo_id: str | None = None
    var_file: str = VAR_FILE
    vqvae_repo_id: str | None = None
    vqvae_file: str = VQVAE_FILE
    folder: Path | None = None

    @property
    def bundled(self) -> bool:
        """Whether the model comes with varlik, so that it needs no network."""
        return self.folder is not None


@dataclass(frozen=True)
class Description:
    """What a file of ours says about the model it belongs to."""

    var: VARConfig
    vqvae: VQVAEConfig
    class_names: tuple[str, ...]
    preprocessing: Preprocessing


def list_models(pattern: str = "*") -> list[str]:
    """Sorted names of the models that match a shell pattern such as "var-*"."""
    return sorted(name for name in (*_public(), *_bundled()) if fnmatch.fnmatchcase(name, pattern))


def get_preset(name: str) -> Preset:
    """The preset of that name. Raises `ValueError` with close matches for an unknown one."""
    if name in _public():
        return _public()[name]
    if name in _bundled():
        return _read_bundled(name, BUNDLED / name)
    raise ValueError(f"unknown model {name!r}: {suggest(name)}")


def suggest(name: str) -> str:
    """The end of a message about an unknown name: what was meant, or else what there is."""
    known = list_models()
    close = difflib.get_close_matches(name.lower(), known)
    return f"did you mean {' or '.join(close)}?" if close else f"known models are {', '.join(known)}"


def bundled_folder(name: str) -> Path:
    """Folder of a bundled model. Raises `ValueError` for a model that is not bundled."""
    if name not in _bundled():
        raise ValueError(f"model {name!r} is not bundled: the bundled ones are {', '.join(_bundled()) or 'none'}")
    return BUNDLED / name


def num_parameters(config: VARConfig) -> int:
    """Number of parameters of a transformer. Allocates nothing."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in VAR(config).parameters())


def imagenet_class_names() -> tuple[str, ...]:
    """The 1000 names of the ImageNet classes, in label order; all differ."""
    return tuple(name for _, name in _imagenet_classes())


def imagenet_synset_ids() -> tuple[str, ...]:
    """The 1000 WordNet ids of the ImageNet classes, such as "n01440764", in label order."""
    return tuple(synset for synset, _ in _imagenet_classes())


def describe(metadata: Mapping[str, str]) -> Description:
    """What the metadata of a safetensors file of ours says.

    Where it is silent: ImageNet's names for 1000 classes, numbers for any other count; ImageNet's preprocessing.
    Raises `ValueError` for keys that are absent, unreadable or at odds with each other.
    """
    try:
        var, vqvae = from_metadata(metadata)
        names = tuple(map(str, json.loads(metadata["class_names"]))) if "class_names" in metadata else None
        fields = json.loads(metadata["preprocessing"]) if "preprocessing" in metadata else None
        preprocessing = Preprocessing(**fields) if fields else default_preprocessing(vqvae)
    except TypeError as error:  # a value of the wrong kind, such as text for a number
        raise ValueError(f"metadata cannot be understood: {error}") from error
    names = default_class_names(var.num_classes) if names is None else names
    if len(names) != var.num_classes:
        raise ValueError(f"metadata has {len(names)} class_names for {var.num_classes} classes")
    if (preprocessing.resolution, preprocessing.channels) != (vqvae.resolution, vqvae.in_channels):
        raise ValueError(
            f"metadata has preprocessing to {preprocessing.channels} channels of {preprocessing.resolution} pixels a "
            f"side, but the VQ-VAE takes {vqvae.in_channels} of {vqvae.resolution}"
        )
    return Description(var, vqvae, names, preprocessing)


def default_class_names(num_classes: int) -> tuple[str, ...]:
    """ImageNet's names for 1000 classes, numbers for any other count."""
    return imagenet_class_names() if num_classes == 1000 else tuple(map(str, range(num_classes)))


def default_preprocessing(vqvae: VQVAEConfig) -> Preprocessing:
    """ImageNet's preprocessing, to the size and channels that the VQ-VAE takes."""
    return Preprocessing.imagenet(vqvae.resolution, channels=vqvae.in_channels)


@cache
def _public() -> dict[str, Preset]:
    presets = [_imagenet(depth) for depth in (16, 20, 24, 30)] + [_imagenet(36, resolution=512)]
    presets += [_imagenet(depth, cca=True) for depth in (16, 20, 24, 30)]
    return {preset.name: preset for preset in presets}


def _imagenet(depth: int, resolution: int = 256, cca: bool = False) -> Preset:
    schedule = SCHEDULES[resolution]
    # The 512-pixel model alone shares one AdaLN projection between its blocks.
    var = VARConfig(depth, 64 * depth, depth, schedule, shared_aln=resolution == 512)
    return Preset(
        name=f"var-d{depth}-cca" if cca else f"var-d{depth}",
        description=f"ImageNet, {resolution} pixels, depth {depth}" + (", fine-tuned with CCA" if cca else ""),
        var=var,
        vqvae=VQVAEConfig(patch_nums=schedule),
        preprocessing=Preprocessing.imagenet(resolution),
        licence="MIT",
        repo_id="ChenDRAG/CCA_VAR" if cca else "FoundationVision/var",
        var_file=f"CCA_VAR_Guidance_Free/VAR_d{depth}_CCA.pth" if cca else f"var_d{depth}.pth",
        vqvae_repo_id=PUBLIC_VQVAE_REPO,
        vqvae_file=PUBLIC_VQVAE_FILE,
    )


def _bundled() -> list[str]:
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{VAR_FILE}"))


def _read_bundled(name: str, folder: Path) -> Preset:
    with safe_open(str(folder / VAR_FILE), "pt") as file:
        about = describe(file.metadata() or {})
    var, preprocessing = about.var, about.preprocessing
    colours = "RGB" if preprocessing.channels == 3 else "greyscale"
    return Preset(
        name=name,
        description=f"{var.num_classes} classes, {preprocessing.resolution} pixels {colours}, depth {var.depth}",
        var=var,
        vqvae=about.vqvae,
        preprocessing=preprocessing,
        licence="MIT",
        folder=folder,
    )


@cache
def _imagenet_classes() -> tuple[tuple[str, str], ...]:
    lines = _CLASS_FILE.read_text(encoding="utf-8").splitlines()
    return tuple((line[:9], line[10:]) for line in lines if line and not line.startswith("#"))
