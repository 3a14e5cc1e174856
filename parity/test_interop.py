"""Folders and files between diffusers and us, both ways, tensor by tensor.

diffusers makes small random pipelines, saves them, and we read them; what we write of that it opens
again, and every tensor is what it was. Then the same from our side.
"""

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig,
    LDMBertModel,
)

from ldm_jax.conditions.tokenizer import BytePair
from ldm_jax.interop import compvis
from ldm_jax.interop import diffusers as folders
from ldm_jax.interop.diffusers.tokenizers import write_tokenizer
from tests.interop.systems import SYSTEMS, random_params, system
from tests.interop.test_compvis import same
from tests.interop.test_diffusers import NOT_THERE

BLOCKS = dict(
    block_out_channels=(32, 64),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    sample_size=8,
)
STAGE = dict(
    block_out_channels=(32, 64),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    sample_size=16,
)
NOISE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)


def encoder(kind=transformers.CLIPTextModel, **fields):
    sizes = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    return kind(transformers.CLIPTextConfig(**sizes | fields))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A tokenizer of transformers for a section of ours."""

    def make(padding="end", kind="clip"):
        folder = tmp_path_factory.mktemp("tokenizer") / "written"
        vocabulary = "clip" if kind == "clip" else "bert"
        write_tokenizer(folder, dict(kind=kind, vocabulary=vocabulary, padding=padding), 77)
        cls = transformers.CLIPTokenizer if kind == "clip" else transformers.BertTokenizer
        return cls.from_pretrained(folder)

    return make


NOTHING = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def stable(tokens):
    return diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(**STAGE),
        text_encoder=encoder(),
        tokenizer=tokens(),
        unet=diffusers.UNet2DConditionModel(**BLOCKS, cross_attention_dim=32),
        scheduler=diffusers.PNDMScheduler(
            **{k: v for k, v in NOISE.items() if k != "clip_sample"}, skip_prk_steps=True
        ),
        **NOTHING,
    )


def stable_2(tokens):
    heads = dict(attention_head_dim=(2, 4), use_linear_projection=True, upcast_attention=True)
    return diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(**STAGE),
        text_encoder=encoder(hidden_act="gelu"),
        tokenizer=tokens("zero"),
        unet=diffusers.UNet2DConditionModel(**BLOCKS, cross_attention_dim=32, **heads),
        scheduler=diffusers.DDIMScheduler(**NOISE, prediction_type="v_prediction"),
        **NOTHING,
    )


def inpainting(tokens):
    return diffusers.StableDiffusionInpaintPipeline(
        vae=diffusers.AutoencoderKL(**STAGE),
        text_encoder=encoder(),
        tokenizer=tokens(),
        unet=diffusers.UNet2DConditionModel(**BLOCKS, in_channels=9, cross_attention_dim=32),
        scheduler=diffusers.DDIMScheduler(**NOISE, steps_offset=1),
        **NOTHING,
    )


def xl(tokens):
    unet = diffusers.UNet2DConditionModel(
        **BLOCKS
        | dict(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
        cross_attention_dim=64,
    )
    second = dict(hidden_act="gelu", projection_dim=24, eos_token_id=2)
    return diffusers.StableDiffusionXLPipeline(
        vae=diffusers.AutoencoderKL(**STAGE, scaling_factor=0.13025),
        text_encoder=encoder(),
        text_encoder_2=encoder(transformers.CLIPTextModelWithProjection, **second),
        tokenizer=tokens(),
        tokenizer_2=tokens("zero"),
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    )


def consistent(tokens):
    """LCM, with widths, heads and MLPs that no published model has."""
    sizes = dict(block_out_channels=(32, 48), norm_num_groups=16)
    return diffusers.LatentConsistencyModelPipeline(
        vae=diffusers.AutoencoderKL(**STAGE | sizes),
        text_encoder=encoder(intermediate_size=37, layer_norm_eps=1e-4),
        tokenizer=tokens(),
        unet=diffusers.UNet2DConditionModel(
            **BLOCKS | sizes,
            cross_attention_dim=32,
            attention_head_dim=(2, 6),
            time_cond_proj_dim=20,
        ),
        scheduler=diffusers.LCMScheduler(**NOISE),
        **NOTHING,
    )


def celebahq(tokens):
    blocks = dict(
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return diffusers.LDMPipeline(
        vqvae=diffusers.VQModel(**STAGE, num_vq_embeddings=20, scaling_factor=1.0),
        unet=diffusers.UNet2DModel(**BLOCKS | blocks, attention_head_dim=32),
        scheduler=diffusers.DDIMScheduler(**NOISE),
    )


def text2im(tokens):
    config = LDMBertConfig(d_model=32, encoder_layers=2, encoder_ffn_dim=128, vocab_size=30522)
    return diffusers.LDMTextToImagePipeline(
        vqvae=diffusers.AutoencoderKL(**STAGE),
        bert=LDMBertModel(config),
        tokenizer=tokens(kind="text"),
        unet=diffusers.UNet2DConditionModel(**BLOCKS, cross_attention_dim=32),
        scheduler=diffusers.DDIMScheduler(**NOISE),
    )


def tensors(pipeline):
    """Every tensor of a pipeline's networks but what is no parameter of the model."""
    found = {}
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            for key, tensor in component.state_dict().items():
                if not key.startswith("to_logits") and "position_ids" not in key:
                    found[f"{name}: {key}"] = tensor.numpy()
    return found


