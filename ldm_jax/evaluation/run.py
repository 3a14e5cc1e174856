"""A model measured once, or again and again with other settings."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from ldm_jax.data.conditions import make_conditions
from ldm_jax.data.scenes import SceneSource
from ldm_jax.data.sources import WITH_PATH, Source, open_source
from ldm_jax.diffusion.plan import Guidance, Sampling
from ldm_jax.evaluation.drawing import (
    Drawn,
    check_captions,
    drawn_metrics,
    needed,
    real_pictures,
    scene_metrics,
)
from ldm_jax.interop.opening import open_any
from ldm_jax.loading import load
from ldm_jax.metrics.clip_score import ClipScore, load_clip
from ldm_jax.metrics.extractors import hash_of, load_extractor
from ldm_jax.metrics.image import WINDOW, scales_of
from ldm_jax.metrics.lpips import load_lpips
from ldm_jax.metrics.reconstruction import codebook_entries, reconstruction_quality
from ldm_jax.metrics.reference import Reference, describe, read_statistics
from ldm_jax.models.build import make_autoencoder
from ldm_jax.pictures import to_signed, to_unit
from ldm_jax.pipeline import Pipeline
from ldm_jax.version import __version__

INTERVALS = (
    "95 %, for another draw of as many pictures: Wilson's of shares; of fd and kid 1.96 standard "
    "errors; of recall and coverage by random halves; of others the bootstrap's"
)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A model and what it is compared with; `measure` draws.

    Attributes:
      quality: metrics of the autoencoder.
      protocol: what holds for every drawing.
    """

    pipe: Pipeline | None
    training: Source | None
    held_out: Source
    quality: dict[str, Any]
    protocol: dict[str, Any]
    count: int | None
    conditions: tuple = ()
    extract: Any = None
    reference: Reference | None = None
    real: Any = None
    clip: ClipScore | None = None

    def measure(
        self,
        guidance: float | None = None,
        steps: int | None = None,
        seed: int = 0,
        sampler: str | Sampling | None = None,
    ) -> tuple[dict[str, Any], np.ndarray | None]:
        """As `evaluate`, with these settings."""
        protocol, drawn = dict(self.protocol), Drawn({}, None, {}, {}, [])
        if self.pipe is not None:
            own = self.pipe.config["sampling"]
            steps = own.get("steps", 50) if steps is None else steps
            asked = dict(guidance=guidance, steps=steps, seed=seed, sampler=sampler)
            options = dict(extract=self.extract, reference=self.reference, clip=self.clip)
            if self.real is None:
                drawn = scene_metrics(
                    self.pipe, self.held_out, self.count, self.conditions, **options, **asked
                )
            else:
                drawn = drawn_metrics(
                    self.pipe, self.training, self.count, real=self.real, **options, **asked
                )
            sampling = Sampling.of(sampler, own)
            protocol["drawing"] = {
                "count": len(drawn.images),
                "image_size": list(drawn.images.shape[1:3]),
                "sampler": sampling.sampler,
                "steps": steps,
                "guidance": Guidance.of(guidance, own["guidance"]).scale,
                "seed": seed,
            }
            if sampling.cache_interval > 1:
                cache = dict(interval=sampling.cache_interval, branch=sampling.cache_branch)
                protocol["drawing"]["cache"] = cache
        protocol |= drawn.about
        if drawn.notes:
            protocol["notes"] = drawn.notes
        metrics = self.quality | drawn.metrics
        if drawn.intervals:
            metrics["intervals"] = {k: list(v) for k, v in drawn.intervals.items()}
            protocol["intervals"] = INTERVALS
        return metrics | {"protocol": protocol}, drawn.images


