"""The table of models, their parameter counts and the ImageNet class names."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch

from varlik.models import presets
from varlik.models.config import Preprocessing, VARConfig
from varlik.models.presets import get_preset, list_models, num_parameters

PUBLIC = ("var-d16", "var-d20", "var-d24", "var-d30", "var-d36")
CCA = ("var-d16-cca", "var-d20-cca", "var-d24-cca", "var-d30-cca")


def test_names_and_wildcards():
    assert {*PUBLIC, *CCA} <= set(list_models())
    assert list_models() == sorted(list_models())
    assert list_models("var-*-cca") == list(CCA)
    assert list_models("var-d?6") == ["var-d16", "var-d36"]
    assert list_models("nothing*") == []


@pytest.mark.parametrize(
    ("name", "millions"),
    list(zip(PUBLIC, (310.28, 600.92, 1033.40, 2010.02, 2353.89), strict=True)),
)
def test_public_models_have_the_published_size(name, millions):
    preset = get_preset(name)
    assert round(num_parameters(preset.var) / 1e6, 2) == millions
    assert (preset.repo_id, preset.var_file) == ("FoundationVision/var", name.replace("-", "_") + ".pth")
    assert preset.licence == "MIT"
    assert not preset.bundled


@pytest.mark.parametrize("name", CCA)
def test_cca_models_differ_from_the_public_ones_in_their_file_alone(name):
    preset, plain = get_preset(name), get_preset(name.removesuffix("-cca"))
    assert (preset.var, preset.vqvae, preset.preprocessing) == (plain.var, plain.vqvae, plain.preprocessing)
    assert preset.repo_id == "ChenDRAG/CCA_VAR"
    assert preset.var_file == f"CCA_VAR_Guidance_Free/VAR_{name.split('-')[1]}_CCA.pth"
    assert (preset.vqvae_repo_id, preset.vqvae_file) == ("FoundationVision/var", "vae_ch160v4096z32.pth")


def test_resolutions():
    d16, d36 = get_preset("var-d16"), get_preset("var-d36")
    assert (d16.var.num_tokens, d36.var.num_tokens) == (680, 2240)
    assert (d16.vqvae.resolution, d36.vqvae.resolution) == (256, 512)
    assert (d16.preprocessing, d36.preprocessing) == (Preprocessing(288, 256), Preprocessing(576, 512))
    assert d36.var.shared_aln
    assert not d16.var.shared_aln
    for name in (*PUBLIC, *CCA):
        preset = get_preset(name)
        assert preset.var.head_dim == 64
        assert preset.var.patch_nums == preset.vqvae.patch_nums


def test_unknown_names_get_close_matches():
    with pytest.raises(ValueError, match=r"unknown model 'var-d61': did you mean .*var-d16"):
        get_preset("var-d61")
    with pytest.raises(ValueError, match=r"known models are .*var-d16, "):
        get_preset("zzzzz")


def test_bundled_models_are_found_by_their_folders(tmp_path, data, monkeypatch):
    monkeypatch.setattr(presets, "BUNDLED", tmp_path)
    assert list_models() == sorted((*PUBLIC, *CCA))
    (tmp_path / "tiny").mkdir()
    (tmp_path / "notes").mkdir()
    assert "tiny" not in list_models()
    shutil.copy(data / "adaln.var.safetensors", tmp_path / "tiny" / "var.safetensors")
    assert "tiny" in list_models("t*")
    preset = get_preset("tiny")
    assert preset.bundled
    assert preset.repo_id is None
    assert preset.var == VARConfig(2, 128, 2, (1, 2, 3, 4), vocab_size=128, codebook_dim=16, num_classes=7)
    assert preset.preprocessing == Preprocessing(72, 64)
    assert preset.description == "7 classes, 64 pixels RGB, depth 2"
    assert presets.bundled_folder("tiny") == tmp_path / "tiny"
    for name in ("var-d16", "notes", "../tiny"):
        with pytest.raises(ValueError, match="not bundled"):
            presets.bundled_folder(name)


def test_bundled_folder_may_be_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "BUNDLED", tmp_path / "absent")
    assert list_models() == sorted((*PUBLIC, *CCA))


def test_imagenet_class_names():
    names, ids = presets.imagenet_class_names(), presets.imagenet_synset_ids()
    assert len(names) == len(ids) == 1000
    assert list(ids) == sorted(set(ids))
    assert len({name.casefold() for name in names}) == 1000
    assert all(name == name.strip() and name for name in names)
    assert dict(zip(ids, names, strict=True))["n02012849"] == "crane (n02012849)"
    for label, name in ((0, "tench"), (1, "goldfish"), (207, "golden retriever"), (999, "toilet tissue")):
        assert names[label] == name


def test_nothing_is_read_at_import():
    code = (
        "import varlik.models.presets as p, varlik.models.checkpoints, sys;"
        "assert not p._public.cache_info().currsize and not p._imagenet_classes.cache_info().currsize;"
        "assert 'huggingface_hub' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_num_parameters_allocates_nothing():
    config = VARConfig(2, 64, 1, (1, 2))
    before = torch.get_default_dtype()
    assert num_parameters(config) > 0
    assert torch.get_default_dtype() == before
