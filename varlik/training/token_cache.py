"""Token maps on disk: made once from images and their augmentation variants, then mapped into memory.

A cache is a folder with `about.json` (what it was made of), `labels.npy` (n,) and `tokens.npy` (n, A, L), the latter
written as `tokens.partial.npy` until it is whole. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varlik.datasets import ImageSource
from varlik.models.config import Preprocessing
from varlik.models.vqvae import VQVAE
from varlik.models.weights import digest
from varlik.tokens import tokenize
from varlik.training import distributed
from varlik.training.data import TrainingTokens, token_type
from varlik.training.pixels import PLAIN, UNREADABLE, check_variants, in_threads, variants_of

FILES = ("tokens.npy", "tokens.partial.npy", "labels.npy", "about.json", "progress.json")


def cache_tokens(
    source: ImageSource,
    vqvae: VQVAE,
    preprocessing: Preprocessing,
    folder: str | Path,
    variants: Sequence[str] = (PLAIN,),
    seed: int = 0,
    batch_size: int = 64,
    complain: Callable[[Exception], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TrainingTokens:
    """Token maps of `source`, made once in `folder` and mapped from there.

    `batch_size` images are encoded and written at a time; a killed run loses no more. Images that cannot be read are
    told to `complain` and left out, or without it raise. `progress` is told how many of all images are done. Started by
    torchrun, process 0 writes and the others wait for it.

    Raises `ValueError` for a cache made of something else, naming what differs, or damaged, for an image that cannot be
    read, for variants that `check_variants` refuses, for no image, and where none is left of a class; `OSError` for a
    folder that cannot be written.
    """
    check_variants(variants)
    if not len(source.labels):
        raise ValueError("source: expected at least one image, got none")
    folder = Path(folder)
    about = _about(source, vqvae, preprocessing, variants, seed)
    finished = folder / "tokens.npy"
    if distributed.world().main:
        folder.mkdir(parents=True, exist_ok=True)
        _check_about(folder, about)
        if not finished.exists():
            _write(source, vqvae, preprocessing, folder, about, batch_size, complain, progress)
    else:
        while not finished.exists():
            time.sleep(0.2)
        _check_about(folder, about)
    with _intact(folder):
        tokens, labels = _mapped(finished, about), np.load(folder / "labels.npy")
        if labels.shape != tokens.shape[:1] or labels.dtype != np.int64:
            raise ValueError(f"labels.npy holds {labels.shape} {labels.dtype}")
    if complain is None and (labels < 0).any():
        raise ValueError(f"{folder}: the cache leaves out {(labels < 0).sum()} images that could not be read")
    places = torch.from_numpy(labels >= 0).nonzero().flatten()
    for label in set(np.asarray(source.labels).tolist()) - set(labels[labels >= 0].tolist()):
        raise ValueError(f"source: expected images that can be read of {source.class_names[label]!r}, got none")
    return TrainingTokens(tokens, torch.from_numpy(labels)[places], source.class_names, vqvae.quantize, places)


def _about(
    source: ImageSource, vqvae: VQVAE, preprocessing: Preprocessing, variants: Sequence[str], seed: int
) -> dict[str, Any]:
    parts = (vqvae.encoder, vqvae.quant_conv, vqvae.quantize)  # a decoder makes no tokens
    return {
        "source": source.fingerprint(),
        "images": len(source),
        "vqvae": "-".join(digest(part) for part in parts),
        "patch_nums": list(vqvae.config.patch_nums),
        "codes": vqvae.config.vocab_size,
        "preprocessing": asdict(preprocessing),
        "variants": list(variants),
        "seed": seed,
    }


def _shape(about: dict[str, Any]) -> tuple[int, int, int]:
    return about["images"], len(about["variants"]), sum(p * p for p in about["patch_nums"])


@contextmanager
def _intact(folder: Path) -> Iterator[None]:
    """Say of what goes wrong while files of a cache are read that it is damaged."""
    try:
        yield
    except (ValueError, TypeError, LookupError, EOFError, SyntaxError, TokenError, FileNotFoundError) as error:
        raise ValueError(f"{folder}: the cache is damaged ({error}); remove it") from error


def _mapped(path: Path, about: dict[str, Any]) -> np.ndarray:
    """Tokens (n, A, L), read-only. Raises `ValueError` for a file cut short or of another shape or type."""
    tokens = np.load(path, mmap_mode="r")
    if tokens.shape != _shape(about) or tokens.dtype != token_type(about["codes"]):
        raise ValueError(f"{path.name} holds {tokens.shape} {tokens.dtype}")
    return tokens


def _check_about(folder: Path, about: dict[str, Any]) -> None:
    """Refuse a cache of something else; begin one where there is none."""
    path = folder / "about.json"
    if not path.exists():
        if stray := [name for name in FILES if (folder / name).exists()]:
            raise ValueError(f"{folder}: {', '.join(stray)} without about.json: no cache of ours; remove it")
        _write_json(path, about)
        return
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not readable ({error}); remove the folder to make the cache anew") from error
    differing = [f"{key} ({found.get(key)}, here {value})" for key, value in about.items() if found.get(key) != value]
    if differing:
        raise ValueError(
            f"{folder} holds tokens made with another {'; '.join(differing)}: remove it or name another folder"
        )


def _write(
    source: ImageSource,
    vqvae: VQVAE,
    preprocessing: Preprocessing,
    folder: Path,
    about: dict[str, Any],
    batch_size: int,
    complain: Callable[[Exception], None] | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    partial, state = folder / "tokens.partial.npy", folder / "progress.json"
    shape, kind = _shape(about), token_type(about["codes"])
    done, unreadable = 0, []
    if partial.exists() and state.exists():
        with _intact(folder):
            done, unreadable = (json.loads(state.read_text())[key] for key in ("done", "unreadable"))
            _mapped(partial, about)  # which is refused if short: to write, it would be filled up with zeros
            tokens = np.lib.format.open_memmap(partial, mode="r+")
    else:
        tokens = np.lib.format.open_memmap(partial, mode="w+", dtype=kind, shape=shape)

    def read(index: int) -> Tensor | Exception:
        try:
            return variants_of(source.image(index), preprocessing, about["variants"], about["seed"], index)
        except UNREADABLE as error:
            return error

    for first in range(done, shape[0], batch_size):
        rows = range(first, min(first + batch_size, shape[0]))
        readable = {}
        for row, pixels in in_threads(read, rows):
            if isinstance(pixels, Tensor):
                readable[row] = pixels
            elif complain is None:
                raise pixels
            else:
                complain(pixels)
                unreadable.append(row)
        if readable:
            made = tokenize(vqvae, torch.cat(list(readable.values()))).tokens
            tokens[list(readable)] = made.view(len(readable), *shape[1:]).cpu().numpy()
        tokens.flush()  # before it is said to be done
        _write_json(state, {"done": rows.stop, "unreadable": unreadable})
        if progress is not None:
            progress(rows.stop, shape[0])
    labels = np.array(source.labels, np.int64)
    labels[unreadable] = -1
    np.save(folder / "labels.npy", labels)
    os.replace(partial, folder / "tokens.npy")  # last: what bears this name is whole
    state.unlink()


def _write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".json.part")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, path)
