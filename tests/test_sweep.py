"""`python -m ldm_jax.sweep` and `python -m ldm_jax.report`, with a train.py that trains nothing."""

import os
import runpy
import signal
import subprocess
import sys
import time

import pytest
import yaml
from ml_collections import ConfigDict

from ldm_jax.training import report, sweeps
from tests.conftest import ROOT

CONFIG = """
import ml_collections
def get_config(variant="a"):
    return ml_collections.ConfigDict({"seed": 0, "train": {"steps": 2}, "optimizer": {"lr": 1e-3}})
def sweep():
    return [{"optimizer.lr": lr} for lr in (0.5, 0.25)]
"""
# Writes what a run leaves: a loss of the learning rate. `fail` and `sleep` are files beside it.
TRAIN = """
import json, os, pathlib, re, signal, sys, time
args = dict(a[2:].split("=", 1) for a in sys.argv[1:])
run, lr = pathlib.Path(args["workdir"]), float(args["config.optimizer.lr"])
if os.path.exists("fail") and lr == 0.5:
    sys.exit("no such data")
with open("calls", "a") as calls:
    calls.write(args["workdir"] + "\\n")
run.mkdir(parents=True, exist_ok=True)
if os.path.exists("sleep"):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print("ready", flush=True)
    time.sleep(60)
(run / "config.json").write_text(json.dumps({"train": {"steps": int(args["config.train.steps"])}}))
lines = [{"step": i, "kind": k, "loss": lr / i} for i in (1, 2) for k in ("train", "held_out")]
(run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
(run / "model.safetensors").write_bytes(b"")
"""
# A first stage, and what starts from it.
TWO_STAGES = """
import ml_collections
from pathlib import Path
from ldm_jax.training.sweeps import Earlier
def get_config(variant="all"):
    first_stage = {} if variant == "first" else {"first_stage": ""}
    rest = {"train": {"steps": 2}, "optimizer": {"lr": 1e-3}}
    return ml_collections.ConfigDict(rest | first_stage)
def sweep(variant):
    second = {"variant": "second", "optimizer.lr": 0.25, "first_stage": Earlier("first")}
    first = {"variant": "first"}
    return [first, second] if variant == "all" else [first]
def after(root, variant):
    (Path(root) / "after.txt").write_text(variant)
"""


@pytest.fixture
def home(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "train.py").write_text(TRAIN)
    return tmp_path


def arguments(*more, config="config.py"):
    flags = [f"--config={config}", "--workdir=runs", "--config.train.steps=2", *more]
    return [sys.executable, "-m", "ldm_jax.sweep", *flags]


def run(home, *more, config="config.py"):
    command, environment = arguments(*more, config=config), os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)


def calls(home):
    return (home / "calls").read_text().split()


def test_a_sweep_trains_each_setting_once_and_compares_them(home):
    done = run(home)
    assert done.returncode == 0, done.stderr
    assert calls(home) == ["runs/optimizer.lr=0.5", "runs/optimizer.lr=0.25"]
    lines = (home / "runs" / "results.md").read_text().splitlines()
    assert lines[0] == "| optimizer.lr | state | train/loss | held_out/loss |"
    assert lines[2:] == ["| 0.5 | finished | 0.25 | 0.25 |", "| 0.25 | finished | 0.125 | 0.125 |"]
    page = (home / "runs" / "results.html").read_text()
    assert page.count("<polyline") == 4 and "— optimizer.lr=0.25" in page
    again = run(home)
    assert "2/2 optimizer.lr=0.25: finished before" in again.stdout and len(calls(home)) == 2


def test_a_setting_that_fails_is_named_and_the_others_train(home):
    (home / "fail").touch()
    done = run(home)
    assert done.returncode == 1
    assert "failed: optimizer.lr=0.5; see their .log files in runs" in done.stderr
    assert "no such data" in (home / "runs" / "optimizer.lr=0.5.log").read_text()
    assert "| 0.5 | failed at step 0 |" in (home / "runs" / "results.md").read_text()
    assert calls(home) == ["runs/optimizer.lr=0.25"]
    (home / "fail").unlink()
    assert run(home).returncode == 0
    assert calls(home) == ["runs/optimizer.lr=0.25", "runs/optimizer.lr=0.5"]


