"""The command line: parses, calls, prints.

Exit codes: 0 all went well; 1 a check failed; 2 the input was wrong (one line on stderr says how).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import varlik

if TYPE_CHECKING:
    from varlik.evaluation.profile import OpTime

app = typer.Typer(
    name="varlik",
    help="Exact class likelihoods of images from visual autoregressive (VAR) models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()

Model = Annotated[
    str, typer.Option("--model", "-m", help="A name from `varlik models`, a Hub repo id, a folder or a file.")
]
VQVAEFile = Annotated[
    str | None, typer.Option("--vqvae", help="VQ-VAE file, for a transformer given as a single file.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... [default: the first GPU, else cpu]")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of a table.")]


def main() -> None:
    """Run the command line; wrong input ends in one line on stderr and exit code 2."""
    try:
        app()
    except (ValueError, TypeError, OSError) as error:
        _complain(error)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(varlik.__version__)
        raise typer.Exit


@app.command()
def classify(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.", show_default=False)],
    model: Model = "fashion-mnist",
    vqvae: VQVAEFile = None,
    classes: Annotated[
        str | None, typer.Option(help="Only these classes: indices or names, separated by commas.")
    ] = None,
    cascade: Annotated[str, typer.Option(help='"full", "avarc+" or stages such as 6:10,10:3,10x3:1.')] = "full",
    topk: Annotated[int, typer.Option(min=1, help="How many classes to print for each image.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the noise of stages with several samples.")] = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Classify image files. A file that cannot be read is named on stderr, and the others are still answered."""
    plan = _cascade(cascade)
    classifier = varlik.load(model, vqvae=vqvae, device=device)
    labels = classifier.labels(_split(classes, classifier.class_names))
    readable, parts = [], []
    for path in images:
        try:
            parts.append(classifier.tokenize(path))
            readable.append(path)
        except (ValueError, TypeError, OSError) as error:
            _complain(error)
    if parts:
        prediction = classifier.classify(varlik.TokenMaps.concatenate(parts), labels, plan, seed=seed)
        answers = [_answer(classifier, prediction, i, path, topk) for i, path in enumerate(readable)]
        if as_json:
            _print_json({"model": classifier.name, "cascade": str(plan), "images": answers})
        else:
            _print_answers(answers)
    if len(readable) < len(images):
        raise typer.Exit(2)


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(help="Shell pattern, such as 'var-*'.")] = "*",
    as_json: AsJson = False,
) -> None:
    """List the models that `--model` knows by name."""
    from varlik.models.presets import get_preset

    presets = [get_preset(name) for name in varlik.list_models(pattern)]
    if not presets:
        raise ValueError(f"pattern: no model matches {pattern!r}")
    if as_json:
        keys = ("name", "description", "bundled", "licence")
        _print_json([{key: getattr(preset, key) for key in keys} for preset in presets])
        return
    table = Table("model", "what", "where", "licence")
    for preset in presets:
        where = "bundled" if preset.bundled else f"Hub: {preset.repo_id}"
        table.add_row(preset.name, escape(preset.description), escape(where), preset.licence)
    console.print(table)


@app.command()
def demo(
    model: Model = "fashion-mnist",
    cascade: Annotated[str, typer.Option(help='"full", "avarc+" or stages such as 3:5,6:1.')] = "full",
    as_json: AsJson = False,
) -> None:
    """Classify a dozen bundled test pictures beside the naive per-class pass, and time both."""
    from dataclasses import asdict

    from varlik.evaluation import demo as demos

    result = demos.run(model, _cascade(cascade))
    if as_json:
        _print_json(asdict(result))
        return
    table = Table("picture", "truth", "prediction", "posterior", "tokens", title=f"{result.model} on {result.device}")
    for row in result.rows:
        colour = "green" if row.correct else "red"
        table.add_row(row.file, row.truth, f"[{colour}]{row.predicted}[/]", f"{row.posterior:.3f}", str(row.tokens))
    console.print(table)
    naive = result.timings[0]
    times = Table("way", "ms per picture", "tokens", "times faster", title=f"{len(result.rows)} pictures")
    for timing in result.timings:
        milliseconds = 1000 * timing.seconds / len(result.rows)
        times.add_row(timing.name, f"{milliseconds:.1f}", str(timing.tokens), f"{naive.seconds / timing.seconds:.2f}")
    console.print(times)
    console.print(
        f"{sum(row.correct for row in result.rows)} of {len(result.rows)} right; "
        f"largest relative difference from the naive scores {result.difference:.1e}"
    )


