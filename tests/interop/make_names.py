"""Writes tests/interop/golden/: what diffusers and transformers call their tensors.

    pip install torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 numpy
    PYTHONPATH=. python -m tests.interop.make_names

Each network is narrow but has the structure of a published one. `names.json` holds the shapes by
name, and the versions. `outputs.npz` holds what some of them compute with `random_weights`, drawn
name by name, for inputs drawn by `uniform`: names do not say in which order channels lie. Pictures
are NCHW there.
"""

import argparse
import json
import re
from importlib.metadata import version
from pathlib import Path

import numpy as np

from scripts.write_goldens import random_weights, uniform

GOLDEN = Path(__file__).parent / "golden"
PACKAGES = ("torch", "diffusers", "transformers")
TOKENS = np.array([[1, 7, 49, 0, 0, 0, 0, 0], [3, 3, 9, 12, 40, 21, 2, 5]])

UNET = dict(
    sample_size=8,
    block_out_channels=(32, 64, 64),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=24,
    attention_head_dim=4,
)
UNET_2D = dict(
    sample_size=8,
    block_out_channels=(32, 64),
    layers_per_block=2,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=16,
)
AUTOENCODER = dict(
    block_out_channels=(32, 64),
    layers_per_block=1,
    down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
    up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
    sample_size=16,
)
CLIP = dict(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=10,
)


def networks():
    """Name → network and, where numbers are written too, function of it to its output."""
    import torch
    from diffusers import (
        AutoencoderKL,
        AutoencoderTiny,
        UNet2DConditionModel,
        UNet2DModel,
        VQModel,
    )
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
        LDMBertConfig,
        LDMBertModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    x, t = torch.from_numpy(uniform("x", (2, 3, 8, 4))), torch.tensor([10, 990])
    tokens = torch.from_numpy(TOKENS)

    yield "unet_sd1", UNet2DConditionModel(**UNET), None
    options = UNET | dict(use_linear_projection=True, attention_head_dim=(1, 2, 2))
    yield "unet_sd2", UNet2DConditionModel(**options), None
    unclip = dict(class_embed_type="projection", projection_class_embeddings_input_dim=12)
    yield "unet_unclip", UNet2DConditionModel(**options, **unclip), None
    upscaler = dict(only_cross_attention=(True, True, False), num_class_embeds=10)
    yield "unet_upscaler", UNet2DConditionModel(**options, **upscaler), None
    options |= dict(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=20,
    )
    yield "unet_sdxl", UNet2DConditionModel(**options), None

    yield "unet_celebahq", UNet2DModel(**UNET_2D), lambda network: network(x, t).sample
    resizing = dict(
        downsample_type="resnet",
        upsample_type="resnet",
        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "AttnUpBlock2D"),
        resnet_time_scale_shift="scale_shift",
        attn_norm_num_groups=32,
        num_class_embeds=10,
        attention_head_dim=32,
    )
    yield "unet_churches", UNet2DModel(**UNET_2D | resizing), None

    yield "autoencoder_kl", AutoencoderKL(**AUTOENCODER), None
    plain = dict(use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False)
    yield "autoencoder_no_quant_conv", AutoencoderKL(**AUTOENCODER | plain), None
    attending = AUTOENCODER | dict(
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    )
    yield "autoencoder_vq", VQModel(**attending, num_vq_embeddings=20, vq_embed_dim=3), None
    widths = dict(encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8))
    blocks = dict(num_encoder_blocks=(1, 2, 1), num_decoder_blocks=(2, 1, 1))
    yield "autoencoder_tiny", AutoencoderTiny(**widths, **blocks), None

    yield "clip", CLIPTextModel(CLIPTextConfig(**CLIP)), None
    config = CLIPTextConfig(**CLIP, projection_dim=24)
    yield "clip_projection", CLIPTextModelWithProjection(config), None
    bert = LDMBertConfig(
        vocab_size=60,
        max_position_embeddings=10,
        encoder_layers=2,
        encoder_ffn_dim=128,
        encoder_attention_heads=4,
        head_dim=8,
        d_model=32,
    )
    yield "bert", LDMBertModel(bert), lambda network: network(tokens)[0]


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    import torch

    shapes, outputs = {}, {}
    for name, network, run in networks():
        state = network.state_dict()
        shapes[name] = {key: tuple(tensor.shape) for key, tensor in state.items()}
        if run:
            drawn = random_weights(shapes[name])
            network.load_state_dict({key: torch.from_numpy(w) for key, w in drawn.items()})
            with torch.no_grad():
                outputs[name] = run(network.eval()).numpy()
        print(name, len(state))
    versions = {package: version(package) for package in PACKAGES}
    text = json.dumps({"versions": versions, "shapes": shapes}, indent=0)
    text = re.sub(r"\[[^]]*\]", lambda shape: re.sub(r"\s+", "", shape[0]), text)
    GOLDEN.mkdir(exist_ok=True)
    (GOLDEN / "names.json").write_text(text + "\n", encoding="utf-8")
    np.savez_compressed(GOLDEN / "outputs.npz", **outputs)


if __name__ == "__main__":
    main()
