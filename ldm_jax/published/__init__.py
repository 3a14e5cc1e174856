"""Published models, one row each: networks, conditions, noise and sampling.

A row has the values of its authors' configuration, in the form of our config sections. `configs/`
adds the training options; `interop` uses the values that the tensors of a file do not determine.
The sources are the repositories and files named in the rows, papers and model cards. Parameter
counts are those of the original code.
"""

from dataclasses import dataclass
from typing import Any

from ldm_jax.published.autoencoders import (
    AUTOENCODERS,
    LDM,
    PIXELS,
    RUNWAY,
    SD,
    SD2,
    SGM,
    Autoencoder,
    Section,
)

ADM = "openai/guided-diffusion: README.md, the flags of "


@dataclass(frozen=True)
class Model:
    """A diffusion model.

    Attributes:
      title: for messages; models that a file does not distinguish share one.
      unet: section `unet`.
      autoencoder: of its latents.
      conditions: section `conditioning`.
      noise: section `diffusion`.
      sampling: section `sampling`, as in the authors' scripts.
      networks: parameters of the UNet and of each network in `conditions`, by name.
      source: repository, and configuration in it.
      size: pixels per side.
      learn_sigma: whether the file's UNet also predicts a variance, in as many further channels
        after the `out_channels` of `unet`.
      new_attention_order: whether the file's `qkv` are ordered q, k, v first, then heads.
    """

    title: str
    unet: Section
    autoencoder: Autoencoder
    conditions: dict[str, Section]
    noise: Section
    sampling: Section
    networks: dict[str, int]
    source: str
    size: int = 256
    learn_sigma: bool = False
    new_attention_order: bool = False

    @property
    def heads(self) -> Section:
        """The UNet's field for the heads of attention."""
        name = "num_head_channels" if self.unet.get("num_head_channels", -1) > 0 else "num_heads"
        return {name: self.unet[name]}

    @property
    def parameters(self) -> int:
        """Of all networks."""
        return sum(self.networks.values()) + self.autoencoder.parameters


VQ_F4, SD_VAE, XL_VAE = (AUTOENCODERS[name] for name in ("vq-f4", "sd-vae", "sdxl-vae"))


# Denoisers. `attention` are down-sampling factors of the latents, not their sizes.
def unet(
    channels: int, width: int, mult: tuple, attention: tuple, *, beside: int = 0, **fields: Any
) -> Section:
    shape = dict(in_channels=channels + beside, out_channels=channels, model_channels=width)
    levels = dict(channel_mult=mult, num_res_blocks=2, attention_resolutions=attention)
    return shape | levels | fields


HEADS_OF_32, HEADS_OF_64 = dict(num_head_channels=32), dict(num_head_channels=64)
FACES = unet(3, 224, (1, 2, 3, 4), (8, 4, 2), **HEADS_OF_32)
RESAMPLING_BLOCKS = dict(use_scale_shift_norm=True, resblock_updown=True)
CHURCHES = unet(4, 192, (1, 2, 2, 4, 4), (1, 2, 4, 8), num_heads=8, **RESAMPLING_BLOCKS)
CIN = unet(4, 256, (1, 2, 4), (4, 2, 1), context_dim=512, **HEADS_OF_32)
# One head, of 384, 576 and 960 channels.
CIN_V2 = unet(3, 192, (1, 2, 3, 5), (8, 4, 2), context_dim=512, num_heads=1)
CAPTIONS = unet(3, 192, (1, 2, 3, 5), (8, 4, 2), context_dim=640, **HEADS_OF_32)
LAYOUT = unet(3, 128, (1, 2, 3, 4), (8, 4, 2), context_dim=512, **HEADS_OF_32)
LAYOUT |= dict(transformer_depth=3)
# Meant as sizes, so these factors are never reached; attention is only in the middle.
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
TRANSFORMERS = dict(use_spatial_transformer=True, num_classes="sequential")
SDXL = unet(4, 320, (1, 2, 4), (4, 2), context_dim=2048, adm_in_channels=2816, **TRANSFORMERS)
SDXL |= HEADS_OF_64 | dict(transformer_depth=(1, 2, 10), use_linear_in_transformer=True)
REFINER = SDXL | dict(model_channels=384, channel_mult=(1, 2, 4, 4), transformer_depth=4)
REFINER |= dict(context_dim=1280, adm_in_channels=2560)
IMAGENET = unet(4, 256, (1, 2, 4), (1, 2, 4), context_dim=1024, adm_in_channels=1024)
IMAGENET |= TRANSFORMERS | HEADS_OF_64
CLIPL = STABLE_1 | dict(adm_in_channels=1792) | TRANSFORMERS | HEADS_OF_64
TOY = unet(1, 32, (1, 2, 2), (), use_spatial_transformer=True, **HEADS_OF_32)
TOY |= dict(num_res_blocks=4)
TOY_OF_CLASSES = TOY | dict(num_classes="sequential", adm_in_channels=128)
RGB = dict(in_channels=3, out_channels=3)


