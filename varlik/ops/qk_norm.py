"""From the joint projection to attention: normalisation of queries and keys, keys and values to their pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from varlik.ops import _registry
from varlik.ops._registry import INT64, Argument, Signature

MIN_NORM = 1e-12

_ARGUMENTS = Signature(
    {
        "qkv": Argument("R T 3C"),
        "scale": Argument("H", optional=True),
        "k_pages": Argument("P H D", "qkv"),
        "v_pages": Argument("P H D", "qkv"),
        "slots": Argument("R L", INT64, optional=True),
    }
)
_SPLIT_ARGUMENTS = Signature({"qkv": Argument("R T 3C"), "scale": Argument("H", optional=True)}, differentiable=True)
_BACKWARD_ARGUMENTS = Signature(
    {
        "grad_q": Argument("R T H D"),
        "grad_k": Argument("P H D", "grad_q"),
        "grad_v": Argument("P H D", "grad_q"),
        "qkv": Argument("R T 3C", "grad_q"),
        "scale": Argument("H", optional=True),
    }
)


def qk_norm(
    qkv: Tensor,
    scale: Tensor | None,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor | None,
    *,
    impl: str = "auto",
) -> Tensor:
    """Queries of a joint projection; its keys and values go to their slots.

    With `scale`, q = q / max(|q|, 1e-12) * scale and k = k / max(|k|, 1e-12), norms per head; without, both stay as
    they are. Float32 inside for narrower types.

    - `qkv` (R, T, 3C): q, k and v in this order, each as (H, D) with C = H * D.
    - `scale` (H,) of any floating dtype, or None.
    - `k_pages`, `v_pages` (P, H, D), in the dtype of `qkv`, are written in place and must not overlap.
    - `slots` (R, L) int64 in [0, P): where the keys and values of each row's tokens 0 to L - 1 lie; those of the last T
      are written. They are distinct, which is not checked: of two tokens with one slot, either may remain. None stands
      for rows that lie side by side, P = R * L: token t of row r has slot r * L + t.

    Returns q (R, T, H, D) in the dtype of `qkv`.

    Raises `ValueError` for other shapes, several devices, an `impl` it lacks, or inputs that require grad; `TypeError`
    for other dtypes.

    Source: "Visual Autoregressive Modeling", Tian et al. 2024, section 3.2 (normalised queries and keys).
    """
    impl = _registry.choose_impl("qk_norm", impl, qkv, scale, k_pages, v_pages)
    sizes = _ARGUMENTS.check(qkv, scale, k_pages, v_pages, slots)
    if sizes["3C"] != 3 * sizes["H"] * sizes["D"]:
        width = 3 * sizes["H"] * sizes["D"]
        raise ValueError(f"qkv: expected shape (R, T, 3C) with 3C = 3HD = {width}, got {tuple(qkv.shape)}")
    length = row_length(sizes, slots)
    if length < sizes["T"]:
        raise ValueError(f"qkv: expected shape (R, T, 3C) with T <= L = {length}, got {tuple(qkv.shape)}")
    return _registry.call("qk_norm", qkv, scale, k_pages, v_pages, slots, impl)


def split_qk_norm(
    qkv: Tensor, scale: Tensor | None, num_heads: int, *, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """As `qk_norm`, with fresh keys and values for rows side by side; differentiable in `qkv` and `scale`.

    `qkv` (R, T, 3C), `scale` (H,) of any floating dtype or None -> q (R, T, H, D), k and v (R * T, H, D), all in the
    dtype of `qkv`: k and v as `scale_causal_attention` takes them without slots.

    Raises `ValueError` for a width that is no multiple of 3 H and as `qk_norm` does.
    """
    impl = _registry.choose_impl("split_qk_norm", impl, qkv, scale)
    sizes = _SPLIT_ARGUMENTS.check(qkv, scale)
    if num_heads < 1 or sizes["3C"] % (3 * num_heads) or sizes.get("H", num_heads) != num_heads:
        raise ValueError(f"num_heads: expected to divide C = {sizes['3C'] / 3:g} and match scale, got {num_heads}")
    return _registry.call("split_qk_norm", qkv, scale, num_heads, impl)


def qk_norm_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, qkv: Tensor, scale: Tensor | None, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Gradients of `split_qk_norm`, also where keys were written beside those of earlier tokens.

    `grad_q` (R, T, H, D), `grad_k` and `grad_v` (R * L, H, D) with L >= T, of which each row's last T are read; `qkv`
    (R, T, 3C) and `scale` as they went in. Returns the gradient of `qkv` and, for every token, that of `scale`,
    (R, T, H) in float32 or wider (empty without `scale`); the gradient of `scale` is its sum over rows and tokens.

    Raises as `qk_norm` does.
    """
    impl = _registry.choose_impl("qk_norm_backward", impl, grad_q, grad_k, grad_v, qkv, scale)
    sizes = _BACKWARD_ARGUMENTS.check(grad_q, grad_k, grad_v, qkv, scale)
    if sizes["3C"] != 3 * sizes["H"] * sizes["D"]:
        raise ValueError(f"qkv: expected 3C = 3HD = {3 * sizes['H'] * sizes['D']}, got {tuple(qkv.shape)}")
    if row_length(sizes, None) < sizes["T"]:
        raise ValueError(f"grad_k: expected shape (R * L, H, D) with L >= T = {sizes['T']}, got {tuple(grad_k.shape)}")
    return _registry.call("qk_norm_backward", grad_q, grad_k, grad_v, qkv, scale, impl)


