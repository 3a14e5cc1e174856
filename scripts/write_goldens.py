"""Writes tests/models/golden/: the outputs and gradients of the original networks.

    pip install torch==2.13.0 torchvision==0.28.0 numpy einops pillow tqdm lpips==0.1.4
    pip install --no-deps taming-transformers-rom1504
    git clone https://github.com/CompVis/latent-diffusion     # a506df5
    git clone https://github.com/openai/guided-diffusion      # 22e0df8
    PYTHONPATH=latent-diffusion:guided-diffusion:. python -m scripts.write_goldens

Each network is small but has the real structure, and every parameter is random, including layers
that start at zero, because half of a network would be untested otherwise. Weights are not stored:
both sides draw them with `random_weights` by name. A file holds names and shapes, inputs, outputs
and the gradients of Σ output · `uniform("cotangent/NAME")`. Pictures are NHWC; parameters and their
gradients have torch's names and layout.
"""

import argparse
import contextlib
import io
import json
import zlib
from importlib.metadata import version
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parents[1] / "tests" / "models" / "golden"
PACKAGES = ("torch", "numpy", "lpips", "taming-transformers-rom1504")


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """U(−1, 1) drawn from the name. NumPy keeps the stream of `RandomState` for ever (NEP 19)."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    return random.uniform(-1.0, 1.0, shape).astype(np.float32)


def random_weights(shapes: dict[str, tuple[int, ...]], gain: float = 1.0) -> dict[str, np.ndarray]:
    """Parameters by torch name: weights of variance gain²/fan_in, scales near 1, biases near 0."""
    weights = {}
    for name, shape in shapes.items():
        weights[name] = uniform(name, shape)
        if len(shape) > 1:
            weights[name] *= np.float32(gain * np.sqrt(3.0 / np.prod(shape[1:])))
        elif name.endswith("weight"):
            weights[name] = 1 + weights[name] / 2
        else:
            weights[name] /= 4
    return weights


def lpips_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """As above for VGG16, kept at one scale through its ReLUs, with heads that are not negative."""
    weights = random_weights(shapes, gain=np.sqrt(2.0))
    return {name: np.abs(w) if name.startswith("lin") else w for name, w in weights.items()}


def nchw(array):
    return array.swapaxes(1, -1).swapaxes(2, -1) if array.ndim == 4 else array


def nhwc(array):
    return np.moveaxis(array, 1, -1) if array.ndim == 4 else array


def record(
    name, network, forward, inputs, parameters=(), weights=random_weights, packages=PACKAGES
):
    """Writes one golden.

    Args:
      network: torch module; its parameters are replaced.
      forward: function of the inputs, as torch tensors in NCHW, to outputs by name.
      inputs: arrays by name, pictures in NHWC. There are gradients with respect to all floats.
      parameters: names of parameters to give gradients of.
      weights: function of the parameters' shapes to their values.
      packages: whose versions the golden names.
    """
    import torch

    named = dict(network.named_parameters())
    shapes = {key: tuple(parameter.shape) for key, parameter in named.items()}
    for key, value in weights(shapes).items():
        named[key].data = torch.from_numpy(value)
        named[key].requires_grad_(True)
    tensors = {key: torch.from_numpy(np.ascontiguousarray(nchw(a))) for key, a in inputs.items()}
    floats = [key for key, tensor in tensors.items() if tensor.is_floating_point()]
    for key in floats:
        tensors[key].requires_grad_(True)

    outputs = forward(**tensors)
    loss = 0.0
    for key, output in outputs.items():
        cotangent = uniform(f"cotangent/{key}", nhwc(output.detach().numpy()).shape)
        loss += torch.sum(output * torch.from_numpy(np.ascontiguousarray(nchw(cotangent))))
    loss.backward()

    arrays = {f"input/{key}": array for key, array in inputs.items()}
    arrays |= {f"output/{key}": nhwc(o.detach().numpy()) for key, o in outputs.items()}
    arrays |= {f"input_gradient/{key}": nhwc(tensors[key].grad.numpy()) for key in floats}
    arrays |= {f"gradient/{key}": named[key].grad.numpy() for key in parameters}
    versions = {package: version(package) for package in packages}
    about = json.dumps({"shapes": shapes, "versions": versions})
    np.savez_compressed(GOLDEN / f"{name}.npz", about=np.array(about), **arrays)
    norms = {key: f"{float(np.sqrt(np.mean(np.square(a)))):.3g}" for key, a in arrays.items()}
    print(name, f"{sum(p.numel() for p in named.values()):,} parameters", norms)


def write_blocks() -> None:
    """The parts of UNet and autoencoder one by one, so that a mistake is seen where it is."""
    from ldm.modules import attention
    from ldm.modules.diffusionmodules import model, openaimodel

    # A variance of 1/300, where it matters whether a norm's epsilon is 1e-5 or 1e-6.
    picture, tokens = uniform("x", (2, 4, 6, 64)) / 10, uniform("x", (2, 10, 64))
    context, emb = uniform("context", (2, 5, 24)), uniform("emb", (2, 16))

    def block(name, network, inputs, parameters):
        def forward(x, **others):
            return {"y": network(x, **others)}

        record(f"block_{name}", network, forward, inputs, parameters)

    network = model.ResnetBlock(in_channels=64, out_channels=96, temb_channels=0, dropout=0.0)
    original = network.forward
    network.forward = lambda x: original(x, None)
    parameters = ("norm1.weight", "conv1.bias", "nin_shortcut.weight")
    block("autoencoder_resnet", network, {"x": picture}, parameters)
    parameters = ("norm.bias", "k.weight", "proj_out.weight")
    block("autoencoder_attention", model.AttnBlock(64), {"x": picture}, parameters)

    parameters = ("in_layers.0.weight", "emb_layers.1.weight", "out_layers.0.bias")
    for name, options in {
        "resblock": dict(out_channels=96),
        "resblock_scale_shift": dict(use_scale_shift_norm=True),
        "resblock_down": dict(down=True),
        "resblock_up": dict(up=True, out_channels=96, use_scale_shift_norm=True),
    }.items():
        network = openaimodel.ResBlock(64, 16, 0.0, **options)
        block(name, network, {"x": picture, "emb": emb}, parameters)

    network = openaimodel.AttentionBlock(64, num_heads=4)
    block("self_attention", network, {"x": picture}, ("qkv.weight", "qkv.bias", "proj_out.weight"))
    network = attention.CrossAttention(64, context_dim=24, heads=4, dim_head=8)
    parameters = ("to_q.weight", "to_k.weight", "to_out.0.weight")
    block("cross_attention", network, {"x": tokens, "context": context}, parameters)
    network = attention.FeedForward(64, glu=True)
    block("feed_forward", network, {"x": tokens}, ("net.0.proj.bias", "net.2.weight"))
    network = attention.SpatialTransformer(64, n_heads=4, d_head=16, depth=2, context_dim=24)
    parameters = ("norm.weight", "proj_in.weight", "transformer_blocks.1.attn2.to_v.weight")
    block("spatial_transformer", network, {"x": picture, "context": context}, parameters)


def write_autoencoders() -> None:
    from ldm.modules.diffusionmodules.model import Decoder, Encoder
    from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
    from torch import nn

    for name, options in {
        "one_block": dict(ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,)),
        "two_blocks": dict(ch_mult=(1, 2), num_res_blocks=2, attn_resolutions=(16,)),
        "three_levels": dict(
            ch_mult=(2, 1, 1), num_res_blocks=1, attn_resolutions=(), attn_type="none"
        ),
    }.items():
        network = nn.Module()
        options |= dict(ch=32, out_ch=3, in_channels=3, resolution=16, z_channels=3, double_z=True)
        network.encoder, network.decoder = Encoder(**options), Decoder(**options)
        network.quant_conv = nn.Conv2d(6, 8, 1)
        network.post_quant_conv = nn.Conv2d(4, 3, 1)

        def forward(x, z, network=network):
            posterior = DiagonalGaussianDistribution(network.quant_conv(network.encoder(x)))
            image = network.decoder(network.post_quant_conv(z))
            return {"mean": posterior.mean, "logvar": posterior.logvar, "image": image}

        factor = 2 ** (len(options["ch_mult"]) - 1)
        x = uniform("x", (2, 8, 12, 3))
        z = 2 * uniform("z", (2, 8 // factor, 12 // factor, 4))
        parameters = (
            "encoder.conv_in.weight",
            "encoder.down.0.downsample.conv.bias",
            "quant_conv.weight",
            "decoder.up.1.upsample.conv.bias",
            "decoder.conv_out.weight",
        )
        record(f"autoencoder_{name}", network, forward, {"x": x, "z": z}, parameters)


def write_unets() -> None:
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    for name, options in {
        "stable_diffusion": dict(
            num_res_blocks=1,
            attention_resolutions=[2, 1],
            num_heads=8,
            context_dim=24,
            legacy=False,
        ),
        "head_channels": dict(
            num_res_blocks=1,
            attention_resolutions=[2],
            num_head_channels=32,
            context_dim=24,
            transformer_depth=2,
        ),
        "unconditional": dict(num_res_blocks=2, attention_resolutions=[2], num_head_channels=16),
        "resblock_updown": dict(
            channel_mult=(1, 2, 1),
            num_res_blocks=1,
            attention_resolutions=[4, 1],
            num_heads=4,
            use_scale_shift_norm=True,
            resblock_updown=True,
        ),
    }.items():
        options = dict(channel_mult=(1, 2), in_channels=5, out_channels=3) | options
        conditional = "context_dim" in options
        network = UNetModel(
            image_size=8, model_channels=32, use_spatial_transformer=conditional, **options
        )

        def forward(x, t, context=None, network=network):
            return {"y": network(x, t, context=context)}

        inputs = {"x": uniform("x", (2, 8, 12, 5)), "t": np.array([0, 999])}
        parameters = ["time_embed.0.weight", "input_blocks.0.0.weight", "out.0.weight"]
        if conditional:
            inputs["context"] = uniform("context", (2, 5, 24))
            parameters += ["middle_block.1.transformer_blocks.0.attn2.to_k.weight"]
        else:
            parameters += ["middle_block.1.qkv.bias"]
        record(f"unet_{name}", network, forward, inputs, parameters)


def write_unet_of_half_width() -> None:
    """As guided diffusion's 512×512: a first level of half the width, and classes."""
    from guided_diffusion.unet import UNetModel

    network = UNetModel(
        image_size=8,
        in_channels=5,
        model_channels=64,
        out_channels=3,
        channel_mult=(0.5, 1),
        num_res_blocks=1,
        attention_resolutions=(2,),
        num_head_channels=16,
        num_classes=10,
        use_scale_shift_norm=True,
        resblock_updown=True,
    )

    def forward(x, t, y):
        return {"y": network(x, t, y)}

    inputs = {"x": uniform("x", (2, 8, 12, 5)), "t": np.array([0, 999]), "y": np.array([3, 9])}
    parameters = ("input_blocks.0.0.weight", "out.0.weight", "label_emb.weight")
    record("unet_half_width", network, forward, inputs, parameters, packages=PACKAGES[:2])


