"""Arithmetic counted from shapes: the published figures to the digit, and what torch counts of live runs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from varlik import flops
from varlik.cascade import AVARC_PLUS, VARC, Cascade
from varlik.models.config import VARConfig, VQVAEConfig
from varlik.models.presets import bundled_folder, get_preset, list_models
from varlik.models.var import VAR
from varlik.models.vqvae import VQVAE

D16 = get_preset("var-d16")
VAR_SMALL = VARConfig(
    depth=3, embed_dim=24, num_heads=2, patch_nums=(1, 2, 3, 5), vocab_size=40, codebook_dim=8, num_classes=6
)
VQVAE_SMALL = VQVAEConfig(
    channels=8, channel_multipliers=(1, 2, 2), num_groups=4, codebook_dim=8, vocab_size=40, patch_nums=(1, 2, 3, 5)
)
SMALL = (VAR_SMALL, VQVAE_SMALL)


def giga(cost):
    return cost.flops.total / 1e9


def test_one_pass_of_the_published_models():
    full, six = flops.class_pass(D16.var), flops.class_pass(D16.var, 6)
    assert f"{full.total / 1e9:.6f}" == "139.971133"
    assert f"{six.total / 1e9:.6f}" == "18.820411"
    assert f"{flops.class_pass(D16.var, 5).total / 1e9:.4f}" == "11.4156"
    parts = {"blocks": 136.90208, "adaln": 0.10066 + 0.00210, "word_embed": 0.02225, "head": 2.85213, "norms": 0.09191}
    for name, expected in full.parts().items():
        assert expected / 1e9 == pytest.approx(parts.get(name, 0), abs=1e-5)
    encoder = flops.encode(D16.vqvae)
    assert f"{encoder.total / 1e9:.6f}" == "107.866341"
    assert encoder.quantiser == 0
    # The encoder without its GroupNorms is what "true" doubles.
    assert f"{flops.encode(D16.vqvae, 'true').encoder / 2e9:.6f}" == "107.565285"


@pytest.mark.parametrize(
    ("cascade", "classes", "printed"),
    [
        (VARC, 100, "14105.0 G"),
        (AVARC_PLUS, 100, "4649.4 G"),
        (Cascade.parse("6:10,10:3,10x3:1"), 100, "4649.4 G"),
        (Cascade.parse("6:10,10:3,10x2:1"), 100, "4229.4 G"),
        (Cascade.parse("6:10,10:3,10x4:1"), 100, "5069.3 G"),
        (Cascade.parse("7:10,10:3,10x3:1"), 100, "5965.8 G"),
        (VARC, 1000, "140079.0 G"),
        (AVARC_PLUS, 1000, "21587.7 G"),
    ],
)
def test_published_cascades(cascade, classes, printed):
    assert str(flops.released(cascade, D16.var, D16.vqvae, classes).flops) == printed


def test_published_cascades_before_rounding():
    assert f"{giga(flops.released(VARC, D16.var, D16.vqvae, 100)):.2f}" == "14104.98"
    assert f"{giga(flops.released(AVARC_PLUS, D16.var, D16.vqvae, 100)):.2f}" == "4649.36"


@pytest.mark.parametrize(
    ("name", "full", "six"),
    [
        ("var-d20", 271.18, 36.46),
        ("var-d24", 466.70, 62.75),
        ("var-d30", 908.49, 122.16),
        ("var-d36", 5158.2, 338.5),
    ],
)
def test_linear_layers_of_the_larger_models(name, full, six):
    """The known figures hold every linear layer, AdaLN's too, but no LayerNorm."""
    for scales, expected in ((10, full), (6, six)):
        cost = flops.class_pass(get_preset(name).var, scales)
        assert (cost.total - cost.norms) / 1e9 == pytest.approx(expected, rel=2e-4)


def test_attended_pairs():
    assert flops.attended_pairs(D16.var.patch_nums) == 286434
    assert flops.attended_pairs(D16.var.patch_nums, 6) == 5278
    assert flops.attended_pairs(get_preset("var-d36").var.patch_nums) == 3269850
    level = torch.tensor([k for k, p in enumerate(VAR_SMALL.patch_nums) for _ in range(p * p)])
    assert flops.attended_pairs(VAR_SMALL.patch_nums) == int((level[None] <= level[:, None]).sum())


