"""Stage 2: text to image with a UNet and a text transformer.

    python train.py --config=configs/txt2img.py --workdir=runs/txt2img
    python sample.py --model=runs/txt2img --prompt="red apple" --n=8

Variants, as in --config=configs/txt2img.py:demo

    emoji   all 1,697 training emoji, 64 px (default; an hour and a half on two CPU cores)
    scenes  one to four objects of 120 kinds, 64 px, never the same twice (hours on two CPU cores)
    demo    food, drink, animals and nature only: 262 pictures, minutes on two CPU cores
    smoke   a few steps of a tiny network, for tests

On your own pictures, with captions in .txt files beside them or in a metadata.jsonl:

    --config.data.source=folder --config.data.path=DIR --config.conditioning.text.vocabulary=bert

and, unless they look like emoji, an autoencoder trained on them (configs/autoencoder.py) as
--config.first_stage=runs/autoencoder.
"""

import ml_collections

from configs import common

PROMPTS = ("red apple", "cat face", "smiling face with sunglasses", "rocket", "rainbow")
SCENES = ("a cat left of a star", "three tulips", "a rocket above a house", "a panda")
# Objects of one size on plain grounds, at multiples of half of a latent's pixels: a network of this
# size learns how they are put together, and not how each looks at every pixel.
COMPOSED = dict(
    size=(0.4375, 0.4375), grid=4, textures=False, train_scenes=100_000, held_out_scenes=512
)


def text(vocabulary: str, max_length: int) -> dict:
    """The text transformer, with `vocabulary`: scenes, emoji, bert (any English) or a vocab.txt."""
    network = dict(width=128, depth=2, heads=4, head_dim=32, max_length=max_length)
    return {"text": dict(kind="text", vocabulary=vocabulary, dropout=0.1, network=network)}


def scenes() -> ml_collections.ConfigDict:
    sampling = dict(prompts=SCENES, guidance=2.0)
    config = common.small_diffusion(text("scenes", 24), sampling, context_dim=128)
    config.data.update(source="scenes", scenes=common.scenes(**COMPOSED, kinds=120))
    config.train.update(steps=7500)
    return config


def emoji() -> ml_collections.ConfigDict:
    sampling = dict(prompts=PROMPTS, guidance=2.0)
    config = common.small_diffusion(text("emoji", 24), sampling, context_dim=128)
    config.data.augment = ()  # ("tags",): half the time, words such as "fruit", not the caption
    return config


def demo() -> ml_collections.ConfigDict:
    config = emoji()
    config.data.classes = ("food & drink", "animals & nature")
    config.optimizer.warmup = 100
    config.train.update(steps=800, ema_decay=0.99, log_every=50)
    config.train.update(checkpoint_every=200, preview_every=200)
    config.sampling.prompts = ("red apple", "cat face", "hamburger", "tulip", "octopus")
    return config


def smoke() -> ml_collections.ConfigDict:
    config = common.smoke(emoji())
    config.conditioning.text.network.update(width=64, depth=1, heads=2)
    config.unet.context_dim = 64
    config.sampling.prompts = ("red apple",)
    return config


VARIANTS = {"emoji": emoji, "scenes": scenes, "demo": demo, "smoke": smoke}
get_config = common.chooser("txt2img", VARIANTS)
