"""Pictures that a model draws for a set of real ones, and their metrics."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ldm_jax.conditions.kinds import SIZES
from ldm_jax.data.condition_kinds import Condition
from ldm_jax.data.conditions import check_conditions
from ldm_jax.data.loader import example_rng
from ldm_jax.data.scenes import SceneSource
from ldm_jax.data.sources import Source, sample
from ldm_jax.metrics.clip_score import ClipScore
from ldm_jax.metrics.distance import floor, frechet_distance
from ldm_jax.metrics.extractors import Extractor, load_extractor
from ldm_jax.metrics.intervals import (
    Interval,
    around,
    frechet_error,
    mean_interval,
    wilson,
)
from ldm_jax.metrics.manifold import inception_score, pair_metrics
from ldm_jax.metrics.moments import frechet_of_moments, moments_of
from ldm_jax.metrics.novelty import novelty
from ldm_jax.metrics.reference import CHUNK, Reference, measure
from ldm_jax.metrics.retrieval import caption_retrieval
from ldm_jax.metrics.scene_tasks import bicubic, judge, judge_with_intervals
from ldm_jax.pictures import to_uint8
from ldm_jax.pipeline import Pipeline
from ldm_jax.training.batches import Prepare

COUNT = 512
FEW_SPLITS = 10  # of the Inception score


class Drawn(NamedTuple):
    """Metrics of drawn pictures uint8 (count, H, W, 3), their 95 % intervals, what they were
    compared with, for the protocol, and sentences about numbers that mislead."""

    metrics: dict[str, float]
    images: np.ndarray | None
    intervals: dict[str, Interval]
    about: dict[str, Any]
    notes: list[str]


class Real(NamedTuple):
    """Features of all training pictures, with their names and labels, and of fresh ones."""

    reference: Reference
    names: list[str]
    labels: list[int]
    fresh: np.ndarray


def scene_metrics(
    pipe: Pipeline,
    source: SceneSource,
    count: int | None = None,
    conditions: Sequence[Condition] = (),
    extract: Extractor | None = None,
    reference: Reference | None = None,
    clip: ClipScore | None = None,
    **asked: Any,
) -> Drawn:
    """Draws the first `count` scenes of `source` from what the model is told of them, and judges
    the pictures by `ldm_jax.metrics.scene_tasks`.

    The metrics hold those of the scenes themselves too, `real_…`, which is what the judge can
    reach; with an extractor those of `set_metrics` beside the scenes, or the `reference`, and of
    enlarged pictures `drawn_feature_distance` from the real ones, beside that of bicubic ones; and
    with a `clip` those of `with_caption_scores`.
    `conditions` make the entries that the model needs and a scene has not; `asked` is as in
    `drawn_metrics`.

    Raises:
      ValueError: the source has fewer scenes, or nothing makes an entry.
    """
    count = min(COUNT, len(source)) if count is None else count
    if count > len(source):
        raise ValueError(f"count={count}: there are {len(source)} held-out scenes")
    told = needed(pipe)
    check_conditions(conditions, {e.name: e.needs for e in pipe.model.embedders}, "scenes")
    prepare = Prepare((), conditions)
    examples = [prepare(source[i], example_rng(0, i)) for i in range(count)]
    pictures = _draw(pipe, source, examples, **asked)
    real = np.stack([example["image"] for example in examples])
    scenes = [source.scene(i) for i in range(count)]
    seed = asked.get("seed", 0)
    metrics, intervals = judge_with_intervals(pictures, told, examples, scenes, source, seed)
    best = judge(real, told, examples, scenes, source)
    metrics |= {f"real_{name}": value for name, value in best.items()}
    about: dict[str, Any] = {"scenes": {"split": "held_out", "count": count}}
    notes: list[str] = []
    if extract is not None:
        if reference is None:
            reference = measure(extract, real, {"source": "scenes", "split": "held_out"})
        _, more, more_intervals, notes = set_metrics(pictures, extract, reference, seed)
        metrics, intervals = metrics | more, intervals | more_intervals
        about["reference"] = reference.about
        if "low_resolution" in told:
            enlarged = [bicubic(e["low_resolution"], e["image"].shape[1::-1]) for e in examples]
            for name, images in (("drawn", pictures), ("bicubic", np.stack(enlarged))):
                distances = feature_distances(extract, images, real)
                metrics[f"{name}_feature_distance"] = float(distances.mean())
                intervals[f"{name}_feature_distance"] = mean_interval(distances, seed=seed)
    drawn = Drawn(metrics, pictures, intervals, about, notes)
    return drawn if clip is None else with_caption_scores(drawn, clip, examples, seed)


def clip_metrics(
    pipe: Pipeline,
    source: Source,
    clip: ClipScore,
    count: int | None = None,
    conditions: Sequence[Condition] = (),
    **asked: Any,
) -> Drawn:
    """Draws one picture for the caption of each of `count` examples, evenly spaced in `source`,
    and scores them by `with_caption_scores`. `conditions` and `asked` as in `scene_metrics`.

    Raises:
      ValueError: the model is told no captions, or there are fewer than `count`.
    """
    check_captions(pipe)
    source, prepare = sample(source), Prepare((), conditions)
    count = min(COUNT, len(source)) if count is None else count
    check_count(source, count)
    examples = [prepare(source[i], example_rng(0, i)) for i in spaced(source, count)]
    drawn = Drawn({}, _draw(pipe, source, examples, **asked), {}, {}, [])
    return with_caption_scores(drawn, clip, examples, asked.get("seed", 0))


def check_captions(pipe: Pipeline) -> None:
    """Raises ValueError if the model is told no captions."""
    if "caption" not in (told := needed(pipe)):
        what = ", ".join(sorted(told)) or "nothing"
        raise ValueError(
            "clip_score compares pictures with the captions that they were drawn from, and this "
            f"model is told {what}"
        )


def with_caption_scores(
    drawn: Drawn, clip: ClipScore, examples: Sequence[dict[str, Any]], seed: int = 0
) -> Drawn:
    """With `clip_score`, the mean CLIP score of the drawn pictures and the captions of their
    examples; `real_clip_score`, that of the examples' own pictures; and a note if captions were
    cut."""
    captions = [example["caption"] for example in examples]
    scores = clip(drawn.images, captions)
    real = clip(np.stack([example["image"] for example in examples]), captions)
    metrics = {"clip_score": float(scores.mean()), "real_clip_score": float(real.mean())}
    return drawn._replace(
        metrics=drawn.metrics | metrics,
        intervals=drawn.intervals | {"clip_score": mean_interval(scores, seed=seed)},
        notes=drawn.notes + clip.cut(captions),
    )


def drawn_metrics(
    pipe: Pipeline,
    source: Source,
    count: int | None = None,
    held_out: Source = (),
    extract: Extractor | None = None,
    reference: Reference | None = None,
    real: Real | None = None,
    clip: ClipScore | None = None,
    **asked: Any,
) -> Drawn:
    """Draws one picture for the caption or label of each of `count` examples, evenly spaced in the
    training `source`, or `count` pictures of an unconditional model. `asked`: the guidance, steps,
    sampler and seed of the pictures, and `batch_size`.

    The metrics are those of `set_metrics`, of the drawn pictures against all of `source`, or FD
    against the `reference`; `fd_floor`, the FD between two halves of `source`; for captions,
    retrieval (`ldm_jax.metrics.retrieval`), and with a `clip` those of `with_caption_scores`; and,
    with pictures that are `held_out`, whether the drawn ones are new (`ldm_jax.metrics.novelty`).
    `real` is what `real_pictures` made of both.

    Raises:
      ValueError: the model has other conditions, none of the source's classes, or there are fewer
        captions than `count`.
    """
    told = needed(pipe)
    others = sorted(told - {"caption", "label"})
    if others:
        raise ValueError(
            f"pictures are drawn from captions, labels or nothing, and this model needs {others[0]}"
            " too: measure its autoencoder alone, --count=0"
        )
    extract = extract or load_extractor()  # first: it may be missing, and drawing takes minutes
    source = sample(source)
    count = min(COUNT, len(source)) if count is None else count
    if "caption" in told:
        check_count(source, count)
    if count < 2:
        raise ValueError(f"count={count}: the distances need two pictures or more")
    examples = [source[i] for i in spaced(source, count)]
    real = real or real_pictures(source, held_out, extract, {"split": "train"})
    pictures = _draw(pipe, source, examples, **asked)
    compared = reference or real.reference
    seed = asked.get("seed", 0)
    features, metrics, intervals, notes = set_metrics(pictures, extract, compared, seed)
    training = real.reference.features
    if reference is None:
        metrics["fd_floor"] = floor(training)
    if "caption" in told:
        rates = caption_retrieval(
            features,
            training,
            real.names,
            real.labels,
            [example["name"] for example in examples],
            [example["label"] for example in examples],
        )
        metrics |= rates
        intervals |= {k: wilson(round(v * count), count) for k, v in rates.items()}
    if len(real.fresh):
        metrics |= novelty(features, real.fresh, training)
        intervals["copied"] = wilson(round(metrics["copied"] * count), count)
    metrics = {name: float(value) for name, value in metrics.items()}
    drawn = Drawn(metrics, pictures, intervals, {"reference": compared.about}, notes)
    return drawn if clip is None else with_caption_scores(drawn, clip, examples, seed)


def check_count(source: Source, count: int) -> None:
    """Raises ValueError for more than there are."""
    if count > len(source):
        raise ValueError(
            f"count={count}: there are {len(source)} captions, with one picture each; choose "
            f"--count={len(source)} or fewer"
        )


def spaced(source: Source, count: int) -> np.ndarray:
    """Indices of so many examples, evenly spaced."""
    return np.linspace(0, len(source) - 1, count).round().astype(int)


def real_pictures(
    source: Source, held_out: Source, extract: Extractor, about: dict[str, Any]
) -> Real:
    """The features of all pictures that can be read, in chunks, and what `drawn_metrics` asks of
    them. `about`: of the source, for the protocol."""
    source, names, labels = sample(source), [], []

    def images():
        for i in range(len(source)):
            example = source[i]
            names.append(example["name"])
            labels.append(example["label"])
            yield example["image"]

    reference = measure(extract, images(), about)
    fresh = [extract(np.zeros((0, 1, 1, 3), np.uint8))]
    for start in range(0, len(held_out), CHUNK):
        stop = min(start + CHUNK, len(held_out))
        fresh.append(extract(np.stack([held_out[i]["image"] for i in range(start, stop)])))
    return Real(reference, names, labels, np.concatenate(fresh))


def feature_distances(extract: Extractor, images: np.ndarray, real: np.ndarray) -> np.ndarray:
    """(N,) distances between the features of each picture and of the real one."""
    return np.linalg.norm(extract(images) - extract(real), axis=1)


def set_metrics(
    pictures: np.ndarray, extract: Extractor, reference: Reference, seed: int = 0
) -> tuple[np.ndarray, dict[str, float], dict[str, Interval], list[str]]:
    """The features of drawn pictures, and how they as a set differ from the reference: `fd`, and
    where the reference has features, `kid`, `precision`, `recall`, `density` and `coverage`; with
    logits of classes `inception_score` and its deviation over ten parts, `inception_score_sd`.

    Returns features, metrics, intervals and notes.
    """
    features, logits = extract.measure(pictures)
    real, notes = reference.features, []
    if real is None:
        fd = frechet_of_moments(moments_of([features]), reference.moments)
    else:
        fd = frechet_distance(features, real)
    metrics = {"fd": fd}
    intervals = {"fd": around(fd, frechet_error(features, reference.moments, seed=seed), 0.0)}
    for what, count in (("drawn", len(features)), ("reference", reference.moments.count)):
        if 0 < count <= extract.width:
            notes.append(
                f"fd is of {count} {what} pictures and {extract.width} features: with fewer "
                "pictures than features it is far above that of many, and comparable only with one "
                "of as many"
            )
    if np.ptp(features, axis=0).max() < 1e-6 * max(1.0, float(np.abs(features).max())):
        notes.append("all drawn pictures have the same features: they are empty or alike")
    if "unknown" in reference.about:
        notes.append(f"the reference {reference.about['file']}: {reference.about['unknown']}")
    if real is not None:
        more, their_intervals = pair_metrics(features, real, seed=seed)
        metrics, intervals = metrics | more, intervals | their_intervals
    if logits is not None and len(logits) >= FEW_SPLITS:
        metrics["inception_score"], metrics["inception_score_sd"] = inception_score(logits)
    return features, metrics, intervals, notes


def needed(pipe: Pipeline) -> set[str]:
    """The entries of an example that the model is told, but for sizes, which have defaults."""
    entries = {entry for embedder in pipe.model.embedders for entry in embedder.needs}
    return entries - SIZES.keys()


def _draw(
    pipe: Pipeline,
    source: Source,
    examples: list[dict[str, Any]],
    guidance: float | None = None,
    steps: int = 50,
    seed: int = 0,
    sampler: str | None = None,
    batch_size: int = 64,
) -> np.ndarray:
    """One picture for each example, uint8 (N, H, W, 3)."""
    told, images = needed(pipe), []
    drawing = dict(guidance=guidance, steps=steps, sampler=sampler)
    for start in tqdm(range(0, len(examples), batch_size), unit="batch", dynamic_ncols=True):
        batch = examples[start : start + batch_size]
        batch += batch[-1:] * (batch_size - len(batch))
        asked = {}
        if "caption" in told:
            asked["prompt"] = [example["caption"] for example in batch]
        if "label" in told:
            names = source.classes if pipe.classes else range(len(source.classes))
            asked["labels"] = [names[example["label"]] for example in batch]
        arrays = {
            entry: np.stack([example[entry] for example in batch])
            for entry in sorted(told - {"caption", "label"})
        }
        if "mask" in arrays:
            asked |= {"image": arrays.pop("image"), "mask": arrays.pop("mask")[..., 0]}
        asked |= {"conditions": arrays} if arrays else {}
        asked |= {} if asked.keys() & {"prompt", "labels"} else {"n": batch_size}
        images.append(pipe(**asked, **drawing, seed=seed + start))
    return to_uint8(np.concatenate(images)[: len(examples)])
