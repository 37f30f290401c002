"""Weights in and out: every layout of files in the wild, and every way a file can be wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from varlik.models import checkpoints, presets
from varlik.models.checkpoints import CheckpointError, convert, load_models, save
from varlik.models.config import Preprocessing, VARConfig, VQVAEConfig, from_metadata, to_metadata
from varlik.models.presets import Preset, imagenet_class_names
from varlik.models.var import VAR
from varlik.models.vqvae import VQVAE

CASES = ("adaln", "shared_adaln")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No test talks to the Hub, and none sees the user's cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def golden(data):
    def paths(name: str) -> tuple[Path, Path]:
        return data / f"{name}.var.safetensors", data / f"{name}.vqvae.safetensors"

    return paths


def copy_folder(paths, folder: Path) -> Path:
    folder.mkdir(parents=True)
    shutil.copy(paths[0], folder / "var.safetensors")
    shutil.copy(paths[1], folder / "vqvae.safetensors")
    return folder


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(str(path), "pt") as file:
        return file.metadata()


def prefixed(tensors, prefix: str):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def check_parity(loaded, data, name: str) -> None:
    """The loaded pair gives what the original modules gave."""
    expected = load_file(data / f"{name}.expected.safetensors")
    with torch.no_grad():
        feature_map = loaded.vqvae.encode(expected["image"])
        tokens, inputs = loaded.vqvae.quantize.tokenize(feature_map)
        labels = torch.arange(loaded.null_class + 1)
        vectors = loaded.var.class_vectors(labels)
        log_prob = torch.stack(
            [
                loaded.var(vectors, x.expand(len(labels), -1, -1))
                .log_softmax(-1)
                .gather(-1, t.expand(len(labels), -1).unsqueeze(-1))[..., 0]
                for x, t in zip(inputs.unsqueeze(1), tokens, strict=True)
            ]
        )
    assert (feature_map - expected["feature_map"]).abs().max() < 1e-4
    assert torch.equal(tokens, expected["tokens"])
    assert (log_prob - expected["token_log_prob"]).abs().max() < 2e-4


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def tiny_pair(**changes) -> tuple[VAR, VQVAE]:
    """A random pair with a decoder, far from every default."""
    scales = (1, 2, 4)
    var = VARConfig(2, 32, 2, scales, vocab_size=24, codebook_dim=8, num_classes=3, **changes)
    vqvae = VQVAEConfig(
        channels=16,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        num_groups=8,
        in_channels=1,
        attention="mid only",
        codebook_dim=8,
        vocab_size=24,
        patch_nums=scales,
    )
    torch.manual_seed(0)
    return VAR(var), VQVAE(vqvae)


# --- What loads ---


@pytest.mark.parametrize("name", CASES)
def test_folder(name, golden, data, tmp_path):
    loaded = load_models(copy_folder(golden(name), tmp_path / "my model"))
    check_parity(loaded, data, name)
    assert loaded.name == "my model"
    assert loaded.class_names == tuple(map(str, range(loaded.var.config.num_classes)))
    assert loaded.preprocessing == Preprocessing.imagenet(loaded.vqvae.config.resolution)
    assert not loaded.vqvae.has_decoder
    for module in (loaded.var, loaded.vqvae):
        assert not module.training
        assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in module.parameters())
        assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in module.parameters())


LAYOUTS = {
    "flat": lambda var, vqvae: (var, vqvae),
    "training run": lambda var, vqvae: (
        {"trainer": {"config": {"a": 1}, "vae_local": vqvae, "var_wo_ddp": var, "var_opt": {}}, "epoch": 3},
        {"trainer": {"vae_local": vqvae}},
    ),
    "trainer": lambda var, vqvae: ({"trainer": var}, {"trainer": vqvae}),
    "var_wo_ddp": lambda var, vqvae: ({"var_wo_ddp": var}, {"vae_local": vqvae}),
    "model": lambda var, vqvae: ({"model": var, "step": 7}, {"model": vqvae}),
    "state_dict": lambda var, vqvae: ({"state_dict": var}, {"state_dict": vqvae}),
    "_orig_mod": lambda var, vqvae: (prefixed(var, "_orig_mod."), prefixed(vqvae, "_orig_mod.")),
    "module": lambda var, vqvae: (prefixed(var, "module."), prefixed(vqvae, "module.")),
    "repeated": lambda var, vqvae: (
        {"trainer": {"var_wo_ddp": prefixed(var, "module._orig_mod.module.")}},
        prefixed(vqvae, "_orig_mod.module."),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_pickled_layouts(name, layout, golden, data, tmp_path):
    """Configuration and schedule come from the tensors: such a file has no metadata."""
    var, vqvae = LAYOUTS[layout](*map(load_file, golden(name)))
    torch.save(var, tmp_path / "ar-ckpt-best.pth")
    torch.save(vqvae, tmp_path / "vq.pth")
    loaded = load_models(tmp_path / "ar-ckpt-best.pth", vqvae=str(tmp_path / "vq.pth"))
    assert loaded.var.config == from_metadata(metadata_of(golden(name)[0]))[0]
    assert loaded.vqvae.config == from_metadata(metadata_of(golden(name)[0]))[1]
    assert loaded.name == "ar-ckpt-best"
    check_parity(loaded, data, name)


def test_old_style_pickle(golden, data, tmp_path):
    torch.save(load_file(golden("adaln")[0]), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    check_parity(load_models(tmp_path / "old.pt", vqvae=golden("adaln")[1]), data, "adaln")


@pytest.mark.parametrize("name", CASES)
def test_single_safetensors_file(name, golden, data):
    var, vqvae = golden(name)
    check_parity(load_models(str(var), vqvae=str(vqvae)), data, name)


def test_foreign_metadata_is_passed_over(golden, data, tmp_path):
    save_file(load_file(golden("adaln")[0]), tmp_path / "model.safetensors", {"format": "pt"})
    check_parity(load_models(tmp_path / "model.safetensors", vqvae=golden("adaln")[1]), data, "adaln")


def test_vqvae_is_found_beside_the_file_and_inside_a_training_run(golden, data, tmp_path):
    var, vqvae = map(load_file, golden("adaln"))
    torch.save(var, tmp_path / "a.pth")
    with pytest.raises(FileNotFoundError, match=r"VQ-VAE is not beside it .* vqvae="):
        load_models(tmp_path / "a.pth")
    torch.save(vqvae, tmp_path / "vae_ch160v4096z32.pth")
    check_parity(load_models(tmp_path / "a.pth"), data, "adaln")
    (tmp_path / "b").mkdir()
    torch.save({"trainer": {"var_wo_ddp": var, "vae_local": vqvae}}, tmp_path / "b" / "run.pth")
    check_parity(load_models(tmp_path / "b" / "run.pth"), data, "adaln")


def test_vqvae_argument_goes_first(golden, data, tmp_path):
    folder = copy_folder(golden("adaln"), tmp_path / "m")
    changed = {name: tensor + 1 for name, tensor in load_file(golden("adaln")[1]).items()}
    save_file(changed, folder / "vqvae.safetensors", metadata_of(golden("adaln")[1]))
    check_parity(load_models(folder, vqvae=golden("adaln")[1]), data, "adaln")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_storage_becomes_float32(dtype, golden, tmp_path):
    tensors = load_file(golden("adaln")[0])
    stored = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    torch.save(stored, tmp_path / "a.pth")
    loaded = load_models(tmp_path / "a.pth", vqvae=golden("adaln")[1])
    assert loaded.var.head.weight.dtype == torch.float32
    assert torch.equal(loaded.var.head.weight, stored["head.weight"].float())


def test_derived_buffers_may_be_there_or_not(golden, data, tmp_path):
    var, vqvae = golden("adaln")
    tensors = load_file(var)
    assert {"lvl_1L", "attn_bias_for_masking", "blocks.0.attn.zero_k_bias"} <= tensors.keys()
    kept = {n: t for n, t in tensors.items() if n not in ("lvl_1L", "attn_bias_for_masking") and "zero_k" not in n}
    save_file(kept, tmp_path / "var.safetensors", metadata_of(var))
    save_file(
        {**load_file(vqvae), "quantize.beta": torch.tensor(0.25)}, tmp_path / "vqvae.safetensors", metadata_of(vqvae)
    )
    check_parity(load_models(tmp_path), data, "adaln")


@pytest.mark.parametrize("l2_norm", [True, False])
def test_configuration_of_an_imagenet_schedule_is_inferred(l2_norm, tmp_path):
    config = VARConfig(2, 64, 1, presets.SCHEDULES[256], num_classes=10, attn_l2_norm=l2_norm)
    small = VQVAEConfig(channels=32, channel_multipliers=(1, 1, 1, 1, 2), num_res_blocks=1)
    torch.manual_seed(0)
    torch.save(VAR(config).state_dict(), tmp_path / "var.pth")
    torch.save(VQVAE(small, decoder=False).state_dict(), tmp_path / "vae.pth")
    loaded = load_models(tmp_path / "var.pth", vqvae=tmp_path / "vae.pth")
    assert loaded.var.config == config
    assert loaded.vqvae.config == small
    assert loaded.class_names == tuple("0123456789")
    with pytest.raises(FileNotFoundError, match=r"vae_ch160v4096z32\.pth"):  # the public one could be meant
        load_models(tmp_path / "var.pth")


def test_imagenet_names_for_a_thousand_classes(tmp_path):
    var, vqvae = tiny_pair()
    config = dataclasses.replace(var.config, num_classes=1000)
    metadata = to_metadata(config, vqvae.config)
    save_file(VAR(config).state_dict(), tmp_path / "var.safetensors", metadata)
    save_file(vqvae.state_dict(), tmp_path / "vqvae.safetensors", metadata)
    loaded = load_models(tmp_path)
    assert loaded.class_names == imagenet_class_names()
    assert loaded.null_class == 1000


def test_metadata_of_the_vqvae_serves_a_transformer_without(tmp_path):
    var, vqvae = tiny_pair()
    save(tmp_path, var, vqvae, ("a", "b", "c"), Preprocessing(6, 6, padding=1, channels=1))
    torch.save({**var.state_dict(), "lvl_1L": torch.tensor([[0] + [1] * 4 + [2] * 16])}, tmp_path / "run.pth")
    loaded = load_models(tmp_path / "run.pth")
    assert loaded.class_names == ("a", "b", "c")
    assert loaded.preprocessing.padding == 1


# --- What is written ---


@pytest.mark.parametrize("shared", [False, True])
def test_round_trip(shared, tmp_path):
    var, vqvae = tiny_pair(shared_aln=shared, attn_l2_norm=not shared)
    preprocessing = Preprocessing(resize=6, crop=6, padding=1, channels=1)
    save(tmp_path / "a" / "b", var, vqvae, ("T-shirt/top", "été", "a, b"), preprocessing)
    loaded = load_models(tmp_path / "a" / "b")
    assert loaded.var.config == var.config
    assert loaded.vqvae.config == vqvae.config
    assert loaded.vqvae.config.attention == "mid only"
    assert loaded.class_names == ("T-shirt/top", "été", "a, b")
    assert loaded.preprocessing == preprocessing
    assert loaded.vqvae.has_decoder
    assert same_weights(loaded.var, var)
    assert same_weights(loaded.vqvae, vqvae)
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["var.safetensors", "vqvae.safetensors"]


def test_saving_does_not_touch_what_was_loaded_from_there(tmp_path):
    var, vqvae = tiny_pair()
    save(tmp_path, var, vqvae, "abc", Preprocessing(8, 8, channels=1))
    loaded = load_models(tmp_path)
    with torch.no_grad():
        var.head.bias.add_(1)
        loaded.var.pos_start.add_(1)
    save(tmp_path, var, vqvae, "abc", Preprocessing(8, 8, channels=1))
    assert torch.equal(loaded.var.head.bias + 1, var.head.bias)
    assert same_weights(load_models(tmp_path).var, var)


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_files_follow_the_umask(tmp_path):
    before = os.umask(0o022)
    try:
        save(tmp_path, *tiny_pair(), "abc", Preprocessing(8, 8, channels=1))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "var.safetensors").stat().st_mode) == 0o644


def test_half_precision_storage(tmp_path):
    var, vqvae = tiny_pair()
    save(tmp_path, var, vqvae, "abc", Preprocessing(8, 8, channels=1), dtype=torch.float16)
    assert load_file(tmp_path / "var.safetensors")["head.weight"].dtype == torch.float16
    assert torch.equal(load_models(tmp_path).var.head.weight, var.head.weight.half().float())
    with torch.no_grad():
        var.head.bias[0] = 1e5
    with pytest.raises(CheckpointError, match=r"not finite as torch\.float16: head\.bias"):
        save(tmp_path / "b", var, vqvae, "abc", Preprocessing(8, 8, channels=1), dtype=torch.float16)
    assert not (tmp_path / "b").exists()


def test_save_refuses_parts_that_do_not_belong_together(tmp_path):
    var, vqvae = tiny_pair()
    right = Preprocessing(8, 8, channels=1)
    with pytest.raises(ValueError, match="2 class_names for 3 classes"):
        save(tmp_path, var, vqvae, "ab", right)
    with pytest.raises(ValueError, match="3 channels of 8 pixels"):
        save(tmp_path, var, vqvae, "abc", Preprocessing(8, 8))
    with pytest.raises(ValueError, match="dtype"):
        save(tmp_path, var, vqvae, "abc", right, dtype=torch.float64)
    other = VQVAE(dataclasses.replace(vqvae.config, vocab_size=25))
    with pytest.raises(ValueError, match="vocab_size is 25, the transformer's is 24"):
        save(tmp_path, var, other, "abc", right)
    assert not list(tmp_path.iterdir())


def test_convert(golden, data, tmp_path):
    torch.save({"trainer": {"var_wo_ddp": load_file(golden("adaln")[0])}}, tmp_path / "run.pth")
    convert(tmp_path / "run.pth", tmp_path / "out", vqvae=golden("adaln")[1])
    check_parity(load_models(tmp_path / "out"), data, "adaln")


# --- What is refused ---


class Touch:
    """Creates a file when unpickled by an unsafe reader."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("new_format", [True, False])
