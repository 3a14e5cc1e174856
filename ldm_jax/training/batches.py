"""The training batches of a config, for this process."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ldm_jax.data.conditions import Condition
from ldm_jax.data.loader import Loader
from ldm_jax.data.sources import Source
from ldm_jax.data.transforms import Example, compose


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
    return Loader(
        source,
        config.train.batch_size,
        config.seed,
        transform=prepare,
        entries=entries,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=config.data.workers,
    )
