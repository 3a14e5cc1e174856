"""Runs of `least_squares`, whole and to be resumed."""

import logging
import shutil

import pytest

from ldm_jax.training import loop
from tests.training.least_squares import Task, steps


@pytest.fixture
def use(monkeypatch, caplog):
    """use(task) makes `train` drive it."""
    caplog.set_level(logging.INFO, "ldm_jax")
    monkeypatch.setattr(logging.getLogger("ldm_jax"), "propagate", True)

    def use(task):
        monkeypatch.setattr(loop, "make_task", lambda *_: task)
        return task

    use(Task())
    return use


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """An uninterrupted run of 30 steps, and its checkpoints of steps 10 and 20."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_task", lambda *_: Task())
        loop.train(steps(20), workdir)
        after_20 = workdir.with_name("after_20")
        shutil.copytree(workdir, after_20)
        loop.train(steps(30), workdir)
    return workdir, after_20


@pytest.fixture
def resumable(whole, tmp_path):
    """A copy of a run that has done 20 of 30 steps."""
    return shutil.copytree(whole[1], tmp_path / "run")