def test_pickles_with_code_are_refused(new_format, tmp_path):
    victim = tmp_path / "touched"
    evil = {"word_embed.weight": torch.zeros(2), "extra": Touch(victim)}
    torch.save(evil, tmp_path / "evil.pth", _use_new_zipfile_serialization=new_format)
    with pytest.raises(CheckpointError, match=r"evil\.pth: refused, because reading it would run code .*safetensors"):
        load_models(tmp_path / "evil.pth")
    assert not victim.exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)  # the file is as dangerous as it claims
    assert victim.exists()


def test_bare_pickle_is_not_run_either(tmp_path):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Touch(tmp_path / "touched"), protocol=2))
    with pytest.raises(CheckpointError, match=r"evil\.pth"):
        load_models(tmp_path / "evil.pth")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 99, b"PK\x03\x04" + b"\x00" * 99, b"\x80\x02}q\x00.", "cut"])
def test_garbage_is_refused_by_name(suffix, content, golden, tmp_path):
    path = tmp_path / f"bad{suffix}"
    if content == "cut":
        if suffix == ".safetensors":
            shutil.copy(golden("adaln")[0], path)
        else:
            torch.save(load_file(golden("adaln")[0]), path)
        content = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="bad" + suffix.replace(".", r"\.")):
        load_models(path, vqvae=golden("adaln")[1])


