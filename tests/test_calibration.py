"""Rules that keep their promise, fits that find what was put in, and an artefact that says what it is for."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import fields, is_dataclass, replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save_file
from tiny_model import MANY, make_classifier, make_images

import varlik
from varlik.calibration import Calibration, Fingerprint, Rule, calibrate, fit
from varlik.calibration.artefact import FORMAT, SmoothingPlan
from varlik.calibration.conformal import calibration_images_needed, fit_images, images_needed, quantile, share_bounds
from varlik.calibration.fit import REACH, Measured, fit_correction, measure
from varlik.calibration.posterior import fit_scale_weights, fit_temperature
from varlik.evaluation.samples import samples
from varlik.models.config import Preprocessing
from varlik.models.presets import CALIBRATION_FILE, bundled_folder, get_preset, list_models
from varlik.scoring import score_table
from varlik.smoothing import Smoothing, perturb

BUNDLED = [name for name in list_models() if get_preset(name).bundled]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def assert_equal(one, other):
    """Two dataclasses, field by field and to the bit; plain values otherwise."""
    if is_dataclass(one):
        assert type(one) is type(other)
        for field in fields(one):
            assert_equal(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    else:
        assert one == other


@pytest.fixture(scope="module")
def classifier():
    return make_classifier()


@pytest.fixture(scope="module")
def images(classifier):
    return make_images(classifier, 40)


@pytest.fixture(scope="module")
def calibration(classifier, images):
    truth = torch.randint(12, (40,), generator=generator())
    return calibrate(classifier, images, truth=truth, samples=3)


# The rule of one number


def test_quantile_by_hand():
    scores = torch.tensor([3.0, 1, 2, 9, 5, 4, 8, 7, 6])
    for delta, expected in ((0.1, 9), (0.15, 9), (0.2, 8), (0.5, 5), (0.55, 5), (0.9, 1), (0.999, 1)):
        assert quantile(scores, delta) == expected
    with pytest.raises(ValueError) as found:
        quantile(scores, 0.05)
    counted = "19 of them to count on; this one has 9 to count on"
    assert str(found.value) == f"delta: 5 % takes a calibration on at least 28 images, {counted}"
    with pytest.raises(ValueError, match=r"delta: 9\.99 % takes a calibration on at least 15 images, 10 of them"):
        quantile(scores, 0.0999)


def test_images_needed_by_hand():
    wanted = {0.5: 1, 1 / 3: 2, 0.1: 9, 0.07: 14, 0.05: 19, 0.01: 99, 0.005: 199, 0.001: 999, 0.9: 1}
    assert {delta: images_needed(delta) for delta in wanted} == wanted


@given(st.integers(1, 999).map(lambda thousandths: thousandths / 1000))
@settings(max_examples=100, deadline=None)
def test_so_many_images_are_enough_and_one_less_is_not(delta):
    needed = calibration_images_needed(delta)
    assert needed - fit_images(needed) >= images_needed(delta)
    assert needed == 6 or needed - 1 - fit_images(needed - 1) < images_needed(delta)


def test_a_share_far_too_small_is_refused_at_once():
    assert calibration_images_needed(1e-12) == pytest.approx(1.5e12, rel=1e-6)
    with pytest.raises(ValueError, match="takes a calibration on at least"):
        quantile(torch.ones(5), 1e-12)


@given(count=st.integers(1, 300), thousandths=st.integers(1, 999))
@settings(max_examples=200, deadline=None)
def test_quantile_is_the_smallest_that_suffices(count, thousandths):
    """By counting: of n + 1 exchangeable numbers, at most a share delta may lie beyond it. In fractions, not floats."""
    delta, scores = thousandths / 1000, torch.arange(1.0, count + 1)
    rank = math.ceil((count + 1) * (1 - Fraction(thousandths, 1000)))
    assert (rank <= count) == (count >= images_needed(delta))
    if rank <= count:
        assert quantile(scores, delta) == rank
    else:
        with pytest.raises(ValueError, match=f", {images_needed(delta)} of them to count on"):
            quantile(scores, delta)


def test_quantile_is_that_of_mapie():
    pytest.importorskip("mapie")
    from mapie.regression import SplitConformalRegressor
    from sklearn.dummy import DummyRegressor

    def by_mapie(scores, delta):
        """Half the width of its interval around a prediction of 0, calibrated on residuals that are the scores."""
        nowhere = torch.zeros(len(scores), 1).numpy()
        zero = DummyRegressor(strategy="constant", constant=0.0).fit(nowhere, nowhere[:, 0])
        regressor = SplitConformalRegressor(zero, confidence_level=1 - delta, prefit=True)
        regressor.conformalize(nowhere, scores.numpy())
        return float(regressor.predict_interval(nowhere[:1])[1][0, 1, 0])

    compared = 0
    for count in (10, 33, 50, 100, 199, 333):
        scores = normal(count, seed=count).abs()
        for delta in (0.5, 0.3, 0.1, 0.07, 0.05, 0.02, 0.01, 0.005):
            if count <= 1 / delta:  # too few for it
                continue
            assert quantile(scores, delta) == pytest.approx(by_mapie(scores, delta), abs=1e-12)
            compared += 1
    assert compared == 33


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, 1.5, float("nan"), float("inf")])
def test_delta_out_of_range(delta):
    rule = Rule.fit(torch.ones(5, 2))
    for call in (lambda delta: quantile(torch.ones(5), delta), images_needed, rule.margins):
        with pytest.raises(ValueError, match="delta: expected a share between 0 and 1"):
            call(delta)


def test_rule_by_hand():
    gaps = torch.tensor([[0.0, 4, 0], [2, 0, 0], [0, 2, 0], [4, 8, 0]])
    unit = torch.tensor([[0.0, 0, 0], [4, 8, 0]])  # of standard deviations 2, 4 and 0
    rule = Rule.fit(gaps, unit)
    assert rule.spread.tolist() == [2, 4, 0]
    assert rule.scores.tolist() == [0.5, 1, 1, 2]
    assert rule.margins(0.2).tolist() == [4, 8, 0]
    assert rule.margins(0.5).tolist() == [2, 4, 0]
    assert torch.equal(Rule.fit(gaps).spread, gaps.double().std(0, correction=0))
    both = Rule.joint((rule, Rule(torch.tensor([1.0]), torch.zeros(4))), (gaps, gaps[:, :1]), (1.0, 0.5))
    assert both.spread.tolist() == [2, 4, 0, 2]
    assert torch.equal(both.scores, rule.scores)  # the step added is the first one over again
    stricter = Rule.joint((rule,), (gaps,), (0.25,))
    assert torch.equal(stricter.margins(0.2), rule.margins(0.2))  # a common factor cancels


def test_a_gap_where_none_was_seen_forbids_to_drop_anyone():
    """As often as delta is not, that is: with one such image in nine it still holds at 0.2, not at 0.1."""
    gaps = torch.zeros(9, 2)
    gaps[:, 0] = torch.arange(9)
    gaps[4, 1] = 1e-9
    rule = Rule.fit(gaps, torch.tensor([[0.0, 0], [2, 0]]))
    assert rule.margins(0.2).tolist() == [8, 0]
    assert rule.margins(0.1).tolist() == [math.inf, math.inf]


def dropped(gaps, margins):
    """Share of images whose right class falls behind by more than the margin at any step."""
    return (gaps > margins).any(1).double().mean().item()


def simulated_gaps(count, source):
    """Correlated, heavy-tailed, often zero, and on a scale of its own at every step."""
    walk = torch.randn(count, 5, generator=source, dtype=torch.float64).cumsum(1)
    heavy = torch.rand(count, 1, generator=source, dtype=torch.float64).rsqrt()
    return (walk * heavy - 0.3).clamp(min=0) * torch.tensor([1.0, 30, 5, 0.1, 2])


def mean_and_error(values):
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), values.std().item() / len(values) ** 0.5


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("delta", [0.02, 0.05, 0.2])
def test_the_right_class_is_lost_no_more_often_than_promised(delta, joint):
    source, lost, calibrating = generator(), [], 99
    for _ in range(300):
        unit, held, new = (simulated_gaps(n, source) for n in (30, calibrating, 200))
        if joint:
            parts = [Rule.fit(held[:, a:b], unit[:, a:b]) for a, b in ((0, 2), (2, 5))]
            rule = Rule.joint(parts, (held[:, :2], held[:, 2:]), (1.0, 0.3))
        else:
            rule = Rule.fit(held, unit)
        lost.append(dropped(new, rule.margins(delta)))
    mean, error = mean_and_error(lost)
    assert mean <= delta + 2 * error
    assert mean >= delta - 1 / (calibrating + 1) - 2 * error  # nor by far too seldom, which would cost


def test_the_promise_holds_where_units_come_from_few_images():
    """Three of them show no gap at most steps, mostly."""
    source, lost, seen = generator(1), [], 0
    for _ in range(300):
        unit, held, new = (simulated_gaps(n, source) for n in (3, 19, 200))
        rare = torch.rand(222, 5, generator=source) < 0.2
        unit, held, new = (part * mask for part, mask in zip((unit, held, new), rare.split((3, 19, 200)), strict=True))
        rule = Rule.fit(held, unit)
        seen += int((rule.spread == 0).any())
        lost.append(dropped(new, rule.margins(0.1)))
    mean, error = mean_and_error(lost)
    assert seen > 200
    assert mean <= 0.1 + 2 * error


def test_share_bounds_by_hand():
    assert share_bounds(0, 10) == (0, pytest.approx(1 - 0.025**0.1))
    assert share_bounds(10, 10) == (pytest.approx(0.025**0.1), 1)
    low, high = share_bounds(3, 20, level=0.9)

    def at_most(hits, share):
        return sum(math.comb(20, i) * share**i * (1 - share) ** (20 - i) for i in range(hits + 1))

    assert 1 - at_most(2, low) == pytest.approx(0.05)
    assert at_most(3, high) == pytest.approx(0.05)
    for hits, count in ((-1, 5), (6, 5), (0, 0)):
        with pytest.raises(ValueError, match=f"hits: expected 0 to {count} of at least one, got {hits}"):
            share_bounds(hits, count)


def test_share_bounds_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for hits, count in ((0, 1), (1, 1), (0, 30), (1, 30), (15, 30), (29, 30), (3, 1000), (500, 1000), (7, 20000)):
        for level in (0.8, 0.95, 0.999):
            wanted = stats.binomtest(hits, count).proportion_ci(level, method="exact")
            assert share_bounds(hits, count, level) == pytest.approx((wanted.low, wanted.high), rel=1e-6, abs=1e-9)


# What is fitted


@pytest.mark.parametrize(("count", "classes", "size"), [(2, 10, 5), (4, 12, 5), (20, 3, 1), (50, 40, 1000)])
def test_slope_and_offset_are_found(count, classes, size):
    """Exactly, of scores that are linear in the first-order ones: offsets but for what they have in common."""
    first_order = size * normal(count, classes) - 300
    offset = size * normal(classes, seed=1)
    exact = 0.8 * first_order + offset + 100 * normal(count, 1, seed=2)
    slope, found = fit_correction(first_order, exact)
    assert slope == pytest.approx(0.8, rel=1e-9)
    torch.testing.assert_close(found - found.mean(), offset - offset.mean(), rtol=0, atol=1e-8 * size)


def test_slope_and_offset_are_those_of_least_squares_near_the_best():
    """Against another solver: a column for every class and every image, rows scaled by the root of their weight."""
    first_order = normal(15, 6)
    exact = 1.2 * first_order + normal(6, seed=1) + normal(15, 1, seed=2) + normal(15, 6, seed=3)

    def solve(weights):
        image, column = (index.flatten() for index in torch.meshgrid(torch.arange(15), torch.arange(6), indexing="ij"))
        design = torch.zeros(90, 1 + 6 + 15, dtype=torch.float64)
        design[:, 0] = first_order.flatten()
        design[torch.arange(90), 1 + column] = 1
        design[torch.arange(90), 7 + image] = 1
        root = weights.flatten().sqrt().unsqueeze(1)
        found = torch.linalg.pinv(root * design) @ (root[:, 0] * exact.flatten())
        left = exact.flatten() - design @ found
        return found, ((weights.flatten() * left.square()).sum() / weights.sum()).sqrt()

    _, left = solve(torch.ones(15, 6, dtype=torch.float64))
    wanted, _ = solve(((exact - exact.amax(1, keepdim=True)) / left).exp() + fit.FAR_WEIGHT)
    slope, offset = fit_correction(first_order, exact)
    assert slope == pytest.approx(wanted[0].item(), rel=1e-9)
    torch.testing.assert_close(offset - offset.mean(), wanted[1:7] - wanted[1:7].mean())


def test_scores_that_say_nothing_leave_the_slope_alone():
    exact = normal(5, 4)
    for first_order in (torch.zeros(5, 4, dtype=torch.float64), exact[:, :1].expand(5, 4)):
        slope, offset = fit_correction(first_order, exact)
        assert slope == pytest.approx(1)
        assert offset.isfinite().all()
    slope, offset = fit_correction(exact[:, :1], exact[:, 1:2])
    assert (slope, offset.tolist()) == (1, [0])


@pytest.mark.parametrize(("size", "temperature"), [(1, 0.3), (3, 1.5), (300, 40.0)])
def test_the_temperature_is_found(size, temperature):
    """Of labels drawn from posteriors at that temperature: to a few per cent, as many as there are."""
    exact = size * normal(4000, 8, 3)
    exact[..., 1:] /= 10
    truth = torch.multinomial((exact.sum(-1) / temperature).softmax(1), 1, generator=generator(1))[:, 0]
    found = fit_temperature(exact, truth)
    assert found[-1].item() == pytest.approx(temperature, rel=0.05)

    def loss(scales, value):
        return torch.nn.functional.cross_entropy(exact[..., :scales].sum(-1) / value, truth)

    for scales in (1, 2, 3):  # each by itself is where the likelihood is largest
        best = loss(scales, found[scales - 1])
        assert all(best < loss(scales, found[scales - 1] * factor) for factor in (0.99, 1.01))


@pytest.mark.parametrize("size", [1, 100])
def test_weights_of_the_scales_are_found(size):
    exact, weights = size * normal(6000, 8, 3), torch.tensor([0.9, 0.2, 0.5], dtype=torch.float64) / size
    truth = torch.multinomial((exact @ weights).softmax(1), 1, generator=generator(1))[:, 0]
    torch.testing.assert_close(size * fit_scale_weights(exact, truth), size * weights, rtol=0, atol=0.05)


def test_labels_that_are_always_right_give_finite_numbers():
    exact = 10 * normal(50, 8, 3)
    truth = exact.sum(-1).argmax(1)
    temperature = fit_temperature(exact, truth)
    assert temperature.isfinite().all()
    assert (temperature > 0).all()
    assert fit_scale_weights(exact, truth).isfinite().all()


# The artefact


def test_save_and_load_give_it_back(calibration, classifier, images, tmp_path):
    unlabelled = calibrate(classifier, images[:12], [4, 1, 7])
    for number, one in enumerate((calibration, unlabelled, replace(unlabelled, at=unlabelled.labels[:1]))):
        file = tmp_path / f"{number}.safetensors"
        one.save(file)
        assert_equal(Calibration.load(str(file)), one)
    assert unlabelled.temperature is None
    assert unlabelled.smoothing is None
    assert calibration.smoothed is not None
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"}


def test_files_that_cannot_be_read_are_refused(calibration, tmp_path):
    file = tmp_path / "calibration.safetensors"
    with pytest.raises(FileNotFoundError, match="no such calibration; make one with varlik calibrate"):
        Calibration.load(file)
    calibration.save(file)
    whole = file.read_bytes()
    tensors = load(whole)  # not load_file: what that returns lies in the file, which is to be damaged
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()

    def refused(message, tensors=tensors, **changes):
        save_file(tensors, file, metadata={**metadata, **changes})
        with pytest.raises(ValueError, match=message) as found:
            Calibration.load(file)
        assert str(found.value).startswith(f"{file}: not a calibration that can be read (")

    for damaged in (b"", b"no safetensors", whole[: len(whole) // 2], whole[:-1]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a calibration that can be read"):
            Calibration.load(file)
    refused("its format is 'varlik calibration 0', not 'varlik calibration 1'", format="varlik calibration 0")
    refused("property name", calibration="{")
    refused("fingerprint", calibration="{}")
    about = json.loads(metadata["calibration"])
    refused("unexpected keyword", calibration=json.dumps({**about, "colour": "red"}))
    names = {"labels": "labels", "offset": "offset", "full.race.scores": "scores", "full.screen.spread": "screen"}
    for name, word in names.items():
        refused(word, tensors={key: tensor for key, tensor in tensors.items() if key != name})
    save_file(tensors, file)
    with pytest.raises(ValueError, match="its format is None"):
        Calibration.load(file)
    assert metadata["format"] == FORMAT
    file.write_bytes(whole)
    assert_equal(Calibration.load(file), calibration)


def test_a_file_that_is_there_stays_when_writing_fails(calibration, tmp_path, monkeypatch):
    file = tmp_path / "calibration.safetensors"
    calibration.save(file)
    before = file.read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(before[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr("varlik.calibration.artefact.save_file", full)
    with pytest.raises(OSError, match="no space"):
        replace(calibration, slope=2.0).save(file)
    assert file.read_bytes() == before


OTHERS = {
    "transformer": "0" * 32,
    "vqvae": "1" * 32,
    "patch_nums": (1, 2, 3),
    "dtype": "bfloat16",
    "preprocessing": "Preprocessing(9)",
}


@pytest.mark.parametrize("name", [field.name for field in fields(Fingerprint)])
def test_a_fingerprint_names_the_field_that_differs(calibration, name):
    mine = calibration.fingerprint
    calibration.check(replace(mine))
    other = replace(mine, **{name: OTHERS[name]})
    with pytest.raises(ValueError) as found:
        calibration.check(other)
    shown = f"{name} (calibrated: {getattr(mine, name)}, here: {OTHERS[name]})"
    assert str(found.value) == f"calibration: made for another model or use; differs in {shown}"
    both = replace(other, dtype="float64")
    assert len(mine.differences(both)) == (1 if name == "dtype" else 2)


def test_the_fingerprint_is_the_models_own(classifier):
    mine = classifier.fingerprint

    def differing(other):
        return [text.split()[0] for text in mine.differences(other.fingerprint)]

    assert differing(make_classifier()) == []
    assert differing(make_classifier(seed=1)) == ["transformer"]
    assert differing(make_classifier(double=True)) == ["transformer", "dtype"]
    assert differing(make_classifier(replace(MANY, shared_aln=True))) == ["transformer"]
    other = make_classifier()
    with torch.no_grad():
        other.vqvae.quantize.embedding.weight[3, 2] += 1e-6
    assert differing(other) == ["vqvae"]
    other = varlik.VARClassifier(
        classifier.var, classifier.vqvae, classifier.class_names, Preprocessing(9, 8, channels=1), name="other"
    )
    assert differing(other) == ["preprocessing"]


def test_classes_are_found_by_their_place(classifier, images):
    some = calibrate(classifier, images[:12], [4, 1, 7])
    assert some.labels.tolist() == [4, 1, 7]
    assert some.columns(torch.tensor([7, 4])).tolist() == [2, 0]
    scores = torch.tensor([[1.0, 10.0]])
    wanted = some.slope * scores + some.offset[[2, 0]]
    torch.testing.assert_close(some.correct(scores, torch.tensor([7, 4])), wanted)
    with pytest.raises(ValueError, match=r"classes: \[2, 12\] are not among the 3 that were calibrated"):
        some.columns(torch.tensor([1, 2, 12]))
    with pytest.raises(ValueError, match="not among"):
        some.correct(scores, torch.tensor([4, 5]))


def test_expected_numbers_lie_between_those_measured(calibration):
    known = replace(
        calibration,
        deltas=torch.tensor([0.01, 0.02, 0.1], dtype=torch.float64),
        race_rows=torch.tensor([[8.0, 4.0], [6.0, 2.0], [2.0, 1.0]]),
        smoothed_rows=torch.tensor([[9.0, 5.0], [7.0, 3.0], [3.0, 2.0]]),
        smooth_rows=torch.tensor([3.0, 2.0, 0.0]),
    )
    for delta, wanted in ((0.01, 8), (0.02, 6), (0.1, 2), (0.015, 7), (0.06, 4), (0.001, 8), (0.5, 2)):
        assert known.expected_finalists(delta) == pytest.approx(wanted)
        assert known.expected_race_rows(delta)[0] == pytest.approx(wanted)
        assert known.expected_finalists(delta, smooth=True) == pytest.approx(wanted + 1)
    assert known.expected_race_rows(0.06) == pytest.approx((4, 1.5))
    assert known.expected_race_rows(0.06, smooth=True) == pytest.approx((5, 2.5))
    assert known.expected_smooth_rows(0.06) == pytest.approx(1)
    without = replace(known, smoothed_rows=None, smooth_rows=None)
    assert without.expected_smooth_rows(0.06) == 0
    assert without.expected_finalists(0.06, smooth=True) == pytest.approx(4)


# Calibrating


def halves(count):
    """Which images fit, and which the quantiles come from."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[: fit_images(count)], order[fit_images(count) :]


