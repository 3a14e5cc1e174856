"""Ours beside a peer: the same inputs and work, by turns, each in an environment of its own.

    python -m venv .venv-peer
    .venv-peer/bin/pip install torch==2.13.0 diffusers==0.42.1 transformers==5.23.0
    python -m benchmarks.peers --peer=diffusers --python=.venv-peer/bin/python [--repeats=3]

    python -m venv .venv-dew
    .venv-dew/bin/pip install dewml          # Python 3.12 or newer
    python -m benchmarks.peers --peer=dew --python=.venv-dew/bin/python [--work=109m:forward]

Each side in its turn does the work `--repeats` times, after a time that does not count, in two
rounds. Printed are, of each work, medians of the time on the clock, the ratio of the peer's to ours
(more than 1: ours is faster), seconds until the first result, which includes compiling, the most
memory of the process while it works, and how far apart the first results are, as a part of the
largest number. diffusers opens our random weights, in its own layout; Dew draws its own, so that
its results are others. A training step is the mean squared error, its gradient, AdamW and an
average of the parameters.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from ldm_jax.interop import diffusers
from ldm_jax.published import MODELS
from tests.tiny_models import model, random_params

ROOT = Path(__file__).parents[2]
SD1 = MODELS["sd1"]
# The fields of a UNet that differ from Stable Diffusion 1, and the shape of its latents.
SYSTEMS = {
    "109m": (
        dict(model_channels=128, channel_mult=(1, 2, 4), attention_resolutions=(1, 2, 4)),
        (8, 32, 32, 4),
    ),
    "sd15": ({}, (2, 64, 64, 4)),
}
WORKS = {
    "109m": ("forward", "step", "sample", "encode", "decode"),
    "sd15": ("forward", "forward_bfloat16"),
}
ROUNDS = 2
OF_DEW = ("109m:forward", "109m:step")


def make(folder: Path, name: str) -> None:
    """A pipeline in diffusers' layout and the inputs of its works."""
    fields, shape = SYSTEMS[name]
    config = model(SD1.unet | fields, dict(kind="kl") | SD1.autoencoder.fields, SD1.conditions)
    diffusers.write(folder, config, random_params(config, scale=0.02))
    rng = np.random.default_rng(0)
    latents = dict(x=shape, noise=shape, context=(shape[0], 77, 768), latents=(1, 64, 64, 4))
    inputs = {name: rng.standard_normal(shape, np.float32) for name, shape in latents.items()}
    inputs["t"] = np.linspace(0, 999, shape[0], dtype=np.float32)
    inputs["image"] = rng.uniform(size=(1, 512, 512, 3)).astype(np.float32)
    np.savez(folder / "inputs.npz", **inputs)


class Side:
    """A process that does a work as often as it is told."""

    def __init__(self, python: str, module: str, folder: Path, work: str):
        self.result = folder / f"{module}.npy"
        command = (python, "-m", f"benchmarks.peers.{module}", folder, work)
        self.process = subprocess.Popen(
            (*map(str, command), f"--result={self.result}"),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ready = self._read()

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(map(str, self.process.args))} ended")
        return json.loads(line)

    def __call__(self, repeats: int) -> dict:
        print(repeats, file=self.process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(folder: Path, name: str, work: str, peer: str, python: str, repeats: int) -> list[str]:
    """Prints the row of a work; returns the versions of both sides."""
    sides = [
        Side(sys.executable, "ldm_jax_side", folder, work),
        Side(python, f"{peer}_side", folder, work),
    ]
    rounds = [[side(repeats) for side in sides] for _ in range(ROUNDS)]
    for side in sides:
        side.close()
    (ours, our_peak), (theirs, their_peak) = (
        (statistics.median(sum((r["seconds"] for r in own), [])), max(r["peak"] for r in own))
        for own in zip(*rounds, strict=True)
    )
    a, b = (np.load(side.result) for side in sides)
    apart = "" if peer == "dew" else f"{np.max(np.abs(a - b)) / np.max(np.abs(b)):.0e}"
    print(
        f"| {name} {work} | {ours:.2f} s | {theirs:.2f} s | {theirs / ours:.2f} "
        f"| {sides[0].ready['ready']:.1f}, {sides[1].ready['ready']:.1f} s "
        f"| {our_peak:.2f}, {their_peak:.2f} GB | {apart} |",
        flush=True,
    )
    return [side.ready["versions"] for side in sides]


def main() -> None:
    names = [f"{system}:{work}" for system, works in WORKS.items() for work in works]
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", choices=["diffusers", "dew"], default="diffusers")
    parser.add_argument("--python", required=True, help="of the peer's environment")
    parser.add_argument("--work", action="append", choices=names)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    chosen = asked.work or (OF_DEW if asked.peer == "dew" else names)
    versions: list[str] = []
    print("| work | ours | peer | ratio | first result | memory | apart |\n|" + "---|" * 7)
    for system, works in WORKS.items():
        works = [work for work in works if f"{system}:{work}" in chosen]
        with tempfile.TemporaryDirectory() as folder:
            if works:
                make(Path(folder), system)
            for work in works:
                both = (Path(folder), system, work, asked.peer, asked.python, asked.repeats)
                versions = compare(*both)
    print("; ".join(versions))


if __name__ == "__main__":
    main()
