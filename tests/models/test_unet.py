"""The UNet against CompVis's, the sizes of the released ones, and what a fresh one does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.unet import AttentionBlock, ResBlock, UNet, average_pool, timestep_embedding
from scripts.write_goldens import GOLDEN, uniform
from tests.models.torch_layout import UNET, leaves

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
}


def released(inputs, width, mult, attention, *, outputs=3, heads=-1, head_channels=32, **options):
    return dict(
        in_channels=inputs,
        out_channels=outputs,
        model_channels=width,
        channel_mult=mult,
        attention_resolutions=attention,
        num_heads=heads,
        num_head_channels=-1 if heads > 0 else head_channels,
        **options,
    )


STABLE = dict(outputs=4, context_dim=768, heads=8)
STABLE_2 = dict(outputs=4, context_dim=1024, head_channels=64)
# ldm-facts §2.2 and §2.3: parameters in millions, tensors.
RELEASED = {
    "celeba256": (released(3, 224, (1, 2, 3, 4), (8, 4, 2)), 274.06, 368),
    "lsun_churches256": (
        released(
            *(4, 192, (1, 2, 2, 4, 4), (1, 2, 4, 8)),
            outputs=4,
            heads=8,
            use_scale_shift_norm=True,
            resblock_updown=True,
        ),
        294.97,
        520,
    ),
    "cin256": (released(4, 256, (1, 2, 4), (4, 2, 1), outputs=4, context_dim=512), 394.98, 626),
    "cin256-v2": (released(3, 192, (1, 2, 3, 5), (8, 4, 2), heads=1, context_dim=512), 400.92, 688),
    "text2img256": (released(3, 192, (1, 2, 3, 5), (8, 4, 2), context_dim=640), 403.62, 688),
    "txt2img-1p4B": (
        released(4, 320, (1, 2, 4, 4), (4, 2, 1), outputs=4, heads=8, context_dim=1280),
        872.30,
        686,
    ),
    "layout2img-openimages256": (
        released(3, 128, (1, 2, 3, 4), (8, 4, 2), context_dim=512, transformer_depth=3),
        246.28,
        1328,
    ),
    "semantic_synthesis256": (released(6, 128, (1, 4, 8), (32, 16, 8), heads=8), 215.23, 216),
    "bsr_sr": (released(6, 160, (1, 2, 2, 4), (16, 8)), 113.62, 306),
    "inpainting_big": (
        released(7, 256, (1, 2, 3, 4), (8, 4, 2), heads=8, resblock_updown=True),
        387.25,
        416,
    ),
    "rdm768": (
        released(16, 448, (1, 2, 3, 4), (4, 2, 1), outputs=16, context_dim=768),
        1335.48,
        688,
    ),
    "sd1": (released(4, 320, (1, 2, 4, 4), (4, 2, 1), **STABLE), 859.52, 686),
    "sd1-inpainting": (released(9, 320, (1, 2, 4, 4), (4, 2, 1), **STABLE), 859.54, 686),
    "sd2": (released(4, 320, (1, 2, 4, 4), (4, 2, 1), **STABLE_2), 865.91, 686),
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
    options = dict(channel_mult=(1, 2)) | NETWORKS[name]
    network = UNet(in_channels=5, out_channels=3, model_channels=32, **options)
    agrees(
        f"unet_{name}",
        UNET,
        init=lambda **inputs: network.init(jax.random.key(0), **inputs)["params"],
        apply=lambda params, **inputs: {"y": network.apply({"params": params}, **inputs)},
        tolerance=5e-5,
    )


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes(name, size):
    options, millions, tensors = RELEASED[name]
    inputs = [jnp.zeros((1, 16, 16, options["in_channels"])), jnp.zeros(1)]
    if "context_dim" in options:
        inputs.append(jnp.zeros((1, 1, options["context_dim"])))
    assert size(UNet(**options), *inputs) == (pytest.approx(millions, abs=0.01), tensors)


@pytest.mark.parametrize("name", NETWORKS)
def test_epsilons(name, epsilons):
    """1e-5, but 1e-6 where a SpatialTransformer begins (ldm-facts §9)."""
    options = dict(channel_mult=(1, 2)) | NETWORKS[name]
    inputs = [jnp.zeros((1, 8, 8, 4)), jnp.zeros(1)]
    if "context_dim" in options:
        inputs.append(jnp.zeros((1, 1, 24)))
    found = epsilons(UNet(model_channels=32, **options), *inputs)
    assert len(found) > 10
    for path, epsilon in found.items():
        entry = "context_dim" in options and path.endswith("_1/norm")
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
