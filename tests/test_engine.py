"""The engine against the reference, whatever the order of work; pages that neither leak nor alias."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tiny_model import CLASSES, CONFIG, IMAGES, PATCH_NUMS, SAMPLES, make_model, make_samples
from torch import Tensor

from varlik import reference
from varlik.scoring import memory as memory_module
from varlik.scoring.engine import Engine
from varlik.scoring.graphs import Graphs, bucket
from varlik.scoring.kv_cache import PagedCache, SideBySide
from varlik.scoring.options import EngineOptions


@pytest.fixture(scope="module")
def var():
    return make_model()


@pytest.fixture(scope="module")
def samples():
    return make_samples()


@pytest.fixture(scope="module")
def truth(var, samples):
    """Reference scores in float64, (S, B, N, K): summed over the tokens of each scale."""
    double = copy.deepcopy(var).double()
    table = []
    for maps in samples:
        rows = [
            reference.token_log_prob(double, maps.tokens, maps.teacher_forcing_input.double(), label)
            for label in range(CLASSES)
        ]
        per_token = torch.stack(rows, dim=1)
        ends = CONFIG.boundaries
        table.append(torch.stack([per_token[..., a:b].sum(-1) for a, b in itertools.pairwise(ends)], dim=-1))
    return torch.stack(table)


def ready(var, in_place=False, **options):
    """With `in_place`, attention follows slots through the arenas, as on a GPU."""
    engine = Engine(var, EngineOptions(**options))
    engine.passes.side_by_side = not in_place
    engine.prepare(torch.arange(CLASSES))
    return engine


def check(rows, truth):
    """Every score that is there equals the reference; every scale scored is there."""
    wanted = truth[rows.sample, rows.image, rows.label]
    there = torch.arange(CONFIG.num_scales) < rows.scored.unsqueeze(1)
    assert torch.equal(torch.isfinite(rows.log_likelihood), there)
    torch.testing.assert_close(rows.log_likelihood[there].double(), wanted[there], rtol=1e-5, atol=0)
    if rows.token_log_prob is not None:
        parts = [rows.per_token()[:, a:b].double().sum(1) for a, b in itertools.pairwise(CONFIG.boundaries)]
        torch.testing.assert_close(torch.stack(parts, 1)[there], wanted[there], rtol=1e-5, atol=0)


def all_classes(count=IMAGES):
    return torch.arange(CLASSES).expand(count, -1)


@pytest.mark.parametrize(
    "config",
    [CONFIG, replace(CONFIG, shared_aln=True), replace(CONFIG, attn_l2_norm=False)],
    ids=["plain", "shared", "no-l2"],
)
def test_equals_reference_per_token(config, samples):
    var = make_model(config)
    engine = Engine(var)
    engine.prepare(torch.arange(CLASSES))
    rows = engine.advance(engine.open(samples[0], all_classes(), per_token=True), 4)
    for label in range(CLASSES):
        wanted = reference.token_log_prob(var, samples[0].tokens, samples[0].teacher_forcing_input, label)
        torch.testing.assert_close(rows.per_token()[rows.label == label], wanted, atol=1e-5, rtol=1e-5)


def test_captured_passes_score_the_same(var, samples, truth):
    """With a stand-in for CUDA's capture that runs the pass anew: padding, static inputs and keys are the real ones."""
    runs = []

    def capture(function, inputs):
        outputs = tuple(tensor.clone() for tensor in function(*inputs))

        def replay():
            runs.append(len(inputs[0]))
            for mine, new in zip(outputs, function(*inputs), strict=True):
                mine.copy_(new)

        return replay, outputs

    engine = ready(var, in_place=True)
    engine.passes.graphs = Graphs(capture)
    free = engine.cache.slots_held
    for _ in range(2):
        rows = engine.advance(engine.open(samples[0], all_classes(), per_token=True), 2)
        rows = engine.keep(rows, torch.tensor([0, 2, 3, 7, 8, 13, 17]))
        rows = engine.advance(engine.fork(rows, samples[1], 1), 4)
        check(rows, truth)
        engine.close(rows)
    assert set(runs) == {24, 16}  # of 18 and 14 rows
    assert len(engine.passes.graphs) < len(runs)
    assert engine.cache.slots_held == free
    engine.warmup(5)
    with pytest.raises(ValueError, match="rows: expected 1 or more, got 0"):
        engine.warmup(0)


