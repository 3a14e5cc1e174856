"""Where bfloat16 computes and where it does not, and what it changes in a training."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.models.build import make_autoencoder
from ldm_jax.models.discriminator import PatchDiscriminator
from ldm_jax.training import loop
from ldm_jax.training.optimizer import make_optimizer
from ldm_jax.training.state import init_state
from ldm_jax.training.tasks import make_task
from tests import tiny_models
from tests.training.least_squares import reports, steps
from tests.training.test_accumulation import smoke
from tests.training.test_optimizer import settings

PRODUCTS = ("conv_general_dilated", "dot_general")
STATISTICS = ("rsqrt", "reduce_max", "reduce_sum", "exp", "log", "sin", "cos", "erf_inv")
KINDS = ["STABLE", "LABELS", "INPAINTING", "XL", "UNCONDITIONAL"]


def operations(jaxpr):
    """(name, types of inputs, type of output) of every operation, inner programs included."""
    for equation in jaxpr.eqns:
        inputs = [value.aval.dtype.name for value in equation.invars]
        yield equation.primitive.name, inputs, equation.outvars[0].aval.dtype.name
        for value in equation.params.values():
            for each in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(each, "jaxpr", each)
                if hasattr(inner, "eqns"):
                    yield from operations(inner)


def check(function, *arguments):
    """Products are of bfloat16, statistics of float32; returns the number of products."""
    products = 0
    for name, inputs, _ in operations(jax.make_jaxpr(function)(*arguments).jaxpr):
        if name in PRODUCTS:
            products += 1
            assert inputs == ["bfloat16", "bfloat16"], (name, inputs)
        elif name in STATISTICS:
            assert "bfloat16" not in inputs, (name, inputs)
    return products


def parts(kind):
    config = getattr(tiny_models, kind)
    model = LatentDiffusion.from_config(config, jnp.bfloat16)
    inputs = {embedder.name: jnp.asarray(embedder.null(2)) for embedder in model.embedders}
    if "inpainting" in inputs:
        inputs["inpainting"] = jnp.ones((2, 16, 16, 4))
    return model, tiny_models.random_params(config), inputs


def mean_loss(model, params, inputs):
    return jnp.mean(model.loss(params, jnp.ones((2, 8, 8, 4)), inputs, jax.random.key(0)))


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_bfloat16_and_statistics_float32(kind):
    model, params, inputs = parts(kind)
    assert check(lambda p: mean_loss(model, p, inputs), params) > 50
    assert jax.eval_shape(lambda p: mean_loss(model, p, inputs), params).dtype == jnp.float32


@pytest.mark.parametrize("kind", ["STABLE", "UNCONDITIONAL"])
def test_gradients_are_float32_sums_of_products_of_bfloat16(kind):
    model, params, inputs = parts(kind)
    gradient = jax.grad(lambda p: mean_loss(model, p, inputs))
    assert {g.dtype.name for g in jax.tree.leaves(jax.eval_shape(gradient, params))} == {"float32"}
    mixed = [
        (name, types)
        for name, types, _ in operations(jax.make_jaxpr(gradient)(params).jaxpr)
        if name in PRODUCTS and types != ["bfloat16", "bfloat16"]
    ]
    # Only the gradients of attention's logits, which are float32.
    assert all(name == "dot_general" and "bfloat16" in types for name, types in mixed)


@pytest.mark.parametrize("config", [tiny_models.KL, tiny_models.VQ])
def test_the_autoencoder_and_the_discriminator(config):
    model = make_autoencoder(config, jnp.bfloat16)
    params = tiny_models.random_params({"task": "autoencoder", "autoencoder": config})
    x = jnp.ones((2, 16, 16, 3))
    method = "moments" if config["kind"] == "kl" else "prequant"
    encode = functools.partial(model.apply, method=method)
    for part in jax.tree.leaves(jax.eval_shape(encode, {"params": params["autoencoder"]}, x)):
        assert part.dtype == jnp.float32
    assert check(encode, {"params": params["autoencoder"]}, x) > 5
    discriminator = PatchDiscriminator(ndf=8, n_layers=2, dtype=jnp.bfloat16)
    variables = discriminator.init(jax.random.key(0), x)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"float32"}
    assert discriminator.apply(variables, x).dtype == jnp.float32
    assert check(discriminator.apply, variables, x) == 4


def test_a_training_in_bfloat16_reaches_the_loss_of_float32():
    """Within 5 %: one picture's latents are learned to a hundredth of the loss at the start."""
    latents = jax.random.normal(jax.random.key(3), (8, 8, 8, 4)) * 0.5
    config = tiny_models.config({}, channel_mult=[1], attention_resolutions=[1])
    params = {"unet": tiny_models.random_params(config)["unet"]}
    optimizer = optax.adam(3e-3)

    def trained(dtype):
        model = LatentDiffusion.from_config(config, dtype)

        @jax.jit
        def step(carry, key):
            params, state = carry
            loss = lambda p: jnp.mean(model.loss(p, latents, {}, key))  # noqa: E731
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), value

        carry, losses = (params, optimizer.init(params)), []
        for i in range(60):
            carry, loss = step(carry, jax.random.key(i))
            losses.append(float(loss))
        return losses

    single, half = trained(None), trained(jnp.bfloat16)
    assert np.mean(single[-10:]) < 0.7 * np.mean(single[:3])
    assert np.mean(half[-10:]) == pytest.approx(np.mean(single[-10:]), rel=0.05)
    assert half != single


