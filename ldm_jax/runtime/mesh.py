"""Devices as a mesh, and the shardings of a run's arrays.

The batch is split over both axes. Parameters are replicated or, over an `fsdp` axis of more than
one device, split along their largest divisible dimension (big_vision's rule).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MIN_SPLIT_SIZE = 2**16  # parameters with fewer elements cost more to gather than to keep


def make_mesh(axes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices, or those given, with axes `data` and `fsdp`; one size may be −1,
    "the rest"."""
    devices = jax.devices() if devices is None else devices
    shape, count = {"data": -1, "fsdp": 1, **axes}, len(devices)
    known = int(np.prod([size for size in shape.values() if size != -1]))
    shape = {name: count // known if size == -1 else size for name, size in shape.items()}
    if int(np.prod(list(shape.values()))) != count:
        raise ValueError(f"mesh {dict(axes)} does not fit {count} devices")
    # The default, Explicit axes, breaks Linen convolutions.
    types = (AxisType.Auto,) * len(shape)
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=types, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Split along the first dimension, over every device."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """Replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """A sharding for every leaf of an abstract pytree, by the `fsdp` rule above."""
    parts = mesh.shape["fsdp"]

    def rule(leaf):
        divisible = [i for i, size in enumerate(leaf.shape) if size % parts == 0]
        if parts == 1 or leaf.size < MIN_SPLIT_SIZE or not divisible:
            return replicated(mesh)
        axis = max(divisible, key=lambda i: leaf.shape[i])
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))

    return jax.tree.map(rule, state)


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """This process's rows of a batch, a tree of arrays → global arrays split over the mesh."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)
