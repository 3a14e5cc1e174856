"""Every config that trains a model, at reduced width, and data that feeds it."""

import json
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from PIL import Image, ImageFilter

from ldm_jax.interop.native import save_model
from tests.models.published import CONFIGS, config_file
from tests.test_configs import widths
from tests.tiny_models import random_params

SIZE = 64
OWN = ("autoencoder", "txt2img", "class2img", "unconditional")
OWN += ("inpaint", "superres", "semantic", "layout")


def names(root: Path) -> list[str]:
    """Every variant of every config, "file:variant"; fine-tuning has a test of its own."""
    own = {name: config_file(root / "configs" / f"{name}.py").VARIANTS for name in OWN}
    own["published"] = CONFIGS.VARIANTS
    return [f"{name}:{variant}" for name, variants in own.items() for variant in variants]


def photographs(folder: Path, count: int = 24) -> Path:
    """Blurred noise of several sizes with captions and all that conditions read beside them."""
    rng = np.random.default_rng(0)
    for i in range(count):
        height, width = 80 + 8 * (i % 5), 100
        path = folder / ("rose" if i % 2 else "tulip") / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        noise.filter(ImageFilter.GaussianBlur(4)).save(path)
        path.with_suffix(".txt").write_text(f"a picture of number {i}")
        for name in ("segmentation", "depth"):
            grey = Image.fromarray(rng.integers(0, 182, (height, width), np.uint8))
            grey.save(path.with_suffix(f".{name}.png"))
        objects = [{"category_id": k, "bbox": [10 * k, 5, 40, 50]} for k in range(3)]
        path.with_suffix(".boxes.json").write_text(json.dumps(objects))
        np.save(path.with_suffix(".image_embedding.npy"), rng.standard_normal(32, np.float32))
        np.save(path.with_suffix(".neighbours.npy"), rng.standard_normal((4, 32), np.float32))
    return folder


def reduced(config: ml_collections.ConfigDict, pictures: Path, workdir: Path) -> Any:
    """The config with its structure and narrow networks, for two steps on `pictures`."""
    config = config.copy_and_resolve_references()
    config.data.update(classes=(), min_size=0, image_size=SIZE)
    if "scenes" in config.data.source:
        config.data.scenes.held_out_scenes = 8
        if config.get("latents") == "memory":
            config.data.scenes.train_scenes = 16
    else:
        config.data.update(source="folder", path=str(pictures), held_out=0.2)
    config.train.update(steps=2, batch_size=8, log_every=1, preview_every=2, checkpoint_every=2)
    if "autoencoder" in config:
        _narrow_autoencoder(config.autoencoder)
    if config.task == "autoencoder":
        config.discriminator.update(ndf=8)
        config.loss.update(disc_start=1)
        if config.trainable != (".*",):  # the decoder alone, of a trained autoencoder
            section = config.autoencoder.to_dict() | {"scale_factor": 1.0}
            whole = {"task": "autoencoder", "autoencoder": section}
            config.init_from = str(workdir / "start.safetensors")
            save_model(config.init_from, whole, random_params(whole))
        return config
    for section in config.conditioning.values():
        _narrow_condition(section)
    _narrow_unet(config)
    config.sampling.steps = 2
    if "labels" in config.sampling:
        config.sampling.labels = ()
    if "autoencoder" in config and config.autoencoder.get("kind") != "identity":
        whole = json.loads(config.to_json()) | {"image_size": SIZE}
        path = workdir / "start.safetensors"
        save_model(path, whole, random_params(whole))
        config.first_stage = str(path)
        if config.trainable != (".*",):
            config.init_from = str(path)
    else:
        config.init_from, config.init_networks = "", ()  # the bundled model is wider
    return config


def _narrow_autoencoder(section):
    if section.get("kind") in ("identity", "tiny"):
        return
    section.update(ch=8, groups=4, num_res_blocks=1)
    for key, value in dict(n_embed=16, attn_resolutions=()).items():
        if key in section:
            section[key] = value


def _narrow_condition(section):
    network = section.get("network", {})
    kind = network.get("kind", section.kind)
    if kind in ("text", "transformer"):
        network.update(width=32, depth=1, heads=2)
    elif kind == "clip":
        network.update(width=32, depth=2, heads=2)
        if network.get("projection"):
            network.projection = 32
    elif kind == "class":
        network.embed_dim = 32
    elif kind == "array" and not network and len(section.shape) < 3 and section.shape:
        section.shape = (*section.shape[:-1], 32)


def _narrow_unet(config):
    unet = config.unet
    levels = len(unet.channel_mult[:2])
    unet.update(channel_mult=unet.channel_mult[:2], model_channels=32, num_res_blocks=1)
    unet.update(groups=8, attention_resolutions=tuple(unet.attention_resolutions))
    for key in ("transformer_depth", "disable_self_attentions"):
        if isinstance(unet.get(key), tuple):
            unet[key] = tuple(min(value, 1) for value in unet[key][:levels])
    if isinstance(unet.get("transformer_depth"), int):
        unet.transformer_depth = 1
    if "num_head_channels" in unet:
        unet.num_head_channels = 16
    told = [widths(json.loads(section.to_json())) for section in config.conditioning.values()]
    if unet.get("context_dim"):
        unet.context_dim = sum(part.get("context", 0) for part in told)
    if unet.get("adm_in_channels"):
        unet.adm_in_channels = sum(part.get("vector", 0) for part in told)
