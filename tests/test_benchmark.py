"""The benchmark: figures only for scores that are right, and figures that hang together."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

import varlik
from varlik.evaluation import benchmark as benchmarks
from varlik.evaluation import ways
from varlik.evaluation.ways import BATCHED, ENGINE, NAIVE, VARIANTS, Work
from varlik.flops import class_pass

WORK = Work(images=1, classes=3)


@pytest.fixture(autouse=True)
def small_peak(monkeypatch):
    monkeypatch.setattr(benchmarks, "PEAK_SIZE", 256)


@pytest.fixture
def no_clock(monkeypatch):
    """Nothing may be timed but the building of tables, which comes before the check."""
    real, calls = benchmarks._seconds, []

    def once(bench, work):
        calls.append(work)
        assert len(calls) == 1
        return real(bench, work)

    monkeypatch.setattr(benchmarks, "_seconds", once)


def wrong_scores(bench):
    scores = VARIANTS[BATCHED](bench)
    return replace(scores, stages=[(labels, found * (1 + 1e-4)) for labels, found in scores.stages])


def test_full_likelihood_is_checked_and_measured():
    report = benchmarks.run(WORK, repeats=1, memory=False)
    config = varlik.load("fashion-mnist").var.config
    rows = {row.name: row for row in report.rows}
    assert list(rows) == [NAIVE, BATCHED, ENGINE]
    assert rows[NAIVE].times_faster == 1
    for row in report.rows:
        assert row.difference <= 1e-5
        assert row.seconds > 0
        assert row.times_faster == pytest.approx(rows[NAIVE].seconds / row.seconds)
        assert row.gflops == pytest.approx(row.flops / row.seconds / 1e9)
        assert row.share == pytest.approx(row.gflops / report.peak_gflops)
    assert rows[NAIVE].tokens == rows[BATCHED].tokens == 3 * config.num_tokens
    assert rows[ENGINE].tokens == 3 * (config.num_tokens - 1)
    assert rows[NAIVE].flops == 3 * class_pass(config, convention="true").total
    assert rows[ENGINE].flops < rows[NAIVE].flops
    assert report.notes == ()


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_peak_memory_comes_from_a_process_of_its_own():
    peak, note = benchmarks._peak_in_own_process(ENGINE, replace(WORK, scales=4))
    assert (peak is None) == bool(note)
    assert peak is None or 2**17 < peak < 2**29
    peak, note = benchmarks._peak_in_own_process("no such way", WORK)
    assert peak is None
    assert "ended with code 1 KeyError" in note


def test_cascade_is_compared_stage_by_stage():
    report = benchmarks.run(replace(WORK, cascade="3:2,6x2:1"), repeats=1, memory=False)
    assert [row.name for row in report.rows] == [NAIVE, ENGINE]
    naive, engine = report.rows
    boundaries = varlik.load("fashion-mnist").var.config.boundaries
    assert naive.tokens == 3 * boundaries[3] + 2 * 2 * boundaries[6]
    assert engine.tokens < naive.tokens
    assert engine.difference <= 1e-5


def test_naive_time_of_some_classes_is_scaled_and_said_to_be():
    report = benchmarks.run(replace(WORK, naive_classes=1, scales=3), repeats=1, memory=False)
    naive, batched, _ = report.rows
    assert naive.tokens == batched.tokens
    assert naive.flops == batched.flops
    assert "1 of 3 classes and scaled linearly" in report.notes[0]


def test_classes_spared_the_reference_are_checked_too(monkeypatch, no_clock):
    def wrong_in_the_last(bench):
        (labels, found), *_ = VARIANTS[BATCHED](bench).stages
        found[:, -1] *= 1.001
        return ways.Scores([(labels, found)], 1.0)

    monkeypatch.setitem(VARIANTS, ENGINE, wrong_in_the_last)
    with pytest.raises(ValueError, match="'engine' differ from the reference"):
        benchmarks.run(replace(WORK, naive_classes=2), repeats=1, memory=False)


@pytest.mark.parametrize("name", [BATCHED, ENGINE])
def test_wrong_scores_are_refused_before_any_time(monkeypatch, no_clock, name):
    wrong = wrong_scores(benchmarks.prepare(WORK))
    monkeypatch.setitem(VARIANTS, name, lambda bench: wrong)
    with pytest.raises(ValueError, match=f"'{name}' differ from the reference by 1.0e-04"):
        benchmarks.run(WORK, repeats=1, memory=False)


def test_a_missing_class_is_a_wrong_score(monkeypatch, no_clock):
    bench = benchmarks.prepare(WORK)
    fewer = VARIANTS[ENGINE](replace(bench, labels=bench.labels[:2]))
    monkeypatch.setitem(VARIANTS, ENGINE, lambda bench: fewer)
    with pytest.raises(ValueError, match="by inf relative"):
        benchmarks.run(WORK, repeats=1, memory=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": 11}, "classes: expected 1 to 10, got 11"),
        ({"images": 0}, "images: expected 1 or more, got 0"),
        ({"scales": 2, "cascade": "3:1"}, "scales: a cascade says itself"),
        ({"scales": 99}, "wants 99 scales"),
        ({"depth": 2}, "depth: only a geometry"),
        ({"geometry": "d17"}, "did you mean var-d16"),
        ({"cascade": "3:2,6:1", "naive_classes": 1}, "naive_classes: the time of a cascade is not linear"),
    ],
)
def test_impossible_work_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        benchmarks.run(replace(WORK, **change), memory=False)


def test_repeats_below_one_are_refused():
    with pytest.raises(ValueError, match="repeats: expected 1 or more, got 0"):
        benchmarks.run(WORK, repeats=0)


def test_random_geometry_tells_classes_apart():
    bench = benchmarks.prepare(Work(geometry="d16", depth=1, images=1, classes=2, scales=3))
    scores = VARIANTS[ENGINE](bench)
    benchmarks.check(bench, {NAIVE: VARIANTS[NAIVE](bench), ENGINE: scores})
    (found,) = scores.stages[0][1]
    assert abs(found[0] - found[1]) > 1e-3 * abs(found[0])


SMALL = ("benchmark", "--images", 1, "--classes", 3, "--scales", 3, "--repeats", 1, "--no-memory")


def test_command_prints_json_and_draws(run, tmp_path):
    pytest.importorskip("matplotlib")
    code, out, _ = run(*SMALL, "--json", "--plot", tmp_path / "bars.png")
    assert code == 0
    answer = json.loads(out)
    assert [row["name"] for row in answer["rows"]] == [NAIVE, BATCHED, ENGINE]
    assert answer["machine"]["torch"]
    assert answer["rows"][0]["peak_bytes"] is None
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_command_prints_a_table(run):
    code, out, _ = run(*SMALL)
    assert code == 0
    for text in (NAIVE, BATCHED, ENGINE, "n/a", "largest relative difference", "threads", "torch"):
        assert text in out


def test_command_prints_no_figures_for_wrong_scores(run, monkeypatch):
    monkeypatch.setitem(VARIANTS, ENGINE, wrong_scores)
    code, out, err = run(*SMALL)
    assert (code, out) == (2, "")
    assert "no figures" in err
    assert len(err.splitlines()) == 1


def test_profile_accounts_for_all_time_and_work():
    report = benchmarks.run(WORK, repeats=1, memory=False)
    names = [op.name for op in report.profile]
    assert names[-1] == "other"
    assert {"linear 128 -> 384", "scale_causal_attention", "scale_log_prob", "qk_norm"} <= set(names)
    assert [op.seconds for op in report.profile[:-1]] == sorted(
        (op.seconds for op in report.profile[:-1]), reverse=True
    )
    assert all(op.seconds > 0 for op in report.profile[:-1])
    # All matrix products are ops of ours.
    engine = next(row for row in report.rows if row.name == ENGINE)
    assert sum(op.flops for op in report.profile) == engine.flops