def test_swapped_files(golden, tmp_path):
    var, vqvae = golden("adaln")
    with pytest.raises(CheckpointError, match="is a VQ-VAE, not a VAR transformer"):
        load_models(vqvae, vqvae=var)
    with pytest.raises(CheckpointError, match="is a VAR transformer, not a VQ-VAE"):
        load_models(var, vqvae=var)
    with pytest.raises(CheckpointError, match="is a VQ-VAE, not a VAR transformer"):
        load_models(copy_folder((vqvae, var), tmp_path / "swapped"))


def test_a_wrong_pair(golden):
    with pytest.raises(CheckpointError, match=r"128 codes of 16 numbers.*shape \(96, 8\).*do not belong together"):
        load_models(golden("adaln")[0], vqvae=golden("shared_adaln")[1])


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("tok_embeddings.weight", "layers.0.attention.wqkv.weight"), "LlamaGen or RandAR transformer"),
        (("encoder.conv_blocks.0.res.0.conv1.weight", "quantize.embedding.weight"), "VQ tokenizer with one scale"),
    ],
)
def test_models_of_other_families(names, kind, golden, tmp_path):
    torch.save({"model": dict.fromkeys(names, torch.zeros(2))}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=f"{kind}.*not a VAR transformer"):
        load_models(tmp_path / "other.pt", vqvae=golden("adaln")[1])
    with pytest.raises(CheckpointError, match=f"{kind}.*not a VQ-VAE"):
        load_models(golden("adaln")[0], vqvae=tmp_path / "other.pt")


