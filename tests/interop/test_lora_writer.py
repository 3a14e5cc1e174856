"""LoRA files that are written are read back to the last bit, under the names that others read."""

import functools

import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from ldm_jax.interop.changes import Decomposed, Factors, scale_of, separated
from ldm_jax.interop.files import open_state
from ldm_jax.interop.layout import shapes
from ldm_jax.interop.lora import read_lora
from ldm_jax.interop.lora_writer import layer_names, write_lora
from ldm_jax.interop.networks import networks
from ldm_jax.models.low_rank import DOWN, MAGNITUDE, SCALE, UP
from tests import tiny_models

RANK = 3
LDM = tiny_models.config(
    {"text": dict(kind="text", vocabulary="emoji", dropout=0.1, network=dict(width=16, depth=1))},
    context_dim=16,
)
MODELS = {
    "sd1": tiny_models.STABLE,
    "sdxl": tiny_models.XL,
    "ldm": LDM,
    "labels": tiny_models.LABELS,
    "plain": tiny_models.UNCONDITIONAL,
    "sd2": tiny_models.config(
        tiny_models.STABLE["conditioning"], context_dim=16, use_linear_in_transformer=True
    ),
}
# DoRA has all tensors.
ROUND_TRIPS = [(model, layout, "dora") for model in MODELS for layout in ("kohya", "peft")]
ROUND_TRIPS += [
    ("sd1", layout, kind) for layout in ("kohya", "peft") for kind in ("lora", "rslora")
]
ROUND_TRIPS.remove(("plain", "peft", "dora"))  # refused


@functools.cache
def kernels(model):
    """Path → shape of every kernel of the UNet and the text encoders."""
    return {
        f"{section}/{path}": shape
        for section, (network, fields) in networks(MODELS[model]).items()
        if section in ("unet", "text", "text_2")
        for path, shape in shapes(network, fields).items()
        if path.endswith("/kernel")
    }


def random_factors(model, scale, dora=False, rank=RANK):
    rng, made = np.random.default_rng(0), {}
    for path, shape in kernels(model).items():
        layer = path.removesuffix("kernel")
        made[layer + DOWN] = rng.standard_normal((*shape[:-1], rank)).astype(np.float32)
        made[layer + UP] = rng.standard_normal((rank, shape[-1])).astype(np.float32)
        made[layer + SCALE] = scale
        if dora:
            made[layer + MAGNITUDE] = rng.uniform(0.5, 2, shape[-1]).astype(np.float32)
    return unflatten_dict(made, sep="/")


def flat(lora):
    """Arrays by path and part."""
    parts = {}
    for path, change in lora.items():
        if isinstance(change, Decomposed):
            parts[path, "magnitude"] = change.magnitude
            change = change.change
        assert isinstance(change, Factors)
        parts |= {(path, "down"): change.down, (path, "up"): change.up}
    return parts


@pytest.mark.parametrize("model, layout, kind", ROUND_TRIPS)
def test_round_trip(model, layout, kind, tmp_path):
    config, alpha, path = MODELS[model], 5.0, tmp_path / "lora.safetensors"
    rank = 4 if kind == "rslora" else RANK  # whose root is exact
    factors = random_factors(model, scale_of(alpha, rank, kind == "rslora"), kind == "dora", rank)
    write_lora(path, factors, config, alpha, kind == "rslora", layout)
    found, expected = flat(read_lora(path, config)), flat(separated(factors)[1])
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array, err_msg=str(key))


