"""ldm_jax, through what its users call: `load`, and the training step of `train.py`."""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import ldm_jax
from benchmarks.peers.worker import serve
from benchmarks.unet import Denoising
from configs import common
from ldm_jax.training.optimizer import make_optimizer
from ldm_jax.training.state import init_state, make_train_step


def _denoising(folder, inputs, dtype="float32"):
    pipeline = ldm_jax.load(folder, dtype)
    batch = {name: jnp.asarray(inputs[name]) for name in ("x", "t", "context", "noise")}
    return Denoising(pipeline.unet, batch), {"unet": pipeline.params["unet"]}


def forward(folder, inputs, dtype="float32"):
    task, params = _denoising(folder, inputs, dtype)
    program = jax.jit(task.apply)
    return lambda: np.float32(program(params, task.batch))


def forward_bfloat16(folder, inputs):
    return forward(folder, inputs, "bfloat16")


def step(folder, inputs, dtype=None):
    """Parameters are float32; the network computes in `dtype`."""
    task, params = _denoising(folder, inputs)
    task.unet = task.unet.clone(dtype=dtype or task.unet.dtype)
    rule = make_optimizer(ConfigDict(common.optimizer()), 1000, ("unet",))
    state, count = init_state(task, rule, 0, params), 0
    program = jax.jit(make_train_step(task, rule, 0, 0.999, None), donate_argnums=0)

    def work():
        nonlocal state, count
        state, metrics = program(state, {}, task.batch, np.int32(count))
        count += 1
        jax.block_until_ready(state)
        return np.asarray(metrics["loss"])

    return work


def step_bfloat16(folder, inputs):
    return step(folder, inputs, jnp.bfloat16)


def encode(folder, inputs):
    first_stage = ldm_jax.load(folder).first_stage
    return lambda: first_stage.encode(inputs["image"])


def decode(folder, inputs):
    first_stage = ldm_jax.load(folder).first_stage
    return lambda: first_stage.decode(inputs["latents"])


def sample(folder, inputs, dtype="float32"):
    pipeline, latents = ldm_jax.load(folder, dtype), inputs["noise"][:1]
    side, steps = 8 * latents.shape[1], int(inputs["steps"])
    options = dict(steps=steps, guidance=7.5, sampler="ddim", height=side, width=side)
    return lambda: pipeline("a red apple", latents=latents, **options)


def sample_bfloat16(folder, inputs):
    return sample(folder, inputs, "bfloat16")


def peak():
    return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]


if __name__ == "__main__":
    versions = f"ldm_jax {ldm_jax.__version__}, jax {jax.__version__}"
    works = (forward, forward_bfloat16, step, step_bfloat16, encode, decode, sample)
    works = {work.__name__: work for work in (*works, sample_bfloat16)}
    serve(versions, works, None if jax.default_backend() == "cpu" else peak)
