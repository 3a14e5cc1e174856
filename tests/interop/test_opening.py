"""The content of any path is recognised, or refused in one message."""

import json
import logging
import shutil

import ml_dtypes
import numpy as np
import pytest

from ldm_jax.interop import compvis, diffusers, native
from ldm_jax.interop.files import open_state, write_safetensors
from ldm_jax.interop.layout import slots
from ldm_jax.interop.opening import export, open_any, read_any
from tests.interop.systems import edit, kl, random_params, system
from tests.interop.test_compvis import same
from tests.interop.test_pickle_reader import Call, Global, tensor, write_zip

UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same small models in every layout: folder, config, params of the first."""
    folder = tmp_path_factory.mktemp("models")
    config = system("stable-diffusion-1")
    params = random_params(config)
    native.save_model(folder / "ours.safetensors", config, params)
    (folder / "workdir").mkdir()
    shutil.copy(folder / "ours.safetensors", folder / "workdir" / "model.safetensors")
    (folder / "workdir" / "config.json").write_text(json.dumps(config))
    compvis.write(folder / "compvis.safetensors", config, params)
    diffusers.write(folder / "diffusers", config, params)
    checkpoint(folder / "sd-v1-4.ckpt", open_state(folder / "compvis.safetensors"))
    return folder, config, params


def checkpoint(path, tensors):
    """A Lightning checkpoint as CompVis released theirs: what trained beside what was trained."""
    codes = {"float32": "FloatStorage", "int64": "LongStorage"}
    state, storages = {}, {}
    for i, (name, array) in enumerate(tensors.items()):
        stride = [n // array.itemsize for n in array.strides]
        kind = codes[str(array.dtype)]
        state[name] = tensor(str(i), array.shape, stride, numel=array.size, kind=kind)
        storages[str(i)] = array
    callback = Global("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    tree = {"epoch": 6, "global_step": 470000, "pytorch-lightning_version": "1.4.2"}
    tree |= {"state_dict": state, "callbacks": {callback: {"monitor": "val/loss"}}}
    return write_zip(path, tree, storages)


LAYOUTS = ["ours.safetensors", "workdir", "compvis.safetensors", "diffusers", "sd-v1-4.ckpt"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_recognised(name, files):
    folder, config, params = files
    found = open_any(folder / name)
    same(found.params, params)
    assert found.config["unet"] == config["unet"]
    assert found.config["conditioning"] == config["conditioning"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_parameters_have_the_type_that_is_asked_for(name, files):
    folder, _, params = files
    found = open_any(str(folder / name), "bfloat16").params["unet"]["out_2"]["kernel"]
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found, params["unet"]["out_2"]["kernel"].astype(found.dtype))


def test_what_ships():
    assert open_any().config["task"] == "diffusion"


def test_autoencoders_alone(tmp_path):
    config = system("sdxl-vae")
    params = random_params(config)
    compvis.write(tmp_path / "vae.safetensors", config, params)
    diffusers.write(tmp_path / "vae", config, params)
    for path in (tmp_path / "vae.safetensors", tmp_path / "vae"):
        found = open_any(path)
        assert found.config == config
        same(found.params, params)


def test_tensors_that_nothing_uses_are_logged(files, tmp_path, caplog):
    path = tmp_path / "more.safetensors"
    tensors = dict(open_state(files[0] / "compvis.safetensors"))
    write_safetensors(path, tensors | {UNET + "time_stack.weight": np.zeros(1)})
    with caplog.at_level(logging.WARNING, "ldm_jax"):
        open_any(path)
    assert "1 tensors are not used, such as model.diffusion_model.time_stack.weight" in caplog.text


def copy_of_unet(folder, path):
    shutil.copytree(folder / "diffusers" / "unet", path)


def without(name):
    def write(folder, path):
        tensors = dict(open_state(folder / "compvis.safetensors"))
        write_safetensors(path, {key: t for key, t in tensors.items() if key != name})

    return write


def changed(name, array):
    def write(folder, path):
        tensors = dict(open_state(folder / "compvis.safetensors"))
        write_safetensors(path, tensors | {name: array})

    return write


def holding(data):
    return lambda folder, path: path.write_bytes(data)


def truncated(folder, path):
    path.write_bytes((folder / "compvis.safetensors").read_bytes()[:-100])


def text_encoder(folder, path):
    shutil.copytree(folder / "diffusers" / "text_encoder", path)


def vision_encoder(folder, path):
    text_encoder(folder, path)
    edit(path / "config.json", architectures=["CLIPVisionModel"])


def damaged(folder, path):
    path.mkdir()
    (path / "config.json").write_text("{")


BAD = {
    "nothing": (lambda folder, path: None, "no model at .*: there is no such file or folder"),
    "an empty folder": (lambda folder, path: path.mkdir(), "no model in"),
    "an empty file": (holding(b""), "is empty"),
    "text": (holding(b"hello, this is no model at all"), "neither safetensors nor a torch"),
    "zeros": (holding(bytes(100)), "neither safetensors nor a torch|truncated|damaged"),
    "a truncated file": (truncated, "is truncated"),
    "a UNet alone": (copy_of_unet, "holds a UNet alone"),
    "a text encoder alone": (text_encoder, "holds a text encoder alone: it can be the text=PATH"),
    "another encoder": (vision_encoder, r"holds \['CLIPVisionModel'\] of transformers, where"),
    "no JSON": (damaged, "config.json is not JSON"),
    "a missing key": (without(UNET + "out.2.bias"), "unet is not whole: .*out.2.bias is missing"),
    "a wrong shape": (
        changed("first_stage_model.decoder.norm_out.bias", np.zeros(3, np.float32)),
        r"autoencoder is not whole: .*norm_out.bias: expected \(32,\), found \(3,\)",
    ),
    "NaN": (
        changed(UNET + "out.2.bias", np.full(4, np.nan, np.float32)),
        "out.2.bias holds NaN",
    ),
    "a call": (
        lambda folder, path: write_zip(path, Call(Global("os", "system"), ("true",)), {}),
        "refuses to call os.system",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case, files, tmp_path):
    write, message = BAD[case]
    path = tmp_path / "model"
    write(files[0], path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        open_any(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def part_of(folder, path, keep, rename=lambda name: name):
    """A file with the tensors that `keep` wants, under other names."""
    tensors = open_state(folder / "compvis.safetensors")
    write_safetensors(path, {rename(n): t for n, t in tensors.items() if keep(n)})
    return path


def unless(prefix):
    return lambda name: not name.startswith(prefix)


def under(prefix):
    return lambda name: name.startswith(prefix)


STAGE, TEXT = "first_stage_model.", "cond_stage_model."
LACKING = {
    "an autoencoder": (
        unless(STAGE),
        r"holds a UNet and clip conditioner, but no autoencoder \(first_stage_model.\*\): add "
        "autoencoder=PATH",
    ),
    "a text encoder": (
        unless(TEXT),
        r"holds a UNet and an autoencoder, but no text encoders that make a context 64 wide "
        r"\(cond_stage_model.* or .*\): add text=PATH",
    ),
    "both": (under(UNET), "holds a UNet alone: add autoencoder=PATH and, .*, text=PATH"),
}


# A UNet may stand without a prefix.
@pytest.mark.parametrize("case, bare", [*((case, False) for case in LACKING), ("both", True)])
def test_a_part_that_a_file_lacks_comes_from_elsewhere(case, bare, files, tmp_path):
    folder, config, params = files
    keep, message = LACKING[case]
    path = part_of(folder, tmp_path / "part", keep, lambda n: n.removeprefix(UNET * bare))
    with pytest.raises(ValueError, match=message):
        open_any(path)
    sources = dict(autoencoder=folder / "ours.safetensors", text=folder / "diffusers")
    wanted = {"an autoencoder": ["autoencoder"], "a text encoder": ["text"]}.get(case, sources)
    found = open_any(path, **{name: sources[name] for name in wanted})
    same(found.params, params)
    assert found.config == config


TEXT_ALONE = {
    "CLIP's names": lambda folder, path: part_of(
        folder, path, under(TEXT), lambda n: n.removeprefix(f"{TEXT}transformer.")
    ),
    "CLIP's names, newer": lambda folder, path: part_of(
        folder, path, under(TEXT), lambda n: n.removeprefix(f"{TEXT}transformer.text_model.")
    ),
    "the whole model's names": lambda folder, path: part_of(folder, path, under(TEXT)),
    "a folder of transformers": lambda folder, path: shutil.copytree(
        folder / "diffusers" / "text_encoder", path
    ),
}


@pytest.mark.parametrize("case", TEXT_ALONE)
def test_a_text_encoder_alone_can_be_the_part(case, files, tmp_path):
    folder, config, params = files
    encoder = TEXT_ALONE[case](folder, tmp_path / "encoder")
    assert read_any(encoder).config["task"] == "text"
    with pytest.raises(ValueError, match="holds a text encoder alone"):
        open_any(encoder)
    path = part_of(folder, tmp_path / "part", unless(TEXT))
    found = open_any(path, text=encoder)
    same(found.params, params)
    assert found.config == config


def test_an_openclip_encoder_of_transformers_computes_what_stable_diffusion_2_does(tmp_path):
    network = dict(vocab_size=50, width=1024, depth=1, heads=16, max_length=4)
    table = slots("clip", network, "diffusers")
    tensors = {slot.names[0]: np.zeros(slot.foreign, np.float16) for slot in table.values()}
    write_safetensors(tmp_path / "text", tensors)
    section = read_any(tmp_path / "text").config["conditioning"]["text"]
    assert (section["padding"], section["network"]["activation"]) == ("zero", "gelu")


@pytest.mark.parametrize("prefix", [STAGE, "vae.", "model.", "a.b.", ""])
def test_an_autoencoder_stands_under_any_prefix(prefix, files, tmp_path):
    folder, config, params = files
    path = part_of(folder, tmp_path / "vae", under(STAGE), lambda n: n.replace(STAGE, prefix, 1))
    found = open_any(path)
    fields = config["autoencoder"] | dict(scale_factor=1.0)  # no tensor tells
    assert found.config == dict(task="autoencoder", autoencoder=fields)
    same(found.params["autoencoder"], params["autoencoder"])
    assert not any(report.extra for report in found.reports.values())
    part = part_of(folder, tmp_path / "part", unless(STAGE))
    assert open_any(part, autoencoder=path).config == config


@pytest.mark.parametrize(
    "name", ["stable-diffusion-xl-base", "stable-diffusion-2", "ldm-text2im-large-256"]
)
def test_every_kind_of_text_encoder_can_be_the_part(name, tmp_path):
    config = system(name)
    params = random_params(config)
    compvis.write(tmp_path / "whole", config, params)
    tensors = dict(open_state(tmp_path / "whole"))
    for prefix in (TEXT, "conditioner."):
        tensors = {n: t for n, t in tensors.items() if not n.startswith(prefix)}
    write_safetensors(tmp_path / "part", tensors)
    with pytest.raises(ValueError, match="but no text encoders"):
        open_any(tmp_path / "part")
    found = open_any(tmp_path / "part", text=tmp_path / "whole")
    assert found.config == config
    same(found.params, params)


@pytest.mark.parametrize("place", [0, 1])
def test_one_of_two_text_encoders_is_not_enough(place, tmp_path):
    config = system("stable-diffusion-xl-base")
    params = random_params(config)
    compvis.write(tmp_path / "whole", config, params)
    tensors = open_state(tmp_path / "whole")
    kept = {n: t for n, t in tensors.items() if not n.startswith(f"conditioner.embedders.{place}")}
    write_safetensors(tmp_path / "part", kept)
    with pytest.raises(ValueError, match="clip conditioner, but no text encoders .* 192 wide"):
        open_any(tmp_path / "part")
    same(open_any(tmp_path / "part", text=tmp_path / "whole").params, params)


@pytest.mark.parametrize("name", ["ours.safetensors", "compvis.safetensors", "diffusers"])
def test_parts_take_the_place_of_others(name, files, tmp_path):
    folder, config, params = files
    other = system("stable-diffusion-1") | dict(autoencoder=kl(0.5, ch_mult=[1, 2, 2]))
    fresh = random_params(other, seed=1)
    native.save_model(tmp_path / "other", other, fresh)
    found = open_any(folder / name, autoencoder=tmp_path / "other", text=tmp_path / "other")
    # The scale of the latents is what the UNet was trained on.
    assert found.config["autoencoder"] == other["autoencoder"] | dict(scale_factor=0.18215)
    same(found.params, params | {name: fresh[name] for name in ("autoencoder", "text")})


def test_parts_that_do_not_fit_are_refused(files, tmp_path):
    folder, *_ = files
    wide = dict(task="autoencoder", autoencoder=kl(1.0, z=8))
    compvis.write(tmp_path / "wide", wide, random_params(wide))
    text = system("stable-diffusion-2")
    compvis.write(tmp_path / "text", text, random_params(text))
    for name in ("ours.safetensors", "compvis.safetensors"):
        with pytest.raises(ValueError, match="wide .* has latents of 8 channels, the model of 4"):
            open_any(folder / name, autoencoder=tmp_path / "wide")
        with pytest.raises(ValueError, match="context 128 wide|conditioners are .128. wide"):
            open_any(folder / name, text=tmp_path / "text")
    with pytest.raises(ValueError, match=r"text=.*wide holds none, but KL autoencoder"):
        open_any(folder / "ours.safetensors", text=tmp_path / "wide")
    with pytest.raises(ValueError, match=r"wide holds no whole model, .* it takes no other parts"):
        open_any(tmp_path / "wide", autoencoder=tmp_path / "wide")
    for name, prefix in (("autoencoder", STAGE), ("text", TEXT)):
        tensors = open_state(folder / "compvis.safetensors")
        odd = next(n for n in tensors if n.startswith(prefix) and n.endswith("bias"))
        part_of(folder, tmp_path / "odd", lambda n, odd=odd: n != odd)
        with pytest.raises(ValueError, match=rf"{name} is not whole: {odd} is missing"):
            open_any(folder / "ours.safetensors", **{name: tmp_path / "odd"})
    with pytest.raises(FileNotFoundError, match="no model at nowhere"):
        open_any(folder / "ours.safetensors", text="nowhere")


def test_a_unet_alone_can_be_read(files):
    found = read_any(files[0] / "diffusers" / "unet")
    assert found.config["task"] == "unet"


@pytest.mark.parametrize("layout", ["single_file", "compvis", "diffusers"])
def test_export(layout, files, tmp_path):
    _, config, params = files
    export(tmp_path / "new" / "model", config, params, layout=layout)
    same(open_any(tmp_path / "new" / "model").params, params)


def test_a_layout_that_there_is_not(files, tmp_path):
    with pytest.raises(ValueError, match="layout='onnx': choose one of single_file, compvis, diff"):
        export(tmp_path / "model", *files[1:], layout="onnx")
    with pytest.raises(ValueError, match="dtype='int8': choose one of float32, float16, bfloat16"):
        export(tmp_path / "model", *files[1:], dtype="int8")
