"""The models that others published: their networks, conditions, noise and training, in our fields.

    python train.py --config=configs/published.py:kl-f8 --workdir=runs/kl-f8 --config.data.path=DIR
    python train.py --config=configs/published.py:sd1 --workdir=runs/sd1 --config.data.path=DIR \\
        --config.first_stage=runs/kl-f8

DIR is a folder of pictures, with whatever the model is told of them. A diffusion model trains on
the latents of `first_stage`; its section `autoencoder` says which one the original had.

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

Values are those of the configurations in CompVis' latent-diffusion and stable-diffusion, runwayml's
stable-diffusion and Stability's stablediffusion and generative-models, or, for batch, steps and
learning rate, of the papers and model cards; `UNPUBLISHED` steps and what follows it in a row are
guesses. The originals' `--scale_lr` multiplies the base rate by the batch and the number of GPUs.
Rates here are effective ones, of a single GPU for latent diffusion, which is what its paper lists.
It counts these days of one V100: 14 for celeba256, 18 for the churches, 26 for ffhq256, 60 for the
bedrooms, 79 for cin256, 271 for cin256-v2, 29 for an f4 autoencoder, 66 for an f8 one. Stable
Diffusion took 150,000 hours of an A100.
"""

import ml_collections

from configs import common

UNPUBLISHED = 400_000

# First stages. Without a `kind` they are "kl".
F4, F8, F16, F32 = (1, 2, 4), (1, 2, 4, 4), (1, 1, 2, 2, 4), (1, 1, 2, 2, 4, 4)
F8_VQ = (1, 2, 2, 4)
KL = dict(kl_weight=1e-6, disc_start=50_001, disc_weight=0.5)
# SGM learns the reconstruction's log-variance as well, which LDM leaves at 0, as we do.
SGM_KL = dict(kl_weight=1.0, disc_start=20_001, disc_weight=0.5, perceptual_weight=0.25)


def codebook(start, weight):
    return dict(codebook_weight=1.0, disc_start=start, disc_weight=weight)


def kl(channels, mult, *attention, **fields):
    common = dict(ch=128, num_res_blocks=2, attn_resolutions=attention, resolution=256)
    return common | dict(ch_mult=mult, z_channels=channels, embed_dim=channels) | fields


def vq(channels, mult, n_embed, *attention, **fields):
    return kl(channels, mult, *attention, kind="vq", n_embed=n_embed, **fields)


# Fields, batch of one GPU, steps, layers of the discriminator, loss.
PLAIN = dict(num_res_blocks=4, mid_attn=False, use_quant_conv=False)
AUTOENCODERS = {
    "kl-f4": (kl(3, F4), 10, 176_991, 3, KL),
    "kl-f8": (kl(4, F8), 4, 246_803, 3, KL),
    "kl-f16": (kl(16, F16, 16), 6, 442_998, 3, KL),
    "kl-f32": (kl(64, F32, 16, 8), 6, 406_763, 3, KL),
    "vq-f4": (vq(3, F4, 8192), 8, 533_066, 3, codebook(0, 0.75)),
    "vq-f4-noattn": (vq(3, F4, 8192, mid_attn=False), 8, 658_131, 3, codebook(11, 0.75)),
    "vq-f8": (vq(4, F8_VQ, 16384, 32), 10, 971_043, 2, codebook(1, 0.6)),
    "vq-f8-n256": (vq(4, F8_VQ, 256, 32), 10, 1_608_649, 3, codebook(250_001, 0.75)),
    "vq-f16": (vq(8, F16, 16384, 16), 14, 1_101_166, 2, codebook(250_001, 0.75)),
    "sd-vae": (kl(4, F8, scale_factor=0.18215), 4, 246_803, 3, KL),  # kl-f8
    "sdxl-vae": (kl(4, F8, scale_factor=0.13025), 4, UNPUBLISHED, 3, KL),
    "sd2-upscaler-vae": (kl(4, F4, scale_factor=0.08333), 10, UNPUBLISHED, 3, KL),
    "taesd": (dict(kind="tiny"), 10, UNPUBLISHED, 3, KL),
    "sgm-imagenet-attnfree-logvar": (kl(4, F4, **PLAIN), 8, UNPUBLISHED, 3, SGM_KL),
    "sgm-imagenet-kl_f8_8chn": (kl(8, F8, use_quant_conv=False), 8, UNPUBLISHED, 3, SGM_KL),
}
FIRST_STAGES = {name: fields for name, (fields, *_) in AUTOENCODERS.items()}
FIRST_STAGES["pixels"] = dict(kind="identity")  # of the toys, which have none


