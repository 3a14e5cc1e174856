"""Dew (PyPI: dewml): its conditional UNet of the same structure, with random weights of its own."""

from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
import optax
from dew.diffusion.process import DenoisingCondition
from dew.nn.backbones.unet_condition import UNet2DCondition, UNetStage

from benchmarks.peers.worker import serve


def _denoising(inputs):
    # The UNets of this comparison attend at every level, with eight heads; the exact GELU.
    unet = UNet2DCondition(
        stages=tuple(UNetStage(width, 8) for width in (128, 256, 512)), approximate_gelu=False
    )
    x, t = jnp.asarray(inputs["x"]), jnp.asarray(inputs["t"])
    condition = DenoisingCondition(context=jnp.asarray(inputs["context"]))
    params = jax.jit(unet.init)(jax.random.key(0), x, t, conditioning=condition)

    def denoise(params, x, t, condition):
        return unet.apply(params, x, t, conditioning=condition)

    return denoise, params, (x, t, condition)


def forward(folder, inputs):
    denoise, params, batch = _denoising(inputs)
    program = jax.jit(denoise)
    return lambda: np.float32(program(params, *batch))


def step(folder, inputs):
    denoise, params, batch = _denoising(inputs)
    rule, noise = optax.adamw(1e-4, weight_decay=0.01), jnp.asarray(inputs["noise"])
    average = jax.tree.map(jnp.copy, params)
    state = (params, average, rule.init(params))

    def train_step(state, batch):
        params, average, moments = state
        loss, grads = jax.value_and_grad(
            lambda params: jnp.mean(jnp.square(denoise(params, *batch) - noise))
        )(params)
        updates, moments = rule.update(grads, moments, params)
        params = optax.apply_updates(params, updates)
        return (params, optax.incremental_update(params, average, 0.001), moments), loss

    program = jax.jit(train_step, donate_argnums=0)

    def work():
        nonlocal state
        state, loss = program(state, batch)
        jax.block_until_ready(state)
        return np.asarray(loss)

    return work


if __name__ == "__main__":
    versions = f"dewml {metadata.version('dewml')}, jax {jax.__version__}"
    serve(versions, {work.__name__: work for work in (forward, step)})
