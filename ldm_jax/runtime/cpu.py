"""An XLA flag that makes some jaxlibs faster on a CPU."""

import importlib.util
import os
from importlib import metadata

FLAG = "--xla_cpu_experimental_ynn_fusion_type="
# Whether it pays, by jaxlib's version: see docs/speed.md. A jaxlib aborts on a flag that it does
# not know, so one that is not in the table runs without it.
PAYS = {(0, 10): True, (0, 11): False, (0, 12): False}
ACCELERATORS = (
    "libtpu",
    "jax_cuda12_plugin",
    "jax_cuda13_plugin",
    "jax_rocm7_plugin",
    "jax_plugins",
)


def use_fast_cpu_kernels() -> bool:
    """Turns off YNNPACK, XLA's slow library for convolutions and products on CPUs.

    It sets the flag only if jax will run on a CPU with a jaxlib that gains, and the user has not
    set it; returns whether it did. It must run before jax initialises its backends.
    """
    flags, platforms = os.environ.get("XLA_FLAGS", ""), os.environ.get("JAX_PLATFORMS", "")
    accelerated = any(importlib.util.find_spec(name) for name in ACCELERATORS)
    on_cpu = platforms == "cpu" or (not platforms and not accelerated)
    version = tuple(int(part) for part in metadata.version("jaxlib").split(".")[:2])
    if not on_cpu or "ynn_fusion_type" in flags or not PAYS.get(version, False):
        return False
    os.environ["XLA_FLAGS"] = f"{flags} {FLAG}".strip()
    return True