# Denoisers. `attention` stands at down-sampling factors of the latents, not at their sizes.
def unet(channels, width, mult, attention, *, beside=0, **fields):
    shape = dict(in_channels=channels + beside, out_channels=channels, model_channels=width)
    levels = dict(channel_mult=mult, num_res_blocks=2, attention_resolutions=attention)
    return shape | levels | fields


HEADS_OF_32, HEADS_OF_64 = dict(num_head_channels=32), dict(num_head_channels=64)
FACES = unet(3, 224, (1, 2, 3, 4), (8, 4, 2), **HEADS_OF_32)
CHURCHES = unet(4, 192, (1, 2, 2, 4, 4), (1, 2, 4, 8), num_heads=8)
CHURCHES |= dict(use_scale_shift_norm=True, resblock_updown=True)
CIN = unet(4, 256, (1, 2, 4), (4, 2, 1), context_dim=512, **HEADS_OF_32)
CIN_V2 = unet(3, 192, (1, 2, 3, 5), (8, 4, 2), context_dim=512, num_heads=1)
CAPTIONS = unet(3, 192, (1, 2, 3, 5), (8, 4, 2), context_dim=640, **HEADS_OF_32)
LAYOUT = unet(3, 128, (1, 2, 3, 4), (8, 4, 2), context_dim=512, **HEADS_OF_32)
LAYOUT |= dict(transformer_depth=3)
# Meant as sizes, so these factors are never reached, but in the middle.
SEMANTIC = unet(3, 128, (1, 4, 8), (32, 16, 8), beside=3, num_heads=8)
BSR_SR = unet(3, 160, (1, 2, 2, 4), (16, 8), beside=3, **HEADS_OF_32)  # 16 is never reached
INPAINTING_BIG = unet(3, 256, (1, 2, 3, 4), (8, 4, 2), beside=4, num_heads=8, resblock_updown=True)
RDM = unet(16, 448, (1, 2, 3, 4), (4, 2, 1), context_dim=768, **HEADS_OF_32)

STABLE = unet(4, 320, (1, 2, 4, 4), (4, 2, 1), num_heads=8)  # of txt2img-1p4B first
STABLE_1 = STABLE | dict(context_dim=768)
STABLE_2 = STABLE | dict(context_dim=1024, use_linear_in_transformer=True) | HEADS_OF_64
WITH_MASK, WITH_DEPTH = dict(in_channels=4 + 1 + 4), dict(in_channels=4 + 1)
UNCLIP_H = STABLE_2 | dict(num_classes="sequential", adm_in_channels=2048)
UNCLIP_L = UNCLIP_H | dict(adm_in_channels=1536)
UPSCALER = unet(4, 256, (1, 2, 2, 4), (2, 4, 8), beside=3, num_heads=8, num_classes=1000)
UPSCALER |= dict(context_dim=1024, use_linear_in_transformer=True)
UPSCALER |= dict(disable_self_attentions=(True, True, True, False))

# There every attention is a SpatialTransformer; without a context it attends to itself twice.
SGM = dict(use_spatial_transformer=True, num_classes="sequential")
SDXL = unet(4, 320, (1, 2, 4), (4, 2), context_dim=2048, adm_in_channels=2816) | SGM | HEADS_OF_64
SDXL |= dict(transformer_depth=(1, 2, 10), use_linear_in_transformer=True)
REFINER = SDXL | dict(model_channels=384, channel_mult=(1, 2, 4, 4), transformer_depth=4)
REFINER |= dict(context_dim=1280, adm_in_channels=2560)
IMAGENET = unet(4, 256, (1, 2, 4), (1, 2, 4), context_dim=1024, adm_in_channels=1024)
IMAGENET |= SGM | HEADS_OF_64
CLIPL = STABLE_1 | dict(adm_in_channels=1792) | SGM | HEADS_OF_64
TOY = unet(1, 32, (1, 2, 2), (), use_spatial_transformer=True, **HEADS_OF_32)
TOY |= dict(num_res_blocks=4)
TOLD, RGB = dict(num_classes="sequential", adm_in_channels=128), dict(in_channels=3, out_channels=3)


