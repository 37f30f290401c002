"""The tensor operations of the engine: public function, checks, paths and registration, one file per op.

Torch and Triton paths share one registered op. Those that scoring needs gradients of are differentiable, with a
backward op of their own; the others refuse inputs that require grad while grad mode is on.
"""

from varlik.ops._registry import IMPLS, autotuning, has_triton, runs_kernels
from varlik.ops.ada_layer_norm import ada_layer_norm, ada_layer_norm_backward, residual_ada_layer_norm
from varlik.ops.linear import linear
from varlik.ops.nearest_code import nearest_code
from varlik.ops.qk_norm import qk_norm, qk_norm_backward, split_qk_norm
from varlik.ops.scale_causal_attention import scale_causal_attention, scale_causal_attention_backward
from varlik.ops.token_log_prob import scale_log_prob, token_log_prob, token_log_prob_backward

__all__ = [
    "IMPLS",
    "ada_layer_norm",
    "ada_layer_norm_backward",
    "autotuning",
    "has_triton",
    "linear",
    "nearest_code",
    "qk_norm",
    "qk_norm_backward",
    "residual_ada_layer_norm",
    "runs_kernels",
    "scale_causal_attention",
    "scale_causal_attention_backward",
    "scale_log_prob",
    "split_qk_norm",
    "token_log_prob",
    "token_log_prob_backward",
]