def test_engine_does_only_what_is_unique():
    cost = flops.engine(AVARC_PLUS, D16.var, D16.vqvae, 100)
    # 4041.2 is the floor of reuse between stages alone; position 0, AdaLN and embeddings per class come off that.
    assert giga(cost) <= 4042
    assert f"{giga(cost):.1f}" == "4008.0"
    assert [(step.name, step.rows) for step in cost.steps] == [
        ("encode", 0),
        ("6:10", 100),
        ("10:3", 10),
        ("10x3:1", 6),
    ]
    config, block = D16.var, 16 * 12 * 1024**2
    rows_of_tokens = 100 * 90 + 10 * (680 - 91) + 3 * 2 * 679
    assert cost.flops.blocks == rows_of_tokens * block
    assert cost.flops.head == rows_of_tokens * 4096 * 1024
    assert cost.flops.word_embed == 3 * 679 * 32 * 1024  # once a sample, whatever the number of classes
    assert cost.flops.adaln == 0
    assert flops.class_table(config, 100) == 100 * flops.class_pass(config, 1)
    for convention in flops.CONVENTIONS:
        ours, theirs = (
            way(VARC, config, D16.vqvae, 100, convention).flops.total for way in (flops.engine, flops.released)
        )
        table = flops.class_table(config, 100, convention).total
        assert theirs == ours + table + 99 * flops._word_embed(config, 1, 10, convention).total


def test_engine_scores_nothing_twice():
    var, vqvae = SMALL
    once = flops.engine(Cascade.parse("4:1"), var, vqvae, 6)
    again = flops.engine(Cascade.parse("2:6,4:6,4:1"), var, vqvae, 6)
    assert once.flops == again.flops
    assert [step.rows for step in again.steps] == [0, 6, 6, 0]
    # A sample of an earlier stage goes on as well: noise is the same in every stage.
    smooth = flops.engine(Cascade.parse("2x3:6,4x3:1"), var, vqvae, 6, "true")
    assert smooth.flops == flops.engine(Cascade.parse("4x3:1"), var, vqvae, 6, "true").flops
    # Scale 1 comes from the table.
    assert flops.engine(Cascade.parse("1:1"), var, vqvae, 6).steps[1].flops == flops.Flops()


def test_a_cascade_may_keep_more_classes_than_there_are():
    for way in (flops.released, flops.engine):
        assert way(Cascade.parse("2:5,4:1"), *SMALL, 2).steps[2].rows == 2


@pytest.mark.parametrize("config", [VAR_SMALL, replace(VAR_SMALL, shared_aln=True)])
@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_true_convention_is_what_torch_counts(config, backend, mode):
    var = VAR(config).eval()
    var.reset_parameters(gate=0.1)
    x = torch.randn(2, config.num_tokens - 1, config.codebook_dim)
    labels = torch.tensor([0, 3])
    for scales in range(1, config.num_scales + 1):

        def run(scales=scales):
            with mode():
                var(var.class_vectors(labels), x, scales)

        with sdpa_kernel(backend):
            assert flops.count_live(run) == 2 * flops.class_pass(config, scales, "true").total


@pytest.mark.parametrize("attention", ["deepest level and mid", "mid only"])
def test_encoder_and_quantiser_are_what_torch_counts(attention):
    config = replace(VQVAE_SMALL, attention=attention)
    vqvae = VQVAE(config, decoder=False).eval()
    pixels = torch.zeros(1, 3, config.resolution, config.resolution)
    with torch.no_grad():
        feature_map = vqvae.encode(pixels)
        cost = flops.encode(config, "true")
        assert flops.count_live(lambda: vqvae.encode(pixels)) == cost.encoder
        assert flops.count_live(lambda: vqvae.quantize.tokenize(feature_map)) == cost.quantiser


