"""Values that are not finite: the run stops, and names the first bad tensor."""

from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.runtime.checkpoints import Checkpoints
from ldm_jax.runtime.mesh import put_batch
from ldm_jax.training.optimizer import parameter_path
from ldm_jax.training.state import State, Task


def stop_if_not_finite(
    task: Task, state: State, step: int, seed: int, checkpoints: Checkpoints
) -> None:
    """Raises if the state froze before `step`: see `make_train_step`.

    A step is a pure function of the state and its number, so the bad step is run again to find the
    first tensor that is not finite.
    """
    bad = int(state.step)
    if bad == step:
        return
    key = jax.random.fold_in(jax.random.key(seed), bad)
    mesh, (_, batch) = jax.sharding.get_mesh(), next(task.batches(bad))
    batch = batch if mesh.empty else put_batch(mesh, batch)
    grads, metrics = jax.jit(task.gradients, static_argnums=4)(
        state.params, task.frozen, batch, key, task.phase(bad)
    )
    suspects = {"batch": batch, "parameters": state.params, "metrics": metrics, "gradient": grads}
    names = _not_finite(suspects)
    raise FloatingPointError(
        f"step {bad}: {names[0] if names else 'the gradient norm'} is not finite "
        f"({len(names)} tensors are not); {_last_good(checkpoints)}"
    )


def _last_good(checkpoints: Checkpoints) -> str:
    """The end of a message on values that are not finite: the last good checkpoint."""
    saved = checkpoints.latest()
    kept = "no checkpoint was saved yet" if saved is None else f"step {saved} is the last good one"
    return (
        f"{kept} in {checkpoints.directory}. A lower optimizer.lr, a longer optimizer.warmup or "
        "optimizer.clip usually cures it."
    )


@jax.jit
def _finite(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), tree)


def _not_finite(tree: Any) -> list[str]:
    """The paths of the tensors that are not finite."""
    flags = jax.tree_util.tree_leaves_with_path(jax.device_get(_finite(tree)))
    return [parameter_path(path) for path, good in flags if not good]


def find_damage(state: State) -> str:
    """Names the first parameter or average that is not finite; "" if all are finite."""
    names = _not_finite({"average": state.ema, "parameters": state.params})
    return f"{names[0]} is not finite ({len(names)} tensors are not)" if names else ""


def stop_if_damaged(state: State, step: int, checkpoints: Checkpoints) -> None:
    """Raises if a parameter or average is not finite, before it is saved or exported."""
    damage = find_damage(state)
    if damage:
        raise FloatingPointError(f"step {step}: {damage}; {_last_good(checkpoints)}")
