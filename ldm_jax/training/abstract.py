"""Tasks without data and weights, as shapes, of which a program can be traced and compiled."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.data.condition_kinds import Array, Condition, Depth, LossMask
from ldm_jax.data.placement import Placement
from ldm_jax.data.sources import WITH_PATH, open_source
from ldm_jax.latent_diffusion import LatentDiffusion

Shapes = Any  # a tree of jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Blank:
    """A source of one picture, in place of data that need not be there. Its classes are unknown."""

    classes: tuple[str, ...] = ()
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    lost_captions: dict[str, int] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return 1

    def describe(self, index: int) -> dict[str, Any]:
        """The example without its pixels."""
        return {"caption": "", "label": 0, "name": str(index)}


def blank_source(config: Any) -> Any:
    """`Blank`, or the source itself if it comes with the package; `config` is the section `data`.

    Raises:
      ValueError: an unknown source.
    """
    names = config.source.split("+")
    return Blank() if set(names) & set(WITH_PATH) else open_source(config)


def blank_example(size: int, conditions: tuple[Condition, ...], embedders: tuple) -> dict[str, Any]:
    """An example of `size` pixels with the entries that conditions make, all of them blank.

    Raises:
      ValueError: an array of unknown shape.
    """
    placement = Placement.centre((size, size), (size, size))
    example = {
        "image": np.zeros((size, size, 3), np.uint8),
        "caption": "",
        "label": 0,
        "name": "blank",
        "placement": placement,
        # What conditions of scenes and of folders are made of, so that they read no file.
        "segmentation": np.zeros((size, size), np.int32),
        "categories": np.zeros(0, np.int64),
        "boxes": np.zeros((0, 4)),
    }
    shapes = {e.name: getattr(e, "shape", ()) for e in embedders}
    made = {}
    for condition in conditions:
        if isinstance(condition, Depth | LossMask):
            side = size // condition.factor
            made[condition.name] = np.zeros((side, side, 1), np.float32)
        elif isinstance(condition, Array):
            shape = shapes[condition.name]
            if None in shape:
                raise ValueError(
                    f"conditioning.{condition.name}.shape={shape} leaves a side open, and without "
                    "data nothing says how long it is: give all sides"
                )
            made[condition.name] = np.zeros(shape, np.float32)
        else:
            made |= condition(example, np.random.default_rng(0))
    return example | made


def batch_shapes(task: Any, count: int) -> Shapes:
    """The batch of a training step of an abstract task: `count` examples."""
    size = task.config.data.image_size
    if not hasattr(task, "embedders"):
        return {"image": jax.ShapeDtypeStruct((count, size, size, 3), np.uint8)}
    pixels = task.entries[0]
    inputs = input_shapes(task, task.embedders, count)
    if pixels == "image":
        return {pixels: jax.ShapeDtypeStruct((count, size, size, 3), np.uint8)} | inputs
    side, _, channels = task.latent_shape
    return {pixels: jax.ShapeDtypeStruct((count, side, side, 2 * channels), np.float32)} | inputs


def input_shapes(task: Any, embedders: tuple, count: int) -> Shapes:
    """The raw inputs of embedders of an abstract task, for `count` examples."""
    example = blank_example(task.config.data.image_size, task.conditions, task.model.embedders)
    batch = {name: [value] for name, value in example.items()}
    raw = {embedder.name: embedder.prepare(batch) for embedder in embedders}
    return jax.tree.map(
        lambda values: jax.ShapeDtypeStruct((count, *np.shape(values)[1:]), values.dtype), raw
    )


def first_stage_shapes(model: LatentDiffusion) -> Shapes:
    """The parameters of a model's autoencoder."""
    side, channels = model.autoencoder.downsampling, model.autoencoder.in_channels

    def init():
        return model.autoencoder.init(jax.random.key(0), jnp.zeros((1, side, side, channels)))

    return jax.eval_shape(init).get("params", {})


def zeros_if_abstract(function: Callable) -> Callable:
    """`function(params, …)`, which returns zeros of its result's shapes if `params` are shapes."""

    def called(params, *args):
        if not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
            return function(params, *args)
        made = jax.eval_shape(function, params, *args)
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), made)

    return called