@pytest.mark.parametrize("tree", [{}, [torch.zeros(2)], torch.zeros(2), {"trainer": {}}, {"trainer": {"opt": 1}}])
def test_files_without_tensors_of_ours(tree, tmp_path):
    torch.save(tree, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth does not hold a VAR transformer: it has no tensors"):
        load_models(tmp_path / "x.pth")


def test_cyclic_pickle(tmp_path):
    tree: dict = {}
    tree["trainer"] = tree
    torch.save(tree, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="does not hold"):
        load_models(tmp_path / "x.pth")


def test_every_differing_tensor_is_listed(golden, tmp_path):
    folder = copy_folder(golden("adaln"), tmp_path / "m")
    tensors = load_file(folder / "var.safetensors")
    tensors["head.bias"] = torch.zeros(5)
    tensors["lvl_embed.weight"] = torch.zeros(4, 128, dtype=torch.int64)
    tensors["pos_2LC"] = tensors.pop("pos_1LC")
    for i in range(10):
        tensors[f"odd.{i}"] = torch.zeros(1)
    save_file(tensors, folder / "var.safetensors", metadata_of(golden("adaln")[0]))
    with pytest.raises(CheckpointError) as caught:
        load_models(folder)
    message = str(caught.value)
    assert "var.safetensors does not fit its metadata" in message
    assert "missing: pos_1LC" in message
    assert "and 3 more" in message
    assert "head.bias (expected (128,), found (5,))" in message
    assert "lvl_embed.weight (expected plain floats, found torch.int64" in message


def test_not_finite(golden, tmp_path):
    folder = copy_folder(golden("adaln"), tmp_path / "m")
    tensors = load_file(folder / "var.safetensors")
    tensors["head.bias"][3] = float("nan")
    tensors["blocks.1.ffn.fc1.bias"][0] = float("inf")
    save_file(tensors, folder / "var.safetensors", metadata_of(golden("adaln")[0]))
    with pytest.raises(CheckpointError, match=r"not finite: blocks\.1\.ffn\.fc1\.bias, head\.bias$"):
        load_models(folder)
    tensors = {name: t.double() if t.is_floating_point() else t for name, t in load_file(golden("adaln")[0]).items()}
    tensors["head.bias"][0] = 1e300  # finite in the file, not in float32
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"not finite: head\.bias$"):
        load_models(tmp_path / "x.pth", vqvae=golden("adaln")[1])


