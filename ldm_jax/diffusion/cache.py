"""DeepCache: deep features of a UNet, kept between the steps of a run (Ma et al. 2023).

Neighbouring steps have almost the same deep features, so only every few steps run the whole UNet.
The steps between take the features that it kept, and run its outermost levels alone (arXiv
2312.00858, §3.2 and algorithm 1). Which steps are whole is an input of the compiled program.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.checks import whole as whole_number
from ldm_jax.diffusion.parameterization import Network


class Cache:
    """What is kept, during one evaluation of a network, while a step is traced.

    `value` is an array (B, h, w, C), which `reuse` replaces; None: nothing is kept yet, so that the
    whole network is run. `refresh`, a bool: whether this step runs the whole network.
    """

    def __init__(self, refresh: jax.Array | bool, value: jax.Array | None):
        self.refresh, self.value = refresh, value

    def reuse(
        self,
        count: int,
        whole: Callable[[], tuple[jax.Array, jax.Array]],
        outer: Callable[[jax.Array], jax.Array],
    ) -> jax.Array:
        """The network's output for a batch of `count`, of which the first features are kept.

        Args:
          whole: () → all of its output, and the deep features.
          outer: the deep features → its output.
        """
        if self.value is None:
            output, self.value = whole()
            return output
        kept = self.value

        def renewed():
            output, made = whole()
            return output, kept.at[:count].set(made)

        def reused():
            return outer(kept[:count]), kept

        output, self.value = jax.lax.cond(self.refresh, renewed, reused)
        return output

    def where_guided(self, guided: Network, plain: Network, active: jax.Array) -> Network:
        """As `guidance.where_guided`, for networks that call `reuse`."""

        def carried(network):
            def run(x, t, value):
                self.value = value
                return network(x, t), self.value

            return run

        def chosen(x, t):
            if self.value is None:
                return guided(x, t)  # the larger batch
            kept = self.value
            output, self.value = jax.lax.cond(active, carried(guided), carried(plain), x, t, kept)
            return output

        return chosen


def empty(evaluate: Callable[[Cache], Any]) -> jax.Array:
    """Zeros of the shape and type of what an evaluation keeps."""

    def first():
        cache = Cache(True, None)
        evaluate(cache)
        return cache.value

    made = jax.eval_shape(first)
    return jnp.zeros(made.shape, made.dtype)


def refreshed(steps: int, interval: int, skip: int, active: np.ndarray | None) -> np.ndarray:
    """(S,) whether a step runs the whole network: every `interval`-th from step `skip` on.

    Where guidance begins or ends, `active` (S,), the batch is another: these steps are whole, too.
    """
    whole = (np.arange(steps) - skip) % interval == 0
    if active is not None:
        whole[1:] |= active[1:] != active[:-1]
    return whole


def check_cache(interval: int, branch: int, sampler: str | None, evaluations: int) -> None:
    """Raises ValueError for numbers out of range, and for a sampler that evaluates the network more
    than once in each step."""
    for name, value, least in (("interval", interval, 1), ("branch", branch, 0)):
        (number,) = whole_number(**{f"cache_{name}": value})
        if number is None or number < least:
            raise ValueError(f"cache_{name}={value}: must be a whole number from {least} on")
    if interval == 1 and branch:
        raise ValueError("cache_branch is of a cache: set cache_interval to 2 or more")
    if interval > 1 and evaluations > 1:
        raise ValueError(
            f"cache_interval: sampler {sampler!r} evaluates the network twice in each step, and "
            "their features differ; choose one with one evaluation, such as dpmpp_2m"
        )