def test_what_is_measured_is_what_the_classifier_scores(classifier, images):
    labels, how = classifier.labels(), Smoothing(0.2, seed=4)
    found = measure(classifier, images[:5], labels, labels, samples=3, how=how)
    sums = found.exact.cumsum(-1).float()
    for scales in range(1, 5):
        wanted = classifier.log_likelihood(images[:5], scales=scales)
        torch.testing.assert_close(sums[..., scales - 1], wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.first_order.float(), classifier.first_order_log_likelihood(images[:5]))
    assert torch.equal(found.finalists, found.exact.sum(-1).topk(REACH).indices)
    for sample in range(3):
        noisy = perturb(classifier.vqvae.quantize, images[:5], sample, how)
        wanted = classifier.log_likelihood(noisy).gather(1, found.finalists)
        torch.testing.assert_close(found.samples[..., sample].float(), wanted, rtol=1e-5, atol=0)


def test_calibration_by_hand(classifier, images, calibration):
    """Every number of the artefact, from the scores of the two parts of the images."""
    labels = classifier.labels()
    all_of_them = measure(classifier, images, labels, labels, samples=3, how=Smoothing())
    part, held = (all_of_them[rows] for rows in halves(40))
    assert (len(part), len(held), calibration.images) == (13, 27, 40)
    assert calibration.labels.tolist() == calibration.at.tolist() == list(range(12))
    slope, offset = fit_correction(part.first_order, part.exact.sum(-1))
    assert calibration.slope == pytest.approx(slope)
    torch.testing.assert_close(calibration.offset, offset.float())
    for found, one, own in ((calibration.full, held, part), (calibration.smoothed, held, part)):
        gaps = []
        for m in (one, own):
            right = m.exact.sum(-1).argmax(1)
            if found is calibration.smoothed:
                right = m.finalists[torch.arange(len(m)), m.samples.mean(-1).argmax(1)]
            corrected = slope * m.first_order + offset
            steps = [corrected, *m.exact.cumsum(-1).unbind(-1)]
            gaps.append(torch.stack([s.amax(1) - s[torch.arange(len(m)), right] for s in steps], dim=1))
        spread = gaps[1].std(0, correction=0)
        for rule, steps in ((found.screen, slice(1)), (found.race, slice(1, None))):
            torch.testing.assert_close(rule.spread, spread[steps])
            torch.testing.assert_close(rule.scores, Rule.of_units(gaps[0][:, steps], spread[steps]).scores)
        strictness = found.race.spread[0] / found.both.spread[1]
        assert round(strictness.item(), 6) in fit.STRICTNESS
        torch.testing.assert_close(found.both.spread[:1], found.screen.spread)
        torch.testing.assert_close(found.both.spread[1:] * strictness, found.race.spread)
        torch.testing.assert_close(found.both.scores, Rule.of_units(gaps[0], found.both.spread).scores)
    assert calibration.full.smooth is None
    means = [held.samples[..., :s].mean(-1) for s in (1, 2, 3)]
    winner = means[-1].argmax(1)
    gaps = torch.stack([m.amax(1) - m[torch.arange(27), winner] for m in means], dim=1)
    wanted = Rule.of_units(gaps, calibration.smoothed.smooth.spread)
    torch.testing.assert_close(calibration.smoothed.smooth.scores, wanted.scores)
    # Recall, correlation and the number of finalists are those of the images that the fit has not seen.
    corrected, right = slope * held.first_order + offset, held.exact.sum(-1).argmax(1)
    place = (corrected.argsort(1, descending=True) == right.unsqueeze(1)).int().argmax(1)
    torch.testing.assert_close(calibration.recall, torch.stack([(place < k).double().mean() for k in range(1, 11)]))
    pairs = zip(corrected, held.exact.sum(-1), strict=True)
    each = [torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in pairs]
    assert calibration.correlation == pytest.approx(sum(each) / len(each))
    assert calibration.deltas.tolist() == [0.05, 0.1, 0.2, 0.5]  # 27 images vouch for no less than 1/28
    for i, delta in enumerate(calibration.deltas.tolist()):
        for rules, rows in (
            (calibration.full, calibration.race_rows),
            (calibration.smoothed, calibration.smoothed_rows),
        ):
            margin = rules.both.margins(delta)[0]
            passed = (corrected >= corrected.amax(1, keepdim=True) - margin).sum(1).double().mean()
            assert rows[i, 0] == passed
        margins = calibration.smoothed.smooth.margins(delta).tolist()
        count = 0
        for image in held.samples:  # (M, S): who is still in reach of the best after each sample
            alive = list(range(len(image)))
            for seen, margin in enumerate(margins, start=1):
                count += len(alive) * (seen > 1)
                means = image[:, :seen].mean(1)
                best = max(means[c] for c in alive)
                alive = [c for c in alive if means[c] >= best - margin]
                if len(alive) == 1:
                    break
        assert calibration.smooth_rows[i].item() == pytest.approx(count / 27)
    for rows in (calibration.race_rows, calibration.smoothed_rows):
        assert (rows.diff(dim=0) <= 0).all()
        assert (rows.diff(dim=1) <= 0).all()