def test_buckets():
    assert [bucket(rows) for rows in range(1, 18)] == [1, 2, 3, 4, 6, 6, 8, 8, *[12] * 4, *[16] * 4, 24]


def test_graphs_give_up_the_least_recently_run(monkeypatch):
    monkeypatch.setattr("varlik.scoring.graphs.MAX_GRAPHS", 2)
    captured = []

    def capture(function, inputs):
        captured.append(int(inputs[0]))
        return lambda: None, function(*inputs)

    graphs = Graphs(capture)
    for key in (1, 2, 1, 3, 1, 2):
        assert graphs.run(key, "here", lambda x: (x + 1,), torch.tensor(key)) == (key + 1,)
    assert captured == [1, 2, 3, 2]
    assert len(graphs) == 2
    graphs.run(2, "elsewhere", lambda x: (x + 1,), torch.tensor(2))
    assert captured == [1, 2, 3, 2, 2]
    graphs.clear()
    assert len(graphs) == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_memory": 1.5}, TypeError, "max_memory: expected a whole number of bytes, got 1.5"),
        ({"max_memory": -1}, ValueError, "max_memory: expected a number of bytes, 0 or more, got -1"),
        ({"dtype": torch.int64}, TypeError, "dtype: expected one of torch.float16, "),
        ({"impl": "cuda"}, ValueError, 'impl: expected "auto", "torch" or "triton", got \'cuda\''),
        ({"deterministic": True}, ValueError, "deterministic: needs Triton kernels, which cpu with torch.float32 does"),
        ({"impl": "triton"}, ValueError, "impl: Triton kernels cannot run on cpu here"),
        ({"impl": "triton", "dtype": torch.float64}, ValueError, "impl: Triton kernels do not compute in float64"),
        ({"cuda_graphs": True}, ValueError, "cuda_graphs: needs a CUDA device, got cpu"),
    ],
)
def test_refuses_options(var, options, error, message):
    with pytest.raises(error) as found:
        Engine(var, EngineOptions(**options))
    assert str(found.value).startswith(message)


