"""Training of published models.

    python train.py --config=configs/published.py:kl-f8 --workdir=runs/kl-f8 --config.data.path=DIR
    python train.py --config=configs/published.py:sd1 --workdir=runs/sd1 --config.data.path=DIR \\
        --config.first_stage=runs/kl-f8

DIR is a folder of pictures, with the files of the conditions beside them. A diffusion model trains
on the latents of `first_stage`; its section `autoencoder` is that of the original.

Variants

    autoencoders   kl-f4, kl-f8, kl-f16, kl-f32, vq-f4, vq-f4-noattn, vq-f8, vq-f8-n256, vq-f16
                   sd-vae, sdxl-vae, sd2-upscaler-vae, taesd
                   sgm-imagenet-attnfree-logvar, sgm-imagenet-kl_f8_8chn
    latent         celeba256, ffhq256, lsun_beds256, lsun_churches256, cin256, cin256-v2,
    diffusion      text2img256, txt2img-1p4B, layout2img-openimages256, semantic_synthesis256,
                   semantic_synthesis512, bsr_sr, inpainting_big, rdm768
    Stable         sd1 (default), sd1-inpainting, sd2, sd2-v, sd2-inpainting, sd2-depth,
    Diffusion      sd2-unclip-h, sd2-unclip-l, sd2-upscaler, sdxl-base, sdxl-refiner
    generative-    sgm-imagenet-f8_cond, sgm-txt2img-clipl, sgm-mnist, sgm-mnist_cond,
    models         sgm-cifar10_cond
    guided         adm-64, adm-128, adm-256, adm-256-uncond, adm-512, without their learned variance
    diffusion
    benchmark      mlperf_sd2, Stable Diffusion 2 from random weights, as in MLPerf Training 4.0 to
                   5.0, with the text encoder and autoencoder of --config.init_from=
                   512-base-ema.ckpt. A batch of 512 and its rate; of another batch, set
                   --config.optimizer.lr=1.25e-7 times it (3.2e-5 of 256). MLPerf's data were
                   encoded by mistake from pixels in [0, 1], not [-1, 1] (mlcommons/training#721);
                   pictures of your own are treated so with --config.latents=step and
                   --config.data.augment="('unit_range',)". MLPerf's own tars of moments are read
                   with --config.latents=shards --config.cache='DIR/*.tar'

`ldm_jax/published` has the models and their sources; this file has only training. Values are those
of the same configurations or, for batch, steps and learning rate, of the papers and model cards.
Steps that are `UNPUBLISHED` are a guess, and batch, rate and loss of the same row may be one.
The originals' `--scale_lr` multiplies the base rate by the batch and the number of GPUs; rates here
are effective ones, for latent diffusion of a single GPU, as in its paper. The paper's days of one
V100 are: 14 for celeba256, 18 for the churches, 26 for ffhq256, 60 for the bedrooms, 79 for cin256,
271 for cin256-v2, 29 for an f4 autoencoder, 66 for an f8 one. Stable Diffusion took 150,000 hours
of an A100.

Batches are those of many devices. On TPUs, and on GPUs with bfloat16, add
--config.precision=bfloat16 --config.train.remat=blocks, and with fewer devices
--config.train.accumulate=N, so that a part of batch_size/N fits. The default stays float32:
bfloat16 was compared with it on small models only.
"""

from functools import partial

from configs import common
from ldm_jax.published import AUTOENCODERS, MODELS, RECIPES

UNPUBLISHED = 400_000
KL = dict(kl_weight=1e-6, disc_start=50_001, disc_weight=0.5)
# SGM also learns the log-variance of the reconstruction, which is 0 in LDM and here.
SGM_KL = dict(kl_weight=1.0, disc_start=20_001, disc_weight=0.5, perceptual_weight=0.25)


def codebook(start, weight):
    return dict(codebook_weight=1.0, disc_start=start, disc_weight=weight)


