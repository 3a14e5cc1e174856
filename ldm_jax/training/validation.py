"""The validation loss of a diffusion model: held-out pairs at fixed timesteps and noise.

The protocol follows the Flux benchmark of MLPerf Training v5.1, which has timesteps u = 0, ⅛ … ⅞ of
the schedule, the mean over the pairs of each, and the mean of these. There each pair has one
timestep, and here each has all. It is the squared error of the network's output without weights, so
runs of different objectives that predict the same quantity can be compared.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.noise import Examples
from ldm_jax.diffusion.objective import Objective
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.runtime.mesh import spread, to_host
from ldm_jax.training.distillation import Distillation, Options

TIMES = tuple(i / 8 for i in range(8))  # of the schedule's range, 0 the least noise

Losses = Callable[[Any, Any, Any, jax.Array, jax.Array], jax.Array]


def losses_at(
    model: LatentDiffusion,
    latents: Callable,
    merged: Callable,
    distill: Options | None = None,
) -> Losses:
    """The compiled function (frozen, ema, batch, index, number) → (B,): the errors of the pairs
    `index` (B,) at `TIMES[number]`.

    `latents(frozen, batch, key, examples)` gives the scaled latents of a batch, and
    `merged(frozen, ema)` all parameters. All noise depends on a pair's index and `number` alone.
    With `distill` they are the losses of a student.
    """
    plain = dataclasses.replace(model, objective=Objective())
    objective = plain if distill is None else Distillation(plain, distill)

    @jax.jit
    def losses(frozen, ema, batch, index, number):
        examples = Examples(index, len(index))
        key = jax.random.fold_in(jax.random.key(0), number)
        clean = latents(frozen, batch, jax.random.fold_in(key, 0), examples)
        u = jnp.asarray(TIMES, jnp.float32)[number]
        return objective.loss(
            merged(frozen, ema),
            clean,
            {embedder.name: batch[embedder.name] for embedder in model.embedders},
            jax.random.fold_in(key, 1),
            training=False,
            examples=examples,
            times=model.diffusion.schedule.time(jnp.broadcast_to(u, index.shape)),
        )

    return losses


def errors(losses: Callable, batches: Iterator[tuple[Any, np.ndarray, np.ndarray]]) -> np.ndarray:
    """Float64 (pairs, 8): the error of each pair at each timestep.

    `batches` gives (batch, indices, which rows count); `losses(batch, index, number)` is that of
    `losses_at`. Each device computes its share.
    """
    rows = []
    for batch, index, valid in batches:
        shared = spread({"batch": batch, "index": index.astype(np.int32)})
        of_batch = [losses(shared["batch"], shared["index"], i) for i in range(len(TIMES))]
        rows.append(np.stack([to_host(values)[valid] for values in of_batch], axis=1))
    return np.concatenate(rows).astype(np.float64) if rows else np.zeros((0, len(TIMES)))


def summary(errors: np.ndarray) -> dict[str, float]:
    """The metrics of errors (pairs, 8); {} of none.

    `loss`, the mean over timesteps of the means over pairs; `loss_error`, its standard error over
    pairs (0 of one pair); and `loss_at_U`, the mean of each timestep.
    """
    if not len(errors):
        return {}
    of_pairs, count = errors.mean(axis=1), len(errors)
    error = of_pairs.std(ddof=1) / np.sqrt(count) if count > 1 else 0.0
    means = {f"loss_at_{u:g}": float(m) for u, m in zip(TIMES, errors.mean(axis=0), strict=True)}
    return {"loss": float(of_pairs.mean()), "loss_error": float(error)} | means
