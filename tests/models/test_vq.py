"""The codebook and its autoencoder against taming-transformers and CompVis, and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.models.vq import VectorQuantizer, VQModel, revival_loss
from scripts.write_goldens import uniform
from tests.models.torch_layout import AUTOENCODER

SMALL = dict(ch=32, ch_mult=(1, 2), num_res_blocks=1, resolution=16, z_channels=3, embed_dim=4)


def test_quantizer_agrees_with_original(agrees):
    """Both losses, whose values are equal, but not their gradients."""
    legacy, other = VectorQuantizer(10, 3), VectorQuantizer(10, 3, legacy=False)

    def apply(params, z):
        quantized = legacy.apply({"params": params}, z)
        return quantized._asdict() | {"loss_not_legacy": other.apply({"params": params}, z).loss}

    agrees(
        "block_quantizer",
        AUTOENCODER,
        init=lambda z: legacy.init(jax.random.key(0), z)["params"],
        apply=apply,
        tolerance=1e-5,
    )


def test_network_agrees_with_original(agrees):
    """With gradients that go straight through the codebook, and of the codebook."""
    network = VQModel(**SMALL, n_embed=20, attn_resolutions=(8,))

    def apply(params, x):
        def call(method, *inputs):
            return network.apply({"params": params}, *inputs, method=method)

        prequant = call("prequant", x)
        quantized = call("nearest", prequant)
        image = call("last_layer", call("features", quantized.latents))
        return quantized._asdict() | {"prequant": prequant, "image": image}

    agrees(
        "autoencoder_vq",
        AUTOENCODER,
        init=lambda x: network.init(jax.random.key(0), x)["params"],
        apply=apply,
        tolerance=5e-5,
    )


@pytest.fixture
def codebook():
    return {"params": {"embedding": {"embedding": jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0]])}}}


# The nearest entries are 0, 1, 1 and 0.
LATENTS = jnp.array([[0.1, -0.2], [0.8, 0.0], [0.6, 0.0], [-1.0, 1.0]]).reshape(1, 2, 2, 2)


@pytest.mark.parametrize(("legacy", "weights"), [(True, (1, 0.5)), (False, (0.5, 1))])
def test_quantizer_by_hand(codebook, legacy, weights):
    quantizer = VectorQuantizer(3, 2, beta=0.5, legacy=legacy)
    found = quantizer.apply(codebook, LATENTS)
    np.testing.assert_array_equal(found.indices[0], [[0, 1], [1, 0]])
    np.testing.assert_allclose(found.latents[0, 0], [[0, 0], [1, 0]], atol=1e-7)
    np.testing.assert_allclose(found.loss, 1.5 * (0.05 + 0.04 + 0.16 + 2.0) / 8, rtol=1e-6)
    # Two of three entries, each half of the time.
    np.testing.assert_allclose(found.perplexity, 2.0, rtol=1e-6)
    assert found.usage == 2

    gradients = jax.grad(lambda v, z: quantizer.apply(v, z).loss, argnums=(0, 1))(codebook, LATENTS)
    to_codebook = gradients[0]["params"]["embedding"]["embedding"]
    np.testing.assert_allclose(gradients[1][0, 0, 0], weights[0] * np.array([0.2, -0.4]) / 8)
    np.testing.assert_allclose(to_codebook[1], weights[1] * np.array([1.2, 0]) / 8, atol=1e-7)
    np.testing.assert_array_equal(to_codebook[2], [0, 0])


def test_gradients_go_straight_through(codebook):
    quantizer, weights = VectorQuantizer(3, 2), uniform("weights", (1, 2, 2, 2))

    def weighted(codebook, z):
        return jnp.vdot(quantizer.apply(codebook, z).latents, weights)

    to_codebook, to_latents = jax.grad(weighted, argnums=(0, 1))(codebook, LATENTS)
    np.testing.assert_array_equal(to_latents, weights)
    assert not np.any(jax.tree.leaves(to_codebook)[0])


def test_revival_by_hand(codebook):
    """Only the third entry is unused: it goes to the latent nearest to the point beside it."""
    table = codebook["params"]["embedding"]["embedding"]
    indices = jnp.array([[[0, 1], [1, 0]]])
    latents = np.asarray(LATENTS).reshape(4, 2)
    direction = jax.random.normal(jax.random.key(0), table.shape)[2]
    beside = np.asarray(table[2] + latents.std(axis=0) * direction)
    target = min(latents, key=lambda latent: np.linalg.norm(latent - beside))
    loss, gradient = jax.value_and_grad(revival_loss)(table, LATENTS, indices)
    np.testing.assert_allclose(loss, np.square(table[2] - target).sum() / 6, rtol=1e-6)
    np.testing.assert_array_equal(gradient[:2], 0)
    np.testing.assert_allclose(gradient[2], (table[2] - target) / 3, rtol=1e-6)
    to_latents = jax.grad(revival_loss, argnums=1)(table, LATENTS, indices)
    np.testing.assert_array_equal(to_latents, 0)


def test_revival_leaves_no_entry_unused():
    """Of latents around (3, 3), other ones in each step, the nearest entry takes all."""
    quantizer = VectorQuantizer(32, 2)

    def latents(key):
        return 3.0 + jax.random.normal(key, (1, 16, 16, 2))

    z = latents(jax.random.key(1))
    optimizer = optax.adam(0.05)

    def used(weight):
        def loss(params, key):
            z = latents(key)
            found = quantizer.apply({"params": params}, z)
            table = params["embedding"]["embedding"]
            return found.loss + weight * revival_loss(table, z, found.indices)

        def step(carry, key):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, key), state)
            return (optax.apply_updates(params, updates), state), None

        params = quantizer.init(jax.random.key(0), z)["params"]
        keys = jax.random.split(jax.random.key(2), 300)
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        return int(quantizer.apply({"params": params}, z).usage)

    without, revived = used(0.0), used(0.1)
    assert without < 20 and revived >= 30, (without, revived)


def test_initial_codebook():
    """U(±1/n)."""
    params = VectorQuantizer(50, 20).init(jax.random.key(0), jnp.zeros((1, 1, 1, 20)))["params"]
    table = np.asarray(params["embedding"]["embedding"])
    assert 0.98 / 50 < np.abs(table).max() <= 1 / 50
    assert abs(table.std() * 50 * np.sqrt(3) - 1) < 0.05


def test_latents_are_ahead_of_quantisation_and_scaled():
    """LDM's VQModelInterface: `encode` does not quantise, `decode` does."""
    fields = dict(ch=2, ch_mult=(1, 1), num_res_blocks=0, groups=1, mid_attn=False)
    network = VQModel(**fields, embed_dim=4, n_embed=5, scale_factor=0.25)
    image = jnp.asarray(uniform("image", (1, 4, 6, 3)))
    shapes = jax.eval_shape(network.init, jax.random.key(0), image)["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(uniform("vq", leaf.shape)), shapes)

    @jax.jit
    def run(params):
        def call(method, *inputs, **options):
            return network.apply({"params": params}, *inputs, method=method, **options)

        latents, prequant = call("encode", image), call("prequant", image)
        entries = call("nearest", prequant).latents
        return dict(
            latents=latents,
            prequant=prequant,
            entries=entries,
            image=call("decode", latents),
            same_image=call("decode", 0.25 * entries, force_not_quantize=True),
            other_image=call("decode", latents, force_not_quantize=True),
            reconstruction=call("__call__", image),
        )

    found = run(params)
    assert network.downsampling == 2 and found["latents"].shape == (1, 2, 3, 4)
    np.testing.assert_allclose(found["latents"], 0.25 * found["prequant"], rtol=1e-6)
    assert np.abs(found["entries"] - found["prequant"]).max() > 0.1
    np.testing.assert_allclose(found["image"], found["same_image"], atol=1e-5)
    np.testing.assert_allclose(found["image"], found["reconstruction"], atol=1e-5)
    assert np.abs(found["image"] - found["other_image"]).max() > 1e-3


def test_codebook_in_float32_whatever_the_arithmetic():
    network = VQModel(**SMALL, n_embed=5, dtype=jnp.bfloat16, patch_size=2)
    image = jnp.zeros((1, 8, 8, 3))
    params = jax.eval_shape(network.init, jax.random.key(0), image)
    for method in ("encode", "__call__"):
        result = jax.eval_shape(lambda p, x, m=method: network.apply(p, x, method=m), params, image)
        assert result.dtype == jnp.float32
    assert result.shape == image.shape
