"""What a training step of a UNet keeps for its backward pass, by precision and `train.remat`.

    python -m benchmarks.kept [VARIANT of configs/published.py, default sd1]

For one picture of the model's size. Nothing is computed or allocated: the sizes are those of the
arrays that JAX passes from the forward to the backward pass, parameters left out. Compilers keep
somewhat less, because they fuse operations.
"""

import sys

import jax
import jax.numpy as jnp

from ldm_jax.models.remat import POLICIES
from ldm_jax.models.unet import UNet
from ldm_jax.published import MODELS


def kept(unet: UNet, side: int) -> float:
    """Gigabytes, at one picture of `side` latents."""
    x, t = jnp.zeros((1, side, side, unet.in_channels)), jnp.zeros(1)
    context = unet.context_dim and jnp.zeros((1, 77, unet.context_dim))
    y = jnp.zeros((1, unet.adm_in_channels)) if unet.num_classes == "sequential" else None
    params = jax.eval_shape(lambda: unet.init(jax.random.key(0), x, t, context, y=y))

    def backward(params):
        output = lambda p: unet.apply(p, x, t, context, y=y).astype(jnp.float32)  # noqa: E731
        return jax.vjp(output, params)[1]

    arrays = jax.tree.leaves(jax.eval_shape(backward, params))
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in arrays)
    own = [leaf.shape for leaf in jax.tree.leaves(params)]
    for leaf in arrays:  # the parameters among them
        if leaf.shape in own:
            own.remove(leaf.shape)
            total -= leaf.size * leaf.dtype.itemsize
    return total / 1e9


def main():
    name = sys.argv[1] if len(sys.argv) > 1 else "sd1"
    side = MODELS[name].size // 8
    for precision, dtype in (("float32", None), ("bfloat16", jnp.bfloat16)):
        for remat in ("", *POLICIES):
            unet = UNet(**MODELS[name].unet, dtype=dtype, remat=remat)
            print(f"{name} {precision:9}{remat or 'none':9}{kept(unet, side):7.2f} GB", flush=True)


if __name__ == "__main__":
    main()
