"""Weights from files, folders and the Hub into modules, and back into files that describe themselves.

A folder of ours holds `var.safetensors` and `vqvae.safetensors`; the metadata of each says what the pair is made of
(see `config.to_metadata`), what the classes are called and how pictures are prepared. Published files carry none: their
configuration is that of the preset, or is read off their tensors.

No file is ever unpickled with code execution, and one that does not fit is refused with the tensors that differ.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from varlik.models import presets, weights
from varlik.models.config import Preprocessing, VARConfig, VQVAEConfig, to_metadata
from varlik.models.presets import (
    CALIBRATION_FILE,
    PUBLIC_VQVAE_FILE,
    PUBLIC_VQVAE_REPO,
    VAR_FILE,
    VQVAE_FILE,
    Description,
    Preset,
)
from varlik.models.var import VAR
from varlik.models.vqvae import VQVAE
from varlik.models.weights import AUTOENCODER, TRANSFORMER, CheckpointError

__all__ = ["Checkpoint", "CheckpointError", "convert", "load_models", "save"]

_SUFFIXES = (".safetensors", ".pth", ".pt")


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model: float32 modules on the CPU in eval mode, and what is needed to use them.

    `calibration` is a file of that kind beside the transformer, if there is one.
    """

    var: VAR
    vqvae: VQVAE
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    name: str
    calibration: Path | None = None

    @property
    def null_class(self) -> int:
        """The label that means "unconditional"."""
        return self.var.config.null_class


@dataclass(frozen=True)
class _Files:
    """Where a model lies. `vqvae` is None where that depends on what is in `var`; users' own files have no `preset`."""

    name: str
    var: Path
    vqvae: Path | None
    preset: Preset | None = None


def load_models(source: str | Path, vqvae: str | Path | None = None) -> Checkpoint:
    """Load a VAR transformer and its VQ-VAE.

    `source` is, in this order: an existing folder with `var.safetensors` and `vqvae.safetensors`, or an existing
    `.safetensors`, `.pth` or `.pt` file of the transformer; a name from `presets.list_models()`; a Hub repository
    "org/name" that holds those two files. `vqvae` is a file, and goes before any other place a VQ-VAE could come from;
    without it, that of a single file is taken from the file itself, from beside it, or from the Hub.

    Raises `FileNotFoundError` when a file is neither here nor to be had from the Hub, `CheckpointError` when one does
    not fit, `ValueError` for a name nobody knows.
    """
    files = _locate(source, None if vqvae is None else _existing(Path(vqvae).expanduser(), VQVAE_FILE))
    contents = weights.read(files.var)
    tensors = weights.state_dict(contents, TRANSFORMER)
    about = _described(contents)
    var = _load_var(tensors, about, files)

    if files.vqvae is None and weights.holds(contents, AUTOENCODER):  # a training run keeps both in one file
        vqvae_contents = contents
    else:
        public = about is None or about.vqvae == VQVAEConfig(patch_nums=about.var.patch_nums)
        vqvae_contents = weights.read(files.vqvae or _find_vqvae(files, var.config, public))
    vqvae_tensors = weights.state_dict(vqvae_contents, AUTOENCODER)
    _check_codebooks(tensors, files.var, vqvae_tensors, vqvae_contents.path)
    vqvae_about = _described(vqvae_contents)
    if about is None and vqvae_about is not None and vqvae_about.var == var.config:
        about = vqvae_about
    own = vqvae_about or files.preset or about
    autoencoder = _load_vqvae(vqvae_tensors, own.vqvae if own else None, var.config, files, vqvae_contents.path)

    names = about.class_names if about else presets.default_class_names(var.config.num_classes)
    preprocessing = about.preprocessing if about else presets.default_preprocessing(autoencoder.config)
    takes = (autoencoder.config.resolution, autoencoder.config.in_channels)
    if (preprocessing.resolution, preprocessing.channels) != takes:
        raise CheckpointError(
            f"{vqvae_contents.path} takes {takes[1]} channels of {takes[0]} pixels a side, but {files.var} was made "
            f"for {preprocessing.channels} channels of {preprocessing.resolution}"
        )
    calibration = files.var.parent / CALIBRATION_FILE
    beside = calibration if calibration.is_file() else None
    return Checkpoint(var, autoencoder, names, preprocessing, files.name, beside)


