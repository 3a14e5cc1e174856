"""What a program needs of a chip, before there is one: compiled for devices that are described
(`runtime/topologies.py`), or for those that are there."""

import dataclasses
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.runtime.hlo import traffic
from ldm_jax.runtime.meters import Chip, chip_of


@dataclasses.dataclass(frozen=True)
class Usage:
    """What one run of a compiled program needs of each chip: bytes, FLOPs, seconds.

    Attributes:
      arguments, outputs, temporaries, code: memory, bytes; outputs without those that take the
        place of arguments.
      capacity: the memory that a program may use, bytes, if it is not enough; else None.
      flops: all that XLA counts; 0 if it does not. It counts the body of a loop once.
      accessed: bytes read from and written to the main memory, in a loop's body as often as it
        runs.
      sent: bytes sent to other chips, by the kind of collective.
      seconds: the time that compiling took.
      compiled: the program; None if it does not fit.
    """

    arguments: float = 0.0
    outputs: float = 0.0
    temporaries: float = 0.0
    code: float = 0.0
    needed: float = 0.0
    capacity: float | None = None
    flops: float = 0.0
    accessed: float = 0.0
    sent: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    compiled: Any = None

    @property
    def fits(self) -> bool:
        return self.compiled is not None


def compile_usage(lowered: Any, capacity: float | None = None) -> Usage:
    """Compiles a lowered program and reads what it needs; one that does not fit in memory has only
    `needed` and `capacity`.

    A TPU's compiler knows what fits; for others `capacity` says it: of a device, bytes."""
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = _TOO_LARGE.search(str(error))
        if found is None:
            raise
        needed, capacity = (float(found[i]) * _UNITS[found[i + 1]] for i in (1, 3))
        spent = time.perf_counter() - began
        return Usage(needed=needed, capacity=capacity, seconds=spent)
    spent = time.perf_counter() - began
    # Of a program for a GPU that is not there, there is no cost analysis.
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    moves = traffic(compiled.as_text())
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    parts = (
        memory.argument_size_in_bytes,
        outputs,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
    )
    needed = sum(parts)
    if capacity is not None and needed > capacity:
        return Usage(needed=needed, capacity=capacity, seconds=spent)
    return Usage(
        *parts,
        needed=needed,
        flops=cost.get("flops", 0.0),
        accessed=moves.main,
        sent=moves.sent,
        seconds=spent,
        compiled=compiled,
    )


def capacity_of(devices: Sequence[Any]) -> float:
    """Bytes that a program may use of each device: of a chip that is known all of its memory, else
    what the device says, and of a CPU its share of the machine's."""
    if (chip := chip_of(devices[0])) is not None:
        return chip.memory
    if limit := (devices[0].memory_stats() or {}).get("bytes_limit"):
        return limit
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(devices)


@dataclasses.dataclass(frozen=True)
class Bound:
    """The least time that a chip needs for a program, and what for.

    Attributes:
      times: seconds for "products", "memory" and "interconnect", each at its peak.
      mfu: the share of the peak that the model's own FLOPs can reach in that time.
    """

    times: dict[str, float]
    mfu: float

    @property
    def seconds(self) -> float:
        return max(self.times.values())

    @property
    def by(self) -> str:
        return max(self.times, key=self.times.get)


def roofline(usage: Usage, model_flops: float, chip: Chip) -> Bound:
    """The roofline of a program (Williams et al. 2009); `model_flops` are those of one chip.

    XLA's count of FLOPs has recomputation and the optimiser, the model's has what loops repeat: the
    larger one is used.
    """
    times = {
        "products": max(usage.flops, model_flops) / chip.flops,
        "memory": usage.accessed / chip.bandwidth,
        "interconnect": sum(usage.sent.values()) / chip.interconnect,
    }
    return Bound(times, model_flops / chip.flops / max(times.values()))


# The compiler says it in two ways: of the whole program, or of its temporaries alone.
_SIZE = r"\(?([\d.]+)([KMGT]?)\)?"
_TOO_LARGE = re.compile(
    rf"(?:Used|required for HLO temporaries) {_SIZE} (?:of|exceeds available HBM) {_SIZE}"
)
_UNITS = {"": 1.0} | {unit: 2.0 ** (10 * i) for i, unit in enumerate("KMGT", 1)}


def size(count: float) -> str:
    """Bytes as text, in binary units."""
    power = min(int(math.log2(max(count, 1)) // 10), 4)
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{count / 2.0 ** (10 * power):.4g} {unit}"


def measure(compiled: Any, runs: int = 3, clock: Callable[[], float] = time.perf_counter) -> float:
    """The shortest time of a run of a compiled program, seconds, of `runs` after a first one.

    `clock` may be `time.process_time`, for the time of all processors. The program's arguments are
    zeros: programs of this package take as long with any numbers.
    """
    shardings = compiled.input_shardings

    def zeros():
        def fill(about, sharding):
            if jax.dtypes.issubdtype(about.dtype, jax.dtypes.prng_key):
                return jax.device_put(jnp.broadcast_to(jax.random.key(0), about.shape), sharding)
            return jax.device_put(jnp.zeros(about.shape, about.dtype), sharding)

        return jax.block_until_ready(jax.tree.map(fill, compiled.args_info, shardings))

    times = []
    for _ in range(runs + 1):
        args, kwargs = zeros()  # anew, because a program may use the memory of its arguments
        began = clock()
        jax.block_until_ready(compiled(*args, **kwargs))
        times.append(clock() - began)
    return min(times[1:])