def test_unknown_schedule_asks_for_metadata(golden, tmp_path):
    tensors = load_file(golden("adaln")[0])
    del tensors["lvl_1L"]
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"30 tokens in 4 scales are no schedule.*to_metadata"):
        load_models(tmp_path / "x.pth", vqvae=golden("adaln")[1])


def test_groups_that_cannot_be_guessed(golden, tmp_path):
    var, vqvae = tiny_pair()
    levels = torch.tensor([[0] + [1] * 4 + [2] * 16])
    torch.save({**var.state_dict(), "lvl_1L": levels}, tmp_path / "x.pth")
    torch.save(vqvae.state_dict(), tmp_path / "vae.pth")
    with pytest.raises(CheckpointError, match=r"vae\.pth.*num_groups 32 does not divide 16.*to_metadata"):
        load_models(tmp_path / "x.pth", vqvae=tmp_path / "vae.pth")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"depth": None}, "metadata lacks depth"),
        ({"embed_dim": "wide"}, "metadata key embed_dim"),
        ({"num_heads": '"2"'}, "num_heads: expected a positive whole number, got '2'"),
        ({"patch_nums": "null"}, "metadata cannot be understood"),
        ({"class_names": '["a"]'}, "1 class_names for 7 classes"),
        ({"class_names": "[]"}, "0 class_names for 7 classes"),
        ({"preprocessing": '{"side": 3}'}, "metadata cannot be understood"),
        ({"preprocessing": '{"resize": 32, "crop": 32}'}, "3 channels of 32 pixels"),
        ({"depth": "3"}, "the file has 2 blocks, its metadata has 3"),
        ({"depth": "999999999"}, "the file has 2 blocks"),
        ({"patch_nums": "[1, 2, 3, 5]"}, r"the file has scales \(1, 2, 3, 4\)"),
        ({"num_classes": "9"}, r"class_emb\.weight \(expected \(10, 128\), found \(8, 128\)\)"),
        ({"shared_aln": "True"}, r"missing: shared_ada_lin"),
    ],
)
def test_wrong_metadata(change, match, golden, tmp_path):
    folder = copy_folder(golden("adaln"), tmp_path / "m")
    metadata = {k: v for k, v in {**metadata_of(golden("adaln")[0]), **change}.items() if v is not None}
    save_file(load_file(golden("adaln")[0]), folder / "var.safetensors", metadata)
    with pytest.raises(CheckpointError, match=match):
        load_models(folder)


