"""How large the networks are that others released, and their fields, from `configs/published.py`.

Millions of parameters and number of tensors of each variant's networks are what the reference code
gives for the released configuration (CompVis' latent-diffusion a506df5, Stability's
stablediffusion cf1d67a and generative-models 0ad7de9, built without memory on torch's meta device;
transformers 5.23.0; open_clip 3.3.0 for the larger of SDXL's text encoders, less the two tensors of
its attention that are six here), and what ldm-facts §2 lists, which leaves out only the rows marked
†. A tensor there is a leaf here, so nothing needs care: the codebook is one, each quant_conv a
kernel and a bias, the label's embedding one (or 4 if "sequential"). The loss network of an
autoencoder is not counted.
"""

import importlib.util
from pathlib import Path

import ldm_jax
from ldm_jax.training.workdir import config_dict

UNET_SIZES = {
    "celeba256": (274.06, 368),
    "ffhq256": (274.06, 368),
    "lsun_beds256": (274.06, 368),
    "lsun_churches256": (294.97, 520),
    "cin256": (394.98, 626),
    "cin256-v2": (400.92, 688),
    "text2img256": (403.62, 688),
    "txt2img-1p4B": (872.30, 686),
    "layout2img-openimages256": (246.28, 1328),
    "semantic_synthesis256": (215.23, 216),
    "semantic_synthesis512": (215.23, 216),
    "bsr_sr": (113.62, 306),
    "inpainting_big": (387.25, 416),
    "rdm768": (1335.48, 688),
    "sd1": (859.52, 686),
    "sd1-inpainting": (859.54, 686),
    "sd2": (865.91, 686),
    "sd2-v": (865.91, 686),
    "sd2-inpainting": (865.93, 686),
    "sd2-depth": (865.91, 686),
    "sd2-unclip-h": (870.17, 690),
    "sd2-unclip-l": (869.52, 690),
    "sd2-upscaler": (473.40, 687),
    "sdxl-base": (2567.46, 1680),
    "sdxl-refiner": (2259.53, 1220),
    "sgm-imagenet-f8_cond": (407.307, 630),  # †
    "sgm-txt2img-clipl": (863.456, 690),  # †
    "sgm-mnist": (2.568, 366),  # †
    "sgm-mnist_cond": (2.601, 370),  # †
    "sgm-cifar10_cond": (2.602, 370),  # †
}
AUTOENCODER_SIZES = {
    "kl-f4": (55.31, 204),
    "kl-f8": (83.65, 248),
    "kl-f16": (69.61, 342),
    "kl-f32": (103.88, 436),
    "vq-f4": (55.32, 205),
    "vq-f4-noattn": (53.22, 185),
    "vq-f8": (67.72, 299),
    "vq-f8-n256": (67.65, 299),
    "vq-f16": (69.59, 343),
    "sd-vae": (83.65, 248),
    "sdxl-vae": (83.65, 248),
    "sd2-upscaler-vae": (55.326, 204),  # †
    "taesd": (2.445, 134),  # †
    "sgm-imagenet-attnfree-logvar": (78.017, 276),  # †
    "sgm-imagenet-kl_f8_8chn": (83.709, 244),  # †
}
CLIP_L, OPENCLIP_H, BIGG = (123.060, 196), (340.388, 372), (694.660, 517)
# The networks of `conditioning`, by section. A table of classes is classes × width.
CONDITIONER_SIZES = {
    "cin256": {"label": (0.512, 1)},
    "cin256-v2": {"label": (0.512512, 1)},
    "text2img256": {"text": (166.59, 420)},
    "txt2img-1p4B": {"text": (542.90, 420)},
    "layout2img-openimages256": {"boxes": (54.66, 212)},
    "semantic_synthesis256": {"segmentation": (182 * 3 / 1e6, 1)},
    "semantic_synthesis512": {"segmentation": (182 * 3 / 1e6, 1)},
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
    "sgm-imagenet-f8_cond": {"label": (1.024, 1)},
    "sgm-txt2img-clipl": {"text": CLIP_L},
    "sgm-mnist_cond": {"label": (0.00128, 1)},
    "sgm-cifar10_cond": {"label": (0.00128, 1)},
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
