"""The smallest variant of every config: two steps, a kill after the first, the second step again,
pictures, and their evaluation. tests/test_end_to_end.py kills whole processes."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import ldm_jax
from ldm_jax.evaluation import evaluate
from ldm_jax.interop.opening import open_any
from tests.conftest import ROOT
from tests.models.published import config_file
from tests.training.variants import photographs

FILES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
# tests/test_compression.py trains the study.
FILES = [n for n in FILES if n not in ("__init__", "common", "compression", "published")]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("photographs"))


def small(file: str, pictures: Path):
    get_config = config_file(ROOT / "configs" / f"{file}.py").get_config
    config = get_config("smoke") if file != "finetune" else get_config()
    if file == "finetune":
        config.init_from = str(ROOT / "ldm_jax" / "weights" / "bundled.safetensors")
    if config.data.source == "folder":
        config.data.update(path=str(pictures), image_size=64, held_out=0.2)
    if "scenes" in config.data:
        config.data.scenes.update(train_scenes=32, held_out_scenes=8)
    config.train.update(steps=2, batch_size=8, log_every=1, preview_every=2, checkpoint_every=1)
    if "sampling" in config:
        config.sampling.steps = 2
    return config


def lines(workdir: Path) -> list[dict]:
    """What the run measured, without its times."""
    timing = {"images_per_second", "data_wait", "tflops", "mfu", "memory_gb"}
    read = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{key: line[key] for key in line.keys() - timing} for line in read]


def exported(workdir: Path) -> dict[Path, bytes]:
    """Every file of weights: the model, and a LoRA, an embedding or a ControlNet beside it."""
    files = workdir.rglob("*.safetensors")
    return {path.relative_to(workdir): path.read_bytes() for path in files}


@pytest.mark.long
@pytest.mark.parametrize("file", FILES)
def test_a_run_killed_after_its_first_step_ends_as_it_would_have(file, pictures, tmp_path):
    config = small(file, pictures)
    metrics = ldm_jax.train(config, tmp_path)
    whole, measured, files = open_any(tmp_path), lines(tmp_path), exported(tmp_path)

    # As a kill in the second step leaves it.
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    for name in files:
        (tmp_path / name).unlink()
    assert ldm_jax.train(config, tmp_path) == metrics
    assert lines(tmp_path) == measured
    jax.tree.map(np.testing.assert_array_equal, open_any(tmp_path).params, whole.params)
    assert exported(tmp_path) == files
    for line in measured:  # what starts from a model is beside it, and has moved
        if "loss_of_base" in line:
            assert line["loss"] != line["loss_of_base"] and np.isfinite(line["loss"])

    own = config.data.held_out and config.data.source != "folder"
    found, images = evaluate(tmp_path, source="" if own else "emoji", count=2, steps=2)
    assert found and (images is None or np.isfinite(images).all())  # of an autoencoder none
