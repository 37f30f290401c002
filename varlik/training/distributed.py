"""Several processes that train one model: `torchrun --nproc-per-node 4 -m varlik train ...`.

Each process holds the whole model and sees its parts of a step's batch. There is no wrapper around the model: gradients
are averaged once a step, after accumulation. All functions do nothing in a single process, which needs no
`torch.distributed`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class World:
    """Which of `size` processes this one is; `local_rank` counts within the machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0


def world() -> World:
    """The processes as torchrun's environment variables tell; one process where they are absent.

    Raises `ValueError` for variables that are incomplete or contradict each other.
    """
    size = _variable("WORLD_SIZE", "1")
    if size == 1:
        return World()
    rank, local_rank = _variable("RANK"), _variable("LOCAL_RANK")
    if not (0 <= rank < size and 0 <= local_rank < size):
        raise ValueError(f"RANK and LOCAL_RANK: expected values in [0, {size}), got {rank} and {local_rank}")
    return World(rank, size, local_rank)


def _variable(name: str, default: str | None = None) -> int:
    value = os.environ.get(name, default)
    if value is None or not value.isdecimal():
        raise ValueError(f"{name}: expected a number, as torchrun sets it, got {value!r}")
    return int(value)


def own_device(device: str | torch.device | None = None) -> torch.device:
    """The device this process trains on: its own CUDA GPU where there is one (also for "cuda"), else the CPU.

    Raises `ValueError` for a device that is not there, and where this machine has fewer GPUs than processes.
    """
    try:
        wanted = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if wanted.type != "cuda":
            torch.empty(0, device=wanted)
            return wanted
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {str(device)!r} cannot be used here ({str(error).splitlines()[0]})") from error
    here, count = world().local_rank, torch.cuda.device_count()
    index = here if wanted.index is None else wanted.index
    if index >= count:
        raise ValueError(f"device: process {here} of this machine finds {count} CUDA GPUs, no cuda:{index}")
    return torch.device("cuda", index)


def join(device: torch.device) -> World:
    """Connect to the other processes, once, and return the world: gloo on CPU, NCCL on CUDA.

    A process group that is open already is used as it is; it must take tensors on the CPU too. Raises `ValueError` if
    it is of another size.
    """
    here = world()
    if here.size == 1:
        return here
    import torch.distributed as dist

    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # With GPUs, small things that live on the CPU still travel by gloo.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if (dist.get_rank(), dist.get_world_size()) != (here.rank, here.size):
        raise ValueError(
            f"RANK, WORLD_SIZE: the open process group has {dist.get_rank()}, {dist.get_world_size()}, "
            f"the environment {here.rank}, {here.size}"
        )
    return here


def leave() -> None:
    """Close the connection, if there is one: the last thing a program does."""
    if world().size == 1:
        return
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def average_(tensors: Sequence[Tensor]) -> None:
    """Replace every tensor by its mean over the processes: one all_reduce of all of them, flattened."""
    size = world().size
    if size == 1 or not tensors:
        return
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    sum_(flat)
    flat /= size
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.detach().copy_(mean.view_as(tensor))


def sum_(tensor: Tensor) -> None:
    """Replace a contiguous tensor by its sum over the processes."""
    if world().size > 1:
        import torch.distributed as dist

        dist.all_reduce(tensor)


def broadcast_(tensors: Sequence[Tensor]) -> None:
    """Replace every tensor by that of process 0."""
    if world().size == 1:
        return
    import torch.distributed as dist

    for tensor in tensors:
        sent = tensor.detach().contiguous()
        dist.broadcast(sent, src=0)
        tensor.detach().copy_(sent)


def wait() -> None:
    """Return when every process has come here, for instance after process 0 has written a file."""
    sum_(torch.zeros(1))
