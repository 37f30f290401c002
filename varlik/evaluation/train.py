"""The training commands: a VQ-VAE, a VAR transformer, its fine-tuning by CCA, new classes for it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varlik.classifier import VARClassifier
from varlik.evaluation.pictures import class_index
from varlik.evaluation.training_run import Names, Run, Trained, images_of
from varlik.models import checkpoints
from varlik.models.checkpoints import Checkpoint
from varlik.models.presets import get_preset
from varlik.training import distributed
from varlik.training.cca import PRESETS, train_cca
from varlik.training.incremental import CHANGES, Change, extend, train_incremental
from varlik.training.loop import LoopConfig
from varlik.training.pixels import Pixels
from varlik.training.var import train_var
from varlik.training.vqvae import train_vqvae
from varlik.training.vqvae_file import load_vqvae, save_vqvae

VQVAE_LOOP = LoopConfig(steps=3500, batch_size=32, learning_rate=2e-3, warmup=100, weight_decay=0.01, clip=1.0)
VAR_LOOP = LoopConfig(steps=8000, batch_size=32, learning_rate=1e-3, average=0.999)
_NEW_CLASSES = LoopConfig(steps=1000, batch_size=32, learning_rate=1e-2, warmup=50, hold=0.3, average=0.99)
INCREMENTAL_LOOPS: dict[Change, LoopConfig] = {
    "embeddings": _NEW_CLASSES,
    "adaln": _NEW_CLASSES,
    "all": replace(_NEW_CLASSES, learning_rate=1e-3),
}


def vqvae(run: Run, like: str, config: Path | None = None) -> Trained | None:
    """Train a VQ-VAE of the shape of the model `like`, changed by the JSON file `config`, and write it to `run.out`.

    The file may hold "vqvae" and "preprocessing", each with fields of `VQVAEConfig` and `Preprocessing`.
    Raises `ValueError` for a model or fields that there are not, and as `train_vqvae`.
    """
    folder, loop = run.stage("vqvae"), run.loop(VQVAE_LOOP)
    preset, changes = get_preset(like), _read_config(config)
    shape = _changed(preset.vqvae, changes.get("vqvae", {}), "vqvae")
    preprocessing = _changed(preset.preprocessing, changes.get("preprocessing", {}), "preprocessing")
    given, taken = (preprocessing.resolution, preprocessing.channels), (shape.resolution, shape.in_channels)
    if given != taken:
        raise ValueError(f"config: preprocessing gives (side, channels) {given}, but the VQ-VAE takes {taken}")
    pixels = Pixels(images_of(run.data), preprocessing, run.complain)
    model = train_vqvae(pixels, shape, loop, folder, device=run.device, quiet=run.quiet)
    return run.finish(loop, folder, lambda: save_vqvae(run.out, model, preprocessing))


def var(run: Run, vqvae: str, like: str, config: Path | None = None) -> Trained | None:
    """Train a VAR transformer on tokens of the VQ-VAE `vqvae`, and write the pair to `run.out`.

    Its shape is that of the model `like`, with the VQ-VAE's token maps and the data's classes, changed by "var" in the
    JSON file `config`, fields of `VARConfig`. Raises as `vqvae`, `load_vqvae` and `train_var`.
    """
    folder, loop = run.stage("var"), run.loop(VAR_LOOP)
    preset, changes = get_preset(like), _read_config(config)
    autoencoder, preprocessing = load_vqvae(vqvae)
    autoencoder.to(distributed.own_device(run.device))
    changes = changes.get("var", {})
    fixed = {name: getattr(autoencoder.config, name) for name in ("patch_nums", "vocab_size", "codebook_dim")}
    shape = _changed(replace(preset.var, **fixed), changes, "var")
    for name, value in fixed.items():
        if getattr(shape, name) != value:
            raise ValueError(f"config: var.{name}: expected {value} as of the VQ-VAE, got {getattr(shape, name)}")

    def classes(argument: str, names: Names, of_data: Names) -> tuple[Tensor, Names]:
        if (count := changes.get("num_classes", len(of_data))) != len(of_data):
            raise ValueError(f"config: var.num_classes: expected {len(of_data)} as of the data, got {count}")
        return _after((), argument, names, of_data)

    data, held_out = run.tokens(loop, autoencoder, preprocessing, classes)
    shape = replace(shape, num_classes=data.num_classes)
    model = train_var(data, shape, loop, folder, compiled=run.compiled, quiet=run.quiet, held_out=held_out)
    parts = (autoencoder, data.class_names, preprocessing)
    return run.finish(loop, folder, lambda: checkpoints.save(run.out, model, *parts))


def cca(
    run: Run, model: str, preset: str = "small", beta: float | None = None, weight: float | None = None
) -> Trained | None:
    """Fine-tune `model` by condition contrastive alignment on images of its classes, and write it to `run.out`.

    The settings are those of a `preset` of `varlik.training.cca`, with another `beta` or `weight` if given; several
    processes share its parts of a batch. Classes of the data are found in the model by their names. Raises `ValueError`
    for an unknown preset or class, and as `train_cca`.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    given = {name: value for name, value in (("beta", beta), ("weight", weight)) if value is not None}
    config = replace(PRESETS[preset].cca, **given)
    usual = PRESETS[preset].loop
    if run.changes.get("accumulate") is None:
        batch_size = run.changes.get("batch_size") or usual.batch_size
        accumulate = _parts_of_a_process(batch_size, usual.accumulate, distributed.world().size)
        usual = replace(usual, batch_size=batch_size, accumulate=accumulate)
    folder, loop = run.stage("cca"), run.loop(usual)
    start = _start(run, model)
    parts = (start.vqvae, start.class_names, start.preprocessing)
    classifier = VARClassifier(start.var, *parts, name=start.name)

    def classes(argument: str, names: Names, _: Names) -> tuple[Tensor, Names]:
        if names == start.class_names:
            return torch.arange(len(names)), names
        for name in names:
            if name.isdecimal() and name not in start.class_names:  # or it would be taken for an index
                raise ValueError(f"{argument}: expected classes of {start.name} by name, which knows no {name!r}")
        try:
            found = [class_index(classifier, name) for name in names]
        except ValueError as error:
            raise ValueError(f"{argument}: expected classes of the model; {error}") from error
        if len(set(found)) < len(found):
            raise ValueError(f"{argument}: two of {', '.join(names)} are one class of {start.name}")
        return torch.tensor(found), start.class_names

    data, held_out = run.tokens(loop, start.vqvae, start.preprocessing, classes)
    trained = train_cca(
        start.var, data, config, loop, folder, held_out=held_out, compiled=run.compiled, quiet=run.quiet
    )
    note = f"a calibration of {start.name} does not fit this model: run varlik calibrate"
    return run.finish(loop, folder, lambda: checkpoints.save(run.out, trained, *parts), (note,))


