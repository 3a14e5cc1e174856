"""The time and memory of metrics of features: FD, KID, precision, recall, density and coverage.

    python -m benchmarks.metrics [--count=50000] [--width=2048]

Of so many drawn features as real ones, float32 and random. It prints, of each metric, seconds on
the clock and of all processors together, and at the end the peak memory of the whole process.
"""

import argparse
import os
import resource
import time
from collections.abc import Callable

import numpy as np

from ldm_jax.metrics.distance import frechet_distance
from ldm_jax.metrics.manifold import pair_metrics


def features(count: int, width: int, seed: int) -> np.ndarray:
    """Not negative and of unequal spread, as a pooled layer's, made without a larger array."""
    random = np.random.default_rng(seed)
    spread = np.geomspace(2.0, 0.1, width, dtype=np.float32)
    made = random.standard_normal((count, width), np.float32)
    np.abs(made, out=made)
    return np.multiply(made, spread, out=made)


def timed(name: str, measure: Callable[[], object]) -> tuple[float, float]:
    clock, processors = time.perf_counter(), time.process_time()
    found = measure()
    spent = time.perf_counter() - clock, time.process_time() - processors
    print(f"{name:28}{spent[0]:8.1f} s{spent[1]:10.1f} s of processors   {found}", flush=True)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=2048)
    asked = parser.parse_args()
    drawn, real = (features(asked.count, asked.width, seed) for seed in (0, 1))
    print(f"{asked.count} x {asked.width} features against as many, {os.cpu_count()} processors")
    spent = [
        timed("fd", lambda: frechet_distance(drawn, real)),
        timed("kid, precision and the rest", lambda: pair_metrics(drawn, real)[0]),
    ]
    clock, processors = (sum(each) for each in zip(*spent, strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"together {clock:.1f} s, {processors:.1f} s of processors; peak memory {peak:.2f} GB")


if __name__ == "__main__":
    main()
