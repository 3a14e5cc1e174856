"""Folders of diffusers: what we write is read back; what we cannot be is refused by name."""

import json
import shutil

import numpy as np
import pytest

from ldm_jax.interop import diffusers
from ldm_jax.interop.diffusers.components import Json
from ldm_jax.interop.diffusers.unets import unet_from, unet_to
from ldm_jax.interop.fields import canonical_unet
from ldm_jax.interop.files import open_state, write_safetensors
from ldm_jax.tokenizer import VOCABULARIES, BytePair
from tests.interop.systems import SYSTEMS, random_params, system, unet
from tests.interop.test_compvis import same

# What no pipeline of diffusers is.
NOT_THERE = {"cin256-v2", "churches256", "inpainting_big", "semantic_synthesis256", "upscaler"}
WRITABLE = [name for name in SYSTEMS if name not in NOT_THERE]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(folder, config, params) of a system, written once."""
    made = {}

    def make(name):
        if name not in made:
            config, folder = system(name), tmp_path_factory.mktemp("written") / name
            params = random_params(config)
            diffusers.write(folder, config, params)
            made[name] = folder, config, params
        return made[name]

    return make


@pytest.fixture
def copied(folders, tmp_path):
    """A copy of a system's folder, to be changed."""

    def copy(name):
        return shutil.copytree(folders(name)[0], tmp_path / "copy")

    return copy


def read(folder):
    alone = not (folder / "model_index.json").exists()
    return (diffusers.read_component if alone else diffusers.read)(folder)


def edit(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: v for key, v in content.items() if v != "absent"}))


@pytest.mark.parametrize("name", WRITABLE)
def test_a_system_comes_back(name, folders, tmp_path):
    folder, config, params = folders(name)
    found = read(folder)
    assert all(report == type(report)() for report in found.reports.values())
    same(found.params, params)
    diffusers.write(tmp_path / "again", found.config, found.params)
    again = read(tmp_path / "again")
    assert again.config == found.config
    same(again.params, params)
    assert json.loads(json.dumps(found.config)) == found.config
    # What a folder says in other words, or leaves to the sampler, is not compared.
    for section in ("task", "image_size", "autoencoder"):
        ours, theirs = config.get(section), found.config.get(section)
        if section == "autoencoder":
            ours = ours | dict(attn_resolutions=[]) if not ours["attn_resolutions"] else ours
        assert theirs == ours
    if config["task"] == "diffusion":
        assert found.config["conditioning"] == config["conditioning"]
        for key in ("schedule", "parameterization", "spacing"):
            assert found.config["diffusion"][key] == config["diffusion"][key]


@pytest.mark.parametrize("name", sorted(NOT_THERE))
def test_what_diffusers_has_no_pipeline_for_is_not_written(name, tmp_path):
    config = system(name)
    # Of the churches' UNet, UNet2DModel has no 8 heads at every width.
    with pytest.raises(ValueError, match="conditioning|num_heads=8 at widths"):
        diffusers.write(tmp_path / "folder", config, random_params(config))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "pipeline", "components"),
    [
        (
            "stable-diffusion-1",
            "StableDiffusionPipeline",
            "scheduler text_encoder tokenizer unet vae",
        ),
        ("stable-diffusion-1-inpainting", "StableDiffusionInpaintPipeline", None),
        ("ldm3d", "StableDiffusionLDM3DPipeline", None),
        ("stable-diffusion-xl-base", "StableDiffusionXLPipeline", None),
        ("stable-diffusion-xl-refiner", "StableDiffusionXLImg2ImgPipeline", None),
        ("ldm-celebahq-256", "LDMPipeline", "scheduler unet vqvae"),
        ("ldm-text2im-large-256", "LDMTextToImagePipeline", "bert scheduler tokenizer unet vqvae"),
    ],
)
def test_the_pipeline_of_a_system(name, pipeline, components, folders):
    folder = folders(name)[0]
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == pipeline
    if components:
        inside = sorted(path.name for path in folder.iterdir() if path.is_dir())
        assert inside == components.split()


