"""How often screening, race and fixed cascades give the answer of full likelihood, and for how many tokens.

    python -m benchmarks.screening fashion-mnist
    python -m benchmarks.screening glyphs-100 --data data/glyphs-100 --cache runs/scores

Writes `benchmarks/results/screening-<model>.json`, `.md` and `.png`. The bundled calibration was made on held-out
images and everything here is measured on test images, but for the guarantee: that is for images exchangeable with those
of the calibration, so held-out and test images are pooled and split at random, 40 times. Cascades run through
`VARClassifier.classify`, after 2,000 scores were checked against the naive reference; on random splits the same rules
run on a table of exact scores. A token through the transformer counts 1 forwards, and backwards what it takes in FLOPs
beside that; full likelihood is all tokens under every class.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

import varlik
from benchmarks.model_card import check_against_reference
from varlik import flops
from varlik.calibration import fit as fitting
from varlik.calibration.conformal import share_bounds
from varlik.calibration.fit import Measured
from varlik.cascade import AVARC_PLUS, FAST, Cascade
from varlik.datasets import DATA_SETS
from varlik.evaluation.accuracy import tokenize_arrays
from varlik.evaluation.machine import machine
from varlik.models.config import VARConfig
from varlik.race import on_table
from varlik.scoring.first_order import first_order_log_likelihood
from varlik.smoothing import Smoothing
from varlik.tokens import TokenMaps

RESULTS = Path(__file__).parent / "results"
DELTAS = (0.005, 0.01, 0.02, 0.05)
SPLITS, SPLIT_IMAGES = 40, 1_200
SIZES, DRAWS = (10, 20, 50, 100, 200), 10  # of calibrations without labels
BATCH = 64
# What takes long runs on a part of the images; the groups are what the picture tells apart.
FINER = ("60%:20,80%:5,100%:1", "50%:20,70%:10,90%:3,100%:1")
SLOW = {"A-VARC+": (str(AVARC_PLUS),), "finer fixed": FINER, "race alone": ("race:0.5%", "race:2%")}
QUICK = {
    "screen, then exact": ("screen:1", "screen:3,100%:1", "screen:5,100%:1", "screen:10,100%:1", "screen:0.5%,100%:1"),
}
BEST = {
    "screen and race": tuple(f"screen:{d},race:{d}" for d in ("0.2%", "0.5%", "1%", "2%")),
    "FAST": tuple(f"screen:{d},race:{d},smooth:{d}" for d in ("0.5%", "1%", "2%")),
}
UNCALIBRATED = {"without calibration": ("screen:3,100%:1", "screen:5,100%:1", "screen:10,100%:1", str(FAST))}


@dataclass(frozen=True)
class Row:
    """One way to classify: tokens per image, their share of full likelihood, accuracy, agreement with its bounds.

    `promised` is agreement with what the cascade is calibrated for: with smoothing, that of smoothing in full.
    """

    group: str
    cascade: str
    images: int
    tokens: float
    share: float
    accuracy: float
    agreement: float
    low: float
    high: float
    promised: float
    commit: str | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=DATA_SETS)
    parser.add_argument("--data", type=Path, help="folder with the data set's files")
    parser.add_argument("--cache", type=Path, help="folder for exact scores")
    parser.add_argument("--images", type=int, help="only the first so many test images")
    parser.add_argument(
        "--slow", type=int, default=1_000, help="images for the ways that take long; twice as many otherwise"
    )
    parser.add_argument("--only", nargs="+", help="groups of ways to measure again; the rest stays as it was measured")
    parser.add_argument("--render", action="store_true", help="only write .md and .png again, from the .json")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the three files")
    options = parser.parse_args()
    path = options.out / f"screening-{options.model}"
    if options.render:
        render(json.loads(path.with_suffix(".json").read_text()), path)
        return
    classifier = varlik.load(options.model, device="cpu")
    data = {split: DATA_SETS[options.model](split, options.data) for split in ("held-out", "test")}
    data["test"] = data["test"][: options.images]
    maps = {split: tokenize_arrays(classifier, part.images) for split, part in data.items()}
    check_against_reference(classifier, maps["test"][: max(1, 2_000 // classifier.null_class)])
    smoothing = _calibration(classifier).smoothing
    samples = smoothing.samples if smoothing is not None and smoothing.pays else 1
    tables = {
        split: fitting.measure(
            classifier, images, classifier.labels(), classifier.labels(),
            samples=samples if split == "test" else 1, truth=torch.from_numpy(data[split].labels), cache=options.cache,
        )
        for split, images in maps.items()
    }  # fmt: skip
    here = machine(classifier.device)
    rows = accuracies(classifier, maps["test"], tables["test"], options.slow, options.only)
    rows = [replace(row, commit=here.commit) for row in rows]
    if options.only:
        before = [Row(**row) for row in json.loads(path.with_suffix(".json").read_text())["ways"]]
        rows = [row for row in before if row.group not in options.only] + rows
    report = {
        "model": options.model,
        "machine": asdict(here),
        "ways": [asdict(row) for row in rows],
        "estimates": estimates(classifier, maps["test"], tables["test"]),
        "guarantee": guarantee(classifier, list(tables.values())),
        "sizes": sizes(classifier, tables["held-out"], tables["test"]),
        "failures": failures(classifier, tables["test"]),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    render(report, path)


def render(report: dict[str, Any], path: Path) -> None:
    """Write a report's tables and picture, and print the tables."""
    rows = [Row(**row) for row in report["ways"]]
    text = as_markdown(report, rows)
    path.with_suffix(".md").write_text(text)
    plot(rows, report["model"], path.with_suffix(".png"))
    print(text)