def test_the_best_of_the_strictnesses_is_taken(classifier, images, calibration):
    """The one with fewest rows on the images of the fit, whatever the others are."""
    labels = classifier.labels()
    part = measure(classifier, images, labels, labels)[halves(40)[0]]
    corrected = calibration.slope * part.first_order + calibration.offset.double()
    rules = calibration.full.screen, calibration.full.race
    seen = fit.gaps(corrected.unsqueeze(-1), part.best), fit.gaps(part.exact.cumsum(-1), part.best)

    def rows(strictness):
        margins = Rule.joint(rules, seen, (1.0, strictness)).margins(1 / (len(part) + 1))
        alive = corrected >= corrected.amax(1, keepdim=True) - margins[0]
        total = alive.sum()
        for scores, margin in zip(part.exact.cumsum(-1).unbind(-1)[:-1], margins[1:-1], strict=True):
            scores = scores.masked_fill(~alive, -torch.inf)
            alive = alive & (scores >= scores.amax(1, keepdim=True) - margin)
            total += alive.sum()
        return int(total)

    chosen = (calibration.full.race.spread[0] / calibration.full.both.spread[1]).item()
    assert rows(chosen) == min(map(rows, fit.STRICTNESS))


def test_labels_calibrate_posteriors_alone(classifier, images, calibration):
    without = calibrate(classifier, images, samples=3)
    assert without.temperature is without.scale_weights is without.smoothing.gain is None
    assert without.smoothing.pays
    same = {"temperature": None, "scale_weights": None, "smoothing": None}
    assert_equal(replace(without, **same), replace(calibration, **same))
    assert calibration.temperature.shape == calibration.scale_weights.shape == (4,)


