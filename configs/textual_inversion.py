"""Textual inversion: a new word for what your pictures show. Only its vectors train.

    python train.py --config=configs/textual_inversion.py --workdir=runs/word
    python sample.py --embedding=runs/word --prompt="a <mine> left of a star"

Variants, as in --config=configs/textual_inversion.py:sd15

    scenes  the bundled model learns a word for an animal that it was not trained on (default)
    sd15    Stable Diffusion 1 (or 2), on a few of your pictures
    sdxl    SDXL, the same, for both of its text encoders
    smoke   a few steps, for tests

    --config=configs/textual_inversion.py:sd15 --config.init_from=stable-diffusion-v1-5/ \\
        --config.data.path=DIR --config.inversion.token="<mine>" --config.inversion.start=toy

`init_from` is any path that `ldm_jax.load` opens. The workdir gets `learned_embeds.safetensors`, in
diffusers' format, `a1111/mine.safetensors`, in AUTOMATIC1111's, and a `model.safetensors` that
names the model and holds the vectors alone. docs/adapt.md has the rest.
"""

import ml_collections

from configs import common
from ldm_jax.interop.native import BUNDLED
from ldm_jax.training.inversion import Options

OBJECT = ("a picture of {}", "a photo of {}", "a good photo of {}", "a close-up photo of {}")


def inversion(**fields) -> dict:
    return vars(Options(**fields)).copy()


def base() -> ml_collections.ConfigDict:
    config = common.from_model(held_out=0.0)
    config.inversion = inversion(token="<mine>", start="object", captions=OBJECT)
    config.optimizer = common.optimizer(lr=5e-3, warmup=50, weight_decay=0.0)
    config.train = common.train(steps=2000, batch_size=4, log_every=20, checkpoint_every=500)
    config.train.update(ema_decay=0.99, preview_every=500)
    config.sampling.prompts = ("a photo of <mine>", "<mine> on a beach")
    return config


def scenes() -> ml_collections.ConfigDict:
    config = base()
    config.init_from = str(BUNDLED)
    config.inversion = inversion(token="<mine>", vectors=2, start="koala", captions=("a {}",))
    config.latents = "memory"
    fields = dict(names=("elephant",), objects=(1, 1), train_scenes=64, held_out_scenes=16)
    config.data.update(source="scenes", scenes=common.scenes(**common.COMPOSED | fields))
    config.optimizer.update(lr=2e-2, schedule="cosine", warmup=20)
    config.train.update(steps=300, batch_size=16, log_every=20, preview_every=100)
    config.train.checkpoint_every = 100
    config.sampling.prompts = ("a <mine>", "a <mine> left of a star", "two <mine>")
    return config


def sd15() -> ml_collections.ConfigDict:
    return base()


def sdxl() -> ml_collections.ConfigDict:
    config = base()
    config.data.conditions = dict(sizes=dict())  # original and target size, and crop
    config.train.batch_size = 1
    return config


def smoke() -> ml_collections.ConfigDict:
    config = scenes()
    config.train.update(steps=4, batch_size=8, log_every=2, checkpoint_every=2, preview_every=4)
    config.data.scenes.update(train_scenes=16, held_out_scenes=8)
    config.sampling.steps = 2
    return config


VARIANTS = {"scenes": scenes, "sd15": sd15, "sdxl": sdxl, "smoke": smoke}
get_config = common.chooser("textual_inversion", VARIANTS)