def adm(width: int, mult: tuple, attention: tuple, **fields: Any) -> Section:
    return unet(3, width, mult, attention, **RESAMPLING_BLOCKS | HEADS_OF_64 | fields)


# Guided diffusion, of pixels. Attention is at 32, 16 and 8 pixels a side.
OF_CLASSES = dict(num_classes=1000)
ADM_64 = adm(192, (1, 2, 3, 4), (2, 4, 8), num_res_blocks=3, dropout=0.1, **OF_CLASSES)
ADM_128 = adm(256, (1, 1, 2, 3, 4), (4, 8, 16), num_heads=4, num_head_channels=-1, **OF_CLASSES)
ADM_256 = adm(256, (1, 1, 2, 2, 4, 4), (8, 16, 32))
ADM_512 = adm(256, (0.5, 1, 1, 2, 2, 4, 4), (16, 32, 64), **OF_CLASSES)
ADM_UP_256 = ADM_256 | OF_CLASSES | dict(model_channels=192, in_channels=3 + 3)
ADM_UP_512 = ADM_UP_256 | dict(attention_resolutions=(16, 32))
ADM_UP_256 |= dict(num_heads=4, num_head_channels=-1)


# Conditions.
def bert(width: int, depth: int) -> dict[str, Section]:
    network = dict(width=width, depth=depth, heads=8, head_dim=64, max_length=77)
    return {"text": text("bert", network)}


def text(kind: str, network: Section, **section: Any) -> Section:
    """The section of a text encoder: LDM's ("bert"), CLIP's, or OpenCLIP's, padded with zeros."""
    if kind == "bert":
        return dict(kind="text", vocabulary="bert", dropout=0.1, network=network) | section
    padding = dict(padding="end" if kind == "clip" else "zero")
    return dict(kind="clip", vocabulary="clip", dropout=0.1, network=network) | padding | section


def clip_network(width: int, depth: int, heads: int, activation: str, **fields: Any) -> Section:
    size = dict(vocab_size=49408, width=width, depth=depth, heads=heads, max_length=77)
    output = dict(activation=activation, projection=None, layer="last", final_norm=True, eos=None)
    return size | output | fields


def label(classes: int, width: int, **section: Any) -> dict[str, Section]:
    network = dict(n_classes=classes, embed_dim=width)
    return {"label": dict(kind="class", null=None, dropout=0.0, network=network) | section}


def sizes(*fields: str, dropout: float = 0.0, **section: Any) -> Section:
    return dict(kind="sizes", fields=fields, dropout=dropout, **section)


def array(output: str, *shape: int | None, dropout: float = 0.0, **section: Any) -> Section:
    """The section of an array of the caller."""
    return dict(kind="array", output=output, shape=shape, dropout=dropout, **section)


def embedding(width: int) -> dict[str, Section]:
    """CLIP's embedding of a picture, with noise, and the sinusoids of the noise level (unCLIP)."""
    return {"image_embedding": array("vector", width, dropout=0.25)}


def masked_image(channels: int, mask_first: bool, hole: float, mask_range: tuple) -> Section:
    fields = dict(channels=channels, mask_first=mask_first, hole=hole, mask_range=mask_range)
    return dict(kind="masked_image", dropout=0.0, **fields)


def sgm_sizes(dropout: float) -> dict[str, Section]:
    """Sizes that are dropped individually, to 0; in the original the sinusoids become 0."""
    return {field: sizes(field, dropout=dropout) for field in ("original_size", "crop")}


