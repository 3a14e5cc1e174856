"""The loop: `train(config, workdir)` runs any task from its newest checkpoint to its last step."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import logging
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from tqdm import tqdm

from ldm_jax.interop.native import save_model
from ldm_jax.pictures import save_png
from ldm_jax.runtime.checkpoints import Checkpoints, abstract_like
from ldm_jax.runtime.logging import Clock, MetricsLog
from ldm_jax.runtime.mesh import (
    check_batch,
    make_mesh,
    one_each,
    parts_of_batch,
    put,
    put_batch,
    state_shardings,
    to_host,
)
from ldm_jax.runtime.meters import memory_in_use, rates
from ldm_jax.runtime.processes import Together, gather, is_first, together
from ldm_jax.training.accumulation import check_parts
from ldm_jax.training.damage import find_damage, stop_if_damaged, stop_if_not_finite
from ldm_jax.training.ema import more_averages
from ldm_jax.training.evaluators import HELD_OUT, DrawnEvaluator, Evaluator, due, make_evaluators
from ldm_jax.training.optimizer import make_optimizer
from ldm_jax.training.program import STOP, step_flops, step_program
from ldm_jax.training.report import write_report
from ldm_jax.training.signals import (
    Interrupted,
    StopRequest,
    in_thread,
    signal_name,
    signal_number,
    stop_on_signals,
)
from ldm_jax.training.snapshots import exported, write_snapshot
from ldm_jax.training.state import Params, State, Task, init_state
from ldm_jax.training.tasks import make_task
from ldm_jax.training.workdir import (
    check_config,
    check_processes,
    check_shared,
    config_dict,
    locked,
    write_config,
)
from ldm_jax.version import __version__

log = logging.getLogger(__name__)

UNDER_WAY = 2  # steps in flight: enough to keep the device busy, few enough to stop soon


def train(
    config: Any,
    workdir: str | Path,
    dry_run: bool = False,
    drawn: Mapping[str, DrawnEvaluator] | None = None,
) -> dict[str, float]:
    """Trains `config` in `workdir`, resuming the run there, and returns the final metrics.

    Writes there: `config.json`, `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `previews/`,
    `report.html`, `model.safetensors`, which `ldm_jax.load` opens, and `first_batch.png` if the
    task draws one. A workdir belongs to a config from the first step on, not before. With several
    processes (`jax.distributed`), each calls this; process 0 writes, and a signal to one of them
    stops all at the same step.

    Args:
      config: see `configs/`.
      workdir: a directory, made if missing; "~" is expanded.
      dry_run: open the data, log their summary, draw `first_batch.png`, and stop before anything
        is compiled.
      drawn: the evaluators that draw pictures, see `ldm_jax.drawn_evaluators`.

    Returns:
      The metrics on the held-out data; {} without these, if they are off, or in a dry run.

    Raises:
      ValueError: the workdir belongs to another config, is in use or has no whole checkpoint, or a
        setting is not allowed.
      FloatingPointError: a loss, gradient, parameter or average is not finite; names the first bad
        tensor and the step.
      OSError: a checkpoint cannot be written; the message names the path. ConnectionError, a kind
        of it: another process has ended.
      Interrupted: a SystemExit, after SIGINT or SIGTERM; `str` says which step is saved.
    """
    try:
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(stop_on_signals())
            with together(lambda: stop.saved) as processes:
                path = Path(workdir).expanduser()
                return _train(config, path, dry_run, drawn or {}, stack, stop, processes)
    except Interrupted as stopped:
        _tell("%s", stopped)
        raise


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


def _train(
    config: Any,
    workdir: Path,
    dry_run: bool,
    drawn: Mapping[str, DrawnEvaluator],
    stack: contextlib.ExitStack,
    stop: StopRequest,
    processes: Together,
) -> dict[str, float]:
    began, settings = time.perf_counter(), config.train
    stack.enter_context(locked(workdir))
    check_processes(config_dict(config))
    mesh = make_mesh(config.mesh)
    check_batch(mesh, settings.batch_size)
    check_parts(settings, parts_of_batch(mesh))
    check_shared(workdir)
    checkpoints = stack.enter_context(
        contextlib.closing(Checkpoints(workdir / "checkpoints", settings.keep))
    )
    check_config(workdir, config_dict(config), checkpoints)
    newest = checkpoints.latest()
    if newest is not None:
        stop.is_saved(newest, workdir)
    task = _open_task(config, workdir)
    stack.enter_context(jax.set_mesh(mesh))
    networks = tuple(jax.eval_shape(task.init, jax.random.key(0), task.loaded))
    optimizer = make_optimizer(config.optimizer, settings.steps, networks)

    def initial(loaded):
        return init_state(task, optimizer, config.seed, loaded, more_averages(settings))

    abstract = jax.eval_shape(initial, task.loaded)
    rules = config.get("sharding", ())
    shardings = state_shardings(mesh, abstract, abstract.params, rules)
    frozen = put(task.frozen, state_shardings(mesh, task.frozen, rules=rules))
    if frozen:
        task = dataclasses.replace(task, frozen=frozen)
    evaluators = _compute(mesh, make_evaluators, config, task, drawn)
    parts = config, workdir, task, optimizer, mesh, abstract, shardings, frozen
    run = Run(*parts, checkpoints, stop, evaluators)

    # State: the newest complete checkpoint's or a fresh one, created in its final sharding.
    start, state = (newest or 0), None
    if newest is not None and not dry_run:
        wanted = abstract_like(abstract, shardings)
        start, state = _compute(mesh, checkpoints.restore_newest, wanted, find_damage)
        log.info("Resuming %s at step %d", workdir, start)
        stop.is_saved(start, workdir)
    batches = None
    if is_first() and (start < settings.steps or dry_run):
        _compute(mesh, _show_data, task, workdir, start)
    if dry_run:
        return {}
    if start < settings.steps:
        batches = task.batches(start)
        first = _compute(mesh, next, batches)
        stack.callback(getattr(batches, "close", lambda: None))
        batches = itertools.chain([first], batches)
    if state is None:
        state = _compute(mesh, jax.jit(initial, out_shardings=shardings), task.loaded)
    _describe(state, frozen, settings)

    metrics = None
    if start < settings.steps:
        step, state, metrics = _train_steps(run, start, state, batches, began)
    else:
        step = start
        write_config(workdir, config_dict(config))
    stop.release()  # the state is saved; while the model is exported, signals act as usual
    stop_if_damaged(state, step, checkpoints)
    for name, average in exported(state.ema, state.averages, settings).items():
        about, params = task.export(average)
        params = to_host(params)
        if is_first():
            save_model(workdir / f"{name}.safetensors", about, params)
    if (adapters := getattr(task, "adapters", None)) is not None:
        factors = to_host(state.ema)
        if is_first():
            adapters.write(workdir / adapters.file, factors, task.resolved)
    if is_first():
        log.info("Report: %s", write_report(workdir))
    if step == settings.steps and metrics is None:
        own = next((e for e in evaluators if e.kind == HELD_OUT), None)
        metrics = own(state.ema, step) if own else {}
    gather()
    processes.close()
    if step < settings.steps:
        raise Interrupted(f"Stopped by {stop.agreed}; step {step} is saved in {workdir}")
    return metrics


def _open_task(config: Any, workdir: Path) -> Task:
    """The task. Process 0 is the first to look through the data, and the others use its index."""
    if not is_first():
        in_thread(gather)
    task = in_thread(lambda: make_task(config, workdir / "pictures.json"))
    if is_first():
        in_thread(gather)
    return task


def _train_steps(
    run: Run, start: int, state: State, batches: Iterator, began: float
) -> tuple[int, State, dict[str, float] | None]:
    """Trains from step `start` to the last one or to a signal, and saves the state.

    `began` is the start time of the run. Returns the step, its state, and the held-out metrics if
    they were measured at this step.
    """
    task, stop, checkpoints, workdir = run.task, run.stop, run.checkpoints, run.workdir
    settings, seed, mesh = run.config.train, run.config.seed, run.mesh
    several = jax.process_count() > 1
    about = {"config": config_dict(run.config), "version": __version__}
    batches = (put_batch(mesh, batch) for _, batch in batches)
    batch = next(batches)
    program = (task.phase(start), _shapes(batch))
    programs = {program: _compute(mesh, _compile_step, run, program[0], batch)}

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
        step, held_out, pending, under_way, clock = start, None, [], collections.deque(), Clock()
        stop.training = True

        def finish(left: int = 0):
            """Waits until at most `left` steps are in flight, and counts the finished ones."""
            while len(under_way) > left:
                number, loss, asked = under_way.popleft()
                _wait(loss)
                if asked is not None:
                    stop.agreed = stop.agreed or signal_name(int(asked))
                progress.update()
                if number == start:
                    log.info("First step done %.1f s after the start", time.perf_counter() - began)

        while step < settings.steps:
            if (program := (task.phase(step), _shapes(batch))) not in programs:
                finish()
                with clock.paused():
                    programs[program] = _compute(mesh, _compile_step, run, program[0], batch)
            compiled, flops = programs[program]
            asked = (one_each(mesh, signal_number(stop.requested)),) if several else ()
            state, metrics = compiled(state, run.frozen, batch, np.int32(step), *asked)
            under_way.append((step, metrics["loss"], metrics.pop(STOP, None)))
            pending.append(metrics)
            step += 1
            last = step == settings.steps
            if not last:
                with clock.waiting():
                    batch = next(batches)
            finish(UNDER_WAY - 1)
            if not several:
                stop.agreed = stop.requested
            if stop.agreed and not stop.requested:
                _tell("%s to another process: stopping after this step", stop.agreed)

            if due(settings.log_every, step) or last:
                finish()
                checkpoints.check()
                values = _mean(pending)
                stop_if_not_finite(task, state, step, seed, checkpoints)
                speed = clock.report(len(pending) * settings.batch_size)
                speed["data_wait"] = max(map(float, gather(str(speed["data_wait"]))))
                seconds = settings.batch_size / speed["images_per_second"]
                values |= rates(flops, seconds, jax.devices()) | memory_in_use(jax.local_devices())
                if metrics_log:
                    metrics_log.write(step, "train", values | speed)
                progress.set_postfix_str(
                    f"loss {values['loss']:.4g}, {speed['images_per_second']:.0f} images/s, "
                    f"data_wait {speed['data_wait']:.0%}"
                )
                pending = []
            if due(settings.preview_every, step) or last:
                finish()
                with clock.paused():
                    picture = _compute(mesh, task.preview, state.ema)
                    if is_first():
                        save_png(workdir / "previews" / f"{step:07d}.png", picture)
            for evaluator in (each for each in run.evaluators if each.due(step, last)):
                finish()
                with clock.paused():
                    values = _compute(mesh, evaluator, state.ema, step)
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


def _compile_step(run: Run, phase: Hashable, batch: dict[str, jax.Array]) -> tuple[Callable, float]:
    """The training step of a phase, compiled ahead of time for the shapes of `batch`, and its
    model's FLOPs."""
    began = time.perf_counter()
    still = jax.tree.map(lambda leaf: leaf.sharding, run.frozen)
    asked = (one_each(run.mesh, 0),) if jax.process_count() > 1 else ()
    train_step = step_program(
        run.task, run.optimizer, run.config, run.mesh, run.shardings, still, phase, bool(asked)
    )
    traced = train_step.trace(run.abstract, run.frozen, batch, np.int32(0), *asked)
    flops, program = step_flops(traced, run.optimizer, run.abstract), traced.lower().compile()
    log.info("Compiled the training step in %.1f s", time.perf_counter() - began)
    return program, flops


def _shapes(batch: dict[str, Any]) -> tuple[tuple[int, ...], ...]:
    """The shapes of a batch's arrays, in their order. Text states that are kept hold several."""
    return tuple(array.shape for array in jax.tree.leaves(batch))


def _compute(mesh: Mesh, function: Callable, *args: Any) -> Any:
    """`function(*args)`, which may compile, so that signals are handled meanwhile."""

    def on_mesh():
        with jax.set_mesh(mesh):  # a thread does not inherit it
            return function(*args)

    return in_thread(on_mesh)


def _tell(message: str, *arguments: Any) -> None:
    """Logs a message that every process shows."""
    log.log(logging.INFO if is_first() else logging.WARNING, message, *arguments)


def _wait(array: jax.Array) -> None:
    """Waits until `array` is computed. `block_until_ready` would delay signals."""
    pause = 1e-4
    while not array.is_ready():
        time.sleep(pause)
        pause = min(2 * pause, 0.02)


def _show_data(task: Task, workdir: Path, start: int) -> None:
    """Logs a summary of the data and writes the first batch."""
    task.summary()
    save_png(workdir / "first_batch.png", task.first_batch_picture(start))


def _describe(state: State, frozen: Params, settings: Any) -> None:
    """Logs the number of parameters that train and that do not, by network."""
    for what, networks in (("trains", state.params), ("frozen", frozen)):
        for name, params in networks.items():
            count = sum(leaf.size for leaf in jax.tree.leaves(params))
            log.info("%s: %.2f M parameters, %s", name, count / 1e6, what)
    log.info("%d steps of %d images", settings.steps, settings.batch_size)


def _mean(metrics: list[dict[str, jax.Array]]) -> dict[str, float]:
    """Mean of every metric over the steps that reported it."""
    values: dict[str, list] = {}
    for step_metrics in jax.device_get(metrics):
        for name, value in step_metrics.items():
            values.setdefault(name, []).append(value)
    return {name: float(np.mean(value)) for name, value in values.items()}