# The JSON of the published folders, where it says something about ours: key by key what the files
# on the Hub had, of older and newer versions of diffusers.
SD15 = dict(
    attention_head_dim=8,
    center_input_sample=False,
    flip_sin_to_cos=True,
    freq_shift=0,
    mid_block_scale_factor=1,
    downsample_padding=1,
    norm_eps=1e-05,
    act_fn="silu",
)
SD21 = SD15 | dict(
    dual_cross_attention=False,
    only_cross_attention=False,
    upcast_attention=True,
    num_class_embeds=None,
    class_embed_type=None,
)
SDXL = SD21 | dict(
    addition_embed_type_num_heads=64,
    attention_type="default",
    class_embeddings_concat=False,
    conv_in_kernel=3,
    conv_out_kernel=3,
    cross_attention_norm=None,
    encoder_hid_dim=None,
    encoder_hid_dim_type=None,
    mid_block_only_cross_attention=None,
    mid_block_type="UNetMidBlock2DCrossAttn",
    num_attention_heads=None,
    resnet_out_scale_factor=1.0,
    resnet_skip_time_act=False,
    resnet_time_scale_shift="default",
    time_cond_proj_dim=None,
    time_embedding_act_fn=None,
    time_embedding_dim=None,
    time_embedding_type="positional",
    timestep_post_act=None,
    upcast_attention=None,
    reverse_transformer_layers_per_block=None,
)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("stable-diffusion-1", SD15),
        ("stable-diffusion-2-v", {k: v for k, v in SD21.items() if k != "attention_head_dim"}),
        (
            "stable-diffusion-xl-base",
            {k: v for k, v in SDXL.items() if k not in ("attention_head_dim",)},
        ),
        (
            "ldm-celebahq-256",
            {k: v for k, v in SD15.items() if k != "attention_head_dim"}
            | dict(time_embedding_type="positional"),
        ),
    ],
)
def test_keys_of_published_unets_are_known(name, says, copied):
    folder = copied(name)
    before = diffusers.read(folder).config
    path = folder / "unet" / "config.json"
    edit(path, **says)
    assert diffusers.read(folder).config == before