def test_missing_scale_mul(golden, data, tmp_path):
    folder = copy_folder(golden("adaln"), tmp_path / "m")
    tensors = {name: t for name, t in load_file(golden("adaln")[0]).items() if "scale_mul" not in name}
    save_file(tensors, folder / "var.safetensors", metadata_of(golden("adaln")[0]))
    with pytest.raises(CheckpointError, match=r"first upload of var_d16\.pth(.|\n)*attn_l2_norm=False"):
        load_models(folder)
    torch.save(tensors, tmp_path / "x.pth")  # without metadata the file is what its tensors say
    config = load_models(tmp_path / "x.pth", vqvae=golden("adaln")[1]).var.config
    assert not config.attn_l2_norm
    assert config.num_heads == 2


def test_incomplete_decoder_is_named(tmp_path):
    var, vqvae = tiny_pair()
    save(tmp_path, var, vqvae, "abc", Preprocessing(8, 8, channels=1))
    metadata = metadata_of(tmp_path / "vqvae.safetensors")
    tensors = load_file(tmp_path / "vqvae.safetensors")
    del tensors["decoder.conv_out.bias"]
    save_file(tensors, tmp_path / "vqvae.safetensors", metadata)
    with pytest.raises(CheckpointError, match=r"does not fit the VQ-VAE of (.|\n)*missing: decoder\.conv_out\.bias"):
        load_models(tmp_path)
    tensors = {n: t for n, t in tensors.items() if not n.startswith(("decoder.", "post_quant_conv."))}
    save_file(tensors, tmp_path / "vqvae.safetensors", metadata)
    loaded = load_models(tmp_path)
    assert not loaded.vqvae.has_decoder
    with pytest.raises(ValueError, match="without its decoder"):
        loaded.vqvae.decode(torch.zeros(1, 8, 4, 4))


