"""Compiled programs that outlive the process."""

import os
from pathlib import Path

import jax


def use_compile_cache(directory: str | os.PathLike | None = None) -> Path:
    """Keeps every compiled program in `directory` and finds it there the next time.

    Default: $LDM_JAX_CACHE, else ~/.cache/ldm_jax. jax's own defaults skip whatever compiles in
    under a second, which on a small model is nearly everything.
    """
    default = os.environ.get("LDM_JAX_CACHE") or Path.home() / ".cache" / "ldm_jax"
    path = Path(directory or default)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path
