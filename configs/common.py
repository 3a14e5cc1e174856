"""Sections that configs share: what an option is by default stands here once."""

import ml_collections

ALL = (".*",)  # of `trainable`: every parameter


def start() -> dict:
    """Where training starts, and what trains; of every config."""
    return dict(
        seed=0,
        init_from="",  # a model to start from: anything that ldm_jax.load opens
        init_networks=(),  # take only these networks of it ("text", "unet"); empty: all
        trainable=ALL,  # regular expressions; parameters whose path matches none stay as they are
        mesh=dict(data=-1, fsdp=1),
    )


def data(**fields) -> dict:
    """Where pictures come from, and what is done to them."""
    return (
        dict(
            source="emoji",  # emoji, folder or tfds
            path="",
            classes=(),  # only these classes; empty: all
            image_size=64,
            background=(255, 255, 255),  # under transparent pixels
            held_out=0.1,
            min_size=0,
            on_error="skip",  # or raise
            augment=(),
            conditions={},  # what the model is told: see ldm_jax/data/conditions.py
            workers=0,  # processes that read; 0: threads of this one
        )
        | fields
    )


def objective(**fields) -> dict:
    """See ldm_jax/diffusion/objective.py."""
    return (
        dict(
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
        | fields
    )


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
        )
        | fields
    )


def train(**fields) -> dict:
    """How long, and how often what happens, in steps."""
    return (
        dict(
            steps=12000,
            batch_size=64,
            ema_decay=0.999,
            log_every=100,
            checkpoint_every=1000,
            preview_every=3000,
            keep=2,
        )
        | fields
    )


def small_unet(**fields) -> dict:
    """A UNet for the latents of the bundled autoencoder, 8×8×16 of 64 pixels; 3.9 M parameters."""
    return (
        dict(
            in_channels=16,
            out_channels=16,
            model_channels=64,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(2,),
            num_head_channels=32,
            groups=16,
        )
        | fields
    )


def small_diffusion(conditioning: dict, sampling: dict, **unet) -> ml_collections.ConfigDict:
    """A diffusion model of the embedded emoji that trains on two CPU cores."""
    config = ml_collections.ConfigDict(dict(task="diffusion") | start())
    # A workdir or a file with a trained autoencoder; empty: the one that ships.
    config.first_stage = ""
    config.latents = "memory"  # encoded once and kept; or "step": in every step, and augmentable
    config.text_states = "step"  # of frozen text encoders; "memory": once for each caption
    config.data = data()
    config.unet = small_unet(**unet)
    config.conditioning = conditioning
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
    config.objective = objective()
    config.optimizer = optimizer(
        name="muon", lr=3e-3, schedule="cosine", warmup=200, b2=0.99, clip=1.0
    )
    config.train = train()
    config.sampling = dict(sampler="ddim", steps=50, guidance=1.0, eta=0.0) | sampling
    return config


def smoke(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A few steps of a tiny network, for tests."""
    config.data.classes = ("food & drink",)
    config.unet.update(model_channels=32, channel_mult=(1,), attention_resolutions=(1,))
    config.train.update(steps=8, batch_size=8, log_every=2, checkpoint_every=4, preview_every=8)
    config.sampling.steps = 2
    return config
