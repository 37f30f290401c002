"""A linear layer with its activation.

On a CPU GELU is part of the product, so that the widest activation of a block is written once. On a CUDA device cuBLAS
is the better choice; the Triton path is for scores that must not depend on how many rows are in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varlik.ops import _registry
from varlik.ops._registry import Argument, Signature

ACTIVATIONS = ("none", "gelu_tanh")
# Products with larger weights gain less from one pass than they lose to the faster plain product.
SMALL_WEIGHT = 2**18

_ARGUMENTS = Signature(
    {"x": Argument("R T C"), "weight": Argument("O C", "x"), "bias": Argument("O", "x")}, differentiable=True
)


def linear(x: Tensor, weight: Tensor, bias: Tensor, *, activation: str = "none", impl: str = "auto") -> Tensor:
    """activation(x @ weight^T + bias).

    `x` (R, T, C), `weight` (O, C) and `bias` (O,) in the dtype of `x` -> (R, T, O). `activation` is "none" or
    "gelu_tanh", x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))). Differentiable. `impl` "auto" is "torch"
    everywhere; with "triton" every output is one sum in a fixed order, whatever the number of rows.

    Raises `ValueError` for other shapes, several devices, or an activation or `impl` it lacks; `TypeError`
    for other dtypes.

    Source: "Gaussian Error Linear Units", Hendrycks and Gimpel 2016, section 2, for the approximation.
    """
    impl = _registry.choose_impl("linear", "torch" if impl == "auto" else impl)
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


def _triton(*inputs: Any) -> Tensor:
    from varlik.kernels.linear import linear as kernel

    return kernel(*inputs)


def _autograd(inputs: list[Any], output: Any, needs: Any, impl: str, grad: Tensor) -> tuple[Any, ...]:
    x, weight, bias, activation = inputs
    if activation == "gelu_tanh":
        before = linear(x, weight, bias, impl=impl)
        grad = torch.ops.aten.gelu_backward(grad, before, approximate="tanh")
    flat = grad.flatten(0, 1)
    no_bias = weight.new_zeros(weight.shape[1])
    grad_x = linear(grad, weight.T, no_bias, impl=impl) if needs[0] else None
    grad_weight = flat.T @ x.flatten(0, 1) if needs[1] else None
    return grad_x, grad_weight, flat.sum(0) if needs[2] else None, None


def _flops(x: Sequence[int], weight: Sequence[int], bias: Sequence[int], activation: str) -> int:
    return 2 * x[0] * x[1] * weight[0] * weight[1]


_registry.register(
    "linear",
    "(Tensor x, Tensor weight, Tensor bias, str activation, str impl) -> Tensor",
    torch_path=_linear,
    triton_path=_triton,
    fake=lambda x, weight, *_: x.new_empty(x.shape[0], x.shape[1], weight.shape[0]),
    flops=_flops,
    backward=_autograd,
)
