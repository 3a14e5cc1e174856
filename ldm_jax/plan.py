"""What a training needs of a TPU slice or of GPUs, from their compiler, on a machine without them.

    python -m ldm_jax.plan --config=configs/published.py:sd2 --topology=v5p:2x2x2 --batch=256

It compiles the training step and the program that draws, for the slice's chips, and prints what
they need of each: memory, FLOPs, bytes, the least time. No data, weights or parameters are needed
or made. A TPU's compiler is libtpu: pip install 'jax[tpu]', in an environment of its own; that of
GPUs (--topology=h100:8) comes with 'jax[cuda12]'. Without --topology it compiles for the devices
that are there, and also measures. See docs/tpu-plan.md.

With --suggest it looks for the batch, the recomputation and the mesh that train fastest, and prints
a table of what it has compiled.
"""

from collections.abc import Iterator
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from ldm_jax.runtime.console import config_file, run
from ldm_jax.runtime.mesh import check_batch, make_mesh, parts_of_batch
from ldm_jax.runtime.meters import TERA, Chip, chip_of
from ldm_jax.runtime.plan import (
    Usage,
    capacity_of,
    compile_usage,
    measure,
    roofline,
    size,
)
from ldm_jax.runtime.suggestions import LIMIT, Choice, Outcome, fsdp_sizes, ranked, search
from ldm_jax.runtime.topologies import topology_devices
from ldm_jax.training.program import Lowered, lower_sampler, lower_step, state_bytes
from ldm_jax.training.tasks import make_task

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/TASK.py[:variant].")
TOPOLOGY = flags.DEFINE_string(
    "topology", "", "A TPU slice, v5e:4x4, or a host's GPUs, h100:8; empty: the devices here."
)
BATCH = flags.DEFINE_integer("batch", 0, "Of training, on all chips; 0: the config's.", 0)
PROGRAMS = flags.DEFINE_list("programs", ["train", "sample"], "What to compile: train, sample.")
PICTURES = flags.DEFINE_integer("pictures", 1, "Drawn at once for each part of a batch.", 1)
STEPS = flags.DEFINE_integer("steps", None, "Of drawing; unset: the config's.", 1)
SUGGEST = flags.DEFINE_bool(
    "suggest", False, "Try batches, recomputation and meshes of the training step; a table."
)
COMPILATIONS = flags.DEFINE_integer("compilations", LIMIT, "Of --suggest, at most.", 1)
PRICE = flags.DEFINE_float("price", None, "Of an hour of one chip, in any currency.", 0.0)
flags.mark_flags_as_required(["config"])


def main():
    path, variant = config_file(flags.FLAGS["config"])
    config = CONFIG.value
    unknown = [name for name in PROGRAMS.value if name not in ("train", "sample")]
    if unknown:
        raise ValueError(f"--programs={unknown[0]}: choose from train, sample")
    devices = topology_devices(TOPOLOGY.value) if TOPOLOGY.value else jax.devices()
    if BATCH.value:
        config.train.batch_size = BATCH.value
    if SUGGEST.value:
        suggest(config, devices, measured=not TOPOLOGY.value)
        return
    mesh = make_mesh(config.mesh, devices)
    if "train" in PROGRAMS.value:
        check_batch(mesh, config.train.batch_size)
    chip = chip_of(devices[0])
    name = f"{path}:{variant}" if variant else path
    where = TOPOLOGY.value or f"{devices[0].device_kind}, measured"
    shape = ", ".join(f"{axis} {count}" for axis, count in mesh.shape.items())
    print(f"{name} on {where}: {mesh.size} chips ({shape})", flush=True)
    for title, lowered in programs(config, mesh):
        usage = compile_usage(lowered.lowered, chip and chip.memory)
        seconds = None if TOPOLOGY.value or not usage.fits else measure(usage.compiled)
        lines = report(lowered, usage, chip, mesh.size, seconds, PRICE.value)
        print(f"\n{title} (compiled in {usage.seconds:.0f} s)", flush=True)
        for what, value in lines:
            print(f"  {what:<22} {value}", flush=True)


def programs(config: Any, mesh: Any) -> Iterator[tuple[str, Lowered]]:
    """The programs that --programs names, each with a title."""
    task = make_task(config, abstract=True)
    if "train" in PROGRAMS.value:
        yield f"Training step, batch {config.train.batch_size}", lower_step(task, config, mesh)
    if "sample" in PROGRAMS.value and config.task == "diffusion":
        count = PICTURES.value * parts_of_batch(mesh)
        steps = STEPS.value or task.resolved["sampling"]["steps"]
        title = f"Drawing {count} pictures in {steps} steps"
        yield title, lower_sampler(task, config, mesh, count, STEPS.value)


