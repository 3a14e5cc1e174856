"""python -m ldm_jax.plan: its report, its errors, and a run for the devices of this machine."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from ldm_jax.runtime.meters import Chip
from ldm_jax.runtime.plan import Usage, compile_usage
from tests.conftest import ROOT

CHIP = Chip("toy", flops=1e12, memory=2**30, bandwidth=1e12, interconnect=1e12)
SMOKE = "configs/txt2img.py:smoke"


def command(*flags):
    """(exit code, output, messages) of the command, for eight devices of this machine."""
    done = subprocess.run(
        [sys.executable, "-m", "ldm_jax.plan", *flags],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--config=configs/nothing.py"], "error: no config file configs/nothing.py; there are co"),
        (["--config=configs/txt2img.py:x"], "no variant 'x' of txt2img: choose scenes, demo"),
        ([f"--config={SMOKE}", "--topology=v5:2x2"], "error: --topology=v5:2x2: no family 'v5'"),
        ([f"--config={SMOKE}", "--batch=12"], "fsdp=1: use a multiple of 8, such as 8 or 16"),
        ([f"--config={SMOKE}", "--config.mesh.fsdp=3"], "does not fit 8 devices"),
        ([f"--config={SMOKE}", "--programs=draw"], "--programs=draw: choose from train, sample"),
    ],
    ids=["file", "variant", "topology", "batch", "mesh", "programs"],
)
def test_bad_input(flags, message):
    code, output, messages = command(*flags)
    assert code == 1 and message in messages and "Traceback" not in messages and not output


@pytest.fixture
def report():
    # Here, because the module defines flags.
    from ldm_jax.plan import report

    return report


@pytest.fixture
def program():
    from ldm_jax.training.program import Lowered

    lowered = jax.jit(jnp.matmul).lower(jnp.zeros((64, 64)), jnp.zeros((64, 64)))
    return Lowered(lowered, images=8, flops=4e12)


def test_the_report_of_a_slice(report, program):
    usage = Usage(arguments=2**29, needed=2**29, flops=1e12, accessed=4e12, compiled=program)
    lines = dict(report(program, usage, CHIP, chips=4, price=3.6))
    assert lines["memory of a chip"] == "512 MiB of 1 GiB: fits"
    assert lines["model's TFLOP a chip"] == "1, XLA counts 1"
    assert lines["sent by a chip"] == "nothing"
    assert lines["least time"].startswith("4 s, bound by memory (products 1, memory 4")
    assert lines["images/s, at most"] == "2, 0.5 a chip"
    assert lines["TFLOP/s, at most"] == "0.25 a chip, MFU 25.0%"
    # 500,000 seconds of four chips, each 0.001 a second.
    assert lines["million images, at least"] == "2,000.00"


def test_the_report_of_a_program_that_does_not_fit(report, program):
    usage = Usage(needed=20 * 2**30, capacity=15.75 * 2**30)
    lines = dict(report(program, usage, CHIP, chips=4))
    assert lines == {"memory of a chip": "20 GiB of 15.75 GiB: does not fit"}


def test_the_report_of_a_measured_program(report, program):
    usage = compile_usage(program.lowered)
    lines = dict(report(program, usage, None, chips=1, seconds=2.0))
    assert lines["measured time"] == "2 s"
    assert lines["images/s, measured"] == "4, 4 a chip"
    assert lines["TFLOP/s, measured"] == "2 a chip"
    assert not any("at most" in name for name in lines)


@pytest.mark.long
def test_suggestions_for_the_devices_of_this_machine():
    code, output, messages = command(f"--config={SMOKE}", "--suggest", "--compilations=2")
    assert code == 0, messages
    lines = output.splitlines()
    assert lines[0].startswith("8 chips of ") and lines[1].endswith(" with mesh.fsdp=1")
    assert output.count("compiled in") == 2
    titles = lines.index(next(line for line in lines if line.startswith("| images/s a chip")))
    rows = [line.strip("| ").split(" | ") for line in lines[titles + 2 :]]
    speeds = [float(row[0]) for row in rows]
    assert len(rows) == 2 and speeds == sorted(speeds, reverse=True)
    assert {row[3] for row in rows} <= {"data 8, fsdp 1", "data 1, fsdp 8"}


@pytest.mark.long
def test_for_the_devices_of_this_machine():
    code, output, messages = command(f"--config={SMOKE}", "--price=1", "--steps=2")
    assert code == 0, messages
    assert f"{SMOKE} on cpu, measured: 8 chips" in output
    assert "Training step, batch 8" in output and "Drawing 8 pictures in 2 steps" in output
    assert output.count("measured time") == output.count("million images, measured") == 2
