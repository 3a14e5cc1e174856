"""The networks that others released, as fields of ours: ldm-facts §2.1–2.4.

Name → (fields, millions of parameters, number of tensors). Both counts are what the reference code
gives for the released configuration (CompVis' latent-diffusion a506df5, Stability's
stablediffusion cf1d67a and generative-models 0ad7de9, built without memory on torch's meta device),
and what ldm-facts lists, which leaves out only the rows marked †. A tensor there is a leaf here, so
nothing needs care: the codebook is one, each quant_conv a kernel and a bias, the label's embedding
one (or 4 if "sequential"). The loss network of an autoencoder is not counted.
"""

from ldm_jax.models.autoencoder import AutoencoderKL
from ldm_jax.models.tiny_autoencoder import TinyAutoencoder
from ldm_jax.models.vq import VQModel


def unet(inputs, width, mult, attention, *, outputs=3, **fields):
    return dict(
        in_channels=inputs,
        out_channels=outputs,
        model_channels=width,
        channel_mult=mult,
        attention_resolutions=attention,
        **fields,
    )


HEADS_OF_32, HEADS_OF_64 = dict(num_head_channels=32), dict(num_head_channels=64)

# §2.2, latent diffusion.
CELEBA = unet(3, 224, (1, 2, 3, 4), (8, 4, 2), **HEADS_OF_32)
CHURCHES = unet(
    *(4, 192, (1, 2, 2, 4, 4), (1, 2, 4, 8)),
    outputs=4,
    num_heads=8,
    use_scale_shift_norm=True,
    resblock_updown=True,
)
CIN256 = unet(4, 256, (1, 2, 4), (4, 2, 1), outputs=4, context_dim=512, **HEADS_OF_32)
CIN256_V2 = unet(3, 192, (1, 2, 3, 5), (8, 4, 2), num_heads=1, context_dim=512)
TEXT256 = unet(3, 192, (1, 2, 3, 5), (8, 4, 2), context_dim=640, **HEADS_OF_32)
LAYOUT = unet(
    *(3, 128, (1, 2, 3, 4), (8, 4, 2)), context_dim=512, transformer_depth=3, **HEADS_OF_32
)
# Meant as resolutions, but they are down-sampling factors, which this one never reaches.
SEMANTIC = unet(6, 128, (1, 4, 8), (32, 16, 8), num_heads=8)
BSR_SR = unet(6, 160, (1, 2, 2, 4), (16, 8), **HEADS_OF_32)
INPAINTING_BIG = unet(7, 256, (1, 2, 3, 4), (8, 4, 2), num_heads=8, resblock_updown=True)
RDM = unet(16, 448, (1, 2, 3, 4), (4, 2, 1), outputs=16, context_dim=768, **HEADS_OF_32)

# §2.3, Stable Diffusion, whose width and shape txt2img-1p4B began.
STABLE = unet(4, 320, (1, 2, 4, 4), (4, 2, 1), outputs=4, num_heads=8)
STABLE_1 = STABLE | dict(context_dim=768)
STABLE_2 = STABLE | dict(context_dim=1024, use_linear_in_transformer=True, **HEADS_OF_64)
UNCLIP = STABLE_2 | dict(num_classes="sequential", adm_in_channels=2048)
UPSCALER = unet(
    *(7, 256, (1, 2, 2, 4), (2, 4, 8)),
    outputs=4,
    num_heads=8,
    context_dim=1024,
    use_linear_in_transformer=True,
    disable_self_attentions=(True, True, True, False),
    num_classes=1000,
)

# §2.4, generative-models. There every attention is a SpatialTransformer; without a context, as in
# the middle of the toys, it attends to itself twice.
SGM = dict(use_spatial_transformer=True, num_classes="sequential")
SDXL = unet(
    *(4, 320, (1, 2, 4), (4, 2)),
    outputs=4,
    context_dim=2048,
    transformer_depth=(1, 2, 10),
    use_linear_in_transformer=True,
    adm_in_channels=2816,
    **SGM,
    **HEADS_OF_64,
)
REFINER = SDXL | dict(
    model_channels=384,
    channel_mult=(1, 2, 4, 4),
    context_dim=1280,
    transformer_depth=4,
    adm_in_channels=2560,
)
IMAGENET_F8 = unet(
    *(4, 256, (1, 2, 4), (1, 2, 4)),
    outputs=4,
    context_dim=1024,
    adm_in_channels=1024,
    **SGM,
    **HEADS_OF_64,
)
TOY = unet(
    *(1, 32, (1, 2, 2), ()),
    outputs=1,
    num_res_blocks=4,
    adm_in_channels=128,
    **SGM,
    **HEADS_OF_32,
)

