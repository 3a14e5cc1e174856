"""Whole pipelines against diffusers': a folder that we wrote, opened by both, ten steps of DDIM.

The same weights (random), prompt, starting noise and guidance; autoencoders encode to the mean of
their posterior, where diffusers would draw from it. An image may differ by 1/255.
"""

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ldm_jax
from ldm_jax.diffusion.plan import Sampling
from ldm_jax.interop import diffusers as folders
from tests.interop.systems import random_params, system

STEPS, SIDE = 10, 32
PROMPT, NEGATIVE = "a red apple on a table", "blurry"
PICTURE = np.random.default_rng(1).uniform(size=(SIDE, SIDE, 3)).astype(np.float32)
MASK = np.zeros((SIDE, SIDE), np.float32)
MASK[8:24, 10:] = 1.0
SIZE = dict(height=SIDE, width=SIDE)


@pytest.fixture(autouse=True)
def encode_to_the_mean(monkeypatch):
    distribution = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution
    monkeypatch.setattr(distribution, "sample", lambda self, generator=None: self.mode())


@pytest.fixture
def opened(tmp_path):
    """(our pipeline, diffusers', noise for ours, for theirs) of a small published system."""

    def both(name, pipeline=diffusers.DiffusionPipeline):
        config = system(name) | {"image_size": SIDE}
        folders.write(tmp_path, config, random_params(config))
        theirs = pipeline.from_pretrained(tmp_path, safety_checker=None)
        theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
        theirs.set_progress_bar_config(disable=True)
        ours = ldm_jax.load(tmp_path)
        noise = np.random.default_rng(2).standard_normal(
            (1, *ours._latent_shape(SIDE, SIDE)), np.float32
        )
        return ours, theirs, noise, torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())

    return both


@pytest.fixture
def alike(agree):
    """`alike(ours, theirs)`: pictures that differ by 1/255 at most, and are no flat ones."""

    def check(ours, theirs):
        assert ours.std() > 0.01, "a flat picture proves nothing"
        agree(ours, theirs, tolerance=1 / 255)

    return check


@pytest.mark.parametrize("name, guidance, negative", [
    ("stable-diffusion-1", 7.5, None),
    ("stable-diffusion-1", 3.0, NEGATIVE),
    ("stable-diffusion-2", 5.0, NEGATIVE),
    ("stable-diffusion-2-v", 5.0, ""),
    ("stable-diffusion-xl-base", 5.0, None),  # zeros
    ("stable-diffusion-xl-base", 5.0, ""),  # the empty prompt
    ("stable-diffusion-xl-base", 5.0, NEGATIVE),
    ("ldm-text2im-large-256", 5.0, None),
    ("ldm3d", 7.5, NEGATIVE),
])  # fmt: skip
def test_text_to_image(opened, alike, name, guidance, negative):
    ours, theirs, noise, torch_noise = opened(name)
    mine = ours(PROMPT, negative, latents=noise, steps=STEPS, guidance=guidance, **SIZE)
    arguments = dict(num_inference_steps=STEPS, guidance_scale=guidance, latents=torch_noise)
    arguments |= {} if negative is None else {"negative_prompt": negative}
    # This one takes every autoencoder to be f8, as its own is.
    side = SIDE * 8 // ours.autoencoder.downsampling if "text2im" in name else SIDE
    made = theirs(PROMPT, output_type="np", height=side, width=side, **arguments)
    # Of LDM3D's six channels three: the depth of output_type="np" is rounded before it is scaled.
    pictures = made.rgb if name == "ldm3d" else made.images
    alike(mine[..., :3], pictures)


@pytest.mark.parametrize("prompt", ["", PROMPT])
def test_an_empty_prompt_is_encoded(opened, alike, prompt):
    ours, theirs, noise, torch_noise = opened("stable-diffusion-xl-base")
    mine = ours(prompt, "", latents=noise, steps=STEPS, guidance=3.0, **SIZE)
    made = theirs(prompt, negative_prompt="", num_inference_steps=STEPS, guidance_scale=3.0,
                  latents=torch_noise, output_type="np", **SIZE)  # fmt: skip
    alike(mine, made.images)


