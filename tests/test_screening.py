"""Cascades that screen, race and smooth: as text, by hand from tables of exact scores, and what they promise."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import MANY, PATCH_NUMS, make_classifier, make_images

import varlik
from varlik import flops
from varlik.calibration import Calibration, Rule, calibrate, fit
from varlik.calibration.artefact import Rules, SmoothingPlan
from varlik.calibration.conformal import share_bounds
from varlik.calibration.fit import measure
from varlik.cascade import FAST, Cascade, Race, Screen, Smooth, Stage
from varlik.models import checkpoints
from varlik.race import STOP_SHARE, best, best_only, due, within_margin
from varlik.scoring.score_table import score_table
from varlik.smoothing import Smoothing, perturb
from varlik.tokens import TokenMaps

SIZES = torch.tensor([p * p for p in PATCH_NUMS])
BOUNDARIES = torch.tensor(MANY.boundaries)
HUGE = 1e6  # a margin that nobody exceeds


@pytest.fixture(scope="module")
def module_classifier():
    return make_classifier()


@pytest.fixture(scope="module")
def images(module_classifier):
    return make_images(module_classifier, 16)


@pytest.fixture
def classifier(module_classifier):
    """Without a calibration, and as if it had never said so."""
    module_classifier.calibration = None
    module_classifier._told = False
    module_classifier._auditor.clear()
    return module_classifier


@pytest.fixture(scope="module")
def exact(module_classifier, images):
    """Log-likelihoods of each scale, (B, N, K)."""
    return score_table(module_classifier.engine, images, module_classifier.labels())


@pytest.fixture(scope="module")
def pool(module_classifier):
    """Measured scores of 300 images, among whose classes there is something to confuse."""
    images = make_images(module_classifier, 300, seed=2)
    labels = module_classifier.labels()
    return measure(module_classifier, images, labels, labels)


def calibration_of(classifier, screen=HUGE, race=HUGE, smooth=None, **changes):
    """A calibration whose margins are given, whatever delta is asked for (down to 0.1 %)."""
    labels = classifier.labels()
    screen, race = (torch.as_tensor(m, dtype=torch.float64) for m in (screen, race))

    def rule(*spread):
        return Rule(torch.cat(spread), torch.ones(999, dtype=torch.float64))

    steps = screen.view(1), race.expand(4)
    rules = Rules(rule(steps[0]), rule(steps[1]), rule(*steps))
    plan, smoothed = None, None
    if smooth is not None:
        plan = SmoothingPlan(3, 0.1, 4, None, None)
        smoothed = replace(rules, smooth=rule(torch.as_tensor(smooth, dtype=torch.float64).expand(3)))
    made = Calibration(
        fingerprint=classifier.fingerprint,
        images=1500,
        labels=labels,
        at=labels,
        slope=0.7,
        offset=torch.linspace(-2, 2, len(labels)),
        full=rules,
        recall=torch.ones(10, dtype=torch.float64),
        correlation=1.0,
        deltas=torch.tensor([0.001, 0.5], dtype=torch.float64),
        race_rows=torch.tensor([[4.0, 3, 2, 2], [2.0, 1, 1, 1]], dtype=torch.float64),
        smoothing=plan,
        smoothed=smoothed,
    )
    return replace(made, **changes)


# By hand: what the stages do, from tables of scores alone


def within(scores, alive, margin):
    """Those of `alive` no further than `margin` behind the best of them."""
    scores = scores.masked_fill(~alive, -torch.inf)
    return alive & (scores >= scores.amax(1, keepdim=True) - margin)


def raced(exact, alive, margins, log_prior=0.0, scored=1, stop_share=STOP_SHARE):
    """Over how many scales a race scores each class, (B, N), and who wins it, (B,)."""
    sums, reached = exact.double().cumsum(-1) + torch.as_tensor(log_prior).unsqueeze(-1), torch.zeros_like(alive).long()
    for scale in range(min(scored + 1, 4), 5):
        reached = torch.where(alive, scale, reached)
        if scale < 4:
            stops = alive.sum(1, keepdim=True) * SIZES[scale] >= stop_share * SIZES.sum()
            alive = torch.where(stops, within(sums[..., scale - 1], alive, margins[scale - 1]), alive)
    return reached, sums[..., -1].masked_fill(~alive, -torch.inf).argmax(1)


def screened_and_raced(measured, calibration, delta):
    """Answers (n,) of `screen:delta,race:delta` and classes scored at each scale, from tables alone."""
    margins = calibration.full.both.margins(delta)
    corrected = calibration.slope * measured.first_order + calibration.offset.double()
    alive = within(corrected, torch.ones_like(corrected).bool(), margins[0])
    return raced(measured.exact, alive, margins[1:])


def tokens_of(reached, scored=1):
    """Tokens by class (B, N) and by scale (B, K) of a race."""
    by_class = (BOUNDARIES[reached] - BOUNDARIES[scored]).clamp(min=0)
    rows = torch.stack([(reached >= k).sum(1) * (k > scored) for k in range(1, 5)], dim=1)
    return by_class, rows * SIZES


SCREEN_TOKENS = torch.tensor([0, 4, 9, 16])


def answers_agree(one, other, cost=True):
    """The same answers, and with `cost` for the same work; scores to 1e-5."""
    assert torch.equal(one.classes, other.classes)
    assert torch.equal(one.ranking, other.ranking)
    torch.testing.assert_close(one.log_likelihood, other.log_likelihood, rtol=1e-5, atol=0, equal_nan=True)
    torch.testing.assert_close(one.posterior, other.posterior, rtol=1e-3, atol=1e-6)
    for name in ("tokens_by_class", "tokens_by_scale", "backward_tokens", "flops") if cost else ():
        assert torch.equal(getattr(one.cost, name), getattr(other.cost, name))
    for mine, theirs in zip(one.stages, other.stages, strict=True):
        assert torch.equal(mine.reached, theirs.reached)


# Text and values


@st.composite
def cascades(draw):
    """Any cascade that may be."""
    deltas = st.floats(0, 1, exclude_min=True, exclude_max=True)
    fixed, keep, scales = [], 40, 1
    stages = []
    if draw(st.booleans()):
        if draw(st.booleans()):
            keep = draw(st.integers(1, keep))
            stages.append(Screen(keep=keep))
        else:
            stages.append(Screen(delta=draw(deltas)))
    for _ in range(draw(st.integers(0, 3))):
        keep, scales = draw(st.integers(1, keep)), draw(st.integers(scales, 10))
        fixed.append(Stage(draw(st.sampled_from([scales, f"{10 * scales}%"])), keep))
    stages += fixed
    if draw(st.booleans()):
        stages.append(Race(draw(deltas)))
    if draw(st.booleans()):
        stages.append(Smooth(draw(deltas)))
    if not stages or isinstance(stages[-1], Stage | Screen):
        stages.append(Stage("100%", 1, draw(st.integers(1, 3))))
    return Cascade(tuple(stages))


@given(cascades())
@settings(max_examples=150, deadline=None)
def test_text_reads_back_as_the_same_cascade(cascade):
    assert Cascade.parse(str(cascade)) == cascade


@given(cascades(), st.integers(1, 1000))
@settings(max_examples=150, deadline=None)
def test_every_cascade_can_do_without_calibration(cascade, classes):
    fixed = cascade.fixed(classes)
    assert not fixed.calibrated
    assert not any(isinstance(stage, Race | Smooth) for stage in fixed.stages)
    assert fixed.fixed(classes) == fixed
    mine, theirs = ([stage for stage in c.stages if isinstance(stage, Stage)] for c in (fixed, cascade))
    assert mine[: len(theirs)] == theirs
    assert isinstance(fixed.stages[0], Screen) == isinstance(cascade.stages[0], Screen)
    if any(isinstance(stage, Race) for stage in cascade.stages):
        assert fixed.stages[-1] == Stage("100%", 1)


def test_percentages_by_hand():
    cascade = Cascade.parse("screen:0.7%, 60%:12,race:7%,smooth:12.5%")
    assert cascade.stages == (Screen(delta=0.007), Stage("60%", 12), Race(0.07), Smooth(0.125))
    assert str(cascade) == "screen:0.7%,60%:12,race:7%,smooth:12.5%"
    assert str(Cascade((Screen(delta=1e-7), Race(0.1 + 0.2)))) == "screen:0.00001%,race:30.000000000000004%"
    assert Cascade.parse("screen:3,6:1").stages[0] == Screen(keep=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("screen:0.5,6:1", "cannot read stage 'screen:0.5'"),
        ("race:5", "cannot read stage 'race:5'"),
        ("smooth:3", "cannot read stage 'smooth:3'"),
        ("screen:-1%,6:1", "cannot read stage"),
        ("screen:1e-3%,6:1", "cannot read stage"),
        ("glance:1%", "cannot read stage 'glance:1%'"),
        ("screen:0,6:1", "keep: expected 1 or more, got 0"),
        ("screen:0%,6:1", "delta: expected a share between 0 and 1, got 0"),
        ("race:100%", "delta: expected a share between 0 and 1, got 1"),
        ("smooth:250%", "delta: expected a share between 0 and 1, got 2.5"),
        ("screen:1%", "last stage must keep 1 class, screen:1% keeps as many as it takes"),
        ("screen:4", "last stage must keep 1 class, screen:4 keeps 4"),
        ("6:3,screen:1%,race:1%", "screen:1% comes first or not at all, not after 6:3"),
        ("screen:1%,screen:3,race:1%", "screen:3 comes first or not at all, not after screen:1%"),
        ("race:1%,6:1", "race:1% leaves one class; only smoothing comes after it, not 6:1"),
        ("race:1%,race:1%", "race:1% leaves one class"),
        ("6x2:3,race:1%", "race:1% runs on the clean image"),
        ("6x2:3,smooth:1%", "smooth:1% comes last, after stages with one sample"),
        ("smooth:1%,6:1", "smooth:1% comes last"),
        ("screen:3,6:4,6:1", "narrows"),
    ],
)
def test_text_that_makes_no_sense(text, message):
    with pytest.raises(ValueError) as found:
        Cascade.parse(text)
    assert message in str(found.value)


def test_values_that_make_no_sense():
    for wrong in ({}, {"keep": 3, "delta": 0.1}):
        with pytest.raises(ValueError, match="screen: expected keep or delta, one of the two"):
            Screen(**wrong)
    with pytest.raises(ValueError, match="keep: expected 1 or more, got -2"):
        Screen(keep=-2)
    for stage in (Race, Smooth, lambda delta: Screen(delta=delta)):
        for delta in (0, 1, -0.5, 2, float("nan")):
            with pytest.raises(ValueError, match="delta: expected a share between 0 and 1"):
                stage(delta)


@pytest.mark.parametrize(
    ("text", "delta", "shares", "smooths"),
    [
        ("6:3,10:1", 0, False, False),
        ("screen:5,10:1", 0, False, False),
        ("screen:2%,10:1", 0.02, False, False),
        ("screen:2%,race:2%", 0.02, True, False),
        ("screen:2%,race:3%", 0.05, False, False),
        ("screen:2%,6:9,race:2%", 0.02, True, False),
        ("screen:5,race:3%", 0.03, False, False),
        ("race:3%,smooth:1%", 0.04, False, True),
        ("screen:2%,race:2%,smooth:2%", 0.04, True, True),
        ("smooth:2%", 0.02, False, True),
    ],
)
def test_what_a_cascade_promises(text, delta, shares, smooths):
    cascade = Cascade.parse(text)
    assert cascade.delta == pytest.approx(delta)
    assert (cascade.shares_delta, cascade.smooths, cascade.calibrated) == (shares, smooths, delta > 0)


@pytest.mark.parametrize(
    ("text", "classes", "fixed"),
    [
        ("screen:0.5%,race:0.5%,smooth:0.5%", 100, "screen:6,100%:1"),
        ("screen:0.5%,race:0.5%", 1000, "screen:9,100%:1"),
        ("race:1%", 100, "100%:1"),
        ("6:9,race:1%", 100, "6:9,100%:1"),
        ("6:1,race:1%", 100, "6:1,100%:1"),
        ("smooth:1%", 100, "100%:1"),
        ("screen:1%,100%:1", 100, "screen:6,100%:1"),
        ("screen:3,race:1%", 100, "screen:3,100%:1"),
        ("screen:1%,3:20,6:1", 100, "screen:20,3:20,6:1"),
        ("6:3,smooth:1%", 100, "6:3,100%:1"),
        ("screen:4,smooth:1%", 100, "screen:4,100%:1"),
        ("6:3,10:1", 100, "6:3,10:1"),
    ],
)
def test_fixed_counts_by_hand(text, classes, fixed):
    assert str(Cascade.parse(text).fixed(classes)) == fixed


# Who is kept


def test_within_a_margin_of_the_best_that_is_left():
    nan, inf = math.nan, math.inf
    scores = torch.tensor([[5.0, 9, 4, nan], [1, 1, 0, nan], [-inf, -inf, 3, nan]])
    alive = torch.tensor([[True, False, True, False], [True, True, True, False], [True, True, False, False]])

    def kept(margin):
        return [row.nonzero().flatten().tolist() for row in within_margin(scores, alive, margin)]

    assert kept(0.0) == [[0], [0, 1], [0, 1]]
    assert kept(1.0) == [[0, 2], [0, 1, 2], [0, 1]]
    assert kept(0.99) == [[0], [0, 1], [0, 1]]
    assert kept(inf) == [[0, 2], [0, 1, 2], [0, 1]]  # nobody comes back
    assert kept(nan) == [[0], [0], [0]]  # one is always left


def test_the_best_ones():
    scores = torch.tensor([[5.0, 9, 4, math.nan], [1, 1, 0, math.nan], [-math.inf, -math.inf, math.nan, 3]])
    alive = torch.tensor([[True, False, True, True], [True, True, True, False], [True, True, False, False]])
    kept = best_only(scores.nan_to_num(-math.inf), alive)
    assert [row.nonzero().flatten().tolist() for row in kept] == [[0], [0], [0]]
    for keep, wanted in ((1, [[1], [0], [3]]), (2, [[0, 1], [0, 1], [0, 3]]), (9, [[0, 1, 2], [0, 1, 2], [0, 1, 3]])):
        assert [row.nonzero().flatten().tolist() for row in best(scores, keep)] == wanted


def test_a_race_stops_where_the_next_scale_costs_more():
    """Than half of one class's tokens, 15 of 30: two classes at scale 3, one at scale 4."""
    alive = torch.arange(4) < torch.tensor([[0], [1], [2], [4]])
    assert due(alive, MANY.boundaries, 1).tolist() == [False, False, False, True]
    assert due(alive, MANY.boundaries, 2).tolist() == [False, False, True, True]
    assert due(alive, MANY.boundaries, 3).tolist() == [False, True, True, True]
    assert due(alive, MANY.boundaries, 4).all()


