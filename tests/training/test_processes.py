"""Two real processes on this machine: as one process, stopped together, and refused input."""

import re
import signal
import socket
import time

import numpy as np
import pytest

from tests.training.least_squares import model, reports
from tests.training.members import ended, free_port, pair, start

MINUTE = 60


def alone(workdir, devices=1, **settings):
    ((code, output),) = ended(start(workdir, devices=devices, settings=settings))
    assert code == 0, output


def assert_alike(one, other):
    """Two runs have the same losses and the same model."""
    for a, b in zip(reports(one), reports(other), strict=True):
        np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-5)
    assert reports(one, "held_out")[-1] == reports(other, "held_out")[-1]
    weights = model(one), model(other)
    for name in weights[0]:
        np.testing.assert_allclose(weights[1][name], weights[0][name], rtol=1e-5)


def test_two_processes_are_as_one_and_a_signal_to_one_stops_both(whole, tmp_path):
    """SIGTERM to process 1 at step 13 of two processes; one process trains the rest."""
    run = tmp_path / "run"
    (code, first), (other_code, other) = ended(*pair(run, on=("", "13:term")))
    assert (code, other_code) == (0, 0), first + other
    steps = {int(path.name) for path in (run / "checkpoints").iterdir()}
    stopped = max(steps)
    assert 13 <= stopped <= 16, "within two steps"
    message = f"Stopped by SIGTERM; step {stopped} is saved in {run}"
    assert "SIGTERM to another process: stopping after this step" in first
    assert message in first and f"process 1: {message}" in other
    assert "Compiled" in first and "Compiled" not in other, "process 0 tells, once"
    alone(run)
    assert_alike(whole[0], run)


def test_two_processes_resume_a_run_of_one(whole, resumable):
    """With the steps of one device each, on a mesh that splits nothing."""
    outputs = ended(*pair(resumable, devices=(1, 1)))
    assert [code for code, _ in outputs] == [0, 0], outputs
    assert_alike(whole[0], resumable)
    assert (resumable / "report.html").exists()


@pytest.mark.long
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_stops_the_other_within_a_minute(whole, tmp_path, killed):
    """And the restart is exact: bit for bit as if no process had been killed."""
    on = ["", ""]
    on[killed] = "23:kill"
    run = tmp_path / "run"
    processes = pair(run, on=on)
    processes[killed].wait(timeout=240)
    since = time.monotonic()
    results = ended(*processes)
    assert time.monotonic() - since < MINUTE
    assert results[killed][0] == -signal.SIGKILL
    code, output = results[1 - killed]
    assert code != 0
    if killed == 1:
        silent = f"Process 1 ended: it gave no sign of life for 40 s; step 20 is saved in {run}"
        assert silent in output or "another process has probably ended" in output
    else:  # jax ends a process that loses process 0, with its own words
        assert "another task died" in output or "Process 0 ended" in output
    for workdir in (run, tmp_path / "uninterrupted"):
        outputs = ended(*pair(workdir))
        assert [code for code, _ in outputs] == [0, 0], outputs
    assert model(run) == model(tmp_path / "uninterrupted")
    assert reports(run) == reports(tmp_path / "uninterrupted")
    assert_alike(whole[0], run)


@pytest.mark.long
def test_a_process_that_hangs_stops_the_other_within_a_minute(tmp_path):
    processes = pair(tmp_path, on=("", "23:stop"))
    ((code, output),) = ended(processes[0])
    processes[1].kill()
    assert code == 1
    assert "Process 1 ended: it gave no sign of life for 40 s; step 20 is saved in" in output


@pytest.mark.long
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("step, saved", [(0, "nothing to save"), (13, "step 10 is saved in")])
def test_a_fault_in_one_process_is_told_by_the_other(tmp_path, failing, step, saved):
    on = ["", ""]
    on[failing] = f"{step}:fail"
    results = ended(*pair(tmp_path, on=on))
    assert [code for code, _ in results] == [1, 1], results
    assert "error: a broken disk" in results[failing][1]
    assert f"Process {failing} ended: a broken disk; {saved}" in results[1 - failing][1]


@pytest.mark.long
@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_before_the_first_step_stops_both(tmp_path, signalled):
    on = ["", ""]
    on[signalled] = "0:term"
    results = ended(*pair(tmp_path, on=on))
    assert [code for code, _ in results] == [0, 0], results
    message = "Stopped by SIGTERM before the first step; nothing to save"
    assert message in results[signalled][1]
    assert f"Process {signalled} ended: {message}" in results[1 - signalled][1]
    if signalled == 0:  # process 0 may have begun when the other one tells it
        assert not (tmp_path / "config.json").exists()


@pytest.mark.long
def test_processes_with_different_configs_are_refused_with_the_difference(tmp_path):
    results = ended(*pair(tmp_path, settings=({}, {"optimizer.lr": 0.2, "train.steps": 31})))
    for code, output in results:
        assert code == 1
        assert "the processes of this run have different settings:" in output
        assert "optimizer.lr: 0.1 in process 0, 0.2 in process 1" in output
        assert "train.steps: 30 in process 0, 31 in process 1" in output


@pytest.mark.long
def test_workdirs_that_are_not_shared_are_refused(tmp_path):
    results = ended(*pair(None, workdirs=(tmp_path / "here", tmp_path / "there")))
    assert [code for code, _ in results] == [1, 1]
    assert "process 1 does not see what process 0 writes in" in results[0][1]


BAD = {
    "no processes": (["--process=0"], r"--process without --coordinator and --processes: give all"),
    "no process": (
        ["--coordinator=127.0.0.1:5000", "--processes=2"],
        r"--coordinator, --processes without --process: give all three, or none on a cluster"),
    "no port": (
        ["--coordinator=here", "--process=0", "--processes=2"],
        r"--coordinator=here: give HOST:PORT of process 0"),
    "a number too many": (
        ["--coordinator=127.0.0.1:5000", "--process=2", "--processes=2"],
        r"--process=2 of --processes=2: processes are numbered from 0 to 1"),
    "no host": (
        ["--coordinator=nowhere.invalid:5000", "--process=1", "--processes=2"],
        r"--coordinator=nowhere.invalid:5000: there is no host nowhere.invalid"),
    "nobody there": (
        ["--coordinator=127.0.0.1:1", "--process=1", "--processes=2", "--wait=1"],
        r"process 0 does not answer at 127.0.0.1:1 within 1 s .*: start it there"),
    "nobody comes": (
        ["--coordinator=127.0.0.1:{free}", "--process=0", "--processes=2", "--wait=1"],
        r"not all 2 processes came to 127.0.0.1:\d+ within 1 s: start each with the same"),
    "taken": (
        ["--coordinator=127.0.0.1:{taken}", "--process=0", "--processes=2"],
        r"port \d+ of --coordinator=.* cannot be used \(Address already in use\): choose another"),
}  # fmt: skip


def test_bad_flags_are_one_clear_message(tmp_path):
    """All at once: a process takes seconds to start."""
    with socket.socket() as listening:
        listening.bind(("", 0))
        listening.listen()
        ports = {"free": free_port(), "taken": listening.getsockname()[1]}
        started = {
            what: start(tmp_path / "run", *(flag.format(**ports) for flag in flags))
            for what, (flags, _) in BAD.items()
        }
        results = dict(zip(started, ended(*started.values()), strict=True))
    for what, (_, message) in BAD.items():
        code, output = results[what]
        assert code == 1, (what, output)
        assert "Traceback" not in output
        assert re.search(f"error: {message}", output), (what, output)
