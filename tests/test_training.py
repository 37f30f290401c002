"""Training learns, keeps codes in use, and resumes bit for bit."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

from varlik.models.config import VARConfig, VQVAEConfig
from varlik.training.loop import LoopConfig, batch_indices, learning_rate
from varlik.training.var import contrast_var, feature_maps, train_var
from varlik.training.vqvae import FEATURE_STD, rescale_features, train_vqvae

PATCH_NUMS = (1, 2)
VQ = VQVAEConfig(
    channels=8, channel_multipliers=(1, 1), num_res_blocks=1, num_groups=4, in_channels=1, attention="mid only",
    codebook_dim=4, vocab_size=16, patch_nums=PATCH_NUMS,
)  # fmt: skip
VAR = VARConfig(depth=1, embed_dim=16, num_heads=2, patch_nums=PATCH_NUMS, vocab_size=16, codebook_dim=4, num_classes=2)


def pictures(n=64):
    """Two classes: bright left half, bright top half, with noise. (n, 1, 4, 4) and labels (n,)."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 2
    pixels = -0.8 * torch.ones(n, 1, 4, 4)
    pixels[labels == 0, :, :, :2] = 0.8
    pixels[labels == 1, :, :2, :] = 0.8
    return (pixels + 0.1 * torch.randn(pixels.shape, generator=generator)).clamp(-1, 1), labels


def loop(steps, **changes):
    values = {"batch_size": 16, "learning_rate": 5e-3, "warmup": 5, "checkpoint_every": 10, "log_every": 10, "seed": 3}
    return LoopConfig(steps=steps, **(values | changes))


@pytest.fixture(scope="module")
def vqvae(tmp_path_factory):
    pixels, _ = pictures()
    return train_vqvae(pixels, VQ, loop(150), tmp_path_factory.mktemp("vqvae"), quiet=True)


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
        model = train_vqvae(pixels, VQ, loop(150), tmp_path / name, restarts_until=until, quiet=True)
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


def test_var_learns_the_class(vqvae, tmp_path):
    pixels, labels = pictures()
    features = feature_maps(vqvae, pixels)
    var = train_var(features, labels, vqvae.quantize, VAR, loop(120), tmp_path, quiet=True)
    tokens, inputs = vqvae.quantize.tokenize(features)
    with torch.no_grad():
        scores = torch.stack(
            [
                var(var.class_vectors(torch.full_like(labels, y)), inputs)
                .log_softmax(-1)
                .gather(-1, tokens[..., None])
                .sum((1, 2))
                for y in range(2)
            ],
            dim=1,
        )
    assert (scores.argmax(1) == labels).double().mean() > 0.95
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.6 * losses[0]


def test_contrast_widens_margins_and_keeps_a_likelihood(vqvae, tmp_path):
    pixels, labels = pictures()
    labels = labels.clone()
    labels[:6] = 1 - labels[:6]  # some wrong labels, so that there is something to be mistaken about
    features = feature_maps(vqvae, pixels)
    tokens, inputs = vqvae.quantize.tokenize(features)
    var = train_var(features, labels, vqvae.quantize, VAR, loop(40), tmp_path / "var", quiet=True)

    def margins():
        with torch.no_grad():
            rows = [var(var.class_vectors(torch.full_like(labels, y)), inputs).log_softmax(-1) for y in range(2)]
        scores = torch.stack([row.gather(-1, tokens[..., None]).sum((1, 2)) for row in rows], dim=1)
        return (scores.gather(1, labels[:, None]) - scores.gather(1, 1 - labels[:, None])).squeeze(1)

    before = margins()
    same = contrast_var(
        var, features, labels, vqvae.quantize, loop(40), tmp_path / "contrast", weight=1.0, temperature=1.0, quiet=True
    )
    assert same is var
    assert torch.nn.functional.softplus(-margins()).mean() < torch.nn.functional.softplus(-before).mean()
    assert "confusion" not in var.state_dict()
    last = json.loads((tmp_path / "contrast" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["loss"] == pytest.approx(last["nats_per_token"] + last["contrast"], rel=1e-5)
    assert last["nats_per_token"] < 1.1 * torch.log(torch.tensor(16.0)).item()


def test_stop_leaves_the_schedule_alone(vqvae, tmp_path):
    pixels, labels = pictures()
    features = feature_maps(vqvae, pixels)
    train_var(features, labels, vqvae.quantize, VAR, loop(40, stop=20), tmp_path, quiet=True)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [10, 20]
    assert records[-1]["lr_share"] == pytest.approx(learning_rate(loop(40), 19))


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_killed_and_resumed_equals_uninterrupted(vqvae, tmp_path, average, monkeypatch):
    pixels, labels = pictures()
    features = feature_maps(vqvae, pixels)
    config = loop(30, average=average)

    def run(folder):
        return train_var(features, labels, vqvae.quantize, VAR, config, folder, quiet=True).state_dict()

    whole = run(tmp_path / "whole")

    import varlik.training.var as module

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


def test_checkpoint_of_another_configuration_is_refused(vqvae, tmp_path):
    pixels, labels = pictures()
    features = feature_maps(vqvae, pixels)
    train_var(features, labels, vqvae.quantize, VAR, loop(10), tmp_path, quiet=True)
    with pytest.raises(ValueError, match="another learning_rate"):
        train_var(features, labels, vqvae.quantize, VAR, loop(10, learning_rate=1.0), tmp_path, quiet=True)


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
