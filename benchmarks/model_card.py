"""Print the measured part of a bundled model's card.

    python -m benchmarks.model_card fashion-mnist                       # test images
    python -m benchmarks.model_card fashion-mnist --split held-out      # for choices
    python -m benchmarks.model_card glyphs-100 --data data/glyphs-100   # what examples/glyphs_100.py wrote

Full likelihood, every partial scale, cascades, and a naive Bayes on the same tokens as the floor, on all images of the
split. Before any figure is printed, 2,000 scores of the first images are checked against the naive reference.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import varlik
from benchmarks import naive_bayes
from varlik import reference
from varlik.cascade import AVARC_PLUS
from varlik.datasets import DATA_SETS, LabelledImages
from varlik.evaluation.accuracy import evaluate, evaluate_cascade, tokenize_arrays
from varlik.images import load_many
from varlik.tokens import TokenMaps

CHECKED = 2_000  # scores, of an image and a class each
CASCADES = (AVARC_PLUS,)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", choices=DATA_SETS, default="fashion-mnist")
    parser.add_argument("--split", choices=("test", "held-out"), default="test")
    parser.add_argument("--data", type=Path, help="folder with the data set's files")
    parser.add_argument("--images", type=int, help="only the first so many")
    parser.add_argument("--cache", type=Path, help="folder for exact scores, so that a stopped run goes on")
    parser.add_argument("--sigma", type=float, default=0.1, help="noise of smoothed stages")
    options = parser.parse_args()
    if options.model == "glyphs-100" and options.data is None:
        parser.error("--data: name the folder that examples/glyphs_100.py wrote to")

    started = time.monotonic()
    classifier = varlik.load(options.model)
    data = DATA_SETS[options.model](options.split, options.data)[: options.images]
    labels = torch.from_numpy(data.labels)
    images = tokenize_arrays(classifier, data.images)
    checked = images[: max(1, CHECKED // classifier.var.config.num_classes)]
    difference = check_against_reference(classifier, checked)
    config = classifier.var.config
    print("| method | tokens per image | top-1 | same answer as full likelihood |")
    print("|---|---|---|---|")
    report = evaluate(classifier, images, labels, options.cache)
    for scales, accuracy in enumerate(report.by_scales, start=1):
        name = (
            f"likelihood of {scales} of {config.num_scales} scales" if scales < config.num_scales else "full likelihood"
        )
        print(f"| {name} | {config.num_classes * (config.boundaries[scales] - 1)} | {100 * accuracy:.2f} % | |")
    training = DATA_SETS[options.model]("train", options.data)
    floor = naive_bayes_accuracy(classifier, images, labels, training)
    print(f"| naive Bayes on the same tokens | | {100 * floor:.2f} % | |", flush=True)
    for cascade in CASCADES:
        row = evaluate_cascade(classifier, images, labels, report.predictions, cascade, options.sigma)
        share = f"{100 * row.accuracy:.2f} % | {100 * row.agreement:.2f} %"
        print(f"| cascade `{cascade}` | {row.tokens:.0f} | {share} |", flush=True)
    print()
    print(describe_tokens(classifier, images, data))
    print(
        f"{report.images} {options.split} images; {report.nats_per_token:.3f} nats per token of the true class; "
        f"calibration error of the full posterior {report.calibration_error:.3f}; "
        f"noise of smoothed stages {options.sigma}; "
        f"largest relative difference from the naive reference on {len(checked)} images {difference:.1e}; "
        f"{time.monotonic() - started:.0f} s on {classifier.device} with torch {torch.__version__}"
    )


def describe_tokens(classifier: varlik.VARClassifier, images: TokenMaps, data: LabelledImages) -> str:
    """Code use, and the error of reconstructions from all token maps on pixels in [-1, 1]."""
    use = torch.bincount(images.tokens.flatten(), minlength=classifier.var.config.vocab_size).double()
    share = use / use.sum()
    perplexity = torch.exp(-torch.special.xlogy(share, share).sum()).item()
    errors = []
    for i in range(0, len(images), 500):
        pixels = load_many(data.images[i : i + 500, ..., None], classifier.preprocessing)
        decoded = classifier.reconstruct(images[i : i + 500]).mul(2).sub(1).cpu()
        errors.append((decoded - pixels).square().mean((1, 2, 3)))
    return (
        f"tokens: {int((use > 0).sum())} of {len(use)} codes in use, perplexity {perplexity:.1f}; "
        f"mean squared error of reconstructions {torch.cat(errors).mean():.4f}"
    )


def check_against_reference(classifier: varlik.VARClassifier, images: TokenMaps) -> float:
    """Largest relative difference of full likelihoods from the naive pass; `SystemExit` when it exceeds 1e-5."""
    labels = list(range(classifier.var.config.num_classes))
    wanted = reference.log_likelihood(classifier.var, images.tokens, images.teacher_forcing_input, labels)
    difference = ((classifier.log_likelihood(images) - wanted) / wanted).abs().max().item()
    if difference > 1e-5:
        raise SystemExit(f"scores differ from the reference by {difference:.1e}: no figures")
    return difference


def naive_bayes_accuracy(
    classifier: varlik.VARClassifier, images: TokenMaps, labels: torch.Tensor, training: LabelledImages
) -> float:
    """Accuracy of position-wise code counts, fitted on the training images' tokens."""
    config = classifier.var.config
    tokens = tokenize_arrays(classifier, training.images).tokens
    fitted = naive_bayes.fit(tokens, torch.from_numpy(training.labels), config.num_classes, config.vocab_size)
    return (naive_bayes.log_likelihood(fitted, images.tokens).argmax(1) == labels).double().mean().item()


if __name__ == "__main__":
    main()
