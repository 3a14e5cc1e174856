"""Factors beside a kernel, which a layer adds to its product: LoRA and DoRA in training.

With `down` (…, in, rank), `up` (rank, out) and a number s beside a kernel W, a layer computes
x∗W + s·(x∗down)·up, the product with W + s·down·up (Hu et al. 2021, eq. 3; of a convolution LoCon).
So no changed kernel is kept for the gradient, W has none, and a small change is not rounded to the
type of W. With norms m it is the product with m·V/‖V‖, V = W + s·down·up, where ‖V‖, the norms of V
for each output, is a constant in the gradient (DoRA: Liu et al. 2024, §4.3).
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ldm_jax.models.attention import GatedDense

# The leaves beside a "kernel".
DOWN, UP, MAGNITUDE, SCALE = "lora_down", "lora_up", "lora_magnitude", "lora_scale"
EPSILON = np.finfo(np.float32).eps  # for outputs without any weight


def adding_factors() -> contextlib.AbstractContextManager[None]:
    """Within it, layers of networks that are applied add the factors that their parameters hold."""
    return nn.intercept_methods(_add)


def norms(kernel: jax.Array) -> jax.Array:
    """The norm of a kernel (…, in, out) for each output: (out,), float32."""
    kernel = kernel.astype(jnp.float32)
    return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=tuple(range(kernel.ndim - 1))))


def _add(call: Callable, args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
    layer = context.module
    known = isinstance(layer, nn.Dense | nn.Conv | GatedDense) and context.method_name == "__call__"
    if not known or not layer.has_variable("params", DOWN):
        return call(*args, **kwargs)
    params, (x,) = layer.variables["params"], args
    out = call(x)
    parts = out if isinstance(layer, GatedDense) else (out,)
    x, down, up = nn.dtypes.promote_dtype(x, params[DOWN], params[UP], dtype=parts[0].dtype)
    if isinstance(layer, nn.Conv):
        options = dict(features=down.shape[-1], use_bias=False, name=None, parent=None)
        inner = layer.clone(**options).apply({"params": {"kernel": down}}, x)
    else:
        inner = x @ down
    ratio, changed, start = _ratio(params), [], 0
    for part in parts:
        outputs = slice(start, start := start + part.shape[-1])
        change = (inner @ up[:, outputs]) * params[SCALE].astype(part.dtype)
        if ratio is not None:
            # In this form nothing is rounded where the ratio is 1.
            own = ratio[outputs]
            product = part - params["bias"][outputs] if "bias" in params else part
            change = (own - 1.0) * product + own * change
        changed.append(part + change.astype(part.dtype))
    return tuple(changed) if isinstance(layer, GatedDense) else changed[0]


def _ratio(params: dict[str, jax.Array]) -> jax.Array | None:
    """m/‖V‖ of DoRA for each output; None of LoRA."""
    if MAGNITUDE not in params:
        return None
    kernel, down, up = (params[name].astype(jnp.float32) for name in ("kernel", DOWN, UP))
    length = norms(kernel + params[SCALE] * jnp.matmul(down, up))
    return params[MAGNITUDE].astype(jnp.float32) / (jax.lax.stop_gradient(length) + EPSILON)
