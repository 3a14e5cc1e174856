"""A search, in a few compilations, for the batch, the policy of `train.remat` and the mesh with
which chips train fastest."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

# From the one that keeps most in memory to the one that keeps least, and takes longest.
POLICIES = ("", "products", "dots", "blocks")
GAIN = 1.02  # a batch twice as large is worth it from so many times the speed
LIMIT = 10  # compilations


@dataclasses.dataclass(frozen=True, order=True)
class Choice:
    """What is compiled: `fsdp` of the mesh, the policy `remat`, and the batch on all chips."""

    fsdp: int
    remat: str
    batch: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a compilation found.

    Attributes:
      needed: bytes of a chip.
      speed: images a second on each chip; 0 if the program does not fit.
      by: what bounds the speed.
      seconds: that compiling took.
    """

    choice: Choice
    needed: float
    speed: float
    by: str = ""
    seconds: float = 0.0

    @property
    def fits(self) -> bool:
        return self.speed > 0


def fsdp_sizes(chips: int) -> tuple[int, ...]:
    """The sizes of the axis `fsdp` that are tried on so many chips: 1, 8 if it is a part, all."""
    return tuple(sorted({size for size in (1, 8, chips) if chips % size == 0}))


def search(
    compiled: Callable[[Choice], Outcome],
    batch: int,
    parts: int,
    fsdp: Sequence[int],
    state: Callable[[int], float],
    capacity: float,
    limit: int = LIMIT,
) -> Iterator[Outcome]:
    """Yields the outcome of each compilation, at most `limit`.

    The policies are tried from the fastest on, without `fsdp` and then with it. While a batch fits
    and is worth it, twice as much is tried, from `batch` on, or half as much until something fits.
    What cannot fit is not compiled: a `fsdp` with which the state alone fills a chip, and a batch
    whose share of the memory, in proportion to that of the last one, does. If memory ended this,
    the next policy or `fsdp`, which need less, go on with twice the largest batch that fitted.
    If the speed did not grow, memory gains nothing, and each of the others is compiled once, at the
    best batch.

    Args:
      compiled: compiles a choice.
      batch: on all chips, a multiple of `parts`.
      parts: the least batch.
      fsdp: sizes of this axis.
      state: bytes of a chip that the state alone takes, with a size of `fsdp`.
      capacity: bytes of a chip.
    """
    best: Outcome | None = None
    fitted, limited, count = 0, True, 0

    def predicted(outcome: Outcome, batch: int) -> float:
        own = state(outcome.choice.fsdp)
        return own + (outcome.needed - own) * batch / outcome.choice.batch

    for size in fsdp:
        if state(size) >= capacity:
            continue
        for remat in POLICIES:
            grows = limited
            at = (2 * fitted or batch) if grows else best.choice.batch
            while at >= parts:
                if count == limit:
                    return
                outcome = compiled(Choice(size, remat, at))
                count += 1
                yield outcome
                if not outcome.fits:
                    if fitted:
                        break
                    at = _multiple(at // 2, parts)
                    while at > parts and predicted(outcome, at) > capacity:
                        at = _multiple(at // 2, parts)
                    continue
                fitted = max(fitted, at)
                gains = best is None or outcome.speed >= GAIN * best.speed
                if best is None or outcome.speed > best.speed:
                    best = outcome
                if not grows or not gains:
                    limited = False
                    break
                at *= 2
                if predicted(outcome, at) > capacity:
                    break


def _multiple(count: int, parts: int) -> int:
    """The largest multiple of `parts` up to `count`; 0 if there is none."""
    return count - count % parts


def ranked(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those that fit, the fastest first, and then the others."""
    return sorted(outcomes, key=lambda outcome: (-outcome.speed, outcome.needed))
