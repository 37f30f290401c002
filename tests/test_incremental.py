"""New classes are learned from their own images; what is said to be protected is, to the bit or to rounding."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import training_case
from tiny_model import CONFIG, VQVAE_CONFIG, make_classifier, make_images, make_model

import varlik
from varlik.calibration import calibrate
from varlik.cascade import Cascade
from varlik.models.checkpoints import Checkpoint, load_models, save
from varlik.models.config import Preprocessing
from varlik.models.presets import CALIBRATION_FILE
from varlik.models.quantizer import MultiScaleQuantizer
from varlik.scoring.engine import Engine
from varlik.scoring.score_table import score_table
from varlik.training import incremental
from varlik.training.data import TrainingTokens
from varlik.training.incremental import (
    OLD_CALIBRATION_FILE,
    NewClasses,
    add_classes,
    extend,
    train_incremental,
)
from varlik.training.likelihood import log_likelihood
from varlik.training.loop import LoopConfig
from varlik.training.tasks import task_report

RACE = Cascade.parse("screen:20%,race:20%")
OLD, NEW = CONFIG.num_classes, 2
SHARED = replace(CONFIG, shared_aln=True)
NAMES = tuple(f"class {i}" for i in range(OLD + NEW))


def make_quantizer():
    torch.manual_seed(0)
    return MultiScaleQuantizer(VQVAE_CONFIG).requires_grad_(False)


def make_data(count=24, labels=None, names=NAMES, seed=0):
    """Images of new classes: each class has favourite codes of its own, seven tokens of ten."""
    generator = torch.Generator().manual_seed(seed)
    labels = OLD + torch.arange(count) % NEW if labels is None else labels
    favourite = (3 * labels[:, None] + torch.arange(30) % 3) % 20
    drawn = torch.rand(count, 30, generator=generator) < 0.7
    tokens = torch.where(drawn, favourite, torch.randint(20, (count, 30), generator=generator))
    return TrainingTokens(tokens[:, None].numpy().astype(np.uint8), labels, names, make_quantizer())


def loop(steps=20, **changes):
    values = {"batch_size": 8, "learning_rate": 2e-2, "warmup": 3, "weight_decay": 0.0, "log_every": 5}
    return LoopConfig(steps=steps, **(values | changes))


def scores(model, data, labels):
    """Log-likelihoods (n, N) by the engine."""
    images = data.token_maps(torch.arange(len(data)))
    return score_table(Engine(model), images, torch.as_tensor(labels)).double().sum(2)


def own(model, data):
    """Log-likelihood of every image under its own class, (n,)."""
    found = scores(model, data, range(model.config.num_classes))
    return found.gather(1, data.labels[:, None])[:, 0]


def others(model):
    """All weights but those that make class vectors."""
    made = ("class_emb.", "shared_ada_lin.", "head_nm.")
    return {k: v for k, v in model.state_dict().items() if not k.startswith(made) and ".ada_lin." not in k}


@pytest.fixture(scope="module", params=[CONFIG, SHARED], ids=["AdaLN per block", "shared AdaLN"])
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="module")
def data():
    return make_data()


# More classes


def test_old_classes_and_the_null_class_stay_the_same_bits(model, data):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    grown = add_classes(model, NEW)
    assert grown.config == replace(model.config, num_classes=OLD + NEW)
    old = torch.arange(OLD + 1)
    moved = torch.cat((old[:-1], torch.tensor([grown.config.null_class])))
    for part in ("blocks", "head", "start"):
        assert torch.equal(getattr(grown.class_vectors(moved), part), getattr(model.class_vectors(old), part))
    assert torch.equal(scores(grown, data, moved), scores(model, data, old))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    start = model.class_emb.weight[:OLD].mean(0)
    distance = (grown.class_emb.weight[OLD:-1] - start).square().mean().sqrt().item()
    assert 0 < distance < 0.1  # old embeddings have a standard deviation of 0.2


def test_new_classes_differ_and_follow_the_seed():
    model = make_model()
    first, again, other = (add_classes(model, 3, seed).class_emb.weight[OLD:-1] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    single = make_model(replace(CONFIG, num_classes=1))
    assert torch.isfinite(add_classes(single, 1).class_emb.weight).all()


def test_wrong_counts_are_refused():
    with pytest.raises(ValueError, match="count: expected at least 1 new class, got 0"):
        add_classes(make_model(), 0)


# Training


def test_embeddings_alone_leave_all_else_the_same_bits(model, data, tmp_path):
    trained = train_incremental(model, data, "embeddings", loop(weight_decay=0.5), tmp_path, quiet=True)
    before, after = model.state_dict(), trained.state_dict()
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before if name != "class_emb.weight")
    old = before["class_emb.weight"]
    assert torch.equal(after["class_emb.weight"][:OLD], old[:OLD])
    assert torch.equal(after["class_emb.weight"][-1:], old[-1:])
    assert torch.equal(scores(trained, data, range(OLD)), scores(model, data, range(OLD)))
    start = own(add_classes(model, NEW), data)
    assert (own(trained, data) - start).mean() > 2
    assert all(parameter.requires_grad for parameter in trained.parameters())
    assert not trained.training


def test_free_class_vectors_fit_better_and_keep_old_scores_to_rounding(model, data, tmp_path):
    held_out = make_data(seed=1)
    labels = [*range(OLD), OLD + NEW]
    less = train_incremental(model, data, "embeddings", loop(40), tmp_path / "less", quiet=True)
    more = train_incremental(model, data, "adaln", loop(40), tmp_path / "more", quiet=True)
    before, after = scores(model, held_out, range(OLD + 1)), scores(more, held_out, labels)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=0)
    assert all(torch.equal(v, others(more)[k]) for k, v in others(model).items())
    assert own(more, data).mean() > own(less, data).mean()
    found = scores(more, held_out, range(OLD + NEW))
    assert (found.argmax(1) == held_out.labels).double().mean() > 0.9


def test_folded_weights_make_the_class_vectors_that_were_trained(model, data, tmp_path):
    folded = train_incremental(model, data, "adaln", loop(40), tmp_path, quiet=True)
    free = add_classes(model, NEW)
    classes = NewClasses(free, OLD, offsets=True)
    classes.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"])
    free.add_module("class_emb", classes)
    new = torch.arange(OLD, OLD + NEW)
    wanted, found = classes.add_offsets(free.class_vectors(new), new), folded.class_vectors(new)
    assert classes.blocks.abs().mean() > 0.01
    for part in ("blocks", "head", "start"):
        torch.testing.assert_close(getattr(found, part), getattr(wanted, part), rtol=1e-5, atol=1e-5)


def test_all_weights_learn_the_most_and_protect_nothing(data, tmp_path):
    model = make_model()
    held_out = make_data(seed=1)
    trained = train_incremental(model, data, "all", loop(30, learning_rate=5e-3), tmp_path, quiet=True)
    assert (scores(trained, data, range(OLD)) - scores(model, data, range(OLD))).abs().mean() > 0.5
    assert (own(trained, held_out) - own(add_classes(model, NEW), held_out)).mean() > 8
    # The null class is trained too, by dropped labels.
    null = scores(trained, data, [OLD + NEW]) - scores(model, data, [OLD])
    assert null.mean() > 1


@pytest.mark.parametrize("what", ["embeddings", "adaln"])
def test_checkpoints_hold_no_more_than_what_is_trained(data, tmp_path, what):
    train_incremental(make_model(), data, what, loop(2), tmp_path, quiet=True)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    assert set(kept) == ({"new"} if what == "embeddings" else {"new", "blocks", "head"})


def test_the_loss_is_the_mean_nats_per_token(data, tmp_path):
    model = make_model().double()
    data = replace(data, quantizer=make_quantizer().double())
    train_incremental(model, data, "embeddings", loop(1, batch_size=24, log_every=1), tmp_path, quiet=True)
    record = training_case.records(tmp_path)[0]
    tokens, inputs, labels = data.batch(torch.arange(24))
    start = add_classes(model, NEW, seed=0)
    logits = start(start.class_vectors(labels), inputs)
    wanted = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    assert record["loss"] == pytest.approx(wanted.item(), rel=1e-9)


@pytest.mark.parametrize("what", ["embeddings", "adaln", "all"])
def test_killed_and_resumed_equals_uninterrupted(data, tmp_path, what, monkeypatch):
    config = loop(12, checkpoint_every=4, average=0.9, weight_decay=0.1)

    def run(folder):
        return train_incremental(make_model(), data, what, config, tmp_path / folder, quiet=True).state_dict()

    whole = run("whole")
    calls, real = iter(range(100)), incremental.log_likelihood

    def killed(*args):
        if next(calls) == 6:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(incremental, "log_likelihood", killed)
    with pytest.raises(KeyboardInterrupt):
        run("parts")
    monkeypatch.undo()
    parts = run("parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_resuming_from_another_model_or_choice_is_refused(data, tmp_path):
    train_incremental(make_model(), data, "embeddings", loop(2), tmp_path, quiet=True)
    with pytest.raises(ValueError, match="another model"):
        train_incremental(make_model(seed=1), data, "embeddings", loop(2), tmp_path, quiet=True)
    with pytest.raises(ValueError, match="another what"):
        train_incremental(make_model(), data, "adaln", loop(2), tmp_path, quiet=True)
    with pytest.raises(ValueError, match="another data:"):
        train_incremental(make_model(), data.of_rows(torch.arange(24).flip(0)), "embeddings", loop(2), tmp_path)


def run_incremental(folder, **changes):
    settings = loop(6, log_every=1, evaluate_every=3, **changes)
    held_out, model = make_data(12, seed=1), make_model()
    return train_incremental(model, make_data(), "adaln", settings, folder, held_out=held_out, quiet=True)


def test_two_processes_equal_one(tmp_path):
    training_case.finish(training_case.start([(run_incremental, tmp_path / "two", {})], size=2))
    training_case.assert_two_processes_equal_one(run_incremental, tmp_path / "one", tmp_path / "two")


def test_parts_of_a_batch_train_alike(data, tmp_path):
    found = [
        train_incremental(make_model(), data, "all", loop(5, accumulate=n), tmp_path / str(n), quiet=True)
        for n in (1, 2)
    ]
    torch.testing.assert_close(own(found[0], data), own(found[1], data), rtol=1e-4, atol=0)


def test_held_out_likelihood_decides_what_is_best(data, tmp_path):
    held_out = make_data(12, seed=1)
    config = loop(40, learning_rate=0.2, evaluate_every=5, patience=3)
    trained = train_incremental(make_model(), data, "adaln", config, tmp_path, held_out=held_out, quiet=True)
    records = training_case.records(tmp_path)
    best = max(record["score"] for record in records if "score" in record)
    assert own(trained, held_out).mean() == pytest.approx(best, rel=1e-5)


def test_some_new_classes_may_be_held_out(data, tmp_path):
    held_out = make_data(labels=torch.full((24,), OLD))
    train_incremental(make_model(), data, "embeddings", loop(2, evaluate_every=1), tmp_path, held_out, quiet=True)
    assert [record["step"] for record in training_case.records(tmp_path) if "score" in record] == [0, 1, 2]


def test_the_start_stays_where_no_step_is_better(data, tmp_path):
    model, held_out = make_model(), make_data(12, seed=1)
    config = loop(20, learning_rate=30.0, evaluate_every=4, patience=2, warmup=0)
    trained = train_incremental(model, data, "embeddings", config, tmp_path, held_out=held_out, quiet=True)
    scored = training_case.records(tmp_path)
    assert [record["step"] for record in scored if "score" in record] == [0, 4, 8]
    assert torch.equal(trained.class_emb.weight, add_classes(model, NEW, config.seed).class_emb.weight)


# What cannot be


def test_classes_that_are_not_independent_cannot_be_protected_by_folding(data, tmp_path):
    narrow = make_model(replace(CONFIG, embed_dim=8))
    message = r"what: 'adaln' needs .* of all 9 classes .* in 8 dimensions, .* got inf; 'embeddings' and 'all' do"
    with pytest.raises(ValueError, match=message):
        train_incremental(narrow, data, "adaln", loop(2), tmp_path, quiet=True)
    twins = make_model()
    with torch.no_grad():
        twins.class_emb.weight[1] = twins.class_emb.weight[0]
    with pytest.raises(ValueError, match="condition number of at most 1000"):
        train_incremental(twins, data, "adaln", loop(2), tmp_path, quiet=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("changes", [{"checkpoint_every": 4}, {"stop": 4}, {"steps": 4}])
def test_classes_that_grow_dependent_end_a_run_before_its_checkpoint(data, tmp_path, monkeypatch, changes):
    model, config = make_model(), replace(loop(20, checkpoint_every=50, log_every=1), **changes)
    real = incremental.log_likelihood

    def draw_together(var, *args):
        with torch.no_grad():
            var.class_emb.new[1] = var.class_emb.new[0]
        return real(var, *args)

    monkeypatch.setattr(incremental, "log_likelihood", draw_together)
    with pytest.raises(ValueError, match="what: 'adaln' needs linearly independent embeddings"):
        train_incremental(model, data, "adaln", replace(config, learning_rate=1e-9), tmp_path, quiet=True)
    assert len(training_case.records(tmp_path)) == 3
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"what": "some"}, "what: expected one of 'embeddings', 'adaln', 'all', got 'some'"),
        (
            {"data": make_data(labels=OLD - 1 + torch.arange(24) % 3)},
            "data: expected labels of new classes, 6 to 7, got 5",
        ),
        (
            {"data": make_data(labels=torch.full((24,), OLD))},
            "data: expected images of every class, got none of 'class 7'",
        ),
        (
            {"data": make_data(labels=torch.arange(24) % OLD, names=NAMES[:OLD])},
            "data: expected names of the model's 6 classes and of new ones, got 6 names",
        ),
        (
            {"model": make_model(replace(CONFIG, vocab_size=21))},
            "data: expected the model's vocab_size 21, got 20",
        ),
        (
            {"held_out": replace(make_data(12), quantizer=make_quantizer().to("meta"))},
            "held_out: expected its quantizer on cpu, as the model, got meta",
        ),
        (
            {"held_out": make_data(names=(*NAMES[:-1], "other"))},
            "held_out: expected the classes",
        ),
        ({"held_out": make_data()}, "held_out: expected loop.evaluate_every of 1 or more along with it, got 0"),
        ({"loop": loop(batch_size=25)}, "batch_size 25 exceeds the 24 items"),
    ],
)
def test_wrong_input_is_refused(data, tmp_path, changes, message):
    arguments = {"model": make_model(), "data": data, "what": "embeddings", "loop": loop(2), "folder": tmp_path}
    with pytest.raises(ValueError, match=re.escape(message)):
        train_incremental(**(arguments | changes), quiet=True)


def test_other_kinds_of_arguments_are_refused(data, tmp_path):
    with pytest.raises(TypeError, match="model: expected a VAR, got str"):
        train_incremental("d16", data, "all", loop(), tmp_path)
    with pytest.raises(TypeError, match="data: expected TrainingTokens, got Tensor"):
        train_incremental(make_model(), torch.zeros(1), "all", loop(), tmp_path)


# Names and calibrations


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A saved model of twelve classes with a calibration beside it."""
    folder = tmp_path_factory.mktemp("old") / "model"
    classifier = make_classifier()
    save(folder, classifier.var, classifier.vqvae, classifier.class_names, Preprocessing(8, 8, channels=1))
    calibration = calibrate(varlik.load(folder), make_images(classifier, 24), samples=2)
    calibration.save(folder / CALIBRATION_FILE)
    return folder


