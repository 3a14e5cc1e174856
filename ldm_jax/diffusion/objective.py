"""The training objective: a draw of timesteps, a noised input, a weighted distance."""

import jax
import jax.numpy as jnp

from ldm_jax.diffusion.noise import per_example


def uniform_timesteps(key: jax.Array, count: int, timesteps: int) -> jax.Array:
    """(count,) integers, uniform in [0, timesteps), one from each example's own key."""

    def draw(key, shape):
        return jax.random.randint(key, shape, 0, timesteps)

    return per_example(draw, key, (count,))


def per_example_loss(kind: str, output: jax.Array, target: jax.Array) -> jax.Array:
    """Mean over all but the batch: "l2" squared error or "l1" absolute error (LDM `p_losses`)."""
    error = output.astype(jnp.float32) - target
    axes = tuple(range(1, error.ndim))
    if kind == "l2":
        return jnp.mean(jnp.square(error), axes)
    if kind == "l1":
        return jnp.mean(jnp.abs(error), axes)
    raise ValueError(f"loss {kind!r}: choose l1 or l2")