FIRST_STAGES = {
    # Batch of one GPU, steps, layers of the discriminator, loss.
    "kl-f4": (10, 176_991, 3, KL),
    "kl-f8": (4, 246_803, 3, KL),
    "kl-f16": (6, 442_998, 3, KL),
    "kl-f32": (6, 406_763, 3, KL),
    "vq-f4": (8, 533_066, 3, codebook(0, 0.75)),
    "vq-f4-noattn": (8, 658_131, 3, codebook(11, 0.75)),
    "vq-f8": (10, 971_043, 2, codebook(1, 0.6)),
    "vq-f8-n256": (10, 1_608_649, 3, codebook(250_001, 0.75)),
    "vq-f16": (14, 1_101_166, 2, codebook(250_001, 0.75)),
    "sd-vae": (4, 246_803, 3, KL),
    "sdxl-vae": (4, UNPUBLISHED, 3, KL),
    "sd2-upscaler-vae": (10, UNPUBLISHED, 3, KL),
    "taesd": (10, UNPUBLISHED, 3, KL),
    "sgm-imagenet-attnfree-logvar": (8, UNPUBLISHED, 3, SGM_KL),
    "sgm-imagenet-kl_f8_8chn": (8, UNPUBLISHED, 3, SGM_KL),
}


def train(batch, steps, ema):
    every = dict(checkpoint_every=5000, preview_every=5000)
    return common.train(batch_size=batch, steps=steps, ema_decay=ema, **every)


def autoencoder(name, batch, steps, layers, loss):
    """The config of a first stage; without EMA, as the originals."""
    # `logvar_init` is of the posterior. The originals start it at 0; LPIPS needs a file.
    defaults = dict(logvar_init=0.0, latent_noise=0.0, lpips="", perceptual_weight=1.0)
    loss = defaults | dict(disc_loss="hinge") | loss
    return common.start() | dict(
        task="autoencoder",
        data=common.folder(256),
        autoencoder=AUTOENCODERS[name].fields,
        discriminator=dict(ndf=64, n_layers=layers),
        loss=loss,
        optimizer=common.optimizer(lr=4.5e-6 * batch, b1=0.5, b2=0.9, weight_decay=0.0),
        train=train(batch, steps, ema=0.0),
    )


# Their text encoders are CLIP's, and do not train.
UNET = ("^unet/",)
L1 = dict(objective=dict(loss="l1"))
INPAINTING = L1 | dict(warmup=1000, optimizer=dict(schedule="cosine", lr_end=0.001))
SD = dict(lr=1e-4, warmup=10_000, trainable=UNET, batch=2048)
SGM = dict(lr=1e-4, warmup=10_000, ema=0.0, batch=64)
EDM_OBJECTIVE = dict(weighting="edm", draw="log_normal", draw_mean=-1.2, draw_std=1.2)
TOY = dict(lr=1e-4, ema=0.0, batch=512, objective=EDM_OBJECTIVE)
MNIST, CIFAR = (dict(data=dict(source="tfds", path=name)) for name in ("mnist", "cifar10"))
# 2.56 million pictures; submitters evaluate after each 512,000, and stop at an FID of 90 and a CLIP
# score of 0.15.
MLPERF = dict(lr=1.25e-7 * 512, warmup=1000, batch=512, steps=5000, ema=0.0, trainable=UNET)
MLPERF |= dict(
    init_networks=("text",),
    latents="memory",
    train=dict(checkpoint_every=1000, preview_every=1000, mllog=True),
)
ADM = dict(lr=1e-4, batch=256, optimizer=dict(weight_decay=0.0))
DIFFUSION = {
    "celeba256": dict(lr=9.6e-5, batch=48, steps=410_000),
    "ffhq256": dict(lr=8.4e-5, batch=42, steps=635_000),
    "lsun_beds256": dict(lr=9.6e-5, batch=48, steps=1_900_000),
    "lsun_churches256": dict(lr=5e-5, batch=96, steps=500_000, warmup=10_000) | L1,
    "cin256": dict(lr=6.4e-5, batch=64, steps=4_800_000),
    "cin256-v2": dict(lr=1e-4, batch=1200, steps=178_000, ema=0.0),
    "text2img256": dict(lr=5.6e-5, batch=28),
    "txt2img-1p4B": dict(lr=1e-4, batch=680, steps=390_000, ema=0.0),
    "layout2img-openimages256": dict(lr=4.8e-5, batch=24, steps=4_400_000) | L1,
    "semantic_synthesis256": dict(lr=4.8e-5, batch=48, steps=360_000) | L1,
    "semantic_synthesis512": dict(lr=8e-6, batch=8) | L1,
    "bsr_sr": dict(lr=6.4e-5, batch=64, steps=860_000),
    # The rate falls until step 50,000; batch and rate are those of the smaller model.
    "inpainting_big": dict(lr=1e-6, batch=128, steps=50_000) | INPAINTING,
    "rdm768": dict(lr=1e-4, batch=64),
    # The last part, v1-5 from v1-2. v1-2 took 946,000 steps, the first 237,000 of them at 256.
    "sd1": SD | dict(steps=595_000),
    "sd1-inpainting": SD | dict(lr=7.5e-5, steps=440_000, batch=1024, warmup=2500),
    "sd2": SD | dict(steps=850_000),
    "sd2-v": SD | dict(steps=140_000),
    "sd2-inpainting": SD | dict(lr=5e-5, steps=200_000),
    "sd2-depth": SD | dict(lr=5e-7, steps=200_000),
    "sd2-unclip-h": SD,
    "sd2-unclip-l": SD,
    "sd2-upscaler": SD | dict(steps=1_250_000),
    "sdxl-base": SD,
    "sdxl-refiner": SD,
    "sgm-imagenet-f8_cond": SGM,
    "sgm-txt2img-clipl": SGM,
    "sgm-mnist": TOY | MNIST | dict(steps=1170),
    "sgm-mnist_cond": TOY | MNIST | dict(steps=2340),
    "sgm-cifar10_cond": TOY | CIFAR | dict(steps=1940),
    "adm-64": ADM | dict(lr=3e-4, batch=2048, steps=540_000),
    "adm-128": ADM | dict(steps=4_360_000),
    "adm-256": ADM | dict(steps=1_980_000),
    "adm-256-uncond": ADM | dict(steps=1_980_000),
    "adm-512": ADM | dict(steps=1_940_000),
    "mlperf_sd2": MLPERF,
}

