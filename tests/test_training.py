"""Training learns, keeps codes in use, and resumes bit for bit."""

from __future__ import annotations

import copy
import json
import sys
import zipfile
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from training_case import VAR, VQ, loop, pictures, records, run_stopping, run_var, tokens

from varlik.datasets import LabelledImages
from varlik.models.config import Preprocessing
from varlik.training.data import TrainingTokens
from varlik.training.likelihood import log_likelihood, mean_log_likelihood, score_of
from varlik.training.loop import Part, batch_indices, build_optimizers, learning_rate, train
from varlik.training.pixels import Pixels
from varlik.training.var import contrast_var, feature_maps, train_var
from varlik.training.vqvae import FEATURE_STD, rescale_features, residual_cells, train_vqvae


@pytest.fixture(scope="module")
def vqvae(tmp_path_factory):
    pixels, _ = pictures()
    return train_vqvae(pixels, VQ, loop(150), tmp_path_factory.mktemp("vqvae"), quiet=True)


@pytest.fixture(scope="module")
def data(vqvae):
    pixels, labels = pictures()
    return TrainingTokens.from_features(feature_maps(vqvae, pixels), labels, vqvae.quantize, ("left", "top"))


def scores_of(var, data):
    """(n, 2) log-likelihood of all images."""
    tokens, inputs, labels = data.batch(torch.arange(len(data)))
    with torch.no_grad():
        rows = [var(var.class_vectors(torch.full_like(labels, y)), inputs).log_softmax(-1) for y in range(2)]
    return torch.stack([row.gather(-1, tokens[..., None]).sum((1, 2)) for row in rows], dim=1)


def test_vqvae_learns(vqvae):
    pixels, _ = pictures()
    with torch.no_grad():
        reconstruction, _, _ = vqvae(pixels)
    assert (reconstruction - pixels).square().mean() < 0.1 * pixels.var()


def test_dead_codes_come_back_to_life(tmp_path):
    generator = torch.Generator().manual_seed(0)
    quarters = torch.rand(64, 1, 2, 2, generator=generator) * 2 - 1
    pixels = quarters.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    used = {}
    for name, until in (("with", 0.8), ("without", -1.0)):
        model = train_vqvae(pixels, VQ, loop(100), tmp_path / name, restarts_until=until, quiet=True)
        with torch.no_grad():
            used[name] = model(pixels)[2].unique().numel()
    assert used["with"] > VQ.vocab_size // 2
    assert used["with"] > used["without"]


def test_rescaling_features_changes_nothing_but_their_size(vqvae):
    pixels, _ = pictures()
    with torch.no_grad():
        assert vqvae.encode(pixels).std() == pytest.approx(FEATURE_STD, rel=1e-4)
        before, _, tokens = vqvae(pixels)
        rescale_features(vqvae, pixels, std=2.0)
        after, _, same = vqvae(pixels)
        assert vqvae.encode(pixels).std() == pytest.approx(2.0, rel=1e-4)
        rescale_features(vqvae, pixels)
    assert torch.equal(tokens, same)
    torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-4)


def test_features_are_measured_on_a_random_sample_in_batches(vqvae, monkeypatch):
    pixels, labels = pictures(300)
    pixels = pixels[labels.argsort()]  # as in folders: class after class
    seen = []
    real = vqvae.encode
    monkeypatch.setattr(vqvae, "encode", lambda batch: seen.append(batch) or real(batch))
    monkeypatch.setattr("varlik.training.vqvae.FEATURE_IMAGES", 100)
    before = {name: value.clone() for name, value in vqvae.state_dict().items()}
    rescale_features(vqvae, pixels, std=1.0, seed=4)
    assert [len(batch) for batch in seen] == [64, 36]
    rows = torch.randperm(300, generator=torch.Generator().manual_seed(4))[:100]
    assert torch.equal(torch.cat(seen), pixels[rows])
    assert real(pixels[rows]).std().item() == pytest.approx(1.0, rel=1e-4)
    vqvae.load_state_dict(before)