def test_a_sweep_that_is_stopped_resumes(home):
    (home / "sleep").touch()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        arguments(), cwd=home, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        log, deadline = home / "runs" / "optimizer.lr=0.5.log", time.monotonic() + 60
        while not (log.exists() and "ready" in log.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
    assert "Stopped. The same command resumes." in output and process.returncode == 0
    (home / "sleep").unlink()
    assert run(home).returncode == 0
    assert calls(home) == ["runs/optimizer.lr=0.5"] * 2 + ["runs/optimizer.lr=0.25"]


def test_commands_for_a_shell_slurm_and_kubernetes_train_the_same(home):
    plain = run(home, "--print=commands").stdout.splitlines()
    assert len(plain) == 2 and plain[1].endswith("--config.optimizer.lr=0.25")
    (home / "job.sh").write_text(run(home, "--print=slurm").stdout)
    (home / "srun").write_text('#!/bin/sh\nexec "$@"\n')
    (home / "srun").chmod(0o755)
    bin = os.path.dirname(sys.executable)
    path = {"PATH": f"{home}:{bin}:{os.environ['PATH']}"}
    job = yaml.safe_load(run(home, "--print=gke").stdout)
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert job["spec"]["completions"] == 2 and container["image"] == "YOUR_IMAGE"
    for shell, index in (
        (["bash", "job.sh"], {"SLURM_ARRAY_TASK_ID": "1"}),
        (container["command"], {"JOB_COMPLETION_INDEX": "0"}),
    ):
        subprocess.run(shell, cwd=home, env=os.environ | path | index, check=True)
    assert calls(home) == ["runs/optimizer.lr=0.25", "runs/optimizer.lr=0.5"]


@pytest.fixture
def two_stages(home):
    (home / "config.py").write_text(TWO_STAGES)
    return home


def run_both(home, *more):
    return run(home, "--config.optimizer.lr=0.5", *more, config="config.py:all")


def test_a_setting_starts_from_the_workdir_of_an_earlier_one(two_stages):
    done = run_both(two_stages)
    assert done.returncode == 0, done.stderr
    assert calls(two_stages) == ["runs/first", "runs/second,optimizer.lr=0.25"]
    printed = run_both(two_stages, "--print=commands").stdout.splitlines()
    assert printed[0].startswith("python train.py --config=config.py:first --workdir=runs/first")
    assert "--config=config.py:second " in printed[1]
    assert printed[1].endswith("--config.first_stage=runs/first")
    table = (two_stages / "runs" / "results.md").read_text()
    assert "| second | 0.25 | first | finished |" in table
    assert (two_stages / "runs" / "after.txt").read_text() == "all"
    one = run(two_stages, config="config.py:first")  # its `sweep` has the first stage alone
    assert "1/1 first: finished before" in one.stdout and len(calls(two_stages)) == 2


def test_what_starts_from_a_setting_that_failed_is_left_out(two_stages):
    (two_stages / "fail").touch()
    done = run_both(two_stages)
    assert "2/2 second,optimizer.lr=0.25: left out, for it needs first" in done.stdout
    assert "failed: first; see their .log files in runs; left out: second,op" in done.stderr
    assert not (two_stages / "calls").exists() and not (two_stages / "runs/after.txt").exists()
    (two_stages / "fail").unlink()
    assert run_both(two_stages).returncode == 0 and len(calls(two_stages)) == 2


def test_an_array_of_jobs_has_no_order(two_stages):
    done = run_both(two_stages, "--print=slurm")
    assert done.returncode == 1 and "--print=slurm: settings that start from others'" in done.stderr


def test_names_are_of_the_setting_alone():
    assert sweeps.name_of({"optimizer.lr": 1e-3, "seed": 2}) == "optimizer.lr=0.001,seed=2"
    assert sweeps.name_of({"data.path": "/a b/c"}) == "data.path=_a_b_c"
    longer = [sweeps.name_of({"data.classes": ("x" * 200, i)}) for i in range(2)]
    assert longer[0] != longer[1] and max(map(len, longer)) == sweeps.LONGEST_NAME


@pytest.mark.parametrize(
    "body, message",
    [
        ("pass", "defines no sweep()"),
        ("def sweep(): return []", "must return a list of dicts"),
        ("def sweep(): return [1]", "must return a list of dicts"),
        ("def sweep(): return [{'seed': 1}, {'seed': 1}]", "returns twice: seed=1"),
        (
            "from ldm_jax.training.sweeps import Earlier\n"
            "def sweep(): return [{'variant': 'b', 'first_stage': Earlier('a')}, {'variant': 'a'}]",
            "no setting a before b",
        ),
    ],
)
def test_bad_sweeps(tmp_path, body, message):
    path = tmp_path / "config.py"
    path.write_text(body)
    with pytest.raises(ValueError) as error:
        sweeps.settings_of(str(path))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"optimizer.lrr": 1.0}, "the config has no optimizer.lrr; did you mean optimizer.lr?"),
        ({"optimizer": 1.0}, "the config has no optimizer"),
        ({"optimizer.lr": "fast"}, "optimizer.lr='fast'"),
    ],
)
def test_bad_settings(setting, message):
    with pytest.raises(ValueError) as error:
        sweeps.check(ConfigDict({"optimizer": {"lr": 1e-3}}), setting, "config.py")
    assert message in str(error.value)


def test_every_sweep_of_the_configs_fits_its_config():
    found = 0
    for path in sorted((ROOT / "configs").glob("*.py")):
        if "def sweep(" in path.read_text():
            found += 1
            config = runpy.run_path(str(path))["get_config"]()
            for setting in sweeps.settings_of(str(path)):
                own = sweeps.config_of(str(path), setting, config)
                sweeps.check(own, setting, str(path))
    assert found


def test_only_runs_are_compared(tmp_path):
    with pytest.raises(ValueError, match="has no metrics.jsonl with metrics: it is not a run"):
        report.compare([str(tmp_path)], str(tmp_path / "page.html"))