# The arrays of conditions that training makes; all others are files, picture.NAME.npy.
MADE = {
    "label": {},  # the picture's class, which every batch has
    "depth": {"depth": dict(factor=8)},
    "segmentation": {"segmentation": dict(classes=182)},
    "boxes": {"boxes": {}},
    "low_resolution": {"low_resolution": dict(factor=4)},
    "noise_level": {"low_resolution": dict(factor=4, noise_levels=350)},
}
# The recipe of masks, by `mask_first`: Stable Diffusion's, LDM's.
MASKS = {True: dict(recipe="sd512_large", whole=0.25), False: dict(recipe="ldm")}
PROMPTS = ("a sunset behind a mountain range", "a virus monster playing guitar, oil on canvas")
PROMPTS += ("a photograph of an astronaut riding a horse", "a bowl of fruit, still life")


def data_conditions(conditioning):
    """The sections of `data.conditions` that make what the sections of `conditioning` need."""
    made = {}
    for name, section in conditioning.items():
        match section["kind"]:
            case "sizes":
                made["sizes"] = {}
            case "masked_image":
                made["mask"] = MASKS[section["mask_first"]]
            case "array":
                made |= MADE.get(name, {name: dict(kind="array")})
    return made


def preview(conditioning):
    """The prompts or labels of previews."""
    prompts = PROMPTS if {"text", "text_2"} & conditioning.keys() else ()
    classes = conditioning.get("label", {}).get("network", {}).get("n_classes", 0)
    labels = tuple(range(10)) if classes == 10 else (25, 187, 448, 992) if classes else ()
    return dict(prompts=prompts, labels=labels)


def diffusion(
    name, *, lr, batch, steps=UNPUBLISHED, warmup=0, ema=0.9999, trainable=common.ALL, **more
):
    """The config of a diffusion model; `more` holds, by section, fields that differ, and settings
    of no section."""
    model = (MODELS | RECIPES)[name]
    config = common.start() | dict(
        task="diffusion",
        first_stage="",
        latents="step",
        text_states="step",
        cache="",
        trainable=trainable,
        data=common.folder(model.size, conditions=data_conditions(model.conditions)),
        autoencoder=dict(kind="kl", scale_factor=1.0) | model.autoencoder.fields,
        unet=model.unet,
        conditioning=model.conditions,
        diffusion=model.noise,
        objective=common.objective(),
        optimizer=common.optimizer(lr=lr, warmup=warmup),
        train=train(batch, steps, ema),
        sampling=preview(model.conditions) | model.sampling,
    )
    return config | {
        name: config[name] | value if isinstance(value, dict) else value
        for name, value in more.items()
    }


VARIANTS = {name: partial(autoencoder, name, *row) for name, row in FIRST_STAGES.items()}
VARIANTS |= {name: partial(diffusion, name, **row) for name, row in DIFFUSION.items()}
get_config = common.chooser("published", VARIANTS, "sd1")
