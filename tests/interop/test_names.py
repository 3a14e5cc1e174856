"""Foreign names, one by one. `test_layout` has whole networks and their shapes."""

import numpy as np
import pytest

from ldm_jax.interop.names import (
    diffusers_autoencoder_name,
    diffusers_unet_name,
    name_of,
    old_diffusers_name,
    to_flax,
    to_torch,
)


@pytest.mark.parametrize("compvis, diffusers", [
    ("time_embed.0.weight", "time_embedding.linear_1.weight"),
    ("time_embed.2.bias", "time_embedding.linear_2.bias"),
    ("label_emb.weight", "class_embedding.weight"),
    ("label_emb.0.0.weight", "add_embedding.linear_1.weight"),
    ("label_emb.1.2.weight", "class_embedding.linear_2.weight"),
    ("input_blocks.0.0.weight", "conv_in.weight"),
    ("input_blocks.1.0.in_layers.2.weight", "down_blocks.0.resnets.0.conv1.weight"),
    ("input_blocks.2.1.proj_in.weight", "down_blocks.0.attentions.1.proj_in.weight"),
    ("input_blocks.3.0.op.weight", "down_blocks.0.downsamplers.0.conv.weight"),
    ("input_blocks.4.0.skip_connection.bias", "down_blocks.1.resnets.0.conv_shortcut.bias"),
    ("input_blocks.3.0.out_layers.3.bias", "down_blocks.0.downsamplers.0.conv2.bias"),
    ("middle_block.2.emb_layers.1.weight", "mid_block.resnets.1.time_emb_proj.weight"),
    ("middle_block.1.norm.weight", "mid_block.attentions.0.norm.weight"),
    ("output_blocks.2.1.conv.weight", "up_blocks.0.upsamplers.0.conv.weight"),
    ("output_blocks.2.1.in_layers.0.bias", "up_blocks.0.upsamplers.0.norm1.bias"),
    ("output_blocks.2.1.proj_in.bias", "up_blocks.0.attentions.2.proj_in.bias"),
    ("output_blocks.5.2.conv.weight", "up_blocks.1.upsamplers.0.conv.weight"),
    ("output_blocks.5.2.out_layers.3.weight", "up_blocks.1.upsamplers.0.conv2.weight"),
    ("output_blocks.5.1.transformer_blocks.0.attn1.to_out.0.bias",
     "up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_out.0.bias"),
    ("out.0.weight", "conv_norm_out.weight"),
    ("out.2.weight", "conv_out.weight"),
])  # fmt: skip
def test_diffusers_names_of_a_unet(compvis, diffusers):
    assert diffusers_unet_name(compvis, num_res_blocks=2) == diffusers


def test_diffusers_names_of_attention_without_a_context():
    def name(compvis):
        return diffusers_unet_name(compvis, num_res_blocks=2, plain_attention=True)

    assert name("input_blocks.2.1.norm.bias") == "down_blocks.0.attentions.1.group_norm.bias"
    assert name("middle_block.1.proj_out.weight") == "mid_block.attentions.0.to_out.0.weight"
    assert name("middle_block.1.qkv.weight") == "mid_block.attentions.0.qkv.weight"


def test_diffusers_name_of_what_takes_a_vector():
    found = diffusers_unet_name("label_emb.0.2.bias", 2, vector="class_embedding")
    assert found == "class_embedding.linear_2.bias"


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
    ("quantize.embedding.weight", "quantize.embedding.weight"),
])  # fmt: skip
def test_diffusers_names_of_an_autoencoder(compvis, diffusers):
    assert diffusers_autoencoder_name(compvis, levels=4) == diffusers


@pytest.mark.parametrize("new, old", [
    ("mid_block.attentions.0.to_q.weight", "mid_block.attentions.0.query.weight"),
    ("mid_block.attentions.0.to_out.0.bias", "mid_block.attentions.0.proj_attn.bias"),
    ("mid_block.attentions.0.group_norm.bias", "mid_block.attentions.0.group_norm.bias"),
    ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight",
     "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"),
])  # fmt: skip
def test_old_diffusers_names(new, old):
    assert old_diffusers_name(new) == old


