"""Files in CompVis' layout: what we write is read back, bit by bit, as the same model."""

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from ldm_jax.interop import compvis
from ldm_jax.interop.files import open_state, write_safetensors
from ldm_jax.interop.layout import slots
from ldm_jax.interop.recognise import Part, Recognised
from tests.interop.systems import SYSTEMS, random_params, system

UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def made():
    """(config, params) of a system, drawn once."""
    cache = {}

    def make(name):
        if name not in cache:
            cache[name] = random_params(system(name))
        return system(name), cache[name]

    return make


@pytest.fixture
def stable(made, tmp_path):
    """A file of Stable Diffusion 1, and its tensors."""
    config, params = made("stable-diffusion-1")
    path = tmp_path / "sd.safetensors"
    compvis.write(path, config, params)
    return path, dict(open_state(path))


def same(ours, theirs):
    ours, theirs = flatten_dict(ours, sep="/"), flatten_dict(theirs, sep="/")
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        assert leaf.dtype == theirs[path].dtype, path
        np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_comes_back(name, made, tmp_path):
    config, params = made(name)
    path = tmp_path / "model.safetensors"
    compvis.write(path, config, params)
    found = compvis.read(path)
    assert found.config == config
    same(found.params, params)
    odd = {name: report for name, report in found.reports.items() if report != compvis.Report()}
    assert not odd
    compvis.write(tmp_path / "again.safetensors", found.config, found.params)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_names_are_the_originals(made, tmp_path):
    def names(system):
        path = tmp_path / f"{system}.safetensors"
        compvis.write(path, *made(system))
        return set(open_state(path))

    text, blocks = "cond_stage_model.transformer.text_model.", "transformer.resblocks.1."
    stable = names("stable-diffusion-1")
    assert {f"{text}final_layer_norm.weight", f"{text}embeddings.position_ids"} <= stable
    assert {f"{UNET}input_blocks.1.1.proj_in.weight", "betas", "alphas_cumprod"} <= stable
    second = names("stable-diffusion-2")
    assert f"cond_stage_model.model.{blocks}attn.in_proj_weight" in second
    assert "cond_stage_model.model.text_projection" not in second
    base = names("stable-diffusion-xl-base")
    assert "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias" in base
    assert f"conditioner.embedders.1.model.{blocks}mlp.c_fc.weight" in base
    assert "conditioner.embedders.1.model.text_projection" in base
    assert "conditioner.embedders.0.model.ln_final.weight" in names("stable-diffusion-xl-refiner")
    assert "encoder.conv_in.weight" in names("sdxl-vae")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_there_and_back(dtype, made, tmp_path):
    config, params = made("sdxl-vae")
    path = tmp_path / "half.safetensors"
    compvis.write(path, config, params, dtype)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    assert open_state(path)["encoder.conv_in.weight"].dtype == kind
    same(compvis.read(path, dtype=dtype).params, jax.tree.map(lambda x: x.astype(kind), params))
    assert compvis.read(path).config == config


def test_the_whole_text_encoder_of_stable_diffusion_2_gives_all_blocks_but_the_last(made, tmp_path):
    config, params = made("stable-diffusion-2")
    path = tmp_path / "sd2.safetensors"
    compvis.write(path, config, params)
    tensors, base = dict(open_state(path)), "cond_stage_model.model."
    last = f"{base}transformer.resblocks.2."
    tensors |= {n.replace(last, last[:-2] + "3."): t for n, t in tensors.items() if last in n}
    tensors |= {f"{base}text_projection": np.eye(128), f"{base}logit_scale": np.float32(4.6)}
    write_safetensors(path, tensors)
    found = compvis.read(path)
    assert found.config == config
    same(found.params, params)
    assert not found.reports["text"].extra


def test_v_prediction_is_seen_in_the_weights(made, tmp_path):
    config, params = made("stable-diffusion-2-v")
    path = tmp_path / "sd2.safetensors"
    compvis.write(path, config, params)
    assert "v_pred" in open_state(path)  # for the file is too small to have that norm


