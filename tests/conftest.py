"""Eight devices for every test, one compilation cache for all, few programs in memory at once."""

import gc
import os
import tempfile
from pathlib import Path

import pytest

# Compiling takes longer here than running: level 1 takes a third off the whole suite. Level 0 takes
# off little more, and steps in one program are then other to the last bit than in several.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=1"
)
os.environ["JAX_PLATFORMS"] = "cpu"
CACHE = Path(tempfile.gettempdir()) / "ldm_jax_test_cache"
os.environ["LDM_JAX_CACHE"] = str(CACHE)

import jax  # noqa: E402

import ldm_jax  # noqa: E402
from ldm_jax.runtime.compile_cache import use_compile_cache  # noqa: E402
from ldm_jax.runtime.executables import keep_programs  # noqa: E402

use_compile_cache(CACHE)
keep_programs(None)  # tests count what is traced
ROOT = Path(ldm_jax.__file__).parents[1]

# Looking for garbage took 3 to 10 % of the processor time of a file.
gc.freeze()
gc.set_threshold(20_000, 10, 10)

MAPPINGS = Path("/proc/self/maps")  # of Linux


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Drops compiled programs before they exhaust the memory mappings of a process.

    Each program on a CPU has several, Linux allows 65,530, and the process that needs one more is
    aborted. A module leaves some hundreds; dropped programs come back from the cache on disk.
    """
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > 15_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT
