"""The command lines as a user runs them: train, kill, resume, sample, and their errors."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from ldm_jax.interop.opening import open_any

STEPS = 40


def environment(devices: int = 1) -> dict[str, str]:
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    return os.environ | {"XLA_FLAGS": flags, "TQDM_DISABLE": "1"}


def command(root, script, *arguments):
    return [sys.executable, str(root / script), *map(str, arguments)]


def run(root, script, *arguments, devices=1, timeout=300):
    return subprocess.run(
        command(root, script, *arguments),
        cwd=root,
        env=environment(devices),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def smoke(config, workdir, *more):
    return (
        f"--config=configs/{config}.py:smoke",
        f"--workdir={workdir}",
        f"--config.train.steps={STEPS}",
        "--config.train.checkpoint_every=10",
        "--config.train.preview_every=20",
        *more,
    )


def trained(root, tmp_path_factory, config):
    workdir = tmp_path_factory.mktemp(config) / "whole"
    done = run(root, "train.py", *smoke(config, workdir))
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture(scope="module")
def txt2img(root, tmp_path_factory):
    """A finished run of the smoke model, never interrupted."""
    return trained(root, tmp_path_factory, "txt2img")


@pytest.fixture(scope="module")
def autoencoder(root, tmp_path_factory):
    return trained(root, tmp_path_factory, "autoencoder")


def report(workdir, kind):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    timing = ("images_per_second", "data_wait", "tflops", "mfu", "memory_gb")
    return [
        {k: v for k, v in line.items() if k not in timing} for line in lines if line["kind"] == kind
    ]


def start(root, arguments, **variables):
    """A training in the background, its two streams as one."""
    return subprocess.Popen(
        command(root, "train.py", *arguments),
        cwd=root,
        env=environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_first_checkpoint(process, workdir):
    deadline = time.monotonic() + 240
    while not (workdir / "checkpoints" / "10").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.02)


@pytest.mark.long
@pytest.mark.parametrize("config", ["txt2img", "autoencoder"])
def test_a_killed_run_ends_where_an_uninterrupted_one_does(root, tmp_path, request, config):
    whole, workdir = request.getfixturevalue(config), tmp_path / "killed"
    arguments = smoke(config, workdir)
    with start(root, arguments) as process:
        wait_for_first_checkpoint(process, workdir)
        process.kill()
    assert not (workdir / "model.safetensors").exists()
    resumed = run(root, "train.py", *arguments)
    assert resumed.returncode == 0, resumed.stderr
    assert re.search(r"Resuming .* at step [123]0", resumed.stdout), resumed.stdout
    for kind in ("train", "held_out"):
        assert report(workdir, kind) == report(whole, kind)
    # Bit for bit; the files themselves may order their headers differently.
    resumed, uninterrupted = open_any(workdir), open_any(whole)
    assert resumed.config == uninterrupted.config
    jax.tree.map(np.testing.assert_array_equal, resumed.params, uninterrupted.params)


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGTERM]
)
def test_a_signal_saves_and_stops(root, tmp_path, number):
    workdir = tmp_path / "run"
    arguments = smoke("txt2img", workdir, "--config.train.steps=2000")
    with start(root, arguments) as process:
        wait_for_first_checkpoint(process, workdir)
        if number == signal.SIGINT:  # the same command by mistake in a second terminal
            second = run(root, "train.py", *arguments)
            assert second.returncode == 1
            assert f"is in use: process {process.pid} trains there" in second.stderr
            assert process.poll() is None
        process.send_signal(number)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert f"{number.name}: stopping after this step" in output
    stopped = re.search(rf"Stopped by {number.name}; step (\d+) is saved", output)
    assert stopped, output
    assert (workdir / "checkpoints" / stopped[1]).exists()
    assert (workdir / "model.safetensors").exists()


def test_a_signal_while_compiling_is_obeyed_at_once(root, tmp_path):
    """A fresh compilation cache: compiling takes far longer than the signal may."""
    workdir = tmp_path / "run"
    with start(root, smoke("txt2img", workdir), LDM_JAX_CACHE=str(tmp_path / "cache")) as process:
        for line in process.stdout:
            if line.startswith("Encoding "):
                break
        time.sleep(0.5)
        sent = time.monotonic()
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
        assert time.monotonic() - sent < 5
    assert process.returncode == 0, output
    assert "Stopped by SIGTERM before the first step; nothing to save" in output
    assert not (workdir / "config.json").exists()


@pytest.mark.long
def test_eight_devices_train_as_one_does(root, txt2img, tmp_path):
    done = run(root, "train.py", *smoke("txt2img", tmp_path / "mesh"), devices=8)
    assert done.returncode == 0, done.stderr
    for one, eight in zip(
        report(txt2img, "train"), report(tmp_path / "mesh", "train"), strict=True
    ):
        assert eight["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_a_run_leaves_its_report_and_pictures(txt2img):
    page = (txt2img / "report.html").read_text()
    assert "train/loss" in page and "data:image/png;base64," in page and "<polyline" in page
    assert sorted(p.name for p in (txt2img / "previews").iterdir()) == [
        "0000020.png",
        "0000040.png",
    ]
    assert json.loads((txt2img / "config.json").read_text())["train"]["steps"] == STEPS
    assert any((txt2img / "tensorboard").iterdir())
    data = open_any(txt2img).config["data"]
    assert data["source"] == "emoji" and "path" not in data


def test_sampling_writes_pictures_that_know_their_settings(root, txt2img, tmp_path):
    done = run(
        root, "sample.py", f"--model={txt2img}", "--prompt=red apple", "--prompt=cat", "--n=2",
        "--steps=3", "--guidance=2", f"--out={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in tmp_path.glob("*.png"))
    assert names == ["0000-red-apple.png", "0001-red-apple.png", "0002-cat.png", "0003-cat.png",
                     "grid.png"]  # fmt: skip
    picture = Image.open(tmp_path / "0002-cat.png")
    about = json.loads(picture.text["ldm_jax"])
    assert picture.size == (64, 64)
    assert (about["prompt"], about["index"], about["steps"]) == ("cat", 2, 3)
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["prompts"] == ["red apple", "cat"] and settings["guidance"] == 2.0


def test_another_config_in_the_workdir_is_refused_with_the_difference(root, txt2img):
    before = (txt2img / "config.json").read_bytes()
    done = run(root, "train.py", *smoke("txt2img", txt2img, "--config.seed=5"))
    assert done.returncode == 1
    assert "holds a run of another config:\n  seed: 0 there, 5 now" in done.stderr
    assert "Traceback" not in done.stderr and (txt2img / "config.json").read_bytes() == before


@pytest.mark.long
def test_a_loss_that_is_not_finite_stops_and_names_step_and_tensor(root, tmp_path):
    arguments = smoke("txt2img", tmp_path / "run", "--config.optimizer.lr=1e30")
    done = run(root, "train.py", *arguments)
    assert done.returncode == 1
    assert re.search(r"error: step \d+: .* is not finite \(\d+ tensors are not\)", done.stderr)
    assert "optimizer.lr" in done.stderr and "Traceback" not in done.stderr


BAD = {
    "config file": (
        "train.py", ["--config=configs/nope.py"],
        r"no config file configs/nope.py; there are configs/autoencoder.py, configs/class2img"),
    "variant": (
        "train.py", ["--config=configs/txt2img.py:nope"],
        r"no variant 'nope' of txt2img: choose scenes, demo, emoji, meanflow, smoke"),
    "key": (
        "train.py", ["--config=configs/txt2img.py", "--config.optimizer.lrr=1"],
        r'unknown setting in --config: lrr\. Did you mean "lr"'),
    "key like no other": (
        "train.py", ["--config=configs/txt2img.py", "--config.data.tags=1"],
        r"unknown setting in --config: tags\n"),
    "section": (
        "train.py", ["--config=configs/txt2img.py", "--config.optimzer.lr=1"],
        r'Did you mean "optimizer" instead of "optimzer"'),
    "value": (
        "train.py", ["--config=configs/txt2img.py", "--config.optimizer.lr=fast"],
        r"could not convert string to float: 'fast'"),
    "no prompt": ("sample.py", [], r"this model needs prompt"),
    "no model": (
        "sample.py", ["--prompt=cat", "--model=nowhere"], r"no model at nowhere: there is no such"),
    "not a model": (
        "sample.py", ["--prompt=cat", "--model=README.md"],
        r"README.md is neither safetensors nor a torch checkpoint"),
    "not a run": (
        "sample.py", ["--prompt=cat", "--model=configs"],
        r"no model in configs: the directory is neither a run's workdir nor holds a model"),
    "steps": (
        "sample.py", ["--prompt=cat", "--steps=1001"],
        r"steps=1001: this model takes 1 to 1000 steps"),
    "sampler": (
        "sample.py", ["--prompt=cat", "--sampler=magic"], r"sampler 'magic': choose one of ddim"),
    "size": (
        "sample.py", ["--prompt=cat", "--height=70"], r"height=70: this model draws multiples"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_clear_message(root, what):
    script, arguments, message = BAD[what]
    done = run(root, script, *arguments)
    assert done.returncode == 1
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def test_a_workdir_that_cannot_be_made_is_named(root, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = run(root, "train.py", *smoke("txt2img", tmp_path / "file" / "run"))
    assert done.returncode == 1
    assert f"cannot write to the workdir {tmp_path}/file/run" in done.stderr


def test_a_folder_of_ones_own_pictures_trains(root, tmp_path):
    pictures = tmp_path / "pictures"
    for i in range(24):
        kind = pictures / ("red" if i % 2 else "blue")
        kind.mkdir(parents=True, exist_ok=True)
        colour = (255, i, 0) if i % 2 else (0, i, 255)
        Image.new("RGB", (80, 64), colour).save(kind / f"{i}.png")
    (pictures / "red" / "broken.png").write_bytes(b"not a picture")
    arguments = smoke(
        "txt2img",
        tmp_path / "run",
        "--config.data.source=folder",
        f"--config.data.path={pictures}",
        "--config.data.classes=()",
    )
    done = run(root, "train.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert "broken.png" in done.stdout + done.stderr
    preview = np.asarray(Image.open(tmp_path / "run" / "previews" / "0000040.png"))
    assert preview.shape[-1] == 3


@pytest.mark.long
def test_evaluation_of_an_autoencoder(root, autoencoder, tmp_path):
    done = run(root, "evaluate.py", f"--model={autoencoder}", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert 5 < metrics["psnr"] < 40 and 0 < metrics["ssim"] < 1