# Conditions.
def bert(width, depth):
    network = dict(width=width, depth=depth, heads=8, head_dim=64, max_length=77)
    return {"text": dict(kind="text", vocabulary="bert", dropout=0.1, network=network)}


def clip(width, depth, heads, activation="gelu", *, padding="zero", network=None, **section):
    size = dict(vocab_size=49408, width=width, depth=depth, heads=heads, max_length=77)
    output = dict(activation=activation, projection=None, layer="last", final_norm=True, eos=None)
    common = dict(kind="clip", vocabulary="clip", padding=padding, dropout=0.1)
    return common | dict(network=size | output | (network or {})) | section


def clip_l(**fields):
    return clip(768, 12, 12, "quick_gelu", padding="end", **fields)


def label(classes, width, *, dropout, **section):
    network = dict(n_classes=classes, embed_dim=width)
    common = dict(kind="class", null=None, dropout=dropout, network=network)
    return {"label": common | section}


def sizes(*fields, dropout=0.0, **section):
    return dict(kind="sizes", fields=fields, dropout=dropout, **section)


def array(output, *shape, dropout=0.0, **section):
    return dict(kind="array", output=output, shape=shape, dropout=dropout, **section)


def embedding(width):
    """CLIP's, of a picture, with noise, beside the sinusoids of how much (unCLIP)."""
    return {"image_embedding": array("vector", width, dropout=0.25)}


def masked_image(channels, mask_first, hole, mask_range):
    fields = dict(channels=channels, mask_first=mask_first, hole=hole, mask_range=mask_range)
    return {"masked_image": dict(kind="masked_image", dropout=0.0, **fields)}


CLIP_L, CLIP_L_POOLED = {"text": clip_l()}, {"text": clip_l(pooled=True)}
OPENCLIP_H = {"text": clip(1024, 23, 16)}  # of 24 blocks, the last of which is never used
# SDXL: hidden states without the last norm, side by side, and the pooled ones of the larger.
HIDDEN = dict(layer="penultimate", final_norm=False)
BIGG = clip(1280, 32, 20, network=HIDDEN | dict(projection=1280), pooled=True)
BASE = {
    "text": clip_l(network=HIDDEN, zero_null=True),
    "text_2": BIGG | dict(zero_null=True),
    "sizes": sizes("original_size", "crop", "target_size"),
}
REFINED = {"text_2": BIGG, "sizes": sizes("original_size", "crop", "aesthetic_score")}


def sgm_sizes(dropout):
    """Sizes that are dropped one by one, to 0; there, what is dropped is 0 behind its sinusoids."""
    return {field: sizes(field, dropout=dropout) for field in ("original_size", "crop")}


IMAGENET_CLASS = label(1000, 1024, dropout=0.2, zero_null=True)
TOY_CLASS = label(10, 128, dropout=0.2, zero_null=True, output="vector")
STABLE_MASK, LDM_MASK = masked_image(4, True, 0.0, (0, 1)), masked_image(3, False, -1.0, (-1, 1))
# How their masks are drawn, by `mask_first`: Stable Diffusion's, LDM's.
MASKS = {True: dict(recipe="sd512_large", whole=0.25), False: dict(recipe="ldm")}
# Inverse depth, each picture's from -1 to 1:
DEPTH = {"depth": array("concat", None, None, 1)}
# A picture with the noise of a timestep below 350 of "linear" from 0.0001 to 0.02, and that number:
UPSCALED = {"low_resolution": array("concat", None, None, 3), "noise_level": array("vector")}
# CLIP ViT-L/14's embeddings, of unit length, of the prompt and of pictures near it:
NEIGHBOURS = {"neighbours": array("context", None, 768, dropout=0.1)}
LOW_RESOLUTION = {"low_resolution": array("concat", None, None, 3)}
RESCALER = dict(kind="rescaler", n_stages=2, out_channels=3)
SEGMENTATION = {"segmentation": array("concat", None, None, 182, network=RESCALER)}
TOKENS = dict(kind="transformer", vocab_size=8192, width=512, depth=16, max_length=92)
BOXES = {"boxes": array("context", 92, network=TOKENS)}
# How training makes them; all others lie beside the pictures, picture.NAME.npy.
FED = {
    "depth": {"depth": dict(factor=8)},
    "segmentation": {"segmentation": dict(classes=182)},
    "boxes": {"boxes": {}},
    "low_resolution": {"low_resolution": dict(factor=4)},
    "noise_level": {"low_resolution": dict(factor=4, noise_levels=350)},
}


