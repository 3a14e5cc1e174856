"""Distillation: a student of a trained model that draws in a few steps, with guidance built in.

    python train.py --config=configs/distill.py --workdir=runs/fast
    python sample.py --model=runs/fast --steps=4 --prompt="a cat left of a star"

Variants, as in --config=configs/distill.py:sd15

    scenes    a latent consistency model (LCM) of the bundled model, on two CPU cores (default)
    lora      the same as a LoRA, for sample.py --lora=runs/fast --sampler=lcm --spacing=lcm
    guidance  the bundled model in one evaluation a step in place of two, for any sampler
    sd15      an LCM of Stable Diffusion 1 (or 2), on your pictures with captions
    sdxl      an LCM-LoRA of SDXL, the same
    smoke     a few steps, for tests

    --config=configs/distill.py:sd15 --config.init_from=stable-diffusion-v1-5/ \\
        --config.data.path=DIR

`init_from`, the teacher, is any path that `ldm_jax.load` opens, of a model with guidance. Of a
student, --guidance is an input, which compiles nothing and costs no second evaluation.
docs/adapt.md has the rest.
"""

import ml_collections

from configs import common
from ldm_jax.interop.native import BUNDLED
from ldm_jax.training.adapters import Options as Adapters
from ldm_jax.training.distillation import Options


def distill(**fields) -> dict:
    return vars(Options(**fields)).copy()


def base() -> ml_collections.ConfigDict:
    config = common.from_model(held_out=0.01)
    config.distill = distill()
    config.optimizer = common.optimizer(lr=8e-6, warmup=500, weight_decay=0.0, clip=1.0)
    config.train = common.train(steps=20_000, batch_size=8, log_every=20)
    config.train.update(ema_decay=0.95, checkpoint_every=1000, preview_every=1000)
    config.sampling.update(sampler="lcm", guidance=8.5)
    return drawn_in(config, 4)


def drawn_in(config: ml_collections.ConfigDict, steps: int) -> ml_collections.ConfigDict:
    """The config, whose previews and evaluators draw in so many steps."""
    config.sampling.steps = steps
    for section in config.evaluators.values():
        if "steps" in section:
            section.steps = steps
    return config


def with_factors(config: ml_collections.ConfigDict, **fields) -> ml_collections.ConfigDict:
    """The same as a LoRA."""
    config.adapters = vars(Adapters(**fields)).copy()
    config.distill.dim = 0
    config.sampling.guidance = 1.0
    return config


def scenes() -> ml_collections.ConfigDict:
    config = base()
    config.init_from = str(BUNDLED)
    # With a distance that is nearly linear, low noise is forgotten, and with it what all else
    # imitates; so is it with a larger step.
    config.distill = distill(guidance=(1.0, 6.0), delta=0.1)
    config.latents = "memory"
    fields = dict(train_scenes=20_000, held_out_scenes=512)
    config.data.update(source="scenes", scenes=common.scenes(**common.COMPOSED | fields))
    config.optimizer.update(lr=1e-4, schedule="cosine", warmup=50)
    config.train.update(steps=600, batch_size=64, preview_every=200, checkpoint_every=200)
    config.sampling.guidance = 4.0
    return config


def lora() -> ml_collections.ConfigDict:
    config = with_factors(scenes(), rank=16, alpha=16.0, targets=("^unet/",))
    config.distill.guidance = (4.0, 4.0)
    config.optimizer.lr = 1e-3
    return config


def guidance() -> ml_collections.ConfigDict:
    config = scenes()
    config.distill.kind = "guidance"
    config.sampling.sampler = "ddim"
    return drawn_in(config, 20)


def sd15() -> ml_collections.ConfigDict:
    return base()


def sdxl() -> ml_collections.ConfigDict:
    config = with_factors(base(), rank=64, alpha=64.0)
    config.data.conditions = dict(sizes=dict())  # original and target size, and crop
    config.optimizer.lr = 1e-4
    config.train.batch_size = 1
    return config


def smoke() -> ml_collections.ConfigDict:
    config = scenes()
    config.train.update(steps=4, batch_size=8, log_every=2, checkpoint_every=2, preview_every=4)
    config.data.scenes.update(train_scenes=16, held_out_scenes=8)
    return drawn_in(config, 2)


VARIANTS = {"scenes": scenes, "lora": lora, "guidance": guidance}
VARIANTS |= {"sd15": sd15, "sdxl": sdxl, "smoke": smoke}
get_config = common.chooser("distill", VARIANTS)
