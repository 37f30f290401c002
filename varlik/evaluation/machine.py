"""The machine that a measurement was made on, and what a process on it has in memory."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

import varlik


@dataclass(frozen=True)
class Machine:
    """Where it was measured."""

    device: str
    cpu: str
    threads: int
    python: str
    torch: str
    varlik: str
    commit: str | None


def machine(device: torch.device) -> Machine:
    """This machine and what is installed on it."""
    return Machine(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        cpu=_cpu_name(),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        varlik=varlik.__version__,
        commit=_commit(),
    )


def physical_memory() -> float:
    """Bytes of the machine, infinite where the system does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return float("inf")


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Commit of the checkout that this file is tracked in, "-dirty" if changed; None for an installed copy."""
    git = ["git", "-C", str(Path(varlik.__file__).parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", "__init__.py"], capture_output=True, check=True)
        described = [*git, "describe", "--always", "--dirty", "--exclude", "*", "--abbrev=12"]
        return subprocess.run(described, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None
