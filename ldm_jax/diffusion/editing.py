"""Editing of a given picture: strength, inpainting, interpolation and tiles, for any sampler."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.schedule import Level


def skipped_steps(steps: int, strength: float) -> int:
    """How many of `steps` an edit of this strength skips: those above its noise level.

    Strength 0 leaves the picture unchanged, 1 starts from (almost) pure noise.

    Raises:
      ValueError: a strength outside [0, 1].
    """
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength={strength:g}: must lie in 0 (the picture stays) … 1 (redrawn)")
    # The tolerance is for products such as 0.29 · 100 = 28.999999999999996.
    return steps - int(strength * steps + 1e-9)


def noised(latents: jax.Array, noise: jax.Array, level: Level) -> jax.Array:
    """α·latents + σ·noise: a sample of the forward process."""
    return level.alpha * latents + level.sigma * noise


def keep_known(
    known: jax.Array, mask: jax.Array
) -> Callable[[jax.Array, Level, jax.Array], jax.Array]:
    """Inpainting with any model: before each step, the known latents are restored, as noisy as x.

    `known` (B, h, w, c) are clean latents, `mask` (B, h, w, 1) is 1 where x is redrawn and 0 where
    `known` stays (RePaint without resampling, Lugmayr et al. 2022, eq. 8; CompVis' DDIM, whose mask
    is the opposite). A `before_step` of `sample`; the caller restores `known` again at the end.
    """

    def put_back(x: jax.Array, level: Level, keys: jax.Array) -> jax.Array:
        noise = jax.vmap(lambda key: jax.random.normal(key, known.shape[1:], known.dtype))(keys)
        return mask * x + (1.0 - mask) * noised(known, noise, level)

    return put_back


def slerp(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """From a (weight 0) to b (weight 1) on the great circle between them (Shoemake 1985).

    Gaussian noise lies near a sphere, and points of a straight line do not. `a` and `b` have one
    shape (…), the result (weight's shape, …). Parallel ends are interpolated linearly.
    """
    cosine = np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b))
    angle = np.arccos(np.clip(cosine, -1.0, 1.0))
    weight = np.asarray(weight, a.dtype)
    weight = weight.reshape(weight.shape + (1,) * a.ndim)
    sine = np.sin(angle)
    straight = sine < 1e-4
    safe = np.where(straight, 1.0, sine)
    of_a = np.where(straight, 1.0 - weight, np.sin((1.0 - weight) * angle) / safe)
    of_b = np.where(straight, weight, np.sin(weight * angle) / safe)
    return of_a * a + of_b * b


def tile_starts(size: int, tile: int, stride: int) -> np.ndarray:
    """The starts of the tiles along one side: every `stride`; the last tile ends at the end."""
    if size <= tile:
        return np.zeros(1, int)
    return np.append(np.arange(0, size - tile, stride), size - tile)


def tiled(
    apply: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    tile: tuple[int, int],
    overlap: float = 0.5,
    scale: int = 1,
) -> jax.Array:
    """`apply` to overlapping tiles of x (B, H, W, C), blended into one (B, scale·H, scale·W, C').

    LDM's convolutional sampling (Rombach et al. 2022, §4.3.2) for any size: the tiles of a side
    begin every (1 − overlap)·tile and the last ends with the picture, so every pixel is covered.
    Weights fall linearly from each tile's middle. `apply` is called once on (tiles·B, …), with
    tiles outermost; its output is `scale` times as large. A picture no larger than a tile is one
    tile.

    Raises:
      ValueError: an overlap outside [0, 1).
    """
    if not 0.0 <= overlap < 1.0:
        raise ValueError(f"tile overlap {overlap:g}: must be at least 0 and below 1")
    _, height, width, _ = x.shape
    size = (min(tile[0], height), min(tile[1], width))
    if size == (height, width):
        return apply(x)
    stride = [max(1, round(side * (1.0 - overlap))) for side in size]
    corners = [
        (top, left)
        for top in tile_starts(height, size[0], stride[0])
        for left in tile_starts(width, size[1], stride[1])
    ]
    parts = [x[:, top : top + size[0], left : left + size[1]] for top, left in corners]
    made = jnp.split(apply(jnp.concatenate(parts)), len(corners))
    ramps = [np.minimum(np.arange(1, n + 1), np.arange(n, 0, -1)) for n in np.multiply(size, scale)]
    weight = jnp.asarray(np.outer(*ramps)[None, :, :, None], made[0].dtype)
    total = jnp.zeros((x.shape[0], height * scale, width * scale, made[0].shape[-1]))
    weights = jnp.zeros((1, height * scale, width * scale, 1))
    for (top, left), part in zip(corners, made, strict=True):
        at = np.s_[
            :, scale * top : scale * (top + size[0]), scale * left : scale * (left + size[1])
        ]
        total = total.at[at].add(weight * part)
        weights = weights.at[at].add(weight)
    return total / weights
