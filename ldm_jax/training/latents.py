"""The moments of pictures' latents: encoded once and kept in memory, read from shards on a disk, or
encoded in each step."""

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from ldm_jax.data.condition_kinds import Condition, Sizes
from ldm_jax.data.conditions import check_files
from ldm_jax.data.latent_shards import CachedSource, read_options
from ldm_jax.data.loader import batches_once
from ldm_jax.data.moment_tars import TarMoments, find_tars
from ldm_jax.data.sources import open_source
from ldm_jax.data.text_files import printable
from ldm_jax.data.whole_files import OPTIONS
from ldm_jax.diffusion.noise import Examples, per_example
from ldm_jax.models.build import Autoencoder, make_autoencoder
from ldm_jax.pictures import to_signed
from ldm_jax.runtime.mesh import spread, to_host
from ldm_jax.training.workdir import config_dict

log = logging.getLogger(__name__)
LATENTS = ("memory", "step", "shards")
IN_MEMORY = 2_000_000  # pictures
PICTURE_AUGMENTS = ("flip", "zoom", "shift", "color", "background", "unit_range")
OF_SHARDS = ("flip", "drop_tags", "shuffle_tags")  # the augmentations of what is stored
# What of `config.data` says which pictures a cache has.
OF_THE_DATA = ("source", "image_size", "classes", "held_out", "background")


def moments(autoencoder: Autoencoder, params: Any, images: jax.Array) -> jax.Array:
    """Posterior mean and log-variance (B, h, w, 2c), float32, of uint8 (B, H, W, 3).

    An autoencoder with one channel encodes the mean of the colours.
    """
    x = to_signed(images)
    if autoencoder.in_channels == 1:
        x = jnp.mean(x, axis=-1, keepdims=True)
    return jnp.concatenate(autoencoder.apply({"params": params}, x, method="moments"), axis=-1)


