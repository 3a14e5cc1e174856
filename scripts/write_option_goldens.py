"""Writes goldens of what Stable Diffusion 2, SDXL and the VQ models add to the networks.

    pip install torch==2.13.0 numpy einops tqdm omegaconf pillow safetensors diffusers==0.42.1
    pip install --no-deps stable-diffusion-sdkit==2.1.5 taming-transformers-rom1504==0.0.6
    PYTHONPATH=. python -m scripts.write_option_goldens

Like `scripts/write_goldens.py`, which says what a golden holds. stable-diffusion-sdkit is the code
of Stable Diffusion 2; what only SDXL has is diffusers'. Integers among the outputs are written as
floats.
"""

import argparse

import numpy as np

from scripts.write_goldens import record, uniform

PACKAGES = (
    "torch",
    "numpy",
    "diffusers",
    "stable-diffusion-sdkit",
    "taming-transformers-rom1504",
)


def write(name, network, forward, inputs, parameters):
    record(name, network.eval(), forward, inputs, parameters, packages=PACKAGES)


def write_blocks() -> None:
    from ldm.modules.attention import SpatialTransformer
    from taming.modules.vqvae.quantize import VectorQuantizer2
    from torch import nn
    from torch.nn.functional import interpolate

    picture, context = uniform("x", (2, 4, 6, 32)) / 10, uniform("context", (2, 5, 24))
    options = dict(context_dim=24, disable_self_attn=True, use_linear=True, use_checkpoint=False)
    network = SpatialTransformer(32, n_heads=4, d_head=8, **options)

    def forward(x, context):
        return {"y": network(x, context)}

    parameters = ("proj_in.weight", "transformer_blocks.0.attn1.to_k.weight")
    inputs = {"x": picture, "context": context}
    write("block_cross_attention_only", network, forward, inputs, parameters)

    quantizers = {
        legacy: VectorQuantizer2(10, 3, beta=0.25, sane_index_shape=True, legacy=legacy)
        for legacy in (True, False)
    }
    quantizers[False].embedding = quantizers[True].embedding

    def quantize(z):
        latents, loss, (_, _, indices) = quantizers[True](z)
        loss_not_legacy = quantizers[False](z)[1]
        return {
            "latents": latents,
            "indices": indices.float(),
            "loss": loss,
            "loss_not_legacy": loss_not_legacy,
        }

    inputs = {"z": uniform("z", (2, 4, 6, 3))}
    write("block_quantizer", quantizers[True], quantize, inputs, ("embedding.weight",))

    rescaler = nn.Module()
    rescaler.channel_mapper = nn.Conv2d(5, 3, 1, bias=False)

    def rescale(x):
        for _ in range(2):
            x = interpolate(x, scale_factor=0.5, mode="bilinear")
        return {"y": rescaler.channel_mapper(x)}

    inputs = {"x": uniform("x", (2, 8, 12, 5))}
    write("block_rescaler", rescaler, rescale, inputs, ("channel_mapper.weight",))


def write_autoencoders() -> None:
    from diffusers import AutoencoderTiny
    from ldm.modules.diffusionmodules.model import Decoder, Encoder
    from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
    from taming.modules.vqvae.quantize import VectorQuantizer2
    from torch import nn

    shared = dict(ch=32, ch_mult=(1, 2), num_res_blocks=1, resolution=16, z_channels=3)
    vq = nn.Module()
    options = dict(in_channels=3, out_ch=3, attn_resolutions=(8,), double_z=False, **shared)
    vq.encoder, vq.decoder = Encoder(**options), Decoder(**options)
    vq.quantize = VectorQuantizer2(20, 4, beta=0.25, sane_index_shape=True)
    vq.quant_conv, vq.post_quant_conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)

    def reconstruct(x):
        prequant = vq.quant_conv(vq.encoder(x))
        latents, loss, (_, _, indices) = vq.quantize(prequant)
        image = vq.decoder(vq.post_quant_conv(latents))
        return {"prequant": prequant, "indices": indices.float(), "loss": loss, "image": image}

    parameters = ("encoder.conv_in.weight", "quantize.embedding.weight", "decoder.conv_out.bias")
    x = uniform("x", (2, 8, 12, 3))
    write("autoencoder_vq", vq, reconstruct, {"x": x}, parameters)

    plain = nn.Module()
    options = dict(in_channels=6, out_ch=6, attn_resolutions=(), double_z=True, **shared)
    plain.encoder, plain.decoder = Encoder(**options), Decoder(**options)

    def forward(x, z):
        posterior = DiagonalGaussianDistribution(plain.encoder(x))
        return {"mean": posterior.mean, "logvar": posterior.logvar, "image": plain.decoder(z)}

    inputs = {"x": uniform("x", (2, 8, 12, 6)), "z": 2 * uniform("z", (2, 4, 6, 3))}
    parameters = ("encoder.conv_out.weight", "decoder.conv_in.weight")
    write("autoencoder_no_quant_conv", plain, forward, inputs, parameters)

    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 2, 1),
        num_decoder_blocks=(2, 1, 1),
        latent_channels=4,
    )

    def both(x, z):
        latents, image = tiny.encode(x, return_dict=False), tiny.decode(z, return_dict=False)
        return {"latents": latents[0], "image": image[0]}

    inputs = {"x": x, "z": 4 * uniform("z", (2, 2, 3, 4))}
    parameters = ("encoder.layers.2.weight", "decoder.layers.6.conv.2.bias")
    write("autoencoder_tiny", tiny, both, inputs, parameters)