@pytest.mark.parametrize(
    "fields",
    [
        dict(resblock_updown=True, use_scale_shift_norm=True, num_head_channels=32),
        dict(resblock_updown=True, attention_resolutions=[2], num_heads=1, groups=16),
        dict(num_classes=10, num_head_channels=32, dropout=0.1),
        dict(context_dim=48, num_heads=4, num_classes="timestep"),
        dict(context_dim=48, num_heads=4, num_classes="continuous"),
        dict(context_dim=48, num_head_channels=16, num_classes="sequential", adm_in_channels=12),
        dict(context_dim=48, num_heads=4, disable_self_attentions=[True, False]),
        dict(context_dim=48, num_heads=4, transformer_depth=[2, 3], use_scale_shift_norm=True),
        dict(context_dim=48, num_heads=4, attention_resolutions=[], resblock_updown=True),
    ],
)
def test_unets_in_json_there_and_back(fields, tmp_path):
    whole = unet(attention_resolutions=[2, 1]) | fields
    path = tmp_path / "config.json"
    path.write_text(json.dumps(unet_to(whole, 32, "class_embedding")))
    found, size, vector = unet_from(Json(path))
    assert canonical_unet(found) == canonical_unet(whole)
    assert (size, vector) == (32, "class_embedding")


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        ("unet", dict(act_fn="gelu"), "act_fn='gelu'"),
        ("unet", dict(norm_eps=1e-6), "norm_eps=1e-06"),
        ("unet", dict(dual_cross_attention=True), "dual_cross_attention=True"),
        ("unet", dict(freq_shift=1), "freq_shift=1"),
        ("unet", dict(flip_sin_to_cos=False), "flip_sin_to_cos=False"),
        ("unet", dict(time_cond_proj_dim=256), "time_cond_proj_dim=256"),
        ("unet", dict(encoder_hid_dim=64), "encoder_hid_dim=64"),
        ("unet", dict(mid_block_type=None), "mid_block_type=None"),
        ("unet", dict(attention_head_dim=[2, 3]), r"attention_head_dim=\[2, 3\]"),
        ("unet", dict(class_embed_type="identity"), "class_embed_type='identity'"),
        ("unet", dict(addition_embed_type="text"), "addition_embed_type='text'"),
        ("unet", dict(cross_attention_dim=96), "cross_attention_dim=96"),
        ("unet", dict(something_new=3), "something_new=3 is not a key that we know"),
        (
            "unet",
            dict(down_block_types=["CrossAttnDownBlock2D", "KDownBlock2D"]),
            "down_block_types='KDownBlock2D'",
        ),
        ("unet", dict(up_block_types=["UpBlock2D", "UpBlock2D"]), "up_block_types="),
        ("unet", dict(layers_per_block=[1, 2]), r"layers_per_block=\[1, 2\]"),
        ("vae", dict(act_fn="relu"), "act_fn='relu'"),
        ("vae", dict(shift_factor=0.1), "shift_factor=0.1"),
        ("vae", dict(latents_mean=[0.0]), "latents_mean="),
        ("vae", dict(use_post_quant_conv=False), "use_post_quant_conv=False"),
        ("text_encoder", dict(hidden_act="relu"), "hidden_act='relu'"),
        ("text_encoder", dict(intermediate_size=37), "intermediate_size=37"),
        ("text_encoder", dict(layer_norm_eps=1e-6), "layer_norm_eps=1e-06"),
        ("text_encoder", dict(vocab_size=1000), "vocab_size=1000, but the tokenizer has 49408"),
        ("scheduler", dict(beta_schedule="sigmoid"), "beta_schedule='sigmoid'"),
        ("scheduler", dict(prediction_type="flow_prediction"), "prediction_type='flow_prediction'"),
        ("scheduler", dict(trained_betas=[0.1]), r"trained_betas=\[0.1\]"),
        ("scheduler", dict(timestep_spacing="odd"), "timestep_spacing='odd'"),
    ],
)
def test_what_we_cannot_be_is_refused_with_file_key_and_value(place, change, message, copied):
    folder = copied("stable-diffusion-1")
    name = "scheduler_config.json" if place == "scheduler" else "config.json"
    edit(folder / place / name, **change)
    with pytest.raises(ValueError, match=f"{place}/{name}: {message}"):
        diffusers.read(folder)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            dict(unet=["diffusers", "UNet3DConditionModel"]),
            "unet is of class 'UNet3DConditionModel'",
        ),
        (dict(text_encoder=["transformers", "T5EncoderModel"]), "'T5EncoderModel': known are CLIP"),
        (dict(transformer=["diffusers", "SD3Transformer2DModel"]), "transformer='SD3Transformer2D"),
        (dict(scheduler=["diffusers", "EDMEulerScheduler"]), "'EDMEulerScheduler': known are DDIM"),
        (dict(vae=["diffusers", "AsymmetricAutoencoderKL"]), "vae is of class 'Asymmetric"),
        (dict(unet=[None, None]), "names no unet"),
        (dict(tokenizer="absent"), "names no tokenizer"),
    ],
)
def test_classes_that_we_do_not_know(entry, message, copied):
    folder = copied("stable-diffusion-1")
    edit(folder / "model_index.json", **entry)
    with pytest.raises(ValueError, match=f"model_index.json.*{message}"):
        diffusers.read(folder)


def test_what_else_a_pipeline_has_is_passed_over(copied):
    folder = copied("stable-diffusion-1")
    before = diffusers.read(folder).config
    edit(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        image_encoder=["transformers", "CLIPVisionModelWithProjection"],
    )
    assert diffusers.read(folder).config == before


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_damaged_json(content, copied):
    folder = copied("stable-diffusion-1")
    (folder / "unet" / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"unet/config.json (is no JSON|holds a)"):
        diffusers.read(folder)


def test_missing_files_and_keys(copied):
    folder = copied("stable-diffusion-1")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = dict(open_state(weights))
    del tensors["conv_out.bias"]
    tensors["conv_in.bias"] = np.zeros(3, np.float32)
    write_safetensors(weights, tensors | {"more": np.zeros(1)})
    report = diffusers.read(folder).reports["unet"]
    assert report.missing == ("conv_out.bias",)
    assert report.extra == ("more",)
    assert report.misshapen == ("conv_in.bias: expected (64,), found (3,)",)
    write_safetensors(weights, tensors | {"conv_in.bias": np.full(64, np.nan, np.float32)})
    with pytest.raises(ValueError, match=r"model.safetensors: conv_in.bias holds NaN"):
        diffusers.read(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights in .*unet"):
        diffusers.read(folder)
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"vae/config.json is missing"):
        diffusers.read(folder)


