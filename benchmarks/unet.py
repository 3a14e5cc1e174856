"""The speed of a UNet: forward, and a whole training step.

    python -m benchmarks.unet [--case=bundled] [--case=104m] [--work=forward] [--repeats=5]

Each line has the median wall time, the median CPU time of all threads (which other programs on the
machine disturb less), the share of it that the operating system took, and XLA's own memory. Weights
and inputs are random. The training step is the one that `train.py` compiles, of a config's
optimiser.
"""

import argparse
import resource
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import ldm_jax
from configs import common
from ldm_jax.models.unet import UNet
from ldm_jax.training.optimizer import make_optimizer
from ldm_jax.training.state import init_state, make_train_step

# The UNet's fields, its optimiser, and the shapes of latents and context.
CASES = {
    "bundled": (
        {
            **common.small_diffusion({}, {}).unet,
            "context_dim": 128,
            "use_spatial_transformer": True,
        },
        common.optimizer(name="muon"),
        (64, 8, 8, 16),
        (64, 24, 128),
    ),
    "104m": (
        dict(
            model_channels=128,
            channel_mult=(1, 2, 4),
            attention_resolutions=(1, 2, 4),
            context_dim=768,
            use_spatial_transformer=True,
        ),
        common.optimizer(),
        (8, 32, 32, 4),
        (8, 77, 768),
    ),
    "sd15": (
        dict(context_dim=768, use_spatial_transformer=True),
        common.optimizer(),
        (2, 64, 64, 4),
        (2, 77, 768),
    ),
}


class Denoising:
    """A task with one network and no data; its parameters are drawn, or those `loaded`."""

    ema_networks, frozen, loaded = ("unet",), {}, {}

    def __init__(self, unet: UNet, batch: dict[str, jax.Array]):
        self.unet, self.batch = unet, batch

    def init(self, key, loaded):
        if loaded:
            return loaded
        inputs = (self.batch["x"], self.batch["t"], self.batch["context"])
        return {"unet": self.unet.init(key, *inputs)["params"]}

    def apply(self, params, batch):
        inputs = (batch["x"], batch["t"], batch["context"])
        return self.unet.apply({"params": params["unet"]}, *inputs)

    def gradients(self, params, frozen, batch, key, phase):
        def loss(params):
            return jnp.mean(jnp.square(self.apply(params, batch) - batch["noise"]))

        value, grads = jax.value_and_grad(loss)(params)
        return grads, {"loss": value}


def measure(name: str, work: str, compiled, call, repeats: int) -> None:
    def usage():
        spent = resource.getrusage(resource.RUSAGE_SELF)
        return time.perf_counter(), spent.ru_utime, spent.ru_stime

    rows = []
    for _ in range(repeats + 1):  # the first one warms up
        before = usage()
        jax.block_until_ready(call())
        rows.append([b - a for a, b in zip(before, usage(), strict=True)])
    wall, user, system = (statistics.median(column) for column in zip(*rows[1:], strict=True))
    memory = compiled.memory_analysis()
    print(
        f"{name:8} {work:8} {wall:7.3f} s, CPU {user + system:7.3f} s, of it the system "
        f"{system / (user + system):4.0%}; temporaries {memory.temp_size_in_bytes / 1e6:.0f} MB",
        flush=True,
    )


def run(name: str, works: tuple[str, ...], repeats: int) -> None:
    fields, optimizer, shape, context = CASES[name]
    rng = np.random.default_rng(0)
    batch = {
        "x": rng.normal(size=shape).astype(np.float32),
        "noise": rng.normal(size=shape).astype(np.float32),
        "t": np.linspace(0, 999, shape[0], dtype=np.float32),
        "context": rng.normal(size=context).astype(np.float32),
    }
    batch = jax.tree.map(jnp.asarray, batch)
    task = Denoising(UNet(**fields), batch)
    rule = make_optimizer(ConfigDict(optimizer), 1000, ("unet",))
    state = jax.jit(lambda: init_state(task, rule, 0, {}))()
    print(f"{name}: {sum(x.size for x in jax.tree.leaves(state.params)) / 1e6:.2f} M parameters")
    if "forward" in works:
        began = time.perf_counter()
        forward = jax.jit(task.apply).lower(state.params, batch).compile()
        print(f"{name:8} compiled the forward pass in {time.perf_counter() - began:.1f} s")
        measure(name, "forward", forward, lambda: forward(state.params, batch), repeats)
    if "step" in works:
        began = time.perf_counter()
        step = jax.jit(make_train_step(task, rule, 0, 0.999, None), donate_argnums=0)
        step = step.lower(state, {}, batch, np.int32(0)).compile()
        print(f"{name:8} compiled the step in {time.perf_counter() - began:.1f} s")
        count = 0

        def call():
            nonlocal state, count
            state, metrics = step(state, {}, batch, np.int32(count))
            count += 1
            return metrics

        measure(name, "step", step, call, repeats)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--work", action="append", choices=["forward", "step"])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(f"ldm_jax {ldm_jax.__version__}, jax {jax.__version__}, {jax.devices()[0].device_kind}")
    for name in arguments.case or ["bundled", "104m"]:
        run(name, tuple(arguments.work or ["forward", "step"]), arguments.repeats)


if __name__ == "__main__":
    main()