def test_the_plan_of_smoothing_says_what_it_brings(classifier, images):
    labels = classifier.labels()
    measured = measure(classifier, images, labels, labels, samples=3, how=Smoothing(0.5))
    smooth = measured.finalists[torch.arange(40), measured.samples.mean(-1).argmax(1)]
    changed = smooth != measured.best
    assert 3 < changed.sum() < 37
    for truth, gain in ((smooth, changed.double().mean()), (measured.best, -changed.double().mean())):
        plan = calibrate(classifier, images, truth=truth, samples=3, sigma=0.5).smoothing
        assert (plan.samples, plan.sigma, plan.reach) == (3, 0.5, REACH)
        assert plan.gain == pytest.approx(gain.item())
        assert plan.pays == (gain > 0)
    assert calibrate(classifier, images[:12], [3, 5], samples=2).smoothing.reach == 2
    assert calibrate(classifier, images[:12]).smoothing is None


def test_smoothing_is_used_where_it_pays(calibration):
    with_gain = replace(calibration, smoothing=replace(calibration.smoothing, gain=0.1, error=0.01))
    assert with_gain.rules(smooth=True) is calibration.smoothed
    assert with_gain.rules(smooth=False) is calibration.full
    without = replace(calibration, smoothing=replace(calibration.smoothing, gain=-0.1, error=0.01))
    assert without.rules(smooth=True) is calibration.full
    assert replace(calibration, smoothing=None, smoothed=None).rules(smooth=True) is calibration.full
    assert SmoothingPlan(3, 0.1, 4, None, None).pays