def test_residuals_do_not_depend_on_batches(vqvae):
    pixels, _ = pictures()
    whole = residual_cells(vqvae, [pixels])
    assert whole.shape == (64 * (1 + 4), VQ.codebook_dim)
    torch.testing.assert_close(residual_cells(vqvae, pixels.split(24)), whole, rtol=1e-4, atol=1e-5)


def test_var_learns_the_class(data, tmp_path):
    var = train_var(data, VAR, loop(120), tmp_path, quiet=True)
    assert (scores_of(var, data).argmax(1) == data.labels).double().mean() > 0.95
    losses = [record["loss"] for record in records(tmp_path)]
    assert losses[-1] < 0.6 * losses[0]


def test_a_short_run_does_not_keep_where_it_came_from(data, tmp_path):
    plain, averaged = (train_var(data, VAR, loop(60, average=a), tmp_path / str(a), quiet=True) for a in (0, 0.999))
    nats = [mean_log_likelihood(score_of(var), data) for var in (plain, averaged)]
    assert nats[1] == pytest.approx(nats[0], rel=0.05)


def test_contrast_widens_margins_and_keeps_a_likelihood(data, tmp_path):
    labels = data.labels.clone()
    labels[:6] = 1 - labels[:6]  # some wrong labels, so that there is something to be mistaken about
    data = replace(data, labels=labels)
    var = train_var(data, VAR, loop(40), tmp_path / "var", quiet=True)

    def margins():
        scores = scores_of(var, data)
        return (scores.gather(1, labels[:, None]) - scores.gather(1, 1 - labels[:, None])).squeeze(1)

    before, start = margins(), copy.deepcopy(var)
    same = contrast_var(var, data, loop(40), tmp_path / "contrast", weight=1.0, temperature=1.0, quiet=True)
    assert same is var
    assert torch.nn.functional.softplus(-margins()).mean() < torch.nn.functional.softplus(-before).mean()
    assert "confusion" not in var.state_dict()
    with pytest.raises(ValueError, match="another model"):
        contrast_var(var, data, loop(40), tmp_path / "contrast", weight=1.0, temperature=1.0, quiet=True)
    assert "confusion" not in var.state_dict()  # refused, it is the start that it was
    for options, message in (({"weight": 0.0}, "weight: expected"), ({"temperature": -1.0}, "temperature: expected")):
        with pytest.raises(ValueError, match=message):
            contrast_var(start, data, loop(40), tmp_path / "refused", **options)
    with pytest.raises(TypeError, match="model: expected a VAR, got str"):
        contrast_var("fashion-mnist", data, loop(40), tmp_path / "refused")
    last = records(tmp_path / "contrast")[-1]
    assert last["loss"] == pytest.approx(last["nats_per_token"] + last["contrast"], rel=1e-5)
    assert last["nats_per_token"] < 1.1 * torch.log(torch.tensor(16.0)).item()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 3}, "data: expected the model's num_classes 3, got 2"),
        ({"vocab_size": 17}, "data: expected the model's vocab_size 17, got 16"),
        ({"patch_nums": (1, 2, 3)}, r"data: expected the model's patch_nums \(1, 2, 3\), got \(1, 2\)"),
    ],
)
def test_a_model_of_other_data_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        train_var(tokens(), replace(VAR, **change), loop(2), tmp_path, quiet=True)


def test_held_out_images_decide_which_var_is_kept(data, tmp_path):
    training, held_out = data.split(0.25)
    settings = loop(40, evaluate_every=4, patience=2, learning_rate=0.3, warmup=0)  # too fast to end well
    var = train_var(training, VAR, settings, tmp_path, quiet=True, held_out=held_out)
    scores = [record["score"] for record in records(tmp_path) if "score" in record]
    tokens_, inputs, labels = held_out.batch(torch.arange(len(held_out)))
    with torch.no_grad():
        found = log_likelihood(var, var.class_vectors(labels), tokens_, inputs).mean().item()
    assert found == pytest.approx(max(scores), rel=1e-5)
    with pytest.raises(ValueError, match=r"held_out: expected loop\.evaluate_every of 1 or more"):
        train_var(training, VAR, loop(2), tmp_path, quiet=True, held_out=held_out)
    with pytest.raises(TypeError, match="held_out: expected TrainingTokens, got float"):
        train_var(training, VAR, settings, tmp_path, quiet=True, held_out=0.1)


