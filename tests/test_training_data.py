"""Data for training: token maps and where they come from, a cache that is whole or goes on, variants, wrong input."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import MANY, VQVAE_CONFIG

from varlik import images
from varlik.datasets import LabelledImages, hugging_face, idx_folder, image_folder
from varlik.models.config import Preprocessing
from varlik.models.quantizer import MultiScaleQuantizer
from varlik.models.vqvae import VQVAE
from varlik.tokens import tokenize
from varlik.training import token_cache
from varlik.training.data import TrainingTokens, token_type
from varlik.training.pixels import Pixels, variants_of
from varlik.training.token_cache import cache_tokens

NAMES = ("a", "b", "c")
PREPROCESSING = Preprocessing(8, 8, channels=1)
VARIANTS = ("plain", "flip", "crop", "crop", "flip+crop")


@pytest.fixture(scope="module")
def vqvae():
    torch.manual_seed(0)
    return VQVAE(VQVAE_CONFIG).eval()


def source(count=11, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (count, 8, 8), dtype=np.uint8)
    return LabelledImages(noise, np.arange(count) % 3, NAMES)


@pytest.fixture(scope="module")
def features():
    return torch.randn(12, 8, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def data(vqvae, features):
    return TrainingTokens.from_features(features, torch.arange(12) % 3, vqvae.quantize, NAMES)


# --- token maps ---------------------------------------------------------------------------------------------------


def test_batches_are_what_the_quantizer_gives(vqvae, features, data):
    rows = torch.tensor([7, 0, 3])
    with torch.no_grad():
        wanted, inputs = vqvae.quantize.tokenize(features[rows])
    tokens, found, labels = data.batch(rows)
    assert torch.equal(tokens, wanted)
    assert (tokens.dtype, labels.dtype) == (torch.int64, torch.int64)
    torch.testing.assert_close(found, inputs, atol=1e-6, rtol=1e-6)
    assert not found.requires_grad
    assert labels.tolist() == [1, 0, 0]
    assert data.tokens.dtype == np.uint8  # twenty codes
    maps = data.token_maps(rows)
    assert torch.equal(maps.tokens, wanted)
    assert torch.equal(maps.teacher_forcing_input, found)
    torch.testing.assert_close(maps.feature_map, vqvae.quantize.feature_map(wanted))
    assert len(set(maps.keys)) == 3


def test_inputs_do_not_depend_on_autocast(data):
    rows = torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16):
        found = data.batch(rows)[1]
    assert torch.equal(found, data.batch(rows)[1])


def test_variants_of_rows(vqvae):
    tokens = np.arange(5 * 3 * MANY.num_tokens).reshape(5, 3, -1) % 20
    data = TrainingTokens(tokens, torch.tensor([0, 1, 2, 0, 1]), NAMES, vqvae.quantize)
    rows, variant = torch.tensor([4, 2]), torch.tensor([2, 0])
    assert data.batch(rows, variant)[0].numpy().tolist() == [tokens[4, 2].tolist(), tokens[2, 0].tolist()]
    assert data.batch(rows)[0].numpy().tolist() == tokens[[4, 2], 0].tolist()
    many = torch.zeros(3000, dtype=torch.int64)
    drawn = data.variant(many, seed=1, step=2)
    assert torch.equal(drawn, data.variant(many, seed=1, step=2))
    assert not torch.equal(drawn, data.variant(many, seed=1, step=3))
    assert not torch.equal(drawn, data.variant(many, seed=2, step=2))
    assert torch.bincount(drawn, minlength=3).min() > 900
    keys = {key for v in range(3) for key in data.token_maps(torch.arange(5), torch.full((5,), v)).keys}
    assert len(keys) == 15


def test_parts_of_the_data(data):
    part = data.of_rows((data.labels != 1).nonzero().flatten())
    assert part.labels.tolist() == [0, 2] * 4
    assert (part.num_classes, part.class_names) == (3, NAMES)
    assert torch.equal(part.batch(torch.tensor([1]))[0], data.batch(torch.tensor([2]))[0])
    again = part.of_rows((part.labels == 2).nonzero().flatten())
    assert torch.equal(again.batch(torch.arange(4))[0], data.batch(torch.tensor([2, 5, 8, 11]))[0])
    assert again.token_maps(torch.tensor([3])).keys == data.token_maps(torch.tensor([11])).keys

    train, held_out = data.split(0.25, seed=3)
    assert (len(train), len(held_out)) == (9, 3)
    assert held_out.labels.sort().values.tolist() == [0, 1, 2]
    places = torch.cat((train.places, held_out.places)).sort().values
    assert torch.equal(places, torch.arange(12))
    assert torch.equal(data.split(0.25, seed=3)[1].places, held_out.places)
    assert not torch.equal(data.split(0.25, seed=4)[1].places, held_out.places)


def test_a_fingerprint_knows_tokens_and_codebook(data):
    assert replace(data).fingerprint() == data.fingerprint()
    other = copy.deepcopy(data.quantizer)
    with torch.no_grad():
        other.embedding.weight.mul_(1.01)
    for changed in (replace(data, tokens=(data.tokens + 1) % 20), replace(data, quantizer=other)):
        assert changed.fingerprint() != data.fingerprint()


def test_the_smallest_type():
    sizes = {2: np.uint8, 256: np.uint8, 257: np.uint16, 65536: np.uint16, 65537: np.uint32}
    assert {size: token_type(size) for size in sizes} == sizes
    codes = MultiScaleQuantizer(replace(VQVAE_CONFIG, vocab_size=300))
    data = TrainingTokens(np.full((1, 1, 30), 299, np.uint16), torch.tensor([0]), NAMES, codes)
    assert data.batch(torch.tensor([0]))[0].unique().tolist() == [299]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"tokens": np.zeros((3, 1, 30))}, TypeError, ("tokens", "float64")),
        ({"tokens": np.zeros((3, 30), int)}, ValueError, ("tokens", "(n, variants, 30)", "(3, 30)")),
        ({"tokens": np.zeros((3, 1, 29), int)}, ValueError, ("tokens", "30", "29")),
        ({"tokens": np.full((3, 1, 30), 20)}, ValueError, ("tokens", "0 to 19", "20")),
        ({"tokens": np.full((3, 1, 30), -1)}, ValueError, ("tokens", "0 to 19", "-1")),
        ({"labels": torch.tensor([0, 1, 3])}, ValueError, ("labels", "0 to 2", "3")),
        ({"labels": torch.tensor([0, 1, -1])}, ValueError, ("labels", "0 to 2", "-1")),
        ({"labels": torch.tensor([0, 1])}, ValueError, ("labels", "(3,)", "(2,)")),
        ({"labels": torch.tensor([0.0, 1.0, 2.0])}, TypeError, ("labels", "float32")),
        ({"labels": [0, 1, 2]}, TypeError, ("labels", "list")),
        ({"places": torch.tensor([0, 1, 3])}, ValueError, ("places", "0 to 2", "3")),
        ({"places": torch.tensor([0.0, 1.0, 2.0])}, TypeError, ("places", "float32")),
        ({"tokens": np.zeros((0, 1, 30), int), "labels": torch.tensor([]).long()}, ValueError, ("labels", "none")),
    ],
)
def test_wrong_token_maps_are_refused(vqvae, change, error, words):
    values = {"tokens": np.zeros((3, 1, 30), int), "labels": torch.tensor([0, 1, 2]), "class_names": NAMES}
    with pytest.raises(error) as caught:
        TrainingTokens(**(values | change), quantizer=vqvae.quantize)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda data: data.batch(torch.tensor([12])), ValueError, ("rows", "0 to 11", "12")),
        (lambda data: data.batch(torch.tensor([-1])), ValueError, ("rows", "0 to 11", "-1")),
        (lambda data: data.batch(torch.tensor([0.5])), TypeError, ("rows", "float32")),
        (lambda data: data.batch(torch.tensor([[1]])), ValueError, ("rows", "(1, 1)")),
        (lambda data: data.batch([1]), TypeError, ("rows", "list")),
        (lambda data: data.batch(torch.tensor([1]), torch.tensor([1])), ValueError, ("variant", "0 to 0", "1")),
        (lambda data: data.batch(torch.tensor([1, 2]), torch.tensor([0])), ValueError, ("variant", "(2,)", "(1,)")),
        (lambda data: data.token_maps(torch.tensor([99])), ValueError, ("rows", "99")),
        (lambda data: data.split(1.0), ValueError, ("share", "1.0")),
        (lambda data: data.split(0.9), ValueError, ("share", "0.9", "'a'")),
    ],
)
def test_wrong_questions_are_refused(data, call, error, words):
    with pytest.raises(error) as caught:
        call(data)
    assert all(word in str(caught.value) for word in words)


# --- where images come from ---------------------------------------------------------------------------------------


def draw(path, seed=0, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (8, 8) if mode == "L" else (8, 8, 3)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    for i, name in enumerate(("dog/2.png", "cat/1.PNG", "cat/deep/0.png", "dog/1.png")):
        draw(root / name, i)
    draw(root / "cat" / ".hidden.png")
    draw(root / ".cache" / "1.png")
    draw(root / "dog" / ".thumbs" / "1.png")
    (root / "README.txt").write_text("no picture")
    (root / "cat" / "notes.txt").write_text("no picture")
    return root


def test_a_folder_of_pictures(folder, tmp_path):
    found = image_folder(folder)
    assert found.class_names == ("cat", "dog")
    names = [path.relative_to(folder).as_posix() for path in found.paths]
    assert names == ["cat/1.PNG", "cat/deep/0.png", "dog/1.png", "dog/2.png"]
    assert found.labels.tolist() == [0, 0, 1, 1]
    assert found.image(2) == folder / "dog" / "1.png"

    fingerprint = found.fingerprint()
    moved = folder.rename(tmp_path / "elsewhere")
    assert image_folder(moved).fingerprint() == fingerprint
    (moved / "cat" / "1.PNG").rename(moved / "cat" / "2.PNG")
    assert image_folder(moved).fingerprint() != fingerprint


def test_a_fingerprint_knows_pictures_that_were_edited_in_place(tmp_path):
    for i in range(100):
        path = tmp_path / str(i % 2) / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes([i]))
    found = image_folder(tmp_path)
    before, seen = found.fingerprint(), 0
    for path in found.paths:
        kept = path.read_bytes()
        path.write_bytes(b"x")
        seen += found.fingerprint() != before
        path.write_bytes(kept)
    assert 20 <= seen <= 32
    assert found.fingerprint() == before


def test_a_fingerprint_of_pictures_that_may_not_be_read(folder, monkeypatch):
    def forbidden(path):
        raise PermissionError(path)

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    assert len(image_folder(folder).fingerprint()) > 0


def test_folders_that_are_no_classes(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        image_folder(tmp_path / "nowhere")
    (folder / "bird").mkdir()
    with pytest.raises(ValueError, match="bird"):
        image_folder(folder)
    with pytest.raises(ValueError, match="one sub-folder for each class"):
        image_folder(folder / "cat" / "deep")


def test_a_folder_of_idx_files(tmp_path, monkeypatch):
    from test_datasets import write_idx

    pixels = source(9).images
    for prefix, labels in (("train", np.arange(9) % 3), ("t10k", np.arange(9) % 2 * 2)):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte", pixels)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", labels.astype(np.uint8))
    found = idx_folder(tmp_path)
    assert np.array_equal(found.images, pixels)
    assert found.class_names == ("0", "1", "2")
    assert np.array_equal(found.image(4), pixels[4])
    with pytest.raises(ValueError, match="no image of class 1"):
        idx_folder(tmp_path, "test")
    with pytest.raises(ValueError, match="split"):
        idx_folder(tmp_path, "held-out")


def test_fingerprints_tell_data_apart():
    plain = source()
    assert plain.fingerprint() == source().fingerprint()
    other = [
        source(seed=1),
        source(10),
        replace(plain, labels=plain.labels[::-1]),
        replace(plain, class_names=("a", "b", "d")),
    ]
    assert len({data.fingerprint() for data in (plain, *other)}) == 5


def test_hugging_face_needs_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"varlik\[train\]"):
        hugging_face("mnist")


def test_a_hugging_face_table(tmp_path):
    hf = pytest.importorskip("datasets")
    pixels = source(6).images
    features = hf.Features(
        {"picture": hf.Image(), "kind": hf.ClassLabel(names=["x", "y", "z"]), "number": hf.Value("int64")}
    )
    rows = {"picture": [Image.fromarray(p) for p in pixels], "kind": [0, 1, 2] * 2, "number": [0, 1] * 3}
    table = hf.Dataset.from_dict(rows, features)
    table.save_to_disk(str(tmp_path / "table"))
    hf.DatasetDict({"train": table, "test": table.select([0, 1])}).save_to_disk(str(tmp_path / "dict"))

    found = hugging_face(tmp_path / "table")
    assert (found.class_names, found.labels.tolist()) == (("x", "y", "z"), [0, 1, 2] * 2)
    for i in range(6):
        assert torch.equal(images.load(found.image(i), PREPROCESSING), images.load(pixels[i], PREPROCESSING))
    assert found.fingerprint() == hugging_face(tmp_path / "table").fingerprint()
    assert len(hugging_face(tmp_path / "dict", "test")) == 2
    assert hugging_face(tmp_path / "table", label="number").class_names == ("0", "1")
    for options, words in (
        ({"split": "validation"}, ("split", "train, test", "validation")),
        ({"image": "photo"}, ("image", "picture, kind, number", "photo")),
        ({"image": "kind"}, ("image", "no images")),
        ({"label": "picture"}, ("label", "picture")),
    ):
        with pytest.raises(ValueError) as caught:
            hugging_face(tmp_path / "dict", **options)
        assert all(word in str(caught.value) for word in words)

    assert len(hugging_face(tmp_path / "table", "train")) == 6  # it does not say what it is
    hf.Dataset.from_dict(rows, features, split="test").save_to_disk(str(tmp_path / "alone"))
    assert len(hugging_face(tmp_path / "alone")) == len(hugging_face(tmp_path / "alone", "test")) == 6
    for name, own, other in (("alone", "test", "train"), ("table", "train", "test")):
        with pytest.raises(ValueError, match=f"split: .* is a single table, taken for '{own}', got '{other}'"):
            hugging_face(tmp_path / name, other)

    unlabelled = hf.Dataset.from_dict(rows | {"kind": [-1] * 6}, features)
    unlabelled.save_to_disk(str(tmp_path / "unlabelled"))
    with pytest.raises(ValueError, match="without a class"):
        hugging_face(tmp_path / "unlabelled")
    table.rename_column("picture", "first").add_column("second", rows["number"]).cast_column(
        "kind", hf.Value("int64")
    ).save_to_disk(str(tmp_path / "unnamed"))
    with pytest.raises(ValueError, match=r"label: name the column.*ClassLabel there is none.* label=.*save_to_disk"):
        hugging_face(tmp_path / "unnamed")


# --- variants -----------------------------------------------------------------------------------------------------


def test_variants_by_hand():
    picture = source(1).images[0]
    plain, flip, crop, other, both = variants_of(picture, PREPROCESSING, VARIANTS, seed=0, index=5)
    assert torch.equal(plain, images.load(picture, PREPROCESSING))
    assert torch.equal(flip, plain.flip(-1))
    around = torch.nn.functional.pad(plain, (1, 1, 1, 1), value=-1.0)
    shifts = [around[:, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    for shown in (crop, other, both.flip(-1)):
        assert sum(torch.equal(shown, shift) for shift in shifts) == 1
    again = variants_of(picture, PREPROCESSING, VARIANTS, seed=0, index=5)
    assert torch.equal(again[2:], torch.stack((crop, other, both)))
    seen = {variants_of(picture, PREPROCESSING, VARIANTS, 0, index)[2].numpy().tobytes() for index in range(100)}
    assert len(seen) == 9
    assert not torch.equal(again, variants_of(picture, PREPROCESSING, VARIANTS, seed=1, index=5))


def test_crops_of_a_picture_that_preprocessing_cuts():
    cut = Preprocessing(resize=8, crop=6, padding=1, channels=1)
    picture = source(1).images[0]
    whole = images.load(picture, PREPROCESSING)
    corners = [(y, x) for y in range(3) for x in range(3)]
    places = [torch.nn.functional.pad(whole[:, y : y + 6, x : x + 6], (1,) * 4, value=-1.0) for y, x in corners]
    seen = set()
    for index in range(100):
        plain, crop = variants_of(picture, cut, ("plain", "crop"), index=index)
        assert torch.equal(plain, places[4])
        found = [i for i, place in enumerate(places) if torch.equal(crop, place)]
        assert found
        seen.update(found)
    assert len(seen) == 9


@pytest.mark.parametrize("variants", [(), "plain", ("flip",), ("plain", "turn"), ("plain", "plain"), ("plain", "")])
def test_variants_nobody_knows(variants):
    with pytest.raises(ValueError, match="variants"):
        variants_of(source(1).images[0], PREPROCESSING, variants)


def test_pixels_are_read_when_asked_for(folder, tmp_path):
    draw(folder / "dog" / "3.png", 7)
    found = image_folder(folder)
    pixels = Pixels(found, PREPROCESSING)
    everything = torch.stack([images.load(path, PREPROCESSING) for path in found.paths])
    assert len(pixels) == 5
    assert torch.equal(pixels[torch.tensor([3, 0])], everything[[3, 0]])
    assert torch.equal(pixels[:1000], everything)
    (folder / "dog" / "3.png").write_bytes(b"damaged")
    (folder / "dog" / "2.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"2\.png"):
        pixels[:4]
    told = []
    careful = Pixels(found, PREPROCESSING, told.append)
    assert torch.equal(careful[2:], everything[[2, 0, 0]])
    assert torch.equal(careful[torch.tensor([3])], everything[[0]])
    assert len(told) == 2
    for path in found.paths:
        path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="none"):
        careful[:1]


# --- the cache ----------------------------------------------------------------------------------------------------


def whole(vqvae, data, folder, **options):
    return cache_tokens(data, vqvae, PREPROCESSING, folder, batch_size=4, **options)


def test_a_cache_holds_the_tokens_that_scoring_sees(vqvae, tmp_path):
    data, done = source(), []
    found = whole(vqvae, data, tmp_path, variants=VARIANTS, progress=lambda *step: done.append(step))
    assert isinstance(found.tokens, np.memmap)
    assert (found.tokens.shape, found.tokens.dtype) == ((11, 5, 30), np.uint8)
    assert done == [(4, 11), (8, 11), (11, 11)]
    assert (found.labels.tolist(), found.class_names) == (data.labels.tolist(), NAMES)
    pixels = torch.stack([variants_of(data.image(i), PREPROCESSING, VARIANTS, 0, i) for i in range(11)])
    for place in range(5):
        wanted = tokenize(vqvae, pixels[:, place]).tokens
        assert torch.equal(found.batch(torch.arange(11), torch.full((11,), place))[0], wanted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["about.json", "labels.npy", "tokens.npy"]


def test_a_cache_is_made_once(vqvae, tmp_path, monkeypatch):
    first = whole(vqvae, source(), tmp_path)
    monkeypatch.setattr(token_cache, "tokenize", None)
    assert np.array_equal(whole(vqvae, source(), tmp_path).tokens, first.tokens)


@pytest.mark.parametrize("where", ["tokenize", "_write_json", "replace"])
@pytest.mark.parametrize("survived", [0, 1, 2])
def test_a_killed_cache_goes_on(vqvae, tmp_path, monkeypatch, where, survived):
    data, variants = source(), ("plain", "crop")
    wanted = whole(vqvae, data, tmp_path / "whole", variants=variants)
    module, name = (token_cache.os, "replace") if where == "replace" else (token_cache, where)
    real, left = getattr(module, name), iter(range(survived))

    def killed(*args):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, name, killed)
    with pytest.raises(KeyboardInterrupt):
        whole(vqvae, data, tmp_path / "killed", variants=variants)
    assert not (tmp_path / "killed" / "tokens.npy").exists()
    encoded = []

    def counted(vqvae, pixels):
        encoded.append(len(pixels))
        return tokenize(vqvae, pixels)

    monkeypatch.setattr(module, name, real)
    monkeypatch.setattr(token_cache, "tokenize", counted)
    found = whole(vqvae, data, tmp_path / "killed", variants=variants)
    assert np.array_equal(found.tokens, wanted.tokens)
    assert torch.equal(found.labels, wanted.labels)
    if where == "tokenize":
        assert sum(encoded) == 2 * (11 - 4 * survived)


def test_a_cache_of_something_else_is_refused(vqvae, tmp_path):
    data = source()
    whole(vqvae, data, tmp_path / "c")
    torch.manual_seed(1)
    other = VQVAE(VQVAE_CONFIG).eval()
    for changed, word in (
        (lambda: whole(other, data, tmp_path / "c"), "vqvae"),
        (lambda: whole(vqvae, source(seed=1), tmp_path / "c"), "source"),
        (lambda: whole(vqvae, data, tmp_path / "c", variants=("plain", "flip")), "variants"),
        (lambda: whole(vqvae, data, tmp_path / "c", seed=1), "seed"),
        (lambda: cache_tokens(data, vqvae, replace(PREPROCESSING, resize=9), tmp_path / "c"), "preprocessing"),
    ):
        with pytest.raises(ValueError, match=rf"made with another {word} \("):
            changed()
    other.decoder.load_state_dict(VQVAE(VQVAE_CONFIG).decoder.state_dict())
    for part in ("encoder", "quant_conv", "quantize"):
        getattr(other, part).load_state_dict(getattr(vqvae, part).state_dict())
    whole(other, data, tmp_path / "c")  # another decoder makes the same tokens


def test_what_is_no_cache_is_refused(vqvae, tmp_path):
    with pytest.raises(ValueError, match="source: expected at least one image, got none"):
        whole(vqvae, source(0), tmp_path)
    assert not list(tmp_path.iterdir())
    whole(vqvae, source(), tmp_path)
    about = (tmp_path / "about.json").read_text()
    np.save(tmp_path / "tokens.npy", np.zeros((3, 1, 30), np.uint8))
    with pytest.raises(ValueError, match="damaged"):
        whole(vqvae, source(), tmp_path)
    (tmp_path / "about.json").write_text(about[:-20])
    with pytest.raises(ValueError, match=r"about\.json: not readable"):
        whole(vqvae, source(), tmp_path)
    (tmp_path / "about.json").unlink()
    with pytest.raises(ValueError, match=r"tokens\.npy.*without about\.json"):
        whole(vqvae, source(), tmp_path)
    (tmp_path / "about.json").write_text(about)
    np.save(tmp_path / "tokens.npy", np.full((11, 1, 30), 77, np.uint8))
    with pytest.raises(ValueError, match="tokens: expected 0 to 19, got 77"):
        whole(vqvae, source(), tmp_path).batch(torch.tensor([0]))


DAMAGES = ("cut", "no header", "header", "empty", "shape", "type")


@pytest.mark.parametrize(
    ("name", "damage"),
    [*((name, damage) for name in ("tokens.npy", "labels.npy") for damage in DAMAGES), ("labels.npy", "gone")],
)
def test_a_damaged_cache_is_refused(vqvae, tmp_path, name, damage):
    whole(vqvae, source(), tmp_path)
    path = tmp_path / name
    array, raw = np.load(path), path.read_bytes()
    path.write_bytes({"cut": raw[:-3], "no header": raw[:50], "header": raw.replace(b"(", b"x", 1)}.get(damage, b""))
    if damage in ("shape", "type"):
        np.save(path, array[:-1] if damage == "shape" else array.astype(float))
    if damage == "gone":
        path.unlink()
    with pytest.raises(ValueError) as caught:
        whole(vqvae, source(), tmp_path)
    assert all(word in str(caught.value) for word in (f"{tmp_path}: the cache is damaged (", "remove it"))


@pytest.mark.parametrize("name", ["tokens.partial.npy", "progress.json"])
def test_a_damaged_cache_does_not_go_on(vqvae, tmp_path, monkeypatch, name):
    def killed(vqvae, pixels):
        raise KeyboardInterrupt

    def tell(done, total):
        monkeypatch.setattr(token_cache, "tokenize", killed)

    with pytest.raises(KeyboardInterrupt):
        whole(vqvae, source(), tmp_path, progress=tell)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-3])
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"the cache is damaged.*remove it"):
        whole(vqvae, source(), tmp_path)


def test_unreadable_pictures_are_told_and_left_out(vqvae, folder, tmp_path):
    (folder / "cat" / "1.PNG").write_bytes(b"damaged")
    data, told = image_folder(folder), []
    with pytest.raises(ValueError, match=r"1\.PNG"):
        whole(vqvae, data, tmp_path / "refused")
    found = whole(vqvae, data, tmp_path / "c", complain=told.append)
    assert len(told) == 1
    assert "1.PNG" in str(told[0])
    assert found.labels.tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match="the cache leaves out 1 images"):
        whole(vqvae, data, tmp_path / "c")
    wanted = tokenize(vqvae, torch.stack([images.load(path, PREPROCESSING) for path in data.paths[1:]])).tokens
    assert torch.equal(found.batch(torch.arange(3))[0], wanted)
    (folder / "cat" / "deep" / "0.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="can be read of 'cat', got none"):
        whole(vqvae, image_folder(folder), tmp_path / "none", complain=told.append)


def test_other_processes_wait_for_the_one_that_writes(vqvae, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")

    def main_process(seconds):
        monkeypatch.setenv("RANK", "0")
        whole(vqvae, source(), tmp_path)
        monkeypatch.setenv("RANK", "1")

    monkeypatch.setattr(token_cache.time, "sleep", main_process)
    assert len(whole(vqvae, source(), tmp_path)) == 11
    assert json.loads((tmp_path / "about.json").read_text())["images"] == 11