@pytest.mark.parametrize("in_place", [False, True])
def test_products_in_half_precision(var, samples, truth, in_place):
    engine = ready(var, in_place, dtype=torch.float16)
    assert engine.cache.arenas[0].dtype == torch.float16
    rows = engine.advance(engine.open(samples[0], all_classes()), 4)
    wanted = truth[rows.sample, rows.image, rows.label]
    torch.testing.assert_close(rows.log_likelihood.double(), wanted, rtol=5e-3, atol=0)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_order_of_work_gives_the_same_scores(var, samples, truth, data):
    """Splits of scales, chunk sizes, class orders, image batches, keep and fork sequences, with and without memory."""
    draw = data.draw
    memory = draw(st.sampled_from([None, 0, 40_000]), label="max_memory")
    engine = ready(var, max_memory=memory, in_place=draw(st.booleans(), label="in place"))
    empty = engine.cache.pages_held
    count = draw(st.integers(1, IMAGES), label="images")
    order = torch.tensor(draw(st.permutations(range(CLASSES)), label="classes"))
    labels = order[: draw(st.integers(1, CLASSES), label="how many")].expand(count, -1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(memory_module.CHUNK_BYTES, "cpu", draw(st.sampled_from([1, 60_000, 2**30]), label="chunk bytes"))
        patch.setattr(memory_module, "CHUNK_TOKENS", 1)
        rows = engine.open(samples[0][:count], labels, per_token=draw(st.booleans(), label="per token"))
        forked, scale = 1, 1
        for _ in range(draw(st.integers(1, 6), label="steps")):
            action = draw(st.sampled_from(["advance", "keep", "fork"]))
            if action == "advance":
                scale = draw(st.integers(scale, CONFIG.num_scales), label="to scale")
                rows = engine.advance(rows, scale, retain=draw(st.sampled_from([None, 0, 2]), label="retain"))
            elif action == "keep":
                chosen = draw(st.lists(st.integers(0, len(rows) - 1), unique=True, max_size=len(rows)), label="rows")
                rows = engine.keep(rows, torch.tensor(chosen, dtype=torch.int64))
                if not len(rows):
                    break
            elif forked < SAMPLES:
                rows = engine.fork(rows, samples[forked][:count], forked)
                forked += 1
            check(rows, truth)
        rows = engine.advance(rows, CONFIG.num_scales)
        check(rows, truth)
        engine.close(rows)
        assert engine.cache.pages_held == empty


def test_stages_continue_and_forks_share(var, samples):
    engine = ready(var)
    ends = CONFIG.boundaries
    rows = engine.advance(engine.open(samples[0], all_classes()), 3)
    assert rows.evaluated.sum(1).tolist() == [ends[3] - 1] * len(rows)
    rows = engine.keep(rows, (rows.label < 2).nonzero().flatten())
    rows.evaluated.zero_()
    rows = engine.fork(rows, samples[1], 1)
    rows = engine.fork(rows, samples[2], 2)
    assert rows.cached[rows.sample == 1].tolist() == [2] * 6
    assert rows.cached[rows.sample == 2].tolist() == [1] * 6
    shared = rows.pages[rows.sample == 1, 1]
    assert torch.equal(shared, rows.pages[rows.sample == 0, 1])
    rows = engine.advance(rows, 4)
    spent = [rows.evaluated[rows.sample == s].sum(1).unique().tolist() for s in range(3)]
    assert spent == [[ends[4] - ends[3]], [ends[4] - ends[2]], [ends[4] - ends[1]]]


@pytest.mark.parametrize("in_place", [False, True])
def test_only_what_a_later_stage_may_read_is_kept(var, samples, truth, in_place):
    engine = ready(var, in_place)
    held = engine.cache.pages_held
    rows = engine.advance(engine.open(samples[0], all_classes()), 4)
    assert rows.cached.unique().tolist() == [3]  # no scale reads keys of the last one
    assert engine.cache.pages_held == held + 2 * len(rows)
    engine.close(rows)
    rows = engine.advance(engine.open(samples[0], all_classes()), 4, retain=2)
    assert rows.cached.unique().tolist() == [2]
    # Scores are shared however little is kept; a fork equal to its clean row has nothing left to do.
    rows = engine.fork(engine.fork(rows, samples[1], 1), samples[0], 2)
    assert rows.scored[rows.sample == 1].unique().tolist() == [2]
    assert rows.scored[rows.sample == 2].unique().tolist() == [4]
    rows.evaluated.zero_()
    rows = engine.advance(rows, 4, retain=0)
    assert rows.evaluated[rows.sample == 2].sum() == 0
    check(engine.keep(rows, (rows.sample < 2).nonzero().flatten()), truth)


def test_a_chunk_that_finds_no_memory_is_halved(var, samples, truth, monkeypatch):
    engine = ready(var)
    sizes, run = [], engine.passes.run

    def scarce(tokens, inputs, source, *rest):
        sizes.append(len(source))
        if len(source) > 3:
            raise torch.cuda.OutOfMemoryError("no room")
        return run(tokens, inputs, source, *rest)

    monkeypatch.setattr(engine.passes, "run", scarce)
    held = engine.cache.pages_held
    rows = engine.advance(engine.open(samples[0], all_classes()), 4)
    check(rows, truth)
    assert sizes[:3] == [18, 9, 4]
    assert max(sizes[3:]) <= 3
    engine.close(rows)
    assert engine.cache.pages_held == held
    monkeypatch.setattr(engine.passes, "run", lambda *_: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("none")))
    rows = engine.open(samples[0], all_classes())
    with pytest.raises(torch.cuda.OutOfMemoryError):
        engine.advance(rows, 4)
    assert engine.cache.pages_held == held


