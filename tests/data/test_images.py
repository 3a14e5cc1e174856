"""Fast reading against full decoding, and sizes from headers."""

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data.images import fit, read_fitted, read_image, read_mask, read_shape


def photograph(width, height):
    """uint8 (height, width, 3): noise of every scale, as in photographs."""
    rng = np.random.default_rng(0)
    image = np.zeros((height, width, 3))
    for cells in (4, 16, 64, 256):
        noise = (rng.normal(size=(cells, cells, 3)) * 32 + 128).clip(0, 255).astype(np.uint8)
        scaled = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        image += (np.asarray(scaled) - 128.0) * 3 / np.sqrt(cells)
    return (image + 128).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [
        (512, 512, 256),
        (768, 512, 256),
        (513, 700, 256),
        (1024, 1025, 256),
        (2000, 1500, 100),
        (511, 512, 256),
        (640, 480, 256),
        (300, 200, 256),
        (4001, 130, 16),
    ],
)
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_is_read_as_if_decoded_whole(tmp_path, width, height, size, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.jpg"
    Image.fromarray(photograph(width, height)).save(path, quality=90, exif=exif)
    whole = read_image(path)
    square, shape = read_fitted(path, (size, size))
    assert square.shape == (size, size, 3) and shape == whole.shape[:2] == read_shape(path)
    difference = np.abs(square.astype(int) - fit(whole, (size, size)))
    assert difference.mean() < 2
    if min(width, height) < 2 * size:
        assert difference.max() == 0


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_jpegs(tmp_path, mode):
    path = tmp_path / "a.jpg"
    Image.fromarray(photograph(128, 128)).convert(mode).save(path, quality=95)
    expected = fit(read_image(path), (64, 64)).astype(int)
    assert np.abs(read_fitted(path, (64, 64))[0] - expected).mean() < 2


def test_other_formats_are_decoded_whole(tmp_path):
    for name in ("a.png", "a.webp", "a.bmp"):
        Image.fromarray(photograph(128, 96)).save(tmp_path / name)
        square, shape = read_fitted(tmp_path / name, (32, 32))
        assert shape == (96, 128)
        np.testing.assert_array_equal(square, fit(read_image(tmp_path / name), (32, 32)))


def test_a_truncated_jpeg_raises(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(photograph(128, 96)).save(path)
    path.write_bytes(path.read_bytes()[:-500])
    assert read_shape(path) == (96, 128)
    with pytest.raises(OSError, match="truncated"):
        read_fitted(path, (32, 32))


@pytest.mark.parametrize("file", ["a.jpg", "a.png", "a.webp", "a.tif", "a.avif", "a.mpo"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_from_headers_are_upright(tmp_path, file, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 20)).save(tmp_path / file, exif=exif)
    shape = (40, 20) if orientation >= 5 else (20, 40)
    assert read_shape(tmp_path / file) == read_image(tmp_path / file).shape[:2] == shape
    assert read_fitted(tmp_path / file, (8, 8))[1] == shape


def _layer(mode, colour):
    """Twice as wide as high: nothing on the left, `colour` on the right."""
    picture = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    picture.paste(colour, (4, 0, 8, 4))
    return picture if mode == "RGBA" else picture.convert(mode)


@pytest.mark.parametrize("picture, right", [
    (_layer("L", (255, 255, 255, 255)), 255),
    (_layer("1", (255, 255, 255, 255)), 255),
    (_layer("RGB", (255, 255, 255, 255)), 255),
    (_layer("RGB", (128, 128, 128, 255)), 128),
    (_layer("RGB", (255, 0, 0, 255)), 76),  # luminance
    (_layer("RGB", (255, 255, 255, 255)).convert("P"), 255),
    (_layer("RGB", (255, 255, 255, 255)).convert("CMYK"), 255),
    (_layer("RGB", (255, 255, 255, 255)).convert("RGBA"), 255),  # opaque all over
    (_layer("RGBA", (255, 255, 255, 255)), 255),
    (_layer("RGBA", (0, 0, 0, 255)), 255),  # black paint on a layer is paint
    (_layer("RGBA", (255, 0, 0, 128)), 128),
    (_layer("LA", (20, 20, 20, 200)), 200),
], ids=lambda v: getattr(v, "mode", v))  # fmt: skip
def test_masks_are_read_as_they_are_meant(tmp_path, picture, right):
    path = tmp_path / ("mask.tif" if picture.mode == "CMYK" else "mask.png")
    picture.save(path)
    mask = read_mask(path)
    assert mask.shape == (4, 8) and mask.dtype == np.uint8
    assert (mask[:, :4] == 0).all() and (np.abs(mask[:, 4:].astype(int) - right) <= 1).all()


def test_a_mask_of_sixteen_bits_is_read(tmp_path):
    grey = np.zeros((4, 8), np.uint16)
    grey[:, 4:] = 257 * 128
    Image.fromarray(grey).save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png").tolist() == [[0] * 4 + [128] * 4] * 4
