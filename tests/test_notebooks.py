"""The notebooks: their cells run, at toy length, and what Colab opens is built from the text."""

import os
import subprocess
import sys

import pytest

from ldm_jax.interop.native import save_model
from scripts.build_notebooks import NOTEBOOKS, built
from tests import tiny_models
from tests.conftest import ROOT
from tests.training.variants import photographs

TEXTS = sorted(NOTEBOOKS.glob("*.py"))
SHORT = {
    "draw": {"steps=50": "steps=2"},
    "train": {"7500": "2", "9000": "2", "config.train.steps": "SMALL; config.train.steps"},
    "finetune": {"STEPS, BATCH = 1000, 4": "STEPS, BATCH = 2, 8"},
}
# The notebooks train the configs' networks; here they are narrow.
SMALL = """config.train.batch_size = 8
if config.task == "autoencoder":
    config.autoencoder.update(ch=8, encoder_ch=16)
else:
    config.unet.update(model_channels=32, channel_mult=(1,), attention_resolutions=(1,))
    config.sampling.steps = 2
config.optimizer.name = "adamw"
"""


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)
def test_notebooks_are_built_from_their_text(text):
    assert text.with_suffix(".ipynb").read_text(encoding="utf-8") == built(text)


@pytest.mark.long
@pytest.mark.parametrize("name", SHORT)
def test_the_cells_run(name, tmp_path):
    source = (NOTEBOOKS / f"{name}.py").read_text()
    for long, short in SHORT[name].items():
        assert long in source
        source = source.replace(long, short)
    source = source.replace("SMALL; ", SMALL)
    (tmp_path / "cells.py").write_text(source)
    photographs(tmp_path / "pictures")
    model = tiny_models.STABLE
    save_model(tmp_path / "stable-diffusion-v1-5", model, tiny_models.random_params(model))
    run = subprocess.run(
        [sys.executable, "cells.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("ldm_jax ") and " jax " in run.stdout
    made = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("runs/*/model.*")}
    expected = {"draw": (), "train": ("autoencoder", "txt2img"), "finetune": ("lora",)}[name]
    assert made == {f"runs/{part}/model.safetensors" for part in expected}