def test_stop_leaves_the_schedule_alone(tmp_path):
    train_var(tokens(), VAR, loop(40, stop=20), tmp_path, quiet=True)
    assert [record["step"] for record in records(tmp_path)] == [10, 20]
    assert records(tmp_path)[-1]["lr_share"] == pytest.approx(learning_rate(loop(40), 19))


@pytest.mark.parametrize("changes", [{}, {"average": 0.9}, {"muon_rate": 1e-2}, {"precision": "float16"}])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, changes, monkeypatch):
    data, config = tokens(), loop(30, **changes)

    def run(folder):
        return train_var(data, VAR, config, folder, quiet=True).state_dict()

    whole = run(tmp_path / "whole")

    import varlik.training.loop as module

    calls = iter(range(10**6))
    real = module.batch_indices

    def killed(*args):
        if next(calls) == 17:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "batch_indices", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts")
    monkeypatch.undo()
    parts = run(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_killed_before_its_first_checkpoint_a_run_starts_anew(tmp_path):
    class Kill(Exception):
        pass

    def at_step(step):
        if step == 3:
            raise Kill

    with pytest.raises(Kill):
        run_stopping(tmp_path, at_step)
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3]
    run_stopping(tmp_path)
    assert [record["step"] for record in records(tmp_path)][:4] == [1, 2, 3, 4]


def test_checkpoint_of_another_configuration_is_refused(tmp_path):
    data = tokens()
    train_var(data, VAR, loop(10), tmp_path, quiet=True)
    with pytest.raises(ValueError, match=r"another learning_rate \(0.005, now 1.0\): go on with the same"):
        train_var(data, VAR, loop(10, learning_rate=1.0), tmp_path, quiet=True)
    with pytest.raises(ValueError, match="another depth"):
        train_var(data, replace(VAR, depth=2), loop(10), tmp_path, quiet=True)
    for held_out in (None, data.of_rows(torch.arange(8))):
        config = loop(4, evaluate_every=2 if held_out else 0)
        train_var(data, VAR, config, tmp_path / f"held {bool(held_out)}", quiet=True, held_out=held_out)
    other = data.of_rows(torch.arange(8, 16))
    with pytest.raises(ValueError, match="another held_out:"):
        train_var(data, VAR, config, tmp_path / "held True", quiet=True, held_out=other)
    with pytest.raises(ValueError, match="another size"):
        train_var(data.of_rows(torch.arange(40)), VAR, loop(10), tmp_path, quiet=True)
    for other in (replace(data, labels=1 - data.labels), data.of_rows(torch.arange(64).flip(0))):
        with pytest.raises(ValueError, match="another data:"):
            train_var(other, VAR, loop(10), tmp_path, quiet=True)
    train_var(data.of_rows(torch.arange(64)), VAR, loop(10), tmp_path, quiet=True)  # all of them
    train_var(data, VAR, loop(10, log_every=3, checkpoint_every=7, accumulate=2), tmp_path, quiet=True)


def test_a_vqvae_goes_on_with_the_same_pixels_only(tmp_path):
    pixels = pictures()[0]
    train_vqvae(pixels, VQ, loop(4), tmp_path / "tensor", quiet=True)
    with pytest.raises(ValueError, match="another data:"):
        train_vqvae(-pixels, VQ, loop(4), tmp_path / "tensor", quiet=True)
    images = (127.5 * (pixels + 1)).permute(0, 2, 3, 1).byte().numpy()
    source = LabelledImages(images[..., 0], np.zeros(len(images), np.int64), ("a",))
    side = pixels.shape[-1]
    whole, cut = (Pixels(source, Preprocessing(r, side, channels=1)) for r in (side, side + 2))
    train_vqvae(whole, VQ, loop(4), tmp_path / "source", quiet=True)
    with pytest.raises(ValueError, match="another data:"):
        train_vqvae(cut, VQ, loop(4), tmp_path / "source", quiet=True)


