"""The command line of `convert`: its output, and that it does not write incomplete models."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ldm_jax.convert import convert
from ldm_jax.interop import compvis
from ldm_jax.interop.files import open_state, write_safetensors
from ldm_jax.interop.opening import open_any
from tests.interop.systems import random_params, system
from tests.interop.test_compvis import same

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small file in CompVis' layout, and its parameters."""
    config = system("ldm-celebahq-256")
    params = random_params(config)
    path = tmp_path_factory.mktemp("model") / "celeba.safetensors"
    compvis.write(path, config, params)
    return path, params


@pytest.mark.parametrize("layout", ["diffusers", "single_file", "compvis"])
def test_converts_and_says_what(layout, model, tmp_path, capsys):
    source, params = model
    convert(str(source), str(tmp_path / "out"), layout)
    said = capsys.readouterr().out
    assert f"{source}: latent diffusion without a condition" in said
    count = sum(leaf.size for _, leaf in open_state(source).items() if leaf.ndim) - 2 * 1000
    assert "unet: " in said and "autoencoder: " in said
    counts = [int(line.split()[1].replace(",", "")) for line in said.splitlines()[1:3]]
    assert sum(counts) == count
    assert said.splitlines()[-1] == f"Written: {tmp_path}/out ({layout}, float32)"
    same(open_any(tmp_path / "out").params, params)


def test_every_odd_key_is_listed_and_nothing_is_written(model, tmp_path, capsys):
    tensors = dict(open_state(model[0]))
    del tensors["model.diffusion_model.out.2.bias"]
    tensors["first_stage_model.quant_conv.bias"] = np.zeros(7, np.float32)
    tensors["model.diffusion_model.more"] = np.zeros(1, np.float32)
    source = tmp_path / "in.safetensors"
    write_safetensors(source, tensors)
    with pytest.raises(ValueError, match="in.safetensors: 2 keys are missing or misshapen"):
        convert(str(source), str(tmp_path / "out"), "diffusers")
    said = capsys.readouterr().out
    assert "unet: missing model.diffusion_model.out.2.bias\n" in said
    assert (
        "autoencoder: misshapen first_stage_model.quant_conv.bias: expected (3,), found (7,)"
        in said
    )
    assert "unet: extra model.diffusion_model.more\n" in said
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_the_command_line_takes_what_a_file_lacks(model, tmp_path):
    tensors = {n: t for n, t in open_state(model[0]).items() if "first_stage" not in n}
    write_safetensors(tmp_path / "part", tensors)
    command = [sys.executable, "-m", "ldm_jax.convert", str(tmp_path / "part"), str(tmp_path / "a")]
    done = subprocess.run(
        [*command, f"--autoencoder={model[0]}"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    same(open_any(tmp_path / "a").params, model[1])
    options = ["--yaml=nowhere.yaml", "--text=", "--new_attention_order"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=ROOT)
    assert "no YAML at nowhere.yaml" in done.stderr


def test_a_part_alone_is_converted_to_no_model(tmp_path):
    config = system("stable-diffusion-1")
    compvis.write(tmp_path / "model", config, random_params(config))
    texts = {n: t for n, t in open_state(tmp_path / "model").items() if "cond_stage" in n}
    write_safetensors(tmp_path / "text", texts)
    for layout in ("diffusers", "compvis"):
        with pytest.raises(ValueError, match="task='text'"):
            convert(str(tmp_path / "text"), str(tmp_path / "out"), layout)


def test_the_command_line(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "ldm_jax.convert", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    done = run("missing.ckpt", str(tmp_path / "out"), "--to=diffusers")
    assert done.returncode == 1
    expected = "error: no model at missing.ckpt: there is no such file or folder\n"
    assert done.stderr == expected + "(--traceback shows where)\n"
    assert not list(tmp_path.iterdir())