@pytest.mark.parametrize("path, taesd, diffusers", [
    ("encoder/layers_0/bias", "encoder.0.bias", "encoder.layers.0.bias"),
    ("encoder/layers_4/conv_2/kernel", "encoder.4.conv.2.weight",
     "encoder.layers.4.conv.2.weight"),
    ("decoder/layers_0/kernel", "decoder.1.weight", "decoder.layers.0.weight"),
    ("decoder/layers_12/conv_4/bias", "decoder.13.conv.4.bias",
     "decoder.layers.12.conv.4.bias"),
])  # fmt: skip
def test_names_of_a_tiny_autoencoder(path, taesd, diffusers):
    """TAESD's decoder begins with a clamp, which counts."""
    assert name_of("tiny", path) == taesd
    assert name_of("diffusers_tiny", path) == diffusers


@pytest.mark.parametrize("path, compvis, diffusers", [
    ("token_emb/embedding", "token_emb.weight", "model.embed_tokens.weight"),
    ("pos_emb", "pos_emb.emb.weight", "model.embed_positions.weight"),
    ("layers_10_norm1/scale", "attn_layers.layers.20.0.weight",
     "model.layers.10.self_attn_layer_norm.weight"),
    ("layers_10_attn/to_out/bias", "attn_layers.layers.20.1.to_out.bias",
     "model.layers.10.self_attn.out_proj.bias"),
    ("layers_0_norm2/bias", "attn_layers.layers.1.0.bias",
     "model.layers.0.final_layer_norm.bias"),
    ("layers_0_ff/proj_in/kernel", "attn_layers.layers.1.1.net.0.0.weight",
     "model.layers.0.fc1.weight"),
    ("layers_0_ff/proj_out/kernel", "attn_layers.layers.1.1.net.2.weight",
     "model.layers.0.fc2.weight"),
    ("norm/scale", "norm.weight", "model.layer_norm.weight"),
])  # fmt: skip
def test_names_of_ldms_text_transformer(path, compvis, diffusers):
    assert name_of("bert", path) == compvis
    assert name_of("diffusers_bert", path) == diffusers


@pytest.mark.parametrize("path, transformers, open_clip", [
    ("token_embedding/embedding", "text_model.embeddings.token_embedding.weight",
     "token_embedding.weight"),
    ("position_embedding", "text_model.embeddings.position_embedding.weight",
     "positional_embedding"),
    ("layers_11/self_attn/k_proj/kernel", "text_model.encoder.layers.11.self_attn.k_proj.weight",
     "transformer.resblocks.11.attn.in_proj_weight"),
    ("layers_11/self_attn/v_proj/bias", "text_model.encoder.layers.11.self_attn.v_proj.bias",
     "transformer.resblocks.11.attn.in_proj_bias"),
    ("layers_0/self_attn/out_proj/bias", "text_model.encoder.layers.0.self_attn.out_proj.bias",
     "transformer.resblocks.0.attn.out_proj.bias"),
    ("layers_0/layer_norm2/scale", "text_model.encoder.layers.0.layer_norm2.weight",
     "transformer.resblocks.0.ln_2.weight"),
    ("layers_0/mlp/fc1/kernel", "text_model.encoder.layers.0.mlp.fc1.weight",
     "transformer.resblocks.0.mlp.c_fc.weight"),
    ("final_layer_norm/bias", "text_model.final_layer_norm.bias", "ln_final.bias"),
    ("text_projection/kernel", "text_projection.weight", "text_projection"),
])  # fmt: skip
def test_names_of_clip(path, transformers, open_clip):
    assert name_of("clip", path) == transformers
    assert name_of("openclip", path) == open_clip


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