def accuracies(
    classifier: varlik.VARClassifier, images: TokenMaps, table: Measured, slow: int, only: Sequence[str] | None
) -> list[Row]:
    """All ways, or those of groups `only`, on the test images; but for FAST on a random part, smaller for slow ones."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    few, more = order[:slow].tolist(), order[: 2 * slow].tolist()
    rows = []
    if not only or "full" in only:
        rows.append(_row(classifier, "full", "100%:1", table, table.best, _all_tokens(classifier), range(len(images))))
    plans = [(SLOW, few, True), (QUICK, more, True), (BEST, range(len(images)), True), (UNCALIBRATED, more, False)]
    calibration = classifier.calibration
    for groups, chosen, calibrated in plans:
        classifier.calibration = calibration if calibrated else None
        maps = images if len(chosen) == len(images) else _pick(images, chosen)
        for group, texts in groups.items():
            if only and group not in only:
                continue
            for text in texts:
                cascade = Cascade.parse(text) if calibrated else Cascade.parse(text).fixed(classifier.null_class)
                classes, tokens = classify(classifier, maps, cascade)
                rows.append(_row(classifier, group, str(cascade), table, classes, tokens, chosen))
    classifier.calibration = calibration
    return rows


def classify(classifier: varlik.VARClassifier, images: TokenMaps, cascade: Cascade) -> tuple[Tensor, Tensor]:
    """Classes (B,) and tokens (B,), those backwards as they cost."""
    classes, tokens = [], []
    back = backward_cost(classifier.var.config)
    for first in track(range(0, len(images), BATCH), str(cascade), transient=True, console=Console(stderr=True)):
        found = classifier.classify(images[first : first + BATCH], cascade=cascade)
        classes.append(found.classes)
        tokens.append(found.cost.tokens + back * found.cost.backward_tokens)
    return torch.cat(classes), torch.cat(tokens)


def backward_cost(config: VARConfig) -> float:
    """FLOPs of a token backwards over those forwards, in a first-order pass."""
    both, back = flops.first_order(config, "true").total, flops.first_order_backward(config, "true").total
    return back / (both - back)


def estimates(classifier: varlik.VARClassifier, images: TokenMaps, table: Measured) -> dict[str, Any]:
    """Recall of the right class in the best estimates, and correlation, by point of expansion and correction."""
    labels, null = classifier.labels(), torch.tensor([classifier.null_class])
    calibration = _calibration(classifier)
    at_null = first_order_log_likelihood(classifier.engine, images, labels, null).double()
    kinds = {
        "at the null class": at_null,
        "at the mean": table.first_order,
        "at the mean, corrected": calibration.slope * table.first_order + calibration.offset,
    }
    return {
        name: {
            "correlation": fitting.correlation(scores, table.exact.sum(-1)),
            "recall": [recall(scores, table.best, k) for k in (1, 3, 5, 10)],
        }
        for name, scores in kinds.items()
    }


def recall(scores: Tensor, right: Tensor, count: int) -> float:
    """How often class `right` (n,) is among the `count` best of `scores` (n, N)."""
    return (scores.topk(min(count, scores.shape[1]), dim=1).indices == right.unsqueeze(1)).any(1).double().mean().item()


def guarantee(classifier: varlik.VARClassifier, tables: Sequence[Measured]) -> list[dict[str, float]]:
    """Observed disagreement of screen and race under one delta, over random splits into calibration and test."""
    pooled = _pool(tables)
    seen: dict[float, list[tuple[float, float]]] = {delta: [] for delta in DELTAS}
    for split in range(SPLITS):
        order = torch.randperm(len(pooled), generator=torch.Generator().manual_seed(split))
        chosen, rest = pooled[order[:SPLIT_IMAGES]], pooled[order[SPLIT_IMAGES:]]
        calibration = _fit(classifier, chosen)
        for delta in DELTAS:
            answers, tokens = simulate(classifier, rest, calibration, delta)
            seen[delta].append(((answers != rest.best).double().mean().item(), tokens))
    found = []
    for delta, pairs in seen.items():
        wrong, tokens = (torch.tensor(values, dtype=torch.float64) for values in zip(*pairs, strict=True))
        error = (wrong.std() / len(wrong) ** 0.5).item()
        mean = wrong.mean().item()
        found.append(
            {"delta": delta, "disagreement": mean, "error": error, "tokens": tokens.mean().item(),
             "largest": wrong.max().item(), "held": mean <= delta + 2 * error}
        )  # fmt: skip
    return found


def simulate(
    classifier: varlik.VARClassifier, table: Measured, calibration: varlik.Calibration, delta: float
) -> tuple[Tensor, float]:
    """Answers (n,) of screen and race that share `delta`, and tokens per image, from exact scores."""
    config = classifier.var.config
    corrected = calibration.slope * table.first_order + calibration.offset
    rows, answers = on_table(corrected, table.exact, calibration.full.both.margins(delta), config.boundaries)
    sizes_of = torch.tensor([0, *(p * p for p in config.patch_nums[1:])])
    screened = (config.num_tokens - 1) * (1 + backward_cost(config))
    return answers, screened + (rows * sizes_of).sum(1).double().mean().item()


def sizes(classifier: varlik.VARClassifier, held_out: Measured, test: Measured) -> list[dict[str, float]]:
    """What slope and offsets from few unlabelled images are worth: means over random draws of them."""
    found = []
    for size in (0, *SIZES):
        draws = []
        for draw in range(DRAWS if size else 1):
            scores = test.first_order
            if size:
                order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(draw))[:size]
                part = held_out[order]
                slope, offset = fitting.fit_correction(part.first_order, part.exact.sum(-1))
                scores = slope * scores + offset
            behind = fitting.gaps(scores.unsqueeze(-1), test.best)[:, 0]
            margin = behind.quantile(0.995)
            kept = (scores >= scores.amax(1, keepdim=True) - margin).sum(1).double().mean().item()
            draws.append([*(recall(scores, test.best, k) for k in (1, 3, 5, 10)), kept])
        means = torch.tensor(draws, dtype=torch.float64).mean(0).tolist()
        found.append(
            {"images": size, **dict(zip(("best 1", "best 3", "best 5", "best 10", "kept"), means, strict=True))}
        )
    return found


def failures(classifier: varlik.VARClassifier, table: Measured) -> dict[str, Any]:
    """Images whose right class is not among the five best corrected estimates: how many, which classes, how close."""
    calibration = _calibration(classifier)
    scores = calibration.slope * table.first_order + calibration.offset
    exact = table.exact.sum(-1)
    own = scores.gather(1, table.best.unsqueeze(1))
    rank = (scores > own).sum(1)
    missed = rank >= min(5, scores.shape[1] // 3)
    error = (own - exact.gather(1, table.best.unsqueeze(1)))[:, 0]
    level = (scores - exact).median(1).values  # what all estimates of an image have in common
    top2 = exact.topk(2, dim=1).values
    names = classifier.class_names
    pairs = Counter(
        (names[right], names[guess])
        for right, guess in zip(table.best[missed].tolist(), scores[missed].argmax(1).tolist(), strict=True)
    )
    wrong = table.best != table.truth
    return {
        "missed": int(missed.sum()),
        "images": len(table),
        "pairs": [[*pair, count] for pair, count in pairs.most_common(8)],
        "underestimated_nats": {
            "missed": _median((level - error)[missed]), "others": _median((level - error)[~missed])
        },
        "exact_lead_nats": {
            "missed": _median((top2[:, 0] - top2[:, 1])[missed]),
            "others": _median((top2[:, 0] - top2[:, 1])[~missed]),
        },
        "nats_per_image": {
            "missed": _median(-exact.amax(1)[missed]), "others": _median(-exact.amax(1)[~missed])
        },
        "full_likelihood_wrong": {
            "missed": wrong[missed].double().mean().item() if missed.any() else None,
            "others": wrong[~missed].double().mean().item(),
        },
    }  # fmt: skip


def as_markdown(report: dict[str, Any], rows: Sequence[Row]) -> str:
    """The report's tables."""
    lines = [
        f"# Screening and race on {report['model']}",
        "",
        f"`python -m benchmarks.screening {report['model']}`, test images; commits: "
        + ", ".join(sorted({str(row.commit) for row in rows}))
        + f"; a token backwards counts {backward_cost(flops.configs_of(report['model'])[0]):.2f}",
        "",
        "| way | cascade | images | tokens per image | of full | top-1 | agreement (95 % interval) | promised |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {r.group} | `{r.cascade}` | {r.images} | {r.tokens:.0f} | {100 * r.share:.1f} % "
            f"| {100 * r.accuracy:.2f} % | {100 * r.agreement:.2f} % ({100 * r.low:.2f} to {100 * r.high:.2f}) "
            f"| {100 * r.promised:.2f} % |"
            for r in rows
        ),
        "",
        "| first-order scores | correlation | best 1 | 3 | 5 | 10 |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {found['correlation']:.3f} | " + " | ".join(f"{100 * x:.2f} %" for x in found["recall"]) + " |"
            for name, found in report["estimates"].items()
        ),
        "",
        f"Guarantee, {SPLITS} random splits of held-out and test images, {SPLIT_IMAGES} of them to calibrate:",
        "",
        "| delta | disagreement | standard error | within delta + 2 errors | tokens per image |",
        "|---|---|---|---|---|",
        *(
            f"| {100 * g['delta']:g} % | {100 * g['disagreement']:.2f} % | {100 * g['error']:.2f} % "
            f"| {'yes' if g['held'] else 'NO'} | {g['tokens']:.0f} |"
            for g in report["guarantee"]
        ),
        "",
        "| images of the calibration, unlabelled | best 1 | 3 | 5 | 10 | classes kept to hold 99.5 % |",
        "|---|---|---|---|---|---|",
        *(
            f"| {s['images']} | "
            + " | ".join(f"{100 * s[f'best {k}']:.2f} %" for k in (1, 3, 5, 10))
            + f" | {s['kept']:.2f} |"
            for s in report["sizes"]
        ),
        "",
        *failures_in_words(report["failures"]),
        "",
    ]
    return "\n".join(lines)


