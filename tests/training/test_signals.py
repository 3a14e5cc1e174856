"""Ctrl-C and SIGTERM stop at once before the first step, later after the current step."""

import contextlib
import os
import signal
import threading
import time

import pytest

from ldm_jax.training import loop
from ldm_jax.training.loop import train
from ldm_jax.training.signals import Interrupted
from tests.training.least_squares import Crash, Task, model, steps


@contextlib.contextmanager
def busy():
    """A function that sends a signal and then computes on, as a compiler does, until the end."""
    done = threading.Event()

    def work(*arguments):
        assert threading.current_thread() is not threading.main_thread(), "this would block it"
        os.kill(os.getpid(), signal.SIGTERM)
        done.wait(60)
        raise Crash

    try:
        yield work
    finally:
        done.set()


@pytest.mark.parametrize("where", ["make_task", "batches", "gradients"])
def test_a_signal_in_start_up_is_obeyed_at_once(use, tmp_path, caplog, where, monkeypatch):
    with busy() as work:
        if where == "make_task":
            monkeypatch.setattr(loop, "make_task", work)
        else:
            setattr(use(Task()), "before" if where == "batches" else "gradients", work)
        began = time.monotonic()
        with pytest.raises(Interrupted) as stopped:
            train(steps(10), tmp_path)
        assert time.monotonic() - began < 20
    assert stopped.value.code == 0
    assert str(stopped.value) == "Stopped by SIGTERM before the first step; nothing to save"
    assert str(stopped.value) in caplog.text
    assert not (tmp_path / "config.json").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_in_start_up_says_what_is_saved(use, resumable):
    with busy() as work:
        use(Task()).gradients = work
        with pytest.raises(Interrupted, match="before the first step; step 20 is saved in"):
            train(steps(30), resumable)


@pytest.mark.parametrize("at", [3, 10, 13])
def test_a_signal_while_training_saves_and_says_so(use, whole, tmp_path, caplog, at):
    def send(step):
        if step == at:
            os.kill(os.getpid(), signal.SIGINT)

    use(Task()).before = send
    with pytest.raises(Interrupted, match=rf"Stopped by SIGINT; step {at} is saved in") as stopped:
        train(steps(30), tmp_path)
    assert stopped.value.code == 0
    assert "SIGINT: stopping after this step" in caplog.text
    assert (tmp_path / "checkpoints" / str(at)).exists()
    assert (tmp_path / "model.safetensors").exists() and (tmp_path / "report.html").exists()
    use(Task())
    train(steps(30), tmp_path)
    assert model(tmp_path) == model(whole[0])


def test_a_signal_at_the_last_step_ends_a_finished_run(use, whole, tmp_path):
    def send(step):
        if step == 29:
            os.kill(os.getpid(), signal.SIGINT)

    use(Task()).before = send
    with contextlib.suppress(Interrupted):  # the batch of the last step is read a step before
        train(steps(30), tmp_path)
    use(Task())
    train(steps(30), tmp_path)
    assert model(tmp_path) == model(whole[0])
