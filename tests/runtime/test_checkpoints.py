"""Checkpoints come back as they were, and a failed one leaves the last in place."""

import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.runtime.checkpoints import Checkpoints, abstract_like
from ldm_jax.runtime.mesh import make_mesh, replicated, state_shardings


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
def test_a_write_that_fails_names_the_path_and_leaves_the_last(tmp_path):
    """The real thing, not a mock: the kernel refuses the write as a full disk would."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert f"cannot write the checkpoint of step 2 under {tmp_path} (step 1 is intact)" in out
    assert "latest 1" in out


def test_mesh_must_fit_the_devices():
    with pytest.raises(ValueError, match=r"mesh \{'data': 3\} does not fit 8 devices"):
        make_mesh({"data": 3})


def test_large_parameters_split_along_their_largest_divisible_dimension():
    mesh = make_mesh({"fsdp": 4})
    shapes = {
        "large": jax.ShapeDtypeStruct((3, 256, 512), jnp.float32),
        "small": jax.ShapeDtypeStruct((64,), jnp.float32),
        "odd": jax.ShapeDtypeStruct((513, 257), jnp.float32),
    }
    specs = jax.tree.map(lambda s: tuple(s.spec), state_shardings(mesh, shapes))
    assert specs == {"large": (None, None, "fsdp"), "small": (), "odd": ()}
