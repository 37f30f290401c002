"""Learning classes task after task: what is still known in the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TaskReport:
    """How well classes of earlier tasks are still told apart, among all classes seen so far.

    - `accuracy[s][t]`: after stage s, top-1 accuracy on the images of task t <= s.
    - `average`: mean over tasks after the last stage.
    - `forgetting`: best accuracy on a task at any stage before the last, less that after the last; mean over all tasks
      but the last, 0 for a single task.
    """

    accuracy: tuple[tuple[float, ...], ...]
    average: float
    forgetting: float


def task_report(predictions: Sequence[Tensor], labels: Tensor, tasks: Sequence[Sequence[int]]) -> TaskReport:
    """What `predictions` say, after each stage the (B,) most likely of the classes seen so far, of images of `labels`.

    Stage s follows training on the classes `tasks[s]`; `labels` (B,) hold all tasks. Raises `ValueError` for another
    number of stages than tasks, other shapes, a class in two tasks, a task without images, and predictions of classes
    not yet seen.
    """
    if len(predictions) != len(tasks) or not tasks:
        raise ValueError(f"predictions: expected one for each of {len(tasks)} tasks, got {len(predictions)}")
    classes = [label for task in tasks for label in task]
    if len(set(classes)) != len(classes):
        raise ValueError(f"tasks: expected each class in one task, got {[list(task) for task in tasks]}")
    of_task = [torch.isin(labels, torch.tensor(list(task))) for task in tasks]
    empty = [list(task) for task, own in zip(tasks, of_task, strict=True) if not own.any()]
    if empty:
        raise ValueError(f"labels: expected images of every task, got none of {empty}")
    accuracy = []
    for stage, found in enumerate(predictions):
        if found.shape != labels.shape:
            raise ValueError(f"predictions: expected {tuple(labels.shape)}, got {tuple(found.shape)}")
        seen = [label for task in tasks[: stage + 1] for label in task]
        if not set(found.unique().tolist()) <= set(seen):
            raise ValueError(f"predictions: expected classes {seen} after stage {stage}, got {found.unique().tolist()}")
        hits = found == labels
        accuracy.append(tuple(hits[own].double().mean().item() for own in of_task[: stage + 1]))
    last = accuracy[-1]
    lost = [max(row[t] for row in accuracy[t:-1]) - last[t] for t in range(len(tasks) - 1)]
    return TaskReport(tuple(accuracy), sum(last) / len(last), sum(lost) / len(lost) if lost else 0.0)