@pytest.mark.parametrize("sampler, scheduler, more", [
    ("euler", "EulerDiscrete", {}),
    ("euler", "EulerDiscrete", {"use_karras_sigmas": True}),
    ("euler", "EulerDiscrete", {"timestep_spacing": "trailing"}),
    ("heun", "HeunDiscrete", {}),
    ("lms", "LMSDiscrete", {"timestep_spacing": "linspace"}),
    ("dpmpp_2m", "DPMSolverMultistep", {}),
    ("dpmpp_2m", "DPMSolverMultistep", {"use_karras_sigmas": True}),
    ("unipc", "UniPCMultistep", {}),
    ("plms", "PNDM", {"skip_prk_steps": True}),
])  # fmt: skip
def test_schedulers_of_a_pipeline(opened, alike, sampler, scheduler, more):
    """Stable Diffusion 1 with another scheduler in place of its own, as its users set one."""
    ours, theirs, noise, torch_noise = opened("stable-diffusion-1")
    made = getattr(diffusers, f"{scheduler}Scheduler").from_config(theirs.scheduler.config, **more)
    theirs.scheduler = made
    spacing = "karras" if "use_karras_sigmas" in more else more.get("timestep_spacing")
    mine = ours(PROMPT, latents=noise, steps=STEPS, guidance=5.0, **SIZE,
                sampler=Sampling(sampler, spacing=spacing))  # fmt: skip
    images = theirs(PROMPT, num_inference_steps=STEPS, guidance_scale=5.0, latents=torch_noise,
                    output_type="np", **SIZE).images  # fmt: skip
    alike(mine, images)


def test_refiner_from_a_picture(opened, alike, monkeypatch):
    ours, theirs, noise, torch_noise = opened(
        "stable-diffusion-xl-refiner", diffusers.StableDiffusionXLImg2ImgPipeline
    )
    module = diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch_noise)
    mine = ours(PROMPT, NEGATIVE, image=PICTURE, strength=0.6, latents=noise, steps=STEPS,
                guidance=4.0)  # fmt: skip
    made = theirs(PROMPT, image=PICTURE[None], strength=0.6, negative_prompt=NEGATIVE,
                  num_inference_steps=STEPS, guidance_scale=4.0, output_type="np")  # fmt: skip
    alike(mine, made.images)


def test_image_to_image(opened, alike, monkeypatch):
    ours, theirs, noise, torch_noise = opened(
        "stable-diffusion-1", diffusers.StableDiffusionImg2ImgPipeline
    )
    module = diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch_noise)
    mine = ours(PROMPT, image=PICTURE, strength=0.7, latents=noise, steps=STEPS, guidance=7.5)
    made = theirs(PROMPT, image=PICTURE[None], strength=0.7, num_inference_steps=STEPS,
                  guidance_scale=7.5, output_type="np")  # fmt: skip
    alike(mine, made.images)


def test_inpainting_model(opened, alike):
    """Where it draws; around the mask ours leaves the picture, theirs what the decoder makes."""
    ours, theirs, noise, torch_noise = opened(
        "stable-diffusion-1-inpainting", diffusers.StableDiffusionInpaintPipeline
    )
    mine = ours(PROMPT, image=PICTURE, mask=MASK, latents=noise, steps=STEPS, guidance=7.5)
    made = theirs(PROMPT, image=PICTURE[None], mask_image=MASK[None], latents=torch_noise,
                  num_inference_steps=STEPS, guidance_scale=7.5, strength=1.0,
                  output_type="np", **SIZE)  # fmt: skip
    drawn = np.s_[:, MASK > 0.5]
    alike(mine[drawn], made.images[drawn])


def test_without_a_condition(opened, alike, monkeypatch):
    ours, theirs, noise, torch_noise = opened("ldm-celebahq-256")
    module = __import__(type(theirs).__module__, fromlist=["randn_tensor"])
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch_noise)
    mine = ours(latents=noise, steps=STEPS, **SIZE)
    made = theirs(batch_size=1, num_inference_steps=STEPS, output_type="np")
    alike(mine, made.images)