def test_same_name_under_two_prefixes(golden, tmp_path):
    tensors = load_file(golden("adaln")[0])
    tensors["module.head.bias"] = tensors["head.bias"] + 1
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"head\.bias is there twice"):
        load_models(tmp_path / "x.pth", vqvae=golden("adaln")[1])


# --- Names, folders and the Hub ---


@pytest.mark.parametrize("source", ["nowhere.pth", "x/nowhere.safetensors", "./nowhere", "/nowhere", Path("nowhere")])
def test_paths_that_do_not_exist(source):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_models(source)


def test_missing_files(golden, tmp_path):
    (tmp_path / "var-d16").mkdir()
    with pytest.raises(FileNotFoundError, match=r"var\.safetensors: no such file \(a folder goes before a model"):
        load_models(tmp_path / "var-d16")
    with pytest.raises(FileNotFoundError, match=r"absent\.pth: no such file"):
        load_models(golden("adaln")[0], vqvae=tmp_path / "absent.pth")


def test_unknown_names():
    with pytest.raises(ValueError, match=r"'var-d61' is no file or folder here.*did you mean .*var-d16"):
        load_models("var-d61")
    with pytest.raises(ValueError, match=r"holds several models.*var-d16, var-d20"):
        load_models("FoundationVision/var")
    with pytest.raises(ValueError, match="no name the Hub allows"):
        load_models("a--b/c..d")