def test_budget():
    cpu = torch.device("cpu")
    config = replace(CONFIG, depth=1)
    assert memory_module.Budget.of(cpu, 1000) == memory_module.Budget(750, 250)
    assert 0 < memory_module.Budget.of(cpu, None).pages < memory_module.available_bytes(cpu)
    row = (8 * 29 + 2 * 30) * 32 * 4  # numbers of a token, keys and values
    assert memory_module.Budget(0, 5 * row).chunk_rows(config, 1, 4, 1, 4, cpu) == 5
    assert memory_module.Budget(0, 0).chunk_rows(config, 1, 4, 1, 4, cpu) == 1
    wide = memory_module.Budget(0, 2**40).chunk_rows(config, 1, 4, 1, 4, cpu)
    assert wide == memory_module.CHUNK_BYTES["cpu"] // row


def test_pages_are_reused(var, samples):
    engine = ready(var)
    for _ in range(3):
        rows = engine.advance(engine.open(samples[0], all_classes()), 4)
        engine.close(rows)
    first = engine.cache.capacity
    rows = engine.advance(engine.open(samples[0], all_classes()), 4)
    assert engine.cache.capacity == first
    with pytest.raises(ValueError, match="another engine"):
        ready(var).advance(rows, 4)


def test_memory_is_bounded_and_rows_still_scored(var, samples, truth):
    engine = Engine(var, EngineOptions(max_memory=0))
    engine.prepare(torch.arange(3))
    engine.advance(engine.open(samples[0], all_classes()[:, :3]), 4)
    engine.prepare(torch.arange(CLASSES))  # tables find room whatever chunks have used
    rows = engine.advance(engine.open(samples[0], all_classes()), 3)
    assert rows.cached.unique().tolist() == [1]
    rows = engine.advance(rows, 4)
    check(rows, truth)


