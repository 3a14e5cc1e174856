"""LDM's autoencoder loss, against closed forms and against one big differentiation."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ldm_jax
from ldm_jax.diffusion.noise import per_example
from ldm_jax.interop.native import save_model
from ldm_jax.models.vq import VQModel
from ldm_jax.pictures import to_signed
from ldm_jax.training.autoencoder_task import (
    AutoencoderTask,
    hinge_loss,
    kl_divergence,
    noisy_latents,
    vanilla_loss,
)
from ldm_jax.training.tasks import make_task
from tests.models.published import config_file
from tests.tiny_models import random_params


def test_kl_is_zero_at_the_prior_and_known_beside_it():
    shape = (2, 3, 3, 4)
    assert kl_divergence(jnp.zeros(shape), jnp.zeros(shape)).tolist() == [0.0, 0.0]
    one = kl_divergence(jnp.full(shape, 2.0), jnp.full(shape, np.log(4.0)))
    # ½(μ² + σ² − 1 − log σ²) per element, 36 elements.
    np.testing.assert_allclose(one, 36 * 0.5 * (4.0 + 4.0 - 1.0 - np.log(4.0)), rtol=1e-6)


def test_hinge_loss_at_and_beyond_the_margins():
    assert float(hinge_loss(jnp.array([2.0]), jnp.array([-2.0]))) == 0.0
    assert float(hinge_loss(jnp.array([0.0]), jnp.array([0.0]))) == 1.0
    assert float(hinge_loss(jnp.array([-1.0]), jnp.array([1.0]))) == 2.0


def test_vanilla_loss_is_the_cross_entropy_of_the_logits():
    """Of probabilities p = 1/(1 + e^−D): ½[−log p(x) − log(1 − p(x̂))]; log 2 where D is 0."""
    assert float(vanilla_loss(jnp.zeros(3), jnp.zeros(3))) == pytest.approx(np.log(2.0))
    real, fake = jnp.array([1.5, -0.5]), jnp.array([0.25, -2.0])
    p, q = 1 / (1 + np.exp(-np.array(real))), 1 / (1 + np.exp(-np.array(fake)))
    expected = 0.5 * (-np.log(p).mean() - np.log(1 - q).mean())
    assert float(vanilla_loss(real, fake)) == pytest.approx(expected, rel=1e-6)


def test_an_unknown_loss_of_the_discriminator_is_named(root):
    config = smoke(root)
    config.loss.disc_loss = "wasserstein"
    with pytest.raises(ValueError, match="disc_loss='wasserstein': choose one of hinge, vanilla"):
        make_task(config)


def autoencoders(root):
    return config_file(root / "configs" / "autoencoder.py")


def smoke(root):
    return autoencoders(root).get_config("smoke")


@pytest.fixture(scope="module", params=["kl", pytest.param("vq", marks=pytest.mark.long)])
def task(root, request):
    config = smoke(root)
    config.loss.disc_weight = 0.5
    config.loss.kl_weight = 1e-3  # large enough to be seen
    config.loss.latent_noise = 0.3
    if request.param == "vq":
        config.autoencoder.update(kind="vq", n_embed=64)
    return make_task(config)


@pytest.fixture(scope="module")
def setting(task):
    params = jax.jit(task.init)(jax.random.key(0), task.loaded)
    _, batch = next(task.batches(0))
    return params, batch, jax.random.key(1)


@pytest.fixture(scope="module")
def gradients(task):
    compiled = jax.jit(task.gradients, static_argnums=4)
    return lambda params, *rest: compiled(params, task.frozen, *rest)


@pytest.fixture(scope="module")
def whole(task):
    return jax.jit(lambda *arguments: reference(task, *arguments))


def reference(task: AutoencoderTask, params, batch, key, weight):
    """The whole loss in one expression, with the adversarial weight given."""
    x = to_signed(batch["image"])

    def noisy(z):
        return noisy_latents(z, task.config.loss.latent_noise, jax.random.fold_in(key, 1))

    def loss(autoencoder):
        variables = {"params": autoencoder}
        if isinstance(task.model, VQModel):
            z = task.model.apply(variables, x, method="prequant")
            quantized = task.model.apply(variables, z, method="nearest")
            z, cost = quantized.latents, x[0].size * quantized.loss
        else:
            mean, logvar = task.model.apply(variables, x, method="moments")
            z = mean + jnp.exp(0.5 * logvar) * per_example(jax.random.normal, key, mean.shape)
            cost = task.config.loss.kl_weight * jnp.mean(kl_divergence(mean, logvar))
        x_hat = task.model.apply(variables, noisy(z), method="features")
        x_hat = task.model.apply(variables, x_hat, method="last_layer")
        nll = jnp.sum(jnp.abs(x - x_hat)) / len(x)
        logits = task.discriminator.apply({"params": params["discriminator"]}, x_hat)
        return nll + cost - weight * jnp.mean(logits), x_hat

    grads, x_hat = jax.grad(loss, has_aux=True)(params["autoencoder"])

    def discriminator_loss(discriminator):
        real, fake = (
            task.discriminator.apply({"params": discriminator}, images) for images in (x, x_hat)
        )
        return hinge_loss(real, fake)

    return {
        "autoencoder": grads,
        "discriminator": jax.grad(discriminator_loss)(params["discriminator"]),
    }


def test_noise_of_latents_has_a_level_for_each_image_and_a_common_half():
    latents = 3.0 * np.random.default_rng(0).standard_normal((2000, 4, 4, 8), np.float32)
    np.testing.assert_array_equal(noisy_latents(latents, 0.0, jax.random.key(0)), latents)
    noise = np.asarray(noisy_latents(latents, 0.5, jax.random.key(0)) - latents)
    assert noise.var() == pytest.approx((3.0 * 0.5) ** 2, rel=0.1)  # as E n² = 1
    common = noise.mean((1, 2))
    assert common.var() / noise.var() == pytest.approx(0.5 + 0.5 / 16, rel=0.05)
    # |n| of each image: half normal, so its mean is √(2/π) and a third is below 0.43.
    own = noise - noise.mean((1, 2), keepdims=True)
    levels = np.sqrt(np.square(own).mean((1, 2, 3)) * 2 * 16 / 15) / (3.0 * 0.5)
    assert levels.mean() == pytest.approx(np.sqrt(2 / np.pi), rel=0.05)
    assert np.mean(levels < 0.43) == pytest.approx(1 / 3, abs=0.05)


@pytest.mark.parametrize("adversarial", [False, True])
def test_gradients_are_those_of_the_loss_differentiated_whole(
    setting, gradients, whole, adversarial
):
    params, batch, key = setting
    grads, metrics = gradients(params, batch, key, adversarial)
    weight = metrics["d_weight"] if adversarial else jnp.float32(0)
    expected = whole(params, batch, key, weight)
    if not adversarial:
        expected["discriminator"] = jax.tree.map(jnp.zeros_like, expected["discriminator"])
    for name in expected:
        a, b = (
            jnp.concatenate([g.ravel() for g in jax.tree.leaves(t[name])])
            for t in (grads, expected)
        )
        assert float(jnp.linalg.norm(a - b)) <= 1e-4 * float(jnp.linalg.norm(b)) + 1e-7, name


def test_adaptive_weight_is_the_ratio_of_last_layer_gradients(setting, gradients, whole):
    """disc_weight · ‖∇nll‖/(‖∇g‖ + 1e-4) on the last kernel (Esser et al. 2021, eq. 7)."""
    params, batch, key = setting

    def louder(factor):
        last = jax.tree.map(lambda p: factor * p, params["discriminator"]["conv_out"])
        return params | {"discriminator": params["discriminator"] | {"conv_out": last}}

    # The weight of a discriminator that is faint enough meets its bound, 1e4.
    assert float(gradients(louder(1e-3), batch, key, True)[1]["d_weight"]) == 0.5 * 1e4

    params = louder(1000)
    plain, with_gan = (
        whole(params, batch, key, weight)["autoencoder"]["conv_out"]["kernel"]
        for weight in jnp.float32([0.0, 1000.0])
    )
    g_norm = jnp.linalg.norm(with_gan - plain) / 1000.0
    ratio = 0.5 * jnp.linalg.norm(plain) / (g_norm + 1e-4)
    weight = gradients(params, batch, key, True)[1]["d_weight"]
    assert float(weight) == pytest.approx(float(ratio), rel=1e-3)


def test_discriminator_starts_at_its_step(task):
    assert [task.phase(step) for step in (0, 3, 4, 9)] == [False, False, True, True]


def test_scale_factor_makes_latents_of_unit_variance(task, setting):
    params, _, _ = setting
    about, exported = task.export({"autoencoder": params["autoencoder"]})
    scale = about["autoencoder"]["scale_factor"]
    images = to_signed(np.stack([task.source[i]["image"] for i in range(40)]))
    moments = jax.jit(functools.partial(task.model.apply, method="moments"))
    mean, logvar = moments({"params": exported["autoencoder"]}, images)
    noise = jax.random.normal(jax.random.key(2), mean.shape)
    latents = scale * (mean + jnp.exp(0.5 * logvar) * noise)
    # Forty of the hundred and twenty pictures it was measured on.
    assert float(jnp.std(latents)) == pytest.approx(1.0, abs=0.1)


def test_training_the_decoder_alone_leaves_the_latents(root, tmp_path):
    """The models of these latents go on: encoder and scale are bit for bit what they were."""
    config = smoke(root)
    start = json.loads(config.to_json())["autoencoder"] | {"scale_factor": 0.37}
    first = {"task": "autoencoder", "autoencoder": start}
    save_model(tmp_path / "start.safetensors", first, random_params(first))
    config.init_from = str(tmp_path / "start.safetensors")
    config.trainable = autoencoders(root).get_config("decoder").trainable
    config.loss.disc_start = 0
    config.train.update(steps=2, checkpoint_every=2, preview_every=2)
    config.lock()  # as the command line does
    ldm_jax.train(config, tmp_path / "run")
    before, after = (ldm_jax.load(tmp_path / name) for name in ("start.safetensors", "run"))
    images = np.random.default_rng(0).random((1, 64, 64, 3))
    latents = before.encode(images)
    np.testing.assert_array_equal(latents, after.encode(images))
    assert after.config["autoencoder"]["scale_factor"] == 0.37
    assert np.abs(before.decode(latents) - after.decode(latents)).max() > 0.0
