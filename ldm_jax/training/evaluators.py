"""Evaluators: what a run measures of its averaged model, each at an interval of its own.

`config.evaluators` has a section for each, with the options of `OPTIONS`. Those of `OWN` are the
tasks' `evaluate`. The others draw pictures; `ldm_jax.drawn_evaluators` has them, which is above
`training`, so whoever calls `loop.train` hands them over.
"""

import dataclasses
import difflib
import logging
from collections.abc import Callable, Mapping
from typing import Any

from ldm_jax.metrics.efficientnet import weights_path

log = logging.getLogger(__name__)

WITH_PREVIEWS = -1  # as an interval
OPTIONS = {
    "validation_loss": dict(every=WITH_PREVIEWS, count=0, batch_size=0),
    "reconstruction": dict(every=WITH_PREVIEWS, rfd=0),  # 1: EfficientNet-Lite0's features too
    "task": dict(every=0, count=64, steps=20),
    "distance": dict(every=0, count=256, steps=20),
    "novelty": dict(every=0, count=256, steps=20),
    "clip_score": dict(every=0, count=256, steps=20, path=""),  # path: of a CLIP with both towers
}
OWN = {"diffusion": "validation_loss", "autoencoder": "reconstruction"}
HELD_OUT = "held_out"  # the name, in `metrics.jsonl`, of what a task measures itself

Metrics = dict[str, float]


@dataclasses.dataclass(frozen=True)
class DrawnEvaluator:
    """An evaluator of drawn pictures.

    check: `(task, options)`; raises an error for data or options that it cannot use.
    measure: `(task, ema, options)` → metrics.
    """

    check: Callable[[Any, dict[str, Any]], None]
    measure: Callable[[Any, Any, dict[str, Any]], Metrics]


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """`measure(ema)` gives the metrics, {} if nothing is held out; they are reported as of `kind`
    every `every` steps and at the last one."""

    kind: str
    every: int
    measure: Callable[[Any], Metrics]

    def due(self, step: int, last: bool) -> bool:
        """Whether it measures after `step` steps; `last`: of the run."""
        return last or due(self.every, step)

    def __call__(self, ema: Any, step: int) -> Metrics:
        """The metrics; {} with a warning if these parameters cannot be measured."""
        try:
            return self.measure(ema)
        except (ValueError, ArithmeticError, FileNotFoundError) as error:
            log.warning("%s could not be measured at step %d: %s", self.kind, step, error)
            return {}


def due(every: int, step: int) -> bool:
    """Whether something that is done every so many steps follows `step`; 0: never."""
    return every > 0 and step % every == 0


def options_of(config: Any, name: str) -> dict[str, Any]:
    """The options of an evaluator, with the defaults for those that the config has not."""
    return OPTIONS[name] | dict(config.get("evaluators", {}).get(name, {}))


def make_evaluators(
    config: Any, task: Any, drawn: Mapping[str, DrawnEvaluator]
) -> tuple[Evaluator, ...]:
    """The evaluators of a run, the task's own first; those that never measure are left out.

    `drawn` has the evaluators that draw pictures, by name.

    Raises:
      ValueError: an evaluator or option that does not exist, with the nearest that does; an
        interval, count or size below its range; or an evaluator that the task or its data cannot
        have.
    """
    asked = config.get("evaluators", {})
    for name in asked:
        _check_name("evaluators", name, OPTIONS)
        for option in asked[name]:
            _check_name(f"evaluators.{name}", option, OPTIONS[name])
    own, made = OWN.get(config.task), []
    if own is None:
        made.append(Evaluator(HELD_OUT, config.train.preview_every, task.evaluate))
    for name in OPTIONS:
        options = options_of(config, name)
        _check_numbers(name, options)
        every = options["every"]
        interval = config.train.preview_every if every == WITH_PREVIEWS else every
        if not every or (name in OWN.values() and name != own and every == WITH_PREVIEWS):
            continue
        if name == own:
            if every != WITH_PREVIEWS and not len(task.held_out):
                raise ValueError(f"evaluators.{name}: no data are held out; see data.held_out")
            if options.get("rfd"):
                _check_features(f"{name}.rfd")
            made.append(Evaluator(HELD_OUT, interval, task.evaluate))
            continue
        if config.task != "diffusion" or name in OWN.values():
            raise ValueError(
                f"evaluators.{name}.every={every}: task={config.task!r} has no such evaluator; "
                f"use 0, and for held-out data {own or 'that of the task'}"
            )
        if name not in drawn:
            raise ValueError(
                f"evaluators.{name} draws pictures: train with train.py or ldm_jax.train, or give "
                "`drawn=ldm_jax.drawn_evaluators.DRAWN`"
            )
        drawn[name].check(task, options)
        measure = _bound(drawn[name].measure, task, options)
        made.append(Evaluator(name, interval, measure))
    return tuple(made)


def _check_features(name: str) -> None:
    """Checks that the default features can be had, which `name` measures on."""
    try:
        weights_path()
    except ImportError as error:
        raise ValueError(f"evaluators.{name}: {error}") from error


def _bound(measure: Callable, task: Any, options: dict[str, Any]) -> Callable[[Any], Metrics]:
    return lambda ema: measure(task, ema, options)


def _check_name(section: str, name: str, known: Mapping[str, Any]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}"
        raise ValueError(f"{section} has no {name!r}: {hint}")


def _check_numbers(name: str, options: dict[str, Any]) -> None:
    drawn = name not in OWN.values()
    least = {"every": WITH_PREVIEWS, "count": int(drawn), "steps": 1, "batch_size": 0, "rfd": 0}
    for option, value in options.items():
        if option == "path":
            if not isinstance(value, str):
                raise ValueError(f"evaluators.{name}.path={value!r}: expected a text")
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least[option]:
            raise ValueError(
                f"evaluators.{name}.{option}={value!r}: expected a whole number of at least "
                f"{least[option]}"
            )
