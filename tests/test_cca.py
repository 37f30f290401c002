"""Condition contrastive alignment: the loss by hand, frozen scores, and training that resumes bit for bit."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import training_case
from tiny_model import CONFIG, PATCH_NUMS, make_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from varlik import reference as naive
from varlik.models.config import VQVAEConfig
from varlik.models.quantizer import MultiScaleQuantizer
from varlik.scoring.engine import Engine
from varlik.scoring.first_order import first_order_log_likelihood
from varlik.training import cca, likelihood
from varlik.training.cca import PRESETS, CCAConfig, cca_loss, confusion, train_cca
from varlik.training.data import TrainingTokens
from varlik.training.distributed import World
from varlik.training.likelihood import log_likelihood
from varlik.training.loop import LoopConfig, Part, batch_indices, generator
from varlik.training.reference_scores import Reference

CLASSES, LENGTH, NULL = CONFIG.num_classes, CONFIG.num_tokens, CONFIG.null_class
NAMES = tuple("abcdef")


def make_quantizer(vocab_size=CONFIG.vocab_size, double=False):
    torch.manual_seed(1)
    found = MultiScaleQuantizer(
        VQVAEConfig(channels=32, codebook_dim=8, vocab_size=vocab_size, patch_nums=PATCH_NUMS)
    ).requires_grad_(False)
    return found.double() if double else found


def make_data(count=48, variants=2, seed=0, quantizer=None):
    """Images whose tokens are mostly those of their class's prototype."""
    random = np.random.default_rng(seed)
    quantizer = quantizer or make_quantizer()
    vocab = quantizer.embedding.num_embeddings
    prototypes = np.random.default_rng(99).integers(vocab, size=(CLASSES, LENGTH))
    labels = np.arange(count) % CLASSES
    tokens = np.broadcast_to(prototypes[labels][:, None], (count, variants, LENGTH)).copy()
    noise = random.random(tokens.shape) < 0.4
    tokens[noise] = random.integers(vocab, size=int(noise.sum()))
    return TrainingTokens(tokens.astype(np.int32), torch.from_numpy(labels), NAMES, quantizer)


def loop(steps=12, **changes):
    values = {"batch_size": 8, "learning_rate": 2e-3, "warmup": 2, "checkpoint_every": 4, "log_every": 1, "seed": 5}
    return LoopConfig(steps=steps, **(values | changes))


# The loss


def test_loss_by_hand():
    # Two images at beta 1/2, lambda 3: -log σ(x) = log(1 + e^-x). The second one's negative is none.
    ratio = torch.tensor([2.0, -1.0], dtype=torch.float64)
    negative = torch.tensor([4.0, 6.0], dtype=torch.float64)
    as_positive = torch.tensor([False, True])
    first = math.log(1 + math.exp(-1)) + 3 * math.log(1 + math.exp(2))
    second = math.log(1 + math.exp(0.5)) + math.log(1 + math.exp(-3))
    plain = (first + second) / 2
    assert plain == pytest.approx((0.3132617 + 3 * 2.1269280 + 0.9740770 + 0.0485874) / 2, abs=1e-6)
    assert cca_loss(ratio, negative, as_positive, 0.5, 3.0, normalise=False).item() == pytest.approx(plain, abs=1e-12)
    assert cca_loss(ratio, negative, as_positive, 0.5, 3.0).item() == pytest.approx(plain / 3, abs=1e-12)
    # A weight below 1 divides nothing.
    light = cca_loss(ratio, negative, as_positive, 0.5, 0.25)
    assert light.item() == pytest.approx((first - 2.75 * math.log(1 + math.exp(2)) + second) / 2, abs=1e-12)
    # Untouched, all ratios are zero.
    zero = torch.zeros(2, dtype=torch.float64)
    assert cca_loss(zero, zero, as_positive, 0.02, 50.0).item() == pytest.approx(math.log(2) * (2 + 51) / 2 / 50)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("beta", "weight"), [(0.02, 50.0), (0.05, 1.0), (1.0, 0.5), (0.02, 1000.0)])