def failures_in_words(found: dict[str, Any]) -> list[str]:
    """What `failures` found."""
    lines = [
        f"Where first-order scores fail: the right class is missed in {found['missed']} of {found['images']} images."
    ]
    what = {
        "exact_lead_nats": "median lead of the best class over the second, full likelihood, nats",
        "underestimated_nats": "median underestimation of the right class beside the median class, nats",
        "nats_per_image": "median negative log-likelihood, nats",
        "full_likelihood_wrong": "share in which full likelihood is wrong",
    }
    lines += ["", "| | missed | others |", "|---|---|---|"]
    for key, name in what.items():
        both = ("" if found[key][kind] is None else f"{found[key][kind]:.2f}" for kind in ("missed", "others"))
        lines.append(f"| {name} | {' | '.join(both)} |")
    pairs = "; ".join(f"`{right}` taken for `{guess}` {count}" for right, guess, count in found["pairs"])
    return [*lines, "", f"Most frequent: {pairs}."] if pairs else lines


def plot(rows: Sequence[Row], model: str, path: Path) -> None:
    """Agreement and accuracy over tokens."""
    from matplotlib.figure import Figure

    # Okabe and Ito's colours, which colour-blind people tell apart; markers do so too.
    styles = dict(zip(dict.fromkeys(row.group for row in rows), _STYLES, strict=False))
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axis, field, title in zip(
        figure.subplots(1, 2), ("agreement", "accuracy"), ("same answer as full likelihood, %", "top-1, %"), strict=True
    ):
        for group, (colour, marker) in styles.items():
            points = sorted((row.tokens, 100 * getattr(row, field)) for row in rows if row.group == group)
            axis.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle=":", label=group)
        axis.set_xscale("log")
        axis.set_xlabel("tokens per image")
        axis.set_ylabel(title)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8, frameon=False, loc="lower right")
    figure.suptitle(f"{model}, test images", fontsize=10)
    figure.savefig(path, dpi=130)


