"""`train.steps_per_call`: as one step a call, whatever the intervals, phases and shapes."""

import jax
import numpy as np
import pytest

from ldm_jax.training import loop
from ldm_jax.training import steps as training_steps
from ldm_jax.training.loop import train
from tests.training.least_squares import Crash, Task, model, reports, steps


def several(count, of, **changes):
    config = steps(count, **changes)
    config.train.steps_per_call = of
    return config


@pytest.fixture
def calls(monkeypatch):
    """The steps of each call that is made."""
    made, of = [], training_steps._Calls.of

    def noted(self, step):
        call = of(self, step)
        made.append((step, len(call.batches)))
        return call

    monkeypatch.setattr(training_steps._Calls, "of", noted)
    return made


@pytest.mark.parametrize("of", [2, 4, 50])
def test_a_run_is_that_of_single_steps(use, whole, tmp_path, calls, of):
    """Metrics, checkpoints and previews are due at 5, 10, 15 …: calls end there."""
    train(several(30, of), tmp_path)
    assert model(tmp_path) == model(whole[0])
    assert reports(tmp_path) == reports(whole[0])
    kept = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert set(kept) == {"20", "30"}
    assert sum(count for _, count in calls) == 30
    assert {count for _, count in calls} == {2: {2, 1}, 4: {4, 1}, 50: {5}}[of]


def test_it_resumes_at_any_step_and_may_change(use, whole, tmp_path):
    """Killed in a call, so that the last checkpoint counts."""

    def die(step):
        if step == 17:
            raise Crash

    use(Task()).before = die
    with pytest.raises(Crash):
        train(several(30, 4), tmp_path)
    use(Task())
    train(several(30, 3), tmp_path)
    assert model(tmp_path) == model(whole[0])
    assert reports(tmp_path) == reports(whole[0])


def test_a_call_is_of_one_phase(use, tmp_path, calls):
    class Phased(Task):
        def phase(self, step):
            return step >= 7

        def gradients(self, params, frozen, batch, key, phase):
            grads, metrics = super().gradients(params, frozen, batch, key, phase)
            grads = jax.tree.map(lambda leaf: leaf * (2.0 if phase else 1.0), grads)
            return grads, metrics | ({"late": metrics["loss"]} if phase else {})

    use(Phased())
    train(steps(20), tmp_path / "one")
    calls.clear()
    train(several(20, 4), tmp_path / "four")
    assert calls == [(0, 4), (4, 1), (5, 2), (7, 3), (10, 4), (14, 1), (15, 4), (19, 1)]
    assert model(tmp_path / "four") == model(tmp_path / "one")
    assert reports(tmp_path / "four") == reports(tmp_path / "one")


def test_a_call_is_of_one_shape(use, tmp_path, calls):
    class Shaped(Task):
        def batches(self, start):
            for step, batch in super().batches(start):
                yield step, {"x": np.repeat(batch["x"], 2 if step % 5 > 2 else 1, axis=0)}

    use(Shaped())
    train(steps(10), tmp_path / "one")
    calls.clear()
    train(several(10, 5), tmp_path / "five")
    assert calls == [(0, 3), (3, 2), (5, 3), (8, 2)]
    assert model(tmp_path / "five") == model(tmp_path / "one")


def test_a_step_that_is_not_finite_is_named(use, tmp_path):
    class Bad(Task):
        def batches(self, start):
            for step, batch in super().batches(start):
                yield step, batch if step != 13 else {"x": batch["x"] * np.nan}

    use(Bad())
    with pytest.raises(FloatingPointError, match="step 13: batch/x is not finite"):
        train(several(30, 5), tmp_path)


def test_the_flops_are_those_of_a_step(use, tmp_path, monkeypatch):
    found, compile_steps = [], training_steps._compile_steps

    def note(run, call):
        compiled, flops = compile_steps(run, call)
        found.append(flops)
        return compiled, flops

    monkeypatch.setattr(training_steps, "_compile_steps", note)
    train(several(10, 4), tmp_path)  # calls of 4 and of 1
    assert len(found) == 2 and found[0] == found[1] > 0


def test_the_speed_is_of_all_steps(use, tmp_path, monkeypatch):
    images, measure = [], training_steps.Clock.report

    def note(clock, count):
        images.append(count)
        return measure(clock, count)

    monkeypatch.setattr(training_steps.Clock, "report", note)
    train(several(30, 4, **{"train.log_every": 10}), tmp_path)
    assert images == [80, 80, 80]


@pytest.mark.parametrize("of", [0, -1])
def test_fewer_than_one_are_refused(use, tmp_path, of):
    with pytest.raises(ValueError, match=f"train.steps_per_call={of}: choose 1 or more"):
        loop.train(several(30, of), tmp_path)
