"""Precision of training: the type in which networks compute. Parameters are always float32.

With "bfloat16" convolutions, linear layers and what lies between them are bfloat16. Statistics of
norms, softmax, losses, noise, schedules, the optimiser and averages stay float32, and so do files.
bfloat16 has the range of float32, so losses are not scaled.
"""

from typing import Any

import jax.numpy as jnp

PRECISIONS = {"float32": None, "bfloat16": jnp.bfloat16}  # None: as the inputs, float32


def compute_type(config: Any) -> Any:
    """The `dtype` of the networks by `config.precision`.

    Raises:
      ValueError: an unknown precision; lists the known ones.
    """
    precision = config.get("precision", "float32")
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: choose one of {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]
