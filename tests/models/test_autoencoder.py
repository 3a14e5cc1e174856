"""The KL autoencoder against CompVis's, and against numbers by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.autoencoder import (
    AutoencoderKL,
    ResnetBlock,
    depth_to_space,
    space_to_depth,
)
from ldm_jax.models.layers import upsample
from scripts.write_goldens import uniform
from tests.models.torch_layout import AUTOENCODER

SMALL = dict(ch=32, resolution=16, z_channels=3, embed_dim=4)
NETWORKS = {
    "one_block": dict(ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,)),
    "two_blocks": dict(ch_mult=(1, 2), num_res_blocks=2, attn_resolutions=(16,)),
    "three_levels": dict(ch_mult=(2, 1, 1), num_res_blocks=1, mid_attn=False),
    "no_quant_conv": dict(
        ch_mult=(1, 2),
        num_res_blocks=1,
        embed_dim=3,
        use_quant_conv=False,
        in_channels=6,
        out_ch=6,
    ),
}


def test_resnet_block_agrees_with_original(agrees):
    block = ResnetBlock(96)
    agrees(
        "block_autoencoder_resnet",
        AUTOENCODER,
        init=lambda x: block.init(jax.random.key(0), x)["params"],
        apply=lambda params, x: {"y": block.apply({"params": params}, x)},
        tolerance=1e-5,
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_network_agrees_with_original(name, agrees):
    network = AutoencoderKL(**SMALL | NETWORKS[name])

    def apply(params, x, z):
        mean, logvar = network.apply({"params": params}, x, method="moments")
        image = network.apply({"params": params}, z, method="decode")
        return {"mean": mean, "logvar": logvar, "image": image}

    agrees(
        f"autoencoder_{name}",
        AUTOENCODER,
        init=lambda x, z: network.init(jax.random.key(0), x)["params"],
        apply=apply,
        tolerance=5e-5,
    )


def test_epsilons(epsilons):
    found = epsilons(AutoencoderKL(**SMALL, **NETWORKS["two_blocks"]), jnp.zeros((1, 8, 8, 3)))
    assert len(found) > 20 and set(found.values()) == {1e-6}


@pytest.fixture(scope="module")
def tiny():
    """An autoencoder of no residual blocks in one channel, and parameters for it."""
    network = AutoencoderKL(
        ch=1, ch_mult=(1, 1), num_res_blocks=0, in_channels=1, out_ch=1, groups=1, mid_attn=False
    )
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 4, 4, 1)))["params"]
    return network, jax.tree.map(lambda leaf: uniform("tiny", leaf.shape), shapes)


def test_downsample_pads_right_and_bottom(tiny):
    """Sums over 3×3 windows of a ramp, the first at pixel 0."""
    network, params = tiny
    encoder = dict(params["encoder"])
    identity = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
    encoder["conv_in"] = {"kernel": identity, "bias": jnp.zeros(1)}
    encoder["down_0_downsample"] = {"kernel": jnp.ones((3, 3, 1, 1)), "bias": jnp.zeros(1)}
    ramp = jnp.arange(16.0).reshape(1, 4, 4, 1)
    _, state = network.apply(
        {"params": {**params, "encoder": encoder}},
        ramp,
        method="moments",
        capture_intermediates=lambda module, _: module.name == "down_0_downsample",
        mutable="intermediates",
    )
    (found,) = state["intermediates"]["encoder"]["down_0_downsample"]["__call__"]
    np.testing.assert_array_equal(found[0, :, :, 0], [[45, 39], [66, 50]])


def test_logvar_is_clamped(tiny):
    network, params = tiny
    bias = jnp.array([1e3, -1e3, 0, 0, 1e3, -1e3, 0, 5])
    params = {**params, "quant_conv": {"kernel": jnp.zeros((1, 1, 8, 8)), "bias": bias}}
    mean, logvar = network.apply({"params": params}, jnp.zeros((1, 4, 4, 1)), method="moments")
    np.testing.assert_array_equal(mean[0, 0, 0], [1e3, -1e3, 0, 0])
    np.testing.assert_array_equal(logvar[0, 0, 0], [20, -30, 0, 5])


def test_latents_outside_are_scaled(tiny):
    network, params = tiny
    scaled = network.clone(scale_factor=0.25)
    image = jnp.arange(16.0).reshape(1, 4, 4, 1)
    mean = network.apply({"params": params}, image, method="moments")[0]
    latents = scaled.apply({"params": params}, image, method="encode")
    np.testing.assert_allclose(latents, 0.25 * mean, rtol=1e-6)
    ours, theirs = (
        n.apply({"params": params}, z, method="decode")
        for n, z in ((scaled, latents), (network, mean))
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_patches():
    network = AutoencoderKL(ch=32, ch_mult=(1, 2), patch_size=4)
    assert network.downsampling == 8
    init = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((2, 16, 24, 3)))
    shape = jax.eval_shape(lambda p, x: network.apply(p, x), init, jnp.zeros((2, 16, 24, 3))).shape
    assert shape == (2, 16, 24, 3)
    encode = jax.eval_shape(
        lambda p, x: network.apply(p, x, method="encode"), init, jnp.zeros((2, 16, 24, 3))
    )
    assert encode.shape == (2, 2, 3, 4)
    assert init["params"]["encoder"]["conv_in"]["kernel"].shape == (3, 3, 48, 32)


@pytest.mark.parametrize("local", [True, False])
def test_local_latents_depend_only_on_the_pixels_near_them(local):
    network = AutoencoderKL(
        ch=8,
        ch_mult=(1,),
        encoder_ch=16,
        patch_size=2,
        num_res_blocks=1,
        mid_attn=False,
        groups=4,
        local=local,
    )
    image = jax.random.uniform(jax.random.key(0), (1, 16, 16, 3))
    params = network.init(jax.random.key(1), image)
    assert params["params"]["encoder"]["conv_in"]["kernel"].shape == (3, 3, 12, 16)

    def changed(pixels):
        other = image.at[:, :, pixels].set(0.5)
        a, b = (network.apply(params, x, method="encode") for x in (image, other))
        return np.abs(a - b).max(axis=(0, 1, 3)) > 0  # columns of latents

    expected = np.arange(8) >= 4 if local else np.full(8, True)
    np.testing.assert_array_equal(changed(slice(10, 16)), expected)


@pytest.mark.parametrize("attention", [dict(mid_attn=True), dict(attn_resolutions=(256,))])
def test_a_local_autoencoder_has_no_attention(attention):
    network = AutoencoderKL(local=True, **dict(mid_attn=False) | attention)
    with pytest.raises(ValueError, match="local needs mid_attn=False and no attn_resolutions"):
        jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))


def test_space_to_depth_takes_patches_row_by_row():
    x = jnp.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    y = space_to_depth(x, 2)
    np.testing.assert_array_equal(y[1, 1, 2], x[1, 2:4, 4:6].reshape(-1))
    np.testing.assert_array_equal(depth_to_space(y, 2), x)
    np.testing.assert_array_equal(space_to_depth(x, 1), x)


def test_upsample_repeats_pixels():
    x = jnp.arange(2 * 2 * 3 * 2).reshape(2, 2, 3, 2)
    np.testing.assert_array_equal(upsample(x), x.repeat(2, axis=1).repeat(2, axis=2))


def test_result_is_float32_whatever_the_arithmetic():
    network = AutoencoderKL(ch=32, ch_mult=(1,), num_res_blocks=1, dtype=jnp.bfloat16)
    image = jnp.zeros((1, 4, 4, 3))
    params = jax.eval_shape(network.init, jax.random.key(0), image)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    for method in ("moments", "__call__"):
        result = jax.eval_shape(lambda p, x, m=method: network.apply(p, x, method=m), params, image)
        assert {leaf.dtype for leaf in jax.tree.leaves(result)} == {jnp.dtype("float32")}
