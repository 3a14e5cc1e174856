"""Class to image: a latent diffusion model of a class, on the bundled autoencoder.

    python train.py --config=configs/class2img.py --workdir=runs/class2img
    python sample.py --model=runs/class2img --label=panda --n=8

Variants, as in --config=configs/class2img.py:smoke

    scenes  one object of 120 kinds, anywhere (default)
    folder  on your own pictures, from nothing
    emoji   all 1,697 training emoji in their nine groups
    smoke   a few steps of a tiny network, for tests

On your own pictures, in a folder for each class:

    --config=configs/class2img.py:folder --config.data.path=DIR

and, unless they look like emoji, an autoencoder trained on them (configs/autoencoder.py) as
--config.first_stage=runs/autoencoder. The classes are those of the data; the model knows their
names.
"""

import ml_collections

from configs import common


def label() -> dict:
    section = dict(
        kind="class",
        dropout=0.1,
        null=None,  # the label for no class; with n_classes of 0 the one after the last
        network=dict(n_classes=0, embed_dim=128),  # 0: the number of classes of the data
    )
    return {"label": section}


# Without labels, previews use the classes of held-out pictures.
SAMPLING = dict(labels=(), guidance=2.0)


def emoji() -> ml_collections.ConfigDict:
    return common.small_diffusion(label(), SAMPLING, context_dim=128)


def scenes() -> ml_collections.ConfigDict:
    config = common.from_bundled(folder(), steps=2400)
    config.data.source = "scenes"
    # Held out is an object on a ground: on one ground alone, whole classes would be.
    config.data.scenes.update(objects=(1, 1), grounds=("white", "beige", "light blue"))
    config.sampling.guidance = 6.0  # of 2, 4 and 6 the best: docs/tasks.md
    return config


def folder() -> ml_collections.ConfigDict:
    return common.on_folder(common.scenes_diffusion(label(), SAMPLING, context_dim=128))


def smoke() -> ml_collections.ConfigDict:
    return common.smoke(emoji())


VARIANTS = {"scenes": scenes, "folder": folder, "emoji": emoji, "smoke": smoke}
get_config = common.chooser("class2img", VARIANTS)