_STYLES = (
    ("#000000", "*"), ("#D55E00", "s"), ("#E69F00", "D"), ("#CC79A7", "v"), ("#009E73", "^"), ("#0072B2", "o"),
    ("#56B4E9", "P"), ("#999999", "x"),
)  # fmt: skip


def _row(
    classifier: varlik.VARClassifier,
    group: str,
    cascade: str,
    table: Measured,
    classes: Tensor,
    tokens: Tensor,
    chosen: Sequence[int],
) -> Row:
    part = table[torch.as_tensor(list(chosen))]
    same = int((classes == part.best).sum())
    low, high = share_bounds(same, len(part))
    mean = tokens.double().mean().item()
    accuracy = (classes == part.truth).double().mean().item()
    share = mean / (classifier.null_class * classifier.var.config.num_tokens)
    right = fitting.winner(part) if Cascade.parse(cascade).smooths and part.samples is not None else part.best
    promised = (classes == right).double().mean().item()
    return Row(group, cascade, len(part), mean, share, accuracy, same / len(part), low, high, promised)


def _all_tokens(classifier: varlik.VARClassifier) -> Tensor:
    """What full likelihood evaluates through the engine, where scale 1 is a look-up."""
    return torch.tensor([classifier.null_class * (classifier.var.config.num_tokens - 1)])


def _pick(images: TokenMaps, chosen: Sequence[int]) -> TokenMaps:
    return TokenMaps.concatenate([images[i : i + 1] for i in chosen])


def _pool(tables: Sequence[Measured]) -> Measured:
    exact = torch.cat([table.exact for table in tables])
    return Measured(exact, torch.cat([table.first_order for table in tables]))


def _fit(classifier: varlik.VARClassifier, table: Measured) -> varlik.Calibration:
    labels = classifier.labels()
    return fitting.fit(table, classifier.fingerprint, labels, labels, Smoothing())


def _calibration(classifier: varlik.VARClassifier) -> varlik.Calibration:
    if classifier.calibration is None:
        raise SystemExit(f"{classifier.name} has no calibration: make it with python -m examples.calibrate")
    return classifier.calibration


def _median(values: Tensor) -> float | None:
    return values.median().item() if len(values) else None


if __name__ == "__main__":
    main()