def test_encoder_norms_in_the_paper_convention():
    vqvae = VQVAE(VQVAE_SMALL, decoder=False).eval()
    seen = []
    for module in vqvae.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.register_forward_hook(lambda module, args, out: seen.append(out.numel()))
    with torch.no_grad():
        vqvae.encode(torch.zeros(1, 3, VQVAE_SMALL.resolution, VQVAE_SMALL.resolution))
    true = flops.encode(VQVAE_SMALL, "true").encoder
    assert flops.encode(VQVAE_SMALL).encoder == true // 2 + 5 * sum(seen)


def test_count_live_counts_a_matmul_and_fused_attention():
    a = torch.zeros(3, 4)
    assert flops.count_live(lambda: a @ a.T) == 2 * 3 * 4 * 3
    q, k = torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 7, 8)
    assert flops.count_live(lambda: F.scaled_dot_product_attention(q, k, k)) == 2 * 2 * 2 * 2 * 5 * 7 * 8


def test_flops_add_scale_and_print():
    some = flops.Flops(blocks=2, head=3)
    assert (some + 2 * some).parts() == (some * 3).parts()
    assert (some.total, some.as_dict()["total"]) == (5, 5)
    assert str(flops.Flops(encoder=1_234_567_890)) == "1.2 G"


def test_wrong_input():
    with pytest.raises(ValueError, match="num_scales: expected 1 to 4, got 5"):
        flops.class_pass(VAR_SMALL, 5)
    with pytest.raises(ValueError, match="convention: expected 'paper' or 'true', got 'macs'"):
        flops.class_pass(VAR_SMALL, convention="macs")
    with pytest.raises(ValueError, match="'macs'"):
        flops.encode(VQVAE_SMALL, "macs")
    for classes in (0, 7):
        for call in (
            lambda n=classes: flops.class_table(VAR_SMALL, n),
            lambda n=classes: flops.released(VARC, *SMALL, n),
            lambda n=classes: flops.engine(VARC, *SMALL, n),
        ):
            with pytest.raises(ValueError, match=f"classes: expected 1 to 6, got {classes}"):
                call()


def test_configurations_by_name_and_folder(tmp_path):
    for name in list_models():
        preset = get_preset(name)
        assert flops.configs_of(name) == (preset.var, preset.vqvae)
    assert flops.configs_of(str(bundled_folder("fashion-mnist"))) == flops.configs_of("fashion-mnist")
    with pytest.raises(FileNotFoundError, match=r"var\.safetensors"):
        flops.configs_of(str(tmp_path))
    (tmp_path / "var.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"var\.safetensors"):
        flops.configs_of(str(tmp_path))


def test_command_prints_the_published_figures(run):
    code, out, err = run("flops", "var-d16", "--classes", 100, "--cascade", "avarc+")
    assert (code, err) == (0, "")
    for figure in ("4649.4", "4008.0", "107.9", "30.842"):
        assert figure in out
    assert "14105.0" in run("flops", "var-d16", "--classes", 100)[1]
    assert "140079.0" in run("flops", "var-d16")[1]


def test_command_json(run):
    code, out, _ = run("flops", "var-d16", "--classes", 100, "--cascade", "6:10,10:3,10x3:1", "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["cascade"] == "6:10,10:3,10x3:1"
    for way, convention in ((way, kind) for way in ("released", "engine") for kind in flops.CONVENTIONS):
        cost = answer[way][convention]
        assert cost["total"] == sum(step["total"] for step in cost["steps"])
        expected = getattr(flops, way)(AVARC_PLUS, D16.var, D16.vqvae, 100, convention)
        assert cost["total"] == expected.flops.total
    assert answer["class_table"]["paper"]["total"] == flops.class_table(D16.var, 100).total
    assert answer["units"] == {"paper": "multiply-adds", "true": "FLOPs"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("var-d17",), "var-d1"),
        (("fashion-mnist", "--classes", 0), "got 0"),
        (("fashion-mnist", "--classes", 11), "1 to 10"),
        (("fashion-mnist", "--cascade", "7:1"), "7 scales"),
        (("fashion-mnist", "--cascade", "3:2,6:5,6:1"), "narrows"),
        (("fashion-mnist", "--cascade", "3"), "'3'"),
    ],
)
def test_wrong_options_exit_2_with_one_line(run, arguments, message):
    code, out, err = run("flops", *arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert message in err