def test_calibrating_takes_up_where_it_was_stopped(classifier, images, tmp_path, monkeypatch):
    monkeypatch.setattr(score_table, "SHARD", 5)
    computed, scores = [], score_table._scores

    def counted(engine, batch, labels):
        computed.append(batch.keys)
        return scores(engine, batch, labels)

    monkeypatch.setattr(score_table, "_scores", counted)
    wanted = calibrate(classifier, images[:18])
    assert [len(keys) for keys in computed] == [5, 5, 5, 3]
    told = []

    def stopped(done, count):
        told.append((done, count))
        if done == 10:
            raise KeyboardInterrupt

    computed.clear()
    with pytest.raises(KeyboardInterrupt):
        calibrate(classifier, images[:18], cache=tmp_path / "new" / "folder", progress=stopped)
    assert told == [(5, 18), (10, 18)]
    again = calibrate(
        classifier, images[:18], cache=str(tmp_path / "new" / "folder"), progress=lambda *seen: told.append(seen)
    )
    assert told[2:] == [(5, 18), (10, 18), (15, 18), (18, 18)]
    assert [len(keys) for keys in computed] == [5, 5, 5, 3]  # none of them twice
    assert_equal(again, wanted)
    assert_equal(calibrate(classifier, images[:18], cache=tmp_path / "new" / "folder"), wanted)
    assert len(computed) == 4


