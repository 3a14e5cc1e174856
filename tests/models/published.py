"""How many tensors the networks have that others released, and our configs of them.

With the numbers of parameters in `ldm_jax.published`, to 0.01 million, they are what the reference
code gives for the released configuration (CompVis' latent-diffusion a506df5, Stability's
stablediffusion cf1d67a and generative-models 0ad7de9, OpenAI's guided-diffusion 22e0df8, built
without memory on torch's meta device; transformers 5.23.0; open_clip 3.3.0 for the larger of SDXL's
text encoders, less the two tensors of its attention that are six here). A tensor there is a leaf
here: the codebook is one, each quant_conv a kernel and a bias, the label's embedding one (or 4 if
"sequential"). The loss network of an autoencoder is not counted.
"""

import importlib.util
from pathlib import Path

import ldm_jax
from ldm_jax.training.workdir import config_dict

UNET_TENSORS = {
    "celeba256": 368,
    "ffhq256": 368,
    "lsun_beds256": 368,
    "lsun_churches256": 520,
    "cin256": 626,
    "cin256-v2": 688,
    "text2img256": 688,
    "txt2img-1p4B": 686,
    "layout2img-openimages256": 1328,
    "semantic_synthesis256": 216,
    "semantic_synthesis512": 216,
    "bsr_sr": 306,
    "inpainting_big": 416,
    "rdm768": 688,
    "sd1": 686,
    "sd1-inpainting": 686,
    "sd2": 686,
    "sd2-v": 686,
    "sd2-inpainting": 686,
    "sd2-depth": 686,
    "sd2-unclip-h": 690,
    "sd2-unclip-l": 690,
    "sd2-upscaler": 687,
    "sdxl-base": 1680,
    "sdxl-refiner": 1220,
    "sgm-imagenet-f8_cond": 630,
    "sgm-txt2img-clipl": 690,
    "sgm-mnist": 366,
    "sgm-mnist_cond": 370,
    "sgm-cifar10_cond": 370,
    "adm-64": 541,
    "adm-128": 493,
    "adm-256": 567,
    "adm-256-uncond": 566,
    "adm-512": 645,
    "adm-64-256": 567,
    "adm-128-512": 537,
}
# Guided diffusion's parameters with those of the learned variance.
WITH_VARIANCE = {
    "adm-64": 295_904_454,
    "adm-128": 421_529_606,
    "adm-256": 553_838_086,
    "adm-256-uncond": 552_814_086,
    "adm-512": 558_997_638,
    "adm-64-256": 311_795_910,
    "adm-128-512": 308_835_270,
}
AUTOENCODER_TENSORS = {
    "kl-f4": 204,
    "kl-f8": 248,
    "kl-f16": 342,
    "kl-f32": 436,
    "vq-f4": 205,
    "vq-f4-noattn": 185,
    "vq-f8": 299,
    "vq-f8-n256": 299,
    "vq-f16": 343,
    "sd-vae": 248,
    "sdxl-vae": 248,
    "sd2-upscaler-vae": 204,
    "taesd": 134,
    "sgm-imagenet-attnfree-logvar": 276,
    "sgm-imagenet-kl_f8_8chn": 244,
}
CLIP_L, OPENCLIP_H, BIGG = 196, 372, 517
# The networks of `conditioning`, by section.
CONDITIONER_TENSORS = {
    "cin256": {"label": 1},
    "cin256-v2": {"label": 1},
    "text2img256": {"text": 420},
    "txt2img-1p4B": {"text": 420},
    "layout2img-openimages256": {"boxes": 212},
    "semantic_synthesis256": {"segmentation": 1},
    "semantic_synthesis512": {"segmentation": 1},
    "sd1": {"text": CLIP_L},
    "sd1-inpainting": {"text": CLIP_L},
    "sd2": {"text": OPENCLIP_H},
    "sd2-v": {"text": OPENCLIP_H},
    "sd2-inpainting": {"text": OPENCLIP_H},
    "sd2-depth": {"text": OPENCLIP_H},
    "sd2-unclip-h": {"text": OPENCLIP_H},
    "sd2-unclip-l": {"text": OPENCLIP_H},
    "sd2-upscaler": {"text": OPENCLIP_H},
    "sdxl-base": {"text": CLIP_L, "text_2": BIGG},
    "sdxl-refiner": {"text_2": BIGG},
    "sgm-imagenet-f8_cond": {"label": 1},
    "sgm-txt2img-clipl": {"text": CLIP_L},
    "sgm-mnist_cond": {"label": 1},
    "sgm-cifar10_cond": {"label": 1},
}


def config_file(path):
    """A file of `configs/` as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CONFIGS = config_file(Path(ldm_jax.__file__).parents[1] / "configs" / "published.py")


def published(variant: str) -> dict:
    """The config of a variant as plain values, as files carry it: lists, no tuples."""
    return config_dict(CONFIGS.get_config(variant))
