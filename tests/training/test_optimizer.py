"""Learning rates, rules by name, and the average of parameters."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import optax.contrib
import pytest

from ldm_jax.training.ema import ema_decay_at, update_ema
from ldm_jax.training.muon import orthogonalize
from ldm_jax.training.optimizer import learning_rate, make_optimizer


def settings(**changes):
    config = dict(name="adamw", lr=1.0, schedule="constant", lr_end=0.1, warmup=4, b1=0.9, b2=0.99)
    config |= dict(weight_decay=0.0, clip=0.0, multipliers=())
    return ml_collections.ConfigDict(config | changes)


def test_warmup_is_linear_and_ends_at_the_rate():
    rate = learning_rate(settings(), 100)
    np.testing.assert_allclose([rate(i) for i in (0, 2, 4, 99)], [0.2, 0.6, 1.0, 1.0], rtol=1e-6)


def test_cosine_ends_at_its_share_of_the_rate():
    rate = learning_rate(settings(schedule="cosine"), 104)
    np.testing.assert_allclose([rate(4), rate(54), rate(104)], [1.0, 0.55, 0.1], rtol=1e-6)


def test_unknown_schedule_lists_the_known():
    with pytest.raises(ValueError, match="'step': choose one of constant, cosine"):
        learning_rate(settings(schedule="step"), 10)


def step(config, grads, params):
    optimizer = make_optimizer(config, 100, tuple(params))
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    return optax.apply_updates(params, updates)


PARAMS = {"unet": {"a": jnp.ones(3), "b": jnp.ones(3)}, "text": {"a": jnp.ones(3)}}


def test_rules_scale_and_freeze_by_path():
    config = settings(warmup=0, multipliers=((r"unet/b$", 0.0), (r"^text/", 0.5)))
    new = step(config, jax.tree.map(jnp.ones_like, PARAMS), PARAMS)
    moved = jax.tree.map(lambda a, b: float((b - a)[0]), new, PARAMS)
    assert moved["unet"]["b"] == 0.0
    assert moved["unet"]["a"] == pytest.approx(1.0, rel=1e-4)
    assert moved["text"]["a"] == pytest.approx(0.5, rel=1e-4)


def test_clipping_of_one_network_leaves_the_other_alone():
    optimizer = make_optimizer(settings(warmup=0, clip=1.0), 100, tuple(PARAMS))
    small = jax.tree.map(lambda p: 0.1 * jnp.ones_like(p), PARAMS)
    huge = small | {"text": {"a": 1e6 * jnp.ones(3)}}
    states = [optimizer.update(g, optimizer.init(PARAMS), PARAMS)[1] for g in (small, huge)]
    moments = [
        optax.tree.get(s, "mu", filtering=lambda path, _: "unet" in str(path)) for s in states
    ]
    for a, b in zip(*(jax.tree.leaves(m) for m in moments), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shape", [(40, 8), (8, 40), (16, 16)])
def test_orthogonalize_keeps_the_singular_vectors_alone(shape):
    matrix = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    values = u.T @ np.asarray(orthogonalize(jnp.asarray(7.0 * matrix))) @ vt.T
    np.testing.assert_allclose(values, np.diag(np.diag(values)), atol=1e-4)
    assert np.diag(values).min() > 0.6 and np.diag(values).max() < 1.3
    np.testing.assert_array_equal(orthogonalize(jnp.zeros(shape)), np.zeros(shape))


def test_muon_is_that_of_optax():
    """One step, and after so many that optax's correction of the momentum's start is forgotten."""
    rng = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 4, 8), "dense": (8, 24)}
    params = {name: {"kernel": rng.normal(size=shape)} for name, shape in shapes.items()}
    params["dense"]["bias"], params["token_emb"] = rng.normal(size=24), rng.normal(size=(9, 8))
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)

    def last_axis(path, p):
        kernel = path[-1].key == "kernel"
        axes = tuple(range(p.ndim))
        return optax.contrib.MuonDimensionNumbers(axes[:-1], axes[-1:]) if kernel else None

    theirs = optax.contrib.muon(
        0.01,
        weight_decay=0.1,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=jax.tree_util.tree_map_with_path(last_axis, params),
    )
    adam = optax.adamw(0.01, 0.9, 0.99, weight_decay=0.1)  # theirs is NAdam
    config = settings(name="muon", lr=0.01, warmup=0, weight_decay=0.1)
    ours = make_optimizer(config, 100, ("unet",))

    @jax.jit
    def both(states, key):
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        grads = tree.unflatten(
            [jax.random.normal(k, p.shape) for k, p in zip(keys, leaves, strict=True)]
        )
        a, first = theirs.update(grads, states[0], params)
        b, second = ours.update({"unet": grads}, states[1], {"unet": params})
        c, third = adam.update(grads, states[2], params)
        a |= {"token_emb": c["token_emb"]}
        a["dense"] |= {"bias": c["dense"]["bias"]}
        return (first, second, third), (a, b["unet"])

    states = theirs.init(params), ours.init({"unet": params}), adam.init(params)
    for step, key in enumerate(jax.random.split(jax.random.key(0), 200)):
        states, (a, b) = both(states, key)
        if step in (0, 199):
            for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
                np.testing.assert_allclose(x, y, atol=3e-6)


def test_unknown_optimizer_lists_the_known():
    with pytest.raises(ValueError, match="optimizer.name='adam': choose adamw or muon"):
        make_optimizer(settings(name="adam"), 10, ("unet",))


@pytest.mark.parametrize("n, decay", [(1, 2 / 11), (9, 0.5263), (90, 0.91), (1000, 0.99109)])
def test_ema_decay_is_the_originals(n, decay):
    """`n` counts from the first update, which is step 0."""
    assert float(ema_decay_at(jnp.int32(n - 1), 0.9999)) == pytest.approx(decay, abs=1e-4)


def test_ema_decay_is_capped_and_moves_towards_the_parameters():
    assert float(ema_decay_at(jnp.int32(10**6), 0.999)) == pytest.approx(0.999)
    ema = update_ema({"a": jnp.zeros(2)}, {"a": jnp.ones(2)}, jnp.int32(0), 0.9999)
    np.testing.assert_allclose(ema["a"], 9 / 11, rtol=1e-6)
