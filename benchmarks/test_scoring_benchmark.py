"""The whole scoring path, naive and by the engine: checked against the reference, then timed.

    python -m pytest benchmarks/test_scoring_benchmark.py --benchmark-only

The bundled model, and the d16 geometry with random weights and one block. `varlik benchmark` measures more, with the
ways taking turns; this suite is for comparing a way with itself over time (`--benchmark-save`, `--benchmark-compare`).
"""

from __future__ import annotations

from functools import cache

import pytest

from varlik.evaluation import ways
from varlik.evaluation.benchmark import check
from varlik.flops import count_live

WORK = {
    "fashion-mnist, full": ways.Work(images=1),
    "fashion-mnist, 4 scales": ways.Work(images=1, scales=4),
    "fashion-mnist, cascade 4:3,6x4:1": ways.Work(images=1, cascade="4:3,6x4:1"),
    "d16 with one block, full": ways.Work(geometry="d16", depth=1, images=1, classes=3),
    "d16 with one block, cascade 6:2,10x2:1": ways.Work(
        geometry="d16", depth=1, images=1, classes=3, cascade="6:2,10x2:1"
    ),
}


@cache
def prepared(name: str) -> tuple[ways.Bench, ways.Scores]:
    """The work made ready, and what the reference says."""
    bench = ways.prepare(WORK[name])
    return bench, ways.naive(bench)


@pytest.mark.parametrize("way", ways.VARIANTS)
@pytest.mark.parametrize("name", WORK)
def test_scoring(benchmark, name, way):
    bench, expected = prepared(name)
    if way == ways.BATCHED and not bench.plain:
        pytest.skip("a cascade has no batched naive way")
    run = ways.VARIANTS[way]
    run(bench)  # the engine builds its class tables once per model
    found: list[ways.Scores] = []
    flops = count_live(lambda: found.append(run(bench)))
    difference = check(bench, {ways.NAIVE: expected, way: found[0]})[way]
    benchmark.group = name
    benchmark.pedantic(run, args=(bench,), rounds=5)
    benchmark.extra_info |= {"tokens": found[0].tokens, "flops": flops, "difference": difference}
    if benchmark.stats is not None:  # None with --benchmark-disable
        benchmark.extra_info["GFLOP/s"] = flops / benchmark.stats.stats.median / 1e9