def same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)


MADE = [(make, {}) for make in (stable, stable_2, inpainting, xl, consistent)]
MADE += [(make, {}) for make in (celebahq, text2im)]
MADE += [
    (stable, dict(variant="fp16")),
    (stable, dict(max_shard_size="200KB")),
    (celebahq, dict(safe_serialization=False)),
]


def label(value):
    return value.__name__ if callable(value) else "-".join(value) or "whole"


@pytest.mark.parametrize("make, how", MADE, ids=label)
def test_what_diffusers_saves_is_read_and_written_whole(make, how, tokens, tmp_path):
    torch.manual_seed(0)
    pipeline = make(tokens)
    pipeline.save_pretrained(tmp_path / "theirs", **how)
    found = folders.read(tmp_path / "theirs")
    for network, report in found.reports.items():
        assert report == type(report)(), network
    folders.write(tmp_path / "ours", found.config, found.params)
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours")
    assert type(again) is type(pipeline)
    same_tensors(tensors(again), tensors(pipeline))
    # What is written has a DDIM scheduler, whatever theirs was.
    written = folders.read(tmp_path / "ours").config
    assert written | {"sampling": {}} == found.config | {"sampling": {}}


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name not in NOT_THERE])
def test_what_we_write_diffusers_saves_as_it_was(name, tmp_path):
    config, params = system(name), random_params(system(name))
    folders.write(tmp_path / "ours", config, params)
    if config["task"] == "autoencoder":
        kinds = {"kl": diffusers.AutoencoderKL, "vq": diffusers.VQModel}
        kind, read = kinds[config["autoencoder"]["kind"]], folders.read_component
    else:
        kind, read = diffusers.DiffusionPipeline, folders.read
    kind.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    found, before = read(tmp_path / "theirs"), read(tmp_path / "ours")
    same(found.params, params)
    assert found.config == before.config


@pytest.mark.parametrize("padding", ["end", "zero"])
def test_their_tokenizer_of_our_folder_makes_our_tokens(padding, tokens):
    prompts = ["a red apple, 3 of them", "", "Crème brûlée's  naïve café"]
    theirs = tokens(padding)(prompts, padding="max_length", max_length=77, truncation=True)
    np.testing.assert_array_equal(BytePair("clip", 77, padding)(prompts), theirs["input_ids"])


SINGLE = {
    "stable-diffusion-1": diffusers.StableDiffusionPipeline,
    "stable-diffusion-2": diffusers.StableDiffusionPipeline,
    "stable-diffusion-xl-base": diffusers.StableDiffusionXLPipeline,
}


@pytest.mark.parametrize("name", SINGLE)
def test_diffusers_reads_our_single_file(name, tmp_path):
    config, params = system(name), random_params(system(name))
    compvis.write(tmp_path / "model.safetensors", config, params)
    folders.write(tmp_path / "folder", config, params)
    folders.write(tmp_path / "other", config, random_params(config, seed=1))
    expected = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "folder")
    # Of the folder, only what the networks are.
    found = SINGLE[name].from_single_file(
        str(tmp_path / "model.safetensors"), config=str(tmp_path / "other"), local_files_only=True
    )
    same_tensors(tensors(found), tensors(expected))
