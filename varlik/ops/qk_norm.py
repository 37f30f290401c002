"""From the joint projection to attention: biases, normalisation of queries and keys, keys and values to their pages."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from varlik.ops import _registry
from varlik.ops._registry import INT64, Argument

MAX_LOG_SCALE = math.log(100)
MIN_NORM = 1e-12


def qk_norm(
    qkv: Tensor,
    q_bias: Tensor,
    v_bias: Tensor,
    log_scale: Tensor | None,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    *,
    impl: str = "auto",
) -> Tensor:
    """Queries of a bias-free joint projection; its keys and values go to their slots.

    With `log_scale`, q = (q + q_bias) / max(|q + q_bias|, 1e-12) * exp(min(log_scale, ln 100)) and
    k = k / max(|k|, 1e-12), norms per head; without, neither is normalised. v = v + v_bias. Float32 inside for narrower
    types.

    - `qkv` (R, T, 3C): q, k and v in this order, each as (H, D) with C = H * D.
    - `q_bias`, `v_bias` (C,) and `log_scale` (H,) or None, of any floating dtype; k has no bias.
    - `k_pages`, `v_pages` (P, H, D), in the dtype of `qkv`, are written in place and must not overlap.
    - `slots` (R, T) int64 in [0, P): where each token's key and value go. All distinct, which is not checked: of two
      tokens with one slot, either may remain.

    Returns q (R, T, H, D) in the dtype of `qkv`.

    Raises `ValueError` for other shapes, several devices, an `impl` it lacks, or inputs that require grad; `TypeError`
    for other dtypes.

    Source: "Visual Autoregressive Modeling", Tian et al. 2024, section 3.2 (normalised queries and keys).
    """
    impl = _registry.choose_impl("qk_norm", impl)
    sizes = _registry.check(
        Argument("qkv", qkv, ("R", "T", "3C")),
        Argument("k_pages", k_pages, ("P", "H", "D"), "qkv"),
        Argument("v_pages", v_pages, ("P", "H", "D"), "qkv"),
        Argument("slots", slots, ("R", "T"), INT64),
    )
    width = sizes["H"] * sizes["D"]
    scale = () if log_scale is None else (Argument("log_scale", log_scale, (sizes["H"],)),)
    _registry.check(
        Argument("qkv", qkv, ("R", "T", 3 * width)),
        Argument("q_bias", q_bias, (width,)),
        Argument("v_bias", v_bias, (width,)),
        *scale,
    )
    return torch.ops.varlik.qk_norm(qkv, q_bias, v_bias, log_scale, k_pages, v_pages, slots, impl)


def _qk_norm(
    qkv: Tensor,
    q_bias: Tensor,
    v_bias: Tensor,
    log_scale: Tensor | None,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
) -> Tensor:
    _, heads, head_dim = k_pages.shape
    dtype = _registry.accumulation_dtype(qkv.dtype)
    q, k, v = qkv.unflatten(-1, (3, heads, head_dim)).unbind(2)  # (R, T, H, D) each
    q = q.to(dtype) + q_bias.to(dtype).view(heads, head_dim)
    if log_scale is not None:
        scale = log_scale.to(dtype).clamp(max=MAX_LOG_SCALE).exp().view(heads, 1)
        q = q.mul_(scale / _norm(q))
        k = k.to(dtype)
        k = k / _norm(k)
    v = v.to(dtype) + v_bias.to(dtype).view(heads, head_dim)
    for pages, values in ((k_pages, k), (v_pages, v)):
        pages.index_copy_(0, slots.reshape(-1), values.to(qkv.dtype).reshape(-1, heads, head_dim))
    return q.to(qkv.dtype).contiguous()


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(MIN_NORM)


def _fake(qkv: Tensor, q_bias: Tensor, v_bias: Tensor, log_scale: Tensor | None, k_pages: Tensor, *_: Tensor) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], k_pages.shape[1], k_pages.shape[2])


_registry.register(
    "qk_norm",
    "(Tensor qkv, Tensor q_bias, Tensor v_bias, Tensor? log_scale, Tensor(a!) k_pages, Tensor(b!) v_pages, "
    "Tensor slots, str impl) -> Tensor",
    torch_path=_qk_norm,
    fake=_fake,
    flops=_registry.no_flops,
)
