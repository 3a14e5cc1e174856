"""Stage 2: text to image with a UNet and a text transformer.

    python train.py --config=configs/txt2img.py --workdir=runs/txt2img
    python sample.py --model=runs/txt2img --prompt="a red apple left of a cat" --n=8
    python evaluate.py --model=runs/txt2img

Variants, as in --config=configs/txt2img.py:demo

    scenes  one to four objects of 120 kinds on white, 64 px (default; 75 minutes on two CPU cores)
    demo    one or two objects of 12 kinds, minutes on two CPU cores
    emoji   1,697 single emoji, which the model memorises (an hour and a half)
    meanflow  scenes as a MeanFlow, which draws in one step, with guidance built in
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


def text(vocabulary: str, max_length: int) -> dict:
    """The text transformer, with `vocabulary`: scenes, emoji, bert (any English) or a vocab.txt."""
    network = dict(width=128, depth=2, heads=4, head_dim=32, max_length=max_length)
    return {"text": dict(kind="text", vocabulary=vocabulary, dropout=0.1, network=network)}


def scenes() -> ml_collections.ConfigDict:
    sampling = dict(prompts=SCENES, guidance=4.0)
    return common.scenes_diffusion(text("scenes", 24), sampling, context_dim=128)


def emoji() -> ml_collections.ConfigDict:
    sampling = dict(prompts=PROMPTS, guidance=2.0)
    config = common.small_diffusion(text("emoji", 24), sampling, context_dim=128)
    config.data.augment = ()  # ("tags",): half the time, words such as "fruit", not the caption
    return config


def demo() -> ml_collections.ConfigDict:
    config = scenes()
    config.data.scenes.update(kinds=12, objects=(1, 2), train_scenes=20_000, held_out_scenes=256)
    config.optimizer.warmup = 100
    config.train.update(steps=800, ema_decay=0.99, log_every=50)
    config.train.update(checkpoint_every=200, preview_every=200)
    return config


def meanflow() -> ml_collections.ConfigDict:
    config = common.mean_flow(scenes(), omega=2.0, kappa=0.5)  # together a scale of 4
    config.objective.update(draw="logit_normal", draw_mean=-0.4, draw_std=1.0)
    return config


def smoke() -> ml_collections.ConfigDict:
    config = common.smoke(emoji())
    config.conditioning.text.network.update(width=64, depth=1, heads=2)
    config.unet.context_dim = 64
    config.sampling.prompts = ("red apple",)
    return config


VARIANTS = {"scenes": scenes, "demo": demo, "emoji": emoji, "meanflow": meanflow, "smoke": smoke}
get_config = common.chooser("txt2img", VARIANTS)


def sweep() -> list[dict]:
    """The settings of `python -m ldm_jax.sweep`."""
    return [{"optimizer.lr": lr} for lr in (1e-3, 3e-3, 1e-2)]