def incremental(run: Run, model: str, what: str = "embeddings") -> Trained | None:
    """Add the classes of the data to `model`, without images of its own, and write it to `run.out`.

    `what` may change: see `varlik.training.incremental`. Raises `ValueError` for a class that the model knows already,
    and as `train_incremental`.
    """
    if what not in CHANGES:
        raise ValueError(f"what: expected one of {', '.join(CHANGES)}, got {what!r}")
    folder, loop = run.stage("incremental"), run.loop(INCREMENTAL_LOOPS[what])
    start = _start(run, model)
    old = start.class_names
    known = {name.casefold() for name in old}

    def classes(argument: str, names: Names, of_data: Names) -> tuple[Tensor, Names]:
        if both := [name for name in names if name.casefold() in known]:
            raise ValueError(f"{argument}: expected new classes only, but {start.name} knows {', '.join(both)} already")
        return _after(old, argument, names, of_data)

    data, held_out = run.tokens(loop, start.vqvae, start.preprocessing, classes, old=len(old))
    trained = train_incremental(
        start.var, data, what, loop, folder, held_out=held_out, compiled=run.compiled, quiet=run.quiet
    )
    new = data.class_names[len(old) :]
    note = f"{len(new)} new classes after {len(old)} old ones; for all of them run varlik calibrate"
    return run.finish(loop, folder, lambda: extend(run.out, start, trained, new), (note,))


def _after(old: Names, argument: str, names: Names, of_data: Names) -> tuple[Tensor, Names]:
    """As `Classes`: the data's come after the `old` ones, in their order; what is held out may have fewer of them."""
    if unknown := [name for name in names if name not in of_data]:
        raise ValueError(f"{argument}: expected classes of the data, got {', '.join(unknown)}")
    return torch.tensor([len(old) + of_data.index(name) for name in names]), (*old, *of_data)


def _parts_of_a_process(batch_size: int, alone: int, processes: int) -> int:
    """The fewest equal parts for each of so many processes that make as many in all as for one `alone`, or more.

    Where a batch has fewer images than that, parts of one image.
    """
    fewest = min(-(-alone // processes), batch_size // processes)
    for count in range(max(1, fewest), batch_size + 1):
        if batch_size % (processes * count) == 0:
            return count
    raise ValueError(f"batch_size: {batch_size} images cannot be shared by {processes} processes")


def _start(run: Run, model: str) -> Checkpoint:
    """The model to start from, on the device of the run."""
    path = Path(model).expanduser()
    folder = path.parent if path.is_file() else path
    if path.exists() and folder.resolve() == run.out.resolve():
        raise ValueError(f"out: {run.out} is the model to start from, which a run that resumes needs; name another one")
    device, start = distributed.own_device(run.device), checkpoints.load_models(model)
    start.var.to(device)
    start.vqvae.to(device)
    return start


def _read_config(file: Path | None) -> dict[str, dict[str, Any]]:
    if file is None:
        return {}
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"config: {file} is no JSON file ({error})") from error
    known = ("vqvae", "preprocessing", "var")
    if not isinstance(found, dict) or not all(key in known and isinstance(found[key], dict) for key in found):
        raise ValueError(f"config: expected an object with any of {', '.join(known)}, each an object, in {file}")
    return found


def _changed(value: Any, changes: Mapping[str, Any], name: str) -> Any:
    """A configuration with some fields changed, to values of the same types; lists become tuples."""
    known = dataclasses.asdict(value)
    if unknown := sorted(set(changes) - set(known)):
        raise ValueError(f"config: {name} has no {', '.join(unknown)}; its fields are {', '.join(sorted(known))}")
    changes = {key: tuple(given) if isinstance(given, list) else given for key, given in changes.items()}
    for key, given in changes.items():
        if _types(given) != _types(known[key]):
            raise ValueError(f"config: {name}.{key}: expected a value such as {known[key]!r}, got {given!r}")
    return replace(value, **changes)


def _types(value: Any) -> set[type]:
    """The type of a value, or of the items of a tuple along with it."""
    return {type(value), *map(type, value)} if isinstance(value, tuple) else {type(value)}
