"""`varlik train`: from pictures in folders to models that load, through kills, and wrong input in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_model import MANY, VQVAE_CONFIG

import varlik
from varlik.datasets import LabelledImages
from varlik.evaluation import train as training
from varlik.evaluation import training_run
from varlik.models import checkpoints
from varlik.models.config import Preprocessing
from varlik.models.var import VAR
from varlik.models.vqvae import VQVAE
from varlik.training import loop as loop_module
from varlik.training.distributed import World
from varlik.training.metrics import MetricsLog
from varlik.training.vqvae_file import load_vqvae, save_vqvae

SIZES = {
    "vqvae": asdict(VQVAE_CONFIG),
    "preprocessing": {"resize": 8, "crop": 8, "padding": 0, "channels": 1},
    "var": {"depth": 1, "embed_dim": 16, "num_heads": 2},
}
FEW = ("--steps", 6, "--batch-size", 4, "--checkpoint-every", 2, "--device", "cpu", "--quiet")
CLASSES = ("ash", "T-shirt/top", "elm")


class Killed(BaseException):
    """What no command catches."""


def draw(folder, classes, count=8):
    """Pictures of noise around a brightness for each class."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            noise = np.random.default_rng((label, i)).integers(0, 60, (8, 8), dtype=np.uint8)
            Image.fromarray(noise + np.uint8(60 * label)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("data") / "pictures", ("ash", "oak", "elm"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of three classes that nobody has trained."""
    folder = tmp_path_factory.mktemp("model") / "start"
    torch.manual_seed(0)
    config = replace(MANY, num_classes=3)
    var = VAR(config)
    var.reset_parameters()
    checkpoints.save(folder, var, VQVAE(VQVAE_CONFIG), CLASSES, Preprocessing(8, 8, channels=1))
    return folder


@pytest.fixture
def sizes(tmp_path):
    (tmp_path / "sizes.json").write_text(json.dumps(SIZES))
    return tmp_path / "sizes.json"


def ok(answer):
    code, out, err = answer
    assert (code, err) == (0, "")
    return out


def fails(answer, *words):
    code, _, err = answer
    assert code == 2
    assert len(err.splitlines()) == 1
    assert all(word in err for word in words)


def weights(folder):
    return varlik.load(folder, device="cpu").var.state_dict()


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_from_pictures_to_a_model(run, pictures, sizes, tmp_path):
    out = ok(run("train", "vqvae", pictures, "--out", tmp_path / "v", "--config", sizes, *FEW))
    assert f"wrote {tmp_path / 'v'}" in out
    assert "loss" in out
    vqvae, preprocessing = load_vqvae(str(tmp_path / "v"))
    assert (vqvae.config, preprocessing) == (VQVAE_CONFIG, Preprocessing(8, 8, channels=1))

    variants = ("--variants", "plain,flip,crop", "--work", tmp_path / "work")
    command = ("train", "var", pictures, "--vqvae", tmp_path / "v", "--out", tmp_path / "m", "--config", sizes)
    ok(run(*command, *variants, *FEW))
    found = varlik.load(tmp_path / "m", device="cpu")
    assert found.class_names == ("ash", "elm", "oak")
    assert (found.var.config.depth, found.var.config.embed_dim, found.var.config.vocab_size) == (1, 16, 20)
    assert equal(found.vqvae.state_dict(), vqvae.state_dict())
    assert found.log_likelihood(str(pictures / "ash" / "0.png")).shape == (1, 3)
    assert np.load(tmp_path / "work" / "tokens" / "tokens.npy", mmap_mode="r").shape == (24, 3, 30)
    assert not (tmp_path / "m" / "work").exists()
    again, _ = load_vqvae(str(tmp_path / "m"))
    assert equal(again.state_dict(), vqvae.state_dict())


def test_cca(run, model, tmp_path):
    data = draw(tmp_path / "data", ("Elm", "ash", "t-shirt_top"))
    command = ("train", "cca", data, "--model", model, "--out", tmp_path / "m", "--weight", 2.0, *FEW)
    out = ok(run(*command, "--held-out", 0.25, "--evaluate-every", 3, "--patience", 0))
    assert "run varlik calibrate" in out
    assert varlik.load(tmp_path / "m", device="cpu").class_names == CLASSES
    records = [json.loads(line) for line in (tmp_path / "m/work/cca/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "score" in record] == [0, 3, 6]
    state = torch.load(tmp_path / "m/work/cca/checkpoint.pt", weights_only=True)
    assert state["settings"]["size"] == 18  # six of each class
    assert state["settings"]["cca"]["weight"] == 2.0
    assert not equal(state["model"], weights(model))

    (tmp_path / "m/work/cca/metrics.jsonl").unlink()
    ok(run(*command, "--held-out", 0.25, "--evaluate-every", 3, "--patience", 0, "--resume"))
    other = draw(tmp_path / "other", ("elm", "ash"), 3)
    ok(run(*command[:5], "--out", tmp_path / "n", "--held-out", other, *FEW))
    assert (tmp_path / "n" / "work" / "held-out-tokens" / "tokens.npy").exists()


def test_no_step_was_better_than_the_start(run, model, tmp_path):
    data = draw(tmp_path / "data", ("Elm", "ash", "t-shirt_top"))
    command = ("train", "cca", data, "--model", model, "--out", tmp_path / "m", *FEW, "--held-out", data)
    # A rate too small to move a weight: no look finds more than the first one.
    out = ok(run(*command, "--evaluate-every", 1, "--patience", 2, "--learning-rate", 1e-30))
    assert "no step did better" in out
    assert steps(tmp_path / "m/work/cca") == [0, 1, 2]
    assert equal(weights(tmp_path / "m"), weights(model))


def test_held_out_images_of_a_var(run, pictures, model, sizes, tmp_path):
    given = ("train", "var", pictures, "--vqvae", model, "--config", sizes, *FEW, "--evaluate-every", 2)
    few = draw(tmp_path / "few", ("elm", "ash"), 3)  # not all classes, so that labels are others
    out = ok(run(*given, "--held-out", few, "--out", tmp_path / "m"))
    assert "score" in out
    assert "no step did better" not in out  # a new model has no start to go back to
    assert steps(tmp_path / "m/work/var") == [2, 4, 6]
    ok(run(*given, "--held-out", 0.25, "--out", tmp_path / "n"))
    other = draw(tmp_path / "other", ("fir",), 3)
    fails(run(*given, "--held-out", other, "--out", tmp_path / "o"), "held_out", "fir")


@pytest.mark.parametrize(("size", "parts"), [(1, 32), (2, 16), (8, 4), (32, 1), (64, 1), (16, 2)])
def test_processes_share_the_parts_of_a_preset(model, tmp_path, monkeypatch, size, parts):
    seen = []
    monkeypatch.setattr(training.distributed, "world", lambda: World(0, size, 0))
    monkeypatch.setattr(training, "train_cca", lambda var, data, config, loop, *args, **_: seen.append(loop) or var)
    monkeypatch.setattr(training.Run, "finish", lambda *args: None)
    monkeypatch.setattr(training.Run, "tokens", lambda *args: (None, None))
    run = training.Run("", tmp_path / "m", device="cpu")
    training.cca(run, str(model), "d16")
    training.cca(replace(run, changes={"accumulate": 2}), str(model), "d16")
    assert [loop.accumulate for loop in seen] == [parts, 2]
    assert seen[0].batch_size % (size * parts) == 0
    monkeypatch.setattr(training.distributed, "world", lambda: World(0, 3, 0))
    with pytest.raises(ValueError, match="batch_size: 256 images cannot be shared by 3 processes"):
        training.cca(run, str(model), "d16")
    for changes in ({"batch_size": 240}, {"batch_size": 240, "accumulate": 4}):
        training.cca(replace(run, changes=changes), str(model), "d16")
    assert [(loop.batch_size, loop.accumulate) for loop in seen[2:]] == [(240, 16), (240, 4)]


def test_processes_take_parts_that_divide_a_batch():
    assert [training._parts_of_a_process(240, 30, size) for size in (1, 3, 8)] == [30, 10, 5]
    assert [training._parts_of_a_process(16, 32, size) for size in (1, 2, 16)] == [16, 8, 1]  # no more than images


def test_names_with_slashes_are_found(model, tmp_path, monkeypatch):
    """Other data than folders write a name as it is."""
    seen = []
    source = LabelledImages(np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 2, 1]), ("t-shirt/TOP", "Elm", "ash"))
    monkeypatch.setattr(training_run, "idx_folder", lambda *args: source)
    monkeypatch.setattr(training, "train_cca", lambda var, data, *args, **kwargs: seen.append(data) or var)
    monkeypatch.setattr(training.Run, "finish", lambda *args: None)
    training.cca(training.Run("idx:x", tmp_path / "m", device="cpu", changes={"batch_size": 4}), str(model))
    assert seen[0].labels.tolist() == [1, 2, 0, 2]


def test_classes_are_found_by_name(model, tmp_path, monkeypatch):
    data = draw(tmp_path / "data", ("Elm", "ash", "t-shirt_top"), 2)
    seen = []
    monkeypatch.setattr(training, "train_cca", lambda var, data, *args, **kwargs: seen.append(data) or var)
    monkeypatch.setattr(training.Run, "finish", lambda *args: None)
    training.cca(training.Run(str(data), tmp_path / "m", device="cpu", changes={"batch_size": 6}), str(model))
    assert seen[0].class_names == CLASSES
    assert seen[0].labels.tolist() == [2, 2, 0, 0, 1, 1]


@pytest.mark.parametrize("what", ["embeddings", "adaln", "all"])
def test_new_classes(run, model, tmp_path, what):
    data = draw(tmp_path / "data", ("fir", "yew"))
    out = ok(run("train", "incremental", data, "-m", model, "--what", what, "--out", tmp_path / "m", *FEW))
    assert "2 new classes after 3 old ones" in out
    new, old = varlik.load(tmp_path / "m", device="cpu"), varlik.load(model, device="cpu")
    assert new.class_names == (*CLASSES, "fir", "yew")
    picture = str(data / "fir" / "0.png")
    same = torch.allclose(new.log_likelihood(picture)[:, :3], old.log_likelihood(picture), rtol=1e-5)
    assert same == (what != "all")


@pytest.mark.parametrize("kind", ["vqvae", "var", "cca", "incremental"])
def test_killed_and_resumed_equals_uninterrupted(run, pictures, model, sizes, tmp_path, monkeypatch, kind):
    data = draw(tmp_path / "new", ("fir", "yew")) if kind == "incremental" else pictures
    if kind == "cca":
        data = draw(tmp_path / "named", ("ash", "elm", "t-shirt_top"))
    given = {"vqvae": ("--config", sizes), "var": ("--vqvae", model, "--config", sizes)}.get(kind, ("-m", model))

    def command(name, *more):
        return run("train", kind, data, *given, "--out", tmp_path / name, *FEW, *more)

    def result(name):
        if kind == "vqvae":
            return load_vqvae(str(tmp_path / name))[0].state_dict()
        return weights(tmp_path / name)

    ok(command("whole"))
    real, left = loop_module._Run.update, iter(range(3))

    def killed(*args):
        if next(left, None) is None:
            raise Killed
        return real(*args)

    monkeypatch.setattr(loop_module._Run, "update", killed)
    with pytest.raises(Killed):
        command("killed")
    monkeypatch.setattr(loop_module._Run, "update", real)
    fails(command("killed"), "--resume", str(tmp_path / "killed" / "work" / kind))
    ok(command("killed", "--resume"))
    assert equal(result("killed"), result("whole"))
    assert steps(tmp_path / "killed" / "work" / kind) == steps(tmp_path / "whole" / "work" / kind)
    ok(command("killed", "--resume"))  # there is nothing left to do
    assert equal(result("killed"), result("whole"))


@pytest.mark.slow
def test_two_processes_equal_one(run, pictures, model, sizes, tmp_path):
    given = ["--vqvae", model, "--config", sizes, *FEW]
    ok(run("train", "var", pictures, *given, "--out", tmp_path / "one"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "varlik"]
    command = [*launch, "train", "var", pictures, *given, "--out", tmp_path / "two"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)


def test_unreadable_pictures_are_named_and_left_out(run, model, sizes, tmp_path):
    data = draw(tmp_path / "data", ("ash", "oak"))
    (data / "oak" / "3.png").write_bytes(b"damaged")
    code, _, err = run("train", "var", data, "--vqvae", model, "--config", sizes, "--out", tmp_path / "m", *FEW)
    assert code == 0
    assert len(err.splitlines()) == 1
    assert "3.png" in err


def test_data_by_name(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(training_run, "idx_folder", lambda *args: asked.append(("idx", *args)))
    monkeypatch.setattr(training_run, "hugging_face", lambda *args: asked.append(("hf", *args)))
    for name in ("fashion-mnist", "glyphs-100"):
        monkeypatch.setitem(training_run.DATA_SETS, name, lambda *args, name=name: asked.append((name, *args)))
    for text in ("idx:a/b", "idx:a@test", "hf:org/name", "hf:/a/b@dev", "fashion-mnist", "fashion-mnist@held-out"):
        training_run.images_of(text)
    training_run.images_of("fashion-mnist:a/b@test")
    training_run.images_of("glyphs-100:g")
    training_run.images_of("idx:me@home/a")
    training_run.images_of("idx:me@home/a@test")
    assert asked == [
        ("idx", "a/b", "train"),
        ("idx", "a", "test"),
        ("hf", "org/name", None),
        ("hf", "/a/b", "dev"),
        ("fashion-mnist", "train", None),
        ("fashion-mnist", "held-out", None),
        ("fashion-mnist", "test", "a/b"),
        ("glyphs-100", "train", "g"),
        ("idx", "me@home/a", "train"),
        ("idx", "me@home/a", "test"),
    ]
    with pytest.raises(ValueError, match="train, held-out, test"):
        training_run.images_of("fashion-mnist@validation")
    with pytest.raises(ValueError, match="glyphs-100:FOLDER"):
        training_run.images_of("glyphs-100")


def test_a_vqvae_alone(tmp_path, model):
    vqvae, preprocessing = load_vqvae(model)
    save_vqvae(tmp_path, vqvae, preprocessing)
    for source in (tmp_path, tmp_path / "vqvae.safetensors"):
        found, prepared = load_vqvae(source)
        assert (found.config, prepared, found.training) == (vqvae.config, preprocessing, False)
        assert equal(found.state_dict(), vqvae.state_dict())
    save_file(found.state_dict(), tmp_path / "vqvae.safetensors", {"vqvae": '{"width": 3}'})
    with pytest.raises(ValueError, match=r"vqvae\.safetensors: metadata cannot be understood"):
        load_vqvae(tmp_path)
    save_vqvae(tmp_path, vqvae, preprocessing)
    (tmp_path / "vqvae.safetensors").write_bytes((tmp_path / "vqvae.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        load_vqvae(tmp_path)


def test_wrong_input(run, pictures, model, sizes, tmp_path):
    out = ("--out", tmp_path / "m", *FEW)
    fails(run("train", "var", "absent", "--vqvae", model, *out), "data", "absent", "idx:FOLDER", "fashion-mnist")
    fails(run("train", "vqvae", pictures, *out, "--like", "fashion-mnits"), "fashion-mnist")
    fails(run("train", "var", pictures, "--vqvae", "absent.safetensors", *out), "absent.safetensors")
    fails(run("train", "var", pictures, "--vqvae", model, *out, "--variants", "flip"), "variants", "plain")
    fails(run("train", "var", pictures, "--vqvae", model, *out, "--precision", "int8"), "precision", "int8")
    fails(run("train", "var", pictures, "--vqvae", model, *out, "--batch-size", 99), "batch_size", "99", "24")
    assert not (tmp_path / "m" / "work" / "tokens").exists()
    fails(run("train", "var", pictures, "--vqvae", model, *out, "--batch-size", 5, "--accumulate", 2), "batch_size")
    fails(run("train", "cca", pictures, "-m", model, *out), "data", "oak", "class")
    named = draw(tmp_path / "named", ("ash", "elm", "t-shirt_top"))
    fails(run("train", "cca", named, "-m", model, *out, "--preset", "d17"), "preset", "d16", "d17")
    fails(run("train", "cca", named, "-m", model, *out, "--beta", -1), "beta", "-1")
    fails(run("train", "cca", named, "-m", model, *out[2:], "--out", model), "out", "start from")
    fails(run("train", "cca", named, "-m", model / "var.safetensors", *out[2:], "--out", model), "out", "start from")
    twice = draw(tmp_path / "twice", ("ash", "elm", "Elm", "t-shirt_top"))
    fails(run("train", "cca", twice, "-m", model, *out), "data", "one class")
    fails(run("train", "cca", named, "-m", model, *out, "--held-out", 1.5), "held_out", "1.5")
    fails(run("train", "incremental", named, "-m", model, *out), "ash, elm already")
    new = draw(tmp_path / "new", ("fir", "yew"))
    fails(run("train", "incremental", new, "-m", model, *out, "--what", "some"), "what", "adaln", "some")
    for text, words in (
        ("{", ("config", "JSON")),
        ('{"vae": {}}', ("config", "vqvae, preprocessing, var")),
        ('{"vqvae": {"width": 3}}', ("config", "vqvae has no width", "channels")),
        ('{"vqvae": {"channels": 3}}', ("num_groups",)),
        ('{"vqvae": {"vocab_size": "x"}}', ("config", "vqvae.vocab_size", "'x'")),
        ('{"vqvae": {"vocab_size": 20.5}}', ("config", "vqvae.vocab_size", "20.5")),
        ('{"vqvae": {"patch_nums": 3}}', ("config", "vqvae.patch_nums", "(1, 2, ", "3")),
        ('{"vqvae": {"patch_nums": [1, "2"]}}', ("config", "vqvae.patch_nums", "(1, '2')")),
        ('{"vqvae": {"patch_nums": []}}', ("config", "vqvae.patch_nums", "()")),
        ('{"preprocessing": {"padding": null}}', ("config", "preprocessing.padding", "None")),
        ('{"preprocessing": {"resize": 9, "crop": 9}}', ("config", "preprocessing gives")),
    ):
        sizes.write_text(text)
        fails(run("train", "vqvae", pictures, *out, "--config", sizes), *words)


def test_work_of_another_data_set_is_refused(run, pictures, model, sizes, tmp_path):
    given = ("--vqvae", model, "--config", sizes, "--out", tmp_path / "m", *FEW)
    ok(run("train", "var", pictures, *given))
    fails(run("train", "var", pictures, *given, "--resume", "--learning-rate", 1.0), "learning_rate")
    other = draw(tmp_path / "other", ("ash", "oak"))
    fails(run("train", "var", other, *given, "--resume"), "source", "tokens")
    ok(run("train", "vqvae", pictures, "--config", sizes, "--out", tmp_path / "v", *FEW))
    same = draw(tmp_path / "same", ("ash", "oak", "elk"))  # as many pictures
    fails(run("train", "vqvae", same, "--config", sizes, "--out", tmp_path / "v", *FEW, "--resume"), "another data")


def test_a_missing_extra_is_one_line(run, pictures, model, sizes, tmp_path, monkeypatch):
    for package in ("datasets", "tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)
    given = ("--vqvae", model, "--config", sizes, "--out", tmp_path / "m", *FEW)
    fails(run("train", "var", "hf:mnist", *given), "varlik[train]")
    fails(run("train", "var", pictures, *given, "--tensorboard"), "varlik[train]")


def of_names(monkeypatch, labels, names):
    """Make "idx:x" data of noise with these labels."""
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 8, 8), dtype=np.uint8)
    source = LabelledImages(images, np.array(labels), tuple(names))
    monkeypatch.setattr(training_run, "idx_folder", lambda *args: source)


@pytest.fixture
def untokenised(monkeypatch):
    """Fails where a token is made."""
    monkeypatch.setattr(training_run, "cache_tokens", lambda *args, **_: pytest.fail("tokens were made"))


@pytest.mark.usefixtures("untokenised")
def test_numbers_are_no_names_of_classes(run, model, tmp_path, monkeypatch):
    out = ("-m", model, "--out", tmp_path / "m", *FEW)
    fails(run("train", "cca", draw(tmp_path / "data", ("0", "1", "2")), *out), "data", "'0'", "name")
    of_names(monkeypatch, [0, 1, 2] * 4, ("elm", "ash", "1"))
    fails(run("train", "cca", "idx:x", *out), "data", "'1'", "name")
    named = draw(tmp_path / "named", ("ash", "elm", "t-shirt_top"))
    for folder, name in (("digits", "1"), ("others", "fir")):
        held_out = draw(tmp_path / folder, ("ash", name), 2)
        fails(run("train", "cca", named, *out, "--held-out", held_out), "held_out", f"'{name}'")


def test_numbers_that_are_names_of_classes(run, tmp_path):
    var = VAR(replace(MANY, num_classes=3))
    var.reset_parameters()
    checkpoints.save(tmp_path / "m", var, VQVAE(VQVAE_CONFIG), ("2", "1", "0"), Preprocessing(8, 8, channels=1))
    data = draw(tmp_path / "data", ("0", "1", "2"), 2)
    ok(run("train", "cca", data, "-m", tmp_path / "m", "--out", tmp_path / "n", *FEW))
    state = torch.load(tmp_path / "n/work/cca/checkpoint.pt", weights_only=True)
    assert state["settings"]["size"] == 6


def test_names_of_imagenet_folders_are_synsets(tmp_path, monkeypatch):
    from varlik.models.presets import imagenet_class_names, imagenet_synset_ids

    var = VAR(replace(MANY, num_classes=1000))
    parts = (VQVAE(VQVAE_CONFIG), imagenet_class_names(), Preprocessing(8, 8, channels=1))
    checkpoints.save(tmp_path / "m", var, *parts)
    ids = sorted(imagenet_synset_ids(), reverse=True)
    of_names(monkeypatch, range(1000), ids)
    seen = []
    monkeypatch.setattr(training, "train_cca", lambda var, data, *args, **_: seen.append(data) or var)
    monkeypatch.setattr(training.Run, "finish", lambda *args: None)
    training.cca(training.Run("idx:x", tmp_path / "n", device="cpu"), str(tmp_path / "m"))
    assert seen[0].labels.tolist() == [imagenet_synset_ids().index(name) for name in ids]


@pytest.mark.usefixtures("untokenised")
def test_classes_without_images_are_named(run, model, tmp_path, monkeypatch):
    for kind, labels, names, words in (
        ("var", [0, 2, 0, 2] * 4, ("ash", "oak", "elm", "yew"), "none of 'oak', 'yew'"),
        ("incremental", [0, 2, 0, 2] * 4, ("fir", "oak", "yew"), "none of 'oak'"),
        ("cca", [0, 2, 0, 2] * 4, CLASSES, "none of 'T-shirt/top'"),
        ("cca", [0, 1, 0, 1] * 4, ("elm", "ash"), "none of 'T-shirt/top'"),
    ):
        of_names(monkeypatch, labels, names)
        start = ("--vqvae" if kind == "var" else "--model", model)
        fails(run("train", kind, "idx:x", *start, "--out", tmp_path / "m", *FEW), "data", words)


@pytest.mark.usefixtures("untokenised")
def test_what_can_be_checked_is_checked_before_tokens(run, pictures, model, sizes, tmp_path, monkeypatch):
    given = ("train", "var", pictures, "--vqvae", model, "--config", sizes, "--out", tmp_path / "m", *FEW)
    fails(run(*given, "--held-out", tmp_path / "nowhere"), "varlik: held_out: ", "nowhere")
    fails(run(*given, "--held-out", "fashion-mnist@none"), "varlik: held_out: ", "none")
    fails(run(*given, "--held-out", 0.25, "--batch-size", 24), "batch_size 24", "18")
    fails(run(*given, "--held-out", 0.99), "0.99", "'ash'")
    other = draw(tmp_path / "other", ("fir",), 3)
    fails(run(*given, "--held-out", other), "held_out", "fir")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    fails(run(*given, "--tensorboard"), "varlik[train]")
    sizes.write_text('{"var": {"num_classes": 7}}')
    fails(run(*given), "config", "var.num_classes", "expected 3", "7")
    sizes.write_text('{"var": {"depth": "x"}}')
    fails(run(*given), "config", "var.depth", "'x'")
    sizes.write_text('{"var": {"vocab_size": 30}}')
    fails(run(*given), "config", "var.vocab_size", "20", "30")
    fails(run(*given[:-3], "--device", "gpu"), "device: 'gpu' cannot be used here")
    for option, name in (("--evaluate-every", "evaluate_every"), ("--patience", "patience")):
        fails(run(*given, option, 3), f"{name}: 3", "held_out")


def test_held_out_images_of_some_new_classes(run, model, tmp_path, monkeypatch):
    """They keep their place among the data's classes."""
    seen = []
    monkeypatch.setattr(training, "train_incremental", lambda var, *args, held_out, **_: seen.append(held_out) or var)
    monkeypatch.setattr(training.Run, "finish", lambda *args: None)
    data, few = draw(tmp_path / "data", ("fir", "yew")), draw(tmp_path / "few", ("yew",), 3)
    command = ("train", "incremental", data, "-m", model, "--out", tmp_path / "m", *FEW)
    ok(run(*command, "--held-out", few))
    assert seen[0].labels.tolist() == [4, 4, 4]
    assert seen[0].class_names == (*CLASSES, "fir", "yew")
    fails(run(*command, "--held-out", draw(tmp_path / "old", ("ash",), 3)), "held_out", "ash already")


def test_what_is_said_of_the_weights_that_are_kept(run, pictures, model, sizes, tmp_path, monkeypatch):
    scores = iter([1.0, 3.0, 2.0, 2.5, 3.5])
    monkeypatch.setattr(loop_module._Run, "_check", lambda *args: None)
    monkeypatch.setattr("varlik.training.var.mean_log_likelihood", lambda *args: next(scores))
    given = ("train", "var", pictures, "--vqvae", model, "--config", sizes, "--out", tmp_path / "m", *FEW)
    look = ("--steps", 9, "--held-out", 0.25, "--evaluate-every", 1, "--patience", 2)
    out = ok(run(*given, *look)).splitlines()
    assert out[0].startswith("step 2, ")
    assert "score 3," in out[0]
    assert out[1] == "kept the weights of step 2, which did best on what is held out; ended early, after step 4 of 9"
    scores = iter([1.0, 2.0, 3.0])
    out = ok(run(*given, "--steps", 3, *look[2:], "--work", tmp_path / "other"))
    assert "kept the weights of step 3, which did best on what is held out\n" in out


def test_interrupted(run, pictures, model, sizes, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    given = ("train", "var", pictures, "--vqvae", model, "--config", sizes, "--out", tmp_path / "m", *FEW)
    with monkeypatch.context() as patch:
        patch.setattr(loop_module._Run, "update", interrupted)
        code, out, err = run(*given)
    assert (code, out, len(err.splitlines())) == (130, "", 1)
    assert "--resume" in err
    ok(run(*given, "--resume"))


@pytest.mark.parametrize("name", ["x{a}", "[bold]x"])
def test_bars_go_to_stderr_under_any_name(capsys, tmp_path, name):
    (tmp_path / name).mkdir()
    with MetricsLog(tmp_path / name, 0, 1) as log:
        log.advance(1)
    out, err = capsys.readouterr()
    assert out == ""
    assert name in err
