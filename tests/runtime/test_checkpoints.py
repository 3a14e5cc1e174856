"""Checkpoints come back as they were, and a failed one leaves the last in place."""

import random
import re
import resource
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.runtime.checkpoints import Checkpoints, abstract_like
from ldm_jax.runtime.mesh import make_mesh, replicated
from scripts.damage_table import HARMS, files_of, harm


def state():
    return {"w": jnp.arange(8.0), "n": jnp.int32(3), "h": jnp.ones((2, 2), jnp.bfloat16)}


def test_round_trip_onto_another_layout(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, state(), {"config": {"a": 1}})
    assert checkpoints.latest() == 5
    assert checkpoints.about(5) == {"config": {"a": 1}}
    mesh = make_mesh({"fsdp": 8, "data": 1})
    shardings = jax.tree.map(lambda _: replicated(mesh), state())
    back = checkpoints.restore(5, abstract_like(jax.eval_shape(state), shardings))
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state()), strict=True):
        assert a.dtype == b.dtype and a.sharding.num_devices == 8
        np.testing.assert_array_equal(a, b)


def test_keeps_the_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, state(), {})
    assert checkpoints.latest() == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Checkpoints of steps 1 and 2, and what they hold."""
    directory = tmp_path_factory.mktemp("two") / "checkpoints"
    checkpoints, states = (
        Checkpoints(directory),
        {1: state(), 2: jax.tree.map(lambda x: x + 1, state())},
    )
    for step, value in states.items():
        checkpoints.save(step, value, {"config": {"step": step}})
    return directory, states


def restored(directory, wanted, **options):
    """(step, state) of the newest whole checkpoint, by a process that starts afresh."""
    shardings = jax.tree.map(lambda _: replicated(make_mesh({})), wanted)
    abstract = abstract_like(jax.eval_shape(lambda: wanted), shardings)
    return Checkpoints(directory).restore_newest(abstract, **options)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("seed", range(42))
def test_any_damage_of_the_newest_falls_back_to_the_one_before(two, tmp_path, caplog, seed):
    directory, states = two
    directory = shutil.copytree(directory, tmp_path / "checkpoints")
    chance = random.Random(seed)
    path = chance.choice(files_of(directory / "2"))
    how = HARMS[seed % len(HARMS)]
    harm(path, how, chance)
    step, back = restored(directory, states[1])
    assert_equal(back, states[step])
    if path.name == "sums.txt" and how in ("delete", "rename"):
        assert step == 2  # as a checkpoint of an older version
        return
    assert step == 1 and (directory / "2.damaged").exists()
    name = re.escape(path.relative_to(directory / "2").as_posix())
    assert re.search(rf"checkpoint of step 2 is damaged \(.*{name}.*\)", caplog.text), caplog.text
    assert "Resuming from step 1: 1 steps are lost" in caplog.text
    again = Checkpoints(directory)
    again.save(2, states[2], {})
    step, back = restored(directory, states[1])
    assert step == 2
    assert_equal(back, states[2])


@pytest.mark.parametrize("what", ["empty directory", "no state", "no about", "only sums"])
def test_a_half_written_directory_falls_back(two, tmp_path, what):
    directory, states = two
    directory = shutil.copytree(directory, tmp_path / "checkpoints")
    newest = directory / "2"
    if what in ("no state", "no about"):
        shutil.rmtree(newest / what.removeprefix("no "))
    else:
        kept = (newest / "sums.txt").read_bytes()
        shutil.rmtree(newest)
        newest.mkdir()
        if what == "only sums":
            (newest / "sums.txt").write_bytes(kept)
    step, back = restored(directory, states[1])
    assert step == 1
    assert_equal(back, states[1])


@pytest.mark.parametrize("how", ["delete", "truncate", "empty"])
def test_damage_without_sums_is_found_where_orbax_finds_it(two, tmp_path, how):
    """Checkpoints of older versions: every array file and description, damaged at once."""
    directory, states = two
    directory = shutil.copytree(directory, tmp_path / "checkpoints")
    (directory / "2" / "sums.txt").unlink()
    for path in files_of(directory / "2" / "state"):
        harm(path, how, random.Random(0))
    step, back = restored(directory, states[1])
    assert step == 1
    assert_equal(back, states[1])


def test_a_checkpoint_without_sums_is_read(two, tmp_path):
    directory, states = two
    directory = shutil.copytree(directory, tmp_path / "checkpoints")
    (directory / "2" / "sums.txt").unlink()
    step, back = restored(directory, states[1])
    assert step == 2
    assert_equal(back, states[2])


def test_all_damaged_is_an_error_that_lists_each(two, tmp_path):
    directory, states = two
    directory = shutil.copytree(directory, tmp_path / "checkpoints")
    for step in ("1", "2"):
        harm(directory / step / "state" / "_METADATA", "flip", random.Random(0))
    with pytest.raises(ValueError, match="step 2: state/_METADATA has.*step 1: state/_METADATA"):
        restored(directory, states[1])
    assert sorted(path.name for path in directory.iterdir()) == ["1", "2"]


def test_no_checkpoint_at_all_is_none(tmp_path):
    assert restored(tmp_path, state()) is None


def test_a_state_with_a_problem_is_damage(two, tmp_path, caplog):
    directory, states = two
    directory = shutil.copytree(directory, tmp_path / "checkpoints")
    step, _ = restored(
        directory, states[1], problem=lambda s: "w is odd" if s["w"][0] == 1.0 else ""
    )
    assert step == 1 and "step 2 is damaged (w is odd)" in caplog.text


def test_another_architecture_names_the_first_leaves_and_counts_the_rest(two, tmp_path):
    directory, _ = two
    directory = shutil.copytree(directory, tmp_path / "checkpoints")
    wanted = {"w": jnp.ones((9,)), "n": jnp.int32(3)} | {f"x{i}": jnp.ones(2) for i in range(6)}
    with pytest.raises(ValueError) as error:
        restored(directory, wanted)
    message = str(error.value)
    assert "step 2" in message and "another architecture" in message
    assert "h: (2, 2) there, (absent) now" in message and "w: (8,) there, (9,) now" in message
    assert "x2: (absent) there, (2,) now" in message and "and 3 more" in message
    assert (directory / "2").exists()


FULL_DISK = """
import resource, signal, sys
import jax.numpy as jnp, numpy as np
from ldm_jax.runtime.checkpoints import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, {"w": jnp.arange(4.0)}, {})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))  # every larger write now fails
try:
    noise = np.random.default_rng(0).normal(size=100_000)
    checkpoints.save(2, {"w": jnp.asarray(noise)}, {})
