"""Eight devices for every test, and one compilation cache for all of them."""

import os
import tempfile
from pathlib import Path

import pytest

# Compiling takes longer here than running: level 1 takes a third off the whole suite.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=1"
)
os.environ["JAX_PLATFORMS"] = "cpu"
CACHE = Path(tempfile.gettempdir()) / "ldm_jax_test_cache"
os.environ["LDM_JAX_CACHE"] = str(CACHE)

import ldm_jax  # noqa: E402
from ldm_jax.runtime.compile_cache import use_compile_cache  # noqa: E402

use_compile_cache(CACHE)
ROOT = Path(ldm_jax.__file__).parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT
