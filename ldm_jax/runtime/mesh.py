"""Devices as a mesh, and the shardings of a run's arrays.

The axes are `data`, `fsdp` and `tensor`. A batch is split over the first two. A parameter is split
by the first rule that its path matches: those of the config, then `TENSOR_RULES`, then `fsdp` along
its largest divisible dimension (big_vision's rule). Moments and averages are split like their
parameters.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
MIN_SPLIT_SIZE = 2**16  # parameters with fewer elements cost more to gather than to keep

# A regex on paths, and the axis of each dimension. The first layer of a
# pair is split along its outputs and the second along its inputs, so that what is between them is
# never gathered (Shoeybi et al. 2019).
TENSOR_RULES = (
    (r"/(to_[qkv]|[qkv]_proj|qkv)/kernel$", (None, "tensor")),
    (r"/(to_out|out_proj)/kernel$", ("tensor", None)),
    (r"ff/proj_in/kernel$|/fc1/kernel$", (None, "tensor")),
    (r"ff/proj_out/kernel$|/fc2/kernel$", ("tensor", None)),
    (r"/(in_layers_2|conv1)/kernel$", (None, None, None, "tensor")),
    (r"/(out_layers_3|conv2)/kernel$", (None, None, "tensor", None)),
)
Rules = Sequence[tuple[str, Sequence[str | None]]]


def make_mesh(axes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices, or those given, with the axes `AXES`; one size may be −1, "the rest".

    Raises:
      ValueError: an unknown axis, or sizes that do not fit the devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    shape = {"data": -1, "fsdp": 1, "tensor": 1, **axes}
    if unknown := shape.keys() - set(AXES):
        raise ValueError(f"mesh.{min(unknown)}: the axes of a mesh are {', '.join(AXES)}")
    shown = ", ".join(f"{name}={size}" for name, size in shape.items())
    sizes = list(shape.values())
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh {shown}: sizes are 1 or more, and one may be -1, the rest")
    known = int(np.prod([size for size in shape.values() if size != -1]))
    shape = {name: count // known if size == -1 else size for name, size in shape.items()}
    if int(np.prod(list(shape.values()))) != count:
        raise ValueError(
            f"mesh {shown} does not fit {count} devices: the product of the sizes must be {count}"
        )
    # The default, Explicit axes, breaks Linen convolutions.
    types = (AxisType.Auto,) * len(shape)
    mesh = jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=types, devices=devices)
    if _part(mesh) is None:  # the fastest order for this topology cuts through processes
        devices = sorted(devices, key=lambda device: (device.process_index, device.id))
        mesh = Mesh(np.reshape(devices, tuple(shape.values())), tuple(shape), axis_types=types)
    if _part(mesh) is None:
        raise ValueError(
            f"mesh {shown}: with {jax.local_device_count()} devices in each of "
            f"{jax.process_count()} processes, tensor must divide or be a multiple of "
            f"{jax.local_device_count()}"
        )
    return mesh


def parts_of_batch(mesh: Mesh) -> int:
    """In how many parts a mesh splits a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(mesh: Mesh, batch_size: int) -> None:
    """Raises ValueError for a batch that does not divide over the mesh; names the nearest."""
    parts = parts_of_batch(mesh)
    if batch_size % parts or batch_size < 1:
        below = max(batch_size // parts, 0) * parts
        nearest = " or ".join(str(size) for size in (below, below + parts) if size)
        raise ValueError(
            f"train.batch_size={batch_size} does not divide over mesh data={mesh.shape['data']}, "
            f"fsdp={mesh.shape['fsdp']}: use a multiple of {parts}, such as {nearest}"
        )


def part_of_batch() -> tuple[int, int]:
    """(i, n): this process holds the i-th of n equal parts of a batch on the current mesh."""
    mesh = jax.sharding.get_mesh()
    return (jax.process_index(), jax.process_count()) if mesh.empty else _part(mesh)


def _part(mesh: Mesh) -> tuple[int, int] | None:
    """See `part_of_batch`. None if the rows of a process are not one part."""
    rows = mesh.devices.reshape(-1, mesh.shape["tensor"])
    held: dict[int, set[int]] = {}
    for row, devices in enumerate(rows):
        for device in devices:
            held.setdefault(device.process_index, set()).add(row)
    own = held.get(jax.process_index(), {0})
    size = len(own)
    parts = {min(block) // size for block in held.values()}
    aligned = all(
        len(block) == size and min(block) % size == 0 and max(block) - min(block) == size - 1
        for block in held.values()
    )
    return (min(own) // size, len(parts)) if aligned else None


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Split along the first dimension, over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """Replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(mesh: Mesh, state: Any, params: Any = None, rules: Rules = ()) -> Any:
    """A sharding for every leaf of an abstract pytree, by the rules of this module.

    Args:
      params: the parameters in `state`; moments and averages, whose paths end like a parameter's,
        are split like it. None: `state` itself.
      rules: pairs of a regex on parameters' paths ("unet/input_blocks_0_0/kernel") and the axis of
        each dimension, or of the last ones: None or "" for none, several joined by "+". An empty
        tuple replicates.

    Raises:
      ValueError: a rule that does not fit a parameter that it matches.
    """
    shapes = {_names(path): leaf for path, leaf in _leaves(state if params is None else params)}
    specs = {path: _spec(mesh, "/".join(path), leaf, rules) for path, leaf in shapes.items()}

    def sharding(path, leaf):
        names = _names(path)
        ends = (names[i:] for i in range(len(names)))
        like = next((end for end in ends if end in shapes), None)
        if like is not None and shapes[like].shape == leaf.shape:
            return NamedSharding(mesh, specs[like])
        return NamedSharding(mesh, _spec(mesh, "", leaf, ()))

    return jax.tree_util.tree_map_with_path(sharding, state)


def _spec(mesh: Mesh, path: str, leaf: Any, rules: Rules) -> PartitionSpec:
    asked = next((axes for regex, axes in rules if re.search(regex, path)), None)
    if asked is not None:
        return _asked(mesh, path, leaf.shape, asked)
    spec = [None] * leaf.ndim
    given = next((axes for regex, axes in TENSOR_RULES if re.search(regex, path)), ())
    for i, axis in enumerate(reversed(given), 1):
        fits = i <= leaf.ndim and leaf.shape[-i] % mesh.shape["tensor"] == 0
        if axis and mesh.shape["tensor"] > 1 and fits:
            spec[-i] = axis
    parts = mesh.shape["fsdp"]
    divisible = [i for i, n in enumerate(leaf.shape) if spec[i] is None and n % parts == 0]
    if parts > 1 and leaf.size >= MIN_SPLIT_SIZE and divisible:
        spec[max(divisible, key=lambda i: leaf.shape[i])] = "fsdp"
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)


def _asked(
    mesh: Mesh, path: str, shape: tuple[int, ...], asked: Sequence[str | None]
) -> PartitionSpec:
    """The rule of a user for a parameter."""
    axes = [tuple(axis.split("+")) if axis else () for axis in asked]
    named = [name for several in axes for name in several]
    if unknown := set(named) - set(AXES):
        raise ValueError(f"sharding: no axis {min(unknown)!r}; a mesh has {', '.join(AXES)}")
    if len(axes) > len(shape) or len(named) != len(set(named)):
        raise ValueError(
            f"sharding: {path} has the shape {list(shape)}, and its rule {list(asked)} must name "
            "at most as many dimensions, and each axis once"
        )
    axes = [()] * (len(shape) - len(axes)) + axes
    for size, several in zip(shape, axes, strict=True):
        parts = int(np.prod([mesh.shape[name] for name in several]))
        if size % parts:
            raise ValueError(
                f"sharding: {path} has the shape {list(shape)}, and {'+'.join(several)} of the "
                f"mesh, {parts}, does not divide {size}"
            )
    return PartitionSpec(*[several or None for several in axes])


def _leaves(tree: Any) -> list:
    return jax.tree_util.tree_leaves_with_path(tree)


def _names(path: tuple) -> tuple[str, ...]:
    return tuple(str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path)


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """This process's rows of a batch, a tree of arrays → global arrays split over the mesh."""
    sharding, (_, parts) = batch_sharding(mesh), _part(mesh)

    def put(rows):
        shape = (len(rows) * parts, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return jax.tree.map(put, batch)


def one_each(mesh: Mesh, number: int) -> jax.Array:
    """int32 (devices,), split over all devices: `number` from each device of this process."""
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    one = np.full(1, number, np.int32)
    return jax.make_array_from_callback((mesh.size,), sharding, lambda index: one)


def put(tree: Any, shardings: Any) -> Any:
    """Arrays that every process has whole → global arrays."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def one(value, sharding):
        value = np.asarray(value)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(one, tree, shardings)


def spread(batch: Any) -> Any:
    """A batch that every process has whole, split over the current mesh, so that each device
    computes its share; as it is without a mesh or if its rows do not divide."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty or mesh.size == 1:
        return batch
    rows, parts = {len(leaf) for leaf in jax.tree.leaves(batch)}, int(mesh.size)
    if "tensor" in mesh.shape:
        parts //= mesh.shape["tensor"]
    if len(rows) != 1 or min(rows) % parts:
        return batch
    sharding = batch_sharding(mesh)
    return put(batch, jax.tree.map(lambda _: sharding, batch))


def to_host(tree: Any) -> Any:
    """NumPy arrays of a tree of arrays that may be split over processes, whole in each of them.

    Every process calls it."""

    def whole(value):
        if isinstance(value, jax.Array) and not (
            value.is_fully_addressable or value.is_fully_replicated
        ):
            return np.asarray(multihost_utils.process_allgather(value, tiled=True))
        return np.asarray(value)

    return jax.tree.map(whole, tree)


def local_mesh(rows: int) -> Mesh | None:
    """A mesh of this process's devices for a batch of `rows`; None if it does not divide over
    several of them, or another mesh is in use."""
    devices = jax.local_devices()
    alone = jax.process_count() == 1 and jax.sharding.get_mesh().empty
    if not alone or len(devices) == 1 or rows % len(devices):
        return None
    return Mesh(np.reshape(devices, (-1, 1, 1)), AXES, axis_types=(AxisType.Auto,) * 3)


def on_one_device() -> Any:
    """A context in which this process computes on one of its devices, without the others."""
    types = (AxisType.Auto,)
    return jax.set_mesh(Mesh(np.array(jax.local_devices()[:1]), ("data",), axis_types=types))
