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
# (uncond, cond − uncond, scale) → the guided output.
Combine = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def extrapolated(uncond: jax.Array, away: jax.Array, scale: jax.Array) -> jax.Array:
    """uncond + scale·(cond − uncond) (Ho & Salimans 2022, LDM's convention)."""
    return uncond + scale * away


def optimally_scaled(uncond: jax.Array, away: jax.Array, scale: jax.Array) -> jax.Array:
    """s·uncond + scale·(cond − s·uncond) with s = ⟨cond, uncond⟩/‖uncond‖², per example: CFG-Zero*
    (Fan et al. 2025, arXiv 2503.18886, eq. 9 and 10)."""
    cond, axes = uncond + away, tuple(range(1, uncond.ndim))
    along = jnp.sum(cond * uncond, axes, keepdims=True)
    s = along / (jnp.sum(jnp.square(uncond), axes, keepdims=True) + 1e-8)
    return s * uncond + scale * (cond - s * uncond)


def projected(
    x0_of_zero: jax.Array, factor: jax.Array, parallel: jax.Array, norm: jax.Array
) -> Combine:
    """Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416, algorithm 1), without its
    momentum, on predictions x0 = `x0_of_zero` + `factor`·output.

    Their difference is shortened to `norm`, and its part along the conditional x0, which
    over-saturates, multiplied by `parallel`.
    """

    def combine(uncond, away, scale):
        axes = tuple(range(1, uncond.ndim))
        cond = x0_of_zero + factor * (uncond + away)
        away = factor * away
        size = jnp.sqrt(jnp.sum(jnp.square(away), axes, keepdims=True))
        away = away * jnp.minimum(1.0, norm / jnp.maximum(size, 1e-12))
        squared = jnp.maximum(jnp.sum(jnp.square(cond), axes, keepdims=True), 1e-12)
        along = jnp.sum(away * cond, axes, keepdims=True) / squared * cond
        guided = cond + (scale - 1.0) * (away - along + parallel * along)
        return (guided - x0_of_zero) / factor

    return combine


def classifier_free(
    network: ConditionalNetwork,
    conditions: list,
    null,
    scale: jax.Array,
    weights: jax.Array | None = None,
    rescale: jax.Array | float = 0.0,
    combine: Combine = extrapolated,
) -> Network:
    """uncond + scale·Σ_k w_k·(cond_k − uncond) in one batch (Ho & Salimans 2022; LDM's convention).

    With one condition, scale 1 is the plain conditional model and 0 the unconditional one. With
    several it is their conjunction (Liu et al. 2022, eq. 11) with `weights` (K,), or (K, B) for
    each picture. `conditions` and `null` are pytrees with a leading batch dimension, stacked here
    as [null, cond_1, …]. `rescale` φ in [0, 1] moves the result's standard deviation to the
    conditional one's (`rescaled`). `combine` replaces the formula.
    """
    every = jax.tree.map(lambda *parts: jnp.concatenate(parts), null, *conditions)
    weights = jnp.ones(len(conditions)) if weights is None else jnp.asarray(weights)

    def guided(x, t):
        copies = len(conditions) + 1
        output = network(jnp.tile(x, (copies, *(1,) * (x.ndim - 1))), jnp.tile(t, copies), every)
        uncond, *conds = jnp.split(output, copies)
        ones = (1,) * (x.ndim - 1)
        away = sum(
            w.reshape(-1, *ones) * (cond - uncond) for w, cond in zip(weights, conds, strict=True)
        )
        return rescaled(combine(uncond, away, scale), uncond + away, rescale)

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