def test_tables_grow_by_classes_asked_for(var, samples, truth):
    engine = Engine(var)
    engine.prepare(torch.tensor([4, 1]))
    rows = engine.advance(engine.open(samples[0], torch.tensor([[1, 4]] * IMAGES)), 2)
    engine.prepare(torch.tensor([0, 1, 2]))
    assert len(engine.tables) == 4
    spent = engine.tables.seconds
    engine.prepare(torch.tensor([2, 1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.tables, "_build", None)  # to build again would fail
        engine.prepare(torch.tensor([2, 1]))
    assert engine.tables.seconds - spent < 0.01
    more = engine.advance(engine.open(samples[0], torch.tensor([[2, 0]] * IMAGES)), 4)
    check(more, truth)
    check(engine.advance(rows, 4), truth)
    assert engine.tables.num_bytes > 0
    with pytest.raises(ValueError, match=r"classes \[3, 5\]"):
        engine.open(samples[0], torch.tensor([[5, 3]] * IMAGES))


def test_refuses_to_score_with_weights_that_have_changed(var, samples):
    trained = copy.deepcopy(var)
    engine, labels = ready(trained), torch.arange(CLASSES).expand(IMAGES, -1)
    engine.open(samples[0], labels)
    with torch.no_grad():
        trained.head.bias.add_(1.0)
    for call in (lambda: engine.open(samples[0], labels), lambda: engine.prepare(labels[0])):
        with pytest.raises(RuntimeError, match="weights have changed since this engine was made"):
            call()
    ready(trained).open(samples[0], labels)


def test_refusals(var, samples):
    engine = ready(var)
    rows = engine.advance(engine.open(samples[0], all_classes()), 3)
    with pytest.raises(ValueError, match="2 lies before scale 3"):
        engine.advance(rows, 2)
    with pytest.raises(ValueError, match="to_scale"):
        engine.advance(rows, 5)
    with pytest.raises(ValueError, match="labels"):
        engine.open(samples[0], torch.arange(CLASSES))
    with pytest.raises(ValueError, match="new sample"):
        engine.fork(rows, samples[1], 0)
    with pytest.raises(ValueError, match="images"):
        engine.fork(rows, samples[1][:2], 1)
    with pytest.raises(ValueError, match="per_token"):
        rows.per_token()
    learning = replace(samples[0], teacher_forcing_input=samples[0].teacher_forcing_input.clone().requires_grad_())
    with pytest.raises(ValueError, match="require grad"):
        engine.open(learning, all_classes())


class CacheMachine(RuleBasedStateMachine):
    """The cache against a model of it: a dictionary from page to [scale, holders, what is written there]."""

    def __init__(self):
        super().__init__()
        self.sizes = (1, 4, 9)
        self.cache = PagedCache(2, 1, 2, self.sizes, max_slots=60)
        self.model: dict[int, list] = {}
        self.limited: set[int] = set()
        self.written = 0

    @rule(first=st.integers(0, 2), scales=st.integers(1, 3), count=st.integers(1, 4), beyond=st.booleans())
    def allocate(self, first, scales, count, beyond):
        wanted = range(first, min(3, first + scales))
        room = self.cache.room(wanted)
        try:
            pages = self.cache.allocate(wanted, count, beyond)
        except MemoryError:
            assert not beyond
            assert room < count
            return
        assert beyond or room >= count
        assert pages.shape == (count, len(wanted))
        for page, scale in zip(pages.flatten().tolist(), [*wanted] * count, strict=True):
            assert page not in self.model
            self.written += 1
            self.model[page] = [scale, 1, self.written]
            for arena in self.cache.arenas:
                arena[page : page + self.sizes[scale]] = self.written
            if not beyond:
                self.limited.add(page)

    @rule(pick=st.integers(0, 100))
    def share(self, pick):
        if self.model:
            page = sorted(self.model)[pick % len(self.model)]
            self.cache.share(torch.tensor([page, -1]))
            self.model[page][1] += 1

    @rule(pick=st.integers(0, 100))
    def release(self, pick):
        if self.model:
            page = sorted(self.model)[pick % len(self.model)]
            self.cache.release(torch.tensor([-1, page]))
            self.model[page][1] -= 1
            if not self.model[page][1]:
                del self.model[page]
                self.limited.discard(page)

    @invariant()
    def no_leak_and_no_alias(self):
        assert self.cache.pages_held == len(self.model)
        assert self.cache.slots_held == sum(self.sizes[scale] for scale, *_ in self.model.values())
        spans = sorted((page, page + self.sizes[scale]) for page, (scale, *_) in self.model.items())
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        assert not spans or spans[-1][1] <= self.cache.capacity
        assert self.cache.slots_held + sum(end - first for first, end in self.cache._gaps) == self.cache.capacity
        assert all(page + self.sizes[self.model[page][0]] <= 60 for page in self.limited)
        for page, (scale, _, value) in self.model.items():
            assert all(arena[page : page + self.sizes[scale]].eq(value).all() for arena in self.cache.arenas)

    @invariant()
    def what_is_free_can_be_had(self):
        if not self.model:
            assert self.cache.room(range(3)) == 60 // sum(self.sizes)


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("prefix", [1, 2, 3])
def test_shared_prefix_reads_the_null_class(var, samples, prefix):
    """Against a dense computation: the class attends to keys and values of the null class before the prefix."""
    engine = ready(var)
    held = engine.cache.pages_held
    rows = engine.open(samples[0], all_classes(), shared_prefix=prefix)
    end = CONFIG.boundaries[prefix]
    by_row = rows.evaluated.sum(1).view(IMAGES, CLASSES)
    assert by_row[:, 0].tolist() == [end - 1] * IMAGES
    assert by_row[:, 1:].eq(0).all()
    assert rows.pages[:, :prefix].view(IMAGES, CLASSES, prefix).unique(dim=1).shape[1] == 1
    rows = engine.advance(rows, CONFIG.num_scales)
    assert rows.log_likelihood[:, :prefix].eq(0).all()
    wanted = shared_prefix_by_hand(var, samples[0], prefix)
    got = rows.log_likelihood[:, prefix:].sum(1).view(IMAGES, CLASSES)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)
    engine.close(rows)
    assert engine.cache.pages_held <= held + 1  # the null class's own page at scale 1 stays


def shared_prefix_by_hand(var, images, prefix):
    """Class rows whose class vectors are, token by token, the null class's before the prefix and their own after it."""
    from varlik.models.var import LAYER_NORM_EPS

    end, labels = CONFIG.boundaries[prefix], torch.arange(CLASSES)
    own, null = var.class_vectors(labels), var.class_vectors(torch.full((CLASSES,), CONFIG.null_class))

    def mixed(a, b):  # (N, C) each -> (N, L, C)
        early = (torch.arange(CONFIG.num_tokens) < end).view(1, -1, 1)
        return torch.where(early, b.unsqueeze(1), a.unsqueeze(1))

    def norm(x, scale, shift):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS) * (1 + scale) + shift

    out = []
    with torch.no_grad():
        for b in range(len(images)):
            words = var.word_embed(images.teacher_forcing_input[b]).expand(CLASSES, -1, -1)
            start = mixed(own.start, null.start)[:, :1] + var.pos_start
            sizes = torch.tensor([p * p for p in PATCH_NUMS])
            x = torch.cat((start, words), 1) + var.lvl_embed.weight.repeat_interleave(sizes, 0) + var.pos_1LC
            for i, block in enumerate(var.blocks):
                vectors = [mixed(own.blocks[:, i, j], null.blocks[:, i, j]) for j in range(6)]
                x = x + vectors[0] * block.attn(norm(x, vectors[2], vectors[4]), CONFIG.boundaries)
                x = x + vectors[1] * block.ffn(norm(x, vectors[3], vectors[5]))
            u = norm(x, mixed(own.head[:, 0], null.head[:, 0]), mixed(own.head[:, 1], null.head[:, 1]))
            target = images.tokens[b].expand(CLASSES, -1).unsqueeze(-1)
            log_prob = var.head(u).log_softmax(-1).gather(-1, target).squeeze(-1)
            out.append(log_prob[:, end:].sum(1))
    return torch.stack(out)