def save(
    folder: str | Path,
    var: VAR,
    vqvae: VQVAE,
    class_names: Sequence[str],
    preprocessing: Preprocessing,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write both modules into `folder` as files that `load_models` reads; nobody ever sees a file half written.

    Raises `ValueError` when the parts do not belong together, or a weight is not finite in `dtype`, which is float32,
    bfloat16 or float16.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    for field in ("patch_nums", "vocab_size", "codebook_dim"):
        ours, theirs = getattr(var.config, field), getattr(vqvae.config, field)
        if ours != theirs:
            raise ValueError(f"vqvae: {field} is {theirs}, the transformer's is {ours}")
    metadata = to_metadata(var.config, vqvae.config)
    metadata["class_names"] = json.dumps(list(class_names))
    metadata["preprocessing"] = json.dumps(dataclasses.asdict(preprocessing))
    presets.describe(metadata)  # what would not load is not written
    states = {VAR_FILE: _storable(var, dtype), VQVAE_FILE: _storable(vqvae, dtype)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = {name: folder / f".{name}.{os.getpid()}.tmp" for name in states}
    try:
        for name, state in states.items():
            written[name].touch()
            mode = written[name].stat().st_mode  # safetensors makes files only their owner can read
            save_file(state, written[name], metadata)
            written[name].chmod(mode)
        for name in states:
            os.replace(written[name], folder / name)
    finally:
        for path in written.values():
            path.unlink(missing_ok=True)


def convert(
    source: str | Path, folder: str | Path, vqvae: str | Path | None = None, dtype: torch.dtype = torch.float32
) -> None:
    """Load `source` as `load_models` does and `save` it in `folder`."""
    loaded = load_models(source, vqvae)
    save(folder, loaded.var, loaded.vqvae, loaded.class_names, loaded.preprocessing, dtype)


def _locate(source: str | Path, vqvae: Path | None) -> _Files:
    path = Path(source).expanduser()
    if path.is_dir():
        return _Files(path.resolve().name, _existing(path, VAR_FILE), vqvae or _existing(path, VQVAE_FILE))
    if path.exists():
        return _Files(path.stem, path, vqvae)
    text = str(source)
    if isinstance(source, Path) or text.endswith(_SUFFIXES) or text.startswith((".", "~")) or path.is_absolute():
        raise FileNotFoundError(f"{source}: no such file or folder")
    if text in presets.list_models():
        preset = presets.get_preset(text)
        if preset.folder is not None:
            return _Files(text, preset.folder / VAR_FILE, vqvae or preset.folder / VQVAE_FILE)
        if preset.repo_id is None or preset.vqvae_repo_id is None:
            raise ValueError(f"preset {text} has neither a folder nor a Hub repository")
        var = _download(preset.repo_id, preset.var_file, text)
        return _Files(text, var, vqvae or _download(preset.vqvae_repo_id, preset.vqvae_file, text), preset)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        several = [name for name in presets.list_models() if presets.get_preset(name).repo_id == text]
        if several:
            raise ValueError(f"source: {text} holds several models; pass a name instead: {', '.join(several)}")
        return _Files(text, _download(text, VAR_FILE, text), vqvae or _download(text, VQVAE_FILE, text))
    raise ValueError(
        f"source: {text!r} is no file or folder here, no model varlik knows by name and no Hub repository (org/name); "
        f"{presets.suggest(text)}"
    )


def _existing(path: Path, inside: str) -> Path:
    """`path` itself, or the file `inside` it if it is a folder."""
    file = path / inside if path.is_dir() else path
    if not file.is_file():
        named = path.name in presets.list_models()
        hint = f" (a folder goes before a model of its name: to get {path.name}, run this elsewhere)" if named else ""
        raise FileNotFoundError(f"{file}: no such file{hint}")
    return file


def _find_vqvae(files: _Files, var: VARConfig, public: bool) -> Path:
    """The VQ-VAE of a single transformer file; from the Hub only if that is compatible with the `public` one."""
    for name in (VQVAE_FILE, PUBLIC_VQVAE_FILE):
        if (files.var.parent / name).is_file():
            return files.var.parent / name
    codebook = (VQVAEConfig.vocab_size, VQVAEConfig.codebook_dim)
    if public and (var.vocab_size, var.codebook_dim) == codebook and var.patch_nums in presets.SCHEDULES.values():
        return _download(PUBLIC_VQVAE_REPO, PUBLIC_VQVAE_FILE, files.name)
    raise FileNotFoundError(
        f"{files.var}: its VQ-VAE is not beside it (as {VQVAE_FILE} or {PUBLIC_VQVAE_FILE}), and is not that of the "
        "public ImageNet models; name its file with vqvae="
    )


def _download(repo_id: str, file: str, model: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    wanted = f"model {model} needs {file} of the Hub repository {repo_id}"
    if model == repo_id:
        wanted = f"no folder {repo_id} is here, and {wanted}"
    try:
        return Path(huggingface_hub.hf_hub_download(repo_id, file))
    except errors.LocalEntryNotFoundError as error:
        command, path = _by_hand(repo_id, file, model)
        raise FileNotFoundError(
            f"{wanted}, which is not in the local cache, and the Hub cannot be reached. Where there is a network run\n"
            f"  {command}\nand pass {path} here."
        ) from error
    except errors.GatedRepoError as error:
        raise FileNotFoundError(f"{wanted}, which asks for its terms to be accepted and for `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{wanted}, but there is no such public repository. For a private one, run `hf auth login` first; for a "
            f"model by name, {presets.suggest(model)}"
        ) from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(f"{wanted}, which holds no such file") from error
    except errors.HFValidationError as error:
        raise ValueError(f"source: {repo_id} is no file or folder here, and no name the Hub allows: {error}") from error


def _by_hand(repo_id: str, file: str, model: str) -> tuple[str, str]:
    """Command that fetches a model where there is a network, and what to pass where there is none."""
    if model == repo_id:
        return f"hf download {repo_id} {VAR_FILE} {VQVAE_FILE} --local-dir FOLDER", "FOLDER"
    vqvae = f"hf download {PUBLIC_VQVAE_REPO} {PUBLIC_VQVAE_FILE} --local-dir "
    if file == PUBLIC_VQVAE_FILE:
        return f"{vqvae}FOLDER", f"vqvae=FOLDER/{file}"
    path = Path("FOLDER") / file
    # The VQ-VAE goes beside the transformer, where it is found.
    return f"hf download {repo_id} {file} --local-dir FOLDER && {vqvae}{path.parent.as_posix()}", path.as_posix()


def _load_var(tensors: Mapping[str, Tensor], about: Description | None, files: _Files) -> VAR:
    if files.preset is not None:
        config, model = files.preset.var, files.name
    elif about is not None:
        config, model = about.var, "its metadata"
    else:
        config = weights.infer_var(tensors, files.var)
        model = f"a transformer of depth {config.depth}"
    _check_depth(tensors, config, files, model)
    with torch.device("meta"):  # nothing is initialised in vain
        var = VAR(config)
    weights.fill(var, tensors, files.var, model)
    return var


def _load_vqvae(
    tensors: Mapping[str, Tensor], config: VQVAEConfig | None, var: VARConfig, files: _Files, path: Path
) -> VQVAE:
    config = config or weights.infer_vqvae(tensors, path)
    if config.in_channels not in (1, 3):
        raise CheckpointError(f"{path} takes images of {config.in_channels} channels: expected 1 or 3")
    # The tensors of a VQ-VAE do not depend on the scales, so one file may serve several transformers: theirs decide.
    config = dataclasses.replace(config, patch_nums=var.patch_nums)
    with torch.device("meta"):
        vqvae = VQVAE(config, decoder=any(name.startswith(("decoder.", "post_quant_conv.")) for name in tensors))
    weights.fill(vqvae, tensors, path, f"the VQ-VAE of {files.name}")
    return vqvae


def _described(contents: weights.Contents) -> Description | None:
    """What our metadata says; None for a file of others, which may carry metadata of its own."""
    if "depth" not in contents.metadata and "embed_dim" not in contents.metadata:
        return None
    try:
        return presets.describe(contents.metadata)
    except ValueError as error:
        raise CheckpointError(f"{contents.path}: {error}") from error


def _check_depth(tensors: Mapping[str, Tensor], config: VARConfig, files: _Files, model: str) -> None:
    depth, schedule = weights.num_blocks(tensors), weights.schedule(tensors)
    if depth != config.depth:
        cca = files.name.endswith("-cca")
        public = [presets.get_preset(name) for name in presets.list_models("var-*")]
        meant = [p.name for p in public if p.var.depth == depth and p.name.endswith("-cca") == cca]
        hint = f": did you mean {meant[0]}?" if meant and files.preset else ""
        raise CheckpointError(f"{files.var}: the file has {depth} blocks, {model} has {config.depth}{hint}")
    if schedule not in (None, config.patch_nums):
        raise CheckpointError(f"{files.var}: the file has scales {schedule}, {model} has {config.patch_nums}")


def _check_codebooks(var: Mapping[str, Tensor], var_path: Path, vqvae: Mapping[str, Tensor], vqvae_path: Path) -> None:
    """A transformer and a VQ-VAE that do not speak of the same codes are a wrong pair, whatever else fits."""
    try:
        reads = (var["head.weight"].shape[0], var["word_embed.weight"].shape[1])
        codes = tuple(vqvae["quantize.embedding.weight"].shape)
    except (KeyError, IndexError):
        return  # named later, among the missing or differing tensors
    if reads != codes:
        raise CheckpointError(
            f"{var_path} reads {reads[0]} codes of {reads[1]} numbers, but the codebook in {vqvae_path} has shape "
            f"{codes}: they do not belong together"
        )


def _storable(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of `module` in `dtype`; refuses those that overflow."""
    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in module.state_dict().items()}
    if bad := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise CheckpointError(f"{type(module).__name__}: not finite as {dtype}: {weights.some(bad)}")
    return state
