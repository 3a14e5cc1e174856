"""The compiled programs of a pipeline."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ldm_jax.conditions.base import Inputs
from ldm_jax.diffusion.plan import Run
from ldm_jax.interop.changes import Lora, merge
from ldm_jax.latent_diffusion import Known, LatentDiffusion

# Parameters, and LoRAs to be added to them, each with its scale.
Weights = tuple[dict[str, Any], tuple[tuple[Lora, Any], ...]]


def merged(weights: Weights) -> dict[str, Any]:
    """The parameters with all LoRAs in them."""
    params, loras = weights
    for lora, scale in loras:
        params = merge(params, lora, scale)
    return params


@functools.partial(
    jax.jit,
    static_argnums=0,
    static_argnames=("latent_shape", "sampler", "tile", "branch", "weak_model", "callback"),
)
def generate(
    model: LatentDiffusion,
    weights: Weights,
    inputs: list[Inputs],
    negatives: Inputs,
    keys: jax.Array,
    known: Known | None,
    latents: jax.Array | None,
    shares: jax.Array | None = None,
    *,
    run: Run,
    weak: Weights | None,
    weak_model: LatentDiffusion | None,
    **static,
):
    """Pictures (B, H, W, C) in [0, 1], see `LatentDiffusion.generate`."""
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


@functools.partial(jax.jit, static_argnums=0)
def invert(model: LatentDiffusion, weights: Weights, *args):
    """Starting noise (B, h, w, c), see `LatentDiffusion.invert`."""
    return model.invert(merged(weights), *args)