def write_text() -> None:
    from ldm.modules.x_transformer import Encoder, TransformerWrapper

    # BERTEmbedder is this wrapper behind a tokenizer.
    network = TransformerWrapper(
        num_tokens=50, max_seq_len=10, attn_layers=Encoder(dim=32, depth=2), emb_dropout=0.0
    )
    del network.to_logits

    def forward(tokens):
        return {"y": network(tokens, return_embeddings=True)}

    tokens = np.array([[1, 7, 49, 0, 0, 0, 0, 0], [3, 3, 9, 12, 40, 21, 2, 5]])
    parameters = (
        "token_emb.weight",
        "pos_emb.emb.weight",
        "attn_layers.layers.2.0.weight",
        "attn_layers.layers.3.1.net.0.0.bias",
    )
    record("text", network, forward, {"tokens": tokens}, parameters)


def write_losses() -> None:
    import lpips
    from taming.modules.discriminator.model import NLayerDiscriminator

    for n_layers in (2, 3, 4):
        # In training mode, as always when a discriminator is used.
        network = NLayerDiscriminator(ndf=8, n_layers=n_layers).train()

        def forward(x, network=network):
            return {"y": network(x)}

        x = uniform("x", (2, 2 ** (n_layers + 2), 3 * 2**n_layers, 3))
        parameters = ("main.0.weight", "main.3.weight", "main.5.weight")
        record(f"discriminator_{n_layers}", network, forward, {"x": x}, parameters)

    network = lpips.LPIPS(pretrained=False, net="vgg", pnet_rand=True, verbose=False).eval()

    def forward(x, y):
        return {"distance": network(x, y).flatten()}

    x, y = uniform("x", (2, 32, 16, 3)), uniform("y", (2, 32, 16, 3))
    record("lpips", network, forward, {"x": x, "y": y}, weights=lpips_weights)


def write_timestep_embedding() -> None:
    import torch
    from ldm.modules.diffusionmodules.util import timestep_embedding

    t = np.array([0.0, 1.0, 10.5, 500.0, 999.0], np.float32)
    both = {f"dim_{dim}": timestep_embedding(torch.from_numpy(t), dim).numpy() for dim in (32, 33)}
    np.savez_compressed(GOLDEN / "timestep_embedding.npz", t=t, **both)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    import torch

    # Beside a CPU build of torch, torchvision (imported by lpips) misses its compiled operators.
    library = torch.library.Library("torchvision", "DEF")
    with contextlib.suppress(RuntimeError):
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.manual_seed(0)
    GOLDEN.mkdir(parents=True, exist_ok=True)
    write = (
        write_blocks,
        write_autoencoders,
        write_unets,
        write_unet_of_half_width,
        write_text,
        write_losses,
        write_timestep_embedding,
    )
    for step in write:
        with contextlib.redirect_stdout(io.StringIO()) as chatter:  # the originals print a lot
            step()
        print("\n".join(line for line in chatter.getvalue().splitlines() if "parameters {" in line))


if __name__ == "__main__":
    main()