def test_what_is_kept_is_float32():
    task = make_task(smoke("unconditional", precision="bfloat16"))
    optimizer = make_optimizer(task.config.optimizer, 10, ("unet",))
    state = jax.eval_shape(lambda: init_state(task, optimizer, 0, {}))
    types = {leaf.dtype.name for leaf in jax.tree.leaves(state)}
    assert types == {"float32", "int32"}  # counts


def test_first_moments_in_bfloat16():
    params = {"unet": {"a": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}}}
    types = {}
    for name in ("adamw", "muon"):
        optimizer = make_optimizer(settings(name=name, moments="bfloat16"), 10, ("unet",))
        state = optimizer.init(params)
        _, state = optimizer.update(params, state, params)
        types[name] = sorted(leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert types["adamw"] == ["bfloat16", "bfloat16", "float32", "float32"]
    assert types["muon"] == ["bfloat16", "bfloat16", "float32"]  # a kernel has one moment


def test_moments_of_another_type_are_converted_on_resuming(use, resumable, whole):
    loop.train(steps(30, **{"optimizer.moments": "bfloat16"}), resumable)
    after, expected = reports(resumable)[-1], reports(whole[0])[-1]
    assert after["loss"] == pytest.approx(expected["loss"], rel=0.05)
    assert after != expected


def test_unknown_names_are_listed():
    with pytest.raises(ValueError, match="precision='float16': choose one of float32, bfloat16"):
        make_task(smoke("txt2img", precision="float16"))
    message = "train.remat='all': choose \"\" for none, or one of blocks, dots, products"
    with pytest.raises(ValueError, match=message):
        make_task(smoke("txt2img", **{"train.remat": "all"}))
    with pytest.raises(ValueError, match="moments='float16': choose one of float32, bfloat16"):
        make_optimizer(settings(moments="float16"), 10, ("unet",))


@pytest.mark.long
def test_a_run_in_bfloat16_exports_float32_and_goes_on_in_float32(tmp_path, caplog):
    config = smoke("unconditional", precision="bfloat16")
    config.data.update(source="emoji", classes=("food & drink",))
    config.train.update(steps=2, checkpoint_every=2, preview_every=2, remat="blocks")
    loop.train(config, tmp_path / "run")
    model = load_file(tmp_path / "run" / "model.safetensors")
    assert {array.dtype.name for array in model.values()} == {"float32"}
    # Not the values of bfloat16, whose last 16 bits are 0.
    assert (model["unet/input_blocks_0_0/kernel"].view(np.uint32) & 0xFFFF).any()
    config.precision, config.train.steps, config.train.remat = "float32", 3, ""
    with caplog.at_level("INFO", "ldm_jax"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger("ldm_jax"), "propagate", True)
        loop.train(config, tmp_path / "run")
    assert "precision: bfloat16 there, float32 now" in caplog.text
    before, after = reports(tmp_path / "run")[-2:]
    assert after["loss"] == pytest.approx(before["loss"], rel=0.2)
