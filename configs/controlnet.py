"""ControlNet or T2I-Adapter: a trained model learns to follow a hint, such as edges, and itself
stays as it is.

    python train.py --config=configs/controlnet.py --workdir=runs/edges
    python sample.py --model=runs/edges --hint=edges.png --prompt="a cat left of a star"
    python sample.py --control=runs/edges:edges.png:0.8 --prompt="a cat left of a star"

Variants, as in --config=configs/controlnet.py:sd15

    scenes  the bundled model learns to follow edges: minutes on two CPU cores (default)
    sd15    Stable Diffusion 1 (or 2), on your pictures with captions and hints
    sdxl    SDXL, the same
    smoke   a few steps, for tests

Your hints lie beside the pictures, `one.control.png` beside `one.jpg`; or they are edges, which are
computed, with --config.data.conditions.control.kind=edges:

    --config=configs/controlnet.py:sd15 --config.init_from=stable-diffusion-v1-5/ \\
        --config.data.path=DIR

With --config.control.kind=t2i the network is a T2I-Adapter, which is smaller and does not see the
time.

`init_from` is any path that `ldm_jax.load` opens. The workdir gets `controlnet.safetensors` or
`t2i_adapter.safetensors`, the network alone, and a `model.safetensors` that names the model and
holds the same.
docs/adapt.md has the rest.
"""

import ml_collections

from configs import common
from ldm_jax.interop.native import BUNDLED
from ldm_jax.training.control import Options


def base() -> ml_collections.ConfigDict:
    config = common.from_model(held_out=0.01)
    config.control = vars(Options()).copy()
    config.data.conditions = dict(control=dict(kind="hint"))
    config.optimizer = common.optimizer(lr=1e-5, warmup=500)
    config.train = common.train(steps=20_000, batch_size=4, log_every=20)
    config.train.update(ema_decay=0.999, checkpoint_every=1000, preview_every=1000)
    return config


def scenes() -> ml_collections.ConfigDict:
    config = base()
    config.init_from = str(BUNDLED)
    config.latents = "memory"
    config.data.conditions = dict(control=dict(kind="edges"))
    fields = dict(train_scenes=8000, held_out_scenes=512)
    config.data.update(source="scenes", scenes=common.scenes(**common.COMPOSED | fields))
    config.optimizer.update(lr=1e-3, schedule="cosine", warmup=50, clip=1.0)
    config.train.update(steps=600, batch_size=32, log_every=20, preview_every=200)
    config.train.update(ema_decay=0.99, checkpoint_every=200)
    return config


def sd15() -> ml_collections.ConfigDict:
    return base()


def sdxl() -> ml_collections.ConfigDict:
    config = base()
    config.data.conditions.sizes = {}  # original and target size, and crop
    config.train.batch_size = 1
    return config


def smoke() -> ml_collections.ConfigDict:
    config = scenes()
    config.train.update(steps=4, batch_size=8, log_every=2, checkpoint_every=2, preview_every=4)
    config.data.scenes.update(train_scenes=16, held_out_scenes=8)
    config.sampling.steps = 2
    return config


VARIANTS = {"scenes": scenes, "sd15": sd15, "sdxl": sdxl, "smoke": smoke}
get_config = common.chooser("controlnet", VARIANTS)