def write_unets() -> None:
    """Of Stable Diffusion 2's code, where `legacy` is nothing if channels divide into heads."""
    import torch
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    for name, options in {
        "upscaler": dict(
            attention_resolutions=[1, 2],
            num_heads=4,
            use_spatial_transformer=True,
            context_dim=24,
            disable_self_attentions=[True, False],
            use_linear_in_transformer=True,
            num_classes=10,
        ),
        "continuous": dict(
            attention_resolutions=[2],
            num_heads=1,
            resblock_updown=True,
            num_classes="continuous",
        ),
        # A context of no width is one that is not given: so SGM's unconditional networks are.
        "no_context": dict(
            attention_resolutions=[],
            num_head_channels=32,
            use_spatial_transformer=True,
            context_dim=64,
        ),
    }.items():
        options |= dict(channel_mult=(1, 2), num_res_blocks=1, in_channels=5, out_channels=3)
        network, other = (
            UNetModel(image_size=8, model_channels=32, legacy=legacy, **options)
            for legacy in (True, False)
        )

        def forward(x, t, context=None, y=None, network=network, other=other):
            output = network(x, t, context, y)
            other.load_state_dict(network.state_dict())
            torch.testing.assert_close(other(x, t, context, y), output)
            return {"y": output}

        inputs = {"x": uniform("x", (2, 8, 12, 5)), "t": np.array([0, 999])}
        parameters = ["time_embed.0.weight", "input_blocks.0.0.weight"]
        if name == "upscaler":
            inputs |= {"context": uniform("context", (2, 5, 24)), "y": np.array([9, 0])}
        if name == "continuous":
            inputs["y"] = uniform("y", (2, 1))
        if "num_classes" in options:
            parameters += ["label_emb.weight"]
        write(f"unet_{name}", network, forward, inputs, parameters)


def write_sdxl_unets() -> None:
    """Of diffusers, whose `attention_head_dim` is the number of heads."""
    from diffusers import UNet2DConditionModel

    for name, options in {
        "sdxl": dict(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=20,
        ),
        "refiner": dict(
            # As in SDXL's refiner, the lowest level has no attention, and the middle its depth.
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(4, 8),
            resnet_time_scale_shift="scale_shift",
            class_embed_type="timestep",
        ),
    }.items():
        network = UNet2DConditionModel(
            in_channels=5,
            out_channels=3,
            block_out_channels=(32, 64),
            layers_per_block=1,
            cross_attention_dim=24,
            **options,
        )

        def forward(x, t, context, pooled=None, sizes=None, y=None, network=network):
            added = None if pooled is None else {"text_embeds": pooled, "time_ids": sizes}
            options = dict(class_labels=y, added_cond_kwargs=added, return_dict=False)
            return {"y": network(x, t, context, **options)[0]}

        inputs = {"x": uniform("x", (2, 8, 12, 5)), "t": np.array([0, 999])}
        inputs["context"] = uniform("context", (2, 5, 24))
        parameters = ["conv_in.weight", "mid_block.attentions.0.proj_in.weight"]
        if name == "sdxl":
            sizes = np.array([[64, 48, 0], [33, 17, 8]])
            inputs |= {"pooled": uniform("pooled", (2, 8)), "sizes": sizes}
            parameters += ["add_embedding.linear_1.weight"]
        else:
            inputs["y"] = np.array([2.5, 6.0], np.float32)
            parameters += ["class_embedding.linear_2.weight"]
        write(f"unet_{name}", network, forward, inputs, parameters)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    write_blocks()
    write_autoencoders()
    write_unets()
    write_sdxl_unets()


if __name__ == "__main__":
    main()
