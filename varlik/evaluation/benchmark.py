"""Speed, arithmetic and memory of the engine beside the naive ways, on this machine and in one run.

Ways to do the same work, all on the same model and token maps:

- "naive, one class at a time": `varlik.reference`, image by image; a cascade's stages each start from scratch.
- "naive, batched": all classes of an image as rows of one forward pass, with full logits, log-softmax and gather.
- "engine": what `VARClassifier.classify` does.

All scores are compared with the reference before anything is timed. Times are medians over repeats in which the ways
take turns, so that a slow moment of the machine hits all alike; between them a large float32 matrix product is timed,
whose best is the peak of this machine. FLOPs are those that torch counts in a real run.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import varlik
from varlik import reference
from varlik.cascade import Cascade, Stage
from varlik.classifier import VARClassifier, load
from varlik.evaluation.samples import samples
from varlik.flops import check_classes, count_live
from varlik.models.config import VQVAEConfig
from varlik.models.presets import default_class_names, default_preprocessing, get_preset
from varlik.models.var import VAR
from varlik.models.vqvae import VQVAE
from varlik.smoothing import Smoothing, perturb
from varlik.tokens import TokenMaps

TOLERANCE = 1e-5
PEAK_SIZE = 2048
GEOMETRY_CLASSES = 10
NAIVE, BATCHED, ENGINE = "naive, one class at a time", "naive, batched", "engine"
SMOOTHING = Smoothing()


@dataclass(frozen=True)
class Work:
    """What is measured: `images` under the first `classes` classes of a model (default: all).

    `geometry` ("d16", "d20", ...) takes the transformer of that preset with random weights in place of `model`, with
    `depth` blocks (default: the preset's) and 10 classes by default. `scales` scores the first token maps only,
    `cascade` is a cascade's text. The naive way is timed on the first `naive_classes` and scaled up linearly.
    """

    model: str = "fashion-mnist"
    geometry: str | None = None
    depth: int | None = None
    images: int = 4
    classes: int | None = None
    scales: int | None = None
    cascade: str | None = None
    naive_classes: int | None = None
    device: str | None = None


@dataclass(frozen=True)
class Bench:
    """A `Work` made ready: a classifier, token maps of B images, labels (N,), and of them those of the naive way."""

    classifier: VARClassifier
    images: TokenMaps
    labels: Tensor
    naive_labels: Tensor
    cascade: Cascade

    @property
    def plain(self) -> bool:
        """Whether it is a likelihood of the clean image, with no stage after it."""
        return len(self.cascade.stages) == self.cascade.max_samples == 1

    @property
    def stages(self) -> list[tuple[int, int, int]]:
        """(scales, samples, survivors) of every stage."""
        scales = self.cascade.scales_of(self.classifier.var.config.num_scales)
        return [(k, stage.samples, stage.keep) for k, stage in zip(scales, self.cascade.stages, strict=True)]


@dataclass(frozen=True)
class Scores:
    """What one way found: (labels (B, n), log-likelihoods (B, n)) for every stage, and tokens evaluated per image."""

    stages: list[tuple[Tensor, Tensor]]
    tokens: float


@dataclass(frozen=True)
class Row:
    """One way to do the work.

    `seconds` for all images, the median; `times_faster` than the naive way, one class at a time; `tokens` and `flops`
    per image; `gflops` reached per second and `share` of the machine's peak; `peak_bytes` beyond the weights, in a
    process of its own, or None where that is not known; `difference`, the largest relative one from the reference.
    """

    name: str
    seconds: float
    times_faster: float
    tokens: float
    flops: float
    gflops: float
    share: float
    peak_bytes: int | None
    difference: float


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


@dataclass(frozen=True)
class Report:
    """Rows of one run, and what is needed to read them.

    `peak_gflops` per second of a float32 matrix product; `tables_seconds` to build the tables of all classes, once per
    model, which is in no row.
    """

    work: Work
    machine: Machine
    repeats: int
    rows: tuple[Row, ...]
    peak_gflops: float
    tables_seconds: float
    notes: tuple[str, ...]


def run(work: Work, repeats: int = 5, memory: bool = True) -> Report:
    """Check every way against the reference, then measure all of them.

    With `memory` each way is run once more in a process of its own for its peak memory (Linux, on the CPU). Raises
    `ValueError` for work that the model cannot do, for `repeats` below 1, and for scores that differ from the
    reference by more than 1e-5 relative.
    """
    if repeats < 1:
        raise ValueError(f"repeats: expected 1 or more, got {repeats}")
    bench = prepare(work)
    ways, notes = _ways(bench)
    tables_seconds = _seconds(bench, lambda: bench.classifier.engine.prepare(bench.labels))
    scores: dict[str, Scores] = {}
    flops = {}
    for name in ways:  # the run that is checked also warms up and is counted
        flops[name] = count_live(partial(lambda way: scores.update({way: VARIANTS[way](bench)}), name))
    differences = check(bench, scores)

    times: dict[str, list[float]] = {name: [] for name in ways}
    peaks = []
    for _ in range(repeats):
        for name in ways:
            times[name].append(_seconds(bench, partial(VARIANTS[name], bench)))
        peaks.append(_peak_gflops(bench))
    seconds = {name: statistics.median(values) for name, values in times.items()}
    scale = len(bench.labels) / len(bench.naive_labels)
    seconds[NAIVE], work_done = seconds[NAIVE] * scale, flops | {NAIVE: flops[NAIVE] * scale}

    memory_of: dict[str, int | None] = dict.fromkeys(ways)
    if memory and _can_tell_memory(bench):
        for name in ways:
            memory_of[name], complaint = _peak_in_own_process(name, work)
            notes += [complaint] if complaint else []
    rows = []
    for name in ways:
        gflops = work_done[name] / seconds[name] / 1e9
        rows.append(
            Row(
                name=name,
                seconds=seconds[name],
                times_faster=seconds[NAIVE] / seconds[name],
                tokens=scores[name].tokens * (scale if name == NAIVE else 1),
                flops=work_done[name] / len(bench.images),
                gflops=gflops,
                share=gflops / max(peaks),
                peak_bytes=memory_of[name],
                difference=differences[name],
            )
        )
    return Report(
        work=work,
        machine=machine(bench.classifier.device),
        repeats=repeats,
        rows=tuple(rows),
        peak_gflops=max(peaks),
        tables_seconds=tables_seconds,
        notes=tuple(notes),
    )


def prepare(work: Work) -> Bench:
    """Load or make the model and the images. Raises `ValueError` for work that the model cannot do."""
    for name in ("images", "depth", "classes", "naive_classes"):
        value = getattr(work, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}")
    if work.scales is not None and work.cascade is not None:
        raise ValueError("scales: a cascade says itself which scales it reads; give one of the two")
    if work.depth is not None and work.geometry is None:
        raise ValueError("depth: only a geometry can be had with another depth")
    classifier = load(work.model, device=work.device) if work.geometry is None else _random_classifier(work)
    config = classifier.var.config
    default = config.num_classes if work.geometry is None else min(GEOMETRY_CLASSES, config.num_classes)
    classes = check_classes(config, default if work.classes is None else work.classes)
    cascade = (
        Cascade((Stage("100%" if work.scales is None else work.scales, 1),))
        if work.cascade is None
        else Cascade.parse(work.cascade)
    )
    cascade.scales_of(config.num_scales)
    naive_classes = classes if work.naive_classes is None else min(classes, work.naive_classes)
    labels = classifier.labels(range(classes))
    bench = Bench(classifier, _images(work, classifier), labels, labels[:naive_classes], cascade)
    if naive_classes < classes and not bench.plain:
        raise ValueError("naive_classes: the time of a cascade is not linear in its classes; leave it out")
    return bench


def check(bench: Bench, scores: dict[str, Scores]) -> dict[str, float]:
    """Largest relative difference of each way from the reference; `ValueError` for one above 1e-5.

    Classes that the reference was spared are compared with the batched naive way, once that has been found right.
    """
    differences: dict[str, float] = {}
    for name, found in scores.items():
        expected = [NAIVE]
        if name == ENGINE and BATCHED in scores and len(bench.naive_labels) < len(bench.labels):
            expected.append(BATCHED)
        differences[name] = max(_difference(bench, found, scores[other]) for other in expected)
        if not differences[name] <= TOLERANCE:
            raise ValueError(
                f"benchmark: scores of {name!r} differ from the reference by {differences[name]:.1e} relative, "
                f"more than {TOLERANCE:.0e}: no figures"
            )
    return differences


def naive(bench: Bench) -> Scores:
    """Image by image and class by class; a cascade's samples are drawn once for each image, its stages from scratch."""
    var, labels = bench.classifier.var, bench.naive_labels.tolist()
    boundaries, stages, by_image = var.config.boundaries, bench.stages, []
    for i in range(len(bench.images)):
        image = bench.images[i : i + 1]
        if bench.plain:
            scales = stages[0][0]
            found = reference.log_likelihood(var, image.tokens, image.teacher_forcing_input, labels, scales)[0]
            by_image.append([(labels, found)])
            continue
        quantizer = bench.classifier.vqvae.quantize
        drawn = [perturb(quantizer, image, sample, SMOOTHING) for sample in range(bench.cascade.max_samples)]
        pairs = [(sample.tokens, sample.teacher_forcing_input) for sample in drawn]
        by_image.append(reference.cascade(var, pairs, labels, stages)[1])
    merged = [
        (torch.tensor([live for live, _ in stage], device=bench.labels.device), torch.stack([s for _, s in stage]))
        for stage in zip(*by_image, strict=True)
    ]
    tokens = sum(
        found.shape[1] * count * boundaries[scales]
        for (found, _), (scales, count, _) in zip(merged, stages, strict=True)
    )
    return Scores(merged, float(tokens))


@torch.no_grad()
def batched(bench: Bench) -> Scores:
    """All classes of an image as rows of one forward pass. For plain likelihoods only."""
    var, labels, scales = bench.classifier.var, bench.labels, bench.stages[0][0]
    length, rows = var.config.boundaries[scales], len(bench.labels)
    found = []
    for i in range(len(bench.images)):
        tokens, inputs = bench.images.tokens[i], bench.images.teacher_forcing_input[i]
        logits = var(var.class_vectors(labels), inputs.expand(rows, -1, -1), scales)
        targets = tokens[:length, None].expand(rows, -1, -1)
        found.append(torch.log_softmax(logits, dim=-1).gather(-1, targets).squeeze(-1).sum(-1))
    return Scores([(labels.expand(len(found), -1), torch.stack(found))], float(rows * length))


def engine(bench: Bench) -> Scores:
    """The classifier as users call it."""
    prediction = bench.classifier.classify(bench.images, bench.labels, bench.cascade)
    stages = [(stage.labels, stage.log_likelihood) for stage in prediction.stages]
    return Scores(stages, prediction.cost.tokens.double().mean().item())


VARIANTS: dict[str, Callable[[Bench], Scores]] = {NAIVE: naive, BATCHED: batched, ENGINE: engine}
"""The ways by name, in the order in which they are checked."""


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


def check_plot(path: Path) -> None:
    """Whether `plot` can write there. Raises `ValueError` without matplotlib or for another ending than .png."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("plot: needs matplotlib: python -m pip install 'varlik[plots]'") from error
    if path.suffix.lower() != ".png":
        raise ValueError(f"plot: expected a .png file, got {path}")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"plot: no such folder: {path.resolve().parent}")


def plot(report: Report, path: Path) -> None:
    """Draw seconds and, where known, peak memory of every way as bars, in a PNG file. Raises as `check_plot`."""
    check_plot(path)
    from matplotlib.figure import Figure

    names = [row.name for row in report.rows]
    bars = [("seconds", [row.seconds for row in report.rows], [f"{row.times_faster:.2f} x" for row in report.rows])]
    known = [row.peak_bytes for row in report.rows if row.peak_bytes is not None]
    if len(known) == len(names):
        bars.append(("peak memory beyond the weights, MB", [b / 1e6 for b in known], [f"{b / 1e6:.0f}" for b in known]))
    figure = Figure(figsize=(5 * len(bars) + 2, 0.6 * len(names) + 1.4), layout="constrained")
    for axis, (title, values, texts) in zip(figure.subplots(1, len(bars), squeeze=False)[0], bars, strict=True):
        drawn = axis.barh(names, values, color=["#b0b0b0"] * (len(names) - 1) + ["#2a6f97"])
        axis.bar_label(drawn, texts, padding=3)
        axis.margins(x=0.15)
        axis.invert_yaxis()
        axis.set_xlabel(title)
        axis.spines[["top", "right"]].set_visible(False)
        if title != "seconds":
            axis.set_yticklabels([])
    figure.suptitle(f"{title_of(report.work)}; {report.machine.cpu}, threads: {report.machine.threads}", fontsize=9)
    figure.savefig(path, dpi=150)


def title_of(work: Work) -> str:
    """The work in one line."""
    model = work.model if work.geometry is None else f"{work.geometry} with random weights"
    depth = f", depth {work.depth}" if work.depth is not None else ""
    classes = "" if work.classes is None else f", {work.classes} class{'es' * (work.classes > 1)}"
    what = work.cascade or ("full likelihood" if work.scales is None else f"likelihood of {work.scales} scales")
    return f"{model}{depth}, {work.images} image{'s' * (work.images > 1)}{classes}, {what}"


def _ways(bench: Bench) -> tuple[list[str], list[str]]:
    """Which ways are measured, and notes on those that are not measured in full."""
    ways, notes = list(VARIANTS), []
    classes, spared = len(bench.labels), len(bench.naive_labels) < len(bench.labels)
    if not bench.plain:
        ways.remove(BATCHED)
    elif (needed := _batched_bytes(bench)) > _physical_memory() / 2:
        ways.remove(BATCHED)
        notes.append(f"{BATCHED}: left out, it would need about {needed / 1e9:.0f} GB")
    if spared:
        rest = "with the batched naive way" if BATCHED in ways else "with nothing"
        notes.append(
            f"{NAIVE}: timed and counted on {len(bench.naive_labels)} of {classes} classes and scaled linearly; "
            f"scores of the others are compared {rest}"
        )
    return ways, notes


def _batched_bytes(bench: Bench) -> int:
    """Logits and their log-softmax, and the MLP's activations, of one image."""
    config = bench.classifier.var.config
    tokens = len(bench.labels) * config.boundaries[bench.stages[0][0]]
    return 4 * tokens * (2 * config.vocab_size + 10 * config.embed_dim)


def _physical_memory() -> float:
    """Bytes of the machine, infinite where the system does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return float("inf")


def _random_classifier(work: Work) -> VARClassifier:
    """A preset's transformer with random weights. Its VQ-VAE is a stand-in of which only the quantiser is used."""
    preset = get_preset(f"var-{str(work.geometry).removeprefix('var-')}")
    config = replace(preset.var, depth=preset.var.depth if work.depth is None else work.depth)
    small = VQVAEConfig(
        channels=32,
        channel_multipliers=(1,) * 5,
        num_res_blocks=1,
        codebook_dim=config.codebook_dim,
        vocab_size=config.vocab_size,
        patch_nums=config.patch_nums,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vqvae, var = VQVAE(small, decoder=False), VAR(config)
        # Classes, gates and head of the size they have in a trained model: with those that training starts from, the
        # blocks and the class would count for so little that a wrong score could pass for right.
        var.reset_parameters(gate=1.0)
        with torch.no_grad():
            var.class_emb.weight.mul_(32)
            var.head.weight.mul_(50)
    names = default_class_names(config.num_classes)
    classifier = VARClassifier(var, vqvae, names, default_preprocessing(small), name=f"{preset.name}, random")
    return classifier.to(work.device or ("cuda" if torch.cuda.is_available() else "cpu"))


@torch.no_grad()
def _images(work: Work, classifier: VARClassifier) -> TokenMaps:
    """Sample pictures of a bundled model, over and over if need be; noise for other models."""
    vqvae = classifier.vqvae
    generator = torch.Generator().manual_seed(1)
    if work.geometry is not None:
        side = vqvae.config.patch_nums[-1]
        feature_map = torch.randn(work.images, vqvae.config.codebook_dim, side, side, generator=generator)
        feature_map = feature_map.to(classifier.device)
        tokens, inputs = vqvae.quantize.tokenize(feature_map)
        return TokenMaps(tokens, inputs, feature_map, tuple(range(work.images)), vqvae.config.patch_nums)
    try:
        paths = samples(work.model).paths
    except ValueError:
        side, channels = vqvae.config.resolution, vqvae.config.in_channels
        pixels = torch.rand(work.images, channels, side, side, generator=generator)
        return classifier.tokenize_pixels(2 * pixels - 1)
    return classifier.tokenize([paths[i % len(paths)] for i in range(work.images)])


def _difference(bench: Bench, found: Scores, expected: Scores) -> float:
    """Largest relative difference over the classes that `expected` scored, infinite where `found` lacks one."""

    def table(labels: Tensor, scores: Tensor) -> Tensor:
        empty = torch.full((len(labels), bench.classifier.null_class + 1), torch.nan, device=labels.device)
        return empty.scatter_(1, labels, scores.to(empty))

    worst = 0.0
    for ours, theirs in zip(found.stages, expected.stages, strict=True):
        wanted = table(*theirs)
        there = ~wanted.isnan()
        gaps = ((table(*ours) - wanted) / wanted).abs()[there]
        worst = max(worst, gaps.nan_to_num(nan=torch.inf).max().item())
    return worst


def _seconds(bench: Bench, work: Callable[[], object]) -> float:
    on_gpu = bench.classifier.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _peak_gflops(bench: Bench) -> float:
    """GFLOP/s of a large float32 matrix product, the best of three."""
    a, b = (torch.rand(PEAK_SIZE, PEAK_SIZE, device=bench.classifier.device) for _ in range(2))
    out = torch.empty_like(a)
    best = min(_seconds(bench, lambda: torch.mm(a, b, out=out)) for _ in range(3))
    return 2 * PEAK_SIZE**3 / best / 1e9


def _can_tell_memory(bench: Bench) -> bool:
    return sys.platform == "linux" and bench.classifier.device.type == "cpu"


def _peak_in_own_process(name: str, work: Work) -> tuple[int | None, str]:
    """Peak memory in bytes of one way in a fresh process, and a note if there is none."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    code = "import sys; from varlik.evaluation import benchmark; benchmark.print_peak(*sys.argv[1:])"
    command = [sys.executable, "-c", code, name, json.dumps(asdict(work)), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return None, f"{name}: no memory figure, the process ended with code {done.returncode} {last}".strip()
    peak = json.loads(done.stdout)
    return peak, "" if peak is not None else f"{name}: no memory figure, the system does not tell"


def print_peak(name: str, work: str, threads: str) -> None:
    """Print the memory that one way takes at most beyond the loaded model, in bytes; what a fresh process runs.

    `work` is a `Work` in JSON. The engine's class tables and pages count.
    """
    torch.set_num_threads(int(threads))
    bench = prepare(Work(**json.loads(work)))
    # Touches all weights, which may be mapped from a file, and starts what torch starts late.
    images = bench.images[:1]
    label = bench.labels[:1].tolist()
    reference.log_likelihood(bench.classifier.var, images.tokens, images.teacher_forcing_input, label, 2)
    with suppress(OSError, AttributeError):  # give back what loading has freed (glibc)
        ctypes.CDLL(None).malloc_trim(0)
    try:
        # ru_maxrss would not do: it includes what the parent held before exec, and the peak of loading.
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        VARIANTS[name](bench)
        print(json.dumps(max(0, _status("VmHWM") - before)))
    except OSError:
        print(json.dumps(None))


def _status(key: str) -> int:
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
