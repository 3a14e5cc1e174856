"""IP-Adapters against diffusers': tokens of pictures, and whole pictures of both pipelines.

Weights are random and networks tiny; files have the original's names, plain and Plus. Tokens agree
to 1e-5 of the largest, and images, of the same pixels for the image encoder, to 2e-5.
"""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import ldm_jax
from ldm_jax.interop import diffusers as folders
from ldm_jax.models.ip_adapter import make_ip_adapter
from ldm_jax.pictures import CLIP_STD
from tests.interop.systems import random_params, system

STEPS, SIDE, PROMPT, NEGATIVE = 6, 32, "a red apple on a table", "blurry"
SIZE = dict(height=SIDE, width=SIDE)
PICTURE = np.random.default_rng(1).integers(0, 256, (40, 56, 3), np.uint8)
SYSTEMS = ["stable-diffusion-1", "stable-diffusion-xl-base"]


def drawn(draws, *shape):
    return torch.from_numpy(draws.standard_normal(shape, np.float32) / shape[-1] ** 0.5)


def saved_encoder(path):
    """A tiny CLIPVisionModelWithProjection: 32 wide, embeddings of 48."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        image_size=28, patch_size=14, projection_dim=48, hidden_act="gelu",
    )  # fmt: skip
    model = CLIPVisionModelWithProjection(config).eval()
    for leaf in model.parameters():
        if leaf.ndim > 1:
            torch.nn.init.normal_(leaf, std=leaf[0].numel() ** -0.5)
    model.save_pretrained(path)
    return model


def saved_adapter(unet, path, plus, seed=0):
    """A random file of the original's layout, for a UNet of diffusers."""
    draws, width = np.random.default_rng(seed), unet.config.cross_attention_dim
    tensors = {}
    if plus:
        inner, heads = 128, 2
        tensors["latents"] = 5 * drawn(draws, 1, 6, inner)
        for name, out, taken in (("proj_in", inner, 32), ("proj_out", width, inner)):
            tensors[f"{name}.weight"], tensors[f"{name}.bias"] = (
                drawn(draws, out, taken), drawn(draws, out),
            )  # fmt: skip
        norms = [("norm_out", width)]
        for i in range(4):
            for name, shape in {
                "0.to_q": (64 * heads, inner), "0.to_kv": (128 * heads, inner),
                "0.to_out": (inner, 64 * heads), "1.1": (4 * inner, inner),
                "1.3": (inner, 4 * inner),
            }.items():  # fmt: skip
                tensors[f"layers.{i}.{name}.weight"] = drawn(draws, *shape)
            norms += [(f"layers.{i}.{name}", inner) for name in ("0.norm1", "0.norm2", "1.0")]
    else:
        tensors["proj.weight"], tensors["proj.bias"] = (
            drawn(draws, 4 * width, 48), drawn(draws, 4 * width),
        )  # fmt: skip
        norms = [("norm", width)]
    for name, size in norms:
        tensors[f"{name}.weight"] = 1 + 0.3 * drawn(draws, 1, size)[0]
        tensors[f"{name}.bias"] = 0.3 * drawn(draws, 1, size)[0]
    whole = {f"image_proj.{name}": t.contiguous() for name, t in tensors.items()}
    layers = dict(unet.named_modules())
    for i, name in enumerate(unet.attn_processors):
        if "attn2" in name:
            channels = layers[name.removesuffix(".processor")].to_k.weight.shape[0]
            for kind in "kv":
                whole[f"ip_adapter.{i}.to_{kind}_ip.weight"] = 2 * drawn(draws, channels, width)
    if path.suffix == ".bin":
        nested = {"image_proj": {}, "ip_adapter": {}}
        for name, t in whole.items():
            part, _, rest = name.partition(".")
            nested[part][rest] = t
        torch.save(nested, path)
    else:
        save_file(whole, path)


@pytest.fixture(params=SYSTEMS)
def opened(request, tmp_path):
    """(our pipeline, diffusers', its noise for ours and theirs) of a small published system."""
    config = system(request.param) | {"image_size": SIDE}
    folders.write(tmp_path / "model", config, random_params(config))
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    ours = ldm_jax.load(tmp_path / "model")
    noise = ours.noise(2, 1, SIDE, SIDE)
    return ours, theirs, noise, torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())


