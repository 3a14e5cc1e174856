"""Metrics of a model, with their protocol and intervals: the library calls behind `evaluate.py`."""

from ldm_jax.evaluation.drawing import Drawn, drawn_metrics, scene_metrics
from ldm_jax.evaluation.run import Evaluation, evaluate

__all__ = ["Drawn", "Evaluation", "drawn_metrics", "evaluate", "scene_metrics"]