def averaged(tensors, factor=2.0):
    """The averages of a file's UNet, as Lightning names them."""
    unet = {name: tensor for name, tensor in tensors.items() if name.startswith(UNET)}
    return {
        "model_ema." + name.removeprefix("model.").replace(".", ""): factor * tensor
        for name, tensor in unet.items()
    }


def test_averaged_or_trained_weights(stable):
    path, tensors = stable
    bare = {name: tensor for name, tensor in tensors.items() if not name.startswith(UNET)}
    both = tensors | averaged(tensors) | {"model_ema.decay": np.float32(0.9999)}
    kernel = UNET + "out.2.weight"

    def read(content, ema):
        write_safetensors(path, content)
        found = compvis.read(path, ema)
        weight = found.params["unet"]["out_2"]["kernel"].transpose(3, 2, 0, 1)
        factor = float(np.round(np.mean(weight / tensors[kernel])))
        return factor, found

    assert read(both, "auto")[0] == read(both, False)[0] == 1.0
    factor, found = read(both, True)
    assert factor == 2.0
    assert "averaged" in found.about
    assert all(report == compvis.Report() for report in found.reports.values())
    assert read(bare | averaged(tensors), "auto")[0] == 2.0
    incomplete = {name: tensor for name, tensor in both.items() if name != UNET + "out.2.bias"}
    assert read(incomplete, "auto")[0] == 2.0
    with pytest.raises(ValueError, match=r"sd.safetensors holds no averaged weights \(model_ema"):
        read(tensors, True)
    with pytest.raises(ValueError, match="choose one of 'auto', True, False"):
        read(tensors, "yes")


def test_a_file_of_another_order_and_with_a_learned_variance(monkeypatch, tmp_path):
    """As guided-diffusion's: no prefix, q, k and v first, twice the outputs, pixels."""
    fields = dict(in_channels=3, out_channels=3, model_channels=32, channel_mult=[1, 2])
    fields |= dict(num_res_blocks=1, attention_resolutions=[2], num_heads=4)
    options = dict(new_attention_order=True, learn_sigma=True)
    config = dict(task="diffusion", unet=fields, autoencoder=dict(kind="identity"), conditioning={})
    part = Part("unet", fields, "compvis", "", **options)
    monkeypatch.setattr(
        compvis, "recognise", lambda state: Recognised("guided", config, dict(unet=part))
    )
    tensors = {
        slot.names[0]: np.random.default_rng(0).standard_normal(slot.foreign, np.float32)
        for slot in slots("unet", fields, "compvis", **options).values()
    }
    assert len(tensors["out.2.bias"]) == 6
    write_safetensors(tmp_path / "guided", tensors)
    found = compvis.read(tmp_path / "guided")
    assert found.reports == dict(unet=compvis.Report()) and found.params["autoencoder"] == {}
    assert found.about.endswith("CompVis' layout, without its learned variance")
    qkv = tensors["middle_block.1.qkv.bias"].reshape(3, 4, 16)
    unet = found.params["unet"]
    np.testing.assert_array_equal(
        unet["middle_block_1"]["qkv"]["bias"].reshape(4, 3, 16)[1, 2], qkv[2, 1]
    )
    np.testing.assert_array_equal(unet["out_2"]["bias"], tensors["out.2.bias"][:3])


def test_keys_that_are_missing_misshapen_or_too_many(stable):
    path, tensors = stable
    del tensors[UNET + "out.2.bias"]
    tensors["first_stage_model.quant_conv.bias"] = np.zeros(3, np.float32)
    tensors |= {UNET + "extra.weight": np.zeros(1), "other": np.zeros(1)}
    write_safetensors(path, tensors)
    reports = compvis.read(path).reports
    assert reports["unet"].missing == (UNET + "out.2.bias",)
    assert reports["unet"].extra == (UNET + "extra.weight",)
    (misshapen,) = reports["autoencoder"].misshapen
    assert misshapen == "first_stage_model.quant_conv.bias: expected (8,), found (3,)"
    assert reports["file"].extra == ("other",)