UNETS = {
    "celeba256": (CELEBA, 274.06, 368),
    "ffhq256": (CELEBA, 274.06, 368),
    "lsun_beds256": (CELEBA, 274.06, 368),
    "lsun_churches256": (CHURCHES, 294.97, 520),
    "cin256": (CIN256, 394.98, 626),
    "cin256-v2": (CIN256_V2, 400.92, 688),
    "text2img256": (TEXT256, 403.62, 688),
    "txt2img-1p4B": (STABLE | dict(context_dim=1280), 872.30, 686),
    "layout2img-openimages256": (LAYOUT, 246.28, 1328),
    "semantic_synthesis256": (SEMANTIC, 215.23, 216),
    "semantic_synthesis512": (SEMANTIC, 215.23, 216),
    "bsr_sr": (BSR_SR, 113.62, 306),
    "inpainting_big": (INPAINTING_BIG, 387.25, 416),
    "rdm768": (RDM, 1335.48, 688),
    "sd1": (STABLE_1, 859.52, 686),
    "sd1-inpainting": (STABLE_1 | dict(in_channels=9), 859.54, 686),
    "sd2": (STABLE_2, 865.91, 686),
    "sd2-v": (STABLE_2, 865.91, 686),
    "sd2-inpainting": (STABLE_2 | dict(in_channels=9), 865.93, 686),
    "sd2-depth": (STABLE_2 | dict(in_channels=5), 865.91, 686),
    "sd2-unclip-h": (UNCLIP, 870.17, 690),
    "sd2-unclip-l": (UNCLIP | dict(adm_in_channels=1536), 869.52, 690),
    "sd2-upscaler": (UPSCALER, 473.40, 687),
    "sdxl-base": (SDXL, 2567.46, 1680),
    "sdxl-refiner": (REFINER, 2259.53, 1220),
    "sgm-imagenet-f8_cond": (IMAGENET_F8, 407.307, 630),  # †
    "sgm-txt2img-clipl": (  # †
        STABLE | dict(context_dim=768, adm_in_channels=1792, **SGM, **HEADS_OF_64),
        863.456,
        690,
    ),
    "sgm-mnist_cond": (TOY, 2.601, 370),  # †
    "sgm-mnist": (TOY | dict(num_classes=None), 2.568, 366),  # †
    "sgm-cifar10_cond": (TOY | dict(in_channels=3, out_channels=3), 2.602, 370),  # †
}

# §2.1, and one of diffusers 0.42.1.
F4, F8, F16, F32 = (1, 2, 4), (1, 2, 4, 4), (1, 1, 2, 2, 4), (1, 1, 2, 2, 4, 4)


def stage(channels, mult, **fields):
    return dict(ch_mult=mult, z_channels=channels, embed_dim=channels, **fields)


VQ_F8 = stage(4, (1, 2, 2, 4), attn_resolutions=(32,))
AUTOENCODERS = {
    "kl-f4": (AutoencoderKL, stage(3, F4), 55.31, 204),
    "kl-f8": (AutoencoderKL, stage(4, F8), 83.65, 248),
    "kl-f16": (AutoencoderKL, stage(16, F16, attn_resolutions=(16,)), 69.61, 342),
    "kl-f32": (AutoencoderKL, stage(64, F32, attn_resolutions=(16, 8)), 103.88, 436),
    "vq-f4": (VQModel, stage(3, F4, n_embed=8192), 55.32, 205),
    "vq-f4-noattn": (VQModel, stage(3, F4, n_embed=8192, mid_attn=False), 53.22, 185),
    "vq-f8": (VQModel, VQ_F8 | dict(n_embed=16384), 67.72, 299),
    "vq-f8-n256": (VQModel, VQ_F8 | dict(n_embed=256), 67.65, 299),
    "vq-f16": (VQModel, stage(8, F16, n_embed=16384, attn_resolutions=(16,)), 69.59, 343),
    "sd": (AutoencoderKL, stage(4, F8, scale_factor=0.18215), 83.65, 248),
    "sd2-upscaler": (AutoencoderKL, stage(4, F4, scale_factor=0.08333), 55.326, 204),  # †
    "sdxl": (AutoencoderKL, stage(4, F8, scale_factor=0.13025), 83.65, 248),
    "sgm-imagenet-attnfree-logvar": (  # †
        AutoencoderKL,
        stage(4, F4, num_res_blocks=4, mid_attn=False, use_quant_conv=False),
        78.017,
        276,
    ),
    "sgm-imagenet-kl_f8_8chn": (  # †
        AutoencoderKL,
        stage(8, F8, use_quant_conv=False),
        83.709,
        244,
    ),
    "taesd": (TinyAutoencoder, dict(), 2.445, 134),  # †
}