@pytest.mark.parametrize("damage", ["empty", "short", "zeros", "flipped", "text", "foreign", "list", "archive"])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    train_var(tokens(), VAR, loop(2), tmp_path, quiet=True)
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    if damage in ("foreign", "list"):
        torch.save({"a": 1} if damage == "foreign" else [1], path)
    elif damage == "archive":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/text", "some text")
    else:
        weight = torch.load(path)["model"]["word_embed.weight"].numpy().tobytes()
        place = whole.index(weight)
        flipped = whole[:place] + bytes([weight[0] ^ 1]) + whole[place + 1 :]
        half = len(whole) // 2
        path.write_bytes(
            {"empty": b"", "short": whole[:half], "zeros": whole[:half] + bytes(half), "flipped": flipped,
             "text": b"some text"}[damage]
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"checkpoint.pt is no checkpoint of a training, or damaged: remove it"):
        train_var(tokens(), VAR, loop(2), tmp_path, quiet=True)


def test_numbers_of_numpy_can_be_resumed(tmp_path):
    config = loop(np.int64(2), learning_rate=np.float64(5e-3))
    for _ in range(2):
        contrast_var(train_var(tokens(), VAR, config, tmp_path / "a", quiet=True), tokens(), config, tmp_path / "b",
                     np.float64(0.3), quiet=True)  # fmt: skip


def test_classes_without_images_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match=r"data: expected images of every class, got none of '.*'$"):
        train_var(data.of_rows((data.labels == 1).nonzero()[:, 0]), VAR, loop(4, batch_size=8), tmp_path)


