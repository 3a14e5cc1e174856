"""The model as a whole: its loss at a known output, and its sampling against a plain loop."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.conditioning import embed
from ldm_jax.diffusion.noise import example_keys, per_example
from ldm_jax.diffusion.objective import uniform_timesteps
from ldm_jax.diffusion.parameterization import target
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.training.workdir import config_dict

AUTOENCODER = dict(ch=8, ch_mult=[1, 2], num_res_blocks=1, z_channels=16, embed_dim=16, groups=4)


def build(root, **diffusion):
    spec = importlib.util.spec_from_file_location("config", root / "configs" / "txt2img.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = config_dict(module.get_config("smoke")) | {"autoencoder": AUTOENCODER}
    config["diffusion"] |= diffusion
    return LatentDiffusion.from_config(config)


@pytest.fixture(scope="module")
def model(root):
    return build(root)


@pytest.fixture(scope="module")
def params(model):
    """Fresh parameters, with the layers that start at zero made to speak."""
    key = jax.random.key(0)
    params = model.init(key, (8, 8, 16))
    params["unet"]["out_2"]["kernel"] = 0.02 * jax.random.normal(key, (3, 3, 32, 16))
    images = jnp.zeros((1, 16, 16, 3))
    return params | {"autoencoder": model.autoencoder.init(key, images)["params"]}


def inputs(model, captions):
    return {e.name: e.prepare({"caption": captions}) for e in model.embedders}


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_loss_of_a_silent_network_is_the_mean_square_of_its_target(root, kind):
    """A fresh UNet says exactly 0."""
    model = build(root, parameterization=kind)
    params = model.init(jax.random.key(0), (8, 8, 16))
    latents = jax.random.normal(jax.random.key(1), (6, 8, 8, 16))
    key = jax.random.key(2)
    loss = model.loss(params, latents, inputs(model, ["cat"] * 6), key)
    t = uniform_timesteps(jax.random.fold_in(key, 0), 6, 1000)
    eps = per_example(jax.random.normal, jax.random.fold_in(key, 1), latents.shape)
    alpha, sigma = (
        np.reshape(a[t], (-1, 1, 1, 1)) for a in (model.schedule.alpha, model.schedule.sigma)
    )
    goal = target(kind, latents, eps, alpha, sigma)
    np.testing.assert_allclose(loss, jnp.mean(jnp.square(goal), axis=(1, 2, 3)), rtol=1e-5)


def test_an_examples_loss_does_not_depend_on_its_batch(model, params):
    latents = jax.random.normal(jax.random.key(1), (4, 8, 8, 16))
    key = jax.random.key(2)
    captions = ["cat", "dog", "tulip", "bread"]
    whole = model.loss(params, latents, inputs(model, captions), key)
    part = model.loss(params, latents[:2], inputs(model, captions[:2]), key)
    np.testing.assert_allclose(part, whole[:2], rtol=1e-5)


def test_generate_is_the_textbook_loop(model, params):
    """One scan with a doubled batch against Python: two evaluations, DDIM written out."""
    captions, scale, steps = ["cat", "red apple"], 2.5, 5
    cond, null = inputs(model, captions), inputs(model, [""] * 2)
    noise = jax.random.normal(jax.random.key(3), (2, 8, 8, 16))
    images = model.generate(
        params,
        cond,
        null,
        example_keys(jax.random.key(0), 2),
        model.coefficients("ddim", steps),
        scale,
        0.0,
        latent_shape=(8, 8, 16),
        latents=noise,
    )
    x, abar = noise, model.schedule.alphas_cumprod
    contexts = [embed(model.embedders, params, each).context for each in (cond, null)]
    grid = [999, 799, 599, 399, 199]
    for t, t_next in zip(grid, [*grid[1:], None], strict=True):
        times = jnp.full(2, t)
        c, u = (model.unet.apply({"params": params["unet"]}, x, times, ctx) for ctx in contexts)
        v = u + scale * (c - u)
        a, s = np.sqrt(abar[t]), np.sqrt(1 - abar[t])
        x0, eps = a * x - s * v, s * x + a * v
        next_abar = 1.0 if t_next is None else abar[t_next]
        x = np.sqrt(next_abar) * x0 + np.sqrt(1 - next_abar) * eps
    decoded = model.autoencoder.apply({"params": params["autoencoder"]}, x, method="decode")
    np.testing.assert_allclose(images, np.clip((decoded + 1) / 2, 0, 1), atol=2e-5)


def test_unguided_generation_is_guidance_one(model, params):
    cond, null = inputs(model, ["cat"]), inputs(model, [""])
    arguments = (example_keys(jax.random.key(0), 1), model.coefficients("ddim", 3), 1.0, 0.0)
    a, b = (
        model.generate(params, cond, null, *arguments, latent_shape=(8, 8, 16), guided=guided)
        for guided in (True, False)
    )
    np.testing.assert_allclose(a, b, atol=1e-5)
