"""Guidance: how several opinions of networks become one.

All of it acts on a network's raw output, `network(x, t, condition)`, and works for any
parameterisation, for all are affine in x with the same coefficients; only `dynamic_threshold`
acts on the prediction of x0.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.diffusion.parameterization import Denoiser, Network, Prediction
from ldm_jax.diffusion.schedule import Level

ConditionalNetwork = Callable[[jax.Array, jax.Array, Any], jax.Array]


def classifier_free(
    network: ConditionalNetwork,
    conditions: list,
    null,
    scale: jax.Array,
    weights: jax.Array | None = None,
    rescale: jax.Array | float = 0.0,
) -> Network:
    """uncond + scale·Σ_k w_k·(cond_k − uncond) in one batch (Ho & Salimans 2022; LDM's convention).

    With one condition, scale 1 is the plain conditional model and 0 the unconditional one. With
    several it is their conjunction (Liu et al. 2022, eq. 11) with `weights` (K,). `conditions` and
    `null` are pytrees with a leading batch dimension, stacked here as [null, cond_1, …]. `rescale`
    φ in [0, 1] moves the result's standard deviation to the conditional one's (`rescaled`).
    """
    every = jax.tree.map(lambda *parts: jnp.concatenate(parts), null, *conditions)
    weights = jnp.ones(len(conditions)) if weights is None else weights

    def guided(x, t):
        copies = len(conditions) + 1
        output = network(jnp.tile(x, (copies, *(1,) * (x.ndim - 1))), jnp.tile(t, copies), every)
        uncond, *conds = jnp.split(output, copies)
        away = sum(w * (cond - uncond) for w, cond in zip(weights, conds, strict=True))
        return rescaled(uncond + scale * away, uncond + away, rescale)

    return guided


def autoguidance(strong: Network, weak: Network, scale: jax.Array) -> Network:
    """weak + scale·(strong − weak), where `weak` is a worse model of the same latents (Karras et
    al. 2024, eq. 2). Either may itself be guided."""

    def guided(x, t):
        bad = weak(x, t)
        return bad + scale * (strong(x, t) - bad)

    return guided


def where_guided(guided: Network, plain: Network, active: jax.Array) -> Network:
    """`guided` while `active`, else `plain`, which costs only one evaluation (Kynkäänniemi et al.
    2024). Only one of them runs."""
    return lambda x, t: jax.lax.cond(active, guided, plain, x, t)


def rescaled(guided: jax.Array, plain: jax.Array, phi: jax.Array | float) -> jax.Array:
    """φ·guided·std(plain)/std(guided) + (1 − φ)·guided, per example (Lin et al. 2023, eq. 16)."""
    axes = tuple(range(1, guided.ndim))
    ratio = jnp.std(plain, axes, keepdims=True) / (jnp.std(guided, axes, keepdims=True) + 1e-12)
    return guided * (1.0 + phi * (ratio - 1.0))


def dynamic_threshold(denoise: Denoiser, percentile: jax.Array, limit: float = 1.0) -> Denoiser:
    """x0 clipped to its own percentile (in [0, 1]) of |x0|, if beyond `limit`, and scaled back to
    `limit` (Saharia et al. 2022, §2.3), per example. ε is recomputed from x0, so x is unchanged.
    """

    def thresholded(x: jax.Array, level: Level) -> Prediction:
        x0 = denoise(x, level).x0
        size = jnp.abs(x0).reshape(x0.shape[0], -1)
        s = jnp.maximum(jnp.quantile(size, percentile, axis=1), limit)
        s = s.reshape(-1, *(1,) * (x.ndim - 1))
        x0 = jnp.clip(x0, -s, s) * (limit / s)
        return Prediction(x0, (x - level.alpha * x0) / level.sigma)

    return thresholded
