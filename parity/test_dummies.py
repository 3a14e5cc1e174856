"""The tiny random pipelines of diffusers' own tests are read, and compute what they do there.

Components have the fields of those tests' `get_dummy_components`, of which the Hub's
`hf-internal-testing` has copies: two levels of 2 to 64 channels, narrow MLPs, a tokenizer of few
pieces, SDXL's numbers in 8 sinusoids each.
"""

import copy
import json

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

import ldm_jax
from ldm_jax.conditions.base import embed
from ldm_jax.interop import diffusers as folders
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.models.embedders import concat_timestep_embedding, guidance_embedding

PROMPT = "A painting of a squirrel eating a burger"
UNET = dict(
    block_out_channels=(32, 64),
    layers_per_block=2,
    sample_size=32,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=32,
)
SD2 = dict(attention_head_dim=(2, 4), use_linear_projection=True)
SMALL = dict(block_out_channels=(4, 8), norm_num_groups=2)
STAGE = dict(
    block_out_channels=(32, 64),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
)
TEXT = dict(
    hidden_size=32,
    intermediate_size=37,
    num_attention_heads=4,
    num_hidden_layers=5,
    vocab_size=1000,
    bos_token_id=0,
    eos_token_id=2,
    pad_token_id=1,
)
NOISE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
DDIM = diffusers.DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False)
V = diffusers.DDIMScheduler(**NOISE, prediction_type="v_prediction", steps_offset=1)
PNDM = diffusers.PNDMScheduler(skip_prk_steps=True)
EULER = diffusers.EulerDiscreteScheduler(**NOISE, timestep_spacing="leading", steps_offset=1)
UNCHECKED = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Of CLIP's class, but of 194 pieces, numbered as CLIP's rule would not."""
    letters = [chr(i) for i in range(33, 127)]
    merges = ["p a", "i n", "t i", "n g</w>"]
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    pieces += [merge.replace(" ", "") for merge in merges]
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def stable(kind, scheduler=DDIM, unet=(), text=(), stage=STAGE, **parts):
    """A function of the tokenizer to a pipeline with one text encoder."""

    def make(tokenizer):
        encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT | dict(text)))
        network = diffusers.UNet2DConditionModel(**UNET | dict(unet))
        autoencoder = diffusers.AutoencoderKL(**stage)
        if kind is diffusers.LDMTextToImagePipeline:
            named = dict(vqvae=autoencoder, bert=encoder)
        else:
            named = dict(vae=autoencoder, text_encoder=encoder)
        own = copy.deepcopy(scheduler)  # pipelines change it
        return kind(unet=network, scheduler=own, tokenizer=tokenizer, **named, **parts)

    return make


def xl(kind=diffusers.StableDiffusionXLPipeline, numbers=6, unet=(), **parts):
    def make(tokenizer):
        config = transformers.CLIPTextConfig(**TEXT, hidden_act="gelu", projection_dim=32)
        numbered = dict(addition_embed_type="text_time", addition_time_embed_dim=8)
        numbered |= dict(projection_class_embeddings_input_dim=numbers * 8 + 32)
        size = dict(block_out_channels=(2, 4), norm_num_groups=1, cross_attention_dim=64)
        size |= dict(transformer_layers_per_block=(1, 2))
        return kind(
            vae=diffusers.AutoencoderKL(**STAGE),
            text_encoder=transformers.CLIPTextModel(config),
            text_encoder_2=transformers.CLIPTextModelWithProjection(config),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=diffusers.UNet2DConditionModel(**UNET | SD2 | size | numbered | dict(unet)),
            scheduler=EULER,
            **parts,
        )

    return make


UNCLIP = dict(
    class_embed_type="projection",
    projection_class_embeddings_input_dim=64,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
UPSCALE = dict(
    block_out_channels=(32, 32, 64),
    in_channels=7,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    use_linear_projection=True,
    only_cross_attention=(True, True, False),
    num_class_embeds=100,
)
GELU = dict(hidden_act="gelu", projection_dim=512)
LCM = SMALL | dict(time_cond_proj_dim=32, layers_per_block=1)
DUMMIES = {
    "SD": stable(diffusers.StableDiffusionPipeline, **UNCHECKED),
    "SD, smaller": stable(
        diffusers.StableDiffusionPipeline,
        unet=SMALL | dict(cross_attention_dim=8, layers_per_block=1),
        text=dict(hidden_size=8, intermediate_size=16, num_attention_heads=2),
        stage=STAGE | SMALL,
        **UNCHECKED,
    ),
    "SD inpainting": stable(
        diffusers.StableDiffusionInpaintPipeline, PNDM, dict(in_channels=9), **UNCHECKED
    ),
    "SD 2": stable(diffusers.StableDiffusionPipeline, DDIM, SD2, GELU, **UNCHECKED),
    "SD 2 depth": stable(
        diffusers.StableDiffusionDepth2ImgPipeline,
        PNDM,
        SD2 | dict(in_channels=5),
        depth_estimator=None,
        feature_extractor=None,
    ),
    "SD 2 upscaler": stable(
        diffusers.StableDiffusionUpscalePipeline,
        diffusers.DDIMScheduler(prediction_type="v_prediction"),
        UPSCALE,
        GELU,
        low_res_scheduler=diffusers.DDPMScheduler(),
    ),
    "SD 2 unCLIP": stable(
        diffusers.StableUnCLIPImg2ImgPipeline,
        V,
        SD2 | UNCLIP,
        stage={},
        feature_extractor=None,
        image_encoder=None,
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=32),
        image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    ),
    "text2im": stable(diffusers.LDMTextToImagePipeline),
    "LCM": stable(
        diffusers.LatentConsistencyModelPipeline,
        diffusers.LCMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False),
        LCM,
        dict(intermediate_size=64, num_attention_heads=8, num_hidden_layers=3),
        STAGE | SMALL,
        **UNCHECKED,
    ),
    "SDXL": xl(),
    "SDXL, LCM": xl(unet=dict(time_cond_proj_dim=256)),
    "SDXL inpainting": xl(
        diffusers.StableDiffusionXLInpaintPipeline, unet=dict(in_channels=9)
    ),
    "SDXL refiner": xl(
        diffusers.StableDiffusionXLImg2ImgPipeline, numbers=5, requires_aesthetics_score=True
    ),
}  # fmt: skip


@pytest.fixture
def opened(tokenizer, tmp_path):
    """(their pipeline, what we read of its folder), of a name in `DUMMIES`."""

    def make(name):
        torch.manual_seed(0)
        pipeline = DUMMIES[name](tokenizer)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.save_pretrained(tmp_path / "dummy")
        found = folders.read(tmp_path / "dummy")
        for network, report in found.reports.items():
            assert report == type(report)(), network
        return pipeline, found

    return make


def nchw(array):
    return torch.from_numpy(np.moveaxis(np.asarray(array), -1, 1).copy())


def nhwc(tensor):
    return np.moveaxis(tensor.numpy(), 1, -1)


def texts(pipeline):
    """Context and pooled text of `PROMPT`."""
    ids = pipeline.tokenizer(
        PROMPT, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    ).input_ids
    if not hasattr(pipeline, "text_encoder_2"):
        encoder = pipeline.bert if hasattr(pipeline, "bert") else pipeline.text_encoder
        return encoder(ids)[0], None
    encoders = pipeline.text_encoder, pipeline.text_encoder_2
    found = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    return torch.cat([each.hidden_states[-2] for each in found], -1), found[1].text_embeds


@pytest.mark.parametrize("name", DUMMIES)
@torch.no_grad()
def test_networks(name, opened, agree):
    pipeline, found = opened(name)
    model, params = LatentDiffusion.from_config(found.config), found.params
    draw = np.random.default_rng(1)
    unet = model.unet

    context, pooled = texts(pipeline)
    encoders = tuple(each for each in model.embedders if each.needs == ("caption",))
    prompts = {each.name: each.prepare({"caption": [PROMPT]}) for each in encoders}
    condition = embed(encoders, params, prompts)
    agree(condition.context, context)

    x = draw.standard_normal((1, 8, 8, unet.in_channels), np.float32)
    y, theirs = None, {}
    if pooled is not None:
        agree(condition.vector, pooled)
        numbers = np.float32([[64, 48, 8, 16, 64, 60]])[:, : 6 if "refiner" not in name else 5]
        section = found.config["conditioning"]["sizes"]
        y = jnp.hstack([condition.vector, concat_timestep_embedding(numbers, section["dim"])])
        added = dict(text_embeds=pooled, time_ids=torch.from_numpy(numbers))
        theirs["added_cond_kwargs"] = added
    elif isinstance(unet.num_classes, int):
        y, theirs["class_labels"] = np.array([20]), torch.tensor([20])
    elif unet.num_classes:
        y = draw.standard_normal((1, unet.adm_in_channels), np.float32)
        theirs["class_labels"] = torch.from_numpy(y)
    cond = None
    if unet.time_cond_proj_dim:
        cond = guidance_embedding(np.float32([7.5]), unet.time_cond_proj_dim)
        theirs["timestep_cond"] = torch.from_numpy(np.array(cond))
    variables = {"params": params["unet"]}
    ours = unet.apply(variables, x, np.array([731]), condition.context, y=y, timestep_cond=cond)
    agree(ours, nhwc(pipeline.unet(nchw(x), 731, context, **theirs).sample))
    # Odd sides: halved to the next larger number, and doubled back to what they were.
    odd = draw.standard_normal((1, 9, 7, unet.in_channels), np.float32)
    ours = unet.apply(variables, odd, np.array([731]), condition.context, y=y, timestep_cond=cond)
    agree(ours, nhwc(pipeline.unet(nchw(odd), 731, context, **theirs).sample))

    stage = getattr(pipeline, "vae", None) or pipeline.vqvae
    variables, latents = {"params": params["autoencoder"]}, x[..., : unet.out_channels]
    decoded = model.autoencoder.apply(variables, latents, method="decode")
    scaled = nchw(latents) / stage.config.scaling_factor
    agree(decoded, nhwc(stage.decode(scaled).sample), 2e-5)


@pytest.mark.parametrize("name", ["SD", "SD, smaller", "SD 2", "text2im", "SDXL"])
def test_pictures(name, opened, agree, tmp_path):
    """Ten steps of DDIM; a picture may differ by 1/255."""
    pipeline, _ = opened(name)
    if name == "SDXL":
        pipeline.scheduler = diffusers.DDIMScheduler(**NOISE, clip_sample=False, steps_offset=1)
    ours = ldm_jax.load(tmp_path / "dummy")
    noise = np.random.default_rng(2).standard_normal((1, 16, 16, 4), np.float32)
    mine = ours(PROMPT, latents=noise, steps=10, guidance=6.0, height=32, width=32)
    # This one takes every autoencoder to be f8, as its own is.
    side = 128 if name == "text2im" else 32
    made = pipeline(PROMPT, latents=nchw(noise), num_inference_steps=10, guidance_scale=6.0,
                    height=side, width=side, output_type="np").images  # fmt: skip
    assert mine.std() > 0.01
    agree(mine, made, 1 / 255)


@pytest.mark.parametrize("guidance", [None, 1.0, 4.0])
def test_a_distilled_model_gets_the_scale(opened, agree, tmp_path, guidance):
    """One step, which draws no noise; 8.5 by default, in both."""
    pipeline, _ = opened("LCM")
    ours = ldm_jax.load(tmp_path / "dummy")
    noise = np.random.default_rng(2).standard_normal((1, 16, 16, 4), np.float32)
    mine = ours(PROMPT, latents=noise, steps=1, guidance=guidance, height=32, width=32)
    scale = {} if guidance is None else {"guidance_scale": guidance}
    made = pipeline(PROMPT, latents=nchw(noise), num_inference_steps=1, height=32, width=32,
                    output_type="np", **scale).images  # fmt: skip
    assert mine.std() > 0.01
    agree(mine, made, 1 / 255)