def test_shared_prefix_refusals(var, samples):
    with pytest.raises(ValueError, match="shared_prefix"):
        ready(var).open(samples[0], all_classes(), shared_prefix=4)
    engine = ready(var)
    with pytest.raises(ValueError, match="cannot be forked"):
        engine.fork(engine.open(samples[0], all_classes(), shared_prefix=2), samples[1], 1)
    with pytest.raises(MemoryError, match="shared_prefix"):
        ready(var, max_memory=0).open(samples[0], all_classes(), shared_prefix=2)


def test_memory_is_flat_in_the_number_of_classes(samples, monkeypatch, tmp_path):
    """But for the scores of a row: activations, keys and logits are a chunk's, however many classes there are."""
    var = make_model(replace(CONFIG, num_classes=200))
    engine = Engine(var)
    engine.prepare(torch.arange(200))
    monkeypatch.setitem(memory_module.CHUNK_BYTES, "cpu", 100_000)
    monkeypatch.setattr(memory_module, "CHUNK_TOKENS", 1)

    def peak(classes: int) -> int:
        rows = engine.open(samples[0][:1], torch.arange(classes).unsqueeze(0))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            engine.advance(rows, 4, retain=0)
        profile.export_chrome_trace(str(tmp_path / "trace.json"))
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        return max(itertools.accumulate(e["args"]["Bytes"] for e in events if e["name"] == "[memory]"))

    few, many = peak(50), peak(200)
    assert few > 50_000
    assert many - few < 150 * 64  # indices of the rows still to be scored


def test_arenas_and_chunks_start_as_nan():
    cache = PagedCache(2, 1, 2, (1, 4), max_slots=10)
    page = cache.allocate(range(1, 2), 1)
    assert all(arena.isnan().all() for arena in cache.arenas)
    keys, values, _ = SideBySide(cache, cache.slots(torch.tensor([[0]])), page.new_empty(1, 0), length=5).open(0)
    assert keys.isnan().all()
    assert values.isnan().all()


@pytest.mark.parametrize("in_place", [False, True])
def test_pages_stay_within_the_limit(var, samples, truth, in_place, monkeypatch):
    """However many chunks come and go, and whatever they take while they are at work."""
    monkeypatch.setitem(memory_module.CHUNK_BYTES, "cpu", 1)
    monkeypatch.setattr(memory_module, "CHUNK_TOKENS", 1)
    for memory in (0, 20_000):
        engine = ready(var, in_place, max_memory=memory)
        rows = engine.advance(engine.open(samples[0], all_classes()), 3)
        check(rows, truth)
        assert engine.cache.slots_held <= engine.cache.max_slots
        kept = (rows.cached > 1).sum()
        assert kept == (engine.cache.max_slots - len(engine.tables)) // (CONFIG.boundaries[3] - 1)
        assert engine.cache.capacity <= engine.cache.max_slots + CONFIG.num_tokens


