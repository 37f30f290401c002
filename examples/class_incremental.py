"""New classes without data of the old ones, on Fashion-MNIST: classes 0 to 4 first, then 5 to 9.

    python -m examples.class_incremental --work runs/class-incremental
    python -m examples.class_incremental --work runs/class-incremental --only first-task

Writes `benchmarks/results/class-incremental.json` and `.md`. The VQ-VAE and the VAR transformer are trained on images
of classes 0 to 4 alone (half an hour of one CPU core). Each way of `varlik.training.incremental` then learns classes 5
to 9 from images of those alone (about five minutes each), and all test images are scored under every class by full
likelihood (about fifteen minutes for every five classes). Beside it a CNN of similar size, fine-tuned or with copied
weights (`examples/cwr.py`). Steps were chosen beforehand and nothing on the test images.

What is done is kept in `--work`: a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from examples import cwr
from examples.recipe import pixels_of, scoring_parameters
from examples.report import add_out, write
from examples.train_fashion_mnist import PREPROCESSING, VQVAE_CONFIG
from varlik import flops
from varlik.cascade import VARC
from varlik.datasets import LabelledImages, fashion_mnist
from varlik.evaluation.machine import machine
from varlik.evaluation.train import INCREMENTAL_LOOPS
from varlik.models import checkpoints
from varlik.models.checkpoints import Checkpoint
from varlik.models.config import VARConfig
from varlik.models.var import VAR
from varlik.scoring.engine import Engine
from varlik.scoring.score_table import score_table
from varlik.tokens import TokenMaps
from varlik.training.incremental import CHANGES, extend, train_incremental
from varlik.training.loop import LoopConfig
from varlik.training.tasks import TaskReport, task_report
from varlik.training.token_cache import cache_tokens
from varlik.training.var import train_var
from varlik.training.vqvae import train_vqvae

FIRST, CLASSES = 5, 10
TASKS = (range(FIRST), range(FIRST, CLASSES))
CHECKED, SAME = 100, 1e-4  # images on which old classes are scored again, and what is taken for rounding
VAR_CONFIG = VARConfig(
    depth=5,
    embed_dim=128,
    num_heads=4,
    patch_nums=VQVAE_CONFIG.patch_nums,
    vocab_size=VQVAE_CONFIG.vocab_size,
    codebook_dim=VQVAE_CONFIG.codebook_dim,
    num_classes=FIRST,
)


@dataclass(frozen=True)
class Row:
    """What a method came to, run by run, its size and its cost."""

    method: str
    trained: int  # numbers that are trained in the second task
    parameters: int
    gflops: float  # of classifying one image under all classes
    reports: tuple[TaskReport, ...]
    drift: float | None = None  # largest relative change of old classes' log-likelihoods on some images


def first_task(options: argparse.Namespace) -> Path:
    """VQ-VAE and VAR transformer of the first classes, in a folder that `varlik.load` reads."""
    out = options.work / "first-task"
    if (out / "var.safetensors").exists() and (out / "vqvae.safetensors").exists():
        return out
    data = of_task(fashion_mnist("train", options.data), 0, FIRST)
    loop = LoopConfig(
        steps=options.vqvae_steps,
        batch_size=32,
        learning_rate=2e-3,
        warmup=50,
        weight_decay=0.01,
        clip=1.0,
        log_every=25,
        checkpoint_every=100,
    )
    vqvae = train_vqvae(pixels_of(data, PREPROCESSING), VQVAE_CONFIG, loop, options.work / "vqvae")
    tokens = cache_tokens(data, vqvae, PREPROCESSING, options.work / "tokens" / "first")
    loop = LoopConfig(
        steps=options.var_steps,
        batch_size=32,
        learning_rate=3e-3,
        muon_rate=4e-3,
        hold=0.3,
        average=0.998,
        checkpoint_every=100,
    )
    var = train_var(tokens, VAR_CONFIG, loop, options.work / "var", compiled=not options.eager)
    checkpoints.save(out, var, vqvae, data.class_names, PREPROCESSING)
    return out


def of_task(data: LabelledImages, first: int, end: int) -> LabelledImages:
    """Images of the classes from `first` to `end`, labels as they are, with names of all classes up to there."""
    own = (data.labels >= first) & (data.labels < end)
    return LabelledImages(data.images[own], data.labels[own], data.class_names[:end])


def generative(options: argparse.Namespace, test: LabelledImages) -> list[Row]:
    """All ways to teach the transformer the second task."""
    before = checkpoints.load_models(first_task(options))
    data = of_task(fashion_mnist("train", options.data), FIRST, CLASSES)
    tokens = cache_tokens(data, before.vqvae, PREPROCESSING, options.work / "tokens" / "second")
    every = fashion_mnist("test", options.data)  # cached all at once, whatever `--images` asks for
    known = cache_tokens(every, before.vqvae, PREPROCESSING, options.work / "tokens" / "test")
    images, labels = known.token_maps(torch.arange(len(test))), torch.from_numpy(test.labels)
    old = scores(before.var, images, range(FIRST), "first task", options.work)
    rows = []
    for what in CHANGES:
        reports, drifts = [], []
        for seed in range(options.seeds):
            loop = replace(INCREMENTAL_LOOPS[what], steps=options.steps, seed=seed, checkpoint_every=100)
            folder = options.work / f"{what}-{seed}"
            after = train_incremental(before.var, tokens, what, loop, folder, compiled=not options.eager)
            extend(folder / "model", before, after, data.class_names[FIRST:])
            drifts.append(drift(after, images, old))
            if what == "all":
                found = scores(after, images, range(CLASSES), f"{what} {seed}", options.work)
            elif drifts[-1] < SAME:
                new = scores(after, images, range(FIRST, CLASSES), f"{what} {seed}", options.work)
                found = torch.cat((old, new), dim=1)
            else:
                raise RuntimeError(f"{what}: old classes score otherwise than before, by {drifts[-1]:.2g} of a score")
            reports.append(task_report([old.argmax(1), found.argmax(1)], labels, TASKS))
            trained = parameters_trained(folder)
        rows.append(Row(f"varlik, {what}", trained, *size_and_cost(before, after), tuple(reports), max(drifts)))
    return rows


def scores(var: VAR, images: TokenMaps, classes: range, what: str, work: Path) -> Tensor:
    """log p(image | class), (B, N) float64."""
    with Progress(transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task(f"full likelihood, {what}", total=len(images))
        found = score_table(
            Engine(var),
            images,
            torch.tensor(classes),
            work / "scores",
            lambda done, _: bar.update(task, completed=done),
        )
    return found.double().sum(2)


def drift(var: VAR, images: TokenMaps, old: Tensor) -> float:
    """Largest relative change of old classes' log-likelihoods (B, FIRST), on the first images."""
    found = score_table(Engine(var), images[:CHECKED], torch.arange(FIRST)).double().sum(2)
    return ((found - old[:CHECKED]) / old[:CHECKED]).abs().max().item()


