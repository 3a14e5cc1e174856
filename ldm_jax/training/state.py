"""The state of a training run, the interface of a task, and the training step."""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ldm_jax.training.ema import Constant, Power, move, update_ema

Params = dict[str, Any]
Metrics = dict[str, jax.Array]


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class State:
    """The content of a checkpoint. `params` and `ema` map a network's name to those of its
    parameters that train; `averages` maps the names of further averages to the like of `ema`.

    There are no random keys: the key of a step is `fold_in(key(seed), step)`.
    """

    step: jax.Array
    params: Params
    ema: Params
    opt_state: optax.OptState
    averages: dict[str, Params] = dataclasses.field(default_factory=dict)

    def tree_flatten_with_keys(self) -> tuple[list, None]:
        """The fields, `averages` only if there are some: checkpoints of before have no such key."""
        names = [field.name for field in dataclasses.fields(self)]
        names = names if self.averages else names[:-1]
        return [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names], None

    def replace(self, **fields: Any) -> "State":
        """This state with other `fields`."""
        return dataclasses.replace(self, **fields)

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> "State":
        return cls(*children)


class Task(Protocol):
    """The interface of a task; all but `batches` are pure functions of their arguments.

    Methods that compute or read are called outside of the main thread.
    """

    ema_networks: tuple[str, ...]  # the networks averaged, evaluated and exported
    frozen: Params  # parameters that do not train, by network
    loaded: Params  # initial parameters from a file, by network

    def init(self, key: jax.Array, loaded: Params) -> Params:
        """The parameters that train, by network: `loaded`, and fresh ones for the rest."""

    def phase(self, step: int) -> Hashable:
        """Selects the program of a step; a new value compiles one. Most tasks have only one."""

    def gradients(
        self,
        params: Params,
        frozen: Params,
        batch: dict[str, jax.Array],
        key: jax.Array,
        phase: Hashable,
    ) -> tuple[Params, Metrics]:
        """Gradients for all of `params`, and scalar metrics with at least `loss`."""

    def summary(self) -> None:
        """Logs a summary of the training data."""

    def first_batch_picture(self, start: int) -> np.ndarray:
        """The pictures of batch `start`: uint8 (H, W, 3)."""

    def batches(self, start: int):
        """Iterator of (step, host batch of this process), a function of (seed, step) alone."""

    def evaluate(self, ema: Params) -> dict[str, float]:
        """Metrics on the held-out split; {} if nothing is held out."""

    def preview(self, ema: Params) -> np.ndarray:
        """A preview of the current state: uint8 (H, W, 3)."""

    def export(self, ema: Params) -> tuple[dict[str, Any], dict[str, Any]]:
        """(config of the networks, parameters) of a file that `ldm_jax.load` opens."""


def init_state(
    task: Task,
    optimizer: optax.GradientTransformation,
    seed: int,
    loaded: Params,
    more: tuple[Constant | Power, ...] = (),
) -> State:
    """Step 0. Averages start as copies of the parameters. `loaded` is `task.loaded`; `more` are
    the averages beside the first."""
    params = task.init(jax.random.fold_in(jax.random.key(seed), 0x7FFFFFFF), loaded)

    def copy():
        averaged = {name: params[name] for name in task.ema_networks if name in params}
        return jax.tree.map(jnp.copy, averaged)

    averages = {average.name: copy() for average in more}
    return State(jnp.zeros((), jnp.int32), params, copy(), optimizer.init(params), averages)


def make_train_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    seed: int,
    ema_decay: float,
    phase: Hashable,
    more: tuple[Constant | Power, ...] = (),
) -> Callable[[State, Params, dict[str, jax.Array], jax.Array], tuple[State, Metrics]]:
    """The function (state, frozen, batch, step) → (state, metrics) that the loop compiles.

    `more` are the averages beside that of `ema_decay`.

    A step whose loss or gradients are not finite changes nothing, `state.step` included, and
    neither does any later step, because `step` no longer matches. So the loop may check rarely and
    still finds the last good state and the number of the first bad step.
    """

    def train_step(state, frozen, batch, step):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, metrics = task.gradients(state.params, frozen, batch, key, phase)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        averaged = {name: params[name] for name in state.ema}
        ema = update_ema(state.ema, averaged, state.step, ema_decay)
        averages = {
            average.name: move(state.averages[average.name], averaged, average.weight(state.step))
            for average in more
        }
        new = State(state.step + 1, params, ema, opt_state, averages)
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm) & (state.step == step)
        new = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state)
        return new, metrics | {"grad_norm": grad_norm}

    return train_step
