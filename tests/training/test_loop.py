"""The loop on a model of four parameters: resuming, damage, and the numbers it reports."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.runtime.logging import read_metrics
from ldm_jax.training import loop
from ldm_jax.training import steps as training_steps
from ldm_jax.training.loop import train
from tests.training.least_squares import Crash, Task, a_config, model, reports, steps


def test_a_run_that_dies_ends_where_an_uninterrupted_one_does(use, whole, tmp_path):
    def die(step):
        if step == 17:
            raise Crash

    use(Task()).before = die
    with pytest.raises(Crash):
        train(steps(30), tmp_path)
    use(Task())
    train(steps(30), tmp_path)
    assert model(tmp_path) == model(whole[0])
    assert reports(tmp_path) == reports(whole[0])


# Damage


def damage_all(checkpoint):
    for path in checkpoint.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(use, whole, resumable, caplog):
    damage_all(resumable / "checkpoints" / "20")
    train(steps(30), resumable)
    assert "The checkpoint of step 20 is damaged" in caplog.text
    assert "Resuming from step 10: 10 steps are lost" in caplog.text
    assert (resumable / "checkpoints" / "20.damaged").exists()
    assert (resumable / "checkpoints" / "20").exists(), "step 20 is saved again"
    assert model(resumable) == model(whole[0])
    assert reports(resumable) == reports(whole[0])


def test_a_run_of_damaged_checkpoints_does_not_start_afresh(use, resumable):
    for step in ("10", "20"):
        damage_all(resumable / "checkpoints" / step)
    with pytest.raises(ValueError, match="no checkpoint under .* is whole .step 20: .*; step 10"):
        train(steps(30), resumable)
    assert (resumable / "checkpoints" / "20").exists(), "nothing is moved where nothing is whole"


@pytest.mark.parametrize("part", ["ema", "params"])
def test_values_that_are_not_finite_are_damage(use, whole, resumable, caplog, part, monkeypatch):
    """Older versions left no sums, and a number may go wrong before it is written."""

    def damage(state):
        bad = {"net": {**state.ema["net"], "w": state.ema["net"]["w"] * jnp.nan}}
        return state.replace(**{part: bad})

    with monkeypatch.context() as patch:
        for module in (loop, training_steps):
            patch.setattr(module, "stop_if_damaged", lambda *arguments: None)
        write = loop.Checkpoints._write
        damaged = lambda c, n, state, a: write(c, n, damage(state), a)  # noqa: E731
        patch.setattr(loop.Checkpoints, "_write", damaged)
        train(steps(25), resumable)
    train(steps(30), resumable)
    name = "average" if part == "ema" else "parameters"
    assert f"step 25 is damaged ({name}/net/w is not finite (1 tensors are not))" in caplog.text
    assert model(resumable) == model(whole[0])


def test_an_average_that_is_not_finite_is_neither_saved_nor_exported(use, tmp_path):
    config = steps(30, **{"train.ema_decay": float("nan")})
    message = r"step 10: average/net/b is not finite \(2 tensors are not\); no checkpoint was saved"
    with pytest.raises(FloatingPointError, match=message):
        train(config, tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())
    assert not (tmp_path / "model.safetensors").exists()


def test_another_architecture_lists_the_leaves(use, resumable):
    class Wider(Task):
        def init(self, key, loaded):
            return {"net": {"w": jnp.zeros((4,)), "b": jnp.zeros(())}}

    use(Wider())
    with pytest.raises(ValueError, match=r"params/net/w: \(3,\) there, \(4,\) now") as error:
        train(steps(30), resumable)
    assert "step 20" in str(error.value) and "ema/net/w" in str(error.value)
    assert (resumable / "checkpoints" / "20").exists()


# The workdir


@pytest.mark.parametrize("fault", [ValueError("a typing error"), Crash()])
def test_a_command_that_fails_in_start_up_claims_nothing(use, tmp_path, fault, monkeypatch):
    def fail(*_):
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_task", fail)
        with pytest.raises(type(fault)):
            train(steps(10, seed=5), tmp_path)
    assert not (tmp_path / "config.json").exists()
    train(steps(10, seed=6), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 6


def test_a_config_without_a_checkpoint_is_replaced(use, tmp_path, caplog):
    def die(step):
        if step == 4:
            raise Crash

    use(Task()).before = die
    with pytest.raises(Crash):
        train(steps(10, seed=5), tmp_path)
    use(Task())
    train(steps(10, seed=6), tmp_path)
    assert "Nothing was trained" in caplog.text
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 6
    with pytest.raises(ValueError, match="seed: 6 there, 7 now"):
        train(steps(10, seed=7), tmp_path)


def test_the_tilde_is_the_home_directory(use, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    train(steps(1), "~/run")
    assert (tmp_path / "run" / "model.safetensors").exists()


# Numbers


def test_the_bar_counts_finished_steps(use, tmp_path, monkeypatch):
    """Twenty steps that take long: a bar of dispatched ones would be full at once."""
    times, ahead = [], []

    class Bar(training_steps.tqdm):
        def update(self, n=1):
            times.append(time.perf_counter())

    class Slow(Task):
        def gradients(self, params, frozen, batch, key, phase):
            grads, metrics = super().gradients(params, frozen, batch, key, phase)
            slow = jax.lax.fori_loop(0, 300, lambda _, x: jnp.sin(x @ x), jnp.eye(128))
            return grads, {"loss": metrics["loss"] + 0.0 * slow[0, 0]}

        def before(self, step):
            ahead.append(step - len(times))

    use(Slow())
    monkeypatch.setattr(training_steps, "tqdm", Bar)
    train(steps(20, **{"train.log_every": 20, "train.preview_every": 20}), tmp_path)
    assert len(times) == 20
    assert max(ahead) <= 2
    assert times[9] - times[0] > 0.25 * (times[19] - times[0])


def test_speed_leaves_out_pauses_and_data_wait_is_a_share(use, tmp_path):
    class Pausing(Task):
        def preview(self, ema):
            time.sleep(0.3)
            return super().preview(ema)

        def before(self, step):
            if step > 5:
                time.sleep(0.05)

    use(Pausing())
    train(steps(10, **{"train.preview_every": 1}), tmp_path)
    first, second = [line for line in read_metrics(tmp_path) if line["kind"] == "train"]
    assert first["images_per_second"] > 2 * 8 / 0.3
    assert first["data_wait"] < 0.5 < second["data_wait"] <= 1


def test_time_to_the_first_step_is_told_once(use, tmp_path, caplog):
    train(steps(10), tmp_path)
    assert caplog.text.count("First step done") == 1


# Nothing to train, nothing held out, nothing to do


@pytest.fixture
def no_compiling(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("the training step was compiled")

    return lambda: monkeypatch.setattr(training_steps, "_compile_steps", refuse)


def test_a_finished_run_is_exported_without_compiling(use, resumable, no_compiling):
    (resumable / "model.safetensors").unlink()
    no_compiling()
    assert train(steps(20), resumable) == {"loss": 1.0}
    assert (resumable / "model.safetensors").exists()


def test_no_steps_export_what_there_is(use, tmp_path, no_compiling):
    no_compiling()
    assert train(steps(0), tmp_path) == {"loss": 1.0}
    fresh = loop.init_state(Task(), loop.make_optimizer(a_config().optimizer, 1, ("net",)), 0, {})
    assert model(tmp_path)["net/w"] == fresh.params["net"]["w"].tolist()
    assert (tmp_path / "report.html").exists()


def test_without_held_out_data_nothing_is_reported(use, tmp_path):
    use(Task()).held_out = {}
    assert train(steps(10, **{"train.preview_every": 2}), tmp_path) == {}
    assert not reports(tmp_path, "held_out")


class Describing(Task):
    def __init__(self):
        self.told = []

    def summary(self):
        self.told.append("summary")

    def first_batch_picture(self, start):
        self.told.append(start)
        return np.full((4, 4, 3), 7, np.uint8)


def test_a_dry_run_shows_the_data_and_leaves_the_workdir_free(use, tmp_path, no_compiling):
    no_compiling()
    task = use(Describing())
    assert train(steps(10), tmp_path, dry_run=True) == {}
    assert task.told == ["summary", 0]
    assert (tmp_path / "first_batch.png").exists()
    assert not (tmp_path / "config.json").exists() and not (tmp_path / "metrics.jsonl").exists()


def test_a_dry_run_leaves_a_run_as_it_is(use, resumable):
    before = {p: p.read_bytes() for p in resumable.rglob("*") if p.is_file() and p.name != ".lock"}
    train(steps(30), resumable, dry_run=True)
    assert before == {p: p.read_bytes() for p in before}


def test_a_run_shows_its_data_before_it_compiles(use, tmp_path, monkeypatch):
    task = use(Describing())
    compile_steps = training_steps._compile_steps

    def compile_after(*arguments):
        assert len(task.told) == 2
        return compile_steps(*arguments)

    monkeypatch.setattr(training_steps, "_compile_steps", compile_after)
    train(steps(2), tmp_path)
    assert (tmp_path / "first_batch.png").exists()


@pytest.mark.parametrize("never", [0, -1])
def test_intervals_of_nothing_are_at_the_end_alone(use, whole, tmp_path, never):
    use(Task())
    config = steps(30)
    config.train.update(log_every=never, checkpoint_every=never, preview_every=never)
    train(config, tmp_path)
    assert model(tmp_path) == model(whole[0])
    assert [m["step"] for m in read_metrics(tmp_path)] == [30] * len(read_metrics(tmp_path))
    kept = [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
    assert kept == ["30"]
    assert [path.name for path in (tmp_path / "previews").iterdir()] == ["0000030.png"]