def saved_vectors(folder, layout, width, count=2):
    """A file of a token's vectors, as others write it; and the vectors."""
    vectors = torch.from_numpy(np.random.default_rng(3).standard_normal((count, width), np.float32))
    if layout == "diffusers":
        save_file({"<mine>": vectors}, folder / "learned_embeds.safetensors")
        return folder / "learned_embeds.safetensors", vectors
    if layout == "a1111":
        save_file({"emb_params": vectors}, folder / "mine.safetensors")
        return folder / "mine.safetensors", vectors
    token = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "mine"}
    torch.save(token, folder / "mine.pt")
    return folder / "mine.pt", vectors


@pytest.mark.parametrize("layout", ["diffusers", "a1111", "a1111 pt"])
def test_textual_inversion(opened, alike, tmp_path, layout):
    ours, theirs, noise, torch_noise = opened("stable-diffusion-1")
    path, _ = saved_vectors(tmp_path, layout, theirs.text_encoder.config.hidden_size)
    theirs.load_textual_inversion(str(path), token="<mine>")
    prompt = "a <mine> on a table"
    with_token = ours.with_embedding(path, "<mine>")
    mine = with_token(prompt, latents=noise, steps=STEPS, guidance=7.5, **SIZE)
    assert np.abs(mine - ours("a on a table", latents=noise, steps=STEPS, **SIZE)).max() > 2 / 255
    arguments = dict(num_inference_steps=STEPS, guidance_scale=7.5, latents=torch_noise)
    alike(mine, theirs(prompt, output_type="np", **arguments, **SIZE).images)


def test_textual_inversion_of_both_encoders(opened, alike, tmp_path):
    ours, theirs, noise, torch_noise = opened("stable-diffusion-xl-base")
    # With the old value, 2, transformers takes the highest number for the end of the text, and new
    # tokens have higher ones.
    theirs.text_encoder_2.text_model.eos_token_id = theirs.tokenizer_2.eos_token_id
    parts = {
        "clip_l": (theirs.text_encoder, theirs.tokenizer),
        "clip_g": (theirs.text_encoder_2, theirs.tokenizer_2),
    }
    vectors = {
        name: saved_vectors(tmp_path, "a1111", encoder.config.hidden_size)[1]
        for name, (encoder, _) in parts.items()
    }
    save_file(vectors, tmp_path / "mine.safetensors")
    for name, (encoder, tokenizer) in parts.items():
        theirs.load_textual_inversion(
            vectors[name], token="<mine>", text_encoder=encoder, tokenizer=tokenizer
        )
    prompt = "a <mine> on a table"
    with_token = ours.with_embedding(tmp_path / "mine.safetensors", "<mine>")
    mine = with_token(prompt, "", latents=noise, steps=STEPS, guidance=5.0, **SIZE)
    arguments = dict(num_inference_steps=STEPS, guidance_scale=5.0, latents=torch_noise)
    arguments["negative_prompt"] = ""
    alike(mine, theirs(prompt, output_type="np", **arguments, **SIZE).images)


def saved_controlnet(theirs, path, seed):
    """A ControlNet of a pipeline's UNet whose convolutions that start at zero are random."""
    torch.manual_seed(seed)
    widths = (8, 16, 16, 16)[: theirs.vae_scale_factor.bit_length()]
    net = diffusers.ControlNetModel.from_unet(
        theirs.unet, conditioning_embedding_out_channels=widths
    )
    for leaf in net.parameters():
        if not leaf.any():
            torch.nn.init.normal_(leaf, std=0.3)
    net.save_pretrained(path)
    return net.eval()


