"""A batch in parts gives the losses and gradients of the whole batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ldm_jax.diffusion.noise import per_example
from ldm_jax.training.accumulation import check_parts, in_parts, mean_over_parts
from ldm_jax.training.loop import train
from ldm_jax.training.state import init_state, make_train_step
from ldm_jax.training.tasks import make_task
from tests.conftest import ROOT
from tests.models.published import config_file
from tests.training import least_squares

PARTS = [pytest.param(2, marks=pytest.mark.long), 4]


def distance(a, b):
    """‖a − b‖/‖b‖ of two trees."""
    a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(t)]) for t in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_the_mean_is_over_all_rows_and_each_has_its_own_index():
    batch = {"x": jnp.arange(24.0).reshape(12, 2), "y": {"z": jnp.arange(12)}}

    def function(rows, examples):
        np.testing.assert_array_equal(rows["y"]["z"].shape, (12 // parts,))
        seen = jnp.zeros(12).at[examples.index].set(rows["y"]["z"].astype(float))
        noise = per_example(jax.random.normal, jax.random.key(0), rows["x"].shape, examples)
        return jnp.mean(rows["x"] * noise), seen, jnp.float32(examples.total)

    for parts in (1, 2, 3, 4, 12):
        mean, seen, total = mean_over_parts(function, batch, parts)
        whole = per_example(jax.random.normal, jax.random.key(0), (12, 2))
        np.testing.assert_allclose(mean, jnp.mean(batch["x"] * whole), rtol=1e-6)
        np.testing.assert_allclose(seen * parts, np.arange(12))
        assert total == 12


def test_rows_come_back_in_order_with_their_gradients():
    x, w = jnp.arange(24.0).reshape(12, 2), jnp.float32([0.3, -0.2])

    def loss(w, parts):
        def function(x):
            return jnp.sin(x * w), jnp.sum(x, axis=1)

        y, total = in_parts(function, parts)(x)
        np.testing.assert_array_equal(total, jnp.sum(x, axis=1))
        weights = jnp.arange(12.0)[:, None]
        return jnp.sum(weights * y) ** 2  # of the whole batch: no mean of losses of parts

    value, grads = jax.value_and_grad(loss)(w, 1)
    for parts in (2, 4):
        found, found_grads = jax.value_and_grad(loss)(w, parts)
        assert float(found) == pytest.approx(float(value), rel=1e-6)
        np.testing.assert_allclose(found_grads, grads, rtol=1e-5)


@pytest.mark.parametrize("parts", [2, 4])
def test_steps_of_least_squares_are_equal(parts):
    def trained(parts):
        task, optimizer = least_squares.Task(), optax.sgd(0.1)
        task.accumulate = parts
        step_function = jax.jit(make_train_step(task, optimizer, 0, 0.9, None))
        state, losses = init_state(task, optimizer, 0, {}), []
        for step, batch in task.batches(0):
            if step == 5:
                return state.params, losses
            state, metrics = step_function(state, {}, batch, step)
            losses.append(float(metrics["loss"]))

    (params, losses), (whole, expected) = trained(parts), trained(1)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    assert distance(params, whole) <= 1e-6


def smoke(name, **changes):
    config = config_file(ROOT / "configs" / f"{name}.py").get_config("smoke")
    config.update_from_flattened_dict(changes)
    return config


def with_parts(task, parts):
    config = task.config.copy_and_resolve_references()
    config.train.accumulate = parts
    return dataclasses.replace(task, config=config)


@functools.cache
def diffusion():
    """Stratified times, offset noise, a learned log-variance and dropped captions."""
    config = smoke("txt2img", **{"data.source": "emoji", "data.classes": ("food & drink",)})
    config.conditioning.text.dropout = 0.5
    config.objective.update(draw="stratified", learn_logvar=True, offset_noise=0.1)
    task = make_task(config)
    params, rng = jax.eval_shape(task.init, jax.random.key(0), {}), np.random.default_rng(0)
    params = jax.tree.map(lambda p: np.float32(0.1 * rng.normal(size=p.shape)), params)
    return task, params


@functools.cache
def autoencoder():
    task = make_task(smoke("autoencoder", **{"loss.kl_weight": 1e-3, "loss.disc_weight": 0.5}))
    return task, jax.jit(task.init)(jax.random.key(0), task.loaded)


@functools.cache
def gradients(make, parts, phase):
    """In float64: on a CPU, the order of a sum alone changes gradients of float32 by up to 1e-5."""
    task, params = make()
    _, batch = next(task.batches(0))
    with jax.enable_x64(True):
        params = {name: double(network) for name, network in params.items()}
        compiled = jax.jit(with_parts(task, parts).gradients, static_argnums=4)
        return jax.device_get(compiled(params, task.frozen, batch, jax.random.key(1), phase))


def double(network):
    """Float64 but for the layers whose input or output are pictures, which are float32."""
    if "conv_0" in network:
        return network  # the discriminator
    return {
        name: tree if name == "conv_out" else jax.tree.map(np.float64, tree)
        for name, tree in network.items()
    }


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize(
    "make, phase, tolerance", [(diffusion, None, 1e-6), (autoencoder, True, 5e-6)]
)
def test_gradients_are_equal(make, phase, tolerance, parts):
    grads, metrics = gradients(make, parts, phase)
    whole, expected = gradients(make, 1, phase)
    assert metrics.keys() == expected.keys() and whole.keys() == grads.keys()
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-6), name
    for name in whole:
        assert distance(grads[name], whole[name]) <= tolerance, name


def test_a_part_is_spread_over_all_devices_without_moving_data():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def loss(w, x):
        def of_part(rows, examples):
            noise = per_example(jax.random.normal, jax.random.key(0), rows.shape, examples)
            return jax.value_and_grad(lambda w: jnp.mean(jnp.square(jnp.tanh((rows + noise) @ w))))(
                w
            )

        return mean_over_parts(of_part, x, 4)

    x = jax.device_put(np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32), rows)
    w = jnp.eye(16)
    whole = NamedSharding(mesh, PartitionSpec())
    program = jax.jit(loss, in_shardings=(whole, rows), out_shardings=whole).lower(w, x).compile()
    text = program.as_text()
    for movement in ("all-gather", "all-to-all", "collective-permute"):
        assert movement not in text, movement
    assert "f32[2,16]" in text  # two of the sixteen rows of a part on each of eight devices
    value, grads = jax.jit(loss)(w, np.asarray(x))
    found, found_grads = program(jax.device_put(w, whole), x)
    np.testing.assert_allclose(found, value, rtol=1e-6)
    np.testing.assert_allclose(found_grads, grads, atol=1e-7)


@pytest.mark.parametrize(
    "parts, batch, message",
    [
        (3, 8, "train.accumulate=3 does not divide train.batch_size=8"),
        (0, 8, "train.accumulate=0 does not divide"),
        (2, 24, "parts of 12 examples, which 8 devices cannot share evenly: use a train.batch_size "
         "that is a multiple of 16"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused(parts, batch, message, tmp_path):
    settings = ml_collections.ConfigDict(dict(accumulate=parts, batch_size=batch))
    with pytest.raises(ValueError, match=message):
        check_parts(settings, 8)
    config = smoke("txt2img")
    config.train.update(settings)
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path)
