"""Small models of every kind, in the configs' own form, with random parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.latent_diffusion import LatentDiffusion

KL = dict(ch=8, ch_mult=[1, 2], num_res_blocks=1, z_channels=4, embed_dim=4, groups=4)
VQ = dict(kind="vq", n_embed=16, **KL)
UNET = dict(
    in_channels=4,
    out_channels=4,
    model_channels=16,
    channel_mult=[1, 2],
    num_res_blocks=1,
    attention_resolutions=[1, 2],
    num_heads=2,
    groups=4,
)
CLIP = dict(width=16, depth=2, heads=2, max_length=77, vocab_size=49408, activation="gelu")
SAMPLING = dict(sampler="ddim", steps=4, guidance=2.0, eta=0.0)
LINEAR = dict(name="linear", timesteps=1000, start=0.00085, end=0.012, zero_terminal_snr=False)


def config(conditioning: dict[str, Any], autoencoder=KL, parameterization="eps", **unet):
    """A complete config, as a model file holds it."""
    diffusion = dict(schedule=LINEAR, parameterization=parameterization, spacing="leading")
    return dict(
        task="diffusion",
        image_size=16,
        unet=UNET | unet,
        autoencoder=autoencoder,
        conditioning=conditioning,
        diffusion=diffusion | dict(offset=1, end="first"),
        sampling=SAMPLING if conditioning else SAMPLING | dict(guidance=1.0),
    )


LABELS = config(
    {"class": dict(kind="class", network=dict(n_classes=11, embed_dim=16), null=10, dropout=0.1)},
    autoencoder=VQ,
    context_dim=16,
)
UNCONDITIONAL = config({}, autoencoder=VQ)
STABLE = config({"text": dict(kind="clip", vocabulary="clip", dropout=0.1, network=CLIP)})
STABLE["unet"] |= dict(context_dim=16)
INPAINTING = config(
    STABLE["conditioning"]
    | {
        "inpainting": dict(
            kind="masked_image", mask_first=True, hole=0.0, mask_range=[0, 1], dropout=0.0
        )
    },
    in_channels=9,
    context_dim=16,
)
_ENCODER = dict(kind="clip", vocabulary="clip", dropout=0.1, zero_null=True)
_PENULTIMATE = CLIP | dict(layer="penultimate", final_norm=False)
XL = config(
    {
        "text": _ENCODER | dict(network=_PENULTIMATE),
        "text_2": _ENCODER
        | dict(network=_PENULTIMATE | dict(projection=16), padding="zero", pooled=True),
        "sizes": dict(kind="sizes", fields=["original_size", "crop", "target_size"], dropout=0.0),
    },
    context_dim=32,
    num_classes="sequential",
    adm_in_channels=16 + 6 * 256,
    transformer_depth=[1, 2],
)


def random_params(config: dict[str, Any], seed: int = 0, scale: float = 0.1) -> dict[str, Any]:
    """Parameters of every network of `config`: normal, scales around 1. Nothing is compiled."""
    model = LatentDiffusion.from_config(config)
    side = config["image_size"]
    channels = config["autoencoder"].get("in_channels", 3)
    latents = (*[side // model.autoencoder.downsampling] * 2, model.latent_channels)

    def init():
        params = model.init(jax.random.key(0), latents)
        images = jnp.zeros((1, side, side, channels))
        return params | {"autoencoder": model.autoencoder.init(jax.random.key(0), images)["params"]}

    rng = np.random.default_rng(seed)

    def leaf(path, like):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return np.float32(centre + scale * rng.standard_normal(like.shape))

    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(init))
