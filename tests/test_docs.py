"""The tables, snippets and commands of README and docs are correct."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ldm_jax
from ldm_jax.data.sources import EmojiSource
from ldm_jax.interop.control import write_control
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.pipeline import Pipeline
from ldm_jax.training import control
from scripts.write_docs import SAMPLERS, with_options
from tests import tiny_models

ROOT = Path(ldm_jax.__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language):
    """(page, text) of every block of a language."""
    pattern = rf"```{language}\n(.*?)```"
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    return [(page, m) for page, text in texts.items() for m in re.findall(pattern, text, re.DOTALL)]


def sample_commands():
    """Every command line of sample.py that needs no file but cat.png and mask.png."""
    lines = "\n".join(page.read_text(encoding="utf-8") for page in PAGES).splitlines()
    found = [
        shlex.split(line, comments=True)[2:] for line in lines if line.startswith("python sam")
    ]
    own = (
        "--model",
        "--lora",
        "--embedding",
        "--control",
        "--ip_adapter",
    )  # files that the reader has
    return [command for command in found if not any(a.startswith(own) for a in command)]


def test_the_table_of_options_is_the_fields():
    text = SAMPLERS.read_text(encoding="utf-8")
    assert with_options(text) == text, "run python -m scripts.write_docs"
    assert "`Sampling.churn_scale`" in text


@pytest.mark.long
@pytest.mark.parametrize("command", sample_commands(), ids=" ".join)
def test_a_command_draws(command, tmp_path):
    picture = EmojiSource("train")[700]["image"]
    Image.fromarray(picture).save(tmp_path / "cat.png")
    Image.fromarray(np.tri(64, dtype=np.uint8) * 255).save(tmp_path / "mask.png")
    fewer = ["--n=3"] if "--n=100" in command else []
    command = [sys.executable, str(ROOT / "sample.py"), *command, "--steps=2", "--out=out", *fewer]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.size[0] >= 64


def a_controlnet(config, path):
    """Writes a ControlNet of random numbers for the model of a config."""
    changed, _ = control.with_control(config, config["autoencoder"], control.Options())
    own = {"conditioning": {"control": changed["conditioning"]["control"]}}
    params = tiny_models.random_params(own)["control"]
    write_control(path, own["conditioning"]["control"]["network"], params)


@pytest.mark.long
@pytest.mark.parametrize("page, text", blocks("python"), ids=lambda v: getattr(v, "name", ""))
def test_a_snippet_runs(page, text, tmp_path, monkeypatch):
    """As it stands; a model that is not there is a tiny one of the same kind."""
    config = tiny_models.STABLE
    model, params = LatentDiffusion.from_config(config), tiny_models.random_params(config)
    tiny, load, draw = Pipeline(model, params, config), ldm_jax.load, Pipeline.__call__
    monkeypatch.chdir(tmp_path)
    Image.fromarray(EmojiSource("train")[700]["image"]).save("photo.png")
    if "with_control" in text:
        a_controlnet(load().config, tmp_path / "runs" / "edges" / "controlnet.safetensors")
    monkeypatch.setattr(ldm_jax, "load", lambda path="", **_: tiny if path else load())
    monkeypatch.setattr(Pipeline, "with_lora", lambda pipe, path, scale=1.0: pipe)
    monkeypatch.setattr(Pipeline, "__call__", lambda *a, **k: draw(*a, **k | {"steps": 2}))
    exec(text, {"ldm_jax": ldm_jax, "pipe": load()})