def row_length(sizes: Mapping[str, int], slots: Tensor | None) -> int:
    """L, of checked sizes R, P and, where there are slots, L.

    Raises `ValueError` for pages that R rows side by side cannot share evenly.
    """
    if slots is not None:
        return sizes["L"]
    rows, pages = sizes["R"], sizes["P"]
    if pages % max(rows, 1) or (pages and not rows):
        raise ValueError(f"k_pages: expected shape (R * L, H, D) with R = {rows} and no slots, got {pages} of them")
    return pages // max(rows, 1)


def _qk_norm(qkv: Tensor, scale: Tensor | None, k_pages: Tensor, v_pages: Tensor, slots: Tensor | None) -> Tensor:
    _, heads, head_dim = k_pages.shape
    dtype = _registry.accumulation_dtype(qkv.dtype)
    heads_of = qkv.unflatten(-1, (3, heads, head_dim))
    q, k, v = heads_of.unbind(2)  # (R, T, H, D) each
    if scale is None:
        _store(k_pages, slots, k)
        _store(v_pages, slots, v)
        return q.contiguous()
    norms = torch.linalg.vector_norm(heads_of[:, :, :2], dim=-1, keepdim=True, dtype=dtype).clamp_min_(MIN_NORM)
    _store(k_pages, slots, k.to(dtype), norms[:, :, 1])
    _store(v_pages, slots, v)
    return (q.to(dtype) * (scale.to(dtype).view(heads, 1) / norms[:, :, 0])).to(qkv.dtype).contiguous()


def _store(pages: Tensor, slots: Tensor | None, values: Tensor, divisor: Tensor | None = None) -> None:
    """Write `values` (R, T, H, D), divided or as they are, to the slots of their rows' last T tokens."""
    rows, tokens = values.shape[:2]
    if not rows * tokens:
        return
    if slots is None:  # straight to their place
        place = pages.unflatten(0, (rows, -1))[:, -tokens:]
        if divisor is None:
            place.copy_(values)
        else:
            torch.div(values, divisor, out=place)
    else:
        values = values if divisor is None else values / divisor
        pages.index_copy_(0, slots[:, slots.shape[1] - tokens :].flatten(), values.to(pages.dtype).flatten(0, 1))