def sample_latents(
    autoencoder: Autoencoder,
    moments: jax.Array,
    key: jax.Array,
    examples: Examples | None = None,
) -> jax.Array:
    """Scaled latents (B, h, w, c) drawn from the posterior, each example's by its own key."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    noise = per_example(jax.random.normal, key, mean.shape, examples)
    return (mean + jnp.exp(0.5 * logvar) * noise) * autoencoder.scale_factor


class LatentSource(Sequence):
    """A source whose examples also have `moments`, (h, w, 2c) float32, which are computed once.

    The first access to `moments` computes them; access them before several threads read. With
    `pixels` the pictures are read as well, for conditions that are made from them; without, no
    picture is decoded, and captions can still be augmented.
    """

    latents = True

    def __init__(self, source: Any, autoencoder: Autoencoder, params: Any, pixels: bool):
        self._autoencoder, self._params = autoencoder, params
        self.classes = source.classes
        self.left_out, self.lost_captions = source.left_out, source.lost_captions
        self.pictures, self._pixels = source, pixels

    @functools.cached_property
    def moments(self) -> np.ndarray:
        """The moments of all pictures, (N, h, w, 2c); the first access encodes them."""
        if len(self):
            log.info("Encoding %d pictures once", len(self))
        encode = jax.jit(lambda params, images: moments(self._autoencoder, params, images))
        encoded = [
            to_host(encode(self._params, spread(batch["image"])))[batch["valid"]]
            for batch in batches_once(self.pictures, 32, entries=("image",))
        ]
        return np.concatenate(encoded) if encoded else np.zeros(0, np.float32)

    def __len__(self) -> int:
        return len(self.pictures)

    def describe(self, index: int) -> dict[str, Any]:
        """As the source's."""
        return self.pictures.describe(index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rest = self.pictures[index] if self._pixels else self.pictures.describe(index)
        return rest | {"moments": self.moments[index]}


def check_latents(config: Any) -> None:
    """Checks `config.latents` beside the settings that it excludes, before anything is read.

    Raises:
      ValueError: names the setting, and what to choose.
    """
    how = config.latents
    if how not in LATENTS:
        raise ValueError(f"latents={how!r}: choose one of {', '.join(LATENTS)}")
    if how == "step":
        return
    names = [str(name).partition(":")[0] for name in config.data.augment]
    pictures = [name for name in names if name in PICTURE_AUGMENTS]
    if pictures and how == "memory":
        raise ValueError(
            f"data.augment: {', '.join(pictures)} would change the pictures, but latents='memory' "
            "encodes each once; use latents='step', or augment captions only"
        )
    if config.data.get("buckets"):
        raise ValueError(
            f"data.buckets: latents={how!r} keeps latents of one shape; use latents='step'"
        )
    if how == "memory":
        return
    others = [name for name in names if name not in OF_SHARDS]
    if others:
        raise ValueError(
            f"data.augment: {', '.join(others)} needs more than latents='shards' has of a picture, "
            f"which allows {', '.join(OF_SHARDS)}; use latents='step'"
        )
    if config.get("prior") and config.prior.prompt:
        raise ValueError("prior.prompt draws few pictures: use latents='memory' in place of shards")
    if not config.get("cache"):
        raise ValueError(
            "latents='shards' needs cache=PATH: a folder that python -m ldm_jax.cache wrote, or "
            "one of tars with moments"
        )


def stored_sources(
    config: Any,
    section: dict[str, Any],
    params: Any,
    conditions: Sequence[Condition],
    needs: Sequence[str],
    index: Path | None,
) -> tuple[Any, Any]:
    """The training and the held-out examples of `config.cache`, with their moments.

    Args:
      section, params: of the autoencoder, to which the moments must belong.
      needs: the entries of a batch that the model's embedders read.
      index: the file that stores the findings in a folder of pictures between starts.

    Raises:
      ValueError: the cache is another one's, not finished or not whole; or something is needed that
        it has not.
      FileNotFoundError: a condition's files are not beside the pictures.
    """
    pixels = "image" in needs or not all(isinstance(c, Sizes) for c in conditions)
    data, path = config.data, config.cache
    if not Path(path).expanduser().joinpath(OPTIONS).exists() and (tars := find_tars(path)):
        _check_tars(config, conditions, needs)
        where = index and index.with_name(index.name.replace("pictures.json", "moments.npz"))
        arguments = tars, moments_shape(section, data.image_size)
        return tuple(
            TarMoments(*arguments, split, data.get("held_out", 0.1), where)
            for split in ("train", "held_out")
        )
    _check_cache(config, section, params)
    sources = tuple(
        CachedSource(path, split, functools.partial(open_source, data, split, index), pixels)
        for split in ("train", "held_out")
    )
    if pixels:
        for source in sources:
            check_files(conditions, source.pictures)
    return sources


def _check_tars(config: Any, conditions: Sequence[Condition], needs: Sequence[str]) -> None:
    """Refuses what tars of moments have not: pictures, and mirror images."""
    made = [f"data.conditions.{c.name} is" for c in conditions]
    made += ["a condition of this model is"] * ("image" in needs)
    if made:
        raise ValueError(
            f"{made[0]} made of a picture, and {config.cache} has moments and captions alone"
        )
    if "flip" in config.data.augment:
        raise ValueError(f"data.augment: {config.cache} has no moments of mirror images")
    for name in ("distance", "novelty"):
        if config.get("evaluators", {}).get(name, {}).get("every"):
            raise ValueError(
                f"evaluators.{name} compares with pictures, and {config.cache} has none: use "
                "clip_score, or 0 for every"
            )


def _check_cache(config: Any, section: dict[str, Any], params: Any) -> None:
    """Refuses a cache of other data or of another autoencoder."""
    options, shown = read_options(config.cache), printable(config.cache)
    for name, value in data_facts(config.data).items():
        if (there := options["data"].get(name)) != value:
            raise ValueError(
                f"{shown} was made with data.{name}={there}, and the config has {value}: give the "
                "same, or make another cache"
            )
    if options["autoencoder"] != autoencoder_fingerprint(section, params):
        raise ValueError(
            f"{shown} has latents of another autoencoder than this model's: name the one that it "
            "was made with, first_stage=PATH, or make another cache"
        )
    if "flip" in config.data.augment and not options["flips"]:
        raise ValueError(
            f"data.augment: {shown} was made with --noflips, so it has no mirror images: make "
            "another cache"
        )


def data_facts(data: Any) -> dict[str, Any]:
    """What of `config.data` decides which pictures a source gives, as plain values."""
    plain = config_dict(data)
    facts = {name: plain[name] for name in OF_THE_DATA if name in plain}
    if "scenes" in plain["source"].split("+"):
        facts["scenes"] = plain["scenes"]
    return facts


def moments_shape(section: dict[str, Any], image_size: int) -> tuple[int, int, int]:
    """(h, w, 2c) of the moments of a square."""
    autoencoder = make_autoencoder(section)
    side = image_size // autoencoder.downsampling
    return side, side, 2 * autoencoder.embed_dim


def fingerprint(about: Any, params: Any) -> str:
    """SHA-256 of plain values and of a network's parameters."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for path, leaf in sorted(flatten_dict(params or {}, sep="/").items()):
        array = np.ascontiguousarray(leaf, np.float32)
        digest.update(f"{path} {array.shape}".encode())
        digest.update(array)
    return digest.hexdigest()


def autoencoder_fingerprint(section: dict[str, Any], params: Any) -> str:
    """`fingerprint` of an autoencoder; fields that a section leaves out have their defaults."""
    module = make_autoencoder(section)
    names = {field.name for field in dataclasses.fields(module)}
    about = {name: getattr(module, name) for name in names - {"parent", "name", "dtype", "remat"}}
    return fingerprint([type(module).__name__, about], params)
