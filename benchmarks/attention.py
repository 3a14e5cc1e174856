"""The time of attention, value and gradient, beside the definition that keeps all its weights.

    python -m benchmarks.attention [--repeats=3]
    python -m benchmarks.attention --topology=v5e:2x2     # or h100:1: see docs/tpu-plan.md

The first prints the least CPU time of all threads in ms, which other programs on the machine
disturb less than the time on the clock, for shapes of small models, LDM and Stable Diffusion. The
second compiles for one chip of a TPU slice or one GPU, with bfloat16 inputs, and prints the
gigabytes that the program moves between the chip and its memory. Of a kernel (cuDNN's or splash
attention) these are its operands and results, each once.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import ldm_jax
from ldm_jax.models.dot_product import attend

SHAPES = (  # batch, queries, keys, heads, d
    (64, 16, 16, 4, 32),
    (64, 16, 24, 4, 32),
    (8, 256, 256, 8, 32),
    (8, 1024, 1024, 8, 16),
    (8, 1024, 77, 8, 16),
    (2, 1024, 1024, 8, 80),
    (1, 4096, 4096, 8, 40),
    (1, 4096, 4096, 1, 512),
)
LARGE = ((2, 4096, 4096, 8, 40), (8, 4096, 4096, 8, 40), (32, 4096, 4096, 5, 64))


def definition(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """As `attend`, differentiated by jax."""
    query, key, value = (jnp.swapaxes(array, 1, 2) for array in (query, key, value))
    logits = jnp.einsum("bhld,bhsd->bhls", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits * query.shape[-1] ** -0.5, axis=-1).astype(value.dtype)
    return jnp.swapaxes(jnp.einsum("bhls,bhsd->bhld", weights, value), 1, 2)


def milliseconds(program, arrays: list[jax.Array], repeats: int) -> float:
    spent = []
    for _ in range(repeats + 1):  # the first one warms up
        began = time.process_time()
        jax.block_until_ready(program(*arrays))
        spent.append(time.process_time() - began)
    return 1e3 * min(spent[1:])


def moved(topology: str) -> None:
    from ldm_jax.runtime.plan import compile_usage
    from ldm_jax.runtime.topologies import topology_devices

    mesh = Mesh(np.array(topology_devices(topology)[:1]), ("data",), axis_types=(AxisType.Auto,))
    chip = NamedSharding(mesh, PartitionSpec())
    print("batch, queries, keys, heads, d     value, definition    gradient, definition  (GB)")
    for shape in LARGE:
        batch, queries, keys, heads, width = shape
        arrays = [
            jax.ShapeDtypeStruct((batch, tokens, heads, width), jnp.bfloat16, sharding=chip)
            for tokens in (queries, keys, keys)
        ]
        programs = [program for function in (attend, definition) for program in both(function)]
        with jax.set_mesh(mesh):
            lowered = [program.lower(*arrays) for program in programs]
        usages = [compile_usage(program) for program in lowered]
        ours, our_gradient, theirs, their_gradient = (
            f"{usage.accessed / 1e9:.1f}" if usage.fits else "too large" for usage in usages
        )
        print(
            f"{shape!s:30} {ours:>9} {theirs:>11} {our_gradient:>11} {their_gradient:>11}",
            flush=True,
        )


def both(function):
    """Programs of the value and of the gradient."""

    def loss(*arrays):
        return jnp.sum(jnp.sin(function(*arrays).astype(jnp.float32)))

    return jax.jit(lambda *arrays: function(*arrays)), jax.jit(jax.grad(loss, (0, 1, 2)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--topology", default="")
    asked = parser.parse_args()
    repeats = asked.repeats
    if asked.topology:
        return moved(asked.topology)
    print(f"ldm_jax {ldm_jax.__version__}, jax {jax.__version__}, {jax.devices()[0].device_kind}")
    print("batch, queries, keys, heads, d     value, definition    gradient, definition  (CPU ms)")
    for shape in SHAPES:
        batch, queries, keys, heads, width = shape
        draw = np.random.default_rng(0).normal
        arrays = [
            jnp.asarray(draw(size=(batch, tokens, heads, width)), jnp.float32)
            for tokens in (queries, keys, keys)
        ]
        times = []
        for function in (attend, definition):
            times += [milliseconds(program, arrays, repeats) for program in both(function)]
        ours, our_gradient, theirs, their_gradient = times
        print(
            f"{shape!s:30} {ours:9.1f} {theirs:11.1f} {our_gradient:11.1f} {their_gradient:11.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