def _split(path: Callable[..., Tensor], qkv: Tensor, scale: Tensor | None, num_heads: int) -> tuple[Tensor, ...]:
    rows, tokens, width = qkv.shape
    k, v = (qkv.new_empty(rows * tokens, num_heads, width // (3 * num_heads)) for _ in range(2))
    return path(qkv, scale, k, v, None), k, v


def _qk_norm_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, qkv: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows, tokens, heads, head_dim = grad_q.shape
    inner = _registry.accumulation_dtype(qkv.dtype)
    k, v = (grad.unflatten(0, (rows, -1))[:, -tokens:] if rows else grad_q for grad in (grad_k, grad_v))
    grads = grad_q.new_empty(rows, tokens, 3, heads, head_dim, dtype=inner)
    for i, grad in enumerate((grad_q, k, v)):
        grads[:, :, i] = grad
    if scale is None:
        return grads.to(qkv.dtype).flatten(2), grads.new_empty(0)
    vectors = qkv.unflatten(-1, (3, heads, head_dim))[:, :, :2].to(inner)
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    inverse = norms.clamp(min=MIN_NORM).reciprocal_()
    of_vectors = grads[:, :, :2]  # changed in place, beside the gradient of v
    along = (of_vectors * vectors).sum(-1, keepdim=True).mul_(inverse)  # (R, T, 2, H, 1)
    # A norm that was clamped is a constant.
    slope = (along * inverse).masked_fill_(norms < MIN_NORM, 0)
    factors = torch.stack((scale.to(inner), torch.ones_like(scale, dtype=inner))).unsqueeze(-1)
    of_vectors.addcmul_(vectors, slope, value=-1).mul_(inverse.mul_(factors))
    return grads.to(qkv.dtype).flatten(2), along[:, :, 0, :, 0].contiguous()


def _autograd(
    inputs: list[Any], output: Any, needs: Any, impl: str, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
) -> tuple[Any, ...]:
    qkv, scale, _ = inputs
    grad_qkv, along = qk_norm_backward(grad_q, grad_k, grad_v, qkv, scale, impl=impl)
    return grad_qkv, None if scale is None else along.sum((0, 1)).to(scale.dtype), None


def _triton(*inputs: Any) -> Tensor:
    from varlik.kernels.qk_norm import qk_norm as kernel

    return kernel(*inputs)


def _backward_triton(*inputs: Any) -> tuple[Tensor, Tensor]:
    from varlik.kernels.qk_norm import qk_norm_backward as kernel

    return kernel(*inputs)


def _split_fake(qkv: Tensor, scale: Tensor | None, num_heads: int) -> tuple[Tensor, ...]:
    rows, tokens, width = qkv.shape
    shape = (num_heads, width // (3 * num_heads))
    k, v = (qkv.new_empty(rows * tokens, *shape) for _ in range(2))
    return qkv.new_empty(rows, tokens, *shape), k, v


def _backward_fake(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, qkv: Tensor, scale: Tensor | None) -> Any:
    shape = (0,) if scale is None else grad_q.shape[:3]
    return qkv.new_empty(qkv.shape), qkv.new_empty(shape, dtype=_registry.accumulation_dtype(qkv.dtype))


def _fake(qkv: Tensor, scale: Tensor | None, k_pages: Tensor, *_: Tensor) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], k_pages.shape[1], k_pages.shape[2])


_registry.register(
    "qk_norm",
    "(Tensor qkv, Tensor? scale, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor? slots, str impl) -> Tensor",
    torch_path=_qk_norm,
    triton_path=_triton,
    fake=_fake,
    flops=_registry.no_flops,
)
_registry.register(
    "split_qk_norm",
    "(Tensor qkv, Tensor? scale, int num_heads, str impl) -> (Tensor, Tensor, Tensor)",
    torch_path=partial(_split, _qk_norm),
    triton_path=partial(_split, _triton),
    fake=_split_fake,
    flops=_registry.no_flops,
    backward=_autograd,
)
_registry.register(
    "qk_norm_backward",
    "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor qkv, Tensor? scale, str impl) -> (Tensor, Tensor)",
    torch_path=_qk_norm_backward,
    triton_path=_backward_triton,
    fake=_backward_fake,
    flops=_registry.no_flops,
)
