"""The compiled programs of a run: the training step, and the two programs that a plan compiles."""

import dataclasses
import math
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ldm_jax.diffusion.noise import seed_bits
from ldm_jax.diffusion.plan import Guidance, Sampling, plan
from ldm_jax.programs import generate
from ldm_jax.runtime.mesh import (
    batch_sharding,
    check_batch,
    parts_of_batch,
    replicated,
    state_shardings,
)
from ldm_jax.runtime.meters import jaxpr_flops, model_flops
from ldm_jax.training.abstract import batch_shapes, input_shapes
from ldm_jax.training.accumulation import check_parts
from ldm_jax.training.ema import more_averages
from ldm_jax.training.optimizer import make_optimizer
from ldm_jax.training.precision import compute_type
from ldm_jax.training.state import State, Task, init_state, make_train_step
from ldm_jax.training.trainable import merge

STOP = "stop"  # the metric of a step that tells all processes of a signal to one of them


def step_program(
    task: Task,
    optimizer: optax.GradientTransformation,
    config: Any,
    mesh: Mesh,
    state: Any,
    frozen: Any,
    phase: Hashable,
    ask: bool = False,
) -> Any:
    """Training steps of a phase, as `jax.jit` returns them: they donate the state.

    `state` and `frozen` are the shardings of its first two arguments, the state and the parameters
    that do not train; the others are a tuple of batches, one for each step, and the number of the
    first step. Metrics of several steps have an axis of them. With `ask` there is one argument
    more, the signal that each process got (`mesh.one_each`), and a metric `STOP`, the largest.
    """
    settings = config.train
    step = make_train_step(
        task, optimizer, config.seed, settings.ema_decay, phase, more_averages(settings)
    )

    def steps_and_ask(state, frozen, batches, number, *asked):
        if len(batches) == 1:
            state, metrics = step(state, frozen, batches[0], number)
        else:
            stacked = jax.tree.map(lambda *rows: jnp.stack(rows), *batches)
            numbers = number + jnp.arange(len(batches), dtype=number.dtype)
            state, metrics = jax.lax.scan(
                lambda state, given: step(state, frozen, *given), state, (stacked, numbers)
            )
        return state, metrics | ({STOP: jnp.max(asked[0])} if asked else {})

    signals = (NamedSharding(mesh, PartitionSpec(mesh.axis_names)),) if ask else ()
    return jax.jit(
        steps_and_ask,
        donate_argnums=0,
        in_shardings=(state, frozen, batch_sharding(mesh), replicated(mesh), *signals),
        out_shardings=(state, replicated(mesh)),
    )


def step_flops(
    traced: Any, optimizer: optax.GradientTransformation, state: State, steps: int = 1
) -> float:
    """FLOPs of the model's products in one of `steps` traced steps (`jax.jit(…).trace(…)`), on all
    devices: see `meters.model_flops`. Those of the optimiser, which Muon has, do not count; `state`
    may be shapes."""
    of_update = model_flops(optimizer.update, state.params, state.opt_state, state.params)
    return jaxpr_flops(traced.jaxpr) / steps - of_update


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A program for the devices of a mesh, lowered and not compiled.

    Attributes:
      lowered: as jax returns it.
      images: the number that one run trains on or draws.
      flops: of the model's products in one run, on all devices: see `meters.model_flops`.
    """

    lowered: Any
    images: int
    flops: float


def abstract_state(task: Task, config: Any) -> tuple[optax.GradientTransformation, State]:
    """The optimiser of a task, and its first state as shapes."""
    networks = tuple(jax.eval_shape(task.init, jax.random.key(0), task.loaded))
    optimizer = make_optimizer(config.optimizer, config.train.steps, networks)
    more = more_averages(config.train)
    initial = jax.eval_shape(
        lambda loaded: init_state(task, optimizer, config.seed, loaded, more), task.loaded
    )
    return optimizer, initial


def state_bytes(task: Task, config: Any, mesh: Mesh) -> float:
    """The bytes of each device that the state and the parameters that do not train take."""
    _, state = abstract_state(task, config)
    rules = config.get("sharding", ())
    held = (state, task.frozen)
    places = (
        state_shardings(mesh, state, state.params, rules),
        state_shardings(mesh, task.frozen, rules=rules),
    )
    counts = jax.tree.map(
        lambda leaf, place: math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        held,
        places,
    )
    return float(sum(jax.tree.leaves(counts)))


def lower_step(task: Task, config: Any, mesh: Mesh) -> Lowered:
    """The training step of an abstract task for a batch of `config.train.batch_size`: that of its
    last phase, in which everything trains.

    Raises:
      ValueError: the batch does not divide over the devices.
    """
    check_batch(mesh, config.train.batch_size)
    check_parts(config.train, parts_of_batch(mesh))
    optimizer, state = abstract_state(task, config)
    rules = config.get("sharding", ())
    shardings = state_shardings(mesh, state, state.params, rules)
    frozen = state_shardings(mesh, task.frozen, rules=rules)
    phase, batch = task.phase(config.train.steps - 1), batch_shapes(task, config.train.batch_size)
    program = step_program(task, optimizer, config, mesh, shardings, frozen, phase)
    with jax.set_mesh(mesh):  # for this alone: its devices may be described, and not there
        traced = program.trace(state, task.frozen, (batch,), np.int32(0))
        lowered = traced.lower()
    return Lowered(lowered, config.train.batch_size, step_flops(traced, optimizer, state))


def lower_sampler(task: Any, config: Any, mesh: Mesh, count: int, steps: int | None) -> Lowered:
    """The program that draws `count` pictures with the model of an abstract diffusion task: with
    the sampler, guidance and, for `steps` None, steps of the config, and all parameters on every
    device, in the type of `config.precision`, as `loading.load` has them."""
    own = task.resolved["sampling"]
    sampling, guidance = Sampling.of(None, own), Guidance.of(None, own["guidance"])
    run = plan(task.model.diffusion, steps or own["steps"], sampling, guidance)
    _, state = abstract_state(task, config)
    params = merge(task.frozen, state.params)
    if (dtype := compute_type(config)) is not None:
        params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)
    params = _placed(params, replicated(mesh))
    index = jax.ShapeDtypeStruct((count,), np.int32)
    inputs, index = _placed(
        (input_shapes(task, task.model.embedders, count), index), batch_sharding(mesh)
    )
    arguments = ((params, ()), seed_bits(0), [inputs], inputs, index, None, None)
    static = dict(latent_shape=task.latent_shape, sampler=sampling.sampler, tile=0, callback=None)
    options = dict(model=task.model, run=run, weak=None, weak_model=None)
    with jax.set_mesh(mesh):
        traced = generate.trace(*arguments, **options, **static)
        return Lowered(traced.lower(), count, jaxpr_flops(traced.jaxpr))


def _placed(shapes: Any, sharding: Any) -> Any:
    """Shapes with a sharding."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes
    )