def test_damaged_parts_are_computed_anew(classifier, images, tmp_path, monkeypatch):
    monkeypatch.setattr(score_table, "SHARD", 5)
    labels, engine = classifier.labels(), classifier.engine

    def table():
        return score_table.score_table(engine, images[:10], labels, tmp_path)

    wanted = table()
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    whole = files[0].read_bytes()
    scores = load(whole)["log_likelihood"]
    unfinished = scores.clone()
    unfinished[2, 3, 1] = torch.nan
    for damaged in (b"", b"what is this", whole[:-8]):
        files[0].write_bytes(damaged)
        assert torch.equal(table(), wanted)
        assert files[0].read_bytes() == whole
    for wrong in ({"log_likelihood": unfinished}, {"log_likelihood": scores[:4].clone()}, {"scores": scores}):
        save_file(wrong, files[0])
        assert torch.equal(table(), wanted)
        assert files[0].read_bytes() == whole
    (tmp_path / "left-over.123.part").write_bytes(b"half")
    assert torch.equal(table(), wanted)


def test_parts_of_other_work_are_not_taken_for_this(classifier, images, tmp_path):
    def table(one=classifier, classes=None, tokens=images[:6]):
        return score_table.score_table(one.engine, tokens, one.labels(classes), tmp_path)

    first = table()
    others = {
        "weights": lambda: table(make_classifier(seed=1)),
        "precision": lambda: table(make_classifier(double=True)),
        "classes": lambda: table(classes=[3, 1]),
        "order of classes": lambda: table(classes=[1, 3]),
        "images": lambda: table(tokens=images[6:12]),
    }
    found = {}
    for number, (name, make) in enumerate(others.items(), start=2):
        found[name] = make()
        assert len(list(tmp_path.iterdir())) == number, name
        assert torch.equal(make(), found[name])
        assert len(list(tmp_path.iterdir())) == number, name
    torch.testing.assert_close(found["classes"], first[:, [3, 1]])
    torch.testing.assert_close(found["order of classes"], first[:, [1, 3]])
    assert (found["weights"] - first).abs().max() > 1
    assert (found["images"] - first).abs().max() > 1


