"""`varlik explain` as a user meets it: numbers, pictures, the page, one line per error."""

from __future__ import annotations

import json
import sys

import pytest

import varlik
from varlik.evaluation.samples import samples
from varlik.explanation.information import explain


@pytest.fixture(scope="module")
def paths():
    return samples("fashion-mnist").paths


def answer_of(run, *arguments):
    code, out, err = run("explain", *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_json_equals_the_library(run, paths):
    answer = answer_of(run, *paths[:3])
    classifier = varlik.load("fashion-mnist")
    found = explain(classifier, list(paths[:3]))
    assert (answer["model"], answer["unconditional"], answer["files"]) == ("fashion-mnist", "others", [])
    assert [image["image"] for image in answer["images"]] == [str(path) for path in paths[:3]]
    sizes = [p * p for p in found.patch_nums]
    for i, image in enumerate(answer["images"]):
        for name, label in (("target", found.target[i]), ("rival", found.rival[i])):
            assert image[name]["class"] == int(label)
            assert image[name]["name"] == classifier.class_names[int(label)]
            assert image[name]["posterior"] == pytest.approx(found.posterior[i, label].item(), rel=1e-3, abs=1e-9)
            assert image[name]["log_likelihood"] == pytest.approx(found.token_log_prob[i, label].sum().item(), rel=1e-5)
        for name in ("information", "contrast"):
            values = getattr(found, name)[i]
            assert image[name] == pytest.approx(values.sum().item(), abs=1e-3)
            by_scale = [part.sum().item() for part in values.split(sizes)]
            assert [scale[name] for scale in image["scales"]] == pytest.approx(by_scale, abs=1e-3)
        assert [(scale["scale"], scale["side"]) for scale in image["scales"]] == list(enumerate(found.patch_nums, 1))


def test_tokens_are_those_that_say_most(run, paths):
    (image,) = answer_of(run, paths[0])["images"]
    found = explain(varlik.load("fashion-mnist"), paths[0])
    ranking = found.contrast[0].argsort(descending=True).tolist()
    for side, positions in (("for", ranking[:3]), ("against", ranking[:-4:-1])):
        for token, position in zip(image[side], positions, strict=True):
            sides = found.patch_nums[: token["scale"]]
            assert position == (sum(p * p for p in sides[:-1]) + (token["row"] - 1) * sides[-1] + token["column"] - 1)
            assert token["code"] == int(found.tokens[0, position])
            for name in ("information", "contrast"):
                assert token[name] == pytest.approx(getattr(found, name)[0, position].item(), abs=1e-4)
    assert all(token["contrast"] > 0 for token in image["for"])
    assert all(token["contrast"] < 0 for token in image["against"])


def test_tables(run, paths):
    code, out, err = run("explain", paths[0])
    assert (code, err) == (0, "")
    (image,) = answer_of(run, paths[0])["images"]
    assert f"{paths[0]}: Ankle boot (1.0000) against Sneaker (0.0000)" in out
    for text in (
        "6: 8 × 8",
        "nats for Ankle boot, by scale",
        "against the other classes",
        "token for",
        "all",
        f"{image['contrast']:+.2f}",
    ):
        assert text in out
    assert str(image["for"][0]["code"]) in out
    assert "against the null class" in run("explain", paths[0], "--unconditional", "null")[1]


def test_options_reach_the_library(run, paths):
    arguments = ("--target", "sneaker", "--contrast", "9", "--classes", "Sneaker, bag,9,T-shirt/top", "--samples", 3)
    (image,) = answer_of(run, paths[0], *arguments, "--unconditional", "null", "--device", "cpu")["images"]
    classes = ["Sneaker", "Bag", 9, "T-shirt/top"]
    found = explain(varlik.load("fashion-mnist"), paths[0], 7, 9, classes=classes, samples=3, unconditional="null")
    assert (image["target"]["name"], image["rival"]["name"]) == ("Sneaker", "Ankle boot")
    assert image["information"] == pytest.approx(found.information.sum().item(), abs=1e-3)
    assert image["contrast"] == pytest.approx(found.contrast.sum().item(), abs=1e-3)
    assert image["contrast"] < 0
    (others,) = answer_of(run, paths[0], *arguments)["images"]
    assert others["information"] != pytest.approx(image["information"], abs=1e-2)


def test_pictures_in_a_folder(run, paths, tmp_path):
    pytest.importorskip("matplotlib")
    copy = tmp_path / "other" / paths[0].name
    copy.parent.mkdir()
    copy.write_bytes(paths[1].read_bytes())
    folder = tmp_path / "new" / "pictures"
    answer = answer_of(run, paths[0], copy, "--out", folder)
    stems = [f"1-{paths[0].stem}", f"2-{paths[0].stem}"]
    wanted = [folder / f"{stem}-{kind}.png" for stem in stems for kind in ("panels", "scales")]
    assert answer["files"] == [str(file) for file in wanted]
    assert sorted(folder.iterdir()) == sorted(wanted)
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in wanted)
    named_like_a_numbered_one = tmp_path / f"1-{paths[0].name}"
    named_like_a_numbered_one.write_bytes(paths[2].read_bytes())
    files = answer_of(run, paths[0], copy, named_like_a_numbered_one, "--out", tmp_path / "all")["files"]
    assert len(set(files)) == len(list((tmp_path / "all").iterdir())) == 6
    code, out, _ = run("explain", copy, "--out", folder, "--format", "svg")
    assert code == 0
    for kind in ("panels", "scales"):
        file = folder / f"{copy.stem}-{kind}.svg"
        assert f"wrote {file}" in out
        assert file.read_bytes().startswith(b"<?xml")