def test_older_names_of_attention(copied):
    folder = copied("ldm-celebahq-256")
    before = diffusers.read(folder).params
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for component in ("unet", "vqvae"):
        weights = folder / component / "diffusion_pytorch_model.safetensors"
        tensors = dict(open_state(weights))
        for new, name in old.items():
            tensors = {k.replace(f".{new}.", f".{name}."): v for k, v in tensors.items()}
        assert any("proj_attn" in name for name in tensors)
        write_safetensors(weights, tensors)
    same(diffusers.read(folder).params, before)


def test_vq_latents_are_unscaled_unless_it_is_said(copied):
    folder = copied("ldm-celebahq-256")
    edit(folder / "vqvae" / "config.json", scaling_factor="absent")
    assert diffusers.read(folder).config["autoencoder"]["scale_factor"] == 1.0
    edit(folder / "vqvae" / "config.json", scaling_factor=0.18215)
    assert diffusers.read(folder).config["autoencoder"]["scale_factor"] == 0.18215


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            dict(_class_name="PNDMScheduler", skip_prk_steps=True, set_alpha_to_one=False),
            dict(spacing="leading", offset=1, end="first"),
        ),
        (dict(_class_name="PNDMScheduler"), dict(spacing="leading", offset=1, end="first")),
        (dict(_class_name="DDIMScheduler", steps_offset=0), dict(offset=1, end="clean")),
        (dict(_class_name="EulerDiscreteScheduler"), dict(spacing="linspace", end="clean")),
        (
            dict(_class_name="DPMSolverMultistepScheduler", timestep_spacing="trailing"),
            dict(spacing="trailing", end="clean"),
        ),
        (
            dict(_class_name="DDIMScheduler", rescale_betas_zero_snr=True, clip_sample=True),
            dict(zero_terminal_snr=True),
        ),
        (
            dict(_class_name="DDIMScheduler", beta_schedule="linear", beta_end=0.02),
            dict(name="sqrt_linear", end=0.02),
        ),
        (dict(_class_name="HeunDiscreteScheduler"), dict(name="sqrt_linear", start=0.00085)),
        (dict(_class_name="LCMScheduler"), dict(spacing="lcm")),
    ],
)
def test_schedulers(content, expected, copied):
    folder = copied("stable-diffusion-1")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(content))
    edit(folder / "model_index.json", scheduler=["diffusers", content["_class_name"]])
    diffusion = diffusers.read(folder).config["diffusion"]
    found = diffusion["schedule"] if {"name", "zero_terminal_snr"} & expected.keys() else diffusion
    assert expected.items() <= found.items()


def test_latents_that_a_scheduler_would_clip(copied):
    folder = copied("ldm-celebahq-256")
    edit(folder / "scheduler" / "scheduler_config.json", clip_sample=True)
    with pytest.raises(ValueError, match="clip_sample=True is not supported"):
        diffusers.read(folder)


def test_the_vocabulary_that_ships_is_known_in_either_form(copied):
    folder = copied("stable-diffusion-2")
    section = diffusers.read(folder).config["conditioning"]["text"]
    assert (section["vocabulary"], section["padding"]) == ("clip", "zero")
    tokenizer = folder / "tokenizer"
    merges = (tokenizer / "merges.txt").read_text().splitlines()[1:]
    vocabulary = json.loads((tokenizer / "vocab.json").read_text())
    for name in ("merges.txt", "vocab.json"):
        (tokenizer / name).unlink()
    for pairs in (merges, [line.split() for line in merges]):  # of transformers 4 and 5
        model = dict(model=dict(type="BPE", vocab=vocabulary, merges=pairs))
        (tokenizer / "tokenizer.json").write_text(json.dumps(model))
        assert diffusers.read(folder).config["conditioning"]["text"] == section
    (tokenizer / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="neither merges.txt nor a tokenizer.json"):
        diffusers.read(folder)


