"""The loop: `train(config, workdir)` runs any task from its newest checkpoint to its last step."""

import contextlib
import dataclasses
import itertools
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from ldm_jax.interop.native import save_model
from ldm_jax.pictures import save_png
from ldm_jax.runtime.checkpoints import Checkpoints, abstract_like
from ldm_jax.runtime.mesh import (
    check_batch,
    make_mesh,
    parts_of_batch,
    put,
    state_shardings,
    to_host,
)
from ldm_jax.runtime.processes import Together, gather, is_first, together
from ldm_jax.training.accumulation import check_parts
from ldm_jax.training.damage import find_damage, stop_if_damaged
from ldm_jax.training.ema import more_averages
from ldm_jax.training.evaluators import HELD_OUT, DrawnEvaluator, make_evaluators
from ldm_jax.training.optimizer import make_optimizer
from ldm_jax.training.report import write_report
from ldm_jax.training.signals import (
    Interrupted,
    StopRequest,
    in_thread,
    stop_on_signals,
)
from ldm_jax.training.snapshots import exported
from ldm_jax.training.state import Params, State, Task, init_state
from ldm_jax.training.steps import Run, compute, tell, train_steps
from ldm_jax.training.tasks import make_task
from ldm_jax.training.workdir import (
    check_config,
    check_processes,
    check_shared,
    config_dict,
    locked,
    write_config,
)

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
        tell("%s", stopped)
        raise


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
    if (most := settings.get("steps_per_call", 1)) < 1:
        raise ValueError(f"train.steps_per_call={most}: choose 1 or more")
    if most > 1 and jax.default_backend() == "cpu":
        log.warning("train.steps_per_call=%d: on a CPU, XLA's loops are slower than calls", most)
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
    evaluators = compute(mesh, make_evaluators, config, task, drawn)
    parts = config, workdir, task, optimizer, mesh, abstract, shardings, frozen
    run = Run(*parts, checkpoints, stop, evaluators)

    # State: the newest complete checkpoint's or a fresh one, created in its final sharding.
    start, state = (newest or 0), None
    if newest is not None and not dry_run:
        wanted = abstract_like(abstract, shardings)
        start, state = compute(mesh, checkpoints.restore_newest, wanted, find_damage)
        log.info("Resuming %s at step %d", workdir, start)
        stop.is_saved(start, workdir)
    batches = None
    if is_first() and (start < settings.steps or dry_run):
        compute(mesh, _show_data, task, workdir, start)
    if dry_run:
        return {}
    if start < settings.steps:
        batches = task.batches(start)
        first = compute(mesh, next, batches)
        stack.callback(getattr(batches, "close", lambda: None))
        batches = itertools.chain([first], batches)
    if state is None:
        state = compute(mesh, jax.jit(initial, out_shardings=shardings), task.loaded)
    _describe(state, frozen, settings)

    metrics = None
    if start < settings.steps:
        step, state, metrics = train_steps(run, start, state, batches, began)
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
