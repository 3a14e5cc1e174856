"""A step that is not finite changes nothing, the step number included."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.training.damage import stop_if_not_finite
from ldm_jax.training.state import init_state, make_train_step


class Task:
    """Descends mean(w·x)²; the batch of step 3 holds a NaN."""

    ema_networks, frozen, loaded = ("net",), {}, {}

    def init(self, key, loaded):
        return {"net": {"w": jax.random.normal(key, (3,))}}

    def phase(self, step):
        return None

    def gradients(self, params, frozen, batch, key, phase):
        loss, grads = jax.value_and_grad(
            lambda p: jnp.mean(jnp.square(batch["x"] @ p["net"]["w"] - 1.0))
        )(params)
        return grads, {"loss": loss}

    def batches(self, start):
        step = start
        while True:
            x = np.random.default_rng(step).normal(size=(4, 3)).astype(np.float32)
            if step == 3:
                x[2, 1] = np.nan
            yield step, {"x": x}
            step += 1


class Kept:
    directory = "runs/x/checkpoints"

    @staticmethod
    def latest():
        return 2


@pytest.fixture(scope="module")
def after_five():
    task, optimizer = Task(), optax.adam(0.1)
    step_function = jax.jit(make_train_step(task, optimizer, 0, 0.9, None))
    state, states = init_state(task, optimizer, 0, {}), []
    for step, batch in task.batches(0):
        if step == 5:
            return task, states
        state, _ = step_function(state, {}, batch, step)
        states.append(state)


def test_state_freezes_before_the_bad_step(after_five):
    _, states = after_five
    assert [int(state.step) for state in states] == [1, 2, 3, 3, 3]
    for a, b in zip(jax.tree.leaves(states[2]), jax.tree.leaves(states[4]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_message_names_step_tensor_and_checkpoint(after_five):
    task, states = after_five
    with pytest.raises(FloatingPointError, match="step 3: batch/x is not finite") as error:
        stop_if_not_finite(task, states[4], 5, 0, Kept)
    assert "step 2 is the last good one in runs/x/checkpoints" in str(error.value)


def test_a_finite_state_passes(after_five):
    task, states = after_five
    stop_if_not_finite(task, states[2], 3, 0, Kept)