def test_a_vocabulary_of_ones_own(copied):
    folder = copied("stable-diffusion-1")
    tokenizer = folder / "tokenizer"
    lines = (tokenizer / "merges.txt").read_text().splitlines()[:101]
    (tokenizer / "merges.txt").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="vocab.json: .* has id 49407, and 613 by the rule"):
        diffusers.read(folder)
    ids = BytePair(str(tokenizer / "merges.txt"))._tokenizer.get_vocab()
    (tokenizer / "vocab.json").write_text(json.dumps(ids))
    section = diffusers.read(folder).config["conditioning"]["text"]
    assert section["vocabulary"] == str(tokenizer / "merges.txt")
    edit(tokenizer / "tokenizer_config.json", model_max_length=32)
    with pytest.raises(ValueError, match="model_max_length=32, but the text encoder reads 77"):
        diffusers.read(folder)


def test_words_of_ones_own(copied):
    folder = copied("ldm-text2im-large-256")
    assert diffusers.read(folder).config["conditioning"]["text"]["vocabulary"] == "bert"
    words = (VOCABULARIES / "bert.txt").read_text().splitlines()
    words[-1] = "newword"
    path = folder / "tokenizer" / "vocab.txt"
    path.write_text("\n".join(words) + "\n")
    section = diffusers.read(folder).config["conditioning"]["text"]
    assert section["vocabulary"] == str(path)
    path.write_text("\n".join(words[:-1]) + "\n")
    with pytest.raises(ValueError, match="bert/config.json: vocab_size is not 30521"):
        diffusers.read(folder)


def test_rinnas_sentencepiece(copied):
    folder = copied("stable-diffusion-1")
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    edit(folder / "model_index.json", tokenizer=["transformers", "T5Tokenizer"])
    with pytest.raises(FileNotFoundError, match="spiece.model is missing"):
        diffusers.read(folder)
    (folder / "tokenizer" / "spiece.model").write_bytes(b"not read here")
    section = diffusers.read(folder).config["conditioning"]["text"]
    assert section["tokenizer"] == "sentencepiece"
    assert section["vocabulary"] == str(folder / "tokenizer" / "spiece.model")
    found = diffusers.read(folder)
    diffusers.write(folder / "again", found.config, found.params)
    assert (folder / "again" / "tokenizer" / "spiece.model").read_bytes() == b"not read here"


@pytest.mark.parametrize(
    ("system_name", "section", "fields", "message"),
    [
        ("stable-diffusion-1", "autoencoder", dict(patch_size=2), "patch_size=2"),
        (
            "stable-diffusion-1",
            "diffusion",
            dict(parameterization="flow"),
            "parameterization='flow'",
        ),
        ("stable-diffusion-1", "diffusion", dict(spacing="karras"), "spacing='karras'"),
        ("ldm-celebahq-256", "diffusion", dict(schedule=dict(name="edm")), "schedule.name='edm'"),
    ],
)
def test_what_diffusers_cannot_say_is_not_written(system_name, section, fields, message, tmp_path):
    config = system(system_name)
    params = random_params(config)
    config[section] |= fields
    with pytest.raises(ValueError, match=message):
        diffusers.write(tmp_path / "folder", config, params)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_left_alone(folders, tmp_path):
    _, config, params = folders("sdxl-vae")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        diffusers.write(tmp_path, config, params)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_unets_and_what_is_neither(folders, tmp_path):
    folder, config, params = folders("stable-diffusion-1")
    found = diffusers.read_component(folder / "unet")
    assert found.config["task"] == "unet"
    same(found.params, {"unet": params["unet"]})
    (tmp_path / "config.json").write_text(json.dumps(dict(_class_name="ControlNetModel")))
    with pytest.raises(ValueError, match="_class_name='ControlNetModel' is not supported"):
        diffusers.read_component(tmp_path)


def test_the_tiny_autoencoder(tmp_path):
    fields = dict(kind="tiny", width=8, encoder_blocks=[1, 2], decoder_blocks=[2, 1])
    config = dict(task="autoencoder", autoencoder=fields)
    params = random_params(config)
    diffusers.write(tmp_path / "taesd", config, params)
    found = diffusers.read_component(tmp_path / "taesd")
    same(found.params, params)
    whole = dict(in_channels=3, out_channels=3, latent_channels=4) | fields
    assert found.config["autoencoder"] == whole
