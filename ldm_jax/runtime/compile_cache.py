"""A cache of compiled programs on disk."""

import os
from pathlib import Path

import jax

from ldm_jax.runtime.executables import keep_programs


def use_compile_cache(directory: str | os.PathLike | None = None) -> Path:
    """Stores every compiled program in `directory` and reuses it in later processes; those that
    draw, and those of an autoencoder, without tracing them again (`executables`).

    Default: $LDM_JAX_CACHE, else ~/.cache/ldm_jax. jax's own defaults skip programs that compile in
    less than a second, which for a small model are nearly all.
    """
    default = os.environ.get("LDM_JAX_CACHE") or Path.home() / ".cache" / "ldm_jax"
    path = Path(directory or default)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    keep_programs(path / "programs")
    return path
