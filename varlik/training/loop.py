"""A plain training loop that can be killed at any step and resumed bit for bit.

Every random decision is a function of (seed, step), so a checkpoint needs weights, optimiser state and the step alone.
A step's batch is cut into equal parts, for several processes, for little memory, or both: whatever the number of parts,
the step sees the same images and takes the same random decisions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from varlik.training import checkpoint_file, distributed
from varlik.training.metrics import Metrics, MetricsLog
from varlik.training.muon import Muon

PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# How a run is carried out is no part of what is computed, so it may change when a run is resumed.
_FREE = {"checkpoint_every", "log_every", "accumulate", "tensorboard"}


_LARGEST_SEED = 2**40  # `generator` makes 63 bits of it and a step


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast to train.

    The learning rate rises linearly over `warmup` steps, stays at its peak until `hold` (a share of all steps) and then
    falls to zero along a cosine.
    `stop` ends the run early, before the rate has fallen, for another stage to go on from (0: run all steps).
    `muon_rate` is the peak rate of Muon on the matrices of transformer blocks (0: AdamW takes them like all others).
    `checkpoint_every` and `log_every` are in steps; `average` is the decay of the weights' moving average (0: none),
    which starts lower, at most (1 + step) / (10 + step), so that a short run forgets where it came from too.
    `accumulate` is the number of parts in which a process takes its share of a batch, one after the other.
    `precision` is that of matrix products; weights, sums and normalisation stay in float32.
    Every `evaluate_every` steps the model is validated (0: never), and after `patience` validations without improvement
    the run ends (0: it never ends early). `tensorboard` writes the metrics for TensorBoard too.

    Raises `ValueError` for a value that makes no sense.
    """

    steps: int
    batch_size: int
    learning_rate: float
    muon_rate: float = 0.0
    warmup: int = 200
    hold: float = 0.0
    stop: int = 0
    weight_decay: float = 0.05
    clip: float = 2.0
    average: float = 0.0
    seed: int = 0
    checkpoint_every: int = 500
    log_every: int = 50
    accumulate: int = 1
    precision: Literal["float32", "float16", "bfloat16"] = "float32"
    evaluate_every: int = 0
    patience: int = 0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, np.generic):  # a number of NumPy's, which `torch.load` would refuse to read again
                object.__setattr__(self, name, value.item())
        at_least_1 = ("steps", "batch_size", "checkpoint_every", "log_every", "accumulate")
        for name in (*at_least_1, "warmup", "stop", "evaluate_every", "patience", "seed"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name}: expected a whole number, got {getattr(self, name)!r}")
        for name in at_least_1:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if abs(self.seed) > _LARGEST_SEED:
            raise ValueError(f"seed: expected at most {_LARGEST_SEED}, got {self.seed}")
        for name in ("learning_rate", "muon_rate", "hold", "weight_decay", "clip", "average"):
            if not isinstance(getattr(self, name), (int, float)):
                raise ValueError(f"{name}: expected a number, got {getattr(self, name)!r}")
        for name in ("muon_rate", "warmup", "stop", "weight_decay", "evaluate_every", "patience"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: expected a positive number, got {self.learning_rate}")
        if not self.clip > 0:
            raise ValueError(f"clip: expected a positive number, got {self.clip}")
        if not 0 <= self.hold <= 1:
            raise ValueError(f"hold: expected a share between 0 and 1, got {self.hold}")
        if not 0 <= self.average < 1:
            raise ValueError(f"average: expected 0 or more and less than 1, got {self.average}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.patience and not self.evaluate_every:
            raise ValueError(f"patience: {self.patience} needs evaluate_every, which is 0")


@dataclass(frozen=True)
class Part:
    """The share of a step's batch that one backward pass of one process sees.

    `rows` (batch_size,) are the indices into the data of the whole batch, the same on every process; `own` says which
    of them this part holds. Random decisions are drawn for all rows, from `generator(seed, step)`, and cut with `own`.
    """

    step: int
    rows: Tensor
    own: slice

    @property
    def indices(self) -> Tensor:
        """Indices into the data of this part, (batch_size / parts,)."""
        return self.rows[self.own]


def learning_rate(config: LoopConfig, step: int) -> float:
    """Share of the peak learning rate at `step`, in [0, 1]."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    start = max(config.warmup, round(config.hold * config.steps))
    progress = max(0, step - start) / max(1, config.steps - start)
    return 0.5 * (1 + math.cos(math.pi * progress))


def generator(seed: int, step: int) -> torch.Generator:
    """Random numbers of one step."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def batch_indices(config: LoopConfig, step: int, size: int) -> Tensor:
    """Which of `size` items step `step` sees, (batch_size,): every epoch is a fresh permutation, its tail left out."""
    _check_size(config, size)
    per_epoch = size // config.batch_size
    epoch, position = divmod(step, per_epoch)
    order = _permutation(config.seed, epoch, size)
    return order[position * config.batch_size : (position + 1) * config.batch_size]


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed * 7_919 + epoch))