# Noise. LDM's samplers take the first grid, SGM's the second.
LEADING, TRAILING = dict(spacing="leading", offset=1, end="first"), dict(spacing="trailing")


def noise(start, end, parameterization="eps", grid=LEADING):
    table = dict(name="linear", timesteps=1000, start=start, end=end, zero_terminal_snr=False)
    return dict(schedule=table, parameterization=parameterization, sigma_data=0.5, **grid)


LDM_NOISE, WIDE_NOISE = noise(0.0015, 0.0195), noise(0.0015, 0.0205)
NARROW_NOISE, UPSCALER_NOISE = noise(0.0015, 0.0155), noise(0.0001, 0.02, "v")
SD_NOISE, SD_V_NOISE = noise(0.00085, 0.012), noise(0.00085, 0.012, "v")
SGM_NOISE = noise(0.00085, 0.012, grid=TRAILING)
EDM_NOISE = dict(
    schedule=dict(name="edm", sigma_min=0.002, sigma_max=80.0),
    parameterization="edm",
    spacing="karras",
    sigma_data=1.0,
)
EDM_OBJECTIVE = dict(weighting="edm", draw="log_normal", draw_mean=-1.2, draw_std=1.2)

PROMPTS = ("a sunset behind a mountain range", "a virus monster playing guitar, oil on canvas")
PROMPTS += ("a photograph of an astronaut riding a horse", "a bowl of fruit, still life")
LABELS, TOY_LABELS = dict(labels=(25, 187, 448, 992)), dict(labels=tuple(range(10)))


def ddim(steps, guidance=1.0, eta=0.0):
    return dict(sampler="ddim", steps=steps, guidance=guidance, eta=eta)


def euler(steps, guidance=1.0):
    return dict(sampler="euler", steps=steps, guidance=guidance, eta=0.0)


def train(batch, steps, ema):
    every = dict(checkpoint_every=5000, preview_every=5000)
    return common.train(batch_size=batch, steps=steps, ema_decay=ema, **every)


def pictures(size, **fields):
    return common.data(source="folder", image_size=size, held_out=0.01, **fields)


def autoencoder(fields, batch, steps, layers, loss):
    """The config of a first stage; without EMA, as the originals."""
    # `logvar_init` is of the posterior. The originals start it at 0; LPIPS needs a file.
    loss = dict(logvar_init=0.0, lpips="", perceptual_weight=1.0) | loss
    return common.start() | dict(
        task="autoencoder",
        data=pictures(256),
        autoencoder=fields,
        discriminator=dict(ndf=64, n_layers=layers),
        loss=loss,
        optimizer=common.optimizer(lr=4.5e-6 * batch, b1=0.5, b2=0.9, weight_decay=0.0),
        train=train(batch, steps, ema=0.0),
    )


def fed(conditioning):
    """The sections of `data.conditions` that make what a model is told."""
    made = {}
    for name, section in conditioning.items():
        match section["kind"]:
            case "sizes":
                made["sizes"] = {}
            case "masked_image":
                made["mask"] = MASKS[section["mask_first"]]
            case "array":
                made |= FED.get(name, {name: dict(kind="array")})
    return made


