"""The smallest task there is, and what a run of it leaves."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from safetensors.numpy import load_file

from ldm_jax.diffusion.noise import per_example
from ldm_jax.runtime.logging import read_metrics
from ldm_jax.runtime.mesh import part_of_batch
from ldm_jax.training.accumulation import mean_over_parts


class Crash(Exception):
    """What a test raises in the middle of a run."""


class Task:
    """Least squares with a model of four parameters."""

    ema_networks, frozen, loaded = ("net",), {}, {}
    held_out = {"loss": 1.0}
    accumulate = 1

    def init(self, key, loaded):
        return {"net": {"w": jax.random.normal(key, (3,)), "b": jnp.zeros(())}}

    def phase(self, step):
        return None

    def gradients(self, params, frozen, batch, key, phase):
        def of_part(rows, examples):
            def loss(params):
                shape = rows["x"].shape[:1]
                noise = 0.1 * per_example(jax.random.normal, key, shape, examples)
                net = params["net"]
                return jnp.mean(jnp.square(rows["x"] @ net["w"] + net["b"] - 1.0 - noise))

            return jax.value_and_grad(loss)(params)

        value, grads = mean_over_parts(of_part, batch, self.accumulate)
        return grads, {"loss": value}

    def batches(self, start):
        step = start
        while True:
            self.before(step)
            x = np.random.default_rng(step).normal(size=(8, 3)).astype(np.float32)
            index, count = part_of_batch()
            yield step, {"x": np.split(x, count)[index]}
            step += 1

    def summary(self):
        pass

    def first_batch_picture(self, start):
        return np.zeros((4, 4, 3), np.uint8)

    def before(self, step):
        """What a test wants to happen when a batch is read."""

    def evaluate(self, ema):
        return self.held_out

    def preview(self, ema):
        return np.zeros((4, 4, 3), np.uint8)

    def export(self, ema):
        return {"task": "least squares"}, ema


def a_config(**changes):
    config = ml_collections.ConfigDict()
    config.task, config.seed = "least squares", 0
    config.optimizer = dict(
        name="adamw", lr=0.1, schedule="constant", lr_end=0.0, warmup=0, b1=0.9, b2=0.99,
        weight_decay=0.0, clip=0.0, multipliers=(), moments="float32",
    )  # fmt: skip
    config.train = dict(
        steps=30, batch_size=8, ema_decay=0.9, log_every=5, checkpoint_every=10, preview_every=30,
        keep=2,
    )  # fmt: skip
    config.mesh = dict(data=-1, fsdp=1)
    config.update_from_flattened_dict(changes)
    return config


def steps(count, **changes):
    return a_config(**{"train.steps": count, **changes})


def model(workdir):
    return {
        name: value.tolist() for name, value in load_file(workdir / "model.safetensors").items()
    }


def reports(workdir, kind="train"):
    timing = ("images_per_second", "data_wait", "tflops", "mfu", "memory_gb")
    return [
        {name: value for name, value in line.items() if name not in timing}
        for line in read_metrics(workdir)
        if line["kind"] == kind
    ]
