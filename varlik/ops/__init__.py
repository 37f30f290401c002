"""The tensor operations of the engine: public function, checks, torch path and registration, one file per op.

They are for inference: inputs that require grad are refused while grad mode is on. `varlik.models` is differentiable.
"""

from varlik.ops.ada_layer_norm import ada_layer_norm, residual_ada_layer_norm
from varlik.ops.linear import linear
from varlik.ops.nearest_code import nearest_code
from varlik.ops.qk_norm import qk_norm
from varlik.ops.scale_causal_attention import scale_causal_attention
from varlik.ops.token_log_prob import token_log_prob

__all__ = [
    "ada_layer_norm",
    "linear",
    "nearest_code",
    "qk_norm",
    "residual_ada_layer_norm",
    "scale_causal_attention",
    "token_log_prob",
]
