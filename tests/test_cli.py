"""The command line as a user meets it: output, exit codes, one line per error."""

from __future__ import annotations

import json

import pytest
from PIL import Image

import varlik
import varlik.images
from varlik.evaluation.samples import samples


@pytest.fixture(scope="module")
def pictures():
    return samples("fashion-mnist")


def test_version_and_help(run):
    assert run("--version")[:2] == (0, varlik.__version__ + "\n")
    code, out, _ = run("--help")
    assert code == 0
    for command in ("classify", "models", "demo", "doctor", "convert"):
        assert command in out


def test_classify_prints_the_truth(run, pictures):
    code, out, err = run("classify", *pictures.paths[:2])
    assert (code, err) == (0, "")
    for label in pictures.labels[:2]:
        assert varlik.load("fashion-mnist").class_names[label] in out


def test_classify_json_equals_the_library(run, pictures):
    code, out, _ = run("classify", *pictures.paths[:3], "--json", "--topk", 10, "--cascade", "3:4,6x2:1", "--seed", 5)
    answer = json.loads(out)
    assert code == 0
    prediction = varlik.load("fashion-mnist").classify(list(pictures.paths[:3]), cascade="3:4,6x2:1", seed=5)
    for i, row in enumerate(answer["images"]):
        assert row["image"] == str(pictures.paths[i])
        assert [entry["class"] for entry in row["top"]] == prediction.ranking[i].tolist()
        assert [entry["log_likelihood"] is None for entry in row["top"]] == [False] * 4 + [True] * 6
        best = row["top"][0]
        assert best["posterior"] == pytest.approx(prediction.posterior[i].max().item(), rel=1e-4)
        assert row["tokens"] == prediction.cost.tokens[i].item()
        # ten classes to scale 3, four to scale 6, and a second sample of these; scale 1 is a look-up
        assert row["tokens"] <= 10 * 13 + 4 * 116 + 4 * 129


def test_classes_by_name_and_index(run, pictures):
    code, out, _ = run("classify", pictures.paths[0], "--classes", "ankle boot, 7,Sandal", "--json")
    names = {entry["name"] for entry in json.loads(out)["images"][0]["top"]}
    assert (code, names) == (0, {"Ankle boot", "Sneaker", "Sandal"})


def test_one_bad_image_is_named_and_the_others_answered(run, pictures, tmp_path):
    bad = tmp_path / "broken.png"
    bad.write_bytes(pictures.paths[0].read_bytes()[:60])
    code, out, err = run("classify", bad, pictures.paths[0], tmp_path / "absent.png", "--json")
    assert code == 2
    assert [row["image"] for row in json.loads(out)["images"]] == [str(pictures.paths[0])]
    lines = err.splitlines()
    assert len(lines) == 2
    assert "broken.png" in lines[0]
    assert "absent.png" in lines[1]


def test_larger_colour_photographs_are_taken(run, tmp_path):
    path = tmp_path / "photo.jpg"
    Image.linear_gradient("L").convert("RGB").resize((301, 200)).save(path)
    assert run("classify", path)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "fashion-mnits"), "fashion-mnist"),
        (("--model", "./nowhere"), "nowhere"),
        (("--classes", "boat"), "boat"),
        (("--classes", "11"), "11"),
        (("--cascade", "3:2,6:5,6:1"), "narrows"),
        (("--cascade", "3"), "'3'"),
        (("--cascade", "7:1"), "7 scales"),
        (("--device", "quantum"), "quantum"),
    ],
)
def test_wrong_options_exit_2_with_one_line(run, pictures, arguments, message):
    code, out, err = run("classify", pictures.paths[0], *arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert message in err


def test_no_image_is_a_usage_error(run):
    code, _, err = run("classify")
    assert code == 2
    assert "IMAGE" in err


def test_models(run):
    code, out, _ = run("models", "--json")
    listed = {row["name"]: row["bundled"] for row in json.loads(out)}
    assert code == 0
    assert listed["fashion-mnist"] is True
    assert listed["var-d16"] is False
    assert list(listed) == varlik.list_models()
    code, out, _ = run("models", "var-d*")
    assert "var-d36" in out
    assert "fashion-mnist" not in out
    code, _, err = run("models", "x*")
    assert code == 2
    assert "x*" in err


def test_demo(run, pictures):
    code, out, _ = run("demo", "--json")
    result = json.loads(out)
    assert code == 0
    assert len(result["rows"]) == len(pictures.paths) == 12
    assert result["difference"] < 1e-5
    assert sum(row["truth"] == row["predicted"] for row in result["rows"]) >= 9
    assert run("demo")[0] == 0


def test_doctor_is_content_and_sees_damage(run, monkeypatch):
    code, out, _ = run("doctor", "--json")
    checks = {check["name"]: check["ok"] for check in json.loads(out)}
    assert code == 0
    assert checks["fashion-mnist tokens"] is True
    assert checks["fashion-mnist token log-probs"] is True
    assert checks["fashion-mnist accuracy"] is True

    real = varlik.images.load_many
    monkeypatch.setattr("varlik.images.load_many", lambda images, rule: -real(images, rule))
    code, out, _ = run("doctor")
    assert code == 1
    assert "FAILED" in out


def test_convert_round_trip(run, pictures, tmp_path):
    assert run("convert", "fashion-mnist", tmp_path / "copy")[0] == 0
    _, first, _ = run("classify", pictures.paths[0], "--json")
    _, second, _ = run("classify", pictures.paths[0], "--json", "--model", tmp_path / "copy")
    assert json.loads(first)["images"] == json.loads(second)["images"]


def test_profile_of_ops_that_took_no_time():
    from varlik.cli.measure import _profile_table
    from varlik.evaluation.profile import OpTime

    table = _profile_table((OpTime("linear 8 -> 8", 2, 0.5, 10**9), OpTime("other", 1, 0.0, 0)), peak=4.0)
    cells = [list(column.cells) for column in table.columns]
    assert cells[2:] == [["100.0 %", "0.0 %"], ["2", ""], ["50 %", ""]]
