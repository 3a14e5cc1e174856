"""The one XLA flag that decides the speed on a CPU."""

import importlib.util
import os
from importlib import metadata

FLAG = "--xla_cpu_experimental_ynn_fusion_type="
# Where it pays: from the first of these jaxlibs to before the second. On 0.11 and 0.12 the same
# flag costs 1.36 times forward and 1.23 times in training; one that a jaxlib does not know aborts.
PAYS = ((0, 10, 0), (0, 11, 0))
ACCELERATORS = (
    "libtpu",
    "jax_cuda12_plugin",
    "jax_cuda13_plugin",
    "jax_rocm7_plugin",
    "jax_plugins",
)


def use_fast_cpu_kernels() -> bool:
    """Keeps XLA from sending convolutions and products to YNNPACK, the slow part on CPUs.

    Measured 1.6 times faster forward and 1.35 times training with jaxlib 0.10. Acts only where jax
    will run on a CPU with a jaxlib that gains, and where the user has not set the flag; returns
    whether it did. Must run before jax initialises its backends.
    """
    flags, platforms = os.environ.get("XLA_FLAGS", ""), os.environ.get("JAX_PLATFORMS", "")
    accelerated = any(importlib.util.find_spec(name) for name in ACCELERATORS)
    on_cpu = platforms == "cpu" or (not platforms and not accelerated)
    version = tuple(int(part) for part in metadata.version("jaxlib").split(".")[:3])
    if not on_cpu or "ynn_fusion_type" in flags or not PAYS[0] <= version < PAYS[1]:
        return False
    os.environ["XLA_FLAGS"] = f"{flags} {FLAG}".strip()
    return True
