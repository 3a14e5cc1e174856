"""Sections that configs share, with the default of each option.

If a section has a dataclass, the defaults are those of the dataclass.
"""

import copy
import dataclasses
from collections.abc import Callable

import ml_collections

from ldm_jax.data.scene_options import SceneOptions
from ldm_jax.diffusion.mean_flow import MeanFlow
from ldm_jax.diffusion.objective import Objective
from ldm_jax.diffusion.process import Diffusion
from ldm_jax.interop.native import BUNDLED
from ldm_jax.training.evaluators import OPTIONS

SCENE_KINDS = 120  # of object, in the configs that train on scenes
# Objects of one size on white, at multiples of half of a latent's pixels: a small network learns
# how they are put together, and not how each looks at every pixel and on every ground, on which
# the bundled autoencoder's latents depend.
COMPOSED = dict(
    kinds=SCENE_KINDS,
    size=(0.4375, 0.4375),
    grid=4,
    grounds=("white",),
    textures=False,
    train_scenes=50_000,  # encoded once: a third of the time of a step
    held_out_scenes=512,
)
ALL = (".*",)  # of `trainable`: every parameter


def chooser(file: str, variants: dict[str, Callable], default: str = "scenes") -> Callable:
    """`get_config` of a config file, from functions that make its variants."""

    def get_config(variant: str = default) -> ml_collections.ConfigDict:
        """The config of a variant; raises ValueError with the list of variants."""
        if variant not in variants:
            raise ValueError(f"no variant {variant!r} of {file}: choose {', '.join(variants)}")
        return ml_collections.ConfigDict(variants[variant]())

    return get_config


def start() -> dict:
    """The initial parameters and the trainable ones, devices and precision, in every config."""
    return dict(
        seed=0,
        init_from="",  # a model to start from: anything that ldm_jax.load opens
        init_networks=(),  # load only these networks ("text", "unet"); empty: all
        trainable=ALL,  # regular expressions; parameters whose path matches none do not train
        mesh=dict(data=-1, fsdp=1, tensor=1),  # sizes; -1: the rest of the devices
        sharding=(),  # pairs (regex, axis of each dimension) ahead of the rules in runtime/mesh.py
        # Of the networks' arithmetic; parameters are float32. bfloat16 for TPUs and newer GPUs.
        precision="float32",
        evaluators=evaluators(),
    )


def evaluators() -> dict:
    """What is measured during training, each `every` so many steps, or −1 with the previews, or 0
    never; and at the end. On held-out data: validation_loss (of diffusion) and reconstruction (of
    autoencoders). Of `count` drawn pictures: task (of scenes), distance and novelty."""
    return copy.deepcopy(OPTIONS)


def data(**fields) -> dict:
    """The source of the pictures, and their augmentation."""
    return (
        dict(
            source="emoji",  # emoji, scenes, folder, shards, tfds; "scenes+emoji": in turn
            path="",
            annotations=(),  # of a folder: captions and boxes in files of COCO's format
            classes=(),  # only these classes; empty: all
            image_size=64,
            background=(255, 255, 255),  # under transparent pixels
            held_out=0.1,
            min_size=0,
            on_error="skip",  # or raise
            augment=(),
            buckets=False,  # pictures of a folder keep their aspect ratio, nearly
            scenes=scenes(),
            conditions={},  # made of a picture or of files beside it: data/condition_kinds.py
            workers=0,  # processes that read; 0: threads of this one
        )
        | fields
    )


def scenes(**fields) -> dict:
    """The options of `data.source="scenes"`."""
    return dataclasses.asdict(SceneOptions(**fields))


def folder(image_size: int, **fields) -> dict:
    """Pictures in a folder of the user."""
    return data(source="folder", image_size=image_size, held_out=0.01, **fields)


def objective(**fields) -> dict:
    return dataclasses.asdict(Objective(**fields))


def optimizer(**fields) -> dict:
    """See ldm_jax/training/optimizer.py."""
    return (
        dict(
            name="adamw",  # adamw, or muon for kernels and Adam for the rest
            lr=1e-4,
            schedule="constant",  # or cosine
            lr_end=0.01,
            warmup=0,
            b1=0.9,
            b2=0.999,
            weight_decay=0.01,
            clip=0.0,
            multipliers=(),
            moments="float32",  # or bfloat16: first moments take half the memory
        )
        | fields
    )


def train(**fields) -> dict:
    """The length and the intervals of a run, in steps; an interval of 0: at the end alone."""
    return (
        dict(
            steps=12000,
            batch_size=64,
            steps_per_call=1,  # more on accelerators, where a step is shorter than its dispatch
            accumulate=1,  # parts of a batch, one after the other, where it does not fit in memory
            remat="",  # recompute in place of keeping: blocks, dots, products (models/remat.py)
            ema_decay=0.999,
            # Further averages, each of them another copy of the parameters.
            ema_decays=(),  # model_decay_D.safetensors
            ema_sigma_rel=(),  # (0.05, 0.1) for python -m ldm_jax.average
            log_every=100,
            checkpoint_every=1000,
            preview_every=3000,
            keep=2,
            mllog=False,  # also write mlperf.log, MLPerf's lines of events
        )
        | fields
    )


