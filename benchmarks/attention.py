"""The time of attention, value and gradient, beside the definition that keeps all its weights.

    python -m benchmarks.attention [--repeats=3]

Prints the least CPU time of all threads in ms, which other programs on the machine disturb less
than the time on the clock, for shapes of small models, LDM and Stable Diffusion.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
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
            value = jax.jit(lambda *a, function=function: function(*a))
            gradient = jax.jit(
                jax.grad(lambda *a, function=function: jnp.sum(jnp.sin(function(*a))), (0, 1, 2))
            )
            times += [milliseconds(program, arrays, repeats) for program in (value, gradient)]
        ours, our_gradient, theirs, their_gradient = times
        print(
            f"{shape!s:30} {ours:9.1f} {theirs:11.1f} {our_gradient:11.1f} {their_gradient:11.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
