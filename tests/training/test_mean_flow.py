"""MeanFlow training: the loss of a whole model, a run to pictures, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ldm_jax
from configs import common
from ldm_jax.conditions.base import drop_conditions, embed
from ldm_jax.diffusion.guidance import classifier_free
from ldm_jax.diffusion.noise import example_keys
from ldm_jax.diffusion.objective import Objective, draw_noise
from ldm_jax.diffusion.plan import Guidance, plan
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.runtime.logging import read_metrics
from ldm_jax.training.loop import train
from ldm_jax.training.mean_flow import MeanFlowTraining, read_options
from ldm_jax.training.tasks import make_task
from ldm_jax.training.workdir import config_dict
from tests.training import tiny

SHAPE = (8, 4, 4, 3)
LATENTS = jax.random.normal(jax.random.key(1), SHAPE)


def tiny_config(steps=4, **fields):
    config = common.mean_flow(tiny.config("diffusion", steps), **fields)
    config.train.checkpoint_every = steps
    config.conditioning.text.dropout = 0.4
    return config


def uniform(key):
    """Times in 0 … 1 of eight examples."""
    return jax.vmap(jax.random.uniform)(example_keys(key, 8))


@pytest.fixture(scope="module")
def model():
    return LatentDiffusion.from_config(config_dict(tiny_config()))


@pytest.fixture(scope="module")
def params(model):
    return jax.jit(lambda key: model.init(key, SHAPE[1:]))(jax.random.key(0)) | {"autoencoder": {}}


@pytest.fixture(scope="module")
def speaking(params):
    """Parameters with which the output depends on every input."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda v: v + np.float32(0.1 * rng.normal(size=v.shape)), params)


def inputs(model, captions):
    return {e.name: e.prepare({"caption": captions}) for e in model.embedders}


def options(model, **fields):
    return read_options(tiny_config(**fields), model)


def test_loss_of_a_silent_network(model, params):
    """A fresh UNet returns exactly 0, so Δ is the velocity: ω times that of the pair, and of
    examples whose condition is dropped, or that have none, the pair's own."""
    key, captions = jax.random.key(2), ["a cat", "a dog", "", "bread"] * 2
    given = inputs(model, captions)
    training = MeanFlowTraining(model, options(model, omega=3.0, power=0.0))
    found = jax.jit(training.loss)(params, LATENTS, given, key)
    noise, conditions = (jax.random.fold_in(key, i) for i in range(2))
    eps = draw_noise(jax.random.fold_in(noise, 1), SHAPE)
    kept = drop_conditions(model.embedders, given, example_keys(conditions, 8))["text"]
    null = model.embedders[0].null(1)
    scale = np.where((np.asarray(kept) != null).any(1), 3.0, 1.0)
    assert 0 < (scale == 1.0).sum() - 2 < 6  # some of those with a caption
    expected = scale**2 * np.sum(np.square(eps - LATENTS), (1, 2, 3))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_derivative_of_a_whole_unet(model, speaking):
    """With attention and conditions: the loss is that of a derivative by differences."""
    training = MeanFlowTraining(model, options(model, equal=0.0, power=0.0))
    key, given = jax.random.key(2), inputs(model, ["a cat"] * 8)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), speaking)
        latents = jnp.asarray(LATENTS, jnp.float64)
        found = jax.jit(training.loss)(params, latents, given, key)
        keys = [jax.random.fold_in(key, i) for i in range(2)]
        kept = drop_conditions(model.embedders, given, example_keys(keys[1], 8))
        condition = embed(model.embedders, params, kept)
        own = [jax.random.fold_in(keys[0], i) for i in range(4)]
        one, other = (uniform(own[i]) for i in (0, 2))
        t, r = jnp.maximum(one, other), jnp.minimum(one, other)
        eps = draw_noise(own[1], SHAPE)
        share = t.reshape(-1, 1, 1, 1)
        x, v = (1.0 - share) * latents + share * eps, eps - latents

        @jax.jit
        def u(step):
            over = model.over(condition, t + step - r)
            return model.output(params, x + step * v, t + step, over)

        change = (u(1e-3) - u(-1e-3)) / 2e-3  # times become float32 in a UNet
        goal = v - (t - r).reshape(-1, 1, 1, 1) * change
        expected, without = (
            np.asarray(jnp.sum(jnp.square(u(0.0) - each), (1, 2, 3))) for each in (goal, v)
        )
    assert np.abs(without / expected - 1.0).min() > 0.01
    np.testing.assert_allclose(found, expected, rtol=3e-4)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_generate_is_one_evaluation_at_pure_noise(model, speaking, scale):
    cond, null = inputs(model, ["a cat"] * 2), inputs(model, [""] * 2)
    noise = jax.random.normal(jax.random.key(3), (2, *SHAPE[1:]))
    drawn = jax.jit(model.generate, static_argnames=("latent_shape", "sampler"))(
        *(speaking, [cond], null, example_keys(jax.random.key(0), 2)),
        plan(model.diffusion, 1, "meanflow", Guidance(scale)),
        latent_shape=SHAPE[1:],
        sampler="meanflow",
        latents=noise,
    )
    one = jnp.ones(2)
    a, b = (model.over(embed(model.embedders, speaking, each), one) for each in (cond, null))

    def network(x, t, condition):
        return model.output(speaking, x, t, condition)

    velocity = jax.jit(classifier_free(network, [a], b, scale))(noise, one)
    apart = network(noise, one, a) - network(noise, one, a.replace(vector=0.0 * one))
    assert jnp.abs(apart).max() > 0.01  # the network does see t − r
    expected = np.clip((noise - velocity + 1.0) / 2.0, 0.0, 1.0)
    np.testing.assert_allclose(drawn, expected, atol=1e-5)