def parameters_trained(folder: Path) -> int:
    """How many numbers a training run changed."""
    weights = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)["model"]
    return sum(tensor.numel() for tensor in weights.values())


def size_and_cost(checkpoint: Checkpoint, var: VAR) -> tuple[int, float]:
    """Parameters of what classifies, and GFLOPs of one image."""
    cost = flops.engine(VARC, var.config, checkpoint.vqvae.config, CLASSES, "true").flops.total
    return scoring_parameters(var, checkpoint.vqvae), cost / 1e9


def discriminative(options: argparse.Namespace, test: LabelledImages) -> list[Row]:
    """The baselines."""
    data, labels = fashion_mnist("train", options.data), torch.from_numpy(test.labels)
    reports: dict[str, list[TaskReport]] = {}
    for seed in range(options.baseline_seeds):
        work = options.work / f"cnn-{seed}"
        found = cwr.baselines(data, test, FIRST, options.baseline_steps, seed, work)
        for method, predictions in found.items():
            reports.setdefault(method, []).append(task_report(predictions, labels, TASKS))
    model = cwr.CNN(CLASSES)
    size = sum(p.numel() for p in model.parameters())
    cost = flops.count_live(lambda: model(torch.zeros(1, 1, cwr.SIDE, cwr.SIDE))) / 1e9
    trained = {"fine-tuning": size, "CWR": cwr.HIDDEN * (CLASSES - FIRST)}
    return [Row(f"CNN, {name}", trained[name], size, cost, tuple(found)) for name, found in reports.items()]