def grow(checkpoint: Checkpoint, what, folder):
    names = (*checkpoint.class_names, "boat", "car")
    labels = 12 + torch.arange(24) % 2
    tokens = make_data(24).tokens
    data = TrainingTokens(tokens, labels, names, checkpoint.vqvae.quantize)
    return train_incremental(checkpoint.var, data, what, loop(4), folder, quiet=True)


@pytest.mark.parametrize("what", ["embeddings", "adaln"])
def test_names_follow_and_a_calibration_holds_among_old_classes(calibrated, tmp_path, what):
    checkpoint = load_models(calibrated)
    grown = grow(checkpoint, what, tmp_path / "work")
    with pytest.warns(UserWarning, match="run varlik calibrate; that of the old model holds"):
        file = extend(tmp_path / "new", checkpoint, grown, ["boat", "car"])
    assert file == tmp_path / "new" / OLD_CALIBRATION_FILE

    before, after = varlik.load(calibrated), varlik.load(tmp_path / "new")
    assert after.class_names == (*before.class_names, "boat", "car")
    assert after.calibration is None  # no calibration is for all classes
    after = varlik.load(tmp_path / "new", calibration=file)
    images = make_images(before, 6, seed=2)
    old = list(range(12))
    one, two = before.classify(images, cascade=RACE), after.classify(images, classes=old, cascade=RACE)
    assert torch.equal(one.classes, two.classes)
    torch.testing.assert_close(one.log_likelihood, two.log_likelihood, rtol=1e-5, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match=re.escape("[12, 13] are not among the 12")):
        after.classify(images, cascade=RACE)