def model(
    first_stage, unet, conditioning, noise, sampling, *, lr, batch, steps=UNPUBLISHED, **more
):
    """The config of a diffusion model; `more` holds size, warmup, ema, trainable, and, by section,
    fields that differ from what the rest makes."""
    more = dict(size=256, warmup=0, ema=0.9999, trainable=common.ALL) | more
    prompts = PROMPTS if {"text", "text_2"} & conditioning.keys() else ()
    config = common.start() | dict(
        task="diffusion",
        first_stage="",
        latents="step",
        text_states="step",
        trainable=more.pop("trainable"),
        data=pictures(more.pop("size"), conditions=fed(conditioning)),
        autoencoder=dict(kind="kl", scale_factor=1.0) | FIRST_STAGES[first_stage],
        unet=unet,
        conditioning=conditioning,
        diffusion=noise,
        objective=common.objective(),
        optimizer=common.optimizer(lr=lr, warmup=more.pop("warmup")),
        train=train(batch, steps, more.pop("ema")),
        sampling=dict(prompts=prompts, labels=()) | sampling,
    )
    return config | {section: config[section] | fields for section, fields in more.items()}


# Their text encoders are CLIP's, and stay as they are.
UNET = ("^unet/",)
L1 = dict(objective=dict(loss="l1"))
INPAINTING = L1 | dict(warmup=1000, optimizer=dict(schedule="cosine", lr_end=0.001))
SD = dict(size=512, warmup=10_000, trainable=UNET, batch=2048)
SD_768, XL = SD | dict(size=768), SD | dict(size=1024, trainable=UNET)
SGM_RUN = dict(warmup=10_000, ema=0.0, lr=1e-4, batch=64)
EDM = dict(ema=0.0, lr=1e-4, batch=512, objective=EDM_OBJECTIVE)
MNIST = EDM | dict(size=28, data=dict(source="tfds", path="mnist"), autoencoder=dict(in_channels=1))
CIFAR = EDM | dict(size=32, data=dict(source="tfds", path="cifar10"))
# fmt: off
MODELS = {
    # First stage, UNet, conditions, noise, then sampling, learning rate, batch and steps.
    "celeba256": model("vq-f4", FACES, {}, LDM_NOISE,
        ddim(200), lr=9.6e-5, batch=48, steps=410_000),
    "ffhq256": model("vq-f4", FACES, {}, LDM_NOISE,
        ddim(200, eta=1.0), lr=8.4e-5, batch=42, steps=635_000),
    "lsun_beds256": model("vq-f4", FACES, {}, LDM_NOISE,
        ddim(200, eta=1.0), lr=9.6e-5, batch=48, steps=1_900_000),
    # Its scale_factor was measured on the first batch, and stands in the released file.
    "lsun_churches256": model("kl-f8", CHURCHES, {}, NARROW_NOISE,
        ddim(400), lr=5e-5, batch=96, steps=500_000, warmup=10_000, **L1),
    "cin256": model("vq-f8", CIN, label(1000, 512, dropout=0.0), LDM_NOISE,
        ddim(200, eta=1.0) | LABELS, lr=6.4e-5, batch=64, steps=4_800_000),
    "cin256-v2": model("vq-f4", CIN_V2, label(1001, 512, dropout=0.1, null=1000), LDM_NOISE,
        ddim(20, 3.0) | LABELS, lr=1e-4, batch=1200, steps=178_000, ema=0.0),
    "text2img256": model("vq-f4", CAPTIONS, bert(640, 32), LDM_NOISE,
        ddim(100), lr=5.6e-5, batch=28),
    "txt2img-1p4B": model("sd-vae", STABLE | dict(context_dim=1280), bert(1280, 32), SD_NOISE,
        ddim(200, 5.0), lr=1e-4, batch=680, steps=390_000, ema=0.0),
    "layout2img-openimages256": model("vq-f4", LAYOUT, BOXES, WIDE_NOISE,
        ddim(200), lr=4.8e-5, batch=24, steps=4_400_000, **L1),
    "semantic_synthesis256": model("vq-f4", SEMANTIC, SEGMENTATION, WIDE_NOISE,
        ddim(200), lr=4.8e-5, batch=48, steps=360_000, **L1),
    "semantic_synthesis512": model("vq-f4", SEMANTIC, SEGMENTATION, WIDE_NOISE,
        ddim(200), lr=8e-6, batch=8, size=512, **L1),
    "bsr_sr": model("vq-f4", BSR_SR, LOW_RESOLUTION, NARROW_NOISE,
        ddim(100, eta=1.0), lr=6.4e-5, batch=64, steps=860_000),
    # The rate falls until step 50,000, and stays; batch and rate are those of the smaller one.
    "inpainting_big": model("vq-f4-noattn", INPAINTING_BIG, LDM_MASK, WIDE_NOISE,
        ddim(50), lr=1e-6, batch=128, steps=50_000, **INPAINTING),
    "rdm768": model("kl-f16", RDM, NEIGHBOURS, noise(0.0015, 0.015),
        ddim(50, 5.0), lr=1e-4, batch=64, size=768, autoencoder=dict(scale_factor=0.22765929)),
    # The last leg, of v1-5, from v1-2, which took 946,000 steps, the first 237,000 of them at 256.
    "sd1": model("sd-vae", STABLE_1, CLIP_L, SD_NOISE,
        ddim(50, 7.5), lr=1e-4, steps=595_000, **SD),
    "sd1-inpainting": model("sd-vae", STABLE_1 | WITH_MASK, CLIP_L | STABLE_MASK, SD_NOISE,
        ddim(50, 7.5, 1.0), lr=7.5e-5, steps=440_000, **SD | dict(batch=1024, warmup=2500)),
    "sd2": model("sd-vae", STABLE_2, OPENCLIP_H, SD_NOISE,
        ddim(50, 9.0), lr=1e-4, steps=850_000, **SD),
    "sd2-v": model("sd-vae", STABLE_2, OPENCLIP_H, SD_V_NOISE,
        ddim(50, 9.0), lr=1e-4, steps=140_000, **SD_768),
    "sd2-inpainting": model("sd-vae", STABLE_2 | WITH_MASK, OPENCLIP_H | STABLE_MASK, SD_NOISE,
        ddim(50, 10.0), lr=5e-5, steps=200_000, **SD),
    "sd2-depth": model("sd-vae", STABLE_2 | WITH_DEPTH, OPENCLIP_H | DEPTH, SD_NOISE,
        ddim(50, 9.0), lr=5e-7, steps=200_000, **SD),
    "sd2-unclip-h": model("sd-vae", UNCLIP_H, OPENCLIP_H | embedding(2048), SD_V_NOISE,
        ddim(20, 10.0), lr=1e-4, **SD_768),
    "sd2-unclip-l": model("sd-vae", UNCLIP_L, OPENCLIP_H | embedding(1536), SD_V_NOISE,
        ddim(20, 10.0), lr=1e-4, **SD_768),
    "sd2-upscaler": model("sd2-upscaler-vae", UPSCALER, OPENCLIP_H | UPSCALED, UPSCALER_NOISE,
        ddim(50, 9.0), lr=1e-4, steps=1_250_000, **SD),
    "sdxl-base": model("sdxl-vae", SDXL, BASE, SGM_NOISE,
        euler(50, 5.0), lr=1e-4, **XL),
    "sdxl-refiner": model("sdxl-vae", REFINER, REFINED, SGM_NOISE,
        euler(50, 5.0), lr=1e-4, **XL),
    "sgm-imagenet-f8_cond": model("sdxl-vae", IMAGENET, IMAGENET_CLASS | sgm_sizes(0.2), SGM_NOISE,
        euler(50, 5.0) | LABELS, **SGM_RUN),
    "sgm-txt2img-clipl": model("sdxl-vae", CLIPL, CLIP_L_POOLED | sgm_sizes(0.1), SGM_NOISE,
        euler(50, 7.5), **SGM_RUN),
    "sgm-mnist": model("pixels", TOY, {}, EDM_NOISE,
        euler(50), steps=1170, **MNIST),
    "sgm-mnist_cond": model("pixels", TOY | TOLD, TOY_CLASS, EDM_NOISE,
        euler(50, 3.0) | TOY_LABELS, steps=2340, **MNIST),
    "sgm-cifar10_cond": model("pixels", TOY | TOLD | RGB, TOY_CLASS, EDM_NOISE,
        euler(50, 3.0) | TOY_LABELS, steps=1940, **CIFAR),
}
# fmt: on
VARIANTS = {name: autoencoder(*row) for name, row in AUTOENCODERS.items()} | MODELS


def get_config(variant: str = "sd1") -> ml_collections.ConfigDict:
    """The config of a variant; raises ValueError that lists them."""
    if variant not in VARIANTS:
        raise ValueError(f"no variant {variant!r} of published: choose {', '.join(VARIANTS)}")
    return ml_collections.ConfigDict(VARIANTS[variant])
