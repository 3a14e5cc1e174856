"""What drawn pictures are compared with: the features of a set of pictures, or their statistics.

Statistics are a .npz file: `mu` (D,), `sigma` (D, D), as in pytorch-fid, clean-fid and ADM's
reference batches, and of ours also `protocol`, JSON text that says of what they are. A file with
pictures, `arr_0` uint8 (N, H, W, 3), as in ADM's batches too, is measured anew.
"""

import dataclasses
import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.metrics.extractors import Extractor, hash_of
from ldm_jax.metrics.moments import Moments, moments_of

CHUNK = 256  # pictures in memory at once


@dataclasses.dataclass(frozen=True)
class Reference:
    """Moments of features, what they are of, `about`, for the protocol, and the features (N, D)
    themselves, or None where a file holds the moments alone."""

    moments: Moments
    about: dict[str, Any]
    features: np.ndarray | None = None


def describe(extract: Extractor) -> dict[str, Any]:
    """The extractor in a protocol."""
    names = ("name", "hash", "resize", "side", "width")
    return {name: getattr(extract, name) for name in names}


def measure(
    extract: Extractor, images: Iterable[np.ndarray], about: dict[str, Any], keep: bool = True
) -> Reference:
    """The reference of pictures uint8 (H, W, 3), in chunks. `about` gets their count and hash, the
    first 16 digits of the SHA-256 of their bytes in order. `keep`: the features too.

    Raises:
      ValueError: fewer than two pictures.
    """
    digest, features, sizes = hashlib.sha256(), [], set()

    def blocks() -> Iterator[np.ndarray]:
        chunk = []
        for image in images:
            digest.update(np.ascontiguousarray(image).tobytes())
            sizes.add(image.shape[:2])
            if chunk and (len(chunk) == CHUNK or image.shape != chunk[0].shape):
                yield extract(np.stack(chunk))
                chunk = []
            chunk.append(image)
        if chunk:
            yield extract(np.stack(chunk))

    def kept() -> Iterator[np.ndarray]:
        for block in blocks():
            if keep:
                features.append(block)
            yield block

    try:
        moments = moments_of(kept())
    except ValueError as error:
        if "two pictures or more" in str(error):
            raise ValueError(f"a reference needs two pictures or more: {about}") from error
        raise
    size = [list(size) for size in sorted(sizes)]
    about = about | {"count": moments.count, "hash": digest.hexdigest()[:16]}
    about |= {"image_size": size[0] if len(size) == 1 else size[:1] + ["…"] + size[-1:]}
    return Reference(moments, about, np.concatenate(features) if keep else None)


def write_statistics(path: str | os.PathLike, reference: Reference, extract: Extractor) -> None:
    """Writes the moments and their protocol; whole or not at all."""
    protocol = {"reference": reference.about, "extractor": describe(extract)}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        np.savez(
            file,
            mu=reference.moments.mean,
            sigma=reference.moments.covariance,
            protocol=json.dumps(protocol),
        )
    os.replace(part, path)


def read_statistics(path: str | os.PathLike, extract: Extractor) -> Reference:
    """The reference in a .npz file, which must be of the extractor's network and resize.

    A file that does not say of which it is must have its width, and `about` says what it lacks.

    Raises:
      FileNotFoundError: no such file.
      ValueError: another file, extractor, resize or width; values that are not finite.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, where a reference .npz was expected")
    about = {"file": path.name, "file_hash": hash_of(path)}
    try:
        # No pickles: a reference is somebody else's file.
        stored = np.load(path, allow_pickle=False)
        arrays = {k: stored[k] for k in ("mu", "sigma", "protocol") if k in stored.files}
        if "mu" not in arrays and "arr_0" in stored.files:
            return _of_pictures(path, stored["arr_0"], extract, about)
    except (ValueError, OSError, zipfile.BadZipFile, AttributeError, EOFError) as error:
        if "arr_0" in str(error):
            raise
        raise ValueError(f"{path} is no .npz file of statistics: {error}") from error
    if not {"mu", "sigma"} <= arrays.keys():
        raise ValueError(f"{path} holds {stored.files}: expected mu and sigma, or arr_0")
    mean, covariance = (np.asarray(arrays[k], np.float64) for k in ("mu", "sigma"))
    width = extract.width
    if mean.shape != (width,) or covariance.shape != (width, width):
        raise ValueError(
            f"{path} is of features {mean.shape} and {covariance.shape}, and {extract.name} makes "
            f"{width}: it is a reference of another extractor"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{path} holds NaN or infinite values")
    if "protocol" not in arrays:
        about["unknown"] = "the file says neither its extractor nor its resize nor its count"
        return Reference(Moments(0, mean, covariance), about)
    protocol = json.loads(str(arrays["protocol"]))
    own = describe(extract)
    for field in ("name", "hash", "resize"):
        if protocol["extractor"][field] != own[field]:
            raise ValueError(
                f"{path} was made with extractor {field} {protocol['extractor'][field]!r}, and "
                f"this one has {own[field]!r}: their distances mean nothing; make the statistics "
                "anew with python -m ldm_jax.statistics"
            )
    about |= protocol["reference"]
    return Reference(Moments(about["count"], mean, covariance), about)


def _of_pictures(path: Path, images: np.ndarray, extract: Extractor, about: dict) -> Reference:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"{path}: arr_0 is {images.dtype} {images.shape}, expected pictures uint8 (N, H, W, 3)"
        )
    return measure(extract, images, about)
