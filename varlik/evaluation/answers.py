"""Answers to the command line's question: the best classes of picture files, and what it took to find them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from varlik.cascade import Cascade, Screen
from varlik.classifier import VARClassifier
from varlik.evaluation import pictures
from varlik.prediction import Prediction


def classify(
    classifier: VARClassifier,
    paths: Sequence[Path],
    labels: Tensor,
    cascade: Cascade,
    *,
    complain: Callable[[Exception], None],
    topk: int = 3,
    seed: int = 0,
    audit: float = 0.0,
) -> dict[str, Any] | None:
    """What `varlik classify --json` prints; None if no file can be read. Those that cannot are told to `complain`.

    Of each image the `topk` best classes. A class that a stage dropped has no `log_likelihood`, but says which stage
    that was; `estimate` is its first-order score, where there was a screen. `cost` is of all images together.
    """
    started = time.perf_counter()
    found = pictures.read(classifier, paths, complain)
    if found is None:
        return None
    reading = time.perf_counter() - started
    prediction = classifier.classify(found.images, labels, cascade, seed=seed, audit=audit)
    return {
        "model": classifier.name,
        "cascade": str(cascade),
        "images": [_answer(classifier, prediction, i, path, topk) for i, path in enumerate(found.paths)],
        "cost": _cost(prediction, reading),
        "audit": _audit(prediction) if audit else None,
    }


def _answer(classifier: VARClassifier, prediction: Prediction, i: int, path: Path, topk: int) -> dict[str, Any]:
    column = {label: j for j, label in enumerate(prediction.labels.tolist())}
    top = [_class(classifier, prediction, i, column[label]) for label in prediction.ranking[i, :topk].tolist()]
    cost = prediction.cost
    spent = {
        "tokens": int(cost.tokens[i]),
        "backward_tokens": int(cost.backward_tokens[i]),
        "flops": int(cost.flops[i]),
    }
    return {"image": str(path), "top": top, **spent}


def _class(classifier: VARClassifier, prediction: Prediction, i: int, j: int) -> dict[str, Any]:
    """What there is to say about one class of one image."""
    label, stages = int(prediction.labels[j]), prediction.stages
    score = prediction.log_likelihood[i, j].item()
    dropped = math.isnan(score)
    last = max(number for number, stage in enumerate(stages) if stage.reached[i, j] > 0)
    screened, ends_there = isinstance(stages[0].stage, Screen), isinstance(stages[-1].stage, Screen)
    return {
        "class": label,
        "name": "null" if label == classifier.null_class else classifier.class_names[label],
        "posterior": prediction.posterior[i, j].item(),
        "log_likelihood": None if dropped or ends_there else score,
        "estimate": stages[0].log_likelihood[i, j].item() if screened else None,
        "dropped_by": str(stages[last].stage) if dropped else None,
    }


def _cost(prediction: Prediction, reading: float) -> dict[str, Any]:
    cost, count = prediction.cost, len(prediction)
    stages = [
        {
            "stage": str(stage.stage),
            "classes": (stage.reached > 0).sum(1).double().mean().item(),
            "forward_tokens": int(stage.tokens.sum()),
            "backward_tokens": int(stage.backward_tokens.sum()),
            "seconds": stage.seconds,
        }
        for stage in prediction.stages
    ]
    return {
        "forward_tokens": int(cost.tokens.sum()),
        "backward_tokens": int(cost.backward_tokens.sum()),
        "flops": int(cost.flops.sum()),
        "encode_flops": count * cost.encode_flops,
        "full_tokens": count * cost.full_tokens,
        "full_flops": count * cost.full_flops,
        "seconds": {"reading": reading, "classifying": cost.seconds},
        "stages": stages,
    }


def _audit(prediction: Prediction) -> dict[str, Any] | None:
    """None where none of the images was drawn."""
    audit = prediction.audit
    if audit is None:
        return None
    fields = ("images", "disagreements", "delta", "low", "high", "exceeded")
    return {name: getattr(audit, name) for name in fields}