@app.command()
def doctor(
    model: Annotated[str, typer.Option("--model", "-m", help="A bundled model.")] = "fashion-mnist",
    as_json: AsJson = False,
) -> None:
    """Print versions, devices and usable paths, and check the bundled model against stored results."""
    from dataclasses import asdict

    from varlik.evaluation.doctor import diagnose

    checks = diagnose(model)
    if as_json:
        _print_json([asdict(check) for check in checks])
    else:
        marks = {True: "[green]ok[/]", False: "[red]FAILED[/]", None: ""}
        table = Table("check", "", "finding")
        for check in checks:
            table.add_row(check.name, marks[check.ok], escape(check.detail))
        console.print(table)
    if any(check.ok is False for check in checks):
        raise typer.Exit(1)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="What to convert: anything that --model takes.")],
    folder: Annotated[Path, typer.Argument(help="Where var.safetensors and vqvae.safetensors go.")],
    vqvae: VQVAEFile = None,
) -> None:
    """Convert a checkpoint to a folder of safetensors files that describe themselves."""
    from varlik.models.checkpoints import convert as convert_checkpoint

    convert_checkpoint(source, folder, vqvae=vqvae)
    console.print(f"wrote {escape(str(folder / 'var.safetensors'))} and {escape(str(folder / 'vqvae.safetensors'))}")


@app.command()
def flops(
    model: Annotated[str, typer.Argument(help="A name from `varlik models`, or a folder; no weights are needed.")],
    classes: Annotated[int | None, typer.Option(help="How many classes to tell apart. [default: all]")] = None,
    cascade: Annotated[str, typer.Option(help='"full", "avarc+" or stages such as 6:10,10:3,10x3:1.')] = "full",
    as_json: AsJson = False,
) -> None:
    """Count the arithmetic of classifying one image, as released and without what is computed twice."""
    from varlik import flops as counts

    var, vqvae = counts.configs_of(model)
    classes, plan = var.num_classes if classes is None else classes, _cascade(cascade)
    ways = {
        way.__name__: {kind: way(plan, var, vqvae, classes, kind) for kind in counts.CONVENTIONS}
        for way in (counts.released, counts.engine)
    }
    once = {kind: counts.class_table(var, classes, kind) for kind in counts.CONVENTIONS}
    if as_json:
        answer: dict[str, Any] = {"model": model, "classes": classes, "cascade": str(plan), "units": counts.UNITS}
        answer |= {way: {kind: cost.as_dict() for kind, cost in costs.items()} for way, costs in ways.items()}
        _print_json(answer | {"class_table": {kind: cost.as_dict() for kind, cost in once.items()}})
        return
    table = Table("way", "step", title=f"{model}, {classes} classes, {plan}: one image")
    for heading in ("rows", "paper convention, G multiply-adds", "true, GFLOP"):
        table.add_column(heading, justify="right")
    for way, costs in ways.items():
        paper, true = costs["paper"], costs["true"]
        table.add_row(way, "all", str(paper.rows), _giga(paper.flops.total), _giga(true.flops.total), style="bold")
        for a, b in zip(paper.steps, true.steps, strict=True):
            table.add_row("", a.name, str(a.rows or ""), _giga(a.flops.total), _giga(b.flops.total))
        table.add_section()
    table.add_row("once per model", "class table", str(classes), *(_giga(cost.total) for cost in once.values()))
    console.print(table)


