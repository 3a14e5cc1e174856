"""Stage 2: a UNet and a text transformer that draw what a caption says.

    python train.py --config=configs/txt2img.py --workdir=runs/txt2img
    python sample.py --model=runs/txt2img --prompt="red apple" --n=8

Variants, as in --config=configs/txt2img.py:demo

    emoji   all 1,697 training emoji, 64 px (default; an hour and a half on two CPU cores)
    demo    food, drink, animals and nature only: 262 pictures, minutes on two CPU cores
    smoke   a few steps of a tiny network, for tests

On your own pictures, with captions in .txt files beside them or in a metadata.jsonl:

    --config.data.source=folder --config.data.path=DIR --config.conditioning.text.vocabulary=bert

and, unless they look like emoji, an autoencoder trained on them (configs/autoencoder.py) as
--config.first_stage=runs/autoencoder.
"""

import ml_collections


def emoji() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.task = "diffusion"
    config.seed = 0
    # A workdir or a file with a trained autoencoder; empty: the one that ships.
    config.first_stage = ""
    config.data = dict(
        source="emoji",  # emoji, folder or tfds
        path="",
        classes=(),  # only these classes; empty: all
        image_size=64,
        background=(255, 255, 255),
        held_out=0.1,
        min_size=0,
        on_error="skip",
        augment=(),  # ("tags",): half the time, words such as "fruit" instead of the caption
    )
    config.unet = dict(
        in_channels=16,
        out_channels=16,
        model_channels=64,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(2,),
        num_head_channels=32,
        context_dim=128,
        groups=16,
    )
    config.conditioning = dict(
        text=dict(
            kind="text",
            vocabulary="emoji",  # emoji, bert (any English) or a vocab.txt
            dropout=0.1,
            network=dict(width=128, depth=2, heads=4, head_dim=32, max_length=24),
        )
    )
    config.diffusion = dict(
        schedule=dict(
            name="linear",  # linear, sqrt_linear, sqrt, cosine, squaredcos_cap_v2, flow or edm
            timesteps=1000,
            start=0.0015,
            end=0.0195,
            zero_terminal_snr=False,
        ),
        parameterization="v",  # eps, x0, v, flow or edm
        spacing="trailing",  # of a sampler's steps: see ldm_jax/diffusion/grids.py
        sigma_data=0.5,  # of "edm"
    )
    config.objective = dict(  # see ldm_jax/diffusion/objective.py
        loss="l2",
        huber_delta=0.1,
        weighting="simple",
        weighting_parameter=5.0,
        draw="uniform",
        draw_mean=0.0,
        draw_std=1.0,
        offset_noise=0.0,
        input_perturbation=0.0,
        simple_weight=1.0,
        vlb_weight=0.0,
        learn_logvar=False,
        logvar_init=0.0,
    )
    config.optimizer = dict(
        name="muon",  # adamw, or muon for kernels and Adam for the rest
        lr=3e-3,
        schedule="cosine",
        lr_end=0.01,
        warmup=200,
        b1=0.9,
        b2=0.99,
        weight_decay=0.01,
        clip=1.0,
        multipliers=(),
    )
    config.train = dict(
        steps=12000,
        batch_size=64,
        ema_decay=0.999,
        log_every=100,
        checkpoint_every=1000,
        preview_every=3000,
        keep=2,
    )
    config.sampling = dict(
        prompts=("red apple", "cat face", "smiling face with sunglasses", "rocket", "rainbow"),
        sampler="ddim",
        steps=50,
        guidance=2.0,
        eta=0.0,
    )
    config.mesh = dict(data=-1, fsdp=1)
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
    config = emoji()
    config.data.classes = ("food & drink",)
    config.unet.update(model_channels=32, channel_mult=(1,), attention_resolutions=(1,))
    config.conditioning.text.network.update(width=64, depth=1, heads=2)
    config.unet.context_dim = 64
    config.train.update(steps=8, batch_size=8, log_every=2, checkpoint_every=4, preview_every=8)
    config.sampling.update(prompts=("red apple",), steps=2)
    return config


VARIANTS = {"emoji": emoji, "demo": demo, "smoke": smoke}


def get_config(variant: str = "emoji") -> ml_collections.ConfigDict:
    """The config of a variant; raises ValueError that lists them."""
    if variant not in VARIANTS:
        raise ValueError(f"no variant {variant!r} of txt2img: choose {', '.join(VARIANTS)}")
    return VARIANTS[variant]()
