"""Data sets of a few tiny pictures of noise, in the forms that `ldm_jax.prepare` reads."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image


def picture(seed, size=(16, 12)):
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def encoded(seed, size=(16, 12), format="PNG"):
    file = io.BytesIO()
    picture(seed, size).save(file, format)
    return file.getvalue()


def save(path, seed, size=(16, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, size).save(path)


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            content = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_parquet(path, columns, **kwargs):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path, **kwargs)
