"""Rematerialisation: what a network's blocks keep between the forward and the backward pass.

Training keeps the results of every operation for the backward pass. A block that is rematerialised
keeps its inputs and those results that the policy names, and computes the others again.
"""

from typing import Any

import jax
from flax import linen as nn

_PRODUCTS = ("conv_general_dilated",)


def _products(primitive: Any, *inputs: Any, **params: Any) -> bool:
    """Matrix products of activations and parameters, and convolutions."""
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return primitive.name in _PRODUCTS or dots(primitive, *inputs, **params)


# What a block keeps besides its inputs. Those that are kept cost memory, the others time.
POLICIES = {
    # Nothing: the least memory, and a second forward pass.
    "blocks": jax.checkpoint_policies.nothing_saveable,
    # The results of linear layers. Attention's logits and convolutions are computed again.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # Also those of convolutions: only norms, activations and attention are computed again.
    "products": _products,
}


def check_remat(name: str, remat: str) -> None:
    """Raises ValueError, with the list, if `remat` is neither "" nor one of `POLICIES`.

    `name` is that of the setting in the message.
    """
    if remat and remat not in POLICIES:
        raise ValueError(f'{name}={remat!r}: choose "" for none, or one of {", ".join(POLICIES)}')


def rematerialised(block: type[nn.Module], remat: str, static: tuple[int, ...] = ()) -> Any:
    """A class of modules as `block`, rematerialised by a policy; "" changes nothing.

    Names and shapes of parameters, and results, are the same. `static` are the positions of
    arguments of `__call__` that are no arrays, `self` being 0.
    """
    check_remat("remat", remat)
    return nn.remat(block, policy=POLICIES[remat], static_argnums=static) if remat else block