def test_page(run, paths, tmp_path):
    file = tmp_path / "report.html"
    code, out, err = run("explain", *paths[:2], "--target", "Coat", "--html", file)
    assert (code, err) == (0, "")
    assert f"wrote {file}" in out
    text = file.read_text("utf-8")
    assert f'"name":"{paths[1].name}"' in text
    assert str(paths[1].parent) not in text
    assert "Coat" in text
    assert text.lstrip().lower().startswith("<!doctype html")


def test_one_bad_image_is_named_and_the_others_answered(run, paths, tmp_path):
    bad = tmp_path / "broken.png"
    bad.write_bytes(paths[0].read_bytes()[:60])
    page = tmp_path / "report.html"
    code, out, err = run("explain", bad, paths[0], tmp_path / "absent.png", "--json", "--html", page)
    assert code == 2
    assert [image["image"] for image in json.loads(out)["images"]] == [str(paths[0])]
    lines = err.splitlines()
    assert len(lines) == 2
    assert "broken.png" in lines[0]
    assert "absent.png" in lines[1]
    assert page.exists()


def test_nothing_readable_prints_nothing(run, tmp_path):
    code, out, err = run("explain", tmp_path / "absent.png", "--html", tmp_path / "report.html")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "fashion-mnits"), "fashion-mnist"),
        (("--classes", "boat"), "boat"),
        (("--classes", "Bag"), "two candidates or more"),
        (("--target", "boat"), "target: fashion-mnist knows no class 'boat'"),
        (("--contrast", "12"), "contrast: expected indices from 0 to 9"),
        (("--target", "Bag", "--classes", "Coat,Dress"), "target: classes [8] are not among the candidates"),
        (("--target", "Bag", "--contrast", "8"), "contrast: expected another class than the target"),
        (("--unconditional", "nil"), "'nil'"),
        (("--device", "quantum"), "quantum"),
        (("--html", "/nowhere/at/all.html"), "html: no such folder: /nowhere/at"),
        (("--format", "pdf"), "format: expected png or svg, got 'pdf'"),
    ],
)
def test_wrong_options_exit_2_with_one_line(run, paths, arguments, message):
    code, out, err = run("explain", paths[0], *arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert message in err


def test_places_are_checked_before_any_work(run, paths, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(varlik, "load", lambda *_, **__: pytest.fail("loaded"))
    file = tmp_path / "file"
    file.write_text("")
    for arguments, message in (
        (("--out", file), "is no folder"),
        (("--out", file / "below"), "is no folder"),
        (("--out", tmp_path, "--format", "pdf"), "format: expected png or svg, got 'pdf'"),
        (("--html", tmp_path), "is a folder"),
        (("--html", "nodir/x.html"), "html: no such folder: nodir"),
    ):
        code, out, err = run("explain", paths[0], *arguments)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert message in err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run("explain", paths[0], "--out", tmp_path)
    assert code == 2
    assert "varlik[plots]" in err


@pytest.mark.parametrize("command", ["explain", "benchmark"])
def test_help_names_the_extra(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "varlik[plots]" in "".join(out.split())


def test_no_image_is_a_usage_error(run):
    code, _, err = run("explain")
    assert code == 2
    assert "IMAGE" in err
