"""Commands that train: `varlik train vqvae|var|cca|incremental`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from varlik.cli.shared import Device, Model, complain, console, progress_bar

if TYPE_CHECKING:
    from varlik.evaluation.training_run import Run, Trained

train = typer.Typer(
    help="Train a VQ-VAE, a VAR on its tokens, fine-tune it, add classes to it. "
    "On several GPUs: torchrun --nproc-per-node 4 -m varlik train ...",
    no_args_is_help=True,
)


def _run(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="Folder with a sub-folder for each class; idx:FOLDER with IDX files; hf:NAME of a Hugging Face data "
            "set; fashion-mnist; or glyphs-100:FOLDER. All but the first may end in @SPLIT.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder of the finished model.")],
    work: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Folder of checkpoints, metrics and tokens.", show_default="work in --out"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on from a checkpoint in --work, if there is one.")
    ] = False,
    held_out: Annotated[
        str | None,
        typer.Option(
            help="Share of the images, or more DATA: how a model does on them decides which weights are kept."
        ),
    ] = None,
    evaluate_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between looks at what is held out.", show_default="250")
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(min=0, help="End after so many looks without improvement; 0: run all steps.", show_default="3"),
    ] = None,
    variants: Annotated[
        str,
        typer.Option(
            help="What is tokenised of each image: plain, then any of flip, crop, flip+crop, as often as wanted. VAR "
            "was trained on crops and mirror images, CCA mirrors nothing."
        ),
    ] = "plain",
    steps: Annotated[int | None, typer.Option(help="Updates of the weights.", show_default="as suits")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images a step, of all processes.", show_default="as suits")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The highest one.", show_default="as suits")] = None,
    accumulate: Annotated[
        int | None,
        typer.Option(help="Parts in which a process takes its share of a batch.", show_default="1, or the preset's"),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="Of matrix products: float32, float16, bfloat16.", show_default="float32, or the preset's"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all random decisions.")] = 0,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints: what a kill can cost.")] = 500,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write metrics for TensorBoard too; it has to be installed.")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Run steps of VAR through torch.compile; needs a C++ compiler.")
    ] = False,
    device: Device = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> Run:
    """What all trainings have in common."""
    from varlik.evaluation.training_run import Run

    return Run(
        data,
        out,
        work,
        resume,
        held_out=held_out,
        evaluate_every=evaluate_every,
        patience=patience,
        variants=tuple(variants.split(",")),
        changes={
            "steps": steps,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "accumulate": accumulate,
            "precision": precision,
            "seed": seed,
            "checkpoint_every": checkpoint_every,
            "tensorboard": tensorboard,
        },
        device=device,
        compiled=compiled,
        quiet=quiet,
        complain=complain,
        progress=progress_bar,
    )


def _command(*without: str) -> Callable[[Callable[..., Trained | None]], None]:
    """Make a `function(run, ...)` a command: with its own options and those of `_run`, but `without` some."""

    def options_of(function: Callable[..., object]) -> list[inspect.Parameter]:
        names = {"Run": object, "Trained": object}  # which are imported for type checkers alone
        found = inspect.signature(function, eval_str=True, locals=names).parameters.values()
        return [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in found]

    def decorate(function: Callable[..., Trained | None]) -> None:
        own = options_of(function)[1:]
        common = [option for option in options_of(_run) if option.name not in without]

        def command(**given: Any) -> None:
            mine = {option.name: given.pop(option.name) for option in own}
            try:
                done = function(_run(**given), **mine)
            except (ImportError, FloatingPointError) as error:  # a missing extra, a training that diverged
                raise ValueError(str(error)) from error
            except KeyboardInterrupt:
                complain("stopped; the same command with --resume goes on")
                raise typer.Exit(130) from None
            if done is not None:
                figures = ", ".join(f"{name} {value:g}" for name, value in done.record.items())
                for line in (*filter(None, (figures,)), *done.notes, f"wrote {done.out}"):
                    console.print(escape(line), highlight=False, soft_wrap=True)

        options = [*common[:2], *own, *common[2:]]
        command.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
        command.__annotations__ = {option.name: option.annotation for option in options}
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        train.command()(command)

    return decorate


Like = Annotated[str, typer.Option(help="Take the shape of this model; see `varlik models`.")]
Config = Annotated[
    Path | None,
    typer.Option(
        dir_okay=False,
        exists=True,
        help='JSON file that changes the shape: {"vqvae": {"vocab_size": 512, ...}, "preprocessing": {...}, "var": '
        '{"depth": 8, ...}}.',
    ),
]


@_command("held_out", "evaluate_every", "patience", "variants", "compiled")
def vqvae(run: Run, like: Like = "fashion-mnist", config: Config = None) -> Trained | None:
    """Train a VQ-VAE, which makes tokens of images, for `varlik train var --vqvae`."""
    from varlik.evaluation import train as training

    return training.vqvae(run, like, config)


@_command()
def var(
    run: Run,
    vqvae: Annotated[
        str, typer.Option(help="Folder that `varlik train vqvae` wrote, or a model whose VQ-VAE to take.")
    ],
    like: Like = "fashion-mnist",
    config: Config = None,
) -> Trained | None:
    """Train a VAR transformer on the tokens of a VQ-VAE: a model for all that varlik does."""
    from varlik.evaluation import train as training

    return training.var(run, vqvae, like, config)


@_command()
def cca(
    run: Run,
    model: Model,
    preset: Annotated[
        str, typer.Option(help="Settings for a model of that size: d16, d20, d24, d30 (as published) or small.")
    ] = "small",
    beta: Annotated[
        float | None, typer.Option(help="What multiplies log-likelihood ratios.", show_default="the preset's")
    ] = None,
    weight: Annotated[
        float | None, typer.Option(help="Of a negative beside a positive.", show_default="the preset's")
    ] = None,
) -> Trained | None:
    """Fine-tune a model to tell classes apart, by condition contrastive alignment."""
    from varlik.evaluation import train as training

    return training.cca(run, model, preset, beta, weight)


@_command()
def incremental(
    run: Run,
    model: Model,
    what: Annotated[
        str, typer.Option(help="What may change: embeddings, adaln (these keep old classes as they are) or all.")
    ] = "embeddings",
) -> Trained | None:
    """Add the classes of DATA to a model, without images of the classes that it knows."""
    from varlik.evaluation import train as training

    return training.incremental(run, model, what)