def suggest(config: Any, devices: list[Any], measured: bool) -> None:
    """Prints the outcome of each compilation of a search, and then all of them, the best first."""
    chip, chips = chip_of(devices[0]), len(devices)
    if not measured and chip is None:
        raise ValueError(f"--suggest: nothing is known of the speed of {devices[0].device_kind}")
    tensor = max(config.mesh.get("tensor", 1), 1)

    def changed(choice: Choice) -> tuple[Any, Any]:
        own = config.copy_and_resolve_references()
        own.train.update(batch_size=choice.batch, remat=choice.remat)
        own.mesh.update(data=-1, fsdp=choice.fsdp)
        return own, make_mesh(own.mesh, devices)

    def compiled(choice: Choice) -> Outcome:
        own, mesh = changed(choice)
        lowered = lower_step(make_task(own, abstract=True), own, mesh)
        usage = compile_usage(lowered.lowered, capacity)
        if not usage.fits:
            return Outcome(choice, usage.needed, 0.0, seconds=usage.seconds)
        if measured:
            time, by = measure(usage.compiled), "measured"
        else:
            bound = roofline(usage, lowered.flops / chips, chip)
            time, by = bound.seconds, bound.by
        speed = lowered.images / time / chips
        return Outcome(choice, usage.needed, speed, by, usage.seconds)

    task, capacity = make_task(config, abstract=True), capacity_of(devices)
    parts = chips // tensor
    batch = max(config.train.batch_size // parts, 1) * parts
    least = parts * config.train.get("accumulate", 1)
    states = {
        fsdp: state_bytes(task, config, changed(Choice(fsdp, "", batch))[1])
        for fsdp in fsdp_sizes(parts)
    }
    print(f"{chips} chips of {size(capacity)}; the state takes of each:")
    for fsdp, taken in states.items():
        print(f"  {size(taken)} with mesh.fsdp={fsdp}", flush=True)
    outcomes = []
    for outcome in search(
        compiled, -(-batch // least) * least, least, list(states), states.get, capacity,
        COMPILATIONS.value,
    ):  # fmt: skip
        outcomes.append(outcome)
        print(f"  compiled in {outcome.seconds:.0f} s: {_row(outcome, parts)}", flush=True)
    print("\n| " + " | ".join(TITLES) + " |\n" + "|---" * len(TITLES) + "|")
    for outcome in ranked(outcomes):
        print(_row(outcome, parts))
    if not any(outcome.fits for outcome in outcomes):
        raise ValueError("nothing fits: use more chips, mesh.tensor, or train.accumulate")


TITLES = ("images/s a chip", "train.batch_size", "train.remat", "mesh", "memory", "bound by")


def _row(outcome: Outcome, parts: int) -> str:
    choice = outcome.choice
    values = (
        f"{outcome.speed:.4g}" if outcome.fits else "does not fit",
        str(choice.batch),
        choice.remat or "–",
        f"data {parts // choice.fsdp}, fsdp {choice.fsdp}",
        size(outcome.needed),
        outcome.by,
    )
    return f"| {' | '.join(values)} |"


def report(
    program: Lowered,
    usage: Usage,
    chip: Chip | None,
    chips: int,
    seconds: float | None = None,
    price: float | None = None,
) -> Iterator[tuple[str, str]]:
    """What is printed of a program: pairs of a name and a value.

    Args:
      seconds: the measured time of a run, if there is one.
      price: of an hour of one chip.
    """
    if not usage.fits:
        yield "memory of a chip", f"{size(usage.needed)} of {size(usage.capacity)}: does not fit"
        return
    capacity = f" of {size(chip.memory)}: fits" if chip else ""
    yield "memory of a chip", f"{size(usage.needed)}{capacity}"
    for part in ("arguments", "temporaries", "outputs", "code"):
        yield f"  {part}", size(getattr(usage, part))
    own = program.flops / chips
    counted = f", XLA counts {usage.flops / TERA:.4g}" if usage.flops else ""
    yield "model's TFLOP a chip", f"{own / TERA:.4g}{counted}"
    yield "accessed a chip", size(usage.accessed)
    kinds = ", ".join(f"{kind} {size(sent)}" for kind, sent in sorted(usage.sent.items()))
    yield "sent by a chip", kinds or "nothing"
    times = []
    if chip is not None:
        bound = roofline(usage, own, chip)
        parts = ", ".join(f"{what} {time:.4g}" for what, time in bound.times.items())
        yield "least time", f"{bound.seconds:.4g} s, bound by {bound.by} ({parts})"
        times.append((bound.seconds, "at most"))
    if seconds is not None:
        yield "measured time", f"{seconds:.4g} s"
        times.append((seconds, "measured"))
    for time, which in times:
        speed = program.images / time
        yield f"images/s, {which}", f"{speed:.4g}, {speed / chips:.4g} a chip"
        yield (
            f"TFLOP/s, {which}",
            f"{own / time / TERA:.4g} a chip"
            + (f", MFU {own / time / chip.flops:.1%}" if chip else ""),
        )
        if price is not None:
            bound = "at least" if which == "at most" else which
            yield f"million images, {bound}", f"{price * chips / 3600 / speed * 1e6:,.2f}"


if __name__ == "__main__":
    run(main)
