"""Devices that are described and not there: what a compiler needs of them.

libtpu's compiler, and XLA's for NVIDIA GPUs, run on any x86-64 Linux machine. A program that is
lowered for the devices of a description compiles as it does on them, and cannot run.
"""

import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from ldm_jax.runtime.meters import CHIPS

# Without these, libtpu asks a cloud's metadata server which TPU it is on, and warns; and only one
# process at a time may load it, as if it used a TPU.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}


@dataclasses.dataclass(frozen=True)
class GPU:
    """A GPU as XLA describes it, beside what `meters.CHIPS` has by the same name: NVIDIA's tables.

    Attributes:
      kind: its name, jax's `device_kind`.
      major: of its compute capability.
      cores: streaming multiprocessors, each with `units` for float32 and `shared` bytes.
      block: bytes of them that one block may ask for.
      cache: of level 2, bytes.
      clock: GHz.
    """

    kind: str
    major: int
    cores: int
    units: int
    shared: int
    block: int
    cache: int
    clock: float

    def description(self) -> str:
        """XLA's `GpuTargetConfigProto` as text."""
        chip = CHIPS[self.kind]
        return f"""
            gpu_device_info {{
              cuda_compute_capability {{ major: {self.major} }}
              core_count: {self.cores} fpus_per_core: {self.units} clock_rate_ghz: {self.clock}
              shared_memory_per_core: {self.shared} shared_memory_per_block: 49152
              shared_memory_per_block_optin: {self.block} l2_cache_size: {self.cache}
              device_memory_size: {int(chip.memory)} memory_bandwidth: {int(chip.bandwidth)}
              threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 }}
            runtime_version {{ major: 12 minor: 8 }}
            device_description_str: "{self.kind}"
        """


_KIB, _MIB = 2**10, 2**20
_HOPPER = (9, 132, 128, 228 * _KIB, 227 * _KIB, 50 * _MIB, 1.98)
GPUS = {
    "a100": GPU("NVIDIA A100-SXM4-80GB", 8, 108, 64, 164 * _KIB, 163 * _KIB, 40 * _MIB, 1.41),
    "h100": GPU("NVIDIA H100 80GB HBM3", *_HOPPER),
    "h200": GPU("NVIDIA H200", *_HOPPER),
}
# How many sides a family's slices have, and an example of each. GPUs are those of one host.
FAMILIES = {"v5e": (2, "v5e:4x4"), "v5p": (3, "v5p:2x2x2"), "v6e": (2, "v6e:4x4")}
FAMILIES |= {name: (1, f"{name}:8") for name in GPUS}


def topology_devices(name: str) -> list[Any]:
    """The devices of a TPU slice, "family:AxB" or "family:AxBxC", or the GPUs of a host,
    "family:N", as a compiler's targets. From then on jax itself uses the CPU alone.

    Raises:
      ValueError: there is no such slice; says how one is written.
      ImportError: the compiler is not installed.
    """
    family, _, sides = name.partition(":")
    examples = ", ".join(f"{family} ({example})" for family, (_, example) in FAMILIES.items())
    written = (
        "a slice is written family:sides, its chips along each side of the grid; families and "
        f"examples: {examples}"
    )
    dimensions, example = FAMILIES.get(family, (0, ""))
    if not dimensions:
        raise ValueError(f"--topology={name}: no family {family!r}; {written}")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sides) or sides.count("x") + 1 != dimensions:
        has = "1 side" if dimensions == 1 else f"{dimensions} sides"
        raise ValueError(f"--topology={name}: slices of {family} have {has}, as in {example}")
    gpu = GPUS.get(family)
    compilers = ("libtpu",) if gpu is None else ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if not any(map(importlib.util.find_spec, compilers)):
        kind, extra = ("TPU", "tpu") if gpu is None else ("GPU", "cuda12")
        raise ImportError(
            f"--topology={name} needs the {kind} compiler, which runs without a {kind}: pip "
            f"install 'jax[{extra}]=={jax.__version__}', in an environment of its own"
        )
    # A chip that is there stays free; and without one, jax does not register a GPU's compiler else.
    jax.config.update("jax_platforms", "cpu")
    if gpu is not None:
        options = dict(topology=f"1x1x{sides}", target_config=gpu.description())
        return list(topologies.get_topology_desc("", "cuda", **options).devices)
    for variable, value in _NO_TPU.items():
        os.environ.setdefault(variable, value)
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        first = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise ValueError(f"--topology={name}: {first}; {written}") from error
    return list(described.devices)