def test_loss_and_gradient_equal_the_closed_form(beta, weight, normalise):
    random = torch.Generator().manual_seed(0)
    ratio, negative = (50 * torch.randn(40, dtype=torch.float64, generator=random) for _ in range(2))
    as_positive = torch.rand(40, generator=random) < 0.3
    ratio.requires_grad_()
    negative.requires_grad_()
    loss = cca_loss(ratio, negative, as_positive, beta, weight, normalise)
    loss.backward()

    divisor = max(weight, 1.0) if normalise else 1.0
    x, y, positive = ratio.tolist(), negative.tolist(), as_positive.tolist()
    value, grad_x, grad_y = 0.0, [], []
    for i in range(40):
        sign, size = (1, 1.0) if positive[i] else (-1, weight)
        value += math.log1p(math.exp(-beta * x[i])) + size * math.log1p(math.exp(-sign * beta * y[i]))
        # d/dx -log σ(s β x) = -s β σ(-s β x)
        grad_x.append(-beta / (1 + math.exp(beta * x[i])))
        grad_y.append(-sign * size * beta / (1 + math.exp(sign * beta * y[i])))
    scale = 1 / (40 * divisor)
    assert loss.item() == pytest.approx(value * scale, abs=1e-6, rel=1e-12)
    torch.testing.assert_close(ratio.grad, torch.tensor(grad_x, dtype=torch.float64) * scale, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(negative.grad, torch.tensor(grad_y, dtype=torch.float64) * scale, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_ratios_stay_finite(dtype, size):
    ratio, negative = (torch.tensor([size, -size], dtype=dtype, requires_grad=True) for _ in range(2))
    loss = cca_loss(ratio, negative, torch.tensor([True, False]), 1.0, 1000.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert loss.dtype == dtype
    assert torch.isfinite(ratio.grad).all()
    assert torch.isfinite(negative.grad).all()
    # A positive that sank by 1e4 nats is pulled up with all the force there is.
    assert ratio.grad[ratio.argmin()].item() == pytest.approx(-1 / 2 / 1000)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"log_ratio": torch.zeros(3, dtype=torch.int64)}, TypeError, "log_ratio: expected floating point, got"),
        ({"negative_log_ratio": torch.zeros(2)}, ValueError, r"negative_log_ratio: expected \(3,\)"),
        ({"as_positive": torch.zeros(3)}, TypeError, "as_positive: expected bool"),
        ({"as_positive": torch.zeros(3, 1, dtype=torch.bool)}, ValueError, "as_positive: expected"),
        ({"log_ratio": torch.zeros(0)}, ValueError, "log_ratio: expected"),
        ({"beta": 0.0}, ValueError, "beta: expected a positive number, got 0"),
        ({"weight": -1.0}, ValueError, "weight: expected a positive number, got -1"),
    ],
)
def test_loss_refuses(changes, error, words):
    values = {
        "log_ratio": torch.zeros(3),
        "negative_log_ratio": torch.zeros(3),
        "as_positive": torch.zeros(3, dtype=torch.bool),
        "beta": 0.1,
        "weight": 1.0,
    }
    with pytest.raises(error, match=words):
        cca_loss(**(values | changes))


@pytest.mark.parametrize(
    "values", [{"beta": 0}, {"weight": math.inf}, {"null_rate": 1.0}, {"null_rate": -0.1}, {"beta": math.nan}]
)
def test_config_refuses(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        CCAConfig(**values)


def test_presets():
    assert [PRESETS[name].cca.weight for name in ("d16", "d20", "d24", "d30")] == [50, 50, 100, 1000]
    for name in ("d16", "d20", "d24", "d30"):
        preset = PRESETS[name]
        assert (preset.cca.beta, preset.cca.null_rate) == (0.02, 0.1)
        loop = preset.loop
        assert (loop.steps, loop.batch_size, loop.learning_rate, loop.clip) == (5004, 256, 2e-5, 2.0)
        assert loop.batch_size % loop.accumulate == 0
        assert loop.weight_decay == (0.08 if name == "d30" else 0.05)
    assert PRESETS["small"].loop.precision == "float32"


# Log-likelihoods


def test_log_likelihood_and_its_gradient_equal_the_naive_ones():
    model, data = make_model().double(), make_data(quantizer=make_quantizer(double=True))
    tokens, inputs, labels = data.batch(torch.arange(5))
    found = log_likelihood(model, model.class_vectors(labels), tokens, inputs)
    found.sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model(model.class_vectors(labels), inputs)
    expected = logits.log_softmax(-1).gather(-1, tokens[..., None]).sum((1, 2))
    expected.sum().backward()
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, atol=1e-8, rtol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_likelihood_under_autocast(dtype):
    model, data = make_model(), make_data()
    tokens, inputs, labels = data.batch(torch.arange(5))

    def run():
        return log_likelihood(model, model.class_vectors(labels), tokens, inputs)

    exact = run()
    with torch.autocast("cpu", dtype):
        rough = run()
    rough.sum().backward()
    assert rough.dtype == torch.float64
    assert 0 < (rough - exact).abs().max() < 0.02 * exact.abs().max()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in model.parameters())


