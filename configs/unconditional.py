"""Unconditional pictures: a latent diffusion model without a condition.

    python train.py --config=configs/unconditional.py --workdir=runs/unconditional
    python sample.py --model=runs/unconditional --n=8

Variants, as in --config=configs/unconditional.py:smoke

    scenes  scenes of 120 kinds of object (default)
    folder  on your own pictures, from nothing
    emoji   all 1,697 training emoji
    smoke   a few steps of a tiny network, for tests

On your own pictures:

    --config=configs/unconditional.py:folder --config.data.path=DIR

and, unless they look like emoji, an autoencoder trained on them (configs/autoencoder.py) as
--config.first_stage=runs/autoencoder.
"""

import ml_collections

from configs import common


def emoji() -> ml_collections.ConfigDict:
    return common.small_diffusion({}, {})


def scenes() -> ml_collections.ConfigDict:
    return common.from_bundled(common.scenes_diffusion({}, {}), steps=4000)


def folder() -> ml_collections.ConfigDict:
    return common.on_folder(common.scenes_diffusion({}, {}))


def smoke() -> ml_collections.ConfigDict:
    return common.smoke(emoji())


VARIANTS = {"scenes": scenes, "folder": folder, "emoji": emoji, "smoke": smoke}
get_config = common.chooser("unconditional", VARIANTS)
