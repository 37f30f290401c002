"""First-order screening from the command line: calibrate, classify with it, count it, check it, show it."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import varlik
from varlik.calibration import Calibration
from varlik.calibration.conformal import calibration_images_needed
from varlik.calibration.fit import Measured, fit
from varlik.cascade import FAST, Cascade
from varlik.evaluation import arithmetic, doctor, first_order, pictures
from varlik.evaluation import calibrate as calibrating
from varlik.evaluation import demo as demos
from varlik.evaluation.samples import samples
from varlik.models import checkpoints
from varlik.models.presets import bundled_folder, imagenet_class_names, imagenet_synset_ids
from varlik.scoring import score_table
from varlik.smoothing import Smoothing

NAMES = ("Coat", "T-shirt/top", "ankle boot", "dress", "bag", "shirt", "hat")
FOLDERS = ("Coat", "t-shirt_top", "Ankle Boot", "3", "bag")  # by name, in any case, and by index
COARSE = "screen:10%,race:10%"  # what 18 pictures allow


def draw(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((80, 80)).save(path)
    return path


@pytest.fixture(scope="module")
def classifier(golden_classifier):
    """The golden model with class names that need care as names of folders."""
    golden, _ = golden_classifier
    return varlik.VARClassifier(golden.var, golden.vqvae, NAMES, golden.preprocessing, name="golden")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Eighteen pictures in folders named after their classes, and what is no picture."""
    folder = tmp_path_factory.mktemp("tree")
    for i in range(18):
        draw(folder / FOLDERS[i % len(FOLDERS)] / f"{i}.{'PNG' if i % 2 else 'png'}", i)
    draw(folder / "Coat" / ".hidden.png", 99)
    (folder / "README.txt").write_text("not a picture")
    return folder


@pytest.fixture
def model(classifier, tmp_path):
    """The golden model in a folder of the user's."""
    folder = tmp_path / "model"
    checkpoints.save(folder, classifier.var, classifier.vqvae, NAMES, classifier.preprocessing)
    return folder


@pytest.fixture(scope="module")
def measured(classifier, tree):
    """The calibration that the command makes of `tree`."""
    paths = pictures.find([tree])
    return varlik.calibrate(classifier, [str(path) for path in paths], truth=pictures.truth(classifier, paths))


def made_up(classifier, images=320, first_order_error=1.0):
    """A calibration on so many images that nobody has seen."""
    generator = torch.Generator().manual_seed(0)
    labels, scales = classifier.labels(), classifier.var.config.num_scales
    exact = torch.randn(images, len(labels), scales, dtype=torch.float64, generator=generator)
    error = torch.randn(images, len(labels), dtype=torch.float64, generator=generator)
    scores = Measured(exact, exact.sum(-1) + first_order_error * error)
    return fit(scores, classifier.fingerprint, labels, labels, Smoothing())


def fails(answer, *messages):
    """Whether a command ended as wrong input has to."""
    code, out, err = answer
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("varlik: ")
    for message in messages:
        assert message in err


def test_calibrate_writes_beside_a_model_of_the_users(run, model, tree, measured):
    code, out, err = run("calibrate", tree, "--model", model, "--labelled")
    assert (code, err) == (0, "")
    written = Calibration.load(model / "calibration.safetensors")
    assert written.slope == pytest.approx(measured.slope, rel=1e-3)
    torch.testing.assert_close(written.temperature, measured.temperature, rtol=1e-3, atol=1e-3)
    for line in ("18, of which 12", "best 5 estimates", "takes 298 images", "--samples", "calibration.safetensors"):
        assert line in out
    loaded = varlik.load(model).calibration
    assert loaded is not None
    assert loaded.images == 18