def test_no_calibration_survives_where_old_scores_do_not(calibrated, tmp_path):
    checkpoint = load_models(calibrated)
    grown = grow(checkpoint, "all", tmp_path / "work")
    with pytest.warns(UserWarning, match="run varlik calibrate$"):
        assert extend(tmp_path / "new", checkpoint, grown, ["boat", "car"]) is None
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"var.safetensors", "vqvae.safetensors"}


def test_without_a_calibration_there_is_nothing_to_tell(calibrated, tmp_path):
    checkpoint = replace(load_models(calibrated), calibration=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert extend(tmp_path, checkpoint, add_classes(checkpoint.var, 1), ["boat"]) is None
    assert varlik.load(tmp_path).class_names[-1] == "boat"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["boat"], "names: expected 2 names of new classes, got 1"),
        (["boat", "class 3"], "names: expected new names that differ from all others, got 'class 3'"),
        (["boat", "boat"], "names: expected new names that differ from all others, got 'boat'"),
        (["boat", " "], "names: expected new names that differ from all others, got ' '"),
    ],
)
def test_wrong_names_are_refused(calibrated, tmp_path, names, message):
    checkpoint = load_models(calibrated)
    with pytest.raises(ValueError, match=re.escape(message)):
        extend(tmp_path / "new", checkpoint, add_classes(checkpoint.var, 2), names)
    assert not (tmp_path / "new").exists()