def evaluate(
    model: str | Path = "",
    source: str = "",
    path: str = "",
    count: int | None = None,
    guidance: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    sampler: str | None = None,
    extractor: str = "",
    resize: str = "",
    reference: str = "",
    lpips: str = "",
    clip: str = "",
) -> tuple[dict[str, Any], np.ndarray | None]:
    """Metrics of a model file or workdir ("": the bundled model).

    Those of `reconstruction_quality` of the autoencoder on held-out pictures of the source. For a
    model with a UNet also metrics of `count` pictures that it draws (0: none), and these pictures,
    uint8 (count, H, W, 3): `scene_metrics` if the source is "scenes" and the model is told
    anything, else `drawn_metrics`. Beside the numbers stand `intervals`, {name: [low, high]}, and
    `protocol`, what they were measured with.

    Args:
      source: what to compare with; "": the kind of data that the model was trained on.
      path: of that source; see `open_source`.
      count: None: 512, or as many as there are captions.
      guidance, steps, seed, sampler: of the drawing; None: the model's own.
      extractor, resize: see `load_extractor`.
      reference: a .npz file that stands for the pictures of the source in the Fréchet distance; see
        `read_statistics`.
      lpips: a file of LPIPS, or of its network and its heads, with a comma; see `load_lpips`.
      clip: a file or folder of CLIP, for `clip_score` of a model of captions; see `load_clip`.
    """
    drawing = dict(guidance=guidance, steps=steps, seed=seed, sampler=sampler)
    opened = open_evaluation(model, source, path, count, extractor, resize, reference, lpips, clip)
    return opened.measure(**drawing)


def open_evaluation(
    model: str | Path = "",
    source: str = "",
    path: str = "",
    count: int | None = None,
    extractor: str = "",
    resize: str = "",
    reference: str = "",
    lpips: str = "",
    clip: str = "",
) -> Evaluation:
    """What `evaluate` does before it draws. Arguments as there."""
    opened = open_any(model)
    config, params = opened.config, opened.params
    autoencoder = make_autoencoder(config["autoencoder"])
    size = config.get("image_size", autoencoder.resolution)
    own = config.get("data", {"source": "emoji"})
    chosen = own if source in ("", own["source"]) else {"source": source}
    if chosen["source"] in WITH_PATH and not path:
        raise ValueError(
            f"the pictures to compare with are of source {chosen['source']!r}: name them with "
            "--path, or choose --source=emoji or scenes"
        )
    data = ml_collections.ConfigDict(chosen | dict(path=path, image_size=size))

    @jax.jit
    def reconstruct(images):
        decoded = autoencoder.apply({"params": params["autoencoder"]}, to_signed(images))
        return to_unit(decoded)

    held_out = open_source(data, "held_out")
    if not len(held_out):
        raise ValueError(
            f"nothing is held out of {chosen['source']} (data.held_out={data.get('held_out', 0.0)} "
            "in training): name other pictures, with --source and --path"
        )
    if clip and (config["task"] != "diffusion" or count == 0):
        raise ValueError("--clip scores drawn pictures: it needs a diffusion model and a --count")
    scored = load_clip(clip) if clip else None
    perceptual = load_lpips(*lpips.split(",")) if lpips else None
    extract = load_extractor(extractor, resize) if extractor or resize else None
    entries = codebook_entries(autoencoder, params["autoencoder"])
    quality = reconstruction_quality(reconstruct, held_out, perceptual, extract, entries)
    about = dict(source=chosen["source"], path=path, image_size=size)
    protocol = {
        "version": __version__,
        "model": str(model) or "bundled",
        "reconstruction": about | dict(split="held_out", count=len(held_out)),
    }
    if size >= WINDOW:
        protocol["reconstruction"]["ms_ssim_scales"] = scales_of((1, size, size, 3))
    if lpips:
        protocol["reconstruction"]["lpips"] = hash_of(lpips.split(",")[0])
    if extract is not None:
        protocol["extractor"] = describe(extract)
    if config["task"] != "diffusion" or count == 0:
        return Evaluation(None, None, held_out, quality, protocol, count)
    pipe = load(model)
    if scored is not None:
        check_captions(pipe)
        protocol["clip"] = {k: getattr(scored, k) for k in ("name", "hash", "side", "length")}
    opened = Evaluation(pipe, None, held_out, quality, protocol, count, clip=scored)
    scenes = isinstance(held_out, SceneSource) and needed(pipe)
    if extractor or resize or reference or not scenes:
        extract = extract or load_extractor()
        protocol["extractor"] = describe(extract)
        stored = read_statistics(reference, extract) if reference else None
        opened = dataclasses.replace(opened, extract=extract, reference=stored)
    if scenes:
        conditions = tuple(make_conditions(data.get("conditions", {})))
        return dataclasses.replace(opened, conditions=conditions)
    training = open_source(data, "train")
    about = about | dict(split="train")
    real = real_pictures(training, held_out, opened.extract, about)
    return dataclasses.replace(opened, training=training, real=real)