def test_wrong_input(classifier, images):
    with pytest.raises(ValueError, match="images: expected at least 6 to calibrate on, got 5"):
        calibrate(classifier, images[:5])
    smallest = calibrate(classifier, images[:6])
    assert smallest.deltas.tolist() == [0.2, 0.5]
    for truth in (torch.zeros(7, dtype=torch.int64), torch.zeros(8, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match="truth: expected 8 labels, one an image, got shape"):
            calibrate(classifier, images[:8], truth=truth)
    with pytest.raises(ValueError, match=r"truth: labels \[12, 13\] are not among the classes"):
        calibrate(classifier, images[:8], truth=[0, 1, 2, 13, 12, 5, 6, 13])
    with pytest.raises(ValueError, match=r"truth: labels \[0\] are not among the classes"):
        calibrate(classifier, images[:8], [1, 2], truth=[1, 2, 1, 2, 1, 2, 1, 0])
    with pytest.raises(ValueError, match="knows no class"):
        calibrate(classifier, images[:8], ["shoe"])
    with pytest.raises(ValueError, match="sigma: expected a positive"):
        calibrate(classifier, images[:8], samples=2, sigma=0)
    with pytest.raises(ValueError, match="another model"):
        calibrate(classifier, replace(images, patch_nums=(1, 2)))


def test_truth_is_by_class_not_by_place(classifier, images):
    labels = torch.tensor([7, 2, 9])
    columns = torch.randint(3, (12,), generator=generator())
    found = calibrate(classifier, images[:12], labels, truth=labels[columns])
    exact = measure(classifier, images[:12], labels, labels).exact
    torch.testing.assert_close(found.temperature, fit_temperature(exact, columns))
    torch.testing.assert_close(found.scale_weights, fit_scale_weights(exact, columns))


def test_measured_rows_go_together():
    measured = Measured(normal(5, 3, 2), normal(5, 3), torch.arange(10).view(5, 2), normal(5, 2, 4), torch.arange(5))
    rows = torch.tensor([4, 1])
    some = measured[rows]
    for name in ("exact", "first_order", "finalists", "samples", "truth"):
        assert torch.equal(getattr(some, name), getattr(measured, name)[rows])
    assert torch.equal(some.best, measured.best[rows])
    assert len(some) == 2


def test_posteriors_are_calibrated_as_it_was_fitted(classifier, images):
    mine, few = make_classifier(), images[:4]
    exact = measure(mine, few, mine.labels(), mine.labels()).exact
    temperature, weights = (torch.tensor(x, dtype=torch.float64) for x in ([1.5, 2, 3, 20], [0.9, 0.0, 0.1, 0.05]))
    unlabelled = calibrate(mine, images[:12])
    for without in (None, unlabelled):
        mine.calibration = without
        with pytest.raises(ValueError, match="calibrated: this takes a calibration made with labels"):
            mine.posterior(few, calibrated="temperature")
    mine.calibration = replace(unlabelled, temperature=temperature, scale_weights=weights)
    prior = torch.linspace(1, 2, 12, dtype=torch.float64)
    for scales in (None, 1, 3):
        count = scales or 4
        wanted = (exact[..., :count].sum(-1) / temperature[count - 1] + prior.log()).softmax(1).float()
        found = mine.posterior(few, scales=scales, prior=prior, calibrated="temperature")
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    found = mine.posterior(few, [7, 2], calibrated="scale weights")
    torch.testing.assert_close(found, (exact @ weights)[:, [7, 2]].softmax(1).float(), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="scales: weights are for all 4 scales, got 3"):
        mine.posterior(few, scales=3, calibrated="scale weights")
    with pytest.raises(ValueError, match="calibrated: expected 'temperature', 'scale weights' or None, got 'heat'"):
        mine.posterior(few, calibrated="heat")


# What is bundled


@pytest.mark.parametrize("name", [n for n in BUNDLED if (bundled_folder(n) / CALIBRATION_FILE).is_file()])
def test_bundled_calibrations_fit_their_model(name):
    classifier = varlik.load(name)
    pictures = samples(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibration = classifier.calibration
        assert calibration is not None
        calibration.check(classifier.fingerprint)
        assert calibration.labels.tolist() == list(range(classifier.null_class))
        prediction = classifier.classify(list(pictures.paths), cascade=varlik.FAST)
    assert prediction.log_likelihood.isfinite().any(1).all()
    assert [str(result.stage) for result in prediction.stages] == str(varlik.FAST).split(",")
    right = prediction.classes == torch.tensor(pictures.labels)
    assert right.double().mean() > 0.5
    assert calibration.recall[-1] > 0.95
