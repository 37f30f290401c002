"""A linear layer with its activation.

On a CPU GELU is part of the product, so that the widest activation of a block is written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from varlik.ops import _registry
from varlik.ops._registry import Argument, Signature

ACTIVATIONS = ("none", "gelu_tanh")
# Products with larger weights gain less from one pass than they lose to the faster plain product.
SMALL_WEIGHT = 2**18

_ARGUMENTS = Signature(x=Argument("R T C"), weight=Argument("O C", "x"), bias=Argument("O", "x"))


def linear(x: Tensor, weight: Tensor, bias: Tensor, *, activation: str = "none", impl: str = "auto") -> Tensor:
    """activation(x @ weight^T + bias).

    `x` (R, T, C), `weight` (O, C) and `bias` (O,) in the dtype of `x` -> (R, T, O). `activation` is "none" or
    "gelu_tanh", x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))).

    Raises `ValueError` for other shapes, several devices, an activation or an `impl` it lacks, or inputs that require
    grad; `TypeError` for other dtypes.

    Source: "Gaussian Error Linear Units", Hendrycks and Gimpel 2016, section 2, for the approximation.
    """
    impl = _registry.choose_impl("linear", impl)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    _ARGUMENTS.check(x, weight, bias)
    return _registry.call("linear", x, weight, bias, activation, impl)


def _linear(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    gelu = activation == "gelu_tanh"
    cpu = x.device.type == "cpu" and x.dtype == torch.float32
    if cpu and x.numel() and (gelu or weight.numel() <= SMALL_WEIGHT) and _has_onednn():
        # What torch's own compiler calls for this on a CPU: product, bias and GELU in one pass.
        name, algorithm = ("gelu", "tanh") if gelu else ("none", "")
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, name, [], algorithm)
    # On a CPU, a product that starts from its bias is up to 8 % slower than one pass more.
    y = F.linear(x, weight).add_(bias) if cpu else F.linear(x, weight, bias)
    return F.gelu(y, approximate="tanh") if gelu else y


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _flops(x: Sequence[int], weight: Sequence[int], bias: Sequence[int], activation: str) -> int:
    return 2 * x[0] * x[1] * weight[0] * weight[1]


_registry.register(
    "linear",
    "(Tensor x, Tensor weight, Tensor bias, str activation, str impl) -> Tensor",
    torch_path=_linear,
    fake=lambda x, weight, *_: x.new_empty(x.shape[0], x.shape[1], weight.shape[0]),
    flops=_flops,
)
