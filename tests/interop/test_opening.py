"""Whatever a path holds is found out; what it cannot be is said in one message."""

import json
import logging
import shutil

import ml_dtypes
import numpy as np
import pytest

from ldm_jax.interop import compvis, diffusers, native
from ldm_jax.interop.files import open_state, write_safetensors
from ldm_jax.interop.opening import export, open_any, read_any
from tests.interop.systems import random_params, system
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
    "a text encoder alone": (text_encoder, r"holds \['CLIPTextModel'\] of transformers alone"),
    "no JSON": (damaged, "config.json is no JSON"),
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
