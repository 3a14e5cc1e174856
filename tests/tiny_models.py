"""Small models of every kind, in the configs' own form: their sections, and random parameters."""

from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from ldm_jax.interop import layout
from ldm_jax.interop.networks import networks

SD_BETAS = (0.00085, 0.012)
LEADING = dict(spacing="leading", offset=1, end="first")


def kl(scale: float, z: int = 4, channels: int = 3, **fields) -> dict[str, Any]:
    size = dict(ch=32, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[])
    latents = dict(in_channels=channels, out_ch=channels, z_channels=z, embed_dim=z)
    return dict(kind="kl") | size | latents | fields | dict(scale_factor=scale)


def vq(z: int = 3, **fields) -> dict[str, Any]:
    return kl(1.0, z, **fields) | dict(kind="vq", n_embed=16)


def unet(latents: int = 4, beside: int = 0, **fields) -> dict[str, Any]:
    size = dict(model_channels=64, channel_mult=[1, 2], num_res_blocks=1)
    ends = dict(in_channels=latents + beside, out_channels=latents)
    return ends | size | dict(attention_resolutions=[1]) | fields


def clip(width: int = 64, padding: str = "end", **fields) -> dict[str, Any]:
    kind = "quick_gelu" if padding == "end" else "gelu"
    network = dict(vocab_size=49408, width=width, depth=2, heads=width // 64, max_length=77)
    network |= dict(activation=kind, projection=None, layer="last", final_norm=True, eos=None)
    sizes = {key: fields.pop(key) for key in network.keys() & fields.keys()}
    common = dict(kind="clip", vocabulary="clip", padding=padding, dropout=0.1)
    return common | fields | dict(network=network | sizes)


def masked(channels: int, mask_first: bool = True, hole: float = 0.0, low: int = 0) -> dict:
    section = dict(kind="masked_image", channels=channels, mask_first=mask_first, hole=hole)
    return section | dict(mask_range=[low, 1], dropout=0.0)


def array(output: str, *shape: int | None, **section) -> dict[str, Any]:
    return dict(kind="array", output=output, shape=list(shape), dropout=0.0) | section


def model(unet, autoencoder, conditioning, betas=SD_BETAS, **more) -> dict[str, Any]:
    """A complete config. `more`: size, guidance, parameterization, grid, sampler, steps."""
    table = dict(name="linear", timesteps=1000, start=betas[0], end=betas[1])
    schedule = table | dict(zero_terminal_snr=False)
    meaning = dict(parameterization=more.get("parameterization", "eps"))
    sampling = dict(sampler=more.get("sampler", "ddim"), steps=more.get("steps", 50))
    return dict(
        task="diffusion",
        image_size=more.get("size", 512),
        unet=unet,
        autoencoder=autoencoder,
        conditioning=conditioning,
        diffusion=dict(schedule=schedule, sigma_data=0.5) | meaning | more.get("grid", LEADING),
        sampling=sampling | dict(guidance=more.get("guidance", 1.0), eta=0.0),
    )


def sizes(*fields: str) -> dict[str, Any]:
    return dict(kind="sizes", fields=list(fields), dropout=0.0)


def random_params(config: dict[str, Any], seed: int = 0, scale: float = 0.1) -> dict[str, Any]:
    """Parameters of every network, normal, scales around 1; nothing is compiled."""
    rng = np.random.default_rng(seed)
    params = {}
    for name, (kind, fields) in networks(config).items():
        flat = {
            path: np.float32(scale * rng.standard_normal(shape, np.float32))
            + path.endswith("/scale")
            for path, shape in layout.shapes(kind, fields).items()
        }
        params[name] = unflatten_dict(flat, sep="/")
    return params


# The smallest: 16 pixels and 16 channels.
KL, VQ = kl(1.0, ch=8, groups=4), vq(4, ch=8, groups=4)


def config(conditioning: dict[str, Any], autoencoder=KL, parameterization="eps", **fields):
    """A complete config; `fields` are the UNet's."""
    small = dict(model_channels=16, attention_resolutions=[1, 2], num_heads=2, groups=4)
    more = dict(size=16, steps=4, guidance=2.0 if conditioning else 1.0)
    network = unet(**small | fields)
    return model(network, autoencoder, conditioning, parameterization=parameterization, **more)


def _text(**fields) -> dict[str, Any]:
    return clip(16, heads=2, activation="gelu", **fields)


LABELS = config(
    {"class": dict(kind="class", network=dict(n_classes=11, embed_dim=16), null=10, dropout=0.1)},
    autoencoder=VQ,
    context_dim=16,
)
UNCONDITIONAL = config({}, autoencoder=VQ)
STABLE = config({"text": _text()}, context_dim=16)
INPAINTING = config(
    STABLE["conditioning"] | {"inpainting": masked(4)}, in_channels=9, context_dim=16
)
HIDDEN = dict(layer="penultimate", final_norm=False)
XL = config(
    {
        "text": _text(zero_null=True, **HIDDEN),
        "text_2": _text(padding="zero", projection=16, pooled=True, zero_null=True, **HIDDEN),
        "sizes": sizes("original_size", "crop", "target_size"),
    },
    context_dim=32,
    num_classes="sequential",
    adm_in_channels=16 + 6 * 256,
    transformer_depth=[1, 2],
)
