"""The components of diffusers' folders: JSON of networks and schedulers, tokenizers."""

import json
import logging
import shutil

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from ldm_jax.conditions.tokenizer import VOCABULARIES, BytePair, FolderTokenizer
from ldm_jax.interop import diffusers
from ldm_jax.interop.diffusers.components import Json, autoencoder_from, autoencoder_to
from ldm_jax.interop.diffusers.tokenizers import (
    read_tokenizer,
    tokenizer_class,
    write_tokenizer,
)
from ldm_jax.interop.diffusers.unets import unet_from, unet_to
from ldm_jax.interop.fields import canonical
from tests.interop.systems import edit, kl, random_params, system, unet
from tests.interop.test_compvis import same

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
        dict(context_dim=48, num_heads=[2, 3], channel_mult=[1, 1.5], time_cond_proj_dim=20),
        dict(context_dim=48, num_heads=[3, 4], attention_resolutions=[2], channel_mult=[1, 1.25]),
        dict(num_heads=[2, 3], channel_mult=[1, 1.5]),
        dict(channel_mult=[1], attention_resolutions=[1], num_heads=2),
        dict(channel_mult=[1, 2, 3], attention_resolutions=[2], num_head_channels=32),
    ],
)
def test_unets_in_json_there_and_back(fields, tmp_path):
    whole = unet(attention_resolutions=[2, 1]) | fields
    path = tmp_path / "config.json"
    beside = dict(sample_size=32, vector="class_embedding")
    path.write_text(json.dumps(unet_to(whole, **beside)))
    found, also = unet_from(Json(path))
    assert canonical(dict(unet=found)) == canonical(dict(unet=whole))
    assert also == beside


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        ("unet", dict(act_fn="gelu"), "act_fn='gelu'"),
        ("unet", dict(norm_eps=1e-6), "norm_eps=1e-06"),
        ("unet", dict(dual_cross_attention=True), "dual_cross_attention=True"),
        ("unet", dict(freq_shift=1), "freq_shift=1"),
        ("unet", dict(flip_sin_to_cos=False), "flip_sin_to_cos=False"),
        ("unet", dict(encoder_hid_dim=64), "encoder_hid_dim=64"),
        ("unet", dict(mid_block_type=None), "mid_block_type=None"),
        ("unet", dict(attention_head_dim=[2, 3]), r"attention_head_dim=\[2, 3\]"),
        ("unet", dict(attention_head_dim=[2, 4, 8]), r"attention_head_dim=\[2, 4, 8\]"),
        ("unet", dict(attention_head_dim=5), "attention_head_dim=5"),
        ("unet", dict(class_embed_type="identity"), "class_embed_type='identity'"),
        ("unet", dict(addition_embed_type="text"), "addition_embed_type='text'"),
        ("unet", dict(cross_attention_dim=96), "cross_attention_dim=96"),
        (
            "unet",
            dict(something_new=3, _diffusers_version="0.50.0.dev0"),
            "something_new=3 is not a key that we know",
        ),
        (
            "unet",
            dict(down_block_types=["CrossAttnDownBlock2D", "KDownBlock2D"]),
            "down_block_types='KDownBlock2D'",
        ),
        ("unet", dict(up_block_types=["UpBlock2D", "UpBlock2D"]), "up_block_types="),
        ("unet", dict(layers_per_block=[1, 2]), r"layers_per_block=\[1, 2\]"),
        ("vae", dict(act_fn="relu"), "act_fn='relu'"),
        ("vae", dict(shift_factor=0.1), "shift_factor=0.1"),
        ("vae", dict(down_block_types=["DownEncoderBlock2D"] * 3), "down_block_types="),
        ("vae", dict(down_block_types=["DownEncoderBlock2D", "DownBlock2D"]), "down_block_types="),
        ("vae", dict(up_block_types=["UpDecoderBlock2D"]), "up_block_types="),
        ("vae", dict(block_out_channels=32), "block_out_channels=32"),
        ("unet", dict(block_out_channels=[64]), "down_block_types="),
        ("unet", dict(sample_size=[64, 96]), r"sample_size=\[64, 96\]"),
        ("unet", dict(transformer_layers_per_block=[[1], [2]]), "transformer_layers_per_block="),
        ("unet", dict(time_embedding_dim=100), "time_embedding_dim=100"),
        ("vae", dict(latents_mean=[0.0]), "latents_mean="),
        ("vae", dict(use_post_quant_conv=False), "use_post_quant_conv=False"),
        ("text_encoder", dict(hidden_act="relu"), "hidden_act='relu'"),
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


def test_heads_that_do_not_divide_the_width(copied):
    folder = copied("ldm-celebahq-256")
    edit(folder / "unet" / "config.json", attention_head_dim=24)
    with pytest.raises(ValueError, match="unet/config.json: attention_head_dim=24 is not supp"):
        diffusers.read(folder)