def small_diffusion(conditioning: dict, sampling: dict, **unet) -> ml_collections.ConfigDict:
    """A diffusion model of the embedded emoji that trains on two CPU cores.

    Its UNet is for the latents of the bundled autoencoder, 8×8×16 of 64 pixels: 3.9 M parameters.
    """
    config = ml_collections.ConfigDict(dict(task="diffusion") | start())
    # A workdir or a file with a trained autoencoder; empty: the bundled one.
    config.first_stage = ""
    # Encoded once, "memory"; in every step, with augmented pictures, "step"; or read from `cache`,
    # "shards". The states of frozen text encoders likewise.
    config.latents = "memory"
    config.text_states = "step"
    config.cache = ""  # a folder of python -m ldm_jax.cache, or of tars with moments
    config.data = data()
    config.unet = dict(
        in_channels=16,
        out_channels=16,
        model_channels=64,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(2,),
        num_head_channels=32,
        groups=16,
        **unet,
    )
    config.conditioning = conditioning
    config.diffusion = dict(
        schedule=dict(
            name="linear",  # linear, sqrt_linear, sqrt, cosine, squaredcos_cap_v2, flow or edm
            timesteps=1000,
            start=0.0015,
            end=0.0195,
            zero_terminal_snr=False,
        ),
        parameterization="v",  # eps, x0, v, flow, edm or meanflow
        spacing="trailing",  # of a sampler's steps: see ldm_jax/diffusion/grids.py
        sigma_data=Diffusion.sigma_data,  # of "edm"
    )
    config.objective = objective()
    config.optimizer = optimizer(
        name="muon", lr=3e-3, schedule="cosine", warmup=200, b2=0.99, clip=1.0
    )
    config.train = train()
    config.sampling = dict(sampler="ddim", steps=50, guidance=1.0, eta=0.0) | sampling
    return config


def scenes_diffusion(
    conditioning: dict, sampling: dict, concat: int = 0, **unet
) -> ml_collections.ConfigDict:
    """`small_diffusion`, of scenes; `concat` channels are concatenated to the latents."""
    config = small_diffusion(conditioning, sampling, **unet)
    config.unet.in_channels += concat
    config.data.update(source="scenes", scenes=scenes(**COMPOSED))
    config.train.steps = 9000
    return config


def mean_flow(config: ml_collections.ConfigDict, **fields) -> ml_collections.ConfigDict:
    """`config`, as a MeanFlow; `fields` are of its section."""
    config.mean_flow = dataclasses.asdict(MeanFlow(**fields))
    # Times in 0 … 1, as the authors have them: the network's derivative in t stays small.
    config.diffusion.schedule = dict(name="flow", timesteps=1)
    config.diffusion.parameterization = "meanflow"
    config.unet.num_classes = "timestep"  # the input for t − r
    config.sampling.update(sampler="meanflow", steps=1, guidance=1.0)
    return config


def from_bundled(config: ml_collections.ConfigDict, steps: int) -> ml_collections.ConfigDict:
    """`config`, whose UNet starts from the bundled model's: it knows what scenes look like, and
    learns the condition."""
    config.init_from, config.init_networks = str(BUNDLED), ("unet",)
    config.data.scenes.train_scenes = 20_000
    config.optimizer.update(lr=1e-3, warmup=50)
    config.train.update(steps=steps, ema_decay=0.99, checkpoint_every=200, preview_every=400)
    return config


def from_model(held_out: float) -> ml_collections.ConfigDict:
    """A config for a trained model, `init_from`, whose networks, conditions, noise and size it
    leaves to the model, on a folder of the user; without `optimizer` and `train`."""
    config = ml_collections.ConfigDict(dict(task="diffusion") | start())
    config.first_stage = ""  # another autoencoder of the same latents
    config.latents = "step"
    config.text_states = "step"  # "memory" keeps them: 240 kB a caption for Stable Diffusion 1
    config.cache = ""  # of latents="shards", text_states="shards": see docs/data.md
    # image_size 0: the model's training size.
    config.data = data(source="folder", image_size=0, held_out=held_out)
    config.unet = {}  # empty sections are the model's own
    config.conditioning = None
    config.diffusion = {}
    config.objective = objective()
    # For the preview; without prompts, held-out captions. All other values are the model's own.
    config.sampling = dict(prompts=(), steps=20)
    return config


def on_folder(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """`config`, on a folder of the user."""
    config.data.source = "folder"
    return config


def smoke(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A few steps of a tiny network, for tests."""
    if config.data.source == "emoji":
        config.data.classes = ("food & drink",)
    config.data.scenes.held_out_scenes = 32
    config.unet.update(model_channels=32, channel_mult=(1,), attention_resolutions=(1,))
    config.train.update(steps=8, batch_size=8, log_every=2, checkpoint_every=4, preview_every=8)
    config.optimizer.update(name="adamw", lr=1e-3)  # Muon takes long to compile
    config.sampling.steps = 2
    return config
