"""Inpainting: draws the masked part of a picture, from its mask and the latents of the rest.

    python train.py --config=configs/inpaint.py --workdir=runs/inpaint
    python evaluate.py --model=runs/inpaint
    python sample.py --model=runs/inpaint --image=picture.png --mask=mask.png

Variants, as in --config=configs/inpaint.py:smoke

    scenes  scenes of 120 kinds of object, LaMa's masks (default)
    folder  on your own pictures, from nothing
    smoke   a few steps of a tiny network, for tests

On your own pictures, with an autoencoder that was trained on them:

    --config=configs/inpaint.py:folder --config.data.path=DIR --config.first_stage=runs/autoencoder

The condition is LDM's (Rombach et al. 2022, §4.5): the latents of the picture whose masked part is
black, and the mask, concatenated to the noisy latents.
"""

import ml_collections

from configs import common


def base() -> ml_collections.ConfigDict:
    masked = dict(
        kind="masked_image",
        channels=16,  # of the latents
        mask_first=False,
        hole=-1.0,
        mask_range=(-1.0, 1.0),
        dropout=0.0,
    )
    config = common.scenes_diffusion({"masked_image": masked}, {}, concat=17)
    config.data.conditions = {"mask": dict(recipe="lama")}
    return config


def scenes() -> ml_collections.ConfigDict:
    config = common.from_bundled(base(), steps=10_000)
    # Nearer to the hidden pixels than 50, and they look the same: docs/tasks.md.
    config.sampling.steps = 4
    return config


def folder() -> ml_collections.ConfigDict:
    return common.on_folder(base())


def smoke() -> ml_collections.ConfigDict:
    return common.smoke(base())


VARIANTS = {"scenes": scenes, "folder": folder, "smoke": smoke}
get_config = common.chooser("inpaint", VARIANTS)
