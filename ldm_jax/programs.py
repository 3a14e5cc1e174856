"""The compiled programs of a pipeline."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ldm_jax.conditions.base import Inputs
from ldm_jax.diffusion.noise import Examples, example_keys
from ldm_jax.diffusion.plan import Run
from ldm_jax.interop.changes import Lora, merge
from ldm_jax.latent_diffusion import Known, LatentDiffusion
from ldm_jax.runtime.executables import kept

# Parameters, and LoRAs to be added to them, each with its scale.
Weights = tuple[dict[str, Any], tuple[tuple[Lora, Any], ...]]


def merged(weights: Weights) -> dict[str, Any]:
    """The parameters with all LoRAs in them."""
    params, loras = weights
    for lora, scale in loras:
        params = merge(params, lora, scale)
    return params


@kept("model", "latent_shape", "sampler", "tile", "branch", "weak_model", "callback")
def generate(
    weights: Weights,
    seed: jax.Array,
    inputs: list[Inputs],
    negatives: Inputs,
    index: jax.Array,
    known: Known | None,
    latents: jax.Array | None,
    shares: jax.Array | None = None,
    *,
    model: LatentDiffusion,
    run: Run,
    weak: Weights | None,
    weak_model: LatentDiffusion | None,
    **static,
):
    """Pictures (B, H, W, C) in [0, 1], see `LatentDiffusion.generate`; picture `index[i]` (B,) of a
    seed is always the same."""
    keys = _keys(seed, index)
    weak = None if weak is None else (weak_model, merged(weak))
    options = dict(known=known, latents=latents, shares=shares, weak=weak) | static
    return model.generate(merged(weights), inputs, negatives, keys, run, **options)


def not_finite(draw: Callable, steps: int) -> str:
    """The message for pictures that are not finite: draws them again and checks every step."""
    wrong: list[int] = []
    draw(callback=lambda done, x0: None if np.isfinite(x0).all() else wrong.append(int(done)))
    jax.effects_barrier()
    if not wrong:
        return (
            "the last step or the autoencoder gave numbers that are not finite: try dtype float32"
        )
    return (
        f"step {min(wrong)} of {steps} gave numbers that are not finite: try another sampler or "
        "spacing, less guidance, or dtype float32; from the first step on, the weights may be "
        "damaged"
    )


@kept("model")
def invert(weights: Weights, *args, model: LatentDiffusion):
    """Starting noise (B, h, w, c), see `LatentDiffusion.invert`."""
    return model.invert(merged(weights), *args)


@kept("latent_shape")
def starting_noise(seed: jax.Array, index: jax.Array, *, latent_shape: tuple[int, ...]):
    """The unit Gaussian noise (B, h, w, c) from which `generate` starts."""
    return jax.vmap(lambda key: jax.random.normal(key, latent_shape))(_keys(seed, index))


def _keys(seed: jax.Array, index: jax.Array) -> jax.Array:
    return example_keys(jax.random.key(seed), Examples(index, len(index)))