def test_a_schedule_that_none_of_ours_is(stable):
    path, tensors = stable
    table = np.linspace(0.99, 0.01, 1000, dtype=np.float32)
    write_safetensors(path, tensors | {"alphas_cumprod": table})
    with pytest.raises(ValueError, match="sd.safetensors alphas_cumprod: no schedule of ours"):
        compvis.read(path)


@pytest.mark.parametrize(
    "schedule",
    [
        dict(name="sqrt_linear", start=0.0002, end=0.015),
        dict(name="linear", start=0.001, end=0.013),
        dict(zero_terminal_snr=True),
        dict(name="cosine", start=0.0, end=0.0),
    ],
)
def test_other_schedules_come_back(schedule, made, tmp_path):
    from ldm_jax.diffusion.schedule import make_schedule

    config, params = made("ldm-celebahq-256")
    config["diffusion"]["schedule"] |= schedule
    compvis.write(tmp_path / "a.safetensors", config, params)
    found = compvis.read(tmp_path / "a.safetensors").config["diffusion"]["schedule"]
    ours, theirs = (make_schedule(**s) for s in (found, config["diffusion"]["schedule"]))
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod, atol=1e-6)


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        ("unet", dict(num_heads=4), r"unet.num_heads=\(4, 4\) would be read as \(8, 8\)"),
        ("unet", dict(groups=16), "unet.groups=16 would be read as 32"),
        ("autoencoder", dict(groups=16), "autoencoder.groups=16 would be read as 32"),
        ("diffusion", dict(parameterization="x0"), "diffusion.parameterization='x0'"),
        ("diffusion", dict(schedule=dict(name="flow")), "has no table of β"),
    ],
)
def test_what_the_layout_cannot_say_is_not_written(section, fields, message, made, tmp_path):
    config, params = made("stable-diffusion-1")
    config[section] |= fields
    with pytest.raises(ValueError, match=message):
        compvis.write(tmp_path / "a.safetensors", config, params)
    assert not list(tmp_path.iterdir())


def test_a_scale_in_double_precision_is_rounded(made, tmp_path):
    config, params = made("sdxl-vae")
    config["autoencoder"]["scale_factor"] = 1 / 3
    compvis.write(tmp_path / "a.safetensors", config, params)
    found = compvis.read(tmp_path / "a.safetensors").config["autoencoder"]["scale_factor"]
    assert np.float32(found) == np.float32(1 / 3)


def test_another_tokenizer_is_not_written(made, tmp_path):
    config, params = made("stable-diffusion-1")
    config["conditioning"]["text"] |= dict(tokenizer="sentencepiece", vocabulary="spiece.model")
    with pytest.raises(ValueError, match="text.tokenizer='sentencepiece' would be read as"):
        compvis.write(tmp_path / "a.safetensors", config, params)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lora_unet_mid_block.lora_up.weight"], "is a LoRA: it changes a model"),
        (["control_model.input_blocks.0.0.weight"], "is a ControlNet"),
        (["model.diffusion_model.joint_blocks.0.x"], "is a diffusion transformer"),
        (["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"], "name the folder"),
        (
            ["a", "b", "c", "d"],
            "looked for model.diffusion_model.input_blocks.* .* such as a, b, c",
        ),
    ],
)
def test_files_of_something_else(names, message, tmp_path):
    path = tmp_path / "other.safetensors"
    write_safetensors(path, {name: np.zeros(1, np.float32) for name in names})
    with pytest.raises(ValueError, match=f"other.safetensors is .*{message.removeprefix('is ')}"):
        compvis.read(path)


def test_a_conditioner_that_we_do_not_know(stable):
    path, tensors = stable
    rename = ("cond_stage_model.transformer", "cond_stage_model.unknown")
    write_safetensors(path, {name.replace(*rename): tensor for name, tensor in tensors.items()})
    with pytest.raises(
        ValueError, match="holds a conditioner that we do not know, with cond_stage"
    ):
        compvis.read(path)


def test_a_model_without_its_autoencoder(stable):
    path, tensors = stable
    part = {name: tensor for name, tensor in tensors.items() if "first_stage" not in name}
    write_safetensors(path, part)
    with pytest.raises(ValueError, match=r"sd.safetensors holds a UNet .* but no autoencoder"):
        compvis.read(path)
