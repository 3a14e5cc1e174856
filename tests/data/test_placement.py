"""Files beside a picture are transformed like its pixels."""

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data.images import fit
from ldm_jax.data.placement import Placement
from ldm_jax.data.transforms import TRANSFORMS


def smooth(height, width):
    """A picture that looks the same however it is resampled: a plane of colours."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return np.stack([255 * x, 255 * y, 127 + 60 * x], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("size", [(40, 64), (64, 40), (48, 48), (97, 33)])
def test_a_map_of_the_file_follows_the_fitted_picture(size):
    image = smooth(*size)
    where = Placement.centre(size, (32, 32))
    assert where.size == (32, 32) and min(where.resized) == 32
    fitted = fit(image, (32, 32))
    brought = where.apply(image[..., 0], smooth=True)
    inner = (slice(2, -2),) * 2
    assert np.abs(fitted[..., 0][inner].astype(int) - brought[inner]).max() <= 6


@pytest.mark.parametrize("name", ["flip", "shift", "zoom"])
@pytest.mark.parametrize("seed", range(6))
def test_a_map_follows_every_augmentation(name, seed):
    size = (64, 96)
    image = smooth(*size)
    example = {"image": fit(image, (32, 32)), "placement": Placement.centre(size, (32, 32))}
    moved = TRANSFORMS[name](example, np.random.default_rng(seed))
    where = moved["placement"]
    assert where.size == moved["image"].shape[:2]
    brought = where.apply(image[..., 0], smooth=True)
    rows, columns = (
        (np.arange(n) + c >= 3) & (np.arange(n) + c < r - 3)
        for n, c, r in zip(where.size, where.corner, where.resized, strict=True)
    )
    inside = np.ix_(rows, columns)
    # A shift shows what the crop had left out, the repeated edge, not the file: compare within.
    if name == "flip":
        assert np.abs(moved["image"][..., 0][inside].astype(int) - brought[inside]).max() <= 9
    else:
        difference = np.abs(moved["image"][..., 0].astype(int) - brought)[inside]
        assert np.median(difference) <= 9


def test_flipping_twice_is_nothing():
    where = Placement.centre((50, 81), (32, 32))
    assert where.flipped().flipped() == where
    assert where.flipped().mirrored


def test_boxes_follow():
    """A box around the middle of a file twice as wide as high, cropped to its centre square."""
    where = Placement.centre((32, 64), (32, 32))
    box = np.array([[0.5, 0.25, 0.75, 0.75]])
    np.testing.assert_allclose(where.boxes(box), [[0.5, 0.25, 1.0, 0.75]])
    np.testing.assert_allclose(where.flipped().boxes(box), [[0.0, 0.25, 0.5, 0.75]])
    np.testing.assert_allclose(where.moved(8, 0).boxes(box), [[0.5, 0.0, 1.0, 0.5]])
    np.testing.assert_allclose(where.scaled((64, 64)).boxes(box), where.boxes(box))


def test_nearest_keeps_labels_and_outside_is_filled():
    labels = np.arange(4, dtype=np.int32).reshape(2, 2) * 50
    where = Placement.centre((2, 2), (4, 4)).moved(-1, 0)
    out = where.apply(labels, smooth=False, outside=7)
    assert set(out[1:].ravel()) <= {0, 50, 100, 150} and (out[0] == 7).all()
    repeated = where.apply(labels, smooth=False)
    assert (repeated[0] == repeated[1]).all()


def test_sources_give_the_placement_of_their_pictures(tmp_path):
    from ml_collections import ConfigDict

    from ldm_jax.data.sources import open_source

    Image.fromarray(smooth(40, 64)).save(tmp_path / "a.png")
    config = ConfigDict(dict(source="folder", path=str(tmp_path), image_size=32, held_out=0.0))
    (example,) = [open_source(config, "train")[0]]
    assert example["placement"] == Placement.centre((40, 64), (32, 32))
    emoji = open_source(ConfigDict(dict(source="emoji", image_size=32)), "held_out")[0]
    assert emoji["placement"] == Placement.centre((64, 64), (32, 32))
