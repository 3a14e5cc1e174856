"""Time and memory to load a full-size Stable Diffusion 1.5.

    python -m benchmarks.load --dtype=float32

Writes random weights in the published layout (one file of CompVis', 4.3 GB in float32) unless the
file exists, loads it in a new process, draws one picture with two steps, and prints the seconds and
the peak of resident memory.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

MEASURED = "--measured"


def write(path: Path) -> None:
    """Random weights of every network of `configs/published.py:sd1`."""
    from flax.traverse_util import unflatten_dict

    from configs.published import get_config
    from ldm_jax.interop import compvis
    from ldm_jax.interop.layout import shapes
    from ldm_jax.training.workdir import config_dict

    config = config_dict(get_config("sd1")) | {"image_size": 512}
    sections = {name: config[name] for name in ("unet", "autoencoder")}
    sections["clip"] = config["conditioning"]["text"]["network"]
    rng = np.random.default_rng(0)
    params = {}
    for network, fields in sections.items():
        flat = {
            leaf: (0.02 * rng.standard_normal(shape, np.float32) + leaf.endswith("/scale"))
            for leaf, shape in shapes(network, fields).items()
        }
        params["text" if network == "clip" else network] = unflatten_dict(flat, sep="/")
    compvis.write(path, config, params)


def measure(path: str, dtype: str) -> None:
    import jax

    import ldm_jax

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    before, start = peak(), time.perf_counter()
    pipe = jax.block_until_ready(ldm_jax.load(path, dtype))
    loaded, after = time.perf_counter() - start, peak()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(pipe.params)) / 1e9
    start = time.perf_counter()
    images = pipe("a photograph of an astronaut", steps=2, height=256, width=256)
    drawn = time.perf_counter() - start
    assert np.isfinite(images).all()
    print(json.dumps(dict(
        dtype=dtype, gigabytes=round(size, 2), seconds=round(loaded, 1), before=round(before, 2),
        peak_gigabytes=round(after, 2), draw_seconds=round(drawn, 1), draw_peak=round(peak(), 2),
    )))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", type=Path, default=Path("runs/sd15-random.safetensors"))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(MEASURED, action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measured:
        measure(str(arguments.path), arguments.dtype)
        return
    if not arguments.path.exists():
        arguments.path.parent.mkdir(parents=True, exist_ok=True)
        write(arguments.path)
    command = [sys.executable, "-m", "benchmarks.load", MEASURED, f"--path={arguments.path}"]
    subprocess.run([*command, f"--dtype={arguments.dtype}"], check=True)


if __name__ == "__main__":
    main()
