"""Evaluators of training that draw pictures, for `loop.train`."""

import functools
from typing import Any

from ldm_jax.conditions.kinds import SIZES
from ldm_jax.data.scenes import SceneSource
from ldm_jax.evaluation import clip_metrics, drawn_metrics, scene_metrics
from ldm_jax.evaluation.drawing import Real, real_pictures
from ldm_jax.metrics.clip_score import load_clip
from ldm_jax.metrics.extractors import load_extractor
from ldm_jax.pipeline import Pipeline
from ldm_jax.training.evaluators import DrawnEvaluator

NOVELTY = ("copied", "novelty_p")  # of `drawn_metrics`
Options = dict[str, Any]


def _check_task(task: Any, options: Options) -> None:
    held_out = _pictures(task.held_out)
    if not isinstance(held_out, SceneSource):
        raise ValueError(
            f"evaluators.task judges drawn scenes, and data.source={task.config.data.source!r}: "
            "use distance, or data.source='scenes'"
        )
    if options["count"] > len(held_out):
        raise ValueError(
            f"evaluators.task.count={options['count']}: {len(held_out)} scenes are held out"
        )
    if not _needs(task):
        raise ValueError("evaluators.task: this model is told nothing of a scene; use distance")


def _task(task: Any, ema: Any, options: Options) -> dict[str, float]:
    held_out, count, steps = _pictures(task.held_out), options["count"], options["steps"]
    return scene_metrics(_pipe(task, ema), held_out, count, task.conditions, steps=steps).metrics


def _check_distance(task: Any, options: Options) -> None:
    del options
    _check_drawable(task, "distance")


def _distance(task: Any, ema: Any, options: Options) -> dict[str, float]:
    found = _drawn(task, ema, options)
    return {name: value for name, value in found.items() if name not in NOVELTY}


def _check_novelty(task: Any, options: Options) -> None:
    del options
    if not len(task.held_out):
        raise ValueError("evaluators.novelty: no data are held out; see data.held_out")
    _check_drawable(task, "novelty")


def _novelty(task: Any, ema: Any, options: Options) -> dict[str, float]:
    found = _drawn(task, ema, options, _pictures(task.held_out))
    return {name: found[name] for name in NOVELTY}


def _check_clip_score(task: Any, options: Options) -> None:
    if "caption" not in (needs := _needs(task)):
        what = ", ".join(sorted(needs)) or "nothing"
        raise ValueError(
            "evaluators.clip_score compares pictures with captions, and this model is told "
            f"{what}: use distance"
        )
    if not options["path"]:
        raise ValueError(
            "evaluators.clip_score.path is empty: name the file or folder of a CLIP with both "
            "towers, of transformers or OpenCLIP"
        )
    source, what = _captions(task)
    if options["count"] > len(source):
        raise ValueError(
            f"evaluators.clip_score.count={options['count']}: there are {len(source)} {what}"
        )
    load_clip(options["path"])  # it is read again for each measurement, and then takes no memory


def _clip_score(task: Any, ema: Any, options: Options) -> dict[str, float]:
    clip, (source, _) = load_clip(options["path"]), _captions(task)
    asked = dict(count=options["count"], conditions=task.conditions, steps=options["steps"])
    return clip_metrics(_pipe(task, ema), source, clip, **asked).metrics


DRAWN = {
    "task": DrawnEvaluator(_check_task, _task),
    "distance": DrawnEvaluator(_check_distance, _distance),
    "novelty": DrawnEvaluator(_check_novelty, _novelty),
    "clip_score": DrawnEvaluator(_check_clip_score, _clip_score),
}


def _check_drawable(task: Any, name: str) -> None:
    others = sorted(_needs(task) - {"caption", "label"})
    if others:
        raise ValueError(
            f"evaluators.{name} draws from captions, labels or nothing, and this model needs "
            f"{others[0]} too: use task"
        )
    try:
        load_extractor()
    except ImportError as error:
        raise ValueError(f"evaluators.{name}: {error}") from error


def _drawn(task: Any, ema: Any, options: Options, held_out: Any = ()) -> dict[str, float]:
    pipe, source = _pipe(task, ema), _pictures(task.source)
    asked = dict(real=_real(source, held_out), steps=options["steps"])
    return drawn_metrics(pipe, source, options["count"], **asked).metrics


@functools.lru_cache(maxsize=2)  # with held-out pictures and without
def _real(source: Any, held_out: Any) -> Real:
    """The features of a run's pictures, which are the same at each measurement."""
    return real_pictures(source, held_out, load_extractor(), {"split": "train"})


def _captions(task: Any) -> tuple[Any, str]:
    """The held-out pictures, or without them those of training; and what their captions are."""
    if len(task.held_out):
        return _pictures(task.held_out), "held-out captions"
    return _pictures(task.source), "captions"


def _pipe(task: Any, ema: Any) -> Pipeline:
    return task.pipelines(ema)[-1]


def _pictures(source: Any) -> Any:
    """The source itself, without its latents."""
    return getattr(source, "pictures", source)


def _needs(task: Any) -> set[str]:
    return {e for embedder in task.model.embedders for e in embedder.needs} - SIZES.keys()
