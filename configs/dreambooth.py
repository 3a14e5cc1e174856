"""DreamBooth: a model learns what a few pictures show, and keeps what it could draw before.

    python train.py --config=configs/dreambooth.py --workdir=runs/elephant
    python sample.py --model=runs/elephant --prompt="an elephant left of a star"

Variants, as in --config=configs/dreambooth.py:sd15

    scenes  the bundled model learns an animal from eight pictures, on two CPU cores (default)
    lora    the same, as a LoRA
    sd15    Stable Diffusion 1 (or 2), the whole UNet, on a few of your pictures
    sdxl    SDXL, as a LoRA
    smoke   a few steps, for tests

    --config=configs/dreambooth.py:sd15 --config.init_from=stable-diffusion-v1-5/ \\
        --config.data.path=DIR --config.prior.prompt="a photo of a dog"

The captions of your pictures name what they show with a rare word and its class, "a photo of sks
dog": in DIR/NAME.txt, or as the name of a folder in DIR. `prior.prompt` names the class alone. The
model draws `prior.count` pictures of it once, into the workdir, and half of what it trains on are
these (Ruiz et al. 2023, arXiv 2208.12242, §3.3). docs/adapt.md has the rest.
"""

import ml_collections

from configs import common, lora
from ldm_jax.interop.native import BUNDLED


def base() -> ml_collections.ConfigDict:
    """The whole UNet."""
    config = lora.base()
    del config.adapters
    config.trainable = ("^unet/",)
    config.data.held_out = 0.0
    config.prior = dict(prompt="a photo of a dog", count=200)
    config.optimizer.update(lr=5e-6)
    config.train.update(steps=800, ema_decay=0.99, preview_every=200, checkpoint_every=200)
    return config


def on_scenes(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    config.init_from = str(BUNDLED)
    config.latents = "memory"
    fields = dict(names=("elephant",), objects=(1, 1), train_scenes=8, held_out_scenes=64)
    config.data.update(source="scenes", scenes=common.scenes(**common.COMPOSED | fields))
    config.prior = dict(prompt="a koala", count=64)
    config.optimizer.update(schedule="cosine", warmup=20)
    config.train.update(steps=300, batch_size=16, preview_every=100, checkpoint_every=100)
    config.sampling.prompts = ("an elephant", "an elephant left of a star", "a koala", "two cats")
    return config


def scenes() -> ml_collections.ConfigDict:
    config = on_scenes(base())
    config.trainable = ("^unet/", "^text/")  # the word is new to the text transformer as well
    config.optimizer.lr = 2e-4
    return config


def as_lora() -> ml_collections.ConfigDict:
    config = on_scenes(base())
    config.trainable = common.ALL
    config.adapters = lora.adapters(targets=("^unet/", "^text/"))
    config.optimizer.lr = 2e-3
    return config


def sdxl() -> ml_collections.ConfigDict:
    config = lora.sdxl()
    config.data.held_out = 0.0
    config.prior = base().prior
    config.train.update(steps=800, preview_every=200, checkpoint_every=200)
    return config


def smoke() -> ml_collections.ConfigDict:
    config = scenes()
    config.prior.count = 4
    config.train.update(steps=4, batch_size=8, log_every=2, checkpoint_every=2, preview_every=4)
    config.sampling.steps = 2
    return config


VARIANTS = {"scenes": scenes, "lora": as_lora, "sd15": base, "sdxl": sdxl, "smoke": smoke}
get_config = common.chooser("dreambooth", VARIANTS)
