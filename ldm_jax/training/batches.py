"""The training batches of a config, for this process."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ldm_jax.data.condition_kinds import Condition
from ldm_jax.data.loader import Loader
from ldm_jax.data.sources import Source
from ldm_jax.data.transforms import Example, compose
from ldm_jax.runtime.mesh import part_of_batch
from ldm_jax.training.workdir import config_dict

# What of the `data` section a model stores, so that it can be measured on data of the same kind.
# Not the path, which concerns nobody else.
OF_THE_DATA = ("source", "classes", "scenes", "held_out", "background", "conditions")


def about_data(config: Any) -> dict[str, Any]:
    """What a trained model stores of its data, as plain values."""
    return {name: config_dict(config)["data"][name] for name in OF_THE_DATA}


class Prepare:
    """(example, rng) → example: the augmentations, then the conditions.

    An object and not a closure, because worker processes need to unpickle it.
    """

    def __init__(self, augment: Sequence[str], conditions: Sequence[Condition]):
        self.augment, self.conditions = tuple(augment), tuple(conditions)
        compose(self.augment)  # an unknown name is an error of the config, not of a worker

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        example = compose(self.augment)(example, rng)
        made = {}
        for condition in self.conditions:
            made |= condition(example, rng)
        return example | made


def training_loader(
    config: Any, source: Source, prepare: Prepare, entries: Sequence[str]
) -> Loader:
    """The loader of (step, this process's rows of the batch), for any step."""
    index, count = part_of_batch()
    return Loader(
        source,
        config.train.batch_size,
        config.seed,
        transform=prepare,
        entries=entries,
        process_index=index,
        process_count=count,
        workers=config.data.workers,
    )
