"""Unconditional pictures: a latent diffusion model without a condition.

    python train.py --config=configs/unconditional.py --workdir=runs/unconditional
    python sample.py --model=runs/unconditional --n=8

Variants, as in --config=configs/unconditional.py:smoke

    scenes  scenes of 120 kinds of object (default)
    emoji   all 1,697 training emoji
    smoke   a few steps of a tiny network, for tests

On your own pictures:

    --config.data.source=folder --config.data.path=DIR

and, unless they look like emoji, an autoencoder trained on them (configs/autoencoder.py) as
--config.first_stage=runs/autoencoder.
"""

import ml_collections

from configs import common


def emoji() -> ml_collections.ConfigDict:
    return common.small_diffusion({}, {})


def scenes() -> ml_collections.ConfigDict:
    return common.scenes_diffusion({}, {})


def smoke() -> ml_collections.ConfigDict:
    return common.smoke(emoji())


VARIANTS = {"scenes": scenes, "emoji": emoji, "smoke": smoke}
get_config = common.chooser("unconditional", VARIANTS)
