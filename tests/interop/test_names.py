"""Foreign names against those that the originals' own code gave its parameters."""

import json
from pathlib import Path

import numpy as np
import pytest

from ldm_jax.interop.names import (
    compvis_name,
    diffusers_autoencoder_name,
    diffusers_unet_name,
    to_flax,
    to_torch,
)
from tests.models.torch_layout import AUTOENCODER, TEXT, UNET, convert

GOLDEN = Path(__file__).parents[1] / "models" / "golden"
NETWORKS = {"unet": (UNET, "unet_*"), "autoencoder": (AUTOENCODER, "autoencoder_*")}
NETWORKS["bert"] = (TEXT, "text*")
FILES = [
    (network, path.stem)
    for network, (_, pattern) in NETWORKS.items()
    for path in sorted(GOLDEN.glob(f"{pattern}.npz"))
    if path.stem not in ("unet_sdxl", "unet_refiner")  # written by diffusers, with its names
]


@pytest.mark.parametrize("network, golden", FILES)
def test_compvis_names_are_the_originals(network, golden):
    """There and back: the original's name → our path → the name."""
    with np.load(GOLDEN / f"{golden}.npz") as file:
        shapes = json.loads(str(file["about"]))["shapes"]
    rules, _ = NETWORKS[network]
    for name, shape in shapes.items():
        path, _ = convert(name, np.empty(shape, np.float32), rules)
        assert compvis_name(network, path) == name


@pytest.mark.parametrize("compvis, diffusers", [
    ("time_embed.0.weight", "time_embedding.linear_1.weight"),
    ("time_embed.2.bias", "time_embedding.linear_2.bias"),
    ("input_blocks.0.0.weight", "conv_in.weight"),
    ("input_blocks.1.0.in_layers.2.weight", "down_blocks.0.resnets.0.conv1.weight"),
    ("input_blocks.2.1.proj_in.weight", "down_blocks.0.attentions.1.proj_in.weight"),
    ("input_blocks.3.0.op.weight", "down_blocks.0.downsamplers.0.conv.weight"),
    ("input_blocks.4.0.skip_connection.bias", "down_blocks.1.resnets.0.conv_shortcut.bias"),
    ("input_blocks.3.0.out_layers.3.bias", "down_blocks.0.downsamplers.0.conv2.bias"),
    ("middle_block.2.emb_layers.1.weight", "mid_block.resnets.1.time_emb_proj.weight"),
    ("middle_block.1.norm.weight", "mid_block.attentions.0.norm.weight"),
    ("output_blocks.2.1.conv.weight", "up_blocks.0.upsamplers.0.conv.weight"),
    ("output_blocks.5.2.conv.weight", "up_blocks.1.upsamplers.0.conv.weight"),
    ("output_blocks.5.1.transformer_blocks.0.attn1.to_out.0.bias",
     "up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_out.0.bias"),
    ("out.0.weight", "conv_norm_out.weight"),
    ("out.2.weight", "conv_out.weight"),
])  # fmt: skip
def test_diffusers_names_of_a_unet(compvis, diffusers):
    assert diffusers_unet_name(compvis, num_res_blocks=2) == diffusers


@pytest.mark.parametrize("compvis, diffusers", [
    ("encoder.conv_in.weight", "encoder.conv_in.weight"),
    ("encoder.down.1.block.0.nin_shortcut.weight",
     "encoder.down_blocks.1.resnets.0.conv_shortcut.weight"),
    ("encoder.down.0.downsample.conv.bias", "encoder.down_blocks.0.downsamplers.0.conv.bias"),
    ("encoder.mid.attn_1.q.weight", "encoder.mid_block.attentions.0.to_q.weight"),
    ("decoder.mid.attn_1.proj_out.bias", "decoder.mid_block.attentions.0.to_out.0.bias"),
    ("decoder.mid.attn_1.norm.bias", "decoder.mid_block.attentions.0.group_norm.bias"),
    ("decoder.mid.block_2.norm1.weight", "decoder.mid_block.resnets.1.norm1.weight"),
    ("decoder.up.0.block.2.conv1.weight", "decoder.up_blocks.3.resnets.2.conv1.weight"),
    ("decoder.up.3.upsample.conv.weight", "decoder.up_blocks.0.upsamplers.0.conv.weight"),
    ("decoder.norm_out.weight", "decoder.conv_norm_out.weight"),
    ("quant_conv.weight", "quant_conv.weight"),
])  # fmt: skip
def test_diffusers_names_of_an_autoencoder(compvis, diffusers):
    assert diffusers_autoencoder_name(compvis, levels=4) == diffusers


def test_arrays_turn_round_and_back():
    convolution = np.random.default_rng(0).normal(size=(3, 3, 4, 5))
    assert to_torch(convolution, 4).shape == (5, 4, 3, 3)
    assert to_torch(convolution, 4)[2, 1, 0, 2] == convolution[0, 2, 1, 2]
    np.testing.assert_array_equal(to_flax(to_torch(convolution, 4), (3, 3, 4, 5)), convolution)
    matrix = convolution[0, 0]
    for dimensions in (2, 3, 4):  # a linear layer, or a convolution of one pixel
        there = to_torch(matrix, dimensions)
        assert there.shape == (5, 4, 1, 1)[:dimensions]
        np.testing.assert_array_equal(to_flax(there, (4, 5)), matrix)
    pixel = matrix[None, None]
    np.testing.assert_array_equal(to_flax(to_torch(pixel, 2), (1, 1, 4, 5)), pixel)
    with pytest.raises(ValueError, match=r"shape \(5, 4\) there cannot be \(5, 4\) here"):
        to_flax(np.zeros((5, 4)), (5, 4))
