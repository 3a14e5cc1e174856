"""Published systems, made small: the structure and the flags of each, few levels, narrow widths.

Shared by the tests of reading and writing; `SYSTEMS` maps a name to a config.
"""

import copy
import json
from pathlib import Path
from typing import Any

from tests import tiny_models
from tests.tiny_models import HIDDEN, array, clip, kl, masked, model, sizes, unet, vq

LDM_BETAS, TRAILING = (0.0015, 0.0195), dict(spacing="trailing")
CLIP_L, OPENCLIP_H = {"text": clip()}, {"text": clip(128, "zero", depth=3)}
EIGHT, OF_64, OF_32 = dict(num_heads=8), dict(num_head_channels=64), dict(num_head_channels=32)
STABLE_1 = dict(context_dim=64, **EIGHT)
STABLE_2 = dict(context_dim=128, use_linear_in_transformer=True, **OF_64)
BIGG = clip(128, "zero", projection=128, pooled=True, **HIDDEN)
XL = dict(
    channel_mult=[1, 2, 2],
    attention_resolutions=[4, 2],
    transformer_depth=[1, 1, 2],
    use_linear_in_transformer=True,
    use_spatial_transformer=True,
    num_classes="sequential",
    **OF_64,
)


BERT = dict(width=32, depth=2, heads=8, head_dim=64, max_length=77)
TEXT = {"text": dict(kind="text", vocabulary="bert", dropout=0.1, network=BERT)}
CLASSES = dict(n_classes=1001, embed_dim=32)
LABELS = {"label": dict(kind="class", null=1000, dropout=0.1, network=CLASSES)}
RESCALER = dict(kind="rescaler", n_stages=2, out_channels=3)
SEGMENTATION = {"segmentation": array("concat", None, None, 182, network=RESCALER)}
XL_GRID = dict(size=1024, guidance=5.0, grid=TRAILING, sampler="euler")

SYSTEMS = {
    "stable-diffusion-1": model(unet(**STABLE_1), kl(0.18215), CLIP_L, guidance=7.5),
    "stable-diffusion-1-inpainting": model(
        unet(beside=5, **STABLE_1),
        kl(0.18215),
        CLIP_L | {"masked_image": masked(4)},
        guidance=7.5,
    ),
    "stable-diffusion-2": model(unet(**STABLE_2), kl(0.18215), OPENCLIP_H, guidance=9.0),
    "stable-diffusion-2-v": model(
        unet(**STABLE_2),
        kl(0.18215),
        OPENCLIP_H,
        guidance=9.0,
        size=768,
        parameterization="v",
    ),
    "stable-diffusion-xl-base": model(
        unet(context_dim=192, adm_in_channels=128 + 6 * 256, **XL),
        kl(0.13025),
        {
            "text": clip(zero_null=True, **HIDDEN),
            "text_2": BIGG | dict(zero_null=True),
            "sizes": sizes("original_size", "crop", "target_size"),
        },
        **XL_GRID,
    ),
    "stable-diffusion-xl-refiner": model(
        unet(
            context_dim=128,
            adm_in_channels=128 + 5 * 256,
            **XL
            | dict(channel_mult=[1, 2, 2, 2], attention_resolutions=[4, 2], transformer_depth=2),
        ),
        kl(0.13025),
        {"text_2": BIGG, "sizes": sizes("original_size", "crop", "aesthetic_score")},
        **XL_GRID,
    ),
    "ldm-celebahq-256": model(
        unet(3, attention_resolutions=[2], **OF_32), vq(), {}, LDM_BETAS, size=256
    ),
    "ldm-text2im-large-256": model(
        unet(context_dim=32, **EIGHT), kl(0.18215), TEXT, size=256, guidance=5.0
    ),
    "ldm3d": model(unet(**STABLE_1), kl(0.18215, channels=6), CLIP_L, guidance=7.5),
    "cin256-v2": model(
        unet(3, attention_resolutions=[2, 1], context_dim=32, num_heads=1),
        vq(),
        LABELS,
        LDM_BETAS,
        size=256,
        guidance=3.0,
    ),
    "churches256": model(
        unet(use_scale_shift_norm=True, resblock_updown=True, **EIGHT),
        kl(0.25),
        {},
        (0.0015, 0.0155),
        size=256,
    ),
    "inpainting_big": model(
        unet(3, beside=4, attention_resolutions=[2], resblock_updown=True, **EIGHT),
        vq(mid_attn=False),
        {"masked_image": masked(3, False, -1.0, -1)},
        (0.0015, 0.0205),
        size=256,
    ),
    "semantic_synthesis256": model(
        unet(3, beside=3, attention_resolutions=[], **EIGHT),
        vq(attn_resolutions=[128]),
        SEGMENTATION,
        (0.0015, 0.0205),
        size=256,
    ),
    "upscaler": model(
        unet(
            beside=3,
            attention_resolutions=[2, 1],
            context_dim=128,
            num_classes=1000,
            disable_self_attentions=[True, False],
            use_linear_in_transformer=True,
            **EIGHT,
        ),
        kl(0.08333),
        OPENCLIP_H
        | {"low_resolution": array("concat", None, None, 3), "noise_level": array("vector")},
        (1e-4, 2e-2),
        guidance=9.0,
        parameterization="v",
    ),
    "sd-vae": dict(task="autoencoder", autoencoder=kl(0.18215, ch_mult=[1, 1, 2, 2])),
    "sdxl-vae": dict(task="autoencoder", autoencoder=kl(0.13025)),
    "vq-f4": dict(task="autoencoder", autoencoder=vq()),
}


def system(name: str) -> dict[str, Any]:
    """A copy of a config."""
    return copy.deepcopy(SYSTEMS[name])


def random_params(config: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Parameters of every network, small enough for pictures to be compared."""
    return tiny_models.random_params(config, seed, scale=0.05)


def edit(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; of value "absent" they go."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: v for key, v in content.items() if v != "absent"}))