def as_markdown(report: dict[str, Any], rows: list[Row]) -> str:
    """The table, in words and numbers."""
    lines = [
        "# New classes without data of the old ones",
        "",
        f"`python -m examples.class_incremental`, commit {report['machine']['commit']}. Fashion-MNIST: classes 0 to 4, "
        "then classes 5 to 9 without images of the first. Top-1 in per cent among all classes seen so far, on "
        f"{report['images']} test images; mean and, over several seeds, standard deviation.",
        "",
        "| method | trained in task 2 | parameters | GFLOPs an image | seeds "
        "| task 1 before | task 1 | task 2 | average | forgetting | old scores changed by |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        columns = [
            [r.accuracy[0][0] for r in row.reports],
            [r.accuracy[1][0] for r in row.reports],
            [r.accuracy[1][1] for r in row.reports],
            [r.average for r in row.reports],
            [r.forgetting for r in row.reports],
        ]
        cells = " | ".join(per_cent(values) for values in columns)
        changed = "" if row.drift is None else f"{row.drift:.1e}"
        sizes = f"{row.trained:,} | {row.parameters:,} | {row.gflops:.3g} | {len(row.reports)}"
        lines.append(f"| {row.method} | {sizes} | {cells} | {changed} |")
    lines += [
        "",
        "varlik: full likelihood. VQ-VAE and transformer of the first task were trained once, for "
        f"{report['vqvae_steps']} and {report['var_steps']} steps, the second task with every seed, for "
        f"{report['steps']} steps of 32 images. Where old classes keep their scores (the last column is the largest "
        f"relative change on {CHECKED} images), those of the first model are taken for them. CNN: "
        f"{report['baseline_steps']} steps of 64 images for each task. "
        '"Task 1 before" is among the five classes of task 1.',
    ]
    return "\n".join(lines) + "\n"


def per_cent(values: list[float]) -> str:
    spread = f" ± {100 * stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.2f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="checkpoints, metrics, tokens and scores")
    parser.add_argument("--data", type=Path, help="folder with the data set's files")
    add_out(parser)
    parser.add_argument("--only", choices=["first-task", "baselines"], help="stop after that, write no results")
    parser.add_argument("--vqvae-steps", type=int, default=800)
    parser.add_argument("--var-steps", type=int, default=2_000)
    parser.add_argument("--steps", type=int, default=400, help="of the second task")
    parser.add_argument("--baseline-steps", type=int, default=1_200, help="of the CNN, for each task")
    parser.add_argument("--seeds", type=int, default=1, help="of the second task")
    parser.add_argument("--baseline-seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=10_000, help="test images")
    parser.add_argument("--eager", action="store_true", help="do not compile (slower, needs no C++ compiler)")
    options = parser.parse_args()
    test = fashion_mnist("test", options.data)[: options.images]
    if options.only == "first-task":
        print(f"wrote {first_task(options)}")
        return
    rows = discriminative(options, test)
    if options.only == "baselines":
        print("\n".join(str(row) for row in rows))
        return
    rows = generative(options, test) + rows
    report = {
        "machine": asdict(machine(torch.device("cpu"))),
        "images": len(test),
        **{name: getattr(options, name) for name in ("vqvae_steps", "var_steps", "steps", "baseline_steps")},
        "rows": [asdict(row) for row in rows],
    }
    write(options.out, "class-incremental", report, as_markdown(report, rows))


if __name__ == "__main__":
    main()