@app.command()
def benchmark(
    model: Model = "fashion-mnist",
    geometry: Annotated[
        str | None, typer.Option(help="d16, d20, ...: a public transformer's shape with random weights, no --model.")
    ] = None,
    depth: Annotated[int | None, typer.Option(min=1, help="Blocks of --geometry, to fit a small machine.")] = None,
    images: Annotated[int, typer.Option(min=1, help="How many images.")] = 4,
    classes: Annotated[
        int | None, typer.Option(min=1, help="How many classes. [default: all; 10 with --geometry]")
    ] = None,
    scales: Annotated[int | None, typer.Option(min=1, help="Only the likelihood of the first so many scales.")] = None,
    cascade: Annotated[str | None, typer.Option(help='"avarc+" or stages such as 6:10,10:3,10x3:1.')] = None,
    naive_classes: Annotated[
        int | None, typer.Option(min=1, help="Time the naive way on so many classes and scale linearly.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often each way is timed; medians are reported.")] = 5,
    device: Device = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the engine's products: float16, bfloat16, float32. [default: as the device]")
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Print where the engine's time goes, op by op.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the result in this PNG file; needs varlik[plots].")] = None,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Measure peak memory too.")] = True,
    as_json: AsJson = False,
) -> None:
    """Time the engine beside the naive ways on this machine, after checking that all scores agree."""
    from dataclasses import asdict

    from varlik.evaluation import benchmark as benchmarks
    from varlik.evaluation import plot as plots
    from varlik.evaluation import ways

    plan = None if cascade is None else str(_cascade(cascade))
    work = ways.Work(model, geometry, depth, images, classes, scales, plan, naive_classes, device, dtype)
    if plot is not None:
        plots.check_plot(plot)
    report = benchmarks.run(work, repeats, memory)
    if plot is not None:
        plots.plot(report, plot)
    if as_json:
        _print_json(asdict(report))
        return
    table = Table("way", title=ways.title_of(work))
    for heading in ("seconds", "faster", "tokens", "GFLOP", "GFLOP/s", "of peak", "MB"):
        table.add_column(heading, justify="right")
    for row in report.rows:
        megabytes = "n/a" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}"
        speed = (f"{row.seconds:.4g}", f"{row.times_faster:.2f}", f"{row.tokens:.0f}", f"{row.flops / 1e9:.4g}")
        table.add_row(row.name, *speed, f"{row.gflops:.1f}", f"{100 * row.share:.0f} %", megabytes)
    console.print(table)
    if profile:
        console.print(_profile_table(report.profile, report.peak_gflops))
    where = report.machine
    lines = [
        f"seconds: medians of {report.repeats} for all images; tokens, GFLOP: per image; MB: peak beyond the weights",
        f"largest relative difference from the reference: {max(row.difference for row in report.rows):.1e}",
        f"peak: {report.peak_gflops:.1f} GFLOP/s of a large {report.dtype} matrix product, in turn with the ways; "
        f"class tables, once per model: {report.tables_seconds:.3g} s",
        f"{where.device}, {where.cpu}, threads: {where.threads}; Python {where.python}, torch {where.torch}, "
        f"varlik {where.varlik}" + (f", commit {where.commit}" if where.commit else ""),
    ]
    for line in (*report.notes, *lines):
        console.print(escape(line), highlight=False)


def _profile_table(profile: tuple[OpTime, ...], peak: float) -> Table:
    table = Table("op", title="engine, op by op")
    for heading in ("calls", "of time", "GFLOP/s", "of peak"):
        table.add_column(heading, justify="right")
    total = sum(op.seconds for op in profile)
    for op in profile:
        rate = op.flops / op.seconds / 1e9 if op.flops else 0.0
        speed = (f"{rate:.0f}", f"{100 * rate / peak:.0f} %") if rate else ("", "")
        table.add_row(op.name, str(op.calls), f"{100 * op.seconds / total:.1f} %", *speed)
    return table


def _giga(number: int) -> str:
    return f"{number / 1e9:.{1 if number >= 10**11 else 3}f}"


def _cascade(text: str) -> varlik.Cascade:
    named = {"full": varlik.VARC, "avarc+": varlik.AVARC_PLUS}
    return named[text.lower()] if text.lower() in named else varlik.Cascade.parse(text)


def _split(classes: str | None, names: tuple[str, ...]) -> list[str] | None:
    """Commas separate classes, but names may hold commas themselves: take the longest run of parts that is a name."""
    if classes is None:
        return None
    known = {name.casefold() for name in names}
    parts, found = [part.strip() for part in classes.split(",")], []
    while parts:
        for length in range(len(parts), 0, -1):
            candidate = ", ".join(parts[:length])
            if length == 1 or candidate.casefold() in known:
                found.append(candidate)
                parts = parts[length:]
                break
    return found


def _answer(
    classifier: varlik.VARClassifier, prediction: varlik.Prediction, i: int, path: Path, topk: int
) -> dict[str, Any]:
    column = {label: j for j, label in enumerate(prediction.labels.tolist())}
    top = []
    for label in prediction.ranking[i, :topk].tolist():
        score = prediction.log_likelihood[i, column[label]].item()
        top.append(
            {
                "class": label,
                "name": "null" if label == classifier.null_class else classifier.class_names[label],
                "posterior": prediction.posterior[i, column[label]].item(),
                "log_likelihood": None if score != score else score,  # NaN: dropped by an earlier stage
            }
        )
    return {"image": str(path), "top": top, "tokens": int(prediction.cost.tokens[i])}


def _print_answers(answers: list[dict[str, Any]]) -> None:
    table = Table("image", "class", "posterior", "log-likelihood")
    for answer in answers:
        for rank, entry in enumerate(answer["top"]):
            score = "dropped" if entry["log_likelihood"] is None else f"{entry['log_likelihood']:.2f}"
            image = escape(answer["image"]) if rank == 0 else ""
            table.add_row(image, escape(entry["name"]), f"{entry['posterior']:.4f}", score)
    console.print(table)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _complain(error: Exception) -> None:
    print(f"varlik: {' '.join(str(error).split())}", file=sys.stderr)