def test_patience_ends_a_run_and_the_best_weights_stay(tmp_path):
    model = run_stopping(tmp_path)
    scores = {record["step"]: record["score"] for record in records(tmp_path) if "score" in record}
    best = max(scores, key=scores.get)
    assert list(scores) == list(range(3, best + 10, 3))  # three more validations, then the end, long before step 60
    assert best + 9 < 60
    at_best = run_stopping(tmp_path / "until best", stop=best, patience=0, evaluate_every=best)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), at_best.parameters(), strict=True))
    # A finished run is not trained further.
    again = run_stopping(tmp_path, at_step=lambda step: pytest.fail("trained on"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_validation_sees_averaged_weights_and_leaves_the_others_alone(tmp_path):
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    course, seen = [0.0], []

    def loss_of_part(part):
        return (model.weight - 1).square().mean(), {}

    config = loop(6, average=0.75, warmup=1, evaluate_every=2, weight_decay=0.0)
    train(
        model, loss_of_part, config, tmp_path, 16, quiet=True,
        after_step=lambda step: course.append(model.weight.item()) or {},
        validate=lambda step: seen.append(model.weight.item()) or -step,
    )  # fmt: skip
    averages = [0.0]
    for value in course[1:]:
        decay = min(0.75, len(averages) / (9 + len(averages)))
        averages.append(decay * averages[-1] + (1 - decay) * value)
    assert seen == pytest.approx([averages[2], averages[4], averages[6]], rel=1e-6)
    assert model.weight.item() == pytest.approx(averages[2], rel=1e-6)  # its score was the best


def test_parts_cut_the_batch_of_a_step(tmp_path):
    seen = []

    def loss_of_part(part):
        seen.append(part)
        return model(torch.ones(1, 1)).sum(), {"first": float(part.indices[0])}

    model = nn.Linear(1, 1)
    config = loop(2, accumulate=4, log_every=1)
    train(model, loss_of_part, config, tmp_path, 40, quiet=True)
    assert [part.step for part in seen] == [0] * 4 + [1] * 4
    for step in (0, 1):
        rows = batch_indices(config, step, 40)
        parts = seen[4 * step : 4 * step + 4]
        assert all(torch.equal(part.rows, rows) for part in parts)
        assert torch.equal(torch.cat([part.indices for part in parts]), rows)
        assert records(tmp_path)[step]["first"] == rows[::4].double().mean().item()
    assert Part(0, torch.arange(6), slice(2, 4)).indices.tolist() == [2, 3]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains_alike(tmp_path, precision):
    full = run_var(tmp_path / "full")
    half = run_var(tmp_path / precision, precision=precision)
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    losses = [[record["loss"] for record in records(tmp_path / name)] for name in ("full", precision)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert losses[0] != losses[1]
    assert any(not torch.equal(a, b) for a, b in zip(full.parameters(), half.parameters(), strict=True))


def test_a_gradient_too_large_for_float16_costs_a_step_and_half_the_scale(tmp_path):
    model = nn.Linear(1, 1, bias=False)
    before, course = model.weight.item(), []

    def loss_of_part(part):
        if part.step == 1 and len(course) == 1:
            course.append(None)
            raise KeyboardInterrupt
        factor = float("inf") if part.step == 0 else 1.0
        # Finite itself; its gradient is not, as when the scaled one overflows.
        return _Overflow.apply(model.weight, factor), {}

    def run():
        config = loop(2, precision="float16", log_every=1, checkpoint_every=1, warmup=1)
        after = lambda step: course.append(model.weight.item()) or {}  # noqa: E731
        train(model, loss_of_part, config, tmp_path, 16, after, quiet=True)

    with pytest.raises(KeyboardInterrupt):
        run()
    run()
    assert course[0] == before
    assert course[2] != before
    # Half of where it starts, after the interruption too.
    assert [record["loss_scale"] for record in records(tmp_path)] == [2.0**15, 2.0**15]


class _Overflow(torch.autograd.Function):
    """Zero, with a gradient of `factor`."""

    @staticmethod
    def forward(ctx, weight, factor):
        ctx.factor = factor
        return weight.sum() * 0

    @staticmethod
    def backward(ctx, gradient):
        return (gradient * ctx.factor).reshape(1, 1), None


def test_a_gradient_that_no_scale_makes_finite_ends_the_run(tmp_path):
    model = nn.Linear(1, 1, bias=False)
    before = model.weight.item()

    def loss_of_part(part):
        return _Overflow.apply(model.weight, float("inf")), {}

    config = loop(40, precision="float16", log_every=1)
    with pytest.raises(FloatingPointError, match="norm of the gradient is inf at step 16"):
        train(model, loss_of_part, config, tmp_path, 16, quiet=True)
    assert model.weight.item() == before
    found = records(tmp_path)
    assert [record["loss_scale"] for record in found] == [2.0**i for i in range(15, -1, -1)]
    assert all(record["grad_norm"] is None for record in found)


def test_metrics_are_json_whatever_they_are(tmp_path):
    model = nn.Linear(1, 1)

    def loss_of_part(part):
        return model(torch.ones(1, 1)).sum(), {"nan": float("nan"), "inf": float("-inf")}

    train(model, loss_of_part, loop(1), tmp_path, 16, quiet=True)

    def refuse(text):
        raise AssertionError(text)

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (record["nan"], record["inf"]) == (None, None)
    assert isinstance(record["loss"], float)


def test_a_setting_that_only_one_run_has_is_another_setting(tmp_path):
    def run(**settings):
        model = nn.Linear(1, 1)
        loss = lambda part: (model(torch.ones(1, 1)).sum(), {})  # noqa: E731
        train(model, loss, loop(1), tmp_path, 16, settings=settings, quiet=True)

    table = torch.tensor([[0.0, 0.1], [1.0, 0.0]])
    run(table=table, name="a")
    run(table=table.double() * (1 + 1e-5), name="a")
    for settings, words in (
        ({"name": "a"}, "another table:"),
        ({"table": table, "name": "a", "more": 1}, "another more:"),
        ({"table": table * 1.1, "name": "a"}, "another table:"),
        ({"table": table[:1], "name": "a"}, "another table:"),
        ({"table": [0.0], "name": "b"}, "another table, name:"),
    ):
        with pytest.raises(ValueError, match=words):
            run(**settings)


@pytest.mark.parametrize("what", ["loss", "norm of the gradient"])
def test_what_is_not_finite_ends_the_run(tmp_path, what):
    model = nn.Linear(1, 1, bias=False)

    def loss_of_part(part):
        if part.step < 4:
            return model.weight.sum(), {}
        return (model.weight / 0).sum() if what == "loss" else _Overflow.apply(model.weight, float("inf")), {}

    with pytest.raises(FloatingPointError, match=f"{what} is -?inf at step 4"):
        train(model, loss_of_part, loop(8, checkpoint_every=2), tmp_path, 16, quiet=True)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 4
    assert torch.isfinite(state["model"]["weight"]).all()


def test_frozen_parameters_stay(tmp_path):
    model = nn.ModuleDict({"blocks": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
    model["blocks"].weight.requires_grad_(False)
    frozen = model["blocks"].weight.clone()
    config = loop(3, muon_rate=1e-2)
    assert len(build_optimizers(model, config)) == 1

    def loss_of_part(part):
        return model["head"](model["blocks"](torch.ones(1, 2))).square().sum(), {}

    train(model, loss_of_part, config, tmp_path, 16, quiet=True)
    assert torch.equal(model["blocks"].weight, frozen)


def test_settings_that_make_no_sense_are_refused(tmp_path):
    for changes, message in (
        ({"precision": "float8"}, "precision: expected one of float32, float16, bfloat16, got 'float8'"),
        ({"accumulate": 0}, "accumulate: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"stop": 2.5}, "stop: expected a whole number, got 2.5"),
        ({"checkpoint_every": 2.5}, "checkpoint_every: expected a whole number, got 2.5"),
        ({"seed": "3"}, "seed: expected a whole number, got '3'"),
        ({"seed": 2**62}, "seed: expected at most"),
        ({"learning_rate": "a"}, "learning_rate: expected a number, got 'a'"),
        ({"batch_size": 8.0}, "batch_size: expected a whole number, got 8.0"),
        ({"patience": 2}, "patience: 2 needs evaluate_every"),
        ({"patience": -1}, "patience: expected 0 or more, got -1"),
        ({"evaluate_every": -5}, "evaluate_every: expected 0 or more, got -5"),
        ({"warmup": -1}, "warmup: expected 0 or more, got -1"),
        ({"stop": -1}, "stop: expected 0 or more, got -1"),
        ({"muon_rate": -0.1}, "muon_rate: expected 0 or more, got -0.1"),
        ({"weight_decay": float("nan")}, "weight_decay: expected 0 or more, got nan"),
        ({"learning_rate": 0.0}, "learning_rate: expected a positive number, got 0.0"),
        ({"learning_rate": float("inf")}, "learning_rate: expected a positive number, got inf"),
        ({"clip": 0.0}, "clip: expected a positive number, got 0.0"),
        ({"hold": 1.5}, "hold: expected a share between 0 and 1, got 1.5"),
        ({"average": 1.0}, "average: expected 0 or more and less than 1, got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            loop(5, **changes)
    with pytest.raises(ValueError, match="evaluate_every: 2, but this training has nothing to validate with"):
        train_var(tokens(), VAR, loop(4, evaluate_every=2), tmp_path, quiet=True)
    with pytest.raises(TypeError, match=r"pixels: expected floating-point numbers in \[-1, 1\], got torch.uint8"):
        train_vqvae((128 * pictures()[0] + 128).byte(), VQ, loop(4), tmp_path, quiet=True)


def test_tensorboard_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"tensorboard: is not installed: .*varlik\[train\]"):
        run_stopping(tmp_path, tensorboard=True)

    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run_stopping(tmp_path, tensorboard=True)
    assert written[0] == (str(tmp_path / "tensorboard"), 1)
    assert written[-1] == "closed"
    for record in records(tmp_path):
        assert ("loss", record["loss"], record["step"]) in written


def test_epochs_are_permutations():
    config = loop(1, batch_size=5)
    first = torch.cat([batch_indices(config, step, 20) for step in range(4)])
    second = torch.cat([batch_indices(config, step, 20) for step in range(4, 8)])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(20))
    assert first.tolist() != second.tolist()
    with pytest.raises(ValueError, match="batch_size"):
        batch_indices(config, 0, 4)


def test_learning_rate_rises_then_falls():
    config = loop(100, warmup=10)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[:10] == [pytest.approx((i + 1) / 10) for i in range(10)]
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert rates[-1] < 0.01
