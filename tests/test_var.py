"""The transformer: what its forward promises, on small random models."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from varlik.models.config import VARConfig
from varlik.models.var import VAR, ClassVectors

CONFIG = VARConfig(
    depth=2, embed_dim=32, num_heads=2, patch_nums=(1, 2, 3), vocab_size=20, codebook_dim=8, num_classes=4
)
VARIANTS = (CONFIG, replace(CONFIG, shared_aln=True), replace(CONFIG, attn_l2_norm=False))


def model(config, dtype=torch.float64):
    torch.manual_seed(0)
    var = VAR(config).to(dtype)
    with torch.no_grad():
        for parameter in var.parameters():
            parameter.normal_(std=0.3)
    return var.eval()


def inputs(config, rows=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, config.num_tokens - 1, config.codebook_dim, generator=generator, dtype=dtype)


def masked_forward(var, labels, x):
    """The architecture written a second time, with a dense mask and straight from the description."""
    c = var.config
    level = torch.tensor([k for k, p in enumerate(c.patch_nums) for _ in range(p * p)])
    e = var.class_emb.weight[labels]
    h = torch.cat((e[:, None] + var.pos_start, x @ var.word_embed.weight.T + var.word_embed.bias), 1)
    h = h + var.lvl_embed.weight[level] + var.pos_1LC
    mask = level[None, :] <= level[:, None]

    def norm(t):
        return (t - t.mean(-1, keepdim=True)) / (t.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()

    def ada(t, weight, bias):
        return F.silu(t) @ weight.T + bias

    for block in var.blocks:
        if c.shared_aln:
            lin = var.shared_ada_lin[1]
            m = ada(e, lin.weight, lin.bias).view(-1, 6, c.embed_dim) + block.ada_gss[0]
        else:
            m = ada(e, block.ada_lin[1].weight, block.ada_lin[1].bias).view(-1, 6, c.embed_dim)
        g1, g2, s1, s2, b1, b2 = (v[:, None] for v in m.unbind(1))
        u = norm(h) * (1 + s1) + b1
        a = block.attn
        q, k, v = (
            t.view(len(x), -1, c.num_heads, c.head_dim).transpose(1, 2) for t in (u @ a.mat_qkv.weight.T).chunk(3, -1)
        )
        q = q + a.q_bias.view(1, c.num_heads, 1, c.head_dim)
        v = v + a.v_bias.view(1, c.num_heads, 1, c.head_dim)
        scale = 0.25 / c.head_dim**0.5
        if c.attn_l2_norm:
            q = q / q.norm(dim=-1, keepdim=True) * a.scale_mul_1H11.clamp(max=math.log(100)).exp()
            k, scale = k / k.norm(dim=-1, keepdim=True), 1.0
        weights = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf).softmax(-1)
        h = h + g1 * ((weights @ v).transpose(1, 2).reshape(h.shape) @ a.proj.weight.T + a.proj.bias)
        u = norm(h) * (1 + s2) + b2
        f = block.ffn
        hidden = F.gelu(u @ f.fc1.weight.T + f.fc1.bias, approximate="tanh")
        h = h + g2 * (hidden @ f.fc2.weight.T + f.fc2.bias)
    s, b = ada(e, var.head_nm.ada_lin[1].weight, var.head_nm.ada_lin[1].bias).view(-1, 2, c.embed_dim).unbind(1)
    return (norm(h) * (1 + s[:, None]) + b[:, None]) @ var.head.weight.T + var.head.bias


@pytest.mark.parametrize("config", VARIANTS, ids=["plain", "shared", "no-l2"])
def test_matches_dense_mask(config):
    var, x = model(config), inputs(config)
    labels = torch.tensor([0, 2, config.null_class])
    torch.testing.assert_close(var(var.class_vectors(labels), x), masked_forward(var, labels, x), rtol=1e-9, atol=1e-9)


def test_scale_of_queries_is_clamped_at_100():
    var, x = model(CONFIG), inputs(CONFIG)
    labels = torch.tensor([0, 1, 2])
    with torch.no_grad():
        for block in var.blocks:
            block.attn.scale_mul_1H11.fill_(6.0)  # exp(6) is about 403
    torch.testing.assert_close(var(var.class_vectors(labels), x), masked_forward(var, labels, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("config", VARIANTS, ids=["plain", "shared", "no-l2"])
def test_gradient_in_class_vectors(config):
    var = model(config)
    x = inputs(config, rows=1)
    vectors = var.class_vectors(torch.tensor([1]))
    leaves = [t.detach().requires_grad_() for t in (vectors.blocks, vectors.head, vectors.start)]

    def score(blocks, head, start):
        return var(ClassVectors(blocks, head, start), x, 2).log_softmax(-1)[..., 3].sum()

    assert torch.autograd.gradcheck(score, leaves, eps=1e-6, atol=1e-5)


def test_coarse_logits_ignore_finer_inputs():
    var, x = model(CONFIG), inputs(CONFIG)
    vectors = var.class_vectors(torch.tensor([0, 1, 2]))
    before = var(vectors, x)
    x = x.clone()
    x[:, 4:] = torch.nan  # everything that scale 3 reads
    after = var(vectors, x, 2)
    torch.testing.assert_close(after, before[:, :5])


def test_state_dict_holds_no_square_buffer():
    length = CONFIG.num_tokens
    assert not [n for n, t in VAR(CONFIG).state_dict().items() if tuple(t.shape[-2:]) == (length, length)]


def test_bad_labels_and_inputs():
    var, x = model(CONFIG), inputs(CONFIG)
    with pytest.raises(ValueError, match=r"labels.*\[0, 4\]"):
        var.class_vectors(torch.tensor([5]))
    with pytest.raises(TypeError, match="labels"):
        var.class_vectors(torch.tensor([0.5]))
    with pytest.raises(ValueError, match="labels"):
        var.class_vectors(torch.tensor([[0]]))
    vectors = var.class_vectors(torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="num_scales: expected 1 to 3, got 4"):
        var(vectors, x, 4)
    with pytest.raises(ValueError, match="teacher_forcing_input"):
        var(vectors, x[:2])
    with pytest.raises(ValueError, match="teacher_forcing_input"):
        var(vectors, x[:, :5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dim": 33}, "multiple of num_heads"),
        ({"patch_nums": (1, 3, 2)}, "grow"),
        ({"patch_nums": (2, 3)}, "start at 1"),
        ({"depth": 0}, "depth"),
    ],
)
def test_bad_configuration(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)
