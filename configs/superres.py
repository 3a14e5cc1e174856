"""Super-resolution: a picture of 64 pixels from one of 16.

    python train.py --config=configs/superres.py --workdir=runs/superres
    python evaluate.py --model=runs/superres

Variants, as in --config=configs/superres.py:smoke

    scenes  scenes of 120 kinds of object, shrunk four times, bicubic (default)
    bsrgan, bsrgan_light    the same with BSRGAN's blur, noise and compression
    folder  on your own pictures, from nothing
    smoke   a few steps of a tiny network, for tests

On your own pictures, with an autoencoder that was trained on them:

    --config=configs/superres.py:folder --config.data.path=DIR --config.first_stage=runs/autoencoder

The small picture is concatenated to the noisy latents (Rombach et al. 2022, §4.4): there it has
their size, here twice that, so each 2 × 2 of its pixels become the channels of one latent.
"""

from functools import partial

import ml_collections

from configs import common


def base(degradation: str = "pil_bicubic") -> ml_collections.ConfigDict:
    small = dict(
        kind="array",
        output="concat",
        shape=(None, None, 3),
        network=dict(kind="patches", size=2, out_channels=12),
        dropout=0.0,
    )
    config = common.scenes_diffusion({"low_resolution": small}, {}, concat=12)
    config.data.conditions = {"low_resolution": dict(factor=4, degradation=degradation)}
    return config


def scenes(degradation: str = "pil_bicubic") -> ml_collections.ConfigDict:
    return common.from_bundled(base(degradation), steps=2500)


def folder() -> ml_collections.ConfigDict:
    return common.on_folder(base())


def smoke() -> ml_collections.ConfigDict:
    return common.smoke(base())


VARIANTS = {"scenes": scenes, "folder": folder, "smoke": smoke}
VARIANTS |= {name: partial(scenes, name) for name in ("bsrgan", "bsrgan_light")}
get_config = common.chooser("superres", VARIANTS)