@pytest.mark.parametrize("key, value", [
    ("final_sigmas_type", "sigma_min"), ("use_beta_sigmas", True), ("solver_order", 3),
])  # fmt: skip
def test_what_no_sampler_here_has_is_said(copied, caplog, key, value):
    folder = copied("stable-diffusion-1")
    edit(folder / "scheduler" / "scheduler_config.json", **{key: value})
    with caplog.at_level(logging.WARNING, "ldm_jax"):
        logging.getLogger("ldm_jax").propagate = True
        diffusers.read(folder)
    assert f"{key}={value!r} is not supported, so pictures differ" in caplog.text


def test_keys_that_diffusers_does_not_know_are_passed_over(copied, caplog):
    folder = copied("stable-diffusion-1")
    before = diffusers.read(folder).config
    edit(folder / "unet" / "config.json", double_z=True, _diffusers_version="0.0.4")
    assert diffusers.read(folder).config == before
    assert "double_z=True is no key of diffusers: passed over" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(addition_time_embed_dim=8),
            r"=1664, but the pooled text has 128 and \['original_size', .* 8 for each number",
        ),
        (
            dict(projection_class_embeddings_input_dim=2816),
            r"input_dim=2816, but the pooled text has 128 and \['original_size', 'crop', 'target_",
        ),
        (
            dict(cross_attention_dim=64),
            r"=64, but the text encoders \['text', 'text_2'\] are \[64, 128",
        ),
    ],
)
def test_a_unet_of_sdxl_that_its_encoders_do_not_fit(change, message, copied):
    folder = copied("stable-diffusion-xl-base")
    edit(folder / "unet" / "config.json", **change)
    with pytest.raises(ValueError, match=f"unet/config.json: .*{message}"):
        diffusers.read(folder)


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
    assert read_tokenizer(tokenizer, "CLIPTokenizer", 77)["tokenizer"] == "folder"
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


@pytest.fixture
def words(tmp_path):
    """A tokenizer of a class that is none of ours, as transformers writes it."""
    from transformers import PreTrainedTokenizerFast

    pieces = ["[PAD]", "[UNK]", "[END]", "a", "red", "apple"]
    built = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    built.post_processor = processors.TemplateProcessing(
        single="$A [END]", special_tokens=[("[END]", 2)]
    )
    folder = tmp_path / "tokenizer"
    special = dict(unk_token="[UNK]", pad_token="[PAD]")
    PreTrainedTokenizerFast(tokenizer_object=built, **special).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["clip", "text"])
def test_a_tokenizer_of_another_class_is_read_by_transformers(words, kind, tmp_path):
    from transformers import AutoTokenizer

    section = read_tokenizer(words, "PreTrainedTokenizerFast", 8)
    assert section == dict(tokenizer="folder", vocabulary=str(words))
    tokens = FolderTokenizer(section["vocabulary"], 8)(["a red apple", "a pear"])
    assert tokens.tolist() == [[3, 4, 5, 2, 0, 0, 0, 0], [3, 1, 2, 0, 0, 0, 0, 0]]
    section |= dict(kind=kind)
    assert tokenizer_class(section) == "PreTrainedTokenizerFast"
    write_tokenizer(tmp_path / "again", section, 8)
    again = AutoTokenizer.from_pretrained(str(tmp_path / "again"), local_files_only=True)
    expected = again(["a red apple", "a pear"], padding="max_length", max_length=8)["input_ids"]
    assert tokens.tolist() == expected


@pytest.mark.parametrize("class_name", ["BertTokenizer", "T5TokenizerFast", "CLIPTokenizer"])
def test_files_that_ours_cannot_express_are_read_by_transformers(words, class_name):
    """Pieces without a vocab.txt or a spiece.model, and CLIP's with a padding of their own."""
    if class_name == "CLIPTokenizer":
        write_tokenizer(words / "clip", dict(kind="clip", vocabulary="clip"), 77)
        words = words / "clip"
        edit(words / "special_tokens_map.json", pad_token="a</w>")
        edit(words / "tokenizer_config.json", pad_token="a</w>")
    assert read_tokenizer(words, class_name, 8)["tokenizer"] == "folder"


def test_a_tokenizer_that_nobody_can_read_is_refused(words):
    (words / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=f"{words}: transformers cannot read this tokenizer"):
        read_tokenizer(words, "PreTrainedTokenizerFast", 8)
    shutil.rmtree(words)
    with pytest.raises(ValueError, match="tokenizer': there is no such folder"):
        read_tokenizer(words, "PreTrainedTokenizerFast", 8)


@pytest.mark.parametrize(
    "fields",
    [
        dict(groups=4, ch=20, ch_mult=[1, 1.4, 0.6, 3.0]),
        dict(kind="vq", n_embed=9, ch_mult=[1, 1.5], attn_resolutions=[128], embed_dim=2),
    ],
)
def test_autoencoders_of_any_widths_in_json_there_and_back(fields, tmp_path):
    section = kl(0.5) | fields
    path = tmp_path / "config.json"
    path.write_text(json.dumps(autoencoder_to(section, 256)))
    assert autoencoder_from(Json(path)) == section