# Without a calibration


def test_without_a_calibration_it_says_so_once_and_takes_fixed_counts(classifier, images):
    message = "tiny has no calibration for screen:0.5%,race:0.5%,smooth:0.5%: running screen:6,100%:1 instead"
    with pytest.warns(UserWarning, match="has no calibration") as told:
        found = classifier.classify(images, cascade=FAST)
    assert [str(w.message) for w in told] == [f"{message}; make one with varlik calibrate"]
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answers_agree(classifier.classify(images, cascade="screen:0.5%,race:0.5%"), found)
        answers_agree(classifier.classify(images, cascade=FAST.fixed(12)), found)
        answers_agree(classifier.classify(images, cascade="screen:6,100%:1"), found)
    assert [stage.stage for stage in found.stages] == list(FAST.fixed(12).stages)


@pytest.mark.parametrize("corrected", [False, True])
def test_screening_keeps_the_best_estimates(classifier, images, exact, corrected):
    estimates = classifier.first_order_log_likelihood(images)
    if corrected:
        classifier.calibration = calibration_of(classifier)
        estimates = 0.7 * estimates + torch.linspace(-2, 2, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # counts take no calibration
        found = classifier.classify(images, cascade="screen:3,100%:1")
    screen, full = found.stages
    torch.testing.assert_close(screen.log_likelihood, estimates, rtol=1e-5, atol=0)
    assert screen.reached.eq(4).all()
    finalists = estimates.topk(3).indices
    wanted = torch.full((16, 12), torch.nan).scatter_(1, finalists, exact.sum(-1).gather(1, finalists))
    torch.testing.assert_close(found.log_likelihood, wanted, rtol=1e-5, atol=0, equal_nan=True)
    assert torch.equal(found.classes, wanted.nan_to_num(-math.inf).argmax(1))
    assert torch.equal(full.tokens_by_class, 29 * wanted.isfinite().long())
    assert torch.equal(screen.tokens_by_scale, SCREEN_TOKENS.expand(16, -1))
    assert screen.tokens_by_class.eq(0).all()
    # What comes first in the ranking is what went furthest; then come the others by their estimates.
    for i in range(16):
        rest = [c for c in estimates[i].argsort(descending=True).tolist() if c not in finalists[i].tolist()]
        order = wanted[i].nan_to_num(-math.inf).argsort(descending=True)[:3].tolist()
        assert found.ranking[i].tolist() == order + rest


def test_screening_alone_answers_by_estimates(classifier, images):
    found = classifier.classify(images, cascade="screen:1")
    estimates = classifier.first_order_log_likelihood(images)
    torch.testing.assert_close(found.log_likelihood, estimates, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.posterior, estimates.softmax(1), rtol=1e-3, atol=1e-6)
    assert torch.equal(found.ranking, estimates.argsort(1, descending=True))


def test_the_null_class_may_be_among_the_candidates(classifier, images):
    classes = [4, 12, 0, 7]
    full = classifier.log_likelihood(images, classes)
    found = classifier.classify(images, classes, cascade="screen:3,100%:1")
    estimates = classifier.first_order_log_likelihood(images, classes)
    torch.testing.assert_close(found.stages[0].log_likelihood, estimates, rtol=1e-5, atol=0)
    kept = torch.zeros(16, 4).scatter_(1, estimates.topk(3).indices, 1).bool()
    wanted = full.masked_fill(~kept, -torch.inf).argmax(1)
    assert torch.equal(found.classes, torch.tensor(classes)[wanted])
    assert found.names == tuple(["class 4", "null", "class 0", "class 7"][i] for i in wanted)
    assert (found.ranking == 12).any(1).all()


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_a_null_class_of_no_use_does_no_harm(images, value):
    """What is expanded around is the mean of the classes."""
    sound, broken = make_classifier(), make_classifier()
    with torch.no_grad():
        broken.var.class_emb.weight[12] = value
    answers_agree(broken.classify(images, cascade="screen:4,100%:1"), sound.classify(images, cascade="screen:4,100%:1"))
    calibration = calibrate(broken, images)
    assert calibration.offset.isfinite().all()
    broken.calibration = calibration
    assert broken.classify(images, cascade="screen:20%,race:20%").log_likelihood.isfinite().any(1).all()


# With a calibration


FULL_CASCADES = ["race:1%", "screen:1%,race:1%", "screen:1%,race:2%", "screen:1%,100%:1", "screen:12,race:1%"]


@pytest.mark.parametrize("text", [*FULL_CASCADES, "2:12,race:1%", "4:12,race:1%", "screen:1%,3:12,race:1%"])
def test_margins_beyond_reach_give_full_likelihood(classifier, images, text):
    full = classifier.classify(images)
    classifier.calibration = calibration_of(classifier)
    found = classifier.classify(images, cascade=text)
    assert torch.equal(found.classes, full.classes)
    assert torch.equal(found.ranking, full.ranking)
    torch.testing.assert_close(found.log_likelihood, full.log_likelihood, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.posterior, full.posterior, rtol=1e-3, atol=1e-6)
    assert torch.equal(found.cost.tokens_by_class, full.cost.tokens_by_class)
    screened = 29 * text.startswith("screen")
    assert torch.equal(found.cost.tokens, full.cost.tokens + screened)
    assert found.cost.backward_tokens.eq(screened).all()


def test_margins_of_zero_score_the_best_estimate_alone(classifier, images, exact):
    classifier.calibration = calibration_of(classifier, screen=0.0)
    best = (0.7 * classifier.first_order_log_likelihood(images) + torch.linspace(-2, 2, 12)).argmax(1)
    for text in ("screen:1%,race:1%", "screen:1%,100%:1", "screen:1%,smooth:1%"):
        found = classifier.classify(images, cascade=text)
        assert torch.equal(found.classes, best)
        assert torch.equal(found.cost.tokens_by_class, torch.zeros(16, 12).long().scatter(1, best[:, None], 29))
        assert found.cost.tokens.eq(2 * 29).all()
        torch.testing.assert_close(
            found.log_likelihood.nan_to_num(0).sum(1), exact.sum(-1).gather(1, best[:, None])[:, 0], rtol=1e-5, atol=0
        )
        torch.testing.assert_close(found.posterior.amax(1), torch.ones(16))


@pytest.mark.parametrize("stop_share", [STOP_SHARE, 0, 2])
@pytest.mark.parametrize("margins", [(9.0, 0.5, 2, 4, 0), (4.0, 0, 0, 0, 0), (15.0, 8, 8, 1, 0)], ids=str)
@pytest.mark.parametrize("config", [MANY, replace(MANY, shared_aln=True)], ids=["plain", "shared"])
def test_screen_and_race_do_what_the_table_says(config, margins, stop_share, images, monkeypatch):
    """The same survivors after every scale, for the same tokens."""
    monkeypatch.setattr("varlik.race.STOP_SHARE", stop_share)
    classifier = make_classifier(config)
    classifier.calibration = calibration_of(classifier, screen=margins[0], race=margins[1:])
    exact = score_table(classifier.engine, images, classifier.labels())
    everyone = torch.ones(16, 12, dtype=torch.bool)
    estimates = 0.7 * classifier.first_order_log_likelihood(images) + torch.linspace(-2, 2, 12)
    few = within(estimates, everyone, margins[0])
    two = torch.zeros_like(few).scatter(1, exact[..., :2].sum(-1).topk(5).indices, True)
    best = torch.zeros_like(few).scatter(1, exact.sum(-1).topk(3).indices, True)
    starts = {
        "race:1%": (everyone, 1),
        "screen:1%,race:1%": (few, 1),
        "screen:1%,race:5%": (few, 1),
        "2:5,race:1%": (two, 2),
        "4:3,race:1%": (best, 4),
    }
    sizes = set()
    for text, (alive, scored) in starts.items():
        found = classifier.classify(images, cascade=text)
        reached, winner = raced(exact, alive, margins[1:], scored=scored, stop_share=stop_share)
        race = found.stages[-1]
        assert torch.equal(race.reached, reached), text
        assert torch.equal(found.classes, winner), text
        by_class, by_scale = tokens_of(reached, scored)
        assert torch.equal(race.tokens_by_class, by_class), text
        assert torch.equal(race.tokens_by_scale, by_scale), text
        sums = exact.cumsum(-1).gather(2, (reached - 1).clamp(min=0).unsqueeze(-1))[..., 0]
        wanted = sums.masked_fill(reached == 0, torch.nan)
        torch.testing.assert_close(race.log_likelihood, wanted, rtol=1e-5, atol=0, equal_nan=True)
        finished = wanted.masked_fill(reached < 4, torch.nan)
        torch.testing.assert_close(found.log_likelihood, finished, rtol=1e-5, atol=0, equal_nan=True)
        sizes |= set(reached.unique().tolist())
    assert sizes >= {0, 4}  # the margins tell classes apart


def test_screening_takes_classes_as_they_were_calibrated(classifier, images, exact):
    """Of a part of the classes too: expanded where it was calibrated, corrected by their own offsets."""
    classes = [9, 2, 5, 11]
    at = torch.tensor([0, 3, 8])
    classifier.calibration = calibration_of(classifier, screen=5.0, at=at)
    found = classifier.classify(images, classes, cascade="screen:1%,100%:1")
    estimates = classifier.first_order_log_likelihood(images, classes, at=at)
    estimates = 0.7 * estimates + torch.linspace(-2, 2, 12)[classes]
    torch.testing.assert_close(found.stages[0].log_likelihood, estimates, rtol=1e-5, atol=0)
    kept = within(estimates, torch.ones_like(estimates).bool(), 5.0)
    assert torch.equal(found.stages[1].reached > 0, kept)
    wanted = exact.sum(-1)[:, classes].masked_fill(~kept, -torch.inf).argmax(1)
    assert torch.equal(found.classes, torch.tensor(classes)[wanted])


def sample_scores(classifier, images, samples, how):
    """Log-likelihoods (B, N, S) of all classes."""
    noisy = [perturb(classifier.vqvae.quantize, images, s, how) for s in range(samples)]
    return torch.stack([classifier.log_likelihood(maps) for maps in noisy], dim=-1)


@pytest.mark.parametrize("margins", [(HUGE, HUGE, HUGE), (4.0, 2.0, 0), (6.0, 0.5, 0), (0.0, 0, 0)], ids=str)
@pytest.mark.parametrize("text", ["smooth:1%", "race:1%,smooth:1%", "screen:1%,race:1%,smooth:1%", "3:6,smooth:1%"])
def test_smoothing_goes_on_where_classes_are_close(classifier, images, exact, margins, text):
    """By hand, from scores of every sample: the best four, then those in reach of the best, sample after sample."""
    classifier.calibration = calibration_of(classifier, screen=12.0, race=[9.0, 7, 5, 3], smooth=margins)
    scores = sample_scores(classifier, images, 3, Smoothing(0.1, seed=6))
    alive = torch.ones(16, 12, dtype=torch.bool)
    if text.startswith("screen"):
        estimates = 0.7 * classifier.first_order_log_likelihood(images) + torch.linspace(-2, 2, 12)
        alive = within(estimates, alive, 12.0)
    if "race" in text:
        reached, _ = raced(exact, alive, [9.0, 7, 5])
        alive = within(exact.sum(-1), reached == 4, 3.0)
    if text.startswith("3:6"):
        alive = torch.zeros_like(alive).scatter(1, exact[..., :3].sum(-1).topk(6).indices, True)
    found = classifier.classify(images, cascade=text, seed=6)
    seen, mean = alive.long(), scores[..., 0].masked_fill(~alive, torch.nan)
    order = mean.nan_to_num(-math.inf).argsort(1, descending=True)
    alive = alive & torch.zeros_like(alive).scatter(1, order[:, :4], True)
    alive = within(mean.nan_to_num(-math.inf), alive, margins[0])
    for samples in (2, 3):
        going = alive & (alive.sum(1, keepdim=True) > 1)
        now = scores[..., :samples].mean(-1)
        mean, seen = torch.where(going, now, mean), torch.where(going, samples, seen)
        alive = torch.where(going.any(1, keepdim=True), within(now, going, margins[samples - 1]), alive)
    smooth = found.stages[-1]
    assert torch.equal(smooth.reached, seen)
    torch.testing.assert_close(smooth.log_likelihood, mean, rtol=1e-5, atol=0, equal_nan=True)
    assert torch.equal(found.classes, mean.nan_to_num(-math.inf).masked_fill(~alive, -math.inf).argmax(1))
    last = (seen == seen.amax(1, keepdim=True)) & (seen > 0)
    torch.testing.assert_close(
        found.log_likelihood, mean.masked_fill(~last, torch.nan), rtol=1e-5, atol=0, equal_nan=True
    )
    if margins[0] == HUGE and text == "smooth:1%":
        smoothed = classifier.smoothed_log_likelihood(images, samples=3, sigma=0.1, seed=6)
        clean = torch.zeros_like(alive).scatter(1, exact.sum(-1).topk(4).indices, True)
        assert torch.equal(found.classes, smoothed.masked_fill(~clean, -torch.inf).argmax(1))
        assert (found.classes != exact.sum(-1).argmax(1)).any()  # it makes a difference here


def test_smoothing_that_does_not_pay_is_left_out(classifier, images):
    calibration = calibration_of(classifier, smooth=HUGE)
    calibration = replace(calibration, smoothing=replace(calibration.smoothing, gain=-0.1, error=0.01))
    for made in (calibration, calibration_of(classifier)):
        classifier.calibration = made
        found = classifier.classify(images, cascade="screen:1%,race:1%,smooth:1%", sigma=0.7, aggregate="log-mean-exp")
        assert torch.equal(found.classes, classifier.classify(images).classes)
        assert found.stages[-1].tokens.eq(0).all()
        audit = classifier.classify(images, cascade="screen:1%,race:1%,smooth:3%", audit=1.0).audit
        assert (audit.disagreements, audit.delta) == (0, pytest.approx(0.01))


CASCADES = [
    "screen:1%,race:1%,smooth:1%",
    "race:1%",
    "screen:4,race:1%",
    "2:7,race:1%,smooth:1%",
    "screen:1%,3:4,4x2:1",
    "screen:5,4:2,smooth:1%",
]


@pytest.fixture
def calibrated(classifier):
    """With margins under which every stage has something to drop, and something to leave."""
    classifier.calibration = calibration_of(classifier, screen=8.0, race=[6.0, 5, 3, 2], smooth=[3.0, 2, 0])
    return classifier


@pytest.mark.parametrize("text", CASCADES)
def test_answers_do_not_depend_on_the_batch(calibrated, images, text):
    together = calibrated.classify(images, cascade=text)
    tight = make_classifier(max_memory=0)  # a row at a time, and no keys kept for later stages
    tight.calibration = calibrated.calibration
    some = calibrated.classify(images[:5], cascade=text)
    found = tight.classify(images[:5], cascade=text)
    answers_agree(found, some, cost=False)
    assert (found.cost.tokens_by_class >= some.cost.tokens_by_class).all()
    backwards = TokenMaps.concatenate([images[i : i + 1] for i in reversed(range(16))])
    assert torch.equal(calibrated.classify(backwards, cascade=text).classes.flip(0), together.classes)
    for i in (0, 5, 11):
        alone = calibrated.classify(images[i : i + 1], cascade=text)
        assert torch.equal(alone.ranking[0], together.ranking[i])
        assert torch.equal(alone.cost.tokens_by_class[0], together.cost.tokens_by_class[i])
        assert torch.equal(alone.cost.tokens_by_scale[0], together.cost.tokens_by_scale[i])
        assert alone.cost.flops[0] == together.cost.flops[i]
        torch.testing.assert_close(
            alone.log_likelihood[0], together.log_likelihood[i], rtol=1e-5, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("text", CASCADES)
def test_answers_do_not_depend_on_the_order_of_classes(calibrated, images, text):
    first = calibrated.classify(images, cascade=text)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(4))
    second = calibrated.classify(images, order, cascade=text)
    assert torch.equal(first.ranking, second.ranking)
    assert torch.equal(first.cost.tokens_by_class[:, order], second.cost.tokens_by_class)
    torch.testing.assert_close(first.log_likelihood[:, order], second.log_likelihood, rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize("text", CASCADES)
def test_the_parts_of_the_cost_add_up(calibrated, images, text):
    found = calibrated.classify(images, cascade=text)
    cost, stages, screens = found.cost, found.stages, text.startswith("screen")
    for name in ("tokens_by_class", "tokens_by_scale", "backward_tokens"):
        assert torch.equal(getattr(cost, name), sum(getattr(stage, name) for stage in stages))
    assert [stage.stage for stage in stages] == list(Cascade.parse(text).stages)
    shared = 29 if screens else 0
    assert torch.equal(cost.tokens, cost.tokens_by_class.sum(1) + shared)
    assert torch.equal(cost.tokens, sum(stage.tokens for stage in stages))
    assert cost.backward_tokens.eq(shared).all()
    assert cost.tokens_by_scale[:, 0].eq(0).all()  # a look-up
    per_token = torch.tensor(flops.token_flops(MANY))
    wanted = (cost.tokens_by_scale * per_token).sum(1)
    if screens:
        wanted = wanted + flops.first_order_backward(MANY, "true").total
        wanted = wanted + flops.first_order_product(MANY, 12, "true").total
    # The backward pass is counted by the token, in whole FLOPs.
    assert ((cost.flops - wanted).abs() <= shared).all()
    assert (cost.full_tokens, cost.full_flops) == (12 * 30, 12 * flops.class_pass(MANY, None, "true").total)
    # Nothing is scored twice: what a class has cost is what it was scored on, clean and perturbed.
    assert (cost.tokens_by_class <= 29 * 3).all()
    assert cost.seconds >= sum(stage.seconds for stage in stages) > 0


def test_a_stage_after_a_stage_pays_for_what_is_new(calibrated, images):
    """A race after fixed stages goes on where those stopped, smoothing where the race did."""
    found = calibrated.classify(images, cascade="2:7,race:1%,smooth:1%")
    fixed, race, smooth = found.stages
    assert fixed.tokens_by_scale.tolist() == [[0, 12 * 4, 0, 0]] * 16
    assert race.tokens_by_scale[:, :2].eq(0).all()
    clean = fixed.tokens_by_class + race.tokens_by_class
    assert torch.equal(clean, BOUNDARIES[torch.where(race.reached > 0, race.reached, 2)] - 1)
    extra = smooth.reached.clamp(min=1) - 1
    assert (smooth.tokens_by_class <= 29 * extra).all()
    assert (smooth.tokens_by_class[extra > 0] > 0).all()


@pytest.mark.parametrize("text", CASCADES)
def test_ranking_and_posterior_say_the_same(calibrated, images, text):
    prior = torch.linspace(1, 3, 12)
    found = calibrated.classify(images, cascade=text, prior=prior)
    assert torch.equal(found.ranking.sort(1).values, torch.arange(12).expand(16, -1))
    assert torch.equal(found.ranking[:, 0], found.classes)
    assert found.names == tuple(calibrated.class_names[i] for i in found.classes)
    finished = found.log_likelihood.isfinite()
    assert finished.any(1).all()
    assert found.posterior[~finished].eq(0).all()
    score = (found.log_likelihood + prior.log()).masked_fill(~finished, -torch.inf)
    torch.testing.assert_close(found.posterior, score.softmax(1), rtol=1e-3, atol=1e-6)
    for i in range(16):
        order = score[i].argsort(descending=True)[: finished[i].sum()]
        assert torch.equal(found.ranking[i, : finished[i].sum()], order)
        # Whoever was scored in a later stage stands before those that were not.
        for stage in found.stages:
            places = (stage.reached[i][found.ranking[i]] > 0).int()
            assert torch.equal(places, places.sort(descending=True).values)


def test_the_prior_takes_part_in_every_elimination(calibrated, images, exact):
    prior = torch.rand(12, generator=torch.Generator().manual_seed(8)).pow(8)
    log_prior = (prior / prior.sum()).log()
    assert log_prior.max() - log_prior.min() > 10
    found = calibrated.classify(images, cascade="screen:1%,race:1%", prior=prior)
    estimates = 0.7 * calibrated.first_order_log_likelihood(images) + torch.linspace(-2, 2, 12) + log_prior
    alive = within(estimates, torch.ones_like(estimates).bool(), 8.0)
    reached, winner = raced(exact, alive, [6.0, 5, 3], log_prior)
    assert torch.equal(found.stages[-1].reached, reached)
    assert torch.equal(found.classes, winner)
    assert not torch.equal(reached, calibrated.classify(images, cascade="screen:1%,race:1%").stages[-1].reached)
    only = torch.zeros(12)
    only[7] = 1
    for text in CASCADES:
        assert calibrated.classify(images, cascade=text, prior=only).classes.eq(7).all()


def test_pages_come_back_even_after_an_interruption(calibrated, images, monkeypatch):
    for text in CASCADES:
        calibrated.classify(images, cascade=text)
    held = calibrated.engine.cache.pages_held
    assert held == len(calibrated.engine.tables)

    def interrupted(*_):
        raise KeyboardInterrupt

    for name, text in (("within_margin", "race:1%"), ("best_only", "screen:4,race:1%,smooth:1%")):
        with monkeypatch.context() as patch:
            patch.setattr(f"varlik.run.{name}", interrupted)
            with pytest.raises(KeyboardInterrupt):
                calibrated.classify(images, cascade=text)
        assert calibrated.engine.cache.pages_held == held


# Audits


def test_an_audit_of_all_images_counts_every_other_answer(classifier, images):
    full = classifier.classify(images).classes
    classifier.calibration = calibration_of(classifier, screen=0.0)
    with pytest.warns(UserWarning, match="audited images have another answer"):
        found = classifier.classify(images, cascade="screen:1%,race:1%", audit=1.0)
    wrong = int((found.classes != full).sum())
    assert wrong > 3
    audit = found.audit
    assert (audit.images, audit.disagreements, audit.delta) == (16, wrong, 0.01)
    assert (audit.low, audit.high) == share_bounds(wrong, 16)
    assert audit.exceeded
    # It counts on, over all calls with this cascade, but no image twice.
    more = make_images(classifier, 16, seed=77)
    right = classifier.classify(more).classes
    with pytest.warns(UserWarning, match="of 32 audited images"):
        again = classifier.classify(more, cascade="screen:1%,race:1%", audit=1.0)
    both = wrong + int((again.classes != right).sum())
    assert (again.audit.images, again.audit.disagreements) == (32, both)
    assert (again.audit.low, again.audit.high) == share_bounds(both, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert classifier.classify(images, cascade="screen:1%,race:1%", audit=1.0).audit == again.audit
    # Part of the classes, or a fixed stage that may drop the right one: no promise to break.
    few = classifier.classify(images, range(6), "screen:1%,race:1%", audit=1.0).audit
    fixed = classifier.classify(images, cascade="2:2,race:1%", audit=1.0).audit
    noisy = classifier.classify(images, cascade="screen:1%,100%x3:1", audit=1.0).audit
    for audit in (few, fixed, noisy):
        assert (audit.delta, audit.exceeded) == (None, False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert classifier.classify(images, cascade="screen:1%,race:1%").audit is None
        # A cascade that promises as much as it keeps, with an account of its own.
        loose = classifier.classify(images, cascade="screen:90%,race:90%", audit=1.0).audit
    assert (loose.images, loose.disagreements, loose.exceeded) == (16, wrong, False)


def test_an_audit_of_a_share_takes_the_same_images_however_they_come(classifier):
    images = make_images(classifier, 200, seed=5)
    classifier.calibration = calibration_of(classifier)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        audit = classifier.classify(images, cascade="screen:1%,race:1%", audit=0.2).audit
        assert 20 <= audit.images <= 60
        assert (audit.disagreements, audit.low, audit.exceeded) == (0, 0, False)
        for first in range(0, 200, 50):
            part = classifier.classify(images[first : first + 50], cascade="race:1%", audit=0.2).audit
        assert part == replace(audit)
        other = classifier.classify(images, cascade="race:2%", audit=0.2, seed=1).audit
    assert other.images != audit.images


def test_an_audit_of_smoothing_asks_what_smoothing_would_have_said(classifier, images):
    classifier.calibration = calibration_of(classifier, smooth=HUGE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = classifier.classify(images, cascade="screen:1%,race:1%,smooth:1%", audit=1.0, seed=6)
    assert (found.audit.images, found.audit.disagreements) == (16, 0)
    assert found.audit.delta == pytest.approx(0.02)
    assert (found.classes != classifier.classify(images).classes).any()


def test_an_audit_of_a_cascade_that_promises_nothing(classifier, images):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = classifier.classify(images, cascade="1:1", audit=1.0)
    wrong = (found.classes != classifier.classify(images).classes).sum()
    assert (found.audit.disagreements, found.audit.delta, found.audit.exceeded) == (wrong, None, False)
    assert wrong > 3


def test_an_audit_goes_by_the_same_classes_and_prior(classifier, images):
    classifier.calibration = calibration_of(classifier)
    prior = [1, 1e-6, 3, 5]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = classifier.classify(images, [3, 8, 11, 1], cascade="race:1%", prior=prior, audit=1.0)
    assert found.audit.disagreements == 0


@pytest.mark.parametrize("audit", [-0.1, 1.1, float("nan")])
def test_an_audit_that_is_no_share(classifier, images, audit):
    with pytest.raises(ValueError, match="audit: expected a share from 0 to 1"):
        classifier.classify(images, audit=audit)


# What is refused


def test_classes_outside_the_calibration(classifier, images):
    labels = torch.tensor([1, 4, 7])
    few = calibration_of(classifier, labels=labels, at=labels, offset=torch.tensor([1.0, 0, -1]))
    classifier.calibration = few
    for text in ("screen:1%,100%:1", "race:1%", "smooth:1%"):
        with pytest.raises(ValueError, match=r"classes: \[0, 2, .*\] are not among the 3 that were calibrated"):
            classifier.classify(images, cascade=text)
        with pytest.raises(ValueError, match=r"classes: \[12\] are not among the 3"):
            classifier.classify(images, [1, 12], cascade=text)
    full = classifier.classify(images, [7, 1])
    assert torch.equal(classifier.classify(images, [7, 1], cascade="screen:1%,race:1%").classes, full.classes)
    # Counts need no calibration: they go by plain estimates where one does not reach.
    found = classifier.classify(images, [1, 12, 5], cascade="screen:2,100%:1")
    torch.testing.assert_close(
        found.stages[0].log_likelihood, classifier.first_order_log_likelihood(images, [1, 12, 5]), rtol=1e-5, atol=0
    )


def test_a_delta_that_so_few_images_cannot_give(classifier, images):
    classifier.calibration = calibrate(classifier, images[:12])  # of which 8 give quantiles
    for text in ("screen:11%,100%:1", "race:11%", "screen:20%,race:11%", "race:20%,smooth:11%"):
        with pytest.raises(ValueError, match="delta: 11 % takes a calibration on at least 13 images, 9 of them to"):
            classifier.classify(images, cascade=text)
    assert len(classifier.classify(images, cascade="screen:12%,race:12%,smooth:12%")) == 16


def test_noise_other_than_calibrated(classifier, images):
    classifier.calibration = calibration_of(classifier, smooth=HUGE)
    message = r"sigma, aggregate: smoothing was calibrated for 0.1 and 'mean', got "
    with pytest.raises(ValueError, match=message + "0.2 and 'mean'"):
        classifier.classify(images, cascade=FAST, sigma=0.2)
    with pytest.raises(ValueError, match=message + "0.1 and 'log-mean-exp'"):
        classifier.classify(images, cascade="smooth:1%", aggregate="log-mean-exp")
    calibration = classifier.calibration
    classifier.calibration = replace(calibration, smoothing=replace(calibration.smoothing, sigma=0.3))
    own, same = (classifier.classify(images, cascade="smooth:1%", **how) for how in ({}, {"sigma": 0.3}))
    assert torch.equal(own.log_likelihood.nan_to_num(0), same.log_likelihood.nan_to_num(0))
    own, same = (classifier.classify(images, cascade="4:3,4x2:1", **how) for how in ({}, {"sigma": 0.1}))
    assert torch.equal(own.log_likelihood.nan_to_num(0), same.log_likelihood.nan_to_num(0))
    found = classifier.classify(images, cascade="screen:1%,race:1%", sigma=0.2)  # none of its business
    assert torch.equal(found.classes, classifier.classify(images).classes)


def test_a_calibration_of_another_model(classifier, images, tmp_path):
    other = make_classifier(seed=1)
    wrong = calibration_of(other)
    with pytest.raises(ValueError, match=r"differs in transformer \(calibrated: "):
        classifier.calibration = wrong
    assert classifier.calibration is None
    parts = classifier.var, classifier.vqvae, classifier.class_names, classifier.preprocessing
    checkpoints.save(tmp_path, *parts)
    loaded = varlik.load(tmp_path)
    right = calibration_of(loaded)
    for number, one in enumerate((wrong, right)):
        one.save(tmp_path / f"{number}.safetensors")
    with pytest.raises(ValueError, match="made for another model or use; differs in transformer"):
        varlik.load(tmp_path, calibration=tmp_path / "0.safetensors")
    with pytest.raises(ValueError, match="differs in transformer"):
        varlik.load(tmp_path, calibration=wrong)
    with pytest.raises(FileNotFoundError, match="no such calibration"):
        varlik.load(tmp_path, calibration=tmp_path / "2.safetensors")
    for given_one in (right, str(tmp_path / "1.safetensors")):
        assert varlik.load(tmp_path, calibration=given_one).calibration.slope == 0.7

    # Beside the model it is taken where it fits, and else left where it is, with a word.
    beside = tmp_path / "calibration.safetensors"
    (tmp_path / "1.safetensors").rename(beside)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = varlik.load(tmp_path).classify(images, cascade="screen:1%,race:1%")
    assert torch.equal(found.classes, classifier.classify(images).classes)
    (tmp_path / "0.safetensors").replace(beside)
    loaded = varlik.load(tmp_path)
    with pytest.warns(UserWarning, match="not used|has no calibration") as told:
        found = loaded.classify(images, cascade="screen:1%,race:1%")
    assert str(told[0].message).startswith(f"{beside}: not used, it differs in transformer (calibrated: ")
    assert "running screen:6,100%:1 instead" in str(told[1].message)
    assert len(told) == 2
    assert [stage.stage for stage in found.stages] == list(FAST.fixed(12).stages)
    assert loaded.calibration is None


def test_another_precision_is_another_use(classifier):
    with pytest.raises(ValueError, match=r"dtype \(calibrated: float32, here: bfloat16\)"):
        make_classifier(dtype=torch.bfloat16).calibration = calibration_of(classifier)


# What is promised


def fitted(classifier, measured):
    return fit.fit(measured, classifier.fingerprint, classifier.labels(), classifier.labels(), Smoothing())


def test_real_classification_is_what_the_tables_say(classifier, pool):
    """So that what follows may go by tables: with a real calibration, on images it has not seen."""
    images = make_images(classifier, 300, seed=2)
    calibration = fitted(classifier, pool[torch.arange(150)])
    classifier.calibration = calibration
    found = classifier.classify(images[150:], cascade="screen:5%,race:5%")
    reached, answers = screened_and_raced(pool[torch.arange(150, 300)], calibration, 0.05)
    assert torch.equal(found.classes, answers)
    assert torch.equal(found.stages[-1].reached, reached)
    assert 1 < (reached > 0).sum(1).double().mean() < 8


def test_calibration_foretells_how_many_classes_are_left(classifier, pool):
    """Of the images that gave the quantiles exactly so many."""
    calibration = fitted(classifier, pool)
    images = make_images(classifier, 300, seed=2)
    held = torch.randperm(300, generator=torch.Generator().manual_seed(0))[100:]
    classifier.calibration = calibration
    found = classifier.classify(images, cascade="screen:5%,race:5%")
    left = (found.stages[1].reached[held] > 0).sum(1).double().mean().item()
    assert left == pytest.approx(calibration.expected_finalists(0.05))
    assert left == pytest.approx(calibration.expected_race_rows(0.05)[0])


@pytest.mark.parametrize("delta", [0.02, 0.05, 0.1, 0.2])
def test_answers_differ_no_more_often_than_promised(module_classifier, pool, delta):
    """Over random splits of one pool of images into some to calibrate on and others to answer."""
    source, shares = torch.Generator().manual_seed(0), []
    for _ in range(40):
        order = torch.randperm(300, generator=source)
        calibration = fitted(module_classifier, pool[order[:150]])
        new = pool[order[150:]]
        _, answers = screened_and_raced(new, calibration, delta)
        shares.append((answers != new.best).double().mean().item())
    observed = torch.tensor(shares, dtype=torch.float64)
    error = observed.std().item() / 40**0.5
    assert observed.mean().item() <= delta + 2 * error
    assert observed.mean().item() > delta / 4  # and it is not kept by scoring everyone


def test_images_of_another_kind_break_the_promise_and_the_audit_says_so(classifier):
    """Calibrated where classes are easily told apart, then asked about images of another seed and scale."""
    calm = make_images(classifier, 120, seed=11)
    classifier.calibration = calibrate(classifier, calm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = classifier.classify(make_images(classifier, 120, seed=12), cascade="screen:5%,race:5%", audit=1.0)
    assert not kept.audit.exceeded
    quantizer, features = classifier.vqvae.quantize, calm.feature_map + 3
    with torch.no_grad():
        tokens, inputs = quantizer.tokenize(features)
    shifted = replace(calm, tokens=tokens, teacher_forcing_input=inputs, feature_map=features)
    full = classifier.classify(shifted).classes
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = classifier.classify(shifted, cascade="screen:5%,race:5%", audit=1.0)
    wrong = int((found.classes != full).sum())
    assert found.audit.exceeded
    assert [str(w.message).split(", ")[0] for w in told] == [
        f"{kept.audit.disagreements + wrong} of 240 audited images have another answer when scored in full"
    ]