def test_existing_path_goes_before_a_name(golden, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy_folder(golden("adaln"), Path("var-d16"))
    check_parity(load_models("var-d16"), data, "adaln")
    copy_folder(golden("shared_adaln"), Path("org/name"))
    check_parity(load_models("org/name"), data, "shared_adaln")


def test_bundled_model_by_name(golden, data, tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "BUNDLED", tmp_path)
    copy_folder(golden("adaln"), tmp_path / "tiny")
    loaded = load_models("tiny")
    assert loaded.name == "tiny"
    check_parity(loaded, data, "adaln")


def fill_cache(hub: Path, repo_id: str, files: dict[str, Path]) -> Path:
    """Lay files out as huggingface_hub does."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = hub / ("models--" + repo_id.replace("/", "--"))
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    for name, source in files.items():
        target = repo / "snapshots" / commit / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    return repo / "snapshots" / commit


def test_hub_repository_from_the_cache(golden, data, offline):
    var, vqvae = golden("adaln")
    fill_cache(offline, "org/name", {"var.safetensors": var, "vqvae.safetensors": vqvae})
    loaded = load_models("org/name")
    assert loaded.name == "org/name"
    check_parity(loaded, data, "adaln")


@pytest.mark.parametrize(
    ("source", "wanted", "command"),
    [
        (
            "org/name",
            "no folder org/name is here, and model org/name needs var.safetensors of the Hub repository org/name",
            "hf download org/name var.safetensors vqvae.safetensors --local-dir FOLDER\nand pass FOLDER here",
        ),
        (
            "var-d16",
            "model var-d16 needs var_d16.pth of the Hub repository FoundationVision/var",
            "hf download FoundationVision/var var_d16.pth --local-dir FOLDER && "
            "hf download FoundationVision/var vae_ch160v4096z32.pth --local-dir FOLDER\nand pass FOLDER/var_d16.pth",
        ),
        (
            "var-d20-cca",
            "needs CCA_VAR_Guidance_Free/VAR_d20_CCA.pth of the Hub repository ChenDRAG/CCA_VAR",
            "hf download FoundationVision/var vae_ch160v4096z32.pth --local-dir FOLDER/CCA_VAR_Guidance_Free\n"
            "and pass FOLDER/CCA_VAR_Guidance_Free/VAR_d20_CCA.pth",
        ),
    ],
)
def test_offline_without_the_file(source, wanted, command):
    with pytest.raises(FileNotFoundError) as caught:
        load_models(source)
    message = str(caught.value)
    assert wanted in message
    assert "not in the local cache, and the Hub cannot be reached" in message
    assert command in message
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("RepositoryNotFoundError", "no such public repository.*hf auth login"),
        ("GatedRepoError", "terms"),
        ("EntryNotFoundError", "holds no such file"),
    ],
)
def test_hub_refusals(kind, match, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    error_type = getattr(errors, kind)

    def download(*_, **__):
        raise error_type.__new__(error_type)  # how they are constructed differs between versions of the Hub's client

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(FileNotFoundError, match=match) as caught:
        load_models("org/name")
    assert isinstance(caught.value.__cause__, error_type)


@pytest.fixture
def preset(golden, monkeypatch, offline):
    """A preset of the shape of a golden case, whose file lies in the cache of the Hub."""

    def make(name: str, tensors, **changes) -> None:
        var, vqvae = golden("adaln")
        configs = from_metadata(metadata_of(var))
        config = dataclasses.replace(configs[0], **changes)
        source = offline.parent / "source"
        source.mkdir()
        torch.save(tensors, source / "var.pth")
        torch.save(load_file(vqvae), source / "vae.pth")
        fill_cache(offline, "org/weights", {"sub/var.pth": source / "var.pth", "vae.pth": source / "vae.pth"})
        place = ("MIT", "org/weights", "sub/var.pth", "org/weights", "vae.pth")
        new = Preset(name, "", config, configs[1], Preprocessing.imagenet(64), *place)
        table = {**presets._public(), name: new}
        monkeypatch.setattr(presets, "_public", lambda: table)

    return make


def test_preset_from_the_cache(preset, golden, data):
    preset("var-tiny", load_file(golden("adaln")[0]))
    loaded = load_models("var-tiny")
    assert loaded.name == "var-tiny"
    check_parity(loaded, data, "adaln")


def test_preset_with_the_file_of_another_depth(preset, golden):
    """A file of 20 blocks under the name of a model of 2."""
    tensors = load_file(golden("adaln")[0])
    block = {name.removeprefix("blocks.0."): t for name, t in tensors.items() if name.startswith("blocks.0.")}
    for i in range(20):
        tensors |= {f"blocks.{i}.{name}": t for name, t in block.items()}
    preset("var-tiny", tensors)
    with pytest.raises(CheckpointError, match=r"has 20 blocks, var-tiny has 2: did you mean var-d20\?"):
        load_models("var-tiny")


def test_preset_with_the_first_upload(preset, golden):
    preset("var-tiny", {n: t for n, t in load_file(golden("adaln")[0]).items() if "scale_mul" not in n})
    with pytest.raises(CheckpointError, match=r"does not fit var-tiny(.|\n)*first upload of var_d16\.pth"):
        load_models("var-tiny")


def test_metadata_is_json(tmp_path):
    save(tmp_path, *tiny_pair(), "abc", Preprocessing(8, 8, channels=1))
    for part in ("var", "vqvae"):
        metadata = metadata_of(tmp_path / f"{part}.safetensors")
        assert json.loads(metadata["class_names"]) == ["a", "b", "c"]
        assert json.loads(metadata["preprocessing"]) == {"resize": 8, "crop": 8, "padding": 0, "channels": 1}
    assert checkpoints.load_models(tmp_path).name == tmp_path.name
