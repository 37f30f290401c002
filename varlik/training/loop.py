"""A plain training loop that can be killed at any step and resumed bit for bit.

Every random decision is a function of (seed, step), so a checkpoint needs weights, optimiser state and the step alone.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from varlik.training.muon import Muon

Metrics = dict[str, float]


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast to train.

    The learning rate rises linearly over `warmup` steps, stays at its peak until `hold` (a share of all steps) and then
    falls to zero along a cosine.
    `stop` ends the run early, before the rate has fallen, for another stage to go on from (0: run all steps).
    `muon_rate` is the peak rate of Muon on the matrices of transformer blocks (0: AdamW takes them like all others).
    `checkpoint_every` and `log_every` are in steps; `average` is the decay of the weights' moving average (0: none).
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
    if size < config.batch_size:
        raise ValueError(f"batch_size {config.batch_size} exceeds the {size} items there are")
    per_epoch = size // config.batch_size
    epoch, position = divmod(step, per_epoch)
    order = _permutation(config.seed, epoch, size)
    return order[position * config.batch_size : (position + 1) * config.batch_size]


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed * 7_919 + epoch))


def build_optimizers(model: nn.Module, config: LoopConfig) -> list[torch.optim.Optimizer]:
    """AdamW with weight decay on matrices only; with `config.muon_rate`, Muon takes the matrices of `model.blocks`."""
    matrices = []
    if config.muon_rate:
        matrices = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.dim() == 2]
    taken = {id(p) for p in matrices}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    groups = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))
    return [adamw, Muon(matrices, lr=config.muon_rate, weight_decay=config.weight_decay)] if matrices else [adamw]


Model = TypeVar("Model", bound=nn.Module)


def train(
    model: Model,
    loss_of_step: Callable[[int], tuple[Tensor, Metrics]],
    config: LoopConfig,
    folder: str | Path,
    after_step: Callable[[int], Metrics] | None = None,
    quiet: bool = False,
) -> Model:
    """Run `config.steps` steps and leave the trained (if asked for, averaged) weights in `model`.

    `loss_of_step(step)` returns the loss and figures to log; `after_step(step)` may act on the model after the update.
    `folder` receives `checkpoint.pt`, written atomically, and `metrics.jsonl`; a run resumes from a checkpoint found
    there. Raises `ValueError` if that checkpoint belongs to another configuration.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    optimizers = build_optimizers(model, config)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    averaged = {k: v.clone() for k, v in model.state_dict().items()} if config.average else {}
    first = _resume(folder, model, optimizers, averaged, config)
    columns = (
        TextColumn(folder.name),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    started = time.monotonic()
    with Progress(*columns, disable=quiet) as progress, open(folder / "metrics.jsonl", "a") as log:
        end = min(config.stop or config.steps, config.steps)
        bar = progress.add_task("", total=end, completed=first, note="")
        for step in range(first, end):
            rate = learning_rate(config, step)
            for optimizer, peak in zip(optimizers, peaks, strict=True):
                for group, value in zip(optimizer.param_groups, peak, strict=True):
                    group["lr"] = value * rate
            loss, metrics = loss_of_step(step)
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"loss is {loss.item()} at step {step}; last checkpoint: {folder / 'checkpoint.pt'}"
                )
            model.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            for optimizer in optimizers:
                optimizer.step()
            _update_average(averaged, model, config.average)
            metrics = metrics | (after_step(step) if after_step else {})
            done = step + 1
            if done % config.log_every == 0 or done == end:
                record = {"step": done, "loss": loss.item(), "grad_norm": norm.item(), "lr_share": rate, **metrics}
                record["seconds"] = round(time.monotonic() - started, 1)
                log.write(json.dumps(record) + "\n")
                log.flush()
                progress.update(bar, completed=done, note=f"loss {record['loss']:.4f}")
            if done % config.checkpoint_every == 0 or done == end:
                _save(folder, model, optimizers, averaged, config, done)
    if averaged:
        model.load_state_dict(averaged)
    return model


@torch.no_grad()
def _update_average(averaged: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    if not averaged:
        return
    names, old = zip(*averaged.items(), strict=True)
    current = model.state_dict()
    torch._foreach_lerp_(list(old), [current[name] for name in names], 1 - decay)


def _save(folder: Path, model, optimizers, averaged, config: LoopConfig, step: int) -> None:
    state = {
        "step": step,
        "config": asdict(config),
        "model": model.state_dict(),
        "averaged": averaged,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    partial = folder / "checkpoint.pt.partial"
    torch.save(state, partial)
    os.replace(partial, folder / "checkpoint.pt")


def _resume(folder: Path, model, optimizers, averaged, config: LoopConfig) -> int:
    path = folder / "checkpoint.pt"
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    # How often to write is no part of what is computed, so it may change between runs.
    ignored = {"checkpoint_every", "log_every"}
    differing = [k for k, v in asdict(config).items() if k not in ignored and state["config"].get(k) != v]
    if differing:
        raise ValueError(f"{path} was written with another {', '.join(differing)}: remove it or use another folder")
    model.load_state_dict(state["model"])
    for name, tensor in state["averaged"].items():
        averaged[name].copy_(tensor)
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"]
