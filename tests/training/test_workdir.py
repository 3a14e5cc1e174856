"""A workdir knows its run: which settings may change, what a damaged config costs, and its lock."""

import copy
import errno
import json
import os
import signal
import subprocess
import sys

import jax.numpy as jnp
import pytest

from ldm_jax.runtime.checkpoints import Checkpoints
from ldm_jax.training import workdir as module
from ldm_jax.training.workdir import check_config, is_harmless, locked, write_config

CONFIG = {
    "seed": 0,
    "data": {"path": "photos", "image_size": 64, "on_error": "skip"},
    "sampling": {"prompts": ["a fox"], "steps": 50, "guidance": 2.0},
    "train": {"steps": 100, "batch_size": 8, "log_every": 10},
    "mesh": {"data": -1, "fsdp": 1},
}


def changed(key, value):
    config = copy.deepcopy(CONFIG)
    *sections, name = key.split(".")
    section = config
    for part in sections:
        section = section.setdefault(part, {})
    section[name] = value
    return config


@pytest.fixture
def run(tmp_path):
    """A workdir with one checkpoint."""
    write_config(tmp_path, CONFIG)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(10, {"w": jnp.arange(4.0)}, {"config": CONFIG})
    return tmp_path, checkpoints


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.path", "/elsewhere/photos"),
        ("data.on_error", "raise"),
        ("data.workers", 4),
        ("sampling.prompts", ["a cat", "a dog"]),
        ("sampling.guidance", 7.5),
        ("sampling.sampler", "euler"),
        ("train.steps", 200),
        ("train.log_every", 1),
        ("mesh.fsdp", 2),
    ],
)
def test_harmless_changes_are_followed(run, key, value):
    workdir, checkpoints = run
    check_config(workdir, changed(key, value), checkpoints)
    write_config(workdir, changed(key, value))
    assert json.loads((workdir / "config.json").read_text()) == changed(key, value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", 5), ("data.image_size", 32), ("train.batch_size", 16), ("data.pathology", 1),
     ("sampling_rate", 1), ("optimizer.lr", 0.1)],
)  # fmt: skip
def test_other_changes_are_refused_and_leave_the_config(run, key, value):
    workdir, checkpoints = run
    with pytest.raises(ValueError, match=rf"holds a run of another config:\n  {key}: .* {value} n"):
        check_config(workdir, changed(key, value), checkpoints)
    assert json.loads((workdir / "config.json").read_text()) == CONFIG


def test_a_section_is_no_prefix_of_longer_names():
    assert is_harmless("sampling") and is_harmless("sampling.steps")
    assert not is_harmless("samplings.steps") and not is_harmless("data")


def damage(path, how):
    text = path.read_bytes()
    content = {
        "empty": b"", "cut": text[: len(text) // 2], "zeros": bytes(len(text)), "null": b"null",
        "list": b"[1]", "binary": b"\xff\xfe\x00" * 9, "no settings": b"{}",
    }  # fmt: skip
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(content[how])


DAMAGES = ["empty", "cut", "zeros", "null", "list", "binary", "no settings", "missing"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_config_is_recovered_from_the_checkpoint(run, caplog, how):
    workdir, checkpoints = run
    damage(workdir / "config.json", how)
    with pytest.raises(ValueError, match="seed: 0 there, 5 now"):
        check_config(workdir, changed("seed", 5), checkpoints)
    assert "config.json is missing or damaged: taking the config from a checkpoint" in caplog.text
    check_config(workdir, CONFIG, checkpoints)
    write_config(workdir, CONFIG)
    assert json.loads((workdir / "config.json").read_text()) == CONFIG


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_config_without_a_checkpoint_claims_nothing(tmp_path, how):
    write_config(tmp_path, CONFIG)
    damage(tmp_path / "config.json", how)
    check_config(tmp_path, changed("seed", 5), Checkpoints(tmp_path / "checkpoints"))


def test_a_config_is_recovered_from_an_older_checkpoint_if_need_be(run):
    workdir, checkpoints = run
    checkpoints.save(20, {"w": jnp.arange(4.0)}, {"config": changed("seed", 9)})
    for path in (workdir / "checkpoints" / "20" / "about").rglob("*"):
        path.write_bytes(b"")
    damage(workdir / "config.json", "empty")
    with pytest.raises(ValueError, match="seed: 0 there, 5 now"):
        check_config(workdir, changed("seed", 5), Checkpoints(workdir / "checkpoints"))


def test_a_model_without_checkpoints_still_claims_its_workdir(tmp_path):
    write_config(tmp_path, CONFIG)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="seed: 0 there, 5 now"):
        check_config(tmp_path, changed("seed", 5), Checkpoints(tmp_path / "checkpoints"))


def test_a_config_that_agrees_is_not_written_again(tmp_path):
    write_config(tmp_path, CONFIG)
    before = (tmp_path / "config.json").stat()
    write_config(tmp_path, copy.deepcopy(CONFIG))
    after = (tmp_path / "config.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_config_whole(tmp_path, monkeypatch, call):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_config(tmp_path, CONFIG)
    monkeypatch.setattr(module.os, call, full)
    with pytest.raises(OSError, match=f"cannot write to the workdir {tmp_path}: .* No space"):
        write_config(tmp_path, changed("train.steps", 1))
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG


def test_a_second_training_is_refused_with_the_pid_of_the_first(tmp_path):
    refused = pytest.raises(ValueError, match=f"is in use: process {os.getpid()} trains there")
    with locked(tmp_path), refused, locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


HOLD = """
import fcntl, os, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(f"{os.getpid()}\\n"); file.flush()
print("held", flush=True)
time.sleep(60)
"""


def test_the_lock_dies_with_its_process(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        refused = pytest.raises(ValueError, match=f"process {process.pid} trains there")
        with refused, locked(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


def test_a_system_without_locks_trains_unlocked(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "fcntl", None)
    with locked(tmp_path), locked(tmp_path):
        pass


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused = pytest.raises(OSError, match=f"cannot write to the workdir {tmp_path}/file/run")
    with refused, locked(tmp_path / "file" / "run"):
        pass
