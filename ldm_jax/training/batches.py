"""The training batches of a config, for this process."""

from collections.abc import Iterator
from typing import Any

import jax

from ldm_jax.data.loader import Batch, Loader
from ldm_jax.data.sources import Source


def training_batches(config: Any, source: Source, start: int) -> Iterator[tuple[int, Batch]]:
    """(step, this process's rows of the batch) from step `start` on, without end."""
    loader = Loader(
        source,
        config.train.batch_size,
        config.seed,
        augment=config.data.augment,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return loader.iterate(start)