def build_optimizers(model: nn.Module, config: LoopConfig) -> list[torch.optim.Optimizer]:
    """AdamW with weight decay on matrices only; with `config.muon_rate`, Muon takes the matrices of `model.blocks`.

    Parameters that require no gradient are left alone.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = []
    if config.muon_rate:
        matrices = [p for name, p in trainable if name.startswith("blocks.") and p.dim() == 2]
    taken = {id(p) for p in matrices}
    others = [p for _, p in trainable if id(p) not in taken]
    groups = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))
    return [adamw, Muon(matrices, lr=config.muon_rate, weight_decay=config.weight_decay)] if matrices else [adamw]


def check_batch(config: LoopConfig, size: int | None = None) -> None:
    """Raise `ValueError` where processes cannot cut a batch into equal parts, or it is larger than `size` items."""
    processes = distributed.world().size
    parts = processes * config.accumulate
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size: expected a multiple of {parts} ({processes} processes, {config.accumulate} parts in each), "
            f"got {config.batch_size}"
        )
    if size is not None:
        _check_size(config, size)


def _check_size(config: LoopConfig, size: int) -> None:
    if size < config.batch_size:
        raise ValueError(f"batch_size {config.batch_size} exceeds the {size} items there are")


def check_looked_at(config: LoopConfig) -> None:
    """Raise `ValueError` where held-out images would never be looked at."""
    if not config.evaluate_every:
        raise ValueError("held_out: expected loop.evaluate_every of 1 or more along with it, got 0")


Model = TypeVar("Model", bound=nn.Module)


def train(
    model: Model,
    loss_of_part: Callable[[Part], tuple[Tensor, Metrics]],
    config: LoopConfig,
    folder: str | Path,
    size: int,
    after_step: Callable[[int], Metrics] | None = None,
    validate: Callable[[int], float] | None = None,
    settings: Mapping[str, Any] | None = None,
    quiet: bool = False,
    validate_start: bool = False,
) -> Model:
    """Run `config.steps` steps on batches of `size` items and leave the trained weights in `model`, on its device.

    `loss_of_part(part)` returns the mean loss over the part's own rows and figures to log; the step's loss, gradients
    and figures are the means over all parts of all processes, so every part must use the same parameters.
    `after_step(step)` may act on the model after the update, alike in every process.
    `validate(step)` returns a score, higher is better; it sees the averaged weights if there are any, in evaluation
    mode and without gradients. It runs in every process, and what process 0 finds counts. With validation the best
    weights are those that are left in the model, else the averaged or the last ones. With `validate_start` the weights
    that the run starts from are validated too, as step 0, and are left if no step finds better ones.
    `settings` are further values the run depends on, of types that JSON knows, or tensors, compared to three digits.

    `folder` receives `checkpoint.pt`, written atomically, and `metrics.jsonl`; a run resumes from a checkpoint found
    there. Started by torchrun, process 0 writes and all must see the folder.

    Raises `ValueError` if that checkpoint is damaged or belongs to another configuration, if the batch cannot be cut
    into equal parts or is larger than `size`, or if `config` asks for validation and there is none;
    `FloatingPointError` if the loss, its gradient or a score is not finite, a gradient in float16 only where a smaller
    scale does not help; `RuntimeError` if processes find different checkpoints; `ImportError` for `tensorboard` where
    it is not installed.
    """
    world = distributed.world()
    check_batch(config, size)
    if config.evaluate_every and validate is None:
        raise ValueError(f"evaluate_every: {config.evaluate_every}, but this training has nothing to validate with")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    run = _Run(model, config, {"size": size, **(settings or {})})
    run.resume(folder / "checkpoint.pt")
    started = time.monotonic() - run.seconds
    end = min(config.stop or config.steps, config.steps)
    log = MetricsLog(folder, run.step, end, config.tensorboard, quiet) if world.main else None
    with log or nullcontext():
        if validate and config.evaluate_every and validate_start and run.step == 0:
            score = run.evaluate(validate)
            if log:
                log.write({"step": 0, "score": score, "seconds": round(time.monotonic() - started, 1)})
        while run.step < end and not run.gave_up:
            step, done = run.step, run.step + 1
            metrics = run.update(loss_of_part, batch_indices(config, step, size))
            if after_step:
                metrics |= after_step(step)
            evaluates = bool(config.evaluate_every) and (done % config.evaluate_every == 0 or done == end)
            if evaluates and validate:
                metrics["score"] = run.evaluate(validate)
            run.step, run.seconds = done, time.monotonic() - started
            last = done == end or run.gave_up
            if log:
                log.advance(done)
                if evaluates or done % config.log_every == 0 or last:
                    log.write({"step": done, **metrics, "seconds": round(run.seconds, 1)})
                if done % config.checkpoint_every == 0 or last:
                    run.save(folder / "checkpoint.pt")
    distributed.wait()
    run.finish()
    return model


class _Run:
    """All that changes while a model trains, and is in its checkpoint."""

    def __init__(self, model: nn.Module, config: LoopConfig, settings: dict[str, Any]):
        self.model, self.config, self.settings = model, config, settings
        self.device = next(model.parameters()).device
        self.world = distributed.join(self.device)
        distributed.broadcast_(list(model.state_dict().values()))
        self.optimizers = build_optimizers(model, config)
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.averaged = {k: v.clone() for k, v in model.state_dict().items()} if config.average else {}
        # float16 alone has too little range for gradients.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        self.best: dict[str, Any] = {}
        self.step = 0
        self.seconds = 0.0

    def update(self, loss_of_part: Callable[[Part], tuple[Tensor, Metrics]], rows: Tensor) -> Metrics:
        """One step of all optimisers on a batch (batch_size,)."""
        rate = learning_rate(self.config, self.step)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            for group, value in zip(optimizer.param_groups, peak, strict=True):
                group["lr"] = value * rate
        metrics = self._gradients(loss_of_part, rows)
        self._check(metrics["loss"], "loss")
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        if norm.isfinite():
            for optimizer in self.optimizers:
                optimizer.step()
            self._update_average()
        before = self.scaler.get_scale()
        self.scaler.update()
        after = self.scaler.get_scale()
        # A scale too large for float16 shows in the norm; the scaler lowers it and this step is lost. A gradient that
        # no scale helps is not finite itself.
        if not 1 <= after < before:
            self._check(norm.item(), "norm of the gradient")
        scale = {"loss_scale": after} if self.scaler.is_enabled() else {}
        loss = metrics.pop("loss")
        return {"loss": loss, "grad_norm": norm.item(), "lr_share": rate, **scale, **metrics}

    def _gradients(self, loss_of_part: Callable[[Part], tuple[Tensor, Metrics]], rows: Tensor) -> Metrics:
        """Leave the batch's gradients in the parameters and return its loss and figures, alike in every process."""
        count, dtype = self.config.accumulate, PRECISIONS[self.config.precision]
        share = len(rows) // (self.world.size * count)
        self.model.zero_grad(set_to_none=True)
        found = []
        for i in range(self.world.rank * count, (self.world.rank + 1) * count):
            part = Part(self.step, rows, slice(i * share, (i + 1) * share))
            with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                loss, metrics = loss_of_part(part)
            self.scaler.scale(loss / count).backward()
            found.append({"loss": loss.item(), **metrics})
        means = {name: sum(figures[name] for figures in found) / count for name in found[0]}
        if self.world.size == 1:
            return means
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        values = torch.tensor(list(means.values()), dtype=gradients[0].dtype, device=self.device)
        distributed.average_([*gradients, values])
        return dict(zip(means, values.tolist(), strict=True))

    def _check(self, value: float, name: str) -> None:
        if not math.isfinite(value):
            raise FloatingPointError(f"{name} is {value} at step {self.step}; the last checkpoint is from before")

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.averaged:
            current = self.model.state_dict()
            decay = min(self.config.average, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self.averaged.values()), [current[name] for name in self.averaged], 1 - decay)

    @property
    def gave_up(self) -> bool:
        """Whether the last `patience` validations brought no improvement."""
        return bool(self.config.patience and self.best) and self.best["since"] >= self.config.patience

    def evaluate(self, validate: Callable[[int], float]) -> float:
        """Validate after the current step and remember the weights if they are the best so far."""
        was_training = self.model.training
        current = {k: v.clone() for k, v in self.model.state_dict().items()} if self.averaged else {}
        if self.averaged:
            self.model.load_state_dict(self.averaged)
        self.model.eval()
        with torch.no_grad():
            found = torch.tensor(float(validate(self.step)), dtype=torch.float64)
        distributed.broadcast_([found])
        score = found.item()
        self._check(score, "score of the validation")
        if not self.best or score > self.best["score"]:
            kept = {k: v.detach().to("cpu", copy=True) for k, v in self.model.state_dict().items()}
            self.best = {"score": score, "since": 0, "weights": kept}
        else:
            self.best["since"] += 1
        if current:
            self.model.load_state_dict(current)
        self.model.train(was_training)
        return score

    def finish(self) -> None:
        """Leave the best, averaged or last weights in the model."""
        chosen = self.best["weights"] if self.best else self.averaged
        if chosen:
            self.model.load_state_dict(chosen)

    def save(self, path: Path) -> None:
        """Write the checkpoint; a kill in the middle leaves the one before."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "config": asdict(self.config),
            "settings": self.settings,
            "model": self.model.state_dict(),
            "averaged": self.averaged,
            "best": self.best,
            "scaler": self.scaler.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        checkpoint_file.write(path, state)

    def resume(self, path: Path) -> None:
        """Take over a checkpoint, if there is one, onto the model's device."""
        if path.exists():
            state = checkpoint_file.read(path)
            mine = {k: v for k, v in asdict(self.config).items() if k not in _FREE} | self.settings
            theirs = {k: v for k, v in state["config"].items() if k not in _FREE} | state["settings"]
            if differing := checkpoint_file.differences(theirs, mine):
                raise ValueError(
                    f"{path} was written with another {', '.join(differing)}: go on with the same, or in another folder"
                )
            self.model.load_state_dict(state["model"])
            for name, tensor in state["averaged"].items():
                self.averaged[name].copy_(tensor)
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.scaler.load_state_dict(state["scaler"])
            self.best, self.step, self.seconds = state["best"], state["step"], state["seconds"]
        first = torch.tensor(self.step)
        distributed.broadcast_([first])
        if first != self.step:
            raise RuntimeError(f"{path}: process 0 found step {first}, this one {self.step}: do they see one folder?")