except OSError as error:
    print(error)
print("latest", Checkpoints(sys.argv[1]).latest())
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no file size limits here")
def test_a_checkpoint_is_written_beside_the_next_steps(tmp_path, monkeypatch):
    """`save` returns with a copy of the arrays in hand; whoever reads waits for the writer."""
    checkpoints, go, saved = Checkpoints(tmp_path / "checkpoints"), threading.Event(), []
    write = checkpoints._write
    monkeypatch.setattr(checkpoints, "_write", lambda *a: go.wait(60) and write(*a))
    device = jax.device_put(state())
    checkpoints.save(1, device, {}, lambda: saved.append(1), wait=False)
    assert not (tmp_path / "checkpoints" / "1").exists() and not saved
    wanted = jax.tree.map(np.array, device)
    jax.tree.map(lambda x: x.delete(), device)  # as donation does
    go.set()
    assert checkpoints.latest() == 1 and saved == [1]
    _, back = restored(tmp_path / "checkpoints", wanted)
    assert_equal(back, wanted)


@pytest.mark.parametrize("where", ["check", "save", "close"])
def test_a_write_that_fails_beside_the_steps_is_raised_by_the_next_call(tmp_path, where):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints._manager.save = None  # calling it raises
    checkpoints.save(1, state(), {}, pytest.fail, wait=False)
    checkpoints._writer.join()
    calls = {"check": (), "save": (2, state(), {}), "close": ()}
    with pytest.raises(OSError, match="checkpoint of step 1 .*no earlier one exists"):
        getattr(checkpoints, where)(*calls[where])
    checkpoints.check()  # it was told once


def test_a_write_that_fails_names_the_path_and_leaves_the_last(tmp_path):
    """The real thing, not a mock: the kernel refuses the write as a full disk would."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert f"cannot write the checkpoint of step 2 under {tmp_path} (step 1 is intact)" in out
    assert "latest 1" in out
