"""The model as a whole: its loss at a known output, and its sampling against a plain loop."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.conditions.base import embed
from ldm_jax.diffusion.noise import example_keys
from ldm_jax.diffusion.objective import draw_noise, draw_times
from ldm_jax.diffusion.parameterization import target
from ldm_jax.diffusion.plan import Guidance, plan
from ldm_jax.diffusion.schedule import Level
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.training.workdir import config_dict
from tests.tiny_models import kl

AUTOENCODER = kl(1.0, 16, ch=8, groups=4)


def build(root, objective=None, **diffusion):
    spec = importlib.util.spec_from_file_location("config", root / "configs" / "txt2img.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = config_dict(module.get_config("smoke")) | {"autoencoder": AUTOENCODER}
    config["diffusion"] |= diffusion
    config["objective"] = objective or {}
    return LatentDiffusion.from_config(config)


def fresh_params(model):
    return jax.jit(lambda key: model.init(key, (8, 8, 16)))(jax.random.key(0))


@pytest.fixture(scope="module")
def model(root):
    return build(root)


@pytest.fixture(scope="module")
def params(model):
    """Fresh parameters, with the layers that start at zero made to speak."""
    params, key = fresh_params(model), jax.random.key(0)
    params["unet"]["out_2"]["kernel"] = 0.02 * jax.random.normal(key, (3, 3, 32, 16))
    images = jnp.zeros((1, 16, 16, 3))
    return params | {"autoencoder": jax.jit(model.autoencoder.init)(key, images)["params"]}


@pytest.fixture(scope="module")
def generate(model):
    return jax.jit(model.generate, static_argnames="latent_shape")


def inputs(model, captions):
    return {e.name: e.prepare({"caption": captions}) for e in model.embedders}


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_loss_of_a_silent_network_is_the_mean_square_of_its_target(root, kind):
    """A fresh UNet returns exactly 0. A mask is a factor of each position."""
    model = build(root, parameterization=kind)
    params = fresh_params(model)
    latents = jax.random.normal(jax.random.key(1), (6, 8, 8, 16))
    key = jax.random.key(2)
    mask = jax.random.uniform(jax.random.key(3), (6, 8, 8, 1))
    loss = jax.jit(model.loss)(params, latents, inputs(model, ["cat"] * 6), key, mask=mask)
    key = jax.random.fold_in(key, 0)
    t = draw_times(jax.random.fold_in(key, 0), 6, model.diffusion.schedule)
    eps = draw_noise(jax.random.fold_in(key, 1), latents.shape)
    level = Level(*(v.reshape(-1, 1, 1, 1) for v in model.diffusion.schedule.level(t)))
    goal = target(kind, latents, eps, level, 0.5)
    np.testing.assert_allclose(loss, jnp.mean(mask * jnp.square(goal), axis=(1, 2, 3)), rtol=1e-5)


def test_an_examples_loss_does_not_depend_on_its_batch(model, params):
    latents = jax.random.normal(jax.random.key(1), (4, 8, 8, 16))
    key = jax.random.key(2)
    captions = ["cat", "dog", "tulip", "bread"]
    loss = jax.jit(model.loss)
    whole = loss(params, latents, inputs(model, captions), key)
    part = loss(params, latents[:2], inputs(model, captions[:2]), key)
    np.testing.assert_allclose(part, whole[:2], rtol=1e-5)


def test_generate_is_the_textbook_loop(model, params, generate):
    """One scan with a doubled batch against Python: two evaluations, DDIM written out."""
    captions, scale, steps = ["cat", "red apple"], 2.5, 5
    cond, null = inputs(model, captions), inputs(model, [""] * 2)
    noise = jax.random.normal(jax.random.key(3), (2, 8, 8, 16))
    images = generate(
        params,
        [cond],
        null,
        example_keys(jax.random.key(0), 2),
        plan(model.diffusion, steps, "ddim", scale),
        latent_shape=(8, 8, 16),
        latents=noise,
    )
    x, abar = noise, model.diffusion.schedule.alphas_cumprod
    contexts = [embed(model.embedders, params, each).context for each in (cond, null)]
    unet = jax.jit(lambda *inputs: model.unet.apply({"params": params["unet"]}, *inputs))
    grid = [999, 799, 599, 399, 199]
    for t, t_next in zip(grid, [*grid[1:], None], strict=True):
        times = jnp.full(2, t)
        c, u = (unet(x, times, context) for context in contexts)
        v = u + scale * (c - u)
        a, s = np.sqrt(abar[t]), np.sqrt(1 - abar[t])
        x0, eps = a * x - s * v, s * x + a * v
        next_abar = 1.0 if t_next is None else abar[t_next]
        x = np.sqrt(next_abar) * x0 + np.sqrt(1 - next_abar) * eps
    decoded = model.autoencoder.apply({"params": params["autoencoder"]}, x, method="decode")
    np.testing.assert_allclose(images, np.clip((decoded + 1) / 2, 0, 1), atol=2e-5)


def test_guidance_of_one_is_left_out_and_changes_nothing(model, params, generate):
    """A plan with the scale 1 evaluates the network once; forced to guide, the result is equal."""
    cond, null = inputs(model, ["cat"]), inputs(model, [""])
    keys = example_keys(jax.random.key(0), 1)
    plain, forced = (plan(model.diffusion, 3, "ddim", scale) for scale in (1.0, 2.0))
    assert plain.guidance is None
    forced = forced._replace(guidance=forced.guidance._replace(scale=np.ones(3, np.float32)))
    a, b = (
        generate(params, [cond], null, keys, run, latent_shape=(8, 8, 16))
        for run in (plain, forced)
    )
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_learned_variances_train_with_the_model(root):
    model = build(root, objective=dict(learn_logvar=True, logvar_init=0.5))
    assert model.trainable == ("unet", "text", "logvar")
    params = fresh_params(model)
    assert params["logvar"]["value"].shape == (1000,)
    latents = jax.random.normal(jax.random.key(1), (2, 8, 8, 16))

    def loss(params):
        return model.loss(params, latents, inputs(model, ["cat"] * 2), jax.random.key(2)).mean()

    gradient = jax.jit(jax.grad(loss))(params)["logvar"]["value"]
    assert (gradient != 0).sum() == 2  # of the two timesteps drawn


def test_cfg_zero_star_scales_the_unconditional_output_and_is_silent_first(model, params):
    """`predict` with its table, against the formula on the two outputs."""
    rng = np.random.default_rng(0)  # so that the context matters
    unet = jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape), params["unet"])
    params = params | {"unet": jax.tree.map(jnp.float32, unet)}
    null = embed(model.embedders, params, inputs(model, [""] * 2))
    cat = null.replace(context=jnp.float32(5.0 * rng.normal(size=null.context.shape)))
    x, t = jax.random.normal(jax.random.key(3), (2, 8, 8, 16)), jnp.full(2, 500.0)
    predict = model.predict(params, [cat], null)
    cond, uncond = predict(None)(x, t), model.predict(params, [null], null)(None)(x, t)
    along = jnp.sum(cond * uncond, (1, 2, 3), keepdims=True)
    s = along / (jnp.sum(uncond**2, (1, 2, 3), keepdims=True) + 1e-8)
    table = plan(model.diffusion, 1, "ddim", Guidance(3.0, method="cfg-zero*")).guidance
    row = jax.tree.map(lambda column: column[0], table)
    found = predict(row)(x, t)
    expected = s * uncond + 3.0 * (cond - s * uncond)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(cond).max())
    assert np.abs(found - (uncond + 3.0 * (cond - uncond))).max() > 0.01 * np.abs(cond).max()
    assert not predict(row._replace(kept=jnp.float32(0.0)))(x, t).any()