class Sizes(TorchDispatchMode):
    """The largest tensor that is made: by any kernel, and by Python code inside ops, which a dispatch mode misses."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        sizes = self

        class Inside(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                return sizes.seen(func(*args, **(kwargs or {})))

        self.inside = Inside()

    def seen(self, out):
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.seen(func(*args, **(kwargs or {})))


def test_a_step_never_holds_logits_of_all_rows():
    # A tile of logits has 2**21 numbers on a CPU, and the head's weight fewer; all logits would be thrice that.
    vocab = 50_000
    config = replace(CONFIG, vocab_size=vocab)
    model, data = make_model(config), make_data(12, quantizer=make_quantizer(vocab))
    settings = loop(steps=100, batch_size=2)
    reference = Reference(copy.deepcopy(model), data)
    loss_of_part = cca._loss_of_part(model, data, CCAConfig(), settings, reference, None, compiled=False)
    logits = 4 * LENGTH * vocab
    with Sizes() as sizes, sizes.inside:
        loss, _ = loss_of_part(Part(0, torch.tensor([0, 1]), slice(0, 2)))
        loss.backward()
    assert vocab * CONFIG.embed_dim <= sizes.largest <= 2**21 < 0.4 * logits
    with Sizes() as sizes, sizes.inside:  # what would be seen otherwise
        tokens, inputs, labels = data.batch(torch.tensor([0, 1, 0, 1]))
        model(model.class_vectors(labels), inputs)
    assert sizes.largest == logits
    with torch.no_grad(), Sizes() as sizes, sizes.inside:  # and that the inside of the op is looked at
        log_likelihood(model, model.class_vectors(labels), tokens, inputs)
    assert 2**20 < sizes.largest <= 2**21


# The reference


def pairs_of(data, rows, seed=0):
    random = torch.Generator().manual_seed(seed)
    labels = torch.stack((data.labels[rows], torch.randint(CLASSES + 1, (len(rows),), generator=random)), dim=1)
    labels[0] = NULL
    variant = torch.randint(data.variants, (len(rows),), generator=random)
    return data.token_maps(rows, variant), rows, variant, labels


def count_scored(reference, monkeypatch):
    scored = []
    real = reference._engine.open

    def open_(images, labels):
        scored.append(int((labels >= 0).sum()))
        return real(images, labels)

    monkeypatch.setattr(reference._engine, "open", open_)
    return scored


def test_reference_scores_are_those_of_the_model():
    model, data = make_model(), make_data()
    images, rows, variant, labels = pairs_of(data, torch.tensor([3, 17, 40, 5, 8]))
    for revisits in (True, False):
        found = Reference(model, data, revisits)(images, rows, variant, labels)
        for column in range(2):
            for i, label in enumerate(labels[:, column].tolist()):
                one = slice(i, i + 1)
                expected = naive.log_likelihood(model, images.tokens[one], images.teacher_forcing_input[one], [label])
                assert found[i, column].item() == pytest.approx(expected.item(), rel=1e-5)


def test_reference_scores_a_pair_once_and_the_same_with_and_without_a_table(monkeypatch):
    model, data = make_model(), make_data()
    batches = [pairs_of(data, torch.randperm(48)[:8], seed) for seed in range(6)]
    row = 4 * (CLASSES + 1)  # bytes
    references = [Reference(model, data, table_bytes=n) for n in (2**20, 0, 40 * row + 3)]
    scored = [count_scored(reference, monkeypatch) for reference in references]
    for batch in batches:
        whole, none, part = (reference(*batch) for reference in references)
        assert torch.equal(whole, none)
        assert torch.equal(whole, part)
    asked, kept = [], []
    for _, rows, variant, labels in batches:
        for i, (r, v) in enumerate(zip(rows.tolist(), variant.tolist(), strict=True)):
            new = {(r, v, label) for label in labels[i].tolist()}
            asked += new
            kept += [key for key in new if 2 * r + v < 40]
    assert len(set(asked)) < len(asked)
    assert sum(scored[0]) == len(set(asked))
    assert sum(scored[1]) == len(asked)
    assert sum(scored[2]) == len(asked) - len(kept) + len(set(kept))


# Training


def start():
    return make_model(seed=3)


def test_accuracy_among_many_classes(monkeypatch):
    model, data = start(), make_data(30, 1)
    wanted = cca.accuracy(model, data)
    real, scored = cca.score_table, []
    monkeypatch.setattr(cca, "score_table", lambda *args: scored.append(args[2].shape[1]) or real(*args))
    monkeypatch.setattr(cca, "MOST_IN_FULL", CLASSES - 1)
    monkeypatch.setattr(cca, "FINALISTS", CLASSES - 1)
    assert cca.accuracy(model, data) == wanted  # the last estimate of all is no one's best
    monkeypatch.setattr(cca, "FINALISTS", 1)
    estimates = first_order_log_likelihood(
        Engine(model), data.token_maps(torch.arange(30)), torch.arange(CLASSES), torch.arange(CLASSES)
    )
    assert cca.accuracy(model, data) == (estimates.argmax(1) == data.labels).double().mean().item()
    assert scored == [CLASSES - 1, 1]


def test_processes_share_accuracy(monkeypatch):
    model, data = start(), make_data(2, 1)
    monkeypatch.setattr(cca.distributed, "sum_", lambda tensor: None)
    shares = []
    for rank in range(4):  # more than images
        monkeypatch.setattr(cca.distributed, "world", lambda rank=rank: World(rank, 4, 0))
        shares.append(cca._shared_accuracy(model, data))
    assert sum(shares) == cca.accuracy(model, data)
    assert shares[2:] == [0, 0]


def test_training_prefers_the_own_class(tmp_path):
    model, data, held_out = start(), make_data(), make_data(36, 1, seed=7)
    before = cca.accuracy(model, held_out)
    frozen = copy.deepcopy(model)
    flags = [i % 2 == 0 for i, _ in enumerate(model.parameters())]
    for parameter, flag in zip(model.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
    found = train_cca(
        model, data, CCAConfig(0.1, 2.0), loop(60, learning_rate=5e-3), tmp_path, reference=frozen, quiet=True
    )
    assert found is model
    assert not model.training
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(frozen.parameters(), start().parameters(), strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), frozen.parameters(), strict=True))
    records = training_case.records(tmp_path)
    late = {name: sum(r[name] for r in records[-10:]) / 10 for name in ("loss", "log_ratio", "negative_log_ratio")}
    assert late["loss"] < 0.7 * records[0]["loss"]
    assert late["log_ratio"] > 1 > 0 > late["negative_log_ratio"]
    assert cca.accuracy(model, held_out) > before + 0.3


def test_accuracy_is_that_of_full_likelihood():
    model, data = start(), make_data(60, 1)
    tokens, inputs, _ = data.batch(torch.arange(60))
    best = naive.log_likelihood(model, tokens, inputs, list(range(CLASSES))).argmax(1)
    assert cca.accuracy(model, data) == pytest.approx((best == data.labels).double().mean().item())


@pytest.mark.parametrize("null_rate", [0.4, 0.0])
def test_first_step_tells_negatives_apart(null_rate, tmp_path):
    # Before the first update all ratios are 0, so the loss counts who is contrasted; some neighbours share a class.
    data, settings = make_data(12), loop(1, batch_size=12, seed=2)
    train_cca(start(), data, CCAConfig(0.1, 5.0, null_rate), settings, tmp_path, quiet=True)
    rows = batch_indices(settings, 0, 12)
    labels = data.labels[rows].tolist()
    null = (torch.rand(12, generator=generator(2, 0)) < null_rate).tolist()
    none = [null[i] or labels[i] == labels[(i + 1) % 12] for i in range(12)]
    assert 0 < sum(none) < 12
    weights = sum(1.0 if none[i] else 5.0 for i in range(12)) / 12
    (record,) = training_case.records(tmp_path)
    assert record["loss"] == pytest.approx(math.log(2) * (1 + weights) / (5 if null_rate else 1), rel=1e-4)
    assert abs(record["log_ratio"]) < 1e-2
    assert abs(record["negative_log_ratio"]) < 1e-2
    model = start()
    variant = data.variant(rows, 2, 0)
    tokens, inputs, _ = data.batch(rows, variant)
    scores = naive.log_likelihood(model, tokens, inputs, list(range(CLASSES)))
    wins = [scores[i, labels[i]] > scores[i, labels[(i + 1) % 12]] for i in range(12) if not none[i]]
    assert record["decided"] == pytest.approx(sum(map(float, wins)) / len(wins))


def test_negatives_are_drawn_from_their_chances(tmp_path, monkeypatch):
    """Class y is set against y + 1 alone: the pairs scored by the reference say so, and the null class stays paired."""
    seen = []
    spy = Reference._score

    def score(self, images, labels):
        seen.append(labels.clone())
        return spy(self, images, labels)

    monkeypatch.setattr(Reference, "_score", score)
    data, chances = make_data(), torch.eye(CLASSES).roll(1, 1)
    run = {"negatives": chances, "quiet": True}
    train_cca(make_model(), data, CCAConfig(0.1, 1.0, null_rate=0.3), loop(3), tmp_path, **run)
    pairs = torch.cat(seen)
    null = pairs[:, 0] == NULL
    assert null.any()
    assert (pairs[null, 1] == -1).all()  # the same score, asked for once
    assert torch.equal(pairs[~null, 1], (pairs[~null, 0] + 1) % CLASSES)
    for changes in ({"negatives": None}, {"negatives": chances.roll(1, 1).fill_diagonal_(0) + chances}):
        with pytest.raises(ValueError, match="with another negatives"):
            train_cca(make_model(), data, CCAConfig(0.1, 1.0, null_rate=0.3), loop(3), tmp_path, **(run | changes))
    run["negatives"] = chances * (1 + 1e-5)  # as found on another machine
    train_cca(make_model(), data, CCAConfig(0.1, 1.0, null_rate=0.3), loop(3), tmp_path, **run)


def test_confusion_is_the_mean_posterior_of_each_class():
    model, data = make_model(), make_data(18)
    found = confusion(model, data, temperature=3.0, least=0.25)
    scores = naive.log_likelihood(model, *data.batch(torch.arange(18))[:2], list(range(CLASSES))).double()
    for y in range(CLASSES):
        mean = (scores[data.labels == y] / 3).softmax(1).mean(0)
        mean[y] = 0
        mean = 0.75 * mean / mean.sum() + 0.25 / (CLASSES - 1)
        mean[y] = 0
        torch.testing.assert_close(found[y], mean, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.sum(1), torch.ones(CLASSES, dtype=torch.float64))
    with pytest.raises(ValueError, match="expected images of every class, got none of"):
        confusion(model, data.of_rows((data.labels < 2).nonzero().flatten()))
    with pytest.raises(ValueError, match="data: expected the model's num_classes 6, got 7"):
        confusion(model, replace(data, class_names=(*NAMES, "g")))
    for changes, words in (
        ({"temperature": 0.0}, "temperature: expected a positive number, got 0"),
        ({"temperature": -1.0}, "temperature: expected a positive number, got -1"),
        ({"least": 1.5}, "least: expected a share between 0 and 1, got 1.5"),
    ):
        with pytest.raises(ValueError, match=words):
            confusion(model, data, **changes)


def test_where_no_class_is_ever_mistaken_chances_are_even():
    data = make_data(18)
    found = confusion(start(), data, temperature=1e-9)  # posteriors of zero and one
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.sum(1), torch.ones(CLASSES, dtype=torch.float64))
    assert (found + torch.eye(CLASSES) >= 0.1 / (CLASSES - 1) - 1e-12).all()


@pytest.mark.parametrize("negatives", [torch.ones(CLASSES, CLASSES, dtype=torch.int64), [[0.0, 1.0]]])
def test_refuses_negatives_of_another_kind(negatives, tmp_path):
    with pytest.raises(TypeError, match="negatives: expected a floating-point tensor, got"):
        train_cca(make_model(), make_data(), CCAConfig(), loop(2), tmp_path, negatives=negatives, quiet=True)


@pytest.mark.parametrize(
    ("chances", "words"),
    [
        (torch.ones(2, 2), "expected \\(6, 6\\), got \\(2, 2\\)"),
        (torch.ones(CLASSES, CLASSES), "zeros on the diagonal"),
        (torch.zeros(CLASSES, CLASSES), "some above zero"),
        (torch.eye(CLASSES).roll(1, 1) * torch.nan, "finite"),
        (1e-3 - torch.eye(CLASSES).roll(1, 1), "not negative"),
    ],
)
def test_refuses_negatives_that_are_no_chances(chances, words, tmp_path):
    with pytest.raises(ValueError, match=f"negatives: .*{words}"):
        train_cca(make_model(), make_data(), CCAConfig(), loop(2), tmp_path, negatives=chances, quiet=True)


def test_parts_change_nothing(tmp_path):
    data, config = make_data(), CCAConfig(0.1, 2.0, null_rate=0.3)
    whole = train_cca(start(), data, config, loop(4), tmp_path / "whole", quiet=True)
    parts = train_cca(start(), data, config, loop(4, accumulate=4), tmp_path / "parts", quiet=True)
    for one, other in zip(
        training_case.records(tmp_path / "whole"), training_case.records(tmp_path / "parts"), strict=True
    ):
        for name in ("loss", "log_ratio", "negative_log_ratio", "decided", "nats_per_token", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-3), name
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)


def run_cca(folder, **changes):
    held_out = make_data(12, 1, seed=7)
    settings = loop(8, evaluate_every=4, **changes)
    return train_cca(start(), make_data(), CCAConfig(0.1, 2.0, 0.3), settings, folder, held_out=held_out, quiet=True)


def test_two_processes_equal_one(tmp_path):
    training_case.finish(training_case.start([(run_cca, tmp_path / "two", {})], size=2))
    training_case.assert_two_processes_equal_one(run_cca, tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("steps", [5, 14])  # within the first epoch, and where scores are met again
def test_killed_and_resumed_equals_uninterrupted(steps, tmp_path, monkeypatch):
    data, held_out, config = make_data(), make_data(12, 1, seed=7), CCAConfig(0.1, 2.0)
    settings = loop(steps, checkpoint_every=2, evaluate_every=3, average=0.5)

    def run(folder, **options):
        return train_cca(start(), data, config, settings, folder, held_out=held_out, quiet=True, **options)

    whole = run(tmp_path / "whole")
    real, calls = likelihood.log_likelihood, []

    def killed(*args):
        calls.append(1)
        if len(calls) == steps - 1:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(likelihood, "log_likelihood", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts")
    monkeypatch.undo()
    parts, untabled = run(tmp_path / "parts"), run(tmp_path / "untabled", table_bytes=0)
    assert len(calls) == steps - 1
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
        assert torch.equal(value, untabled.state_dict()[name]), name


def test_stops_early_with_the_best_weights(tmp_path):
    data, held_out = make_data(), make_data(60, 1, seed=7)
    settings = loop(200, learning_rate=0.5, warmup=0, evaluate_every=2, patience=2)  # a rate that ruins the model
    model = train_cca(start(), data, CCAConfig(0.1, 2.0), settings, tmp_path, held_out=held_out, quiet=True)
    scores = [record["score"] for record in training_case.records(tmp_path) if "score" in record]
    assert training_case.records(tmp_path)[-1]["step"] < 200
    assert len(scores) >= 3
    assert scores.index(max(scores)) < len(scores) - 2
    assert cca.accuracy(model, held_out) == max(scores)


def test_the_start_stays_where_no_step_is_better(tmp_path):
    data, held_out, ruined = make_data(), make_data(60, 1, seed=7), loop(9, learning_rate=0.5, warmup=0)
    train_cca(model := start(), data, CCAConfig(0.1, 2.0), loop(60, learning_rate=5e-3), tmp_path / "good", quiet=True)
    before = copy.deepcopy(model.state_dict())
    settings = replace(ruined, evaluate_every=2, patience=3, checkpoint_every=2)
    train_cca(model, data, CCAConfig(0.1, 2.0), settings, tmp_path / "bad", held_out=held_out, quiet=True)
    records = training_case.records(tmp_path / "bad")
    assert [r["step"] for r in records if "score" in r] == [0, 2, 4, 6]  # the start counts among those to be beaten
    assert records[0]["score"] == cca.accuracy(model, held_out)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_run_with_another_reference_or_loss_is_not_resumed(tmp_path):
    data = make_data()
    train_cca(start(), data, CCAConfig(), loop(2), tmp_path, quiet=True)
    for reference, differing in ((None, "model, reference"), (start(), "model")):
        with pytest.raises(ValueError, match=f"another {differing}:"):
            train_cca(make_model(seed=4), data, CCAConfig(), loop(2), tmp_path, reference=reference, quiet=True)
    with pytest.raises(ValueError, match="another cca"):
        train_cca(start(), data, CCAConfig(beta=0.3), loop(2), tmp_path, quiet=True)
    other = data.labels.clone()
    other[:2] = other[:2].flip(0)
    with pytest.raises(ValueError, match="another data:"):
        train_cca(start(), replace(data, labels=other), CCAConfig(), loop(2), tmp_path, quiet=True)


def test_refuses_what_cannot_be_trained(tmp_path, monkeypatch):
    model, data = start(), make_data()

    def refused(error, words, data=data, settings=None, **options):
        with pytest.raises(error, match=words):
            train_cca(model, data, CCAConfig(), settings or loop(4), tmp_path, quiet=True, **options)

    def labelled(labels, names=NAMES):
        return TrainingTokens(data.tokens, labels, names, data.quantizer)

    refused(ValueError, "data: expected images of every class, got none of 'e', 'f'$",
            labelled(data.labels.clamp(max=3)))  # fmt: skip
    refused(ValueError, "data: expected images of every class", data.of_rows((data.labels == 2).nonzero().flatten()))
    refused(ValueError, "data: expected the model's num_classes 6, got 7", labelled(data.labels, (*NAMES, "g")))
    refused(ValueError, "held_out: expected the model's num_classes 6, got 7",
            held_out=labelled(data.labels, (*NAMES, "g")), settings=loop(4, evaluate_every=1))  # fmt: skip
    refused(ValueError, "held_out: expected loop.evaluate_every", held_out=data)
    refused(ValueError, "data: expected the model's vocab_size 20, got 30",
            make_data(quantizer=make_quantizer(30)))  # fmt: skip
    refused(TypeError, "data: expected TrainingTokens, got list", data=[])
    refused(ValueError, "table_bytes: expected 0 or more, got -1", table_bytes=-1)
    with pytest.raises(TypeError, match="model: expected a VAR, got str"):
        train_cca("tiny", data, CCAConfig(), loop(4), tmp_path)
    with pytest.raises(TypeError, match="model: expected a VAR, got str"):
        confusion("tiny", data)
    with monkeypatch.context() as patch:
        patch.setattr(cca.Engine, "prepare", lambda *_: pytest.fail("scored before it was refused"))
        chances = 1 - torch.eye(CLASSES)
        refused(ValueError, "batch_size 49 exceeds the 48", settings=loop(4, batch_size=49), negatives=chances)
    refused(ValueError, "reference: expected the model's depth 2, got 1",
            reference=make_model(replace(CONFIG, depth=1)))  # fmt: skip
    refused(ValueError, "reference: expected the model's num_classes 6, got 7",
            reference=make_model(replace(CONFIG, num_classes=7)))  # fmt: skip
    refused(TypeError, "reference: expected a VAR, got str", reference="var-d16")
    refused(ValueError, "loop: expected batches of two classes or more, .* at step 0", settings=loop(4, batch_size=1))
    mostly = data.labels.clone()
    mostly[6:] = 0
    refused(ValueError, "loop: expected batches of two classes or more, .* got only class 0", labelled(mostly))
    with pytest.raises(ValueError, match="labels: expected 0 to 5, got 0 to 6"):
        labelled(data.labels + (data.labels == 5))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_compiled_training_is_the_same(tmp_path):
    data, config = make_data(), CCAConfig(0.1, 2.0)
    eager = train_cca(start(), data, config, loop(3), tmp_path / "eager", quiet=True)
    compiled = train_cca(start(), data, config, loop(3), tmp_path / "compiled", compiled=True, quiet=True)
    for one, other in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-2)
