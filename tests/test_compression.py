"""The study of compression: the configs and what `benchmarks/compression.py` writes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks import compression
from configs.compression import AUTOENCODERS, SECONDS, UNETS, get_config, sweep
from ldm_jax.models.build import make_autoencoder
from ldm_jax.training.sweeps import Earlier
from tests.conftest import ROOT


def test_each_diffusion_model_follows_its_first_stage():
    settings = sweep("study")
    names = [setting["variant"] for setting in settings]
    assert {f"f{factor}" for factor in UNETS} < set(names) and len(names) == 12
    for factor in AUTOENCODERS:
        first, second = f"f{factor}-autoencoder", f"f{factor}"
        at = names.index(first)
        assert names[at + 1] == second and settings[at + 1]["first_stage"] == Earlier(first)
    assert "first_stage" not in settings[names.index("f1")]


@pytest.mark.parametrize("factor", AUTOENCODERS)
def test_twice_the_factor_gives_half_the_numbers(factor):
    section = get_config(f"f{factor}-autoencoder").autoencoder.to_dict()
    model = make_autoencoder(section | dict(scale_factor=1.0))
    assert model.downsampling == factor and model.embed_dim == 2 * factor
    unet = get_config(f"f{factor}").unet
    assert unet.in_channels == unet.out_channels == model.embed_dim


def test_models_train_for_the_same_time():
    for factor, fields in UNETS.items():
        seconds = get_config(f"f{factor}").train.steps * fields["step"]
        assert seconds == pytest.approx(SECONDS, rel=0.08), factor


@pytest.fixture
def runs(tmp_path):
    """Two runs that are not finished: f8 passes the distance of pixels after 96 pictures."""
    found = {"f1": [(2, 90.0), (4, 80.0)], "f8": [(2, 100.0), (3, 70.0), (4, 50.0)]}
    for name, points in found.items():
        (tmp_path / name).mkdir()
        config = {"train": {"batch_size": 32, "steps": 9}, "data": {"image_size": 64}}
        config["unet"] = {"in_channels": 3 if name == "f1" else 16}
        lines = [{"step": x, "kind": "distance", "fd": y, "fd_floor": 5.0} for x, y in points]
        speed = {"images_per_second": 16.0, "tflops": 0.5}
        lines += [{"step": 4, "kind": "train", "loss": 1.0} | speed]
        lines += [{"step": 4, "kind": "held_out", "loss": 0.25}]
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    (tmp_path / "f8-autoencoder").mkdir()
    line = {"step": 1, "kind": "held_out", "psnr": 25.0}
    (tmp_path / "f8-autoencoder" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    numbers = {"fd": 60.0, "interval": [50, 70], "class": 0.5, "seconds": 0.01, "count": 8}
    drawn = {"f8/5": numbers, "f8/10": numbers | {"fd": 55.0, "seconds": 0.02}}
    (tmp_path / "drawn.json").write_text(json.dumps(drawn))
    for steps in (5, 10):
        Image.new("RGB", (526, 130), "red").save(tmp_path / f"pictures-f8-{steps}.png")
    return tmp_path


def test_the_comparison(runs, capsys):
    compression.compare(runs)
    text = (runs / "compression.md").read_text()
    assert capsys.readouterr().out == text + "\n"
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| f")]
    pixels, latents = rows[:2]
    # A step of 32 pictures at 16 a second takes 2 s, and has 0.5 · 2 TFLOP.
    assert pixels[:6] == ["f1", "64×64×3", "–", "128", "4.00", f"{4 * UNETS[1]['step']:.0f}"]
    assert latents[:4] == ["f8", "8×8×16", "25.0 dB", "128"]
    assert latents[7:9] == ["50.0", "50%"]
    assert latents[9] == f"96 pictures, {3 * UNETS[8]['step']:.2g} s"
    assert rows[3] == ["f8", "60.0 (10)", "55.0 (20)"]
    assert "FD between halves of the real pictures: 5.0" in text
    for name, width in (("training.png", 2), ("steps.png", 1)):
        with Image.open(runs / name) as plot:
            assert plot.size == (width * compression.WIDTH, compression.HEIGHT)
    with Image.open(runs / "pictures.png") as sheet:
        assert sheet.size == (436, 70)


def test_no_runs(tmp_path):
    with pytest.raises(ValueError, match="no run f1 … f32 in .* has measured pictures"):
        compression.compare(tmp_path)


def test_a_plot_has_its_points_where_they_belong():
    colors = {"a": "#ff0000"}
    picture = compression.plot({"a": [(1.0, 1.0), (100.0, 100.0)]}, "x", "y", colors)
    rows, columns = np.nonzero((picture == (255, 0, 0)).all(axis=2))
    inner = rows > 40  # without the legend
    first, last = np.argmin(columns[inner]), np.argmax(columns[inner])
    assert rows[inner][first] > rows[inner][last]  # the larger value is higher
    middle = (columns[inner] > 270) & (columns[inner] < 290)
    assert abs(rows[inner][middle].mean() - 193) < 12  # on logarithmic axes a straight line


def test_ticks():
    assert compression._ticks(0.9, 12) == [1, 2, 5, 10]
    assert compression._ticks(0.9, 1200) == [1, 10, 100, 1000]
    assert compression._ticks(220, 257) == [220, 230, 240, 250]


@pytest.mark.long
def test_the_whole_study(tmp_path):
    """Trains a first stage and two models, draws, and writes the comparison; then does nothing."""
    command = [sys.executable, "-m", "ldm_jax.sweep", "--config=configs/compression.py:smoke"]
    command.append(f"--workdir={tmp_path}")
    options = dict(cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))
    options["env"]["XLA_FLAGS"] = "--xla_backend_optimization_level=1"
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "compression.md").read_text()
    assert "| f1 | 64×64×3 |" in text and "| f8 | 8×8×16 |" in text
    assert json.loads((tmp_path / "drawn.json").read_text()).keys() == {"smoke-f1/2", "smoke-f8/2"}
    again = subprocess.run(command, **options)
    assert again.stdout.count("finished before") == 3 and again.returncode == 0
