"""LoRA: small factors that change a trained model, which itself stays as it is.

    python train.py --config=configs/lora.py --workdir=runs/lora
    python sample.py --lora=runs/lora:0.8 --prompt="a cat left of a star"

Variants, as in --config=configs/lora.py:sd15

    scenes  the bundled model learns another ground: minutes on two CPU cores (default)
    sd15    Stable Diffusion 1, on your pictures with captions: attention of the UNet
    sdxl    SDXL, the same, with the attention of both text encoders
    smoke   a few steps, for tests

    --config=configs/lora.py:sd15 --config.init_from=stable-diffusion-v1-5/ --config.data.path=DIR

`init_from` is any path that `ldm_jax.load` opens. The workdir gets `lora.safetensors`, in kohya's
format, or in that of peft and diffusers with --config.adapters.layout=peft; and a
`model.safetensors` that names the model and holds the factors alone. docs/adapt.md has the rest.
"""

import ml_collections

from configs import common
from ldm_jax.interop.native import BUNDLED
from ldm_jax.training.adapters import Options

TEXT = r"^text(_2)?/.*self_attn/"


def adapters(**fields) -> dict:
    return vars(Options(**fields)).copy()


def base() -> ml_collections.ConfigDict:
    config = common.from_model(held_out=0.05)
    config.adapters = adapters()
    # Pictures that the model draws of this prompt before it trains, half of what it trains on
    # (DreamBooth): of "a dog" for pictures of one dog, "a photo of sks dog". Empty: none.
    config.prior = dict(prompt="", count=100)
    config.optimizer = common.optimizer(lr=1e-4, warmup=50, clip=1.0)
    config.train = common.train(steps=1000, batch_size=4, log_every=20, checkpoint_every=250)
    config.train.update(ema_decay=0.99, preview_every=250)
    return config


def scenes() -> ml_collections.ConfigDict:
    config = base()
    config.init_from = str(BUNDLED)
    config.adapters = adapters(targets=("^unet/",))  # convolutions as well: the ground is theirs
    config.latents = "memory"
    fields = dict(grounds=("turquoise",), train_scenes=2000, held_out_scenes=128)
    config.data.update(source="scenes", scenes=common.scenes(**common.COMPOSED | fields))
    config.optimizer.update(lr=2e-3, schedule="cosine", warmup=20)
    config.train.update(steps=200, batch_size=32, log_every=20, preview_every=100)
    config.train.checkpoint_every = 100
    config.sampling.prompts = ("a cat left of a star", "three tulips", "a rocket above a house")
    return config


def sd15() -> ml_collections.ConfigDict:
    return base()


def sdxl() -> ml_collections.ConfigDict:
    config = base()
    config.adapters.targets = (*config.adapters.targets, TEXT)
    config.data.conditions = dict(sizes=dict())  # original and target size, and crop
    config.train.batch_size = 1
    return config


def smoke() -> ml_collections.ConfigDict:
    config = scenes()
    config.data.scenes.update(train_scenes=32, held_out_scenes=8)
    config.train.update(steps=4, batch_size=8, log_every=2, checkpoint_every=2, preview_every=4)
    config.sampling.steps = 2
    return config


VARIANTS = {"scenes": scenes, "sd15": sd15, "sdxl": sdxl, "smoke": smoke}
get_config = common.chooser("lora", VARIANTS)
