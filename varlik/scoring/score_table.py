"""Exact scores of many images under every class: a long piece of work that may be stopped and taken up again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from varlik.scoring.engine import Engine
from varlik.tokens import TokenMaps

SHARD = 50  # images a file: what is lost when the work is stopped


def score_table(
    engine: Engine,
    images: TokenMaps,
    labels: Tensor,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """log p(r_k | r_<k, class) of every scale, summed over its tokens: (B, N, K) float32, for `labels` (N,) or (B, N).

    With a `folder`, finished parts are kept in files there, named by a digest of all that decides them (weights,
    precision, classes, tokens, inputs), and read when asked for again; damaged ones are computed anew.
    `progress` is told how many of all images are done. Raises `ValueError` for labels of another shape, as
    `Engine.open`, and `OSError` for a folder that cannot be written.
    """
    if labels.dim() not in (1, 2) or not labels.numel() or (labels.dim() == 2 and len(labels) != len(images)):
        raise ValueError(
            f"labels: expected (N,) or ({len(images)}, N) with one class or more, got {tuple(labels.shape)}"
        )
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    engine.prepare(labels.unique())
    parts = []
    for first in range(0, len(images), SHARD):
        batch = images[first : first + SHARD]
        own = labels if labels.dim() == 1 else labels[first : first + SHARD]
        file = None if folder is None else folder / f"{_digest(_key(engine, own), batch)}.safetensors"
        shape = (len(batch), labels.shape[-1], engine.config.num_scales)
        found = _read(file, shape)
        if found is None:
            found = _scores(engine, batch, own.expand(len(batch), -1))
            _write(file, found)
        parts.append(found)
        if progress is not None:
            progress(first + len(batch), len(images))
    return torch.cat(parts).to(labels.device)


def _scores(engine: Engine, images: TokenMaps, labels: Tensor) -> Tensor:
    rows = engine.open(images, labels)
    try:
        engine.advance(rows, engine.config.num_scales, retain=0)
        return rows.log_likelihood.view(*labels.shape, -1).cpu()
    finally:
        engine.close(rows)


def _key(engine: Engine, labels: Tensor) -> str:
    """What decides a score, but for the tokens."""
    return f"{engine.weights_digest}/{engine.compute.dtype}/{engine.compute.impl}/{labels.tolist()}"


def _digest(key: str, images: TokenMaps) -> str:
    digest = hashlib.blake2b(key.encode(), digest_size=16)
    for part in (images.tokens, images.teacher_forcing_input):
        digest.update(part.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read(file: Path | None, shape: tuple[int, ...]) -> Tensor | None:
    if file is None or not file.is_file():
        return None
    try:
        found = load_file(file)["log_likelihood"]
    except (SafetensorError, KeyError, OSError):
        return None
    return found if found.shape == shape and torch.isfinite(found).all() else None


def _write(file: Path | None, scores: Tensor) -> None:
    """Whole or not at all, whoever stops the process meanwhile."""
    if file is None:
        return
    partial = file.with_suffix(f".{os.getpid()}.part")
    save_file({"log_likelihood": scores.contiguous()}, partial)
    partial.replace(file)