@pytest.mark.parametrize("name, cls", [
    ("stable-diffusion-1", diffusers.StableDiffusionControlNetPipeline),
    ("stable-diffusion-xl-base", diffusers.StableDiffusionXLControlNetPipeline),
])  # fmt: skip
def test_two_controlnets_with_scales(opened, alike, tmp_path, name, cls):
    ours, theirs, noise, torch_noise = opened(name)
    scales, mine, nets = (0.8, -0.5), ours, []
    for i, scale in enumerate(scales):
        nets.append(saved_controlnet(theirs, tmp_path / f"net{i}", i))
        mine = mine.with_control(tmp_path / f"net{i}", scale)
    hints = [PICTURE, np.float32(PICTURE[::-1] > 0.5)]
    made = mine(
        *(PROMPT, NEGATIVE),
        conditions={"control": hints[0], "control_2": hints[1]},
        **dict(latents=noise, steps=STEPS, guidance=5.0, **SIZE),
    )
    plain = ours(PROMPT, NEGATIVE, latents=noise, steps=STEPS, guidance=5.0, **SIZE)
    assert np.abs(made - plain).max() > 8 / 255
    controlled = cls(**theirs.components, controlnet=nets)
    controlled.set_progress_bar_config(disable=True)
    arguments = dict(num_inference_steps=STEPS, guidance_scale=5.0, latents=torch_noise)
    arguments |= dict(negative_prompt=NEGATIVE, controlnet_conditioning_scale=list(scales))
    images = [torch.from_numpy(hint.transpose(2, 0, 1)[None].copy()) for hint in hints]
    alike(made, controlled(PROMPT, image=images, output_type="np", **arguments, **SIZE).images)


def saved_adapter(theirs, path, seed):
    """A random adapter of a pipeline's UNet: as of SD 1, or of SDXL, with a map for the middle."""
    torch.manual_seed(seed)
    xl = theirs.unet.config.addition_embed_type == "text_time"
    widths = [*theirs.unet.config.block_out_channels]
    adapter = diffusers.T2IAdapter(
        channels=widths + widths[-1:] * xl,
        downscale_factor=theirs.vae_scale_factor * (2 if xl else 1),
        adapter_type="full_adapter_xl" if xl else "full_adapter",
    )
    for leaf in adapter.parameters():
        if leaf.ndim > 1:  # torch's own are too small for an effect
            torch.nn.init.normal_(leaf, std=leaf[0].numel() ** -0.5)
    adapter.save_pretrained(path)
    return adapter.eval()


@pytest.mark.parametrize("name, cls", [
    ("stable-diffusion-1", diffusers.StableDiffusionAdapterPipeline),
    ("stable-diffusion-xl-base", diffusers.StableDiffusionXLAdapterPipeline),
])  # fmt: skip
def test_two_t2i_adapters_with_scales(opened, alike, tmp_path, name, cls):
    ours, theirs, noise, torch_noise = opened(name)
    scales, mine, adapters = (0.8, -0.5), ours, []
    for i, scale in enumerate(scales):
        adapters.append(saved_adapter(theirs, tmp_path / f"adapter{i}", i))
        mine = mine.with_control(tmp_path / f"adapter{i}", scale)
    hints = [PICTURE, np.float32(PICTURE[::-1] > 0.5)]
    made = mine(
        *(PROMPT, NEGATIVE),
        conditions={"control": hints[0], "control_2": hints[1]},
        **dict(latents=noise, steps=STEPS, guidance=5.0, **SIZE),
    )
    plain = ours(PROMPT, NEGATIVE, latents=noise, steps=STEPS, guidance=5.0, **SIZE)
    assert np.abs(made - plain).max() > 8 / 255
    parts = {key: part for key, part in theirs.components.items() if key != "image_encoder"}
    adapted = cls(**parts, adapter=diffusers.MultiAdapter(adapters))
    adapted.set_progress_bar_config(disable=True)
    arguments = dict(num_inference_steps=STEPS, guidance_scale=5.0, latents=torch_noise)
    arguments |= dict(negative_prompt=NEGATIVE, adapter_conditioning_scale=list(scales))
    images = [torch.from_numpy(hint.transpose(2, 0, 1)[None].copy()) for hint in hints]
    alike(made, adapted(PROMPT, image=images, output_type="np", **arguments, **SIZE).images)
