"""Training from the command line: where images come from, what is made of them, and the folder a model ends in."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varlik.classifier import VARClassifier
from varlik.datasets import DATA_SETS, SPLITS, ImageSource, hugging_face, idx_folder, image_folder
from varlik.evaluation.pictures import class_index
from varlik.models import checkpoints
from varlik.models.checkpoints import Checkpoint
from varlik.models.config import Preprocessing
from varlik.models.presets import get_preset
from varlik.models.vqvae import VQVAE
from varlik.training import distributed
from varlik.training.cca import PRESETS, train_cca
from varlik.training.data import TrainingTokens, check_every_class
from varlik.training.incremental import CHANGES, Change, extend, train_incremental
from varlik.training.loop import LoopConfig, check_batch
from varlik.training.metrics import summary_writer
from varlik.training.pixels import PLAIN, Pixels
from varlik.training.token_cache import cache_tokens
from varlik.training.var import train_var
from varlik.training.vqvae import train_vqvae
from varlik.training.vqvae_file import load_vqvae, save_vqvae

Names = tuple[str, ...]
# For the argument that brings data ("data" or "held_out") and its names of classes: their labels in the model, and the
# model's names of classes.
Classes = Callable[[str, Names], tuple[Tensor, Names]]


@contextmanager
def _silent() -> Iterator[Callable[[str, int, int], None]]:
    yield lambda *_: None


VQVAE_LOOP = LoopConfig(steps=3500, batch_size=32, learning_rate=2e-3, warmup=100, weight_decay=0.01, clip=1.0)
VAR_LOOP = LoopConfig(steps=8000, batch_size=32, learning_rate=1e-3, average=0.999)
_NEW_CLASSES = LoopConfig(steps=1000, batch_size=32, learning_rate=1e-2, warmup=50, hold=0.3, average=0.99)
INCREMENTAL_LOOPS: dict[Change, LoopConfig] = {
    "embeddings": _NEW_CLASSES,
    "adaln": _NEW_CLASSES,
    "all": replace(_NEW_CLASSES, learning_rate=1e-3),
}


@dataclass(frozen=True)
class Run:
    """What all trainings have in common.

    `data` is as for `images_of`, `out` the folder of the finished model, `work` that of checkpoints, metrics and tokens
    (default: `out`/work). A checkpoint there is gone on from with `resume` and refused without. `variants` are those of
    `varlik.training.pixels`. `complain` is told of images that cannot be read; `progress()` opens what is told how far
    a kind of work is. `held_out` is a share of the data, or other images: how a model does on them is looked at every
    `evaluate_every` steps (250 for None) and decides which weights are kept; after `patience` (3) looks without
    improvement the run ends. `changes` are made to the command's `LoopConfig`, where they are not None.
    """

    data: str
    out: Path
    work: Path | None = None
    resume: bool = False
    variants: tuple[str, ...] = (PLAIN,)
    device: str | None = None
    compiled: bool = False
    quiet: bool = False
    complain: Callable[[Exception], None] | None = None
    progress: Callable[[], AbstractContextManager[Callable[[str, int, int], None]]] = _silent
    held_out: str | None = None
    evaluate_every: int | None = None
    patience: int | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where checkpoints, metrics and tokens go."""
        return self.work or self.out / "work"

    def loop(self, usual: LoopConfig) -> LoopConfig:
        """The loop of a command, changed as asked for; few steps also warm up for fewer.

        Raises as `LoopConfig` and `check_batch`, `ValueError` for looks at nothing, `ImportError` without TensorBoard.
        """
        given = {name: value for name, value in self.changes.items() if value is not None}
        warmup = min(usual.warmup, given.get("steps", usual.steps) // 10)
        for name, default in (("evaluate_every", 250), ("patience", 3)):
            value = getattr(self, name)
            if self.held_out is not None:
                given[name] = default if value is None else value
            elif value is not None:
                raise ValueError(f"{name}: {value} needs held_out, which says what to look at")
        loop = replace(usual, warmup=warmup, **given)
        check_batch(loop)  # tokens take long
        if loop.tensorboard:
            summary_writer()
        return loop

    def stage(self, name: str) -> Path:
        """The folder of a stage. Raises `ValueError` if it holds a checkpoint that is not to be gone on from."""
        folder = self.folder / name
        if (folder / "checkpoint.pt").exists() and not self.resume:
            raise ValueError(
                f"work: {folder} holds the checkpoint of a run: add --resume to go on from it, or name another folder "
                "with --work"
            )
        return folder

    def tokens(
        self, loop: LoopConfig, vqvae: VQVAE, preprocessing: Preprocessing, classes: Classes, old: int = 0
    ) -> tuple[TrainingTokens, TrainingTokens | None]:
        """Token maps to train on and those held out, cached.

        The data must have images of all classes of the model but the first `old` ones. Raises `ValueError` where they
        have not, and for fewer images to train on than a batch of `loop`, before any is tokenised, which takes long.
        """
        share = None if self.held_out is None else _share(self.held_out)
        source, held_out = images_of(self.data), None
        labels, names = classes("data", source.class_names)
        if self.held_out is not None and share is None:
            held_out = images_of(self.held_out, "held_out")
            held_out_labels, _ = classes("held_out", held_out.class_names)

        # All that there is to check but tokens.
        own = labels[torch.from_numpy(np.array(source.labels, np.int64))]
        no_tokens = np.zeros((1, 1, sum(p * p for p in vqvae.config.patch_nums)), np.uint8)
        outline = TrainingTokens(no_tokens, own - old, names[old:], vqvae.quantize, torch.zeros_like(own))
        check_every_class(outline)
        check_batch(loop, len(outline if share is None else outline.split(share, loop.seed)[0]))

        def cached(source: ImageSource, labels: Tensor, folder: str, variants: tuple[str, ...]) -> TrainingTokens:
            with self.progress() as tell:
                tokens = cache_tokens(
                    source,
                    vqvae,
                    preprocessing,
                    self.folder / folder,
                    variants=variants,
                    seed=loop.seed if len(variants) > 1 else 0,
                    complain=self.complain,
                    progress=lambda *done: tell(folder, *done),
                )
            return replace(tokens, labels=labels[tokens.labels], class_names=names)

        data = cached(source, labels, "tokens", self.variants)
        if share is not None:
            return data.split(share, loop.seed)
        if held_out is None:
            return data, None
        return data, cached(held_out, held_out_labels, "held-out-tokens", (PLAIN,))


@dataclass(frozen=True)
class Trained:
    """What a training ended with: the record of its metrics for the weights that are kept, and what there is to say."""

    out: Path
    record: Mapping[str, float]
    notes: tuple[str, ...]


def images_of(text: str, argument: str = "data") -> ImageSource:
    """Labelled images by what people write for them.

    A folder with a sub-folder for each class; "idx:FOLDER" with IDX files; "hf:NAME" of a Hugging Face data set or a
    saved one's folder; the name of a bundled model's data set, "fashion-mnist" or "glyphs-100:FOLDER". All but the
    first may end in "@SPLIT" (default: train, or as `hugging_face` says). `argument` is for messages.

    Raises what the functions of `varlik.datasets` raise.
    """
    kind, _, rest = text.partition(":")
    place, found, split = rest.rpartition("@")
    if not found or "/" in split:  # folders may have an @ in their names
        place, split = rest, ""
    rest = place
    if kind == "idx":
        return idx_folder(rest, split or "train")
    if kind == "hf":
        return hugging_face(rest, split or None)
    name, _, plain_split = kind.partition("@")
    if name in DATA_SETS:
        split = split or plain_split or "train"
        if split not in SPLITS:
            raise ValueError(f"{argument}: {name} has the splits {', '.join(SPLITS)}, got {split!r}")
        if name == "glyphs-100" and not rest:
            raise ValueError(f"{argument}: name the folder with the data set's file, glyphs-100:FOLDER")
        return DATA_SETS[name](split, rest or None)
    if not Path(text).is_dir():
        raise FileNotFoundError(
            f"{argument}: {text!r} is no folder here, no idx:FOLDER, hf:NAME or name of a data set "
            f"({', '.join(DATA_SETS)})"
        )
    return image_folder(text)


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
    return _finish(run, loop, folder, lambda: save_vqvae(run.out, model, preprocessing))


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
    place = _classes_of_data()

    def classes(argument: str, names: Names) -> tuple[Tensor, Names]:
        labels, known = place(argument, names)
        if (count := changes.get("num_classes", len(known))) != len(known):
            raise ValueError(f"config: var.num_classes: expected {len(known)} as of the data, got {count}")
        return labels, known

    data, held_out = run.tokens(loop, autoencoder, preprocessing, classes)
    shape = replace(shape, num_classes=data.num_classes)
    model = train_var(data, shape, loop, folder, compiled=run.compiled, quiet=run.quiet, held_out=held_out)
    parts = (autoencoder, data.class_names, preprocessing)
    return _finish(run, loop, folder, lambda: checkpoints.save(run.out, model, *parts))


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

    def classes(argument: str, names: Names) -> tuple[Tensor, Names]:
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
    return _finish(run, loop, folder, lambda: checkpoints.save(run.out, trained, *parts), (note,))


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
    known, place = {name.casefold() for name in old}, _classes_of_data(old)

    def classes(argument: str, names: Names) -> tuple[Tensor, Names]:
        if both := [name for name in names if name.casefold() in known]:
            raise ValueError(f"{argument}: expected new classes only, but {start.name} knows {', '.join(both)} already")
        return place(argument, names)

    data, held_out = run.tokens(loop, start.vqvae, start.preprocessing, classes, old=len(old))
    trained = train_incremental(
        start.var, data, what, loop, folder, held_out=held_out, compiled=run.compiled, quiet=run.quiet
    )
    new = data.class_names[len(old) :]
    note = f"{len(new)} new classes after {len(old)} old ones; for all of them run varlik calibrate"
    return _finish(run, loop, folder, lambda: extend(run.out, start, trained, new), (note,))


def _classes_of_data(old: Names = ()) -> Classes:
    """Classes of the data come after the `old` ones, in their order; what is held out may have fewer of them."""
    known: list[str] = []

    def classes(argument: str, names: Names) -> tuple[Tensor, Names]:
        if not known:
            known.extend(names)
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"{argument}: expected classes of the data, got {', '.join(unknown)}")
        return torch.tensor([len(old) + known.index(name) for name in names]), (*old, *known)

    return classes


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


