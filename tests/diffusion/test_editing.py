"""Masks, tiles, strengths and paths between noises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.editing import (
    keep_known,
    noised,
    skipped_steps,
    slerp,
    tile_starts,
    tiled,
)
from ldm_jax.diffusion.noise import example_keys
from ldm_jax.diffusion.schedule import Level

X = jax.random.normal(jax.random.key(0), (2, 7, 12, 3))


@pytest.mark.parametrize(
    "strength, skipped", [(0.0, 50), (0.5, 25), (0.29, 36), (0.8, 10), (1.0, 0)]
)
def test_strength_is_the_share_of_steps_that_run(strength, skipped):
    assert skipped_steps(50, strength) == skipped


@pytest.mark.parametrize("strength", [-0.1, 1.01])
def test_strength_outside_its_range_is_refused(strength):
    with pytest.raises(ValueError, match=f"strength={strength:g}: must lie in 0"):
        skipped_steps(50, strength)


def test_known_latents_come_back_as_noisy_as_the_rest():
    known, mask = jnp.full((2, 64, 64, 1), 3.0), np.zeros((2, 64, 64, 1), np.float32)
    mask[:, :32] = 1.0
    x, level = jnp.full_like(known, 7.0), Level(0.0, 0.6, 0.8)
    keys = example_keys(jax.random.key(0), 2)
    mixed = keep_known(known, mask)(x, level, keys)
    np.testing.assert_array_equal(mixed[:, :32], 7.0)
    kept = mixed[:, 32:]
    assert abs(kept.mean() - 0.6 * 3.0) < 0.05 and abs(kept.std() - 0.8) < 0.05
    alone = keep_known(known[:1], mask[:1])(x[:1], level, keys[:1])
    np.testing.assert_array_equal(alone[0], mixed[0])


def test_noised_is_the_forward_process():
    np.testing.assert_allclose(noised(2.0, 5.0, Level(0.0, 0.6, 0.8)), 0.6 * 2 + 0.8 * 5)


def test_slerp_walks_the_great_circle():
    a, b = np.array([2.0, 0.0, 0.0]), np.array([0.0, 2.0, 0.0])
    path = slerp(a, b, np.linspace(0.0, 1.0, 5))
    np.testing.assert_allclose(path[0], a, atol=1e-6)
    np.testing.assert_allclose(path[-1], b, atol=1e-6)
    np.testing.assert_allclose(path[2], [2**0.5, 2**0.5, 0.0], rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(path, axis=1), 2.0, rtol=1e-5)
    np.testing.assert_allclose(slerp(a, 3 * a, 0.5), 2 * a, rtol=1e-5)  # parallel: a straight line


@pytest.mark.parametrize("size", range(1, 30))
@pytest.mark.parametrize("tile, stride", [(8, 4), (8, 7), (8, 1), (5, 5)])
def test_tiles_cover_every_pixel_and_nothing_else(size, tile, stride):
    starts = tile_starts(size, tile, stride)
    covered = np.zeros(size, int)
    for start in starts:
        assert start >= 0 and (start + tile <= size or size < tile)
        covered[start : start + tile] += 1
    assert covered.min() >= 1 and len(set(starts)) == len(starts)


@pytest.mark.parametrize("size", [(7, 12), (4, 4), (5, 9), (16, 16)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_tiles_of_a_pointwise_function_make_the_whole(size, overlap):
    """What needs no neighbours is the same in tiles, at any size."""
    x = jax.random.normal(jax.random.key(1), (2, *size, 3))
    np.testing.assert_allclose(
        tiled(lambda v: 2.0 * v + 1.0, x, (4, 4), overlap), 2.0 * x + 1.0, rtol=1e-5
    )


def test_tiles_of_something_that_enlarges():
    def twice(v):
        return jnp.repeat(jnp.repeat(v, 2, axis=1), 2, axis=2)

    np.testing.assert_allclose(tiled(twice, X, (4, 4), 0.5, scale=2), twice(X), rtol=1e-5)


def test_tiles_blend_without_seams():
    """Tiles that disagree by a constant: the ramp keeps the steps between neighbours small."""

    def disagree(parts):
        return jnp.arange(len(parts))[:, None, None, None] * jnp.ones((8, 8, 1))

    out = tiled(disagree, jnp.zeros((1, 8, 14, 1)), (8, 8), 0.25)
    assert float(jnp.abs(jnp.diff(out, axis=2)).max()) <= 0.5


def test_a_picture_no_larger_than_a_tile_passes_whole():
    calls = []
    tiled(lambda v: calls.append(v.shape) or v, X, (16, 16))
    assert calls == [X.shape]


def test_overlap_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="tile overlap 1: must be at least 0 and below 1"):
        tiled(lambda v: v, X, (4, 4), 1.0)