@pytest.mark.parametrize("kind", ["plain", "plus", "plain bin"])
def test_pictures_with_a_picture(opened, agree, tmp_path, kind):
    ours, theirs, noise, torch_noise = opened
    path = tmp_path / ("adapter.bin" if "bin" in kind else "adapter.safetensors")
    encoder = saved_encoder(tmp_path / "image_encoder")
    saved_adapter(theirs.unet, path, kind == "plus")
    mine = ours.with_ip_adapter(path, scale=0.8)
    asked = dict(latents=noise, steps=STEPS, guidance=4.0, **SIZE)
    made = mine(PROMPT, NEGATIVE, conditions={"image_prompt": PICTURE}, **asked)
    assert np.abs(made - ours(PROMPT, NEGATIVE, **asked)).max() > 8 / 255
    off = ours.with_ip_adapter(path, scale=0.0)
    none = off(PROMPT, NEGATIVE, conditions={"image_prompt": PICTURE}, **asked)
    agree(none, ours(PROMPT, NEGATIVE, **asked), tolerance=1e-6)

    theirs.load_ip_adapter(str(tmp_path), subfolder="", weight_name=path.name)
    theirs.set_ip_adapter_scale(0.8)
    # transformers resizes by torch, whose rounding may differ by 1/255 from Pillow's.
    same = mine.model.embedders[-1].prepare({"image_prompt": PICTURE})
    resized = theirs.feature_extractor(_pil(), return_tensors="pt").pixel_values
    difference = np.abs(same - resized.numpy().transpose(0, 2, 3, 1)) * CLIP_STD
    assert difference.max() < 1.01 / 255 and np.mean(difference > 1e-5) < 0.2
    pixels = torch.tensor(same.transpose(0, 3, 1, 2))
    expected = theirs(
        PROMPT, negative_prompt=NEGATIVE, ip_adapter_image=pixels, num_inference_steps=STEPS,
        guidance_scale=4.0, latents=torch_noise, output_type="np", **SIZE,
    ).images  # fmt: skip
    agree(made, expected, tolerance=2e-5)

    # Tokens, of the same pixels and of none.
    hidden = kind == "plus"
    with torch.no_grad():
        both = torch.cat([pixels, torch.zeros_like(pixels)])
        features = encoder(both, output_hidden_states=True)
        if hidden:
            features = features.hidden_states[-2]
        else:
            features = features.image_embeds * torch.tensor([[1.0], [0.0]])
        tokens = theirs.unet.encoder_hid_proj.image_projection_layers[0](features)
    own = {k: v for k, v in mine.params["image_prompt"].items() if k != "scale"}
    network = make_ip_adapter(mine.config["conditioning"]["image_prompt"]["network"])
    _, state = network.apply(
        {"params": own}, np.concatenate([same, 0 * same]), capture_intermediates=True
    )
    agree(state["intermediates"]["image_proj"]["__call__"][0], tokens)


def _pil():
    return Image.fromarray(PICTURE)


def test_two_add_up(opened, agree, tmp_path):
    ours, theirs, noise, torch_noise = opened
    saved_encoder(tmp_path / "image_encoder")
    for i in range(2):
        saved_adapter(theirs.unet, tmp_path / f"{i}.safetensors", bool(i), seed=i)
    mine = ours.with_ip_adapter(tmp_path / "0.safetensors", scale=0.7)
    mine = mine.with_ip_adapter(tmp_path / "1.safetensors", scale=0.4)
    shown = {"image_prompt": PICTURE, "image_prompt_2": PICTURE[::-1]}
    asked = dict(latents=noise, steps=STEPS, guidance=4.0, **SIZE)
    made = mine(PROMPT, NEGATIVE, conditions=shown, **asked)
    names = ["0.safetensors", "1.safetensors"]
    theirs.load_ip_adapter(str(tmp_path), subfolder="", weight_name=names)
    theirs.set_ip_adapter_scale([0.7, 0.4])
    pictures = [
        torch.tensor(embedder.prepare(shown).transpose(0, 3, 1, 2))
        for embedder in mine.model.embedders[-2:]
    ]
    expected = theirs(
        PROMPT, negative_prompt=NEGATIVE, ip_adapter_image=pictures, num_inference_steps=STEPS,
        guidance_scale=4.0, latents=torch_noise, output_type="np", **SIZE,
    ).images  # fmt: skip
    agree(made, expected, tolerance=2e-5)
