"""The file that a training goes on from: written atomically, read by its checksums, compared with what is asked for."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SAVED = {"step", "seconds", "config", "settings", "model", "averaged", "best", "scaler", "optimizers"}


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Write a run's `state`, all of `SAVED`; a kill in the middle leaves the file from before."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        torch.save({name: _plain(value) if name == "settings" else value for name, value in state.items()}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote of a run. Raises `ValueError` for a file that is something else, or damaged."""
    refusal = f"{path} is no checkpoint of a training, or damaged: remove it to start again"
    if not _intact(path):
        raise ValueError(refusal)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(refusal) from error
    if not isinstance(state, dict) or not state.keys() >= SAVED:
        raise ValueError(refusal)
    return state


def differences(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> list[str]:
    """Names of settings in which a file and a run differ and, where they say something, both values."""
    return [
        _told(name, theirs.get(name), mine.get(name))
        for name in dict.fromkeys((*mine, *theirs))
        if name not in mine or name not in theirs or not _same(mine[name], theirs[name])
    ]


def _intact(path: Path) -> bool:
    """Whether a file is an archive of torch's with the checksums that were written: `torch.load` looks at none."""
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                named = any(name.endswith("/data.pkl") for name in archive.namelist())
                return named and archive.testzip() is None
        except (OSError, MemoryError):
            raise
        except Exception:  # whatever the reader trips over
            return False


def _plain(value: Any) -> Any:
    """Settings without NumPy's numbers, which `torch.load` refuses to read."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return value.item() if isinstance(value, np.generic) else value


def _told(name: str, theirs: Any, mine: Any) -> str:
    """A differing setting's name and, where they say something, its values."""
    plain = all(isinstance(value, (int, float)) for value in (theirs, mine))
    return f"{name} ({theirs}, now {mine})" if plain else name


def _same(one: Any, other: Any) -> bool:
    """Whether two settings are one; numbers of tensors may differ by rounding, as they are computed anew."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.allclose(one.cpu().double(), other.cpu().double(), rtol=1e-3, atol=0)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other