def test_room_of_one_scale_serves_another(var, samples):
    engine = ready(var, max_memory=20_000)
    rows = engine.advance(engine.open(samples[0], all_classes()), 2)
    few = engine.keep(rows, torch.arange(3))
    engine.close(few)
    again = ready(var, max_memory=20_000)
    used, fresh = (e.advance(e.open(samples[0], all_classes()), 3) for e in (engine, again))
    assert (used.cached == 3).sum() == (fresh.cached == 3).sum() > 0


@pytest.mark.parametrize("in_place", [False, True])
def test_scores_are_right_after_arenas_failed_to_grow(var, samples, truth, in_place, monkeypatch):
    engine = ready(var, in_place)
    held = engine.cache.pages_held
    rows = engine.open(samples[0], all_classes())
    new_full, calls = Tensor.new_full, []

    def scarce(self, *args, **kwargs):
        if self.dim() == 4 and self is engine.cache.arenas[1] and not calls:
            calls.append(self)
            raise torch.cuda.OutOfMemoryError("no room for the second arena")
        return new_full(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "new_full", scarce)
    rows = engine.advance(rows, 3)
    assert len(calls) == 1
    check(rows, truth)
    rows = engine.advance(rows, 4)
    check(rows, truth)
    engine.close(rows)
    assert engine.cache.pages_held == held


def test_prepare_goes_on_where_it_was_interrupted(var, samples, truth, monkeypatch):
    engine = Engine(var)
    with monkeypatch.context() as patch:
        patch.setattr(engine.cache, "allocate", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            engine.prepare(torch.arange(3))
    engine.prepare(torch.arange(CLASSES))
    check(engine.advance(engine.open(samples[0], all_classes()), 4), truth)


def test_candidates_that_are_used_up_are_refused(var, samples):
    engine = ready(var)
    held = engine.cache.pages_held
    first = engine.advance(engine.open(samples[0], all_classes()), 3)
    with pytest.raises(ValueError, match="at most once"):
        engine.keep(first, torch.tensor([1, 1]))
    second = engine.keep(first, torch.arange(5))
    third = engine.fork(second, samples[1], 1)
    engine.close(third)
    for old in (first, second, third):
        for call in (engine.close, lambda rows: engine.advance(rows, 4), lambda rows: engine.keep(rows, rows.label)):
            with pytest.raises(ValueError, match="used up"):
                call(old)
    assert engine.cache.pages_held == held


def test_more_refusals(var, samples):
    engine = ready(var)
    for wrong in (-2, CLASSES + 1):
        labels = torch.full((IMAGES, 1), wrong)
        for call in (engine.prepare, lambda x: engine.open(samples[0], x.view(IMAGES, 1))):
            with pytest.raises(ValueError, match=f"from 0 to {CLASSES}"):
                call(labels.flatten())
    with pytest.raises(ValueError, match="another model"):
        engine.open(replace(samples[0], patch_nums=(1, 2)), all_classes())
    rows = engine.open(samples[0], all_classes())
    learning = replace(samples[1], teacher_forcing_input=samples[1].teacher_forcing_input.clone().requires_grad_())
    with pytest.raises(ValueError, match="require grad"):
        engine.fork(rows, learning, 1)
    with pytest.raises(ValueError, match="float16"):
        Engine(copy.deepcopy(var).half())


def test_other_dtypes(var, samples, truth):
    """A float64 model, and a host process whose default is float64."""
    double = copy.deepcopy(var).double()
    engine = ready(double)
    check(engine.advance(engine.open(samples[0], all_classes(), per_token=True), 4), truth)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        engine = ready(var)
        check(engine.advance(engine.open(samples[0], all_classes(), per_token=True), 4), truth)
    finally:
        torch.set_default_dtype(before)


def test_nothing_to_score(var, samples):
    engine = ready(var)
    for count, classes in ((0, CLASSES), (IMAGES, 0)):
        for prefix in (0, 2):
            labels = all_classes()[:count, :classes]
            rows = engine.open(samples[0][:count], labels, shared_prefix=prefix)
            assert len(engine.advance(rows, 4)) == 0