# By hand, from files of kohya's scripts and of diffusers.
NAMES = {
    ("sd1", "kohya"): {
        "unet/input_blocks_1_1/transformer_blocks_0/attn1/to_out/kernel": (
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0", 2),
        "unet/input_blocks_1_1/proj_in/kernel": (
            "lora_unet_down_blocks_0_attentions_0_proj_in", 4),
        "unet/input_blocks_1_0/in_layers_2/kernel": ("lora_unet_down_blocks_0_resnets_0_conv1", 4),
        "text/layers_1/self_attn/q_proj/kernel": (
            "lora_te_text_model_encoder_layers_1_self_attn_q_proj", 2)},
    ("sd1", "peft"): {
        "unet/input_blocks_1_1/transformer_blocks_0/ff/proj_in/kernel": (
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj", 2),
        "text/layers_0/mlp/fc2/kernel": ("text_encoder.text_model.encoder.layers.0.mlp.fc2", 2)},
    ("sd2", "kohya"): {
        "unet/middle_block_1/proj_in/kernel": ("lora_unet_mid_block_attentions_0_proj_in", 2)},
    ("sdxl", "kohya"): {
        "unet/middle_block_1/transformer_blocks_0/attn2/to_k/kernel": (
            "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k", 2),
        "text/layers_0/mlp/fc1/kernel": ("lora_te1_text_model_encoder_layers_0_mlp_fc1", 2),
        "text_2/layers_0/mlp/fc1/kernel": ("lora_te2_text_model_encoder_layers_0_mlp_fc1", 2)},
    ("sdxl", "peft"): {
        "unet/label_emb_0_2/kernel": ("unet.add_embedding.linear_2", 2),
        "text_2/text_projection/kernel": ("text_encoder_2.text_projection", 2)},
    ("plain", "kohya"): {
        "unet/middle_block_1/qkv/kernel": ("lora_unet_middle_block_1_qkv", 3)},
}  # fmt: skip


@pytest.mark.parametrize("model, layout", NAMES)
def test_names_and_dimensions(model, layout):
    expected = NAMES[model, layout]
    assert layer_names(MODELS[model], list(expected), layout) == expected


def test_shapes_and_header_are_torchs(tmp_path):
    config, path = MODELS["sd1"], tmp_path / "lora.safetensors"
    some = "unet/input_blocks_1_0/in_layers_2/", "unet/input_blocks_1_1/proj_in/"
    leaves = flatten_dict(random_factors("sd1", np.float32(2.0), dora=True), sep="/")
    factors = unflatten_dict({k: v for k, v in leaves.items() if k.startswith(some)}, sep="/")

    write_lora(path, factors, config, alpha=6)
    state, conv = open_state(path), "lora_unet_down_blocks_0_resnets_0_conv1."
    assert {key: state.shape(key) for key in state if key.startswith(conv)} == {
        f"{conv}lora_down.weight": (RANK, 16, 3, 3),
        f"{conv}lora_up.weight": (16, RANK, 1, 1),
        f"{conv}alpha": (),
        f"{conv}dora_scale": (16, 1, 1, 1),
    }
    assert state[f"{conv}alpha"] == 6
    np.testing.assert_array_equal(
        state[f"{conv}lora_down.weight"],
        leaves[some[0] + DOWN].transpose(3, 2, 0, 1),
    )
    write_lora(path, factors, config, alpha=6, layout="peft")
    state, conv = open_state(path), "unet.down_blocks.0.resnets.0.conv1."
    assert state.shape(f"{conv}lora_magnitude_vector") == (1, 16, 1, 1)
    assert state.shape(f"{conv}lora_A.weight") == (RANK, 16, 3, 3)
    assert '"unet.lora_alpha": 6' in state.metadata["lora_adapter_metadata"]


@pytest.mark.parametrize("model, layout, path, message", [
    ("sd1", "lycoris", "unet/out_2/kernel", "layout='lycoris': choose one of kohya, peft"),
    ("plain", "peft", "unet/out_2/kernel", "layout='peft' has no names for this UNet"),
    ("sd1", "peft", "autoencoder/encoder_conv_in/kernel", "no name for the network 'autoencoder'"),
])  # fmt: skip
def test_what_has_no_name_is_refused(model, layout, path, message):
    with pytest.raises(ValueError, match=message):
        layer_names(MODELS[model], [path], layout)
