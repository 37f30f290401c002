"""`accelerate` in place of the forward of a module with the original's attributes and tensor names."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import varlik
from varlik.classifier import VARClassifier
from varlik.models.config import Preprocessing, VQVAEConfig
from varlik.models.vqvae import VQVAE

CASES = ("adaln", "shared_adaln")


def modulated(x, scale, shift):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.num_heads = heads
        self.scale_mul_1H11 = nn.Parameter(torch.zeros(1, heads, 1, 1))
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x, bias):
        rows, length, width = x.shape
        qkv = F.linear(x, self.mat_qkv.weight, torch.cat((self.q_bias, self.zero_k_bias, self.v_bias)))
        q, k, v = qkv.view(rows, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp(max=math.log(100)).exp()
        weight = (q @ F.normalize(k, dim=-1).transpose(2, 3) + bias).softmax(-1)
        return self.proj((weight @ v).transpose(1, 2).reshape(rows, length, width))


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class OriginalBlock(nn.Module):
    def __init__(self, width, heads, shared):
        super().__init__()
        self.attn, self.ffn = Attention(width, heads), FeedForward(width)
        if shared:
            self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, width))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, cond, bias):
        six = self.ada_gss + cond if hasattr(self, "ada_gss") else self.ada_lin(cond).view(len(x), 1, 6, -1)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = six.unbind(2)
        x = x + gamma1 * self.attn(modulated(x, scale1, shift1), bias)
        return x + gamma2 * self.ffn(modulated(x, scale2, shift2))


class HeadNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))


class OriginalVAR(nn.Module):
    """Attributes and tensor names of the original; all tokens of a row at once, under its dense mask."""

    def __init__(self, depth, width, heads, patch_nums, vocab, codebook_dim, num_classes, shared):
        super().__init__()
        self.patch_nums, self.num_heads, self.num_classes, self.C = patch_nums, heads, num_classes, width
        levels = torch.cat([torch.full((p * p,), k) for k, p in enumerate(patch_nums)])
        self.register_buffer("lvl_1L", levels[None])
        mask = torch.where(levels[:, None] >= levels[None], 0.0, -torch.inf)
        self.register_buffer("attn_bias_for_masking", mask[None, None])
        self.word_embed = nn.Linear(codebook_dim, width)
        self.class_emb = nn.Embedding(num_classes + 1, width)
        self.pos_start = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_1LC = nn.Parameter(torch.zeros(1, len(levels), width))
        self.lvl_embed = nn.Embedding(len(patch_nums), width)
        if shared:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(OriginalBlock(width, heads, shared) for _ in range(depth))
        self.head_nm, self.head = HeadNorm(width), nn.Linear(width, vocab)

    def forward(self, label_B, x_BLCv_wo_first_l):
        cond = self.class_emb(label_B)
        x = torch.cat((cond[:, None] + self.pos_start, self.word_embed(x_BLCv_wo_first_l.float())), dim=1)
        x = x + self.lvl_embed(self.lvl_1L) + self.pos_1LC
        given = self.shared_ada_lin(cond).view(-1, 1, 6, self.C) if hasattr(self, "shared_ada_lin") else cond
        for block in self.blocks:
            x = block(x, given, self.attn_bias_for_masking)
        scale, shift = self.head_nm.ada_lin(cond).view(-1, 1, 2, self.C).unbind(2)
        return self.head(modulated(x, scale, shift)).float()


class Golden:
    """A golden model as a script of the original would hold it, and what the original gave."""

    def __init__(self, data, name):
        self.state = load_file(data / f"{name}.var.safetensors")
        self.vqvae_file = data / f"{name}.vqvae.safetensors"
        self.expected = load_file(data / f"{name}.expected.safetensors")
        shared = name == "shared_adaln"
        size = (3, 64, 2, (1, 2, 3, 5), 96, 8, 5) if shared else (2, 128, 2, (1, 2, 3, 4), 128, 16, 7)
        self.module = OriginalVAR(*size, shared).eval()
        self.module.load_state_dict(self.state)
        self.tokens, self.inputs = self.expected["tokens"], self.expected["teacher_forcing_input"]
        self.wanted = self.expected["token_log_prob"]  # (B, num_classes + 1, L)
        self.labels = list(range(self.module.num_classes + 1))
        self.ends = list(itertools.accumulate(p * p for p in size[3]))

    def column(self, label):
        return torch.full((len(self.tokens),), label)

    def naive(self, label):
        logits = self.module(self.column(label), self.inputs)
        return logits.log_softmax(-1).gather(-1, self.tokens[..., None]).squeeze(-1)


@pytest.fixture(scope="module", params=CASES)
def golden(request, data):
    return Golden(data, request.param)


@pytest.fixture
def case(data):
    """One of them, fresh, for tests that change it."""
    return Golden(data, "adaln")


@pytest.mark.parametrize("as_module", [True, False], ids=["module", "state dict"])
def test_scores_are_the_originals(golden, as_module):
    fast = varlik.accelerate(golden.module if as_module else golden.state)
    for label in golden.labels:
        scores = fast(golden.column(label), golden.inputs, golden.tokens)
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, golden.wanted[:, label], atol=2e-4, rtol=0)
    scores = fast.all_classes(golden.inputs, golden.tokens, golden.labels)
    torch.testing.assert_close(scores, golden.wanted, atol=2e-4, rtol=0)


@torch.no_grad()
def test_scores_are_those_of_forward_log_softmax_gather(golden):
    fast = varlik.accelerate(golden.module)
    naive = torch.stack([golden.naive(label) for label in golden.labels], dim=1)
    for label in golden.labels:
        scores = fast(golden.column(label), golden.inputs, golden.tokens)
        torch.testing.assert_close(scores, naive[:, label], atol=1e-6, rtol=1e-5)
    every = fast.all_classes(golden.inputs, golden.tokens)
    torch.testing.assert_close(every, naive[:, :-1], atol=1e-6, rtol=1e-5)
    assert torch.equal(every.sum(-1).argmax(1), naive[:, :-1].sum(-1).argmax(1))


def test_one_image_in_rows_of_many_classes(golden):
    fast = varlik.accelerate(golden.module)
    labels = torch.tensor([2, 0, golden.module.num_classes, 2])
    inputs, tokens = (part[:1].expand(len(labels), *part.shape[1:]) for part in (golden.inputs, golden.tokens))
    scores = fast(label_B=labels, x_BLCv_wo_first_l=inputs, targets=tokens)
    torch.testing.assert_close(scores, golden.wanted[0, labels], atol=2e-4, rtol=0)
    together = fast.all_classes(golden.inputs[:1], golden.tokens[:1], labels)
    torch.testing.assert_close(scores, together[0], atol=1e-6, rtol=1e-5)


def test_partial_scales_are_prefixes(golden):
    fast = varlik.accelerate(golden.module)
    full = fast.all_classes(golden.inputs, golden.tokens)
    for scales, end in enumerate(golden.ends, start=1):
        some = fast.all_classes(golden.inputs, golden.tokens, num_scales=scales)
        torch.testing.assert_close(some, full[..., :end], atol=1e-6, rtol=1e-5)
        cut = fast(golden.column(1), golden.inputs[:, : end - 1], golden.tokens[:, :end], num_scales=scales)
        torch.testing.assert_close(cut, full[:, 1, :end], atol=1e-6, rtol=1e-5)


def test_weights_are_shared(golden):
    fast = varlik.accelerate(golden.module)
    theirs = dict(golden.module.named_parameters())
    ours = dict(fast.var.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        assert ours[name].data_ptr() == parameter.data_ptr(), name
        assert parameter.requires_grad
        assert not ours[name].requires_grad
    state = golden.module.state_dict(keep_vars=True)
    again = varlik.accelerate(state)
    assert again.var.head.weight.data_ptr() == golden.module.head.weight.data_ptr()
    assert golden.module.head.weight.requires_grad


def test_half_precision_is_converted(case):
    half = varlik.accelerate(case.module.half())
    assert half.var.head.weight.dtype == torch.float32
    assert case.module.head.weight.dtype == torch.float16
    scores = half.all_classes(case.inputs, case.tokens, case.labels)
    torch.testing.assert_close(scores, case.wanted, atol=2e-4, rtol=0)
    inputs = case.inputs.half()
    assert torch.equal(half.all_classes(inputs, case.tokens), half.all_classes(inputs.float(), case.tokens))


def test_refresh_takes_up_new_weights(case, data):
    fast = varlik.accelerate(case.module)
    fast(case.column(0), case.inputs, case.tokens)
    with torch.no_grad():
        case.module.class_emb.weight[0] = case.module.class_emb.weight[3]
    with pytest.raises(RuntimeError, match=r"weights have changed .* refresh"):
        fast(case.column(0), case.inputs, case.tokens)
    fast.refresh()
    torch.testing.assert_close(fast(case.column(0), case.inputs, case.tokens), case.wanted[:, 3], atol=2e-4, rtol=0)
    case.module.train()
    with pytest.raises(ValueError, match="training mode"):
        fast.refresh()


class Wrapped(nn.Module):
    """As data-parallel wrappers hold a module."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_wrapped_modules_and_nested_state_dicts(case):
    state = case.module.state_dict()
    sources = [
        Wrapped(case.module).eval(),
        torch.compile(case.module),
        {"var_wo_ddp": state},
        {"trainer": {"var_wo_ddp": {f"module.{name}": tensor for name, tensor in state.items()}}, "epoch": 3},
        {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    ]
    for source in sources:
        fast = varlik.accelerate(source)
        assert fast.var.head.weight.data_ptr() == case.module.head.weight.data_ptr()
        scores = fast.all_classes(case.inputs, case.tokens, case.labels)
        torch.testing.assert_close(scores, case.wanted, atol=2e-4, rtol=0)


def test_attributes_tell_what_tensors_leave_open(case):
    del case.module._buffers["lvl_1L"]
    assert varlik.accelerate(case.module).var.config.patch_nums == (1, 2, 3, 4)
    assert varlik.accelerate(Wrapped(case.module).eval()).var.config.patch_nums == (1, 2, 3, 4)
    with pytest.raises(varlik.CheckpointError, match="no schedule"):
        varlik.accelerate(case.module.state_dict())
    for block in case.module.blocks:
        del block.attn.scale_mul_1H11
    config = varlik.accelerate(case.module).var.config
    assert (config.attn_l2_norm, config.num_heads) == (False, 2)
    case.module.num_heads = 4
    assert varlik.accelerate(case.module).var.config.num_heads == 4


def test_our_own_module(golden_classifier):
    classifier, expected = golden_classifier
    fast = varlik.accelerate(classifier.var, vqvae=classifier.vqvae)
    scores = fast.all_classes(expected["teacher_forcing_input"], expected["tokens"])
    torch.testing.assert_close(scores, expected["token_log_prob"][:, :-1], atol=2e-4, rtol=0)
    assert torch.equal(fast.classifier.tokenize_pixels(expected["image"]).tokens, expected["tokens"])
    theirs = classifier.vqvae.quantize.embedding.weight
    assert fast.classifier.vqvae.quantize.embedding.weight.data_ptr() == theirs.data_ptr()
    assert theirs.requires_grad


def test_the_callers_modes_do_not_matter(case):
    fast = varlik.accelerate(case.module)
    with torch.inference_mode():
        inputs = case.inputs.clone()
        first = fast.all_classes(inputs, case.tokens, [1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        second = fast.all_classes(inputs, case.tokens, [1, 2])
    with torch.no_grad():
        third = fast.all_classes(case.inputs.clone().requires_grad_(), case.tokens, [1, 2, 3])
    torch.testing.assert_close(first, third[:, :1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(second, third[:, :2], atol=1e-6, rtol=1e-5)
    assert not third.requires_grad


@pytest.mark.parametrize("kind", ["module", "state dict", "file", "folder"])
def test_classifier(golden, kind, tmp_path):
    state = load_file(golden.vqvae_file)
    if kind == "module":
        config = VQVAEConfig(
            channels=32,
            codebook_dim=golden.inputs.shape[-1],
            vocab_size=len(state["quantize.embedding.weight"]),
            patch_nums=golden.module.patch_nums,
            attention="deepest level and mid" if any("down.4.attn" in name for name in state) else "mid only",
        )
        vqvae = Wrapped(VQVAE(config, decoder=False))  # a module that is not ours, with the published names in it
        vqvae.module.load_state_dict(
            {name: tensor.float() for name, tensor in state.items() if "vocab_hit" not in name}
        )
    elif kind == "folder":
        save_file(state, tmp_path / "vqvae.safetensors")
        vqvae = str(tmp_path)
    else:
        vqvae = state if kind == "state dict" else golden.vqvae_file
    fast = varlik.accelerate(golden.module, vqvae=vqvae)
    assert isinstance(fast.classifier, VARClassifier)
    images = fast.classifier.tokenize_pixels(golden.expected["image"])
    assert torch.equal(images.tokens, golden.tokens)
    scores = fast.classifier.token_log_prob(images, golden.labels)
    torch.testing.assert_close(scores, golden.wanted, atol=2e-4, rtol=0)
    assert fast.engine is fast.classifier.engine
    assert fast.classifier.classify(images).names == tuple(map(str, golden.wanted[:, :-1].sum(-1).argmax(1).tolist()))


def test_classifier_with_names_and_preprocessing(case):
    names = list("abcdefg")
    preprocessing = Preprocessing(resize=64, crop=56, padding=4)
    fast = varlik.accelerate(case.module, vqvae=case.vqvae_file, class_names=names, preprocessing=preprocessing)
    assert fast.classifier.class_names == tuple(names)
    assert fast.classifier.preprocessing == preprocessing
    with pytest.raises(ValueError, match="class_names: expected 7"):
        varlik.accelerate(case.module, vqvae=case.vqvae_file, class_names=names[1:])
    with pytest.raises(ValueError, match="preprocessing"):
        varlik.accelerate(case.module, vqvae=case.vqvae_file, preprocessing=Preprocessing(resize=72, crop=72))
    with pytest.raises(ValueError, match="needs vqvae"):
        varlik.accelerate(case.module, class_names=names)


def test_refused_models(case, data, tmp_path):
    with pytest.raises(TypeError, match="module_or_state_dict: expected a VAR module"):
        varlik.accelerate("var_d16.pth")
    with pytest.raises(varlik.CheckpointError, match="does not hold a VAR transformer"):
        varlik.accelerate(nn.Linear(2, 2).eval())
    with pytest.raises(varlik.CheckpointError, match="is a VQ-VAE"):
        varlik.accelerate(load_file(case.vqvae_file))
    without = {name: tensor for name, tensor in case.state.items() if name != "blocks.1.ffn.fc2.bias"}
    with pytest.raises(varlik.CheckpointError, match=r"blocks\.1\.ffn\.fc2\.bias"):
        varlik.accelerate(without)
    with pytest.raises(varlik.CheckpointError, match=r"pos_start"):
        varlik.accelerate({**case.state, "pos_start": torch.zeros(1, 1, 3)})
    with pytest.raises(varlik.CheckpointError, match=r"not finite: head\.bias"):
        varlik.accelerate({**case.state, "head.bias": torch.full_like(case.state["head.bias"], torch.nan)})
    with pytest.raises(varlik.CheckpointError, match=r"head\.bias \(expected plain floats"):
        varlik.accelerate({**case.state, "head.bias": torch.zeros(128, device="meta")})
    with pytest.raises(ValueError, match="training mode"):
        varlik.accelerate(case.module.train())


def test_refused_vqvaes(case, data, tmp_path):
    fast = varlik.accelerate(case.module)
    with pytest.raises(ValueError, match="pass vqvae to varlik"):
        _ = fast.classifier
    with pytest.raises(ValueError, match="do not belong together"):
        varlik.accelerate(case.module, vqvae=data / "shared_adaln.vqvae.safetensors")
    with pytest.raises(varlik.CheckpointError, match="not a VQ-VAE"):
        varlik.accelerate(case.module, vqvae=case.state)
    with pytest.raises(TypeError, match="vqvae: expected"):
        varlik.accelerate(case.module, vqvae=3)
    with pytest.raises(FileNotFoundError):
        varlik.accelerate(case.module, vqvae=tmp_path / "none.pth")


def test_refused_calls(case):
    fast = varlik.accelerate(case.module)
    labels, inputs, tokens = case.column(0), case.inputs, case.tokens
    with pytest.raises(TypeError, match=r"label_B: expected torch\.int64, got torch\.float32"):
        fast(labels.float(), inputs, tokens)
    with pytest.raises(TypeError, match="label_B: expected a tensor"):
        fast([0, 0], inputs, tokens)
    with pytest.raises(ValueError, match=r"label_B: expected shape \(2\), got \(1,\)"):
        fast(labels[:1], inputs, tokens)
    with pytest.raises(ValueError, match="label_B: expected values from 0 to 7"):
        fast(labels + 8, inputs, tokens)
    with pytest.raises(TypeError, match=r"x_BLCv_wo_first_l: expected torch\.float32, got torch\.int64"):
        fast(labels, tokens, tokens)
    with pytest.raises(ValueError, match=r"x_BLCv_wo_first_l: expected shape \(B, 29, 16\), got \(2, 28, 16\)"):
        fast(labels, inputs[:, 1:], tokens)
    with pytest.raises(ValueError, match=r"expected shape \(B, 13 to 29, 16\)"):
        fast(labels, inputs[:, :12], tokens, num_scales=3)
    with pytest.raises(ValueError, match="x_BLCv_wo_first_l: it requires grad"):
        fast(labels, inputs.clone().requires_grad_(), tokens)
    with pytest.raises(ValueError, match="at least one image"):
        fast(labels[:0], inputs[:0], tokens[:0])
    with pytest.raises(ValueError, match=r"targets: expected shape \(2, 30\), got \(1, 30\)"):
        fast(labels, inputs, tokens[:1])
    with pytest.raises(TypeError, match=r"targets: expected torch\.int64"):
        fast(labels, inputs, tokens.int())
    with pytest.raises(ValueError, match="targets: expected tokens from 0 to 127"):
        fast(labels, inputs, tokens + 128)
    with pytest.raises(ValueError, match="on cpu, where the model is, got meta"):
        fast(labels, inputs, tokens.to("meta"))
    for scales in (0, 5):
        with pytest.raises(ValueError, match="num_scales: expected 1 to 4"):
            fast(labels, inputs, tokens, num_scales=scales)
    with pytest.raises(ValueError, match="classes: expected at least one"):
        fast.all_classes(inputs, tokens, [])
    with pytest.raises(TypeError, match="classes: expected indices"):
        fast.all_classes(inputs, tokens, ["shoe"])
    with pytest.raises(ValueError, match="classes: expected values from 0 to 7"):
        fast.all_classes(inputs, tokens, [8])
