"""Two sides do the same work, each in a process and an environment of its own."""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.interop import diffusers
from ldm_jax.published import MODELS, RECIPES
from tests.tiny_models import model, random_params

ROOT = Path(__file__).parents[2]
ROUNDS = 2


class System(NamedTuple):
    """A published model with random weights, the inputs of its works, and these.

    Attributes:
      name: of the published model.
      latents: their shape, batch first.
      steps: of a sample; guidance is 7.5, the sampler DDIM.
      works: name, and what it does how often: (25, "steps").
      fields: of the UNet, changed.
      autoencoder: its fields, changed.
    """

    name: str
    latents: tuple[int, int, int, int]
    steps: int
    works: dict[str, tuple[int, str]]
    fields: dict[str, Any] = {}
    autoencoder: dict[str, Any] = {}

    def make(self, folder: Path) -> None:
        """Writes a pipeline in diffusers' layout and the inputs."""
        published = (MODELS | RECIPES)[self.name]
        unet = published.unet | self.fields
        first_stage = dict(kind="kl") | published.autoencoder.fields | self.autoencoder
        config = model(unet, first_stage, published.conditions, size=published.size)
        config = json.loads(json.dumps(config))  # lists, as in a file
        diffusers.write(folder, config, random_params(config, scale=0.02))
        shape, rng = self.latents, np.random.default_rng(0)
        context = (shape[0], 77, unet["context_dim"])
        arrays = dict(x=shape, noise=shape, context=context, latents=(1, 64, 64, 4))
        inputs = {name: rng.standard_normal(shape, np.float32) for name, shape in arrays.items()}
        inputs["t"] = np.linspace(0, 999, shape[0], dtype=np.float32)
        inputs["image"] = rng.uniform(size=(1, 512, 512, 3)).astype(np.float32)
        np.savez(folder / "inputs.npz", steps=self.steps, **inputs)


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


def _rounds(starts: list[tuple], repeats: int, together: bool) -> Iterator[tuple[Side, list[dict]]]:
    """Each side and what it measured. `together`: both stand ready, and work by turns."""
    for group in [starts] if together else [[start] for start in starts]:
        sides = [Side(*start) for start in group]
        rounds = [[side(repeats) for side in sides] for _ in range(ROUNDS)]
        for side, *own in zip(sides, *rounds, strict=True):
            side.close()
            yield side, own


def compare(
    systems: dict[str, System],
    chosen: Iterable[str],
    peer: str,
    python: str,
    repeats: int,
    together: bool = True,
) -> None:
    """Prints a row for each of the `chosen`, as "system:work", and the versions of both sides.

    `python` is that of the peer's environment. Not `together`: one after the other, so that each
    has all the memory of an accelerator.
    """
    print("| work | ours | peer | ratio | first result | memory | apart |\n|" + "---|" * 7)
    versions = []
    for name, system in systems.items():
        works = [work for work in system.works if f"{name}:{work}" in chosen]
        with tempfile.TemporaryDirectory() as folder:
            if works:
                system.make(Path(folder))
            for work in works:
                starts = [
                    (sys.executable, "ldm_jax_side", Path(folder), work),
                    (python, f"{peer}_side", Path(folder), work),
                ]
                sides, rounds = zip(*_rounds(starts, repeats, together), strict=True)
                versions = [side.ready["versions"] for side in sides]
                times = [statistics.median(sum((r["seconds"] for r in own), [])) for own in rounds]
                peaks = [max(r["peak"] for r in own) for own in rounds]
                a, b = (np.load(side.result) for side in sides)
                apart = "" if peer == "dew" else f"{np.max(np.abs(a - b)) / np.max(np.abs(b)):.0e}"
                count, unit = system.works[work]
                each = (f"{time:.3g} s, {count / time:.3g} {unit}/s" for time in times)
                print(
                    f"| {name} {work} | {' | '.join(each)} | {times[1] / times[0]:.2f} "
                    f"| {sides[0].ready['ready']:.1f}, {sides[1].ready['ready']:.1f} s "
                    f"| {peaks[0]:.2f}, {peaks[1]:.2f} GB | {apart} |",
                    flush=True,
                )
    print("; ".join(versions))