# SDXL: both encoders' hidden states without the last norm, and the pooled one of the larger.
HIDDEN = dict(layer="penultimate", final_norm=False)
VIT_L, VIT_H = (768, 12, 12, "quick_gelu"), (1024, 23, 16, "gelu")
CLIP_L = {"text": text("clip", clip_network(*VIT_L))}
CLIP_L_POOLED = {"text": text("clip", clip_network(*VIT_L), pooled=True)}
OPENCLIP_H = {"text": text("openclip", clip_network(*VIT_H))}  # 24 blocks; the last is never used
BIGG = clip_network(1280, 32, 20, "gelu", projection=1280, **HIDDEN)
# Without a prompt, the base model's input is zeros, the refiner's an empty prompt.
BASE = {
    "text": text("clip", clip_network(*VIT_L, **HIDDEN), zero_null=True),
    "text_2": text("openclip", BIGG, pooled=True, zero_null=True),
    "sizes": sizes("original_size", "crop", "target_size"),
}
REFINED = {
    "text_2": text("openclip", BIGG, pooled=True),
    "sizes": sizes("original_size", "crop", "aesthetic_score"),
}
IMAGENET_CLASS = label(1000, 1024, dropout=0.2, zero_null=True)
TOY_CLASS = label(10, 128, dropout=0.2, zero_null=True, output="vector")
STABLE_MASK = {"masked_image": masked_image(4, True, 0.0, (0, 1))}
LDM_MASK = {"masked_image": masked_image(3, False, -1.0, (-1, 1))}
# Inverse depth, each picture's from -1 to 1:
DEPTH = {"depth": array("concat", None, None, 1)}
LOW_RESOLUTION = {"low_resolution": array("concat", None, None, 3)}
# A picture with the noise of a timestep below 350 of "linear" from 0.0001 to 0.02, and that number:
UPSCALED = LOW_RESOLUTION | {"noise_level": array("vector")}
# CLIP ViT-L/14's embeddings, of unit length, of the prompt and of pictures near it:
NEIGHBOURS = {"neighbours": array("context", None, 768, dropout=0.1)}
RESCALER = dict(kind="rescaler", n_stages=2, out_channels=3)
SEGMENTATION = {"segmentation": array("concat", None, None, 182, network=RESCALER)}
TOKENS = dict(kind="transformer", vocab_size=8192, width=512, depth=16, heads=8, head_dim=64)
BOXES = {"boxes": array("context", 92, network=TOKENS | dict(max_length=92))}
CLASS_NUMBER = {"label": array("vector")}
UPSAMPLED = LOW_RESOLUTION | CLASS_NUMBER  # to the size that is drawn, bilinearly

# Noise. LDM's samplers use the first grid, SGM's the second, guided diffusion's the third.
LEADING, TRAILING = dict(spacing="leading", offset=1, end="first"), dict(spacing="trailing")
LINSPACE = dict(spacing="linspace")


def noise(
    start: float, end: float, parameterization: str = "eps", grid: Section = LEADING, **table: Any
) -> Section:
    table = dict(name="linear", timesteps=1000, start=start, end=end) | table
    schedule = table | dict(zero_terminal_snr=False)
    return dict(schedule=schedule, parameterization=parameterization, sigma_data=0.5, **grid)


LDM_NOISE, WIDE_NOISE = noise(0.0015, 0.0195), noise(0.0015, 0.0205)
NARROW_NOISE, RDM_NOISE = noise(0.0015, 0.0155), noise(0.0015, 0.015)
SD_NOISE, SD_V_NOISE = noise(0.00085, 0.012), noise(0.00085, 0.012, "v")
UPSCALER_NOISE, SGM_NOISE = noise(0.0001, 0.02, "v"), noise(0.00085, 0.012, grid=TRAILING)
DDPM_NOISE = noise(0.0001, 0.02, grid=LINSPACE, name="sqrt_linear")
COSINE_NOISE = noise(0.0001, 0.02, grid=LINSPACE, name="cosine")
EDM_NOISE = dict(
    schedule=dict(name="edm", sigma_min=0.002, sigma_max=80.0),
    parameterization="edm",
    spacing="karras",
    sigma_data=1.0,
)