def test_a_text_encoder_with_narrow_mlps_and_another_epsilon(tmp_path):
    config = system("stable-diffusion-1")
    config["conditioning"]["text"]["network"] |= dict(mlp_width=37, epsilon=1e-3, heads=4)
    params = random_params(config)
    diffusers.write(tmp_path / "folder", config, params)
    found = diffusers.read(tmp_path / "folder")
    assert found.config["conditioning"] == config["conditioning"]
    same(found.params, params)
    content = json.loads((tmp_path / "folder" / "text_encoder" / "config.json").read_text())
    assert (content["intermediate_size"], content["layer_norm_eps"]) == (37, 1e-3)


def test_a_model_that_is_told_the_guidance_and_one_with_sizes_in_8_sinusoids(tmp_path):
    consistent, small = system("stable-diffusion-1"), system("stable-diffusion-xl-base")
    consistent["unet"]["time_cond_proj_dim"] = 256
    consistent["diffusion"] |= dict(spacing="lcm")
    small["unet"]["adm_in_channels"] = 128 + 6 * 8
    small["conditioning"]["sizes"]["dim"] = 8
    for config, name in ((consistent, "LatentConsistencyModel"), (small, "StableDiffusionXL")):
        folder, params = tmp_path / name, random_params(config)
        diffusers.write(folder, config, params)
        index = json.loads((folder / "model_index.json").read_text())
        assert index["_class_name"] == f"{name}Pipeline"
        found = diffusers.read(folder)
        assert found.config["conditioning"] == config["conditioning"]
        assert canonical(dict(unet=found.config["unet"])) == canonical(dict(unet=config["unet"]))
        same(found.params, params)
        lcm = config is consistent
        expected = dict(sampler="lcm", steps=4, guidance=8.5) if lcm else dict(sampler="ddim")
        assert expected.items() <= found.config["sampling"].items()


def test_latent_diffusion_with_a_text_encoder_of_clip(copied):
    """As in the folders that diffusers' own tests make."""
    folder = copied("stable-diffusion-1")
    before = diffusers.read(folder)
    index = json.loads((folder / "model_index.json").read_text())
    for name, old in (("bert", "text_encoder"), ("vqvae", "vae")):
        (folder / old).rename(folder / name)
        edit(folder / "model_index.json", **{name: index[old], old: "absent"})
    found = diffusers.read(folder)
    assert found.config["conditioning"] == before.config["conditioning"]
    same(found.params, before.params)


ATTN, PLAIN, RESNET = "AttnDownBlock2D", "DownBlock2D", "ResnetDownsampleBlock2D"


@pytest.mark.parametrize(
    ("blocks", "resnet"),
    [
        (dict(down=[PLAIN, RESNET], up=["UpBlock2D", "ResnetUpsampleBlock2D"]), False),
        (dict(down=[RESNET, PLAIN], up=["ResnetUpsampleBlock2D", "UpBlock2D"]), True),
        (dict(down=[ATTN, PLAIN], up=["UpBlock2D", "AttnUpBlock2D"]), False),
        (dict(down=[ATTN, ATTN], up=["AttnUpBlock2D"] * 2, ways="resnet"), True),
        (dict(down=[PLAIN, RESNET], up=["ResnetUpsampleBlock2D", "UpBlock2D"]), "up_block_types"),
        (dict(down=[PLAIN, ATTN], up=["UpBlock2D", "UpBlock2D"]), "up_block_types"),
        (dict(down=[PLAIN, ATTN], up=["AttnUpBlock2D"]), "up_block_types"),
        (dict(down=[RESNET, ATTN], up=["AttnUpBlock2D", "UpBlock2D"]), "up_block_types"),
        (dict(down=[RESNET, PLAIN, PLAIN], up=["UpBlock2D"] * 3), "down_block_types"),
    ],
)
def test_blocks_that_resize(blocks, resnet, tmp_path):
    """The last one of either way does not, and those that attend do it as two more keys say."""
    content = unet_to(unet(num_heads=1, channel_mult=[1] * len(blocks["down"])), vector="")
    content |= {f"{way}_block_types": blocks[way] for way in ("down", "up")}
    content |= {f"{way}sample_type": blocks.get("ways", "conv") for way in ("down", "up")}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    if isinstance(resnet, bool):
        assert unet_from(Json(path))[0].get("resblock_updown", False) == resnet
    else:
        with pytest.raises(ValueError, match=f"config.json: {resnet}="):
            unet_from(Json(path))


@pytest.mark.parametrize("attends", [[1], [2], [2, 1]])
def test_cross_attention_at_levels_that_res_blocks_resize_is_not_written(attends):
    fields = unet(context_dim=48, resblock_updown=True, attention_resolutions=attends)
    with pytest.raises(ValueError, match="unet.resblock_updown with cross-attention"):
        unet_to(fields, vector="class_embedding", sample_size=8)
