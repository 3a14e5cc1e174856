"""Exponential moving average of parameters with the warm-up of the originals."""

from typing import Any

import jax
import jax.numpy as jnp


def ema_decay_at(step: jax.Array, decay: float) -> jax.Array:
    """min(decay, (1 + n)/(10 + n)), n = step + 1 counted from the first update (LDM, `LitEma`)."""
    n = step.astype(jnp.float32) + 1.0
    return jnp.minimum(decay, (1.0 + n) / (10.0 + n))


def update_ema(ema: Any, params: Any, step: jax.Array, decay: float) -> Any:
    """ema − (1 − d)(ema − params), d = `ema_decay_at(step, decay)`."""
    weight = 1.0 - ema_decay_at(step, decay)
    return jax.tree.map(lambda e, p: e - weight * (e - p), ema, params)
