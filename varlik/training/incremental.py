"""New classes for a trained model, without data of the old ones.

The class enters a VAR transformer through its class vectors alone (see `varlik.models.var`). So a new class needs no
more than class vectors of its own, and old classes keep theirs while these are trained. What may change:

- "embeddings": new rows of the class embedding. All other weights stay the same bits, and with them old scores.
- "adaln": the class vectors of new classes, freely: what AdaLN makes of their embeddings, plus an offset. In the end
  the offsets are folded into the AdaLN weights: W becomes W + dW, with the smallest dW for which dW silu(e) is 0 for
  every old class and the null class, and the offset for every new one. Old scores stay what they were to rounding
  (1e-5 relative). Such a dW exists while the silu(e) are linearly independent, so for no more than C classes.
- "all": every weight. Nothing is protected, and old classes are forgotten.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varlik.calibration import Calibration
from varlik.models import checkpoints
from varlik.models.checkpoints import Checkpoint
from varlik.models.var import VAR, ClassVectors
from varlik.models.weights import digest
from varlik.training.data import TrainingTokens, check_every_class, check_fits, check_model, fingerprints
from varlik.training.likelihood import Score, log_likelihood, mean_log_likelihood
from varlik.training.loop import LoopConfig, Part, check_looked_at, train
from varlik.training.metrics import Metrics
from varlik.training.var import drop_labels

Change = Literal["embeddings", "adaln", "all"]
CHANGES: tuple[Change, ...] = get_args(Change)
START_NOISE = 0.3  # of new embeddings, in standard deviations of old ones: equal starts would stay dependent
MAX_CONDITION = 1e3  # of all classes' silu(e): beyond it, rounding of the folded weights would reach old scores
OLD_CALIBRATION_FILE = "calibration-old-classes.safetensors"


def add_classes(model: VAR, count: int, seed: int = 0) -> VAR:
    """A copy of `model` with `count` more classes after the old ones; the null class comes after them, as ever.

    New embeddings start at the mean of the old ones, with some noise from `seed`. All other weights are the same bits,
    so old classes and the null class score as before. Raises `ValueError` for a count below 1.
    """
    if count < 1:
        raise ValueError(f"count: expected at least 1 new class, got {count}")
    old = model.config.num_classes
    embeddings = model.class_emb.weight.detach()
    classes, null = embeddings[:old], embeddings[old:]
    mean = classes.mean(0)
    # A single class has no spread of its own.
    spread = (classes - mean if old > 1 else classes).square().mean().sqrt()
    noise = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(seed)).to(mean)
    grown = copy.deepcopy(model)
    grown.config = replace(model.config, num_classes=old + count)
    _set_embeddings(grown, torch.cat((classes, mean + START_NOISE * spread * noise, null)))
    return grown


class NewClasses(nn.Module):
    """All that is trained of new classes while the rest is frozen. Takes the place of a model's `class_emb` meanwhile.

    `new` (n, C) are their embeddings. With `offsets`, `blocks` (n, depth, 6, C) and `head` (n, 2, C) are what is added
    to the class vectors that AdaLN makes of them; where all blocks share one AdaLN they share (n, 1, 6, C) too.
    """

    old: Tensor
    null: Tensor

    def __init__(self, model: VAR, first: int, offsets: bool):
        """`model` knows the new classes already, from `first` on."""
        super().__init__()
        config, embeddings = model.config, model.class_emb.weight.detach()
        self.first, self.offsets = first, offsets
        self.new = nn.Parameter(embeddings[first : config.num_classes].clone())
        self.register_buffer("old", embeddings[:first].clone(), persistent=False)
        self.register_buffer("null", embeddings[config.num_classes :].clone(), persistent=False)
        if offsets:
            depth = 1 if config.shared_aln else config.depth
            self.blocks = nn.Parameter(embeddings.new_zeros(len(self.new), depth, 6, config.embed_dim))
            self.head = nn.Parameter(embeddings.new_zeros(len(self.new), 2, config.embed_dim))

    @property
    def weight(self) -> Tensor:
        """Embeddings of all classes, (N + 1, C)."""
        return torch.cat((self.old, self.new, self.null))

    def forward(self, labels: Tensor) -> Tensor:
        return F.embedding(labels, self.weight)

    def add_offsets(self, vectors: ClassVectors, labels: Tensor) -> ClassVectors:
        """Class vectors (R rows) of `labels` (R,), all of them new classes, with their offsets."""
        if not self.offsets:
            return vectors
        index = labels - self.first
        return ClassVectors(vectors.blocks + self.blocks[index], vectors.head + self.head[index], vectors.start)


def train_incremental(
    model: VAR,
    data: TrainingTokens,
    what: Change,
    loop: LoopConfig,
    folder: str | Path,
    held_out: TrainingTokens | None = None,
    compiled: bool = False,
    quiet: bool = False,
) -> VAR:
    """A copy of `model` that knows the new classes of `data`, trained on images of those alone.

    `data.class_names` are those of the old classes and then the new ones, its labels are new ones. What may change is
    said at the top of this file. The loss is the mean negative log-likelihood, in nats per token; weight decay reaches
    only what is trained. With "all", a tenth of the labels becomes the null class, which is trained too. With
    `held_out`, log-likelihood of these images of new classes decides which weights are best, at the start and every
    `loop.evaluate_every` steps. `compiled` as for `train_var`; `folder` as for `loop.train`, and its checkpoints hold
    no more than what is trained: to resume, call again with the same `model`.

    Raises `TypeError` or `ValueError` for an unknown `what`, data that hold old classes, no new one, none of some new
    class or other token maps than the model's, for "adaln" with classes that are not independent, or no longer are as
    they train, and as `loop.train`.
    """
    if what not in CHANGES:
        raise ValueError(f"what: expected one of {', '.join(map(repr, CHANGES))}, got {what!r}")
    old = _check_data("data", model, data)
    check_every_class(data, first=old)
    if held_out is not None:
        _check_data("held_out", model, held_out)
        if held_out.class_names != data.class_names:
            raise ValueError(f"held_out: expected the classes {data.class_names}, got {held_out.class_names}")
        check_looked_at(loop)
    grown = add_classes(model, data.num_classes - old, loop.seed).train()
    for parameter in grown.parameters():
        parameter.requires_grad_(what == "all")
    trained: nn.Module = grown
    classes = None
    if what != "all":
        trained = classes = NewClasses(grown, old, offsets=what == "adaln")
        if classes.offsets:
            _check_independent(classes.weight)
        grown.add_module("class_emb", classes)

    def score(labels: Tensor, tokens: Tensor, inputs: Tensor) -> Tensor:
        vectors = grown.class_vectors(labels)
        return log_likelihood(grown, classes.add_offsets(vectors, labels) if classes else vectors, tokens, inputs)

    settings = {
        "what": what,
        "model": digest(model),
        "class_names": list(data.class_names),
        **fingerprints(data, held_out),
    }
    loss = _loss_of_part(data, loop, torch.compile(score) if compiled else score, grown.config.null_class, what)
    validate = None if held_out is None else lambda _: mean_log_likelihood(score, held_out)

    def check_foldable(step: int) -> Metrics:
        """Before a checkpoint, so that a run does not come to its end in vain."""
        done = step + 1
        last = held_out is None and done in (loop.stop, loop.steps)  # else the best weights are folded, not these
        if classes and classes.offsets and (last or done % loop.checkpoint_every == 0):
            _check_independent(classes.weight)
        return {}

    train(
        trained,
        loss,
        loop,
        folder,
        len(data),
        check_foldable,
        validate=validate,
        settings=settings,
        quiet=quiet,
        validate_start=True,
    )
    if classes:
        _set_embeddings(grown, classes.weight.detach())
        if classes.offsets:
            _fold(grown, classes)
    return grown.requires_grad_(True).eval()


def extend(folder: str | Path, checkpoint: Checkpoint, var: VAR, names: Sequence[str]) -> Path | None:
    """Write `var`, which knows the classes of `checkpoint` and after them new ones called `names`, into `folder`.

    `varlik.load` reads it. A calibration is about all classes, so that of the old model is lost, with a warning: run
    `varlik calibrate` again. Where old classes score as before it still holds among them; then it is written beside the
    model, for `varlik.load(folder, calibration=...)` and questions about old classes alone. Returns that file, or None.

    Raises `ValueError` for another number of names than of new classes, and names that are empty or taken.
    """
    old = checkpoint.var.config.num_classes
    if var.config.num_classes != old + len(names) or not names:
        raise ValueError(f"names: expected {var.config.num_classes - old} names of new classes, got {len(names)}")
    taken = list(checkpoint.class_names)
    for name in names:
        if not name.strip() or name in taken:
            raise ValueError(f"names: expected new names that differ from all others, got {name!r}")
        taken.append(name)
    checkpoints.save(folder, var, checkpoint.vqvae, taken, checkpoint.preprocessing)
    if checkpoint.calibration is None:
        return None
    file, told = None, f"{folder}: no calibration is for all its classes, run varlik calibrate"
    kept = _old_calibration(Calibration.load(checkpoint.calibration), checkpoint.var, var)
    if kept is not None:
        file = Path(folder) / OLD_CALIBRATION_FILE
        kept.save(file)
        told += f"; that of the old model holds for questions about old classes alone: {file}"
    warnings.warn(told, stacklevel=2)
    return file


def _loss_of_part(
    data: TrainingTokens, loop: LoopConfig, score: Score, null_class: int, what: Change
) -> Callable[[Part], tuple[Tensor, Metrics]]:
    length = sum(side * side for side in data.quantizer.patch_nums)

    def loss_of_part(part: Part) -> tuple[Tensor, Metrics]:
        variant = data.variant(part.rows, loop.seed, part.step)[part.own]
        tokens, inputs, labels = data.batch(part.indices, variant)
        if what == "all":
            labels = drop_labels(labels, part, loop.seed, null_class)
        return -score(labels, tokens, inputs).mean() / length, {}

    return loss_of_part


@torch.no_grad()
def _fold(model: VAR, classes: NewClasses) -> None:
    """Let the AdaLN weights make the offsets of new classes, and nothing more of old ones."""
    _check_independent(classes.weight)
    new = slice(classes.first, classes.first + len(classes.new))
    inverse = torch.linalg.pinv(F.silu(classes.weight.double()))[:, new]  # (C, n): silu(e) -> which new class it is
    names = (
        ["shared_ada_lin"] if model.config.shared_aln else [f"blocks.{i}.ada_lin" for i in range(model.config.depth)]
    )
    offsets = [*classes.blocks.double().flatten(2).unbind(1), classes.head.double().flatten(1)]
    for name, offset in zip([*names, "head_nm.ada_lin"], offsets, strict=True):
        weight = model.get_parameter(f"{name}.1.weight")
        weight.copy_(weight.double() + (inverse @ offset).T)


def _check_independent(embeddings: Tensor) -> None:
    count, width = embeddings.shape
    values = torch.linalg.svdvals(F.normalize(F.silu(embeddings.detach().double()), dim=1))
    condition = float("inf") if count > width else (values[0] / values[-1]).item()
    if not condition <= MAX_CONDITION:
        raise ValueError(
            f"what: 'adaln' needs linearly independent embeddings of all {count} classes (with the null class) in "
            f"{width} dimensions, with a condition number of at most {MAX_CONDITION:g}, got {condition:.3g}; "
            "'embeddings' and 'all' do without"
        )


def _set_embeddings(model: VAR, weight: Tensor) -> None:
    model.class_emb = nn.Embedding.from_pretrained(weight.clone(), freeze=False)


def _old_calibration(calibration: Calibration, before: VAR, after: VAR) -> Calibration | None:
    """The calibration of one model for another, if it is its own and its classes score alike in both."""
    fingerprint = calibration.fingerprint
    if fingerprint.transformer != digest(before) or not _scores_kept(before, after):
        return None
    return replace(calibration, fingerprint=replace(fingerprint, transformer=digest(after)))


@torch.no_grad()
def _scores_kept(before: VAR, after: VAR) -> bool:
    """Whether all but the class vectors of new classes is the same, up to the rounding of folded weights."""
    theirs = after.state_dict()
    made = ("class_emb.", "shared_ada_lin.", "head_nm.")  # what makes class vectors
    for name, tensor in before.state_dict().items():
        if not name.startswith(made) and ".ada_lin." not in name and not torch.equal(tensor, theirs[name]):
            return False
    labels = torch.arange(before.config.num_classes, device=before.pos_start.device)
    ours, new = before.class_vectors(labels), after.class_vectors(labels)
    return all(
        torch.allclose(getattr(ours, part), getattr(new, part), rtol=1e-4, atol=1e-5)
        for part in ("blocks", "head", "start")
    )


def _check_data(name: str, model: VAR, data: TrainingTokens) -> int:
    """How many classes `model` has, if `data` is fit to teach it others."""
    check_model(model)
    if not isinstance(data, TrainingTokens):
        raise TypeError(f"{name}: expected TrainingTokens, got {type(data).__name__}")
    old, total, labels = model.config.num_classes, data.num_classes, data.labels
    if total <= old:
        raise ValueError(f"{name}: expected names of the model's {old} classes and of new ones, got {total} names")
    check_fits(name, replace(model.config, num_classes=total), data, model.pos_start.device)
    if int(labels.min()) < old:
        raise ValueError(f"{name}: expected labels of new classes, {old} to {total - 1}, got {int(labels.min())}")
    return old