def ddim(steps: int, guidance: float = 1.0, eta: float = 0.0) -> Section:
    return dict(sampler="ddim", steps=steps, guidance=guidance, eta=eta)


def euler(steps: int, guidance: float = 1.0) -> Section:
    return dict(sampler="euler", steps=steps, guidance=guidance, eta=0.0)


def guided(
    what: str, unet: Section, conditions: dict[str, Section], count: int, file: str, **more: Any
) -> Model:
    """A pixel model of guided diffusion. Its variance is left out, and so not counted."""
    more = dict(noise=DDPM_NOISE, sampling=ddim(250, eta=1.0), learn_sigma=True) | more
    title = f"guided diffusion (Dhariwal & Nichol 2021), {what}"
    return Model(
        title, unet, PIXELS, conditions, networks=dict(unet=count), source=ADM + file, **more
    )


L_SIZE, H_SIZE, BIGG_SIZE = dict(text=123_060_480), dict(text=340_387_840), dict(text_2=694_659_840)
CFG, RELEASED = LDM + "configs/latent-diffusion/", LDM + "models/ldm/"
PLAIN_LDM = "latent diffusion without a condition (celeba256, ffhq256, lsun_beds256)"
SMALL = "one of SGM's toys"
# fmt: off
MODELS = {
    # Title, UNet, first stage, conditions, noise, sampling, parameters, source.
    "celeba256": Model(PLAIN_LDM, FACES, VQ_F4, {}, LDM_NOISE, ddim(200),
        dict(unet=274_056_163), RELEASED + "celeba256"),
    "ffhq256": Model(PLAIN_LDM, FACES, VQ_F4, {}, LDM_NOISE, ddim(200, eta=1.0),
        dict(unet=274_056_163), RELEASED + "ffhq256"),
    "lsun_beds256": Model(PLAIN_LDM, FACES, VQ_F4, {}, LDM_NOISE, ddim(200, eta=1.0),
        dict(unet=274_056_163), RELEASED + "lsun_beds256"),
    # Its scale_factor was measured on the first batch, and is in the released file.
    "lsun_churches256": Model("latent diffusion lsun_churches256",
        CHURCHES, AUTOENCODERS["kl-f8"], {}, NARROW_NOISE, ddim(400),
        dict(unet=294_966_916), RELEASED + "lsun_churches256"),
    "cin256": Model("latent diffusion cin256",
        CIN, AUTOENCODERS["vq-f8"], label(1000, 512), LDM_NOISE, ddim(200, eta=1.0),
        dict(unet=394_984_196, label=512_000), RELEASED + "cin256"),
    "cin256-v2": Model("latent diffusion cin256-v2",
        CIN_V2, VQ_F4, label(1001, 512, dropout=0.1, null=1000), LDM_NOISE, ddim(20, 3.0),
        dict(unet=400_920_579, label=512_512), CFG + "cin256-v2.yaml"),
    "text2img256": Model("latent diffusion text2img256",
        CAPTIONS, VQ_F4, bert(640, 32), LDM_NOISE, ddim(100),
        dict(unet=403_623_939, text=166_590_080), RELEASED + "text2img256"),
    "txt2img-1p4B": Model("latent diffusion txt2img-1p4B",
        STABLE | dict(context_dim=1280), SD_VAE, bert(1280, 32), SD_NOISE, ddim(200, 5.0),
        dict(unet=872_300_484, text=542_895_360), CFG + "txt2img-1p4B-eval.yaml"),
    "layout2img-openimages256": Model("latent diffusion layout2img-openimages256",
        LAYOUT, VQ_F4, BOXES, WIDE_NOISE, ddim(200),
        dict(unet=246_277_379, boxes=54_656_000), RELEASED + "layout2img-openimages256"),
    "semantic_synthesis256": Model("latent diffusion semantic_synthesis",
        SEMANTIC, VQ_F4, SEGMENTATION, WIDE_NOISE, ddim(200),
        dict(unet=215_229_315, segmentation=546), RELEASED + "semantic_synthesis256"),
    "semantic_synthesis512": Model("latent diffusion semantic_synthesis",
        SEMANTIC, VQ_F4, SEGMENTATION, WIDE_NOISE, ddim(200),
        dict(unet=215_229_315, segmentation=546), RELEASED + "semantic_synthesis512", size=512),
    "bsr_sr": Model("latent diffusion bsr_sr (×4)",
        BSR_SR, VQ_F4, LOW_RESOLUTION, NARROW_NOISE, ddim(100, eta=1.0),
        dict(unet=113_622_563), RELEASED + "bsr_sr"),
    "inpainting_big": Model("latent diffusion inpainting_big",
        INPAINTING_BIG, AUTOENCODERS["vq-f4-noattn"], LDM_MASK, WIDE_NOISE, ddim(50),
        dict(unet=387_245_827), RELEASED + "inpainting_big"),
    "rdm768": Model("retrieval-augmented diffusion 768",
        RDM, AUTOENCODERS["kl-f16"].but(scale_factor=0.22765929), NEIGHBOURS, RDM_NOISE,
        ddim(50, 5.0), dict(unet=1_335_480_400),
        LDM + "configs/retrieval-augmented-diffusion/768x768.yaml", size=768),
    "sd1": Model("Stable Diffusion 1", STABLE_1, SD_VAE, CLIP_L, SD_NOISE, ddim(50, 7.5),
        dict(unet=859_520_964) | L_SIZE, SD + "v1-inference.yaml", size=512),
    "sd1-inpainting": Model("Stable Diffusion 1 inpainting",
        STABLE_1 | WITH_MASK, SD_VAE, CLIP_L | STABLE_MASK, SD_NOISE, ddim(50, 7.5, 1.0),
        dict(unet=859_535_364) | L_SIZE, RUNWAY + "v1-inpainting-inference.yaml", size=512),
    "sd2": Model("Stable Diffusion 2", STABLE_2, SD_VAE, OPENCLIP_H, SD_NOISE, ddim(50, 9.0),
        dict(unet=865_910_724) | H_SIZE, SD2 + "v2-inference.yaml", size=512),
    "sd2-v": Model("Stable Diffusion 2, v-prediction",
        STABLE_2, SD_VAE, OPENCLIP_H, SD_V_NOISE, ddim(50, 9.0),
        dict(unet=865_910_724) | H_SIZE, SD2 + "v2-inference-v.yaml", size=768),
    "sd2-inpainting": Model("Stable Diffusion 2 inpainting",
        STABLE_2 | WITH_MASK, SD_VAE, OPENCLIP_H | STABLE_MASK, SD_NOISE, ddim(50, 10.0),
        dict(unet=865_925_124) | H_SIZE, SD2 + "v2-inpainting-inference.yaml", size=512),
    "sd2-depth": Model("Stable Diffusion 2 depth",
        STABLE_2 | WITH_DEPTH, SD_VAE, OPENCLIP_H | DEPTH, SD_NOISE, ddim(50, 9.0),
        dict(unet=865_913_604) | H_SIZE, SD2 + "v2-midas-inference.yaml", size=512),
    "sd2-unclip-h": Model("Stable unCLIP 2.1",
        UNCLIP_H, SD_VAE, OPENCLIP_H | embedding(2048), SD_V_NOISE, ddim(20, 10.0),
        dict(unet=870_173_124) | H_SIZE,
        SD2 + "v2-1-stable-unclip-h-inference.yaml", size=768),
    "sd2-unclip-l": Model("Stable unCLIP 2.1",
        UNCLIP_L, SD_VAE, OPENCLIP_H | embedding(1536), SD_V_NOISE, ddim(20, 10.0),
        dict(unet=869_517_764) | H_SIZE,
        SD2 + "v2-1-stable-unclip-l-inference.yaml", size=768),
    "sd2-upscaler": Model("Stable Diffusion 2 upscaler (×4)",
        UPSCALER, AUTOENCODERS["sd2-upscaler-vae"], OPENCLIP_H | UPSCALED, UPSCALER_NOISE,
        ddim(50, 9.0), dict(unet=473_398_020) | H_SIZE,
        SD2 + "x4-upscaling.yaml", size=512),
    "sdxl-base": Model("Stable Diffusion XL base", SDXL, XL_VAE, BASE, SGM_NOISE, euler(50, 5.0),
        dict(unet=2_567_463_684) | L_SIZE | BIGG_SIZE,
        SGM + "inference/sd_xl_base.yaml", size=1024),
    "sdxl-refiner": Model("Stable Diffusion XL refiner",
        REFINER, XL_VAE, REFINED, SGM_NOISE, euler(50, 5.0),
        dict(unet=2_259_526_660) | BIGG_SIZE, SGM + "inference/sd_xl_refiner.yaml", size=1024),
    "sgm-imagenet-f8_cond": Model("SGM's example imagenet-f8_cond",
        IMAGENET, XL_VAE, IMAGENET_CLASS | sgm_sizes(0.2), SGM_NOISE, euler(50, 5.0),
        dict(unet=407_307_012, label=1_024_000), SGM + "example_training/imagenet-f8_cond.yaml"),
    "sgm-txt2img-clipl": Model("SGM's example txt2img-clipl",
        CLIPL, XL_VAE, CLIP_L_POOLED | sgm_sizes(0.1), SGM_NOISE, euler(50, 7.5),
        dict(unet=863_455_684) | L_SIZE, SGM + "example_training/txt2img-clipl.yaml"),
    "sgm-mnist": Model(SMALL, TOY, PIXELS.but(in_channels=1), {}, EDM_NOISE, euler(50),
        dict(unet=2_567_681), SGM + "example_training/toy/mnist.yaml", size=28),
    "sgm-mnist_cond": Model(SMALL, TOY_OF_CLASSES, PIXELS.but(in_channels=1), TOY_CLASS, EDM_NOISE,
        euler(50, 3.0), dict(unet=2_600_705, label=1280),
        SGM + "example_training/toy/mnist_cond.yaml", size=28),
    "sgm-cifar10_cond": Model(SMALL, TOY_OF_CLASSES | RGB, PIXELS, TOY_CLASS, EDM_NOISE,
        euler(50, 3.0), dict(unet=2_601_859, label=1280),
        SGM + "example_training/toy/cifar10_cond.yaml", size=32),
    "adm-64": guided("64×64", ADM_64, CLASS_NUMBER, 295_899_267, "64x64_diffusion.pt",
        size=64, noise=COSINE_NOISE, new_attention_order=True),
    "adm-128": guided("128×128", ADM_128, CLASS_NUMBER, 421_522_691, "128x128_diffusion.pt",
        size=128),
    "adm-256": guided("256×256", ADM_256 | OF_CLASSES, CLASS_NUMBER, 553_831_171,
        "256x256_diffusion.pt"),
    # Of ImageNet, and LSUN's bedrooms, cats and horses.
    "adm-256-uncond": guided("256×256, unconditional", ADM_256, {}, 552_807_171,
        "256x256_diffusion_uncond.pt"),
    "adm-512": guided("512×512", ADM_512, CLASS_NUMBER, 558_994_179, "512x512_diffusion.pt",
        size=512),
    "adm-64-256": guided("64×64 → 256×256", ADM_UP_256, UPSAMPLED, 311_790_723,
        "64_256_upsampler.pt"),
    "adm-128-512": guided("128×128 → 512×512", ADM_UP_512, UPSAMPLED, 308_830_083,
        "128_512_upsampler.pt", size=512),
}
# fmt: on
# Models that a recipe trains and no file is released of, so that none is recognised.
RECIPES = {
    # As Stable Diffusion 2 at 512 pixels, but for the prediction, the groups of the UNet's norms
    # and the captions, which are never dropped. Its evaluation guides with 8 all the same; our
    # pipelines refuse a scale with which a model was not trained.
    "mlperf_sd2": Model(
        "Stable Diffusion 2 of MLPerf Training",
        STABLE_2 | dict(groups=16),
        SD_VAE,
        {"text": text("openclip", clip_network(*VIT_H), dropout=0.0)},
        SD_V_NOISE,
        ddim(50),
        dict(unet=865_910_724) | H_SIZE,
        "mlcommons/training: retired_benchmarks/stable_diffusion/configs/train_01x08x08.yaml",
        size=512,
    ),
}
