"""The loop: `train(config, workdir)` drives any task from its newest checkpoint to its end."""

import contextlib
import functools
import logging
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ldm_jax.interop.native import save_model
from ldm_jax.pictures import save_png
from ldm_jax.runtime.checkpoints import Checkpoints, abstract_like
from ldm_jax.runtime.logging import MetricsLog
from ldm_jax.runtime.mesh import batch_sharding, make_mesh, put_batch, replicated, state_shardings
from ldm_jax.training.optimizer import make_optimizer, parameter_path
from ldm_jax.training.report import write_report
from ldm_jax.training.signals import stop_on_signals
from ldm_jax.training.state import State, Task, init_state, make_train_step
from ldm_jax.training.tasks import make_task
from ldm_jax.training.workdir import config_dict, open_workdir
from ldm_jax.version import __version__

log = logging.getLogger(__name__)


class Interrupted(SystemExit):
    """Training was asked to stop by SIGINT or SIGTERM, and has saved its state."""


def train(config: Any, workdir: str | Path) -> dict[str, float]:
    """Trains `config` in `workdir`, resuming what is there, and returns the final metrics.

    Leaves there: `config.json`, `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `previews/`,
    `report.html`, and `model.safetensors`, which `ldm_jax.load` opens.

    Raises:
      ValueError: the workdir belongs to another config, or a setting is not allowed.
      FloatingPointError: a loss or gradient is not finite; names the first bad tensor and step.
      OSError: a checkpoint cannot be written; the message names the path.
      Interrupted: a SystemExit, after SIGINT or SIGTERM; the state is saved.
    """
    settings, seed = config.train, config.seed
    workdir = open_workdir(config, workdir)
    mesh = make_mesh(config.mesh)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        stop = stack.enter_context(stop_on_signals())
        task = make_task(config)
        optimizer = make_optimizer(config.optimizer, settings.steps, task.networks)

        # State: the newest checkpoint's or a fresh one, born where it will live.
        def initial():
            return init_state(task, optimizer, seed)

        abstract = jax.eval_shape(initial)
        shardings = state_shardings(mesh, abstract)
        checkpoints = Checkpoints(workdir / "checkpoints", settings.keep)
        stack.callback(checkpoints.close)
        about = {"config": config_dict(config), "version": __version__}
        start = checkpoints.latest()
        if start is None:
            start, state = 0, jax.jit(initial, out_shardings=shardings)()
        else:
            log.info("Resuming %s at step %d", workdir, start)
            state = checkpoints.restore(start, abstract_like(abstract, shardings))
        _describe(state, settings)

        # The step, compiled ahead for the shapes of the first batch and the phase at hand.
        @functools.cache
        def compiled(phase):
            began = time.perf_counter()
            train_step = jax.jit(
                make_train_step(task, optimizer, seed, settings.ema_decay, phase),
                donate_argnums=0,
                in_shardings=(shardings, batch_sharding(mesh), replicated(mesh)),
                out_shardings=(shardings, replicated(mesh)),
            )
            program = train_step.lower(abstract, batch, np.int32(0)).compile()
            log.info("Compiled the training step in %.1f s", time.perf_counter() - began)
            return program

        batches = ((step, put_batch(mesh, batch)) for step, batch in task.batches(start))
        step, batch = next(batches)
        compiled(task.phase(step))
        metrics_log = stack.enter_context(contextlib.closing(MetricsLog(workdir, start)))
        progress = stack.enter_context(
            tqdm(total=settings.steps, initial=start, unit="step", dynamic_ncols=True)
        )
        final, pending, since = {}, [], time.perf_counter()
        while step < settings.steps:
            state, metrics = compiled(task.phase(step))(state, batch, np.int32(step))
            pending.append(metrics)
            step, batch = next(batches)
            progress.update()
            last, stopping = step == settings.steps, stop.requested

            if step % settings.log_every == 0 or last:
                values = _mean(pending)
                _stop_if_not_finite(task, state, step, seed, checkpoints)
                rate = len(pending) * settings.batch_size / (time.perf_counter() - since)
                metrics_log.write(step, "train", values | {"images_per_second": rate})
                progress.set_postfix_str(f"loss {values['loss']:.4g}, {rate:.0f} images/s")
                pending, since = [], time.perf_counter()
            if step % settings.preview_every == 0 or last:
                paused = time.perf_counter()
                save_png(workdir / "previews" / f"{step:07d}.png", task.preview(state.ema))
                final = task.evaluate(state.ema)
                metrics_log.write(step, "held_out", final)
                since += time.perf_counter() - paused
            if step % settings.checkpoint_every == 0 or last or stopping:
                _stop_if_not_finite(task, state, step, seed, checkpoints)
                checkpoints.save(step, state, about)
            if stopping:
                break

        stack.close()
        save_model(workdir / "model.safetensors", *task.export(state.ema))
        log.info("Report: %s", write_report(workdir))
        if step < settings.steps:
            raise Interrupted(f"Stopped by {stop.requested}; step {step} is saved in {workdir}")
        return final or task.evaluate(state.ema)


def _describe(state: State, settings: Any) -> None:
    """Says what will train, once."""
    for name, params in state.params.items():
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        log.info("%s: %.2f M parameters", name, count / 1e6)
    log.info("%d steps of %d images", settings.steps, settings.batch_size)


def _mean(metrics: list[dict[str, jax.Array]]) -> dict[str, float]:
    """Mean of every metric over the steps that reported it."""
    values: dict[str, list] = {}
    for step_metrics in jax.device_get(metrics):
        for name, value in step_metrics.items():
            values.setdefault(name, []).append(value)
    return {name: float(np.mean(value)) for name, value in values.items()}


def _stop_if_not_finite(
    task: Task, state: State, step: int, seed: int, checkpoints: Checkpoints
) -> None:
    """Raises when the state froze before `step`: see `make_train_step`.

    A step is a pure function of the state and its number, so the bad one is simply run again to
    find the tensor that went wrong first.
    """
    bad = int(state.step)
    if bad == step:
        return
    key = jax.random.fold_in(jax.random.key(seed), bad)
    _, batch = next(task.batches(bad))
    grads, metrics = jax.jit(task.gradients, static_argnums=3)(
        state.params, batch, key, task.phase(bad)
    )
    suspects = {"batch": batch, "parameters": state.params, "metrics": metrics, "gradient": grads}
    names = [
        parameter_path(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(suspects)
        if np.issubdtype(leaf.dtype, np.inexact) and not np.isfinite(np.asarray(leaf)).all()
    ]
    saved = checkpoints.latest()
    kept = "no checkpoint was saved yet" if saved is None else f"step {saved} is the last good one"
    raise FloatingPointError(
        f"step {bad}: {names[0] if names else 'the gradient norm'} is not finite "
        f"({len(names)} tensors are not); {kept} in {checkpoints.directory}. A lower "
        "optimizer.lr, a longer optimizer.warmup or optimizer.clip usually cures it."
    )