def _finish(
    run: Run, loop: LoopConfig, folder: Path, save: Callable[[], object], notes: tuple[str, ...] = ()
) -> Trained | None:
    """Write the model and say how training went; of several processes the first one does, the others give None."""
    main = distributed.world().main
    distributed.leave()
    if not main:
        return None
    save()
    file = folder / "metrics.jsonl"  # someone may have removed it after the last step
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    kept = records[-1] if records else {}
    if looks := [record for record in records if "score" in record]:
        last, kept = kept["step"], max(looks, key=lambda record: record["score"])  # the first of the best
        note = f"kept the weights of step {kept['step']}, which did best on what is held out"
        if kept["step"] == 0:
            note = "no step did better on what is held out than the start, so the weights stay what they were"
        if last < loop.steps:
            note += f"; ended early, after step {last} of {loop.steps}"
        notes = (note, *notes)
    # A figure that was not finite is null in the file.
    return Trained(run.out, {k: math.nan if v is None else v for k, v in kept.items()}, notes)


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


def _share(text: str) -> float | None:
    """A share of the data; None for data of another kind."""
    try:
        share = float(text)
    except ValueError:
        return None
    if not 0 < share < 1:
        raise ValueError(f"held_out: expected a share between 0 and 1, or other images, got {text}")
    return share
