"""From the joint projection to attention: normalisation of queries and keys, keys and values to their pages."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from varlik.ops import _registry
from varlik.ops._registry import INT64, Argument, Signature

MIN_NORM = 1e-12

_ARGUMENTS = Signature(
    qkv=Argument("R T 3C"),
    scale=Argument("H", optional=True),
    k_pages=Argument("P H D", "qkv"),
    v_pages=Argument("P H D", "qkv"),
    slots=Argument("R L", INT64, optional=True),
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
    impl = _registry.choose_impl("qk_norm", impl)
    sizes = _ARGUMENTS.check(qkv, scale, k_pages, v_pages, slots)
    if sizes["3C"] != 3 * sizes["H"] * sizes["D"]:
        width = 3 * sizes["H"] * sizes["D"]
        raise ValueError(f"qkv: expected shape (R, T, 3C) with 3C = 3HD = {width}, got {tuple(qkv.shape)}")
    length = row_length(sizes, slots)
    if length < sizes["T"]:
        raise ValueError(f"qkv: expected shape (R, T, 3C) with T <= L = {length}, got {tuple(qkv.shape)}")
    return _registry.call("qk_norm", qkv, scale, k_pages, v_pages, slots, impl)


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


def _fake(qkv: Tensor, scale: Tensor | None, k_pages: Tensor, *_: Tensor) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], k_pages.shape[1], k_pages.shape[2])


_registry.register(
    "qk_norm",
    "(Tensor qkv, Tensor? scale, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor? slots, str impl) -> Tensor",
    torch_path=_qk_norm,
    fake=_fake,
    flops=_registry.no_flops,
)