# What is still known in the end


def test_report_by_hand():
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    stages = [
        torch.tensor([0, 0, 1, 0, 1, 1, 0, 1, 0, 0]),  # 3 of 4 of the first task
        torch.tensor([0, 0, 1, 1, 2, 2, 3, 0, 0, 0]),  # 4 of 4, 3 of 4
        torch.tensor([0, 4, 4, 4, 2, 4, 3, 4, 4, 4]),  # 1 of 4, 2 of 4, 2 of 2
    ]
    report = task_report(stages, labels, [(0, 1), (2, 3), (4,)])
    assert report.accuracy == ((0.75,), (1.0, 0.75), (0.25, 0.5, 1.0))
    assert report.average == pytest.approx((0.25 + 0.5 + 1.0) / 3)
    assert report.forgetting == pytest.approx((0.75 + 0.25) / 2)
    assert task_report([stages[0][:4]], labels[:4], [(0, 1)]).forgetting == 0


@pytest.mark.parametrize(
    ("stages", "tasks", "message"),
    [
        ([[0, 1]], [(0,), (1,)], "predictions: expected one for each of 2 tasks, got 1"),
        ([[0, 0], [0, 1]], [(0,), (0, 1)], "tasks: expected each class in one task"),
        ([[0, 0], [0, 1]], [(0, 1), (2,)], "labels: expected images of every task, got none of [[2]]"),
        ([[0, 0, 0], [0, 1, 1]], [(0,), (1,)], "predictions: expected (2,), got (3,)"),
        ([[0, 1], [0, 1]], [(0,), (1,)], "predictions: expected classes [0] after stage 0, got [0, 1]"),
    ],
)
def test_wrong_reports_are_refused(stages, tasks, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        task_report([torch.tensor(stage) for stage in stages], torch.tensor([0, 1]), tasks)


def test_log_likelihood_is_that_of_the_engine(data):
    model = make_model()
    tokens, inputs, _ = data.batch(torch.arange(4))
    labels = torch.tensor([0, 1, 2, 3])
    ours = log_likelihood(model, model.class_vectors(labels), tokens, inputs)
    theirs = scores(model, data.of_rows(torch.arange(4)), range(4)).diagonal()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
