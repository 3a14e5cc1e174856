"""Metrics of a model, with their protocol and intervals: the library calls behind `evaluate.py`."""

from ldm_jax.evaluation.drawing import Drawn, clip_metrics, drawn_metrics, scene_metrics
from ldm_jax.evaluation.run import Evaluation, evaluate

__all__ = ["Drawn", "Evaluation", "clip_metrics", "drawn_metrics", "evaluate", "scene_metrics"]