@pytest.mark.long
def test_from_data_to_pictures(tmp_path):
    """It trains, with guidance in the target, and what it writes draws in one step, or, along its
    velocity, by other samplers."""
    train(tiny_config(omega=2.0, kappa=0.5), tmp_path)
    losses = [line["loss"] for line in read_metrics(tmp_path) if line["kind"] == "train"]
    assert len(losses) == 4 and all(0.0 < loss < 1.0 for loss in losses)  # Δ²/(Δ² + c)
    pipe = ldm_jax.load(tmp_path)
    assert pipe.config["sampling"]["sampler"] == "meanflow"
    pictures = pipe(["a kiwi", "a melon"], seed=1)
    assert pictures.shape == (2, 16, 16, 3) and np.isfinite(pictures).all()
    other = pipe(["a kiwi", "a melon"], seed=1, sampler="flow_euler", steps=2)
    assert np.abs(other - pictures).max() > 0.0
    with pytest.raises(ValueError, match="distill: the model of init_from is a MeanFlow"):
        config = tiny_config()
        config.init_from, config.mean_flow = str(tmp_path), {}
        config.distill = dict(kind="guidance")
        make_task(config)


def test_settings_that_are_refused(model):
    def refused(message, change):
        config = tiny_config()
        change(config)
        with pytest.raises(ValueError, match=message):
            read_options(config, LatentDiffusion.from_config(config_dict(config)))

    with pytest.raises(ValueError, match="mean_flow has no option 'ratio'; it has equal, power"):
        read_options({"mean_flow": dict(ratio=0.5)}, model)
    refused("omega must be at least 0", lambda c: c.mean_flow.update(omega=-1.0))
    refused("objective.loss: MeanFlow has its own", lambda c: c.objective.update(loss="huber"))

    def never_dropped(config):
        config.mean_flow.omega, config.conditioning.text.dropout = 2.0, 0.0

    refused("guidance needs predictions without conditions", never_dropped)
    flow = LatentDiffusion.from_config(
        config_dict(tiny.config("diffusion")) | {"objective": vars(Objective())}
    )
    with pytest.raises(ValueError, match="mean_flow: for models with .*; this one has 'v'"):
        read_options(tiny_config(), flow)
    assert read_options({}, flow) is None
    assert read_options({}, model) == options(model)


def test_a_unet_without_a_place_for_the_second_time():
    config = config_dict(tiny_config())
    config["unet"] |= dict(num_classes=None)
    model = LatentDiffusion.from_config(config)
    with pytest.raises(ValueError, match="in the place of the UNet's vector: use unet.num_classes"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), SHAPE[1:]))


@pytest.mark.parametrize("dtype, remat", [(jnp.bfloat16, ""), (None, "blocks")])
def test_a_step_is_traced_in_every_precision_and_with_less_memory(dtype, remat):
    config = config_dict(tiny_config(omega=2.0, kappa=0.5))
    model = LatentDiffusion.from_config(config, dtype, remat)
    training = MeanFlowTraining(model, options(model, omega=2.0, kappa=0.5))
    given = inputs(model, ["a cat"] * 8)

    def gradient(params, latents):
        def loss(params):
            return jnp.mean(training.loss(params, latents, given, jax.random.key(0)))

        return jax.grad(loss)(params)

    params = jax.eval_shape(lambda key: model.init(key, SHAPE[1:]), jax.random.key(0))
    found = jax.eval_shape(gradient, params, LATENTS)
    assert jax.tree.map(lambda v: (v.shape, v.dtype), found) == jax.tree.map(
        lambda v: (v.shape, v.dtype), params
    )
