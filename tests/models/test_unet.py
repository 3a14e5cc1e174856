"""The UNet against CompVis's and diffusers', and what a fresh one does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.blocks import AttentionBlock, ResBlock
from ldm_jax.models.embedders import concat_timestep_embedding
from ldm_jax.models.layers import average_pool, timestep_embedding
from ldm_jax.models.unet import UNet
from scripts.write_goldens import GOLDEN, uniform
from tests.models.torch_layout import UNET, UNET_LABELS, diffusers_unet, leaves

BLOCKS = {
    "resblock": ResBlock(96),
    "resblock_scale_shift": ResBlock(64, scale_shift_norm=True),
    "resblock_down": ResBlock(64, resize="down"),
    "resblock_up": ResBlock(96, resize="up", scale_shift_norm=True),
    "self_attention": AttentionBlock(heads=4),
}
NETWORKS = {
    "stable_diffusion": dict(
        num_res_blocks=1, attention_resolutions=(2, 1), num_heads=8, context_dim=24
    ),
    "head_channels": dict(
        num_res_blocks=1,
        attention_resolutions=(2,),
        num_head_channels=32,
        context_dim=24,
        transformer_depth=2,
    ),
    "unconditional": dict(num_res_blocks=2, attention_resolutions=(2,), num_head_channels=16),
    "resblock_updown": dict(
        channel_mult=(1, 2, 1),
        num_res_blocks=1,
        attention_resolutions=(4, 1),
        num_heads=4,
        use_scale_shift_norm=True,
        resblock_updown=True,
    ),
    "upscaler": dict(
        num_res_blocks=1,
        attention_resolutions=(1, 2),
        num_heads=4,
        context_dim=24,
        disable_self_attentions=(True, False),
        use_linear_in_transformer=True,
        num_classes=10,
    ),
    "continuous": dict(
        num_res_blocks=1,
        attention_resolutions=(2,),
        num_heads=1,
        resblock_updown=True,
        num_classes="continuous",
    ),
    "no_context": dict(
        num_res_blocks=1,
        attention_resolutions=(),
        num_head_channels=32,
        use_spatial_transformer=True,
    ),
    "half_width": dict(
        model_channels=64,
        channel_mult=(0.5, 1),
        num_res_blocks=1,
        attention_resolutions=(2,),
        num_head_channels=16,
        num_classes=10,
        use_scale_shift_norm=True,
        resblock_updown=True,
    ),
    "sdxl": dict(
        num_res_blocks=1,
        attention_resolutions=(2,),
        num_head_channels=16,
        context_dim=24,
        transformer_depth=(1, 2),
        use_linear_in_transformer=True,
        num_classes="sequential",
        adm_in_channels=20,
    ),
    "refiner": dict(
        num_res_blocks=1,
        attention_resolutions=(1,),
        num_head_channels=8,
        context_dim=24,
        transformer_depth=(1, 2),
        use_scale_shift_norm=True,
        num_classes="timestep",
    ),
}
RULES = {
    "half_width": UNET_LABELS,
    "upscaler": UNET_LABELS,
    "sdxl": diffusers_unet(1, (True, False)),
    "refiner": diffusers_unet(1, (False, True)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_block_agrees_with_original(name, agrees):
    block = BLOCKS[name]
    agrees(
        f"block_{name}",
        UNET,
        init=lambda **inputs: block.init(jax.random.key(0), **inputs)["params"],
        apply=lambda params, **inputs: {"y": block.apply({"params": params}, **inputs)},
        tolerance=1e-5,
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_network_agrees_with_original(name, agrees):
    options = dict(channel_mult=(1, 2), model_channels=32) | NETWORKS[name]
    network = UNet(in_channels=5, out_channels=3, **options)

    def inputs(pooled=None, sizes=None, **others):
        """SDXL's vector is a text's embedding beside those of sizes."""
        if pooled is None:
            return others
        return others | {"y": jnp.hstack([pooled, concat_timestep_embedding(sizes, 4)])}

    agrees(
        f"unet_{name}",
        RULES.get(name, UNET),
        init=lambda **given: network.init(jax.random.key(0), **inputs(**given))["params"],
        apply=lambda params, **given: {"y": network.apply({"params": params}, **inputs(**given))},
        tolerance=5e-5,
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_epsilons(name, epsilons):
    """1e-5, but 1e-6 where a SpatialTransformer begins (ldm-facts §9)."""
    options = dict(channel_mult=(1, 2), model_channels=32) | NETWORKS[name]
    context = jnp.zeros((1, 1, 24)) if "context_dim" in options else None
    labels = {None: None, "sequential": jnp.zeros((1, 20)), "continuous": jnp.zeros((1, 1))}
    y = labels.get(options.get("num_classes"), jnp.zeros(1, int))
    inputs = jnp.zeros((1, 8, 8, 4)), jnp.zeros(1), context
    found = epsilons(UNet(**options), *inputs, y=y)
    assert len(found) > 10
    for path, epsilon in found.items():
        transformer = "context_dim" in options or "use_spatial_transformer" in options
        entry = transformer and path.endswith("_1/norm")
        assert epsilon == (1e-6 if entry else 1e-5), path


def test_timestep_embedding_agrees_with_original():
    with np.load(GOLDEN / "timestep_embedding.npz") as golden:
        for dim in (32, 33):
            found = timestep_embedding(jnp.asarray(golden["t"]), dim)
            np.testing.assert_allclose(found, golden[f"dim_{dim}"], atol=1e-4)


def test_timestep_embedding_has_cosines_first_and_pads():
    found = timestep_embedding(jnp.array([0, 3]), 5)
    angles = 3.0 * np.array([1.0, 0.01])
    np.testing.assert_array_equal(found[0], [1, 1, 0, 0, 0])
    np.testing.assert_allclose(found[1], [*np.cos(angles), *np.sin(angles), 0], rtol=1e-6)


def test_average_pool():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(average_pool(x)[0, :, :, 0], [[2.5, 4.5], [10.5, 12.5]])


@pytest.mark.parametrize("context_dim", [None, 8])
def test_fresh_network_predicts_exactly_zero(context_dim, fresh):
    network = UNet(
        model_channels=32,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(1,),
        context_dim=context_dim,
    )
    x, t = jnp.asarray(uniform("x", (2, 4, 6, 4))), jnp.array([0, 999])
    context = None if context_dim is None else jnp.ones((2, 3, context_dim))
    y, params = fresh(network, x, t, context)
    assert y.shape == x.shape and not np.any(y)
    # So does every residual branch: its last layer is zero, and no other.
    last = ("out_2", "out_layers_3", "proj_out")
    for path, leaf in leaves(params).items():
        if path.endswith("kernel"):
            assert np.any(leaf) == (path.split("/")[-2] not in last or "/ff/" in path), path


@pytest.mark.parametrize(("context_dim", "context"), [(8, None), (None, jnp.zeros((1, 3, 8)))])
def test_context_must_be_as_configured(context_dim, context):
    network = UNet(model_channels=32, context_dim=context_dim)
    with pytest.raises(ValueError, match=f"context_dim={context_dim} got context="):
        network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 4)), jnp.zeros(1), context)
