"""Layout to image: a picture from boxes and what is in them.

    python train.py --config=configs/layout.py --workdir=runs/layout
    python evaluate.py --model=runs/layout

Variants, as in --config=configs/layout.py:smoke

    scenes  scenes of 120 kinds of object (default)
    folder  on your own pictures, from nothing
    smoke   a few steps of a tiny network, for tests

On your own pictures, each with `picture.boxes.json` beside it ([{"category_id": 0, "bbox": [left,
top, width, height]}, …], in pixels, as in COCO), and with an autoencoder that was trained on them:

    --config=configs/layout.py:folder --config.data.path=DIR --config.first_stage=runs/autoencoder

Each object is three tokens, its class and two corners; two more tell the crop. A transformer makes
them the context of the UNet's cross-attention (Rombach et al. 2022, §4.3.1).
"""

import ml_collections

from configs import common

OBJECTS, TOKENS = 4, 1_090  # 33 × 33 places for a corner, and one token for no object


def base() -> ml_collections.ConfigDict:
    length = 3 * OBJECTS + 2
    boxes = dict(
        kind="array",
        output="context",
        shape=(length,),
        network=dict(
            kind="transformer",
            vocab_size=TOKENS,
            width=128,
            depth=2,
            heads=4,
            head_dim=32,
            max_length=length,
        ),
        dropout=0.0,
    )
    config = common.scenes_diffusion({"boxes": boxes}, {}, context_dim=128)
    config.data.conditions = {"boxes": dict(objects=OBJECTS, tokens=TOKENS)}
    return config


def scenes() -> ml_collections.ConfigDict:
    return common.from_bundled(base(), steps=1200)


def folder() -> ml_collections.ConfigDict:
    return common.on_folder(base())


def smoke() -> ml_collections.ConfigDict:
    return common.smoke(base())


VARIANTS = {"scenes": scenes, "folder": folder, "smoke": smoke}
get_config = common.chooser("layout", VARIANTS)