def test_calibrate_json(run, model, tree, tmp_path):
    out_file = tmp_path / "other.safetensors"
    options = ("--out", out_file, "--labelled", "--samples", 2, "--sigma", 0.3, "--classes", "0, T-shirt/top,2,3")
    code, out, err = run("calibrate", tree, "--model", model, *options, "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert not (model / "calibration.safetensors").exists()
    assert Calibration.load(out_file).labels.tolist() == [0, 1, 2, 3]
    assert (report["images"], report["classes"], report["file"]) == (15, 4, str(out_file))
    assert report["notes"] == ["3 pictures of other classes were left out"]
    assert list(report["recall"]) == ["1", "3"]
    assert report["temperature"] > 0
    smoothing = report["smoothing"]
    assert (smoothing["samples"], smoothing["sigma"]) == (2, 0.3)
    assert abs(smoothing["gain"]) <= 1
    assert [row["images_needed"] for row in report["finalists"]] == [298, 148, 73, 28]
    assert [row["expected"] for row in report["finalists"]] == [None] * 4


def test_progress_is_shown_on_a_terminal(run, model, tree, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for one
    code, out, err = run("calibrate", tree, "--model", model, "--json")
    assert code == 0
    assert json.loads(out)["images"] == 18
    for what in ("reading pictures", "exact scores"):
        assert what in err


def test_help_says_where_things_go(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = run("calibrate", "--help")[1]
    for text in ("they are not kept", "calibration.safetensors in the model's folder"):
        assert text in out


def test_cached_scores_are_found_again(run, model, tree, tmp_path, monkeypatch):
    arguments = ("calibrate", tree, "--model", model, "--cache", tmp_path / "scores", "--json")
    first = run(*arguments)
    assert first[0] == 0
    assert list((tmp_path / "scores").glob("*.safetensors"))
    monkeypatch.setattr(score_table, "_scores", None)
    assert run(*arguments) == first


def test_a_picture_that_cannot_be_read_is_named_and_the_others_count(run, model, tree, tmp_path):
    bad = tmp_path / "broken.png"
    bad.write_bytes(b"no picture")
    code, out, err = run("calibrate", bad, *sorted(tree.glob("*/*.png"))[:8], "--model", model, "--json")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "broken.png" in err
    assert json.loads(out)["images"] == 8


def test_where_a_calibration_goes(model, tmp_path):
    assert calibrating.place(str(model), None) == model / "calibration.safetensors"
    assert calibrating.place("var-d16", tmp_path) == tmp_path / "calibration.safetensors"
    assert calibrating.place("var-d16", tmp_path / "x.safetensors") == tmp_path / "x.safetensors"


def test_calibrate_refuses(run, model, tree, tmp_path):
    (tmp_path / "empty").mkdir()
    fails(run("calibrate", tree, "--model", "fashion-mnist"), "--out")
    fails(run("calibrate", tree, "--model", bundled_folder("fashion-mnist")), "part of varlik", "--out")
    fails(run("calibrate", tree, "--model", model, "--out", tmp_path / "nowhere" / "x"), "nowhere")
    fails(run("calibrate", tmp_path / "absent", "--model", model), "absent")
    fails(run("calibrate", tmp_path / "empty", "--model", model), "no pictures", "empty")
    fails(run("calibrate", tree / "bag", "--model", model), "at least 6", "got 3")
    fails(run("calibrate", tree, "--model", model, "--labelled", "--classes", "hat"), "at least 6")
    fails(run("calibrate", draw(tmp_path / "sofa" / "1.png", 0), "--model", model, "--labelled"), "sofa", "ankle boot")


def test_finding_pictures(tree, tmp_path):
    found = pictures.find([tree])
    assert len(found) == 18
    assert list(found) == sorted(found)
    assert pictures.find([found[3], tree, found[3]])[:2] == (found[3], found[0])
    text = tree / "README.txt"
    assert pictures.find([text]) == (text,)  # who names a file means it
    with pytest.raises(FileNotFoundError, match="absent"):
        pictures.find([tmp_path / "absent"])


def test_classes_from_folders(classifier, tree):
    paths = [tree / folder / "x.png" for folder in FOLDERS]
    assert pictures.truth(classifier, paths).tolist() == [0, 1, 2, 3, 4]
    assert pictures.of_classes(classifier, paths, torch.tensor([3, 0])) == (paths[0], paths[3])
    with pytest.raises(ValueError, match=r"sofa.*knows no class"):
        pictures.truth(classifier, [tree / "sofa" / "x.png"])
    imagenet = SimpleNamespace(class_names=imagenet_class_names())
    assert pictures.truth(imagenet, [Path(imagenet_synset_ids()[7]) / "1.JPEG"]).tolist() == [7]


def test_classify_with_a_calibration(run, model, tree, measured, tmp_path, classifier):
    measured.save(tmp_path / "c.safetensors")
    paths = pictures.find([tree])[:3]
    given = ("--model", model, "--calibration", tmp_path / "c.safetensors", "--cascade", COARSE, "--topk", 7)
    code, out, err = run("classify", *paths, *given, "--audit", 1, "--json")
    answer = json.loads(out)
    assert (code, err) == (0, "")
    classifier.calibration = measured
    wanted = classifier.classify([str(path) for path in paths], cascade=COARSE, audit=1)
    classifier.calibration = None
    cost = answer["cost"]
    assert cost["forward_tokens"] == wanted.cost.tokens.sum()
    assert cost["backward_tokens"] == wanted.cost.backward_tokens.sum() == 3 * 29
    assert cost["flops"] == wanted.cost.flops.sum()
    assert cost["full_flops"] == 3 * wanted.cost.full_flops
    assert [stage["stage"] for stage in cost["stages"]] == COARSE.split(",")
    assert all(stage["seconds"] > 0 for stage in cost["stages"])
    assert cost["stages"][0]["classes"] == 7
    assert (answer["audit"]["images"], answer["audit"]["delta"]) == (3, 0.1)
    for i, row in enumerate(answer["images"]):
        assert [entry["class"] for entry in row["top"]] == wanted.ranking[i].tolist()
        assert row["backward_tokens"] == 29
        for entry in row["top"]:
            left = entry["dropped_by"] is None
            assert (entry["log_likelihood"] is not None) == left
            assert (entry["posterior"] > 0) == left
            assert entry["dropped_by"] in (None, *COARSE.split(","))
            assert entry["estimate"] == pytest.approx(
                wanted.stages[0].log_likelihood[i, entry["class"]].item(), rel=1e-4
            )
    code, out, _ = run("classify", *paths, *given, "--audit", 1e-9)
    assert code == 0
    for text in ("dropped", "estimate", "29 backwards", "none of these images was drawn"):
        assert text in out
    assert "of 3 images have another answer" in run("classify", *paths, *given, "--audit", 1)[1]
    assert "not scored" in run("classify", *paths, "--model", model, "--cascade", "screen:1")[1]


def test_a_calibration_that_does_not_do_is_refused(run, model, tree, measured, tmp_path):
    picture, file = pictures.find([tree])[0], tmp_path / "c.safetensors"
    arguments = ("classify", picture, "--model", model, "--calibration", file)
    fails(run(*arguments), "c.safetensors", "varlik calibrate")
    measured.save(file)
    fails(run(*arguments, "--cascade", "fast"), "delta", "199")
    fails(run(*arguments, "--audit", 2), "audit")
    replace(measured, fingerprint=replace(measured.fingerprint, dtype="float16")).save(file)
    fails(run(*arguments), "dtype", "float16")


def test_our_warnings_are_one_line(run, model, tree, measured):
    picture = pictures.find([tree])[0]
    code, _, err = run("classify", picture, "--model", model, "--cascade", "fast")
    assert code == 0
    assert len(err.splitlines()) == 1
    assert err.startswith("varlik: model has no calibration")
    replace(measured, fingerprint=replace(measured.fingerprint, dtype="float16")).save(
        model / "calibration.safetensors"
    )
    code, _, err = run("classify", picture, "--model", model, "--cascade", "fast", "--json")
    assert code == 0
    assert [line.startswith("varlik: ") for line in err.splitlines()] == [True, True]
    assert "not used" in err.splitlines()[0]


def test_warnings_of_others_stay_as_they_are(run, model, tree, monkeypatch):
    def load(*args, **kwargs):
        warnings.warn_explicit("from afar", UserWarning, "elsewhere.py", 1)
        return real(*args, **kwargs)

    real = varlik.load
    monkeypatch.setattr(varlik, "load", load)
    with pytest.warns(UserWarning, match="from afar"):
        code, _, err = run("classify", pictures.find([tree])[0], "--model", model)
    assert (code, err) == (0, "")


@pytest.mark.parametrize(("classes", "limit"), [(100, 1300), (1000, 1700)])
def test_flops_of_fast_on_the_public_model(run, classes, limit):
    code, out, err = run("flops", "var-d16", "--classes", classes, "--cascade", "fast", "--json")
    answer = json.loads(out)
    assert (code, err) == (0, "")
    paper = answer["engine"]["paper"]
    assert paper["total"] < limit * 1e9
    assert paper["encoder"] == pytest.approx(107.87e9, rel=1e-3)
    assert "released" not in answer
    assert answer["calibration"] is None
    assert any(str(FAST.fixed(classes)) in note for note in answer["notes"])
    assert any(note.startswith("released: left out") for note in answer["notes"])


def test_flops_with_a_calibration(run, model, measured, tmp_path, classifier):
    measured.save(model / "calibration.safetensors")
    code, out, _ = run("flops", model, "--cascade", COARSE, "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["calibration"] == str(model / "calibration.safetensors")
    rows = [step["rows"] for step in answer["engine"]["true"]["steps"]]
    assert rows == [0, 1, round(measured.expected_finalists(0.1))]
    assert "averages over the 18 images" in run("flops", model, "--cascade", COARSE)[1]
    assert "released" in json.loads(run("flops", model, "--json")[1])
    few = run("flops", model, "--cascade", COARSE, "--classes", 3)[1]
    assert "among 7 classes" in few
    made_up(classifier).save(tmp_path / "many.safetensors")
    many = arithmetic.count(str(model), FAST, calibration=tmp_path / "many.safetensors")
    assert any("no smoothing" in note for note in many.notes)
    assert any("takes none" in note for note in arithmetic.count(str(model), varlik.VARC, None, many.calibration).notes)


def test_flops_refuses_a_calibration_of_another_shape(run, model, measured, tmp_path):
    measured.save(tmp_path / "c.safetensors")
    given = ("--cascade", COARSE, "--calibration", tmp_path / "c.safetensors")
    fails(run("flops", "fashion-mnist", *given), "scales", "(1, 2, 3, 4)")
    fails(run("flops", model, "--cascade", "fast", "--calibration", tmp_path / "c.safetensors"), "199")
    fails(run("flops", model, "--cascade", "fast", "--calibration", tmp_path / "absent"), "absent")
    replace(measured, labels=measured.labels[:5]).save(model / "calibration.safetensors")
    fails(run("flops", model, "--cascade", COARSE, "--calibration", model / "calibration.safetensors"), "5 classes")
    notes = arithmetic.count(str(model), Cascade.parse(COARSE)).notes
    assert "not used" in notes[0]
    assert "fixed counts" in notes[1]


def checks_of(answer):
    code, out, err = answer
    assert (code, err) == (0, "")
    return {check["name"].removeprefix("model "): check for check in json.loads(out)}


def test_doctor_of_any_model(run, model, tree, measured):
    checks = checks_of(run("doctor", "--model", model, "--json"))
    assert "give some pictures" in checks["first-order scores"]["detail"]
    assert checks["calibration"]["detail"].startswith("none")

    measured.save(model / "calibration.safetensors")
    checks = checks_of(run("doctor", tree / "bag", "--model", model, "--json"))
    assert "fits; 7 classes, 18 images" in checks["calibration"]["detail"]
    for kind in ("at the mean", "at the null class", "corrected"):
        check = checks[f"first-order scores, {kind}"]
        assert check["ok"] is None
        assert "best 1, 3, 5 in" in check["detail"]
        assert "of 3 images" in check["detail"]
    assert "forward passes" in checks["first-order scores, time"]["detail"]

    replace(measured, fingerprint=replace(measured.fingerprint, dtype="float16")).save(
        model / "calibration.safetensors"
    )
    checks = checks_of(run("doctor", *tree.glob("bag/*"), "--model", model, "--json"))
    assert "differs in dtype (calibrated: float16, here: float32)" in checks["calibration"]["detail"]
    assert "first-order scores, corrected" not in checks
    (model / "calibration.safetensors").write_bytes(b"damaged")
    assert "not used" in checks_of(run("doctor", "--model", model, "--json"))["calibration"]["detail"]


def test_doctor_of_a_transformer_in_one_file(run, data, tree):
    files = ("--model", data / "adaln.var.safetensors", "--vqvae", data / "adaln.vqvae.safetensors")
    code, out, err = run("doctor", *tree.glob("bag/*"), *files, "--device", "cpu")
    assert (code, err) == (0, "")
    assert "adaln.var first-order scores, at the mean" in out
    fails(run("doctor", "absent.png", *files), "absent.png")
    fails(run("doctor", "--model", "fashion-mnits"), "fashion-mnist")


def test_doctor_fails_for_nan_alone(run, model, tree, monkeypatch):
    real = varlik.VARClassifier.first_order_log_likelihood
    monkeypatch.setattr(
        varlik.VARClassifier, "first_order_log_likelihood", lambda *args, **kw: real(*args, **kw) * float("nan")
    )
    code, out, _ = run("doctor", tree / "bag", "--model", model)
    assert code == 1
    assert out.count("FAILED") == 2


def test_quality_by_hand():
    exact = torch.tensor([[0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0]])
    same = first_order.quality("same", 2 * exact + 5, exact)
    assert same.correlation == pytest.approx(1)
    assert same.found == {1: 2, 3: 2}
    half = first_order.quality("half", torch.stack([exact[0], exact[0]]), exact)
    assert half.correlation == pytest.approx(0, abs=1e-12)
    assert half.found == {1: 1, 3: 1}


def test_doctor_says_when_screening_is_not_to_be_trusted():
    measured = first_order.FirstOrder(20, 100, (), 2.5)
    kind = first_order.Quality(first_order.MEAN, 0.5, {1: 3, 3: 5, 5: 9, 10: 18})
    ok, text = doctor._finding(kind, measured)
    assert ok is None
    assert "1, 3, 5, 10 in 3, 5, 9, 18 of 20" in text
    assert "do not trust screening without a calibration" in text
    assert "trust" not in doctor._finding(replace(kind, found={10: 19}), measured)[1]
    assert "trust" not in doctor._finding(replace(kind, name=first_order.CORRECTED), measured)[1]


def test_images_needed_leave_enough_after_fitting(classifier):
    for delta in (0.005, 0.05, 0.1):
        count = calibration_images_needed(delta)
        enough, too_few = made_up(classifier, count), made_up(classifier, count - 1)
        cascade = Cascade.parse(f"race:{100 * delta:g}%")
        assert calibrating.allows(enough, cascade)
        assert not calibrating.allows(too_few, cascade)


def test_demo_shows_fast_where_a_calibration_allows_it(monkeypatch):
    classifier, few = varlik.load("fashion-mnist"), samples("fashion-mnist")
    monkeypatch.setattr(demos, "load", lambda model: classifier)
    monkeypatch.setattr(demos, "_naive", lambda classifier, images: classifier.log_likelihood(images))
    monkeypatch.setattr(demos, "samples", lambda model: replace(few, paths=few.paths[:2], labels=few.labels[:2]))

    classifier.calibration = None
    plain = demos.run(repeats=1)
    assert not any("FAST" in timing.name for timing in plain.timings)
    assert [note for note in plain.notes if "drops nobody" in note] == list(plain.notes)

    classifier.calibration = made_up(classifier)
    shown = demos.run(cascade=FAST, repeats=1)
    assert "FAST" in shown.timings[-1].name
    assert any("backwards" in note for note in shown.notes)
    classifier.calibration = made_up(classifier, images=30)
    assert not any("FAST" in timing.name for timing in demos.run(repeats=1).timings)
