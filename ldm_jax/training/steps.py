"""The steps of a run, and what is done between them: metrics, previews, evaluation, checkpoints."""

import collections
import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from tqdm import tqdm

from ldm_jax.pictures import save_png
from ldm_jax.runtime.checkpoints import Checkpoints
from ldm_jax.runtime.logging import Clock, MetricsLog
from ldm_jax.runtime.mesh import one_each, put_batch
from ldm_jax.runtime.meters import memory_in_use, rates
from ldm_jax.runtime.processes import gather, is_first
from ldm_jax.training.damage import stop_if_damaged, stop_if_not_finite
from ldm_jax.training.evaluators import HELD_OUT, Evaluator, due
from ldm_jax.training.program import STOP, step_flops, step_program
from ldm_jax.training.signals import StopRequest, in_thread, signal_name, signal_number
from ldm_jax.training.snapshots import write_snapshot
from ldm_jax.training.state import Params, State, Task
from ldm_jax.training.workdir import config_dict, write_config
from ldm_jax.version import __version__

log = logging.getLogger(__name__)

UNDER_WAY = 2  # calls in flight: enough to keep the device busy, few enough to stop soon


@dataclasses.dataclass(frozen=True)
class Run:
    """The constants of a run."""

    config: Any
    workdir: Path
    task: Task
    optimizer: optax.GradientTransformation
    mesh: Mesh
    abstract: State
    shardings: State
    frozen: Params
    checkpoints: Checkpoints
    stop: StopRequest
    evaluators: tuple[Evaluator, ...]


def train_steps(
    run: Run, start: int, state: State, batches: Iterator, began: float
) -> tuple[int, State, dict[str, float] | None]:
    """Trains from step `start` to the last one or to a signal, and saves the state.

    A call of the compiled program makes up to `train.steps_per_call` steps.

    `began` is the start time of the run. Returns the step, its state, and the held-out metrics if
    they were measured at this step.
    """
    task, stop, checkpoints, workdir = run.task, run.stop, run.checkpoints, run.workdir
    settings, seed, mesh = run.config.train, run.config.seed, run.mesh
    several = jax.process_count() > 1
    about = {"config": config_dict(run.config), "version": __version__}
    calls = _Calls(run, (put_batch(mesh, batch) for _, batch in batches))
    call = calls.of(start)
    programs = {call.program: compute(mesh, _compile_steps, run, call)}

    with contextlib.ExitStack() as stack:
        write_config(workdir, about["config"])
        writing = contextlib.nullcontext()
        if is_first():
            writing = contextlib.closing(MetricsLog(workdir, start))
        metrics_log = stack.enter_context(writing)
        quiet = {} if is_first() else {"disable": True}
        progress = stack.enter_context(
            tqdm(total=settings.steps, initial=start, unit="step", dynamic_ncols=True, **quiet)
        )
        step, held_out, pending, trained = start, None, [], 0
        under_way, clock = collections.deque(), Clock()
        stop.training = True

        def finish(left: int = 0):
            """Waits until at most `left` calls are in flight, and counts the finished steps."""
            while len(under_way) > left:
                number, count, loss, asked = under_way.popleft()
                _wait(loss)
                if asked is not None:
                    stop.agreed = stop.agreed or signal_name(int(asked))
                progress.update(count)
                if number == start:
                    log.info("First step done %.1f s after the start", time.perf_counter() - began)

        while step < settings.steps:
            if call.program not in programs:
                finish()
                with clock.paused():
                    programs[call.program] = compute(mesh, _compile_steps, run, call)
            compiled, flops = programs[call.program]
            asked = (one_each(mesh, signal_number(stop.requested)),) if several else ()
            state, metrics = compiled(state, run.frozen, call.batches, np.int32(step), *asked)
            count, told = len(call.batches), metrics.pop(STOP, None)
            under_way.append((step, count, metrics["loss"], told))
            pending.append(metrics)
            trained += count
            step += count
            last = step == settings.steps
            if not last:
                with clock.waiting():
                    call = calls.of(step)
            finish(UNDER_WAY - 1)
            if not several:
                stop.agreed = stop.requested
            if stop.agreed and not stop.requested:
                tell("%s to another process: stopping after this step", stop.agreed)

            if due(settings.log_every, step) or last:
                finish()
                checkpoints.check()
                values = _mean(pending)
                stop_if_not_finite(task, state, step, seed, checkpoints)
                speed = clock.report(trained * settings.batch_size)
                speed["data_wait"] = max(map(float, gather(str(speed["data_wait"]))))
                seconds = settings.batch_size / speed["images_per_second"]
                values |= rates(flops, seconds, jax.devices()) | memory_in_use(jax.local_devices())
                if metrics_log:
                    metrics_log.write(step, "train", values | speed)
                progress.set_postfix_str(
                    f"loss {values['loss']:.4g}, {speed['images_per_second']:.0f} images/s, "
                    f"data_wait {speed['data_wait']:.0%}"
                )
                pending, trained = [], 0
            if due(settings.preview_every, step) or last:
                finish()
                with clock.paused():
                    picture = compute(mesh, task.preview, state.ema)
                    if is_first():
                        save_png(workdir / "previews" / f"{step:07d}.png", picture)
            for evaluator in (each for each in run.evaluators if each.due(step, last)):
                finish()
                with clock.paused():
                    values = compute(mesh, evaluator, state.ema, step)
                if values and metrics_log:
                    metrics_log.write(step, evaluator.kind, values)
                held_out = values if evaluator.kind == HELD_OUT else held_out
            if due(settings.checkpoint_every, step) or last or stop.agreed:
                finish()
                with clock.paused():
                    stop_if_not_finite(task, state, step, seed, checkpoints)
                    stop_if_damaged(state, step, checkpoints)
                    saved = functools.partial(stop.is_saved, step, workdir)
                    checkpoints.save(step, state, about, saved, wait=bool(last or stop.agreed))
                    write_snapshot(workdir, step, state.averages)
            if stop.agreed:
                break
    return step, state, held_out


