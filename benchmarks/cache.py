"""What DeepCache saves: a step with all of a UNet, and one from kept features on.

    python -m benchmarks.cache [--case=sd15] [--side=16] [--branch=0] [--repeats=3]

Weights and inputs are random, a prompt and its negative side are one batch of 2. Prints XLA's count
of operations and the median CPU time of both steps, and what they make of a run: with interval N,
one step in N is whole. Encoding the prompt and decoding the picture are not in it.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import ldm_jax
from benchmarks.unet import CASES
from ldm_jax.models.unet import UNet

INTERVALS = (2, 3, 5)


def random_params(unet: UNet, *inputs: jax.Array):
    shapes = jax.eval_shape(unet.init, jax.random.key(0), *inputs)["params"]
    noise = np.random.default_rng(0).normal(scale=0.02, size=1 << 20).astype(np.float32)
    return jax.tree.map(lambda s: jnp.asarray(np.resize(noise, s.shape)), shapes)


def cpu_seconds(call, repeats: int) -> float:
    spent = []
    for _ in range(repeats + 1):  # the first one warms up
        before = time.process_time()
        jax.block_until_ready(call())
        spent.append(time.process_time() - before)
    return statistics.median(spent[1:])


def run(name: str, side: int, branch: int, repeats: int) -> None:
    fields, _, shape, context = CASES[name]
    unet = UNet(**fields)
    x, t = jnp.ones((2, side or shape[1], side or shape[2], shape[3])), jnp.full(2, 500.0)
    inputs = (x, t, jnp.ones((2, *context[1:])))
    params = random_params(unet, *inputs)

    def step(params, inputs, deep=None):
        return unet.apply({"params": params}, *inputs, branch=branch, deep=deep)

    whole = jax.jit(step).lower(params, inputs).compile()
    deep = whole(params, inputs)[1]
    outer = jax.jit(step).lower(params, inputs, deep).compile()
    flops = [program.cost_analysis()["flops"] for program in (whole, outer)]
    seconds = [
        cpu_seconds(lambda: whole(params, inputs), repeats),
        cpu_seconds(lambda: outer(params, inputs, deep), repeats),
    ]
    print(f"{name}, latents {x.shape}, branch {branch}")
    for what, (all_of_it, few), unit in (("flops", flops, 1e9), ("CPU s", seconds, 1.0)):
        speeds = (n / (1 + (n - 1) * few / all_of_it) for n in INTERVALS)
        times = ", ".join(f"{n}: {speed:.2f}" for n, speed in zip(INTERVALS, speeds, strict=True))
        print(f"  {what} {all_of_it / unit:9.3f} whole, {few / unit:9.3f} outer; interval {times}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", choices=list(CASES), default="sd15")
    parser.add_argument("--side", type=int, default=16, help="of latents; 0: the case's")
    parser.add_argument("--branch", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print(f"ldm_jax {ldm_jax.__version__}, jax {jax.__version__}, {jax.devices()[0].device_kind}")
    run(arguments.case, arguments.side, arguments.branch, arguments.repeats)


if __name__ == "__main__":
    main()
