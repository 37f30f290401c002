"""What screening saves in time: FAST beside full likelihood by the engine and beside the released cascade done its way.

    python -m benchmarks.screening_speed --data data/glyphs-100      # glyphs-100, test images
    python -m benchmarks.screening_speed --geometry d16              # one first-order pass of VAR-d16's shape

Ways take turns and medians are reported, after FAST's finalists were checked against the naive reference. Writes
`benchmarks/results/screening-speed.json`, or prints only with `--geometry`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import varlik
from benchmarks.model_card import check_against_reference
from varlik import flops
from varlik.cascade import AVARC_PLUS, FAST, VARC
from varlik.datasets import glyphs_100
from varlik.evaluation import ways
from varlik.evaluation.accuracy import tokenize_arrays
from varlik.evaluation.machine import machine
from varlik.models.presets import get_preset
from varlik.tokens import TokenMaps

RESULTS = Path(__file__).parent / "results"
MODEL, FEW = "glyphs-100", 10
FULL, FIRST, ONE = "full likelihood, engine", "first-order pass", "forward pass, one class"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder that examples/glyphs_100.py wrote to")
    parser.add_argument("--images", type=int, default=64, help="images in a batch")
    parser.add_argument("--released", type=int, default=8, help="images for the released cascade")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--geometry", help="measure one first-order pass of d16, d20, ... with random weights")
    options = parser.parse_args()
    if options.geometry is not None:
        bench = ways.prepare(ways.Work(geometry=options.geometry, images=1, classes=FEW))
        print(json.dumps(first_order(bench.classifier, bench.images, options.repeats), indent=1))
        return
    if options.data is None:
        parser.error("--data: name the folder that examples/glyphs_100.py wrote to")
    classifier = varlik.load(MODEL, device="cpu")
    data = glyphs_100("test", options.data)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    images = tokenize_arrays(classifier, data.images[order[: options.images].numpy()])
    members = order[torch.from_numpy(data.labels)[order] % (classifier.null_class // FEW) == 0]
    of_few = tokenize_arrays(classifier, data.images[members[: options.images].numpy()])
    check_against_reference(classifier, images[:20])
    report = {
        "machine": asdict(machine(classifier.device)),
        "images": options.images,
        "cascades": cascades(classifier, images, options.released, options.repeats),
        "first_order": {
            str(count): first_order(classifier, images[:count], options.repeats) for count in (1, options.images)
        },
        "classes": by_classes(classifier, of_few, options.repeats),
        "predicted": predicted(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "screening-speed.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def cascades(classifier: varlik.VARClassifier, images: TokenMaps, released: int, repeats: int) -> dict[str, Any]:
    """Seconds per image of each way, the images in one batch; the released cascade on some of them, one by one."""
    labels = classifier.labels()
    some = images[:released]
    bench = ways.Bench(classifier, some, labels, labels, AVARC_PLUS)
    one = images[:1]
    both = "screen:0.5%,race:0.5%"
    work: dict[str, tuple[int, Callable[[], Any]]] = {
        FULL: (len(images), lambda: classifier.classify(images, cascade=VARC)),
        "A-VARC+, engine": (len(images), lambda: classifier.classify(images, cascade=AVARC_PLUS)),
        "screen and race": (len(images), lambda: classifier.classify(images, cascade=both)),
        "FAST": (len(images), lambda: classifier.classify(images, cascade=FAST)),
        "released cascade, its way": (len(some), lambda: ways.naive(bench)),
        "full likelihood, engine, one image": (1, lambda: classifier.classify(one, cascade=VARC)),
        "screen and race, one image": (1, lambda: classifier.classify(one, cascade=both)),
        "FAST, one image": (1, lambda: classifier.classify(one, cascade=FAST)),
    }
    seconds = take_turns({name: run for name, (_, run) in work.items()}, repeats)
    found = {name: median(seconds[name]) / count for name, (count, _) in work.items()}
    ratios = {
        "full over screen and race": found[FULL] / found["screen and race"],
        "released over screen and race": found["released cascade, its way"] / found["screen and race"],
        "full over screen and race, one image": found["full likelihood, engine, one image"]
        / found["screen and race, one image"],
        "full over FAST": found[FULL] / found["FAST"],
        "released over FAST": found["released cascade, its way"] / found["FAST"],
        "full over FAST, one image": found["full likelihood, engine, one image"] / found["FAST, one image"],
    }
    full = classifier.classify(images, cascade=VARC).classes
    same = {
        name: (classifier.classify(images, cascade=cascade).classes == full).double().mean().item()
        for name, cascade in {"screen and race": both, "FAST": FAST, "A-VARC+": AVARC_PLUS}.items()
    }
    return {"seconds_per_image": found, "ratios": ratios, "same_answers_as_full": same}


def first_order(classifier: varlik.VARClassifier, images: TokenMaps, repeats: int) -> dict[str, float]:
    """A first-order pass in forward passes of as many rows by the engine."""
    engine, labels = classifier.engine, classifier.labels(range(min(100, classifier.null_class)))
    engine.prepare(labels)

    def forward() -> None:
        rows = engine.open(images, labels[:1].expand(len(images), -1))
        engine.advance(rows, engine.config.num_scales, retain=0)
        engine.close(rows)

    work = {ONE: forward, FIRST: lambda: classifier.first_order_log_likelihood(images, labels)}
    seconds = {name: median(found) for name, found in take_turns(work, repeats).items()}
    return {**seconds, "in forward passes": seconds[FIRST] / seconds[ONE]}


def by_classes(classifier: varlik.VARClassifier, images: TokenMaps, repeats: int) -> dict[str, float]:
    """All classes beside every tenth of them, on images of those."""
    few = classifier.labels(range(0, classifier.null_class, classifier.null_class // FEW))
    found: dict[str, float] = {"classes": classifier.null_class, "few": len(few), "images": len(images)}
    for name, cascade in {"screen and race": "screen:0.5%,race:0.5%", "FAST": str(FAST)}.items():
        work = {
            "all": partial(classifier.classify, images, cascade=cascade),
            "few": partial(classifier.classify, images, few, cascade),
        }
        seconds = {kind: median(times) for kind, times in take_turns(work, repeats).items()}
        flops_of = {kind: run().cost.flops.double().mean().item() for kind, run in work.items()}
        found[f"{name}: time ratio"] = seconds["all"] / seconds["few"]
        found[f"{name}: FLOP ratio"] = flops_of["all"] / flops_of["few"]
    return found


def predicted() -> dict[str, float]:
    """FAST on VAR-d16 by count, in G multiply-adds of the paper's convention, encoder included."""
    preset = get_preset("var-d16")
    return {
        f"{count} classes": flops.engine(FAST, preset.var, preset.vqvae, count).flops.total / 1e9
        for count in (100, 1000)
    }


def take_turns(work: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every repeat of each piece of work, which take turns; a first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        for name, run in work.items():
            started = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    main()
