"""Semantic synthesis: a picture from the class of each of its pixels.

    python train.py --config=configs/semantic.py --workdir=runs/semantic
    python evaluate.py --model=runs/semantic

Variants, as in --config=configs/semantic.py:smoke

    scenes  scenes of 120 kinds of object (default)
    folder  on your own pictures, from nothing
    smoke   a few steps of a tiny network, for tests

On your own pictures, each with a label picture of its size beside it (`picture.segmentation.png`,
whose values are classes), and with an autoencoder that was trained on them:

    --config=configs/semantic.py:folder --config.data.path=DIR --config.first_stage=runs/autoencoder

and with another number of classes than COCO-Stuff's 182, such as ten,

    --config.data.conditions.segmentation.classes=10
    --config.conditioning.segmentation.shape='(None, None, 10)'

The classes, one-hot, are shrunk to the size of the latents, mixed, and concatenated to them
(Rombach et al. 2022, §4.3.2).
"""

import ml_collections

from configs import common

COCO_STUFF = 182  # classes


def base(classes: int = 1 + common.SCENE_KINDS) -> ml_collections.ConfigDict:
    segmentation = dict(
        kind="array",
        output="concat",
        shape=(None, None, classes),
        network=dict(kind="rescaler", n_stages=3, out_channels=64),
        dropout=0.0,
    )
    config = common.scenes_diffusion({"segmentation": segmentation}, {}, concat=64)
    config.data.conditions = {"segmentation": dict(classes=classes)}
    return config


def scenes() -> ml_collections.ConfigDict:
    return common.from_bundled(base(), steps=3000)


def folder() -> ml_collections.ConfigDict:
    return common.on_folder(base(COCO_STUFF))


def smoke() -> ml_collections.ConfigDict:
    return common.smoke(base())


VARIANTS = {"scenes": scenes, "folder": folder, "smoke": smoke}
get_config = common.chooser("semantic", VARIANTS)
