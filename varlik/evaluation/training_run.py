"""What the training commands have in common: where images come from, their tokens, and how a run ends."""

from __future__ import annotations

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

from varlik.datasets import DATA_SETS, SPLITS, ImageSource, hugging_face, idx_folder, image_folder
from varlik.models.config import Preprocessing
from varlik.models.vqvae import VQVAE
from varlik.training import distributed
from varlik.training.data import TrainingTokens, check_every_class
from varlik.training.loop import LoopConfig, check_batch
from varlik.training.metrics import summary_writer
from varlik.training.pixels import PLAIN
from varlik.training.token_cache import cache_tokens

Names = tuple[str, ...]
# For the argument that brings images ("data" or "held_out"), its names of classes and those of the data: labels in the
# model of the former, and the model's names of classes.
Classes = Callable[[str, Names, Names], tuple[Tensor, Names]]


@contextmanager
def _silent() -> Iterator[Callable[[str, int, int], None]]:
    yield lambda *_: None


@dataclass(frozen=True)
class Trained:
    """What a training ended with: the record of its metrics for the weights that are kept, and what there is to say."""

    out: Path
    record: Mapping[str, float]
    notes: tuple[str, ...]


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
            summary_writer()  # raises where it is not installed, before anything is done
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
        labels, names = classes("data", source.class_names, source.class_names)
        if self.held_out is not None and share is None:
            held_out = images_of(self.held_out, "held_out")
            held_out_labels, _ = classes("held_out", held_out.class_names, source.class_names)

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

    def finish(
        self, loop: LoopConfig, folder: Path, save: Callable[[], object], notes: tuple[str, ...] = ()
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
        return Trained(self.out, {k: math.nan if v is None else v for k, v in kept.items()}, notes)


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


def _share(text: str) -> float | None:
    """A share of the data; None for data of another kind."""
    try:
        share = float(text)
    except ValueError:
        return None
    if not 0 < share < 1:
        raise ValueError(f"held_out: expected a share between 0 and 1, or other images, got {text}")
    return share