@dataclasses.dataclass(frozen=True)
class _Call:
    """What one call of a program trains on, batches of the same shapes, in a phase of the task."""

    phase: Hashable
    batches: tuple[dict[str, jax.Array], ...]

    @property
    def program(self) -> Hashable:
        """Calls of equal `program` run the same one."""
        return self.phase, len(self.batches), _shapes(self.batches[0])


class _Calls:
    """Batches, grouped into calls."""

    def __init__(self, run: Run, batches: Iterator):
        settings = run.config.train
        self._task, self._batches, self._spare = run.task, batches, []
        self._most, self._steps = settings.get("steps_per_call", 1), settings.steps
        intervals = (settings.log_every, settings.preview_every, settings.checkpoint_every)
        self._intervals = (*intervals, *(evaluator.every for evaluator in run.evaluators))

    def of(self, step: int) -> _Call:
        """The call after `step` steps: it ends where something else is due, at the last step, and
        before another phase or shape."""
        ends = [self._steps - step, *(n - step % n for n in self._intervals if n > 0)]
        phase, most = self._task.phase(step), min(self._most, *ends)
        taken = [self._next()]
        while len(taken) < most and self._task.phase(step + len(taken)) == phase:
            batch = self._next()
            if _shapes(batch) != _shapes(taken[0]):
                self._spare.append(batch)
                break
            taken.append(batch)
        return _Call(phase, tuple(taken))

    def _next(self) -> dict[str, jax.Array]:
        return self._spare.pop() if self._spare else next(self._batches)


def _compile_steps(run: Run, call: _Call) -> tuple[Callable, float]:
    """The program of a call, compiled ahead of time, and its model's FLOPs in one step."""
    began = time.perf_counter()
    still = jax.tree.map(lambda leaf: leaf.sharding, run.frozen)
    asked = (one_each(run.mesh, 0),) if jax.process_count() > 1 else ()
    parts = run.task, run.optimizer, run.config, run.mesh, run.shardings, still
    program = step_program(*parts, call.phase, bool(asked))
    traced = program.trace(run.abstract, run.frozen, call.batches, np.int32(0), *asked)
    flops = step_flops(traced, run.optimizer, run.abstract, len(call.batches))
    compiled = traced.lower().compile()
    log.info("Compiled the training step in %.1f s", time.perf_counter() - began)
    return compiled, flops


def _shapes(batch: dict[str, Any]) -> tuple[tuple[int, ...], ...]:
    """The shapes of a batch's arrays, in their order. Text states that are kept hold several."""
    return tuple(array.shape for array in jax.tree.leaves(batch))


def compute(mesh: Mesh, function: Callable, *args: Any) -> Any:
    """`function(*args)`, which may compile, so that signals are handled meanwhile."""

    def on_mesh():
        with jax.set_mesh(mesh):  # a thread does not inherit it
            return function(*args)

    return in_thread(on_mesh)


def tell(message: str, *arguments: Any) -> None:
    """Logs a message that every process shows."""
    log.log(logging.INFO if is_first() else logging.WARNING, message, *arguments)


def _wait(array: jax.Array) -> None:
    """Waits until `array` is computed. `block_until_ready` would delay signals."""
    pause = 1e-4
    while not array.is_ready():
        time.sleep(pause)
        pause = min(2 * pause, 0.02)


def _mean(metrics: list[dict[str, jax.Array]]) -> dict[str, float]:
    """Mean of every metric over the steps that reported it."""
    values: dict[str, list] = {}
    for step_metrics in jax.device_get(metrics):
        for name, value in step_metrics.items():
            values.setdefault(name, []).extend(np.ravel(value))
    return {name: float(np.mean(value)) for name, value in values.items()}
