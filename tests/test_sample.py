"""The command line of `sample.py`."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import ldm_jax
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.pipeline import Pipeline
from tests import tiny_models


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home with a class-conditional model, an autoencoder, a picture and prompts."""
    folder = tmp_path_factory.mktemp("home")
    config = tiny_models.LABELS | {"classes": [f"flower {i}" for i in range(9)] + ["rose"]}
    model, params = LatentDiffusion.from_config(config), tiny_models.random_params(config)
    Pipeline(model, params, config).save(folder / "flowers.safetensors")
    ldm_jax.load().first_stage.save(folder / "autoencoder.safetensors")
    Image.fromarray(np.full((70, 101, 3), 200, np.uint8)).save(folder / "picture.png")
    (folder / "prompts.txt").write_bytes("\ufeffred apple\r\n\r\n  cat face \r\n".encode())
    (folder / "wide.txt").write_text("red apple\ncat face\n", encoding="utf-16")
    (folder / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (folder / "empty.txt").write_text("\n \n")
    return folder


def sample(root, home, *arguments):
    return subprocess.run(
        [sys.executable, "sample.py", *arguments],
        cwd=root,
        env=os.environ | {"HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("name", ["prompts", "wide"])
def test_prompts_come_from_any_text_file(root, home, name):
    done = sample(
        root, home, f"--prompts_file=~/{name}.txt", "--n=2", "--batch=3", "--steps=2",
        f"--out=~/{name}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((home / name / "settings.json").read_text())["prompts"] == [
        "red apple",
        "cat face",
    ]
    assert (home / name / "0003-cat-face.png").exists()


def test_a_picture_of_any_size_is_edited(root, home):
    done = sample(
        root, home, "--prompt=cat", "--image=~/picture.png", "--fit=pad", "--steps=2", "--out=~/fit"
    )
    assert done.returncode == 0, done.stderr
    assert "70×101 (height×width) becomes 72×104" in done.stdout
    with Image.open(home / "fit" / "0000-cat.png") as picture:
        assert picture.size == (101, 70)


def test_classes_are_drawn_by_name_or_number(root, home):
    done = sample(
        root, home, "--model=~/flowers.safetensors", "--label=rose", "--label=3", "--steps=2",
        "--out=~/flowers",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (home / "flowers").glob("0*.png"))
    assert names == ["0000-rose.png", "0001-flower-3.png"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model=~/flowers.safetensors", "--label=rosa"], "did you mean 'rose'"),
        (["--model=~/autoencoder.safetensors", "--prompt=cat"], "holds an autoencoder alone"),
        (["--weak=~/autoencoder.safetensors", "--prompt=cat"], "holds an autoencoder alone"),
        (["--lora=~/flowers.safetensors:0.5", "--prompt=cat"], "flowers.safetensors holds no LoRA"),
        (
            ["--control=~/flowers.safetensors:~/x.png"],
            "holds no ControlNet, but a model",
        ),
        (
            ["--prompt=cat", "--hint=~/x.png"],
            "--hint: this model is not told control",
        ),
        (["--prompts_file=~/latin.txt"], "latin.txt is not UTF-8: byte 3"),
        (["--prompts_file=~/empty.txt"], "empty.txt holds no prompt: write one a line"),
        (["--prompt=cat", "--guidance=nan"], "guidance=nan: must be a finite number"),
        (["--prompt=a", "--prompt=b", "--compose=1,inf"], "compose=inf: must be a finite number"),
        (["--prompt=cat", "--guidance_interval=a"], "--guidance_interval=a: give numbers"),
        (["--prompt=(cat:1..2)", "--prompt_syntax=a1111"], "the weight '1..2' is no number"),
        (["--prompt=cat", "--width=70"], "width=70: this model draws multiples of 8 pixels, such"),
    ],
)
def test_mistakes_are_one_sentence(root, home, arguments, message):
    done = sample(root, home, *arguments, "--out=~/never")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert message in done.stderr
    assert not (home / "never").exists()


COUNTED = """
import collections, runpy, sys, jax
counts = collections.Counter()
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: counts.update([name.rpartition("/")[2]])
)
try:
    runpy.run_path("sample.py", run_name="__main__")
finally:
    print("counted", counts["jaxpr_trace_duration"], counts["backend_compile_duration"])
"""


@pytest.mark.parametrize(
    "arguments", [["--interpolate=2"], ["--image=~/picture.png", "--source=a dog"]]
)
def test_a_second_process_neither_traces_nor_compiles(root, home, tmp_path, arguments):
    """Not even for its random numbers, nor to encode a picture and to invert it."""
    env = os.environ | {"HOME": str(home), "LDM_JAX_CACHE": str(tmp_path / "cache")}
    pictures, counts = [], []
    for i in range(2):
        out = tmp_path / str(i)
        command = [sys.executable, "-c", COUNTED, "--prompt=cat", "--steps=2", f"--out={out}"]
        done = subprocess.run(
            [*command, *arguments],
            cwd=root, env=env, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        with Image.open(out / "grid.png") as grid:
            pictures.append(np.array(grid))
        traced, compiled = done.stdout.rpartition("counted")[2].split()
        counts.append((int(traced), int(compiled)))
    assert min(counts[0]) > 1 and counts[1] == (0, 0)
    np.testing.assert_array_equal(*pictures)
