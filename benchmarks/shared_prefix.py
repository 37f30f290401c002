"""What it costs and saves to let all classes read the null class's keys and values at coarse scales.

    python -m benchmarks.shared_prefix                # 300 held-out images of the bundled model

For every prefix: how often the exact best class is among the best 1, 3 and 5 under the approximation, top-1 accuracy,
tokens evaluated and page slots held per image. Prefix 0 is exact.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import varlik
from benchmarks.model_card import check_against_reference
from varlik.datasets import fashion_mnist
from varlik.scoring.kv_cache import NO_PAGE

BATCH = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="fashion-mnist")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--data", type=Path, help="folder with the IDX files")
    options = parser.parse_args()

    classifier = varlik.load(options.model)
    data = fashion_mnist("held-out", options.data)[: options.images]
    truth = torch.from_numpy(data.labels)
    images = classifier.tokenize(data.images[..., None])
    check_against_reference(classifier, images[:20])
    exact = classifier.log_likelihood(images).argmax(1)
    config = classifier.var.config
    print("| shared prefix | top-1 | exact best in best 1 | 3 | 5 | tokens per image | page slots per image |")
    print("|---|---|---|---|---|---|---|")
    for prefix in range(config.num_scales):
        scores, tokens, slots = score(classifier, images, prefix)
        ranking = scores.argsort(dim=1, descending=True)
        recall = [share((ranking[:, :k] == exact.unsqueeze(1)).any(1)) for k in (1, 3, 5)]
        cells = [f"{100 * value:.1f} %" for value in (share(ranking[:, 0] == truth), *recall)]
        print(f"| {prefix} | {' | '.join(cells)} | {tokens:.0f} | {slots:.0f} |")
    print(f"\n{len(images)} held-out images of {options.model}")


def score(classifier: varlik.VARClassifier, images: varlik.TokenMaps, prefix: int) -> tuple[torch.Tensor, float, float]:
    """Scores (B, N) with a shared prefix, tokens evaluated and distinct page slots held, both per image."""
    engine = classifier.engine
    labels = classifier.labels()
    engine.prepare(labels)
    scores, tokens, slots = [], 0, 0
    sizes = torch.tensor([p * p for p in engine.config.patch_nums])
    for first in range(0, len(images), BATCH):
        batch = images[first : first + BATCH]
        rows = engine.open(batch, labels.expand(len(batch), -1), shared_prefix=prefix)
        rows = engine.advance(rows, engine.config.num_scales)
        scores.append(rows.total(engine.config.num_scales).view(len(batch), -1))
        tokens += int(rows.evaluated.sum())
        held = [rows.pages[:, k][rows.pages[:, k] != NO_PAGE].unique() for k in range(1, len(sizes))]
        slots += sum(len(pages) * int(size) for pages, size in zip(held, sizes[1:], strict=True))
        engine.close(rows)
    return torch.cat(scores), tokens / len(images), slots / len(images)


def share(hits: torch.Tensor) -> float:
    return hits.double().mean().item()


if __name__ == "__main__":
    main()
