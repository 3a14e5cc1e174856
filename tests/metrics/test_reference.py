"""References in files: what is read of ours and others', and what is refused."""

import dataclasses

import numpy as np
import pytest

from ldm_jax.metrics.extractors import Extractor
from ldm_jax.metrics.reference import measure, read_statistics, write_statistics


def means(params, images):
    """Three features of a picture: the means of its channels."""
    return (images.mean(axis=(1, 2)),)


EXTRACT = Extractor("means", "0123456789abcdef", "cubic", 8, 3, False, means, None)
ABOUT = {"source": "folder", "path": "pictures", "split": "train"}


def pictures(count=9):
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)


def test_written_and_read(tmp_path):
    images = pictures()
    reference = measure(EXTRACT, images, ABOUT)
    assert reference.about["count"] == 9 and reference.about["image_size"] == [8, 8]
    np.testing.assert_allclose(reference.features, images.mean(axis=(1, 2)), rtol=1e-5)
    write_statistics(tmp_path / "ref.npz", reference, EXTRACT)
    found = read_statistics(tmp_path / "ref.npz", EXTRACT)
    np.testing.assert_array_equal(found.moments.covariance, reference.moments.covariance)
    assert found.features is None and found.moments.count == 9
    assert found.about.items() >= (ABOUT | {"hash": reference.about["hash"]}).items()
    assert found.about["file"] == "ref.npz"


def test_the_hash_is_of_the_pictures_in_order():
    images = pictures()
    hashes = [measure(EXTRACT, x, {}).about["hash"] for x in (images, images, images[::-1])]
    assert hashes[0] == hashes[1] != hashes[2]


def test_pictures_of_several_sizes():
    images = [*pictures(3), *np.zeros((2, 4, 4, 3), np.uint8)]
    about = measure(EXTRACT, images, {}).about
    assert about["count"] == 5 and about["image_size"] == [[4, 4], "…", [8, 8]]


def test_others_statistics(tmp_path):
    """pytorch-fid's, clean-fid's and ADM's have mu and sigma and no more about them."""
    mean, covariance = np.arange(3.0), np.eye(3)
    np.savez(tmp_path / "other.npz", mu=mean, sigma=covariance, mu_s=mean, sigma_s=covariance)
    found = read_statistics(tmp_path / "other.npz", EXTRACT)
    np.testing.assert_array_equal(found.moments.mean, mean)
    assert "neither its extractor nor its resize" in found.about["unknown"]


def test_a_batch_of_pictures(tmp_path):
    np.savez(tmp_path / "batch.npz", arr_0=pictures())
    found = read_statistics(tmp_path / "batch.npz", EXTRACT)
    assert found.features.shape == (9, 3) and found.about["count"] == 9
    np.savez(tmp_path / "grey.npz", arr_0=pictures()[..., 0])
    with pytest.raises(ValueError, match=r"arr_0 is uint8 \(9, 8, 8\), expected pictures uint8"):
        read_statistics(tmp_path / "grey.npz", EXTRACT)


@pytest.mark.parametrize(
    ("field", "value"), [("name", "other"), ("hash", "f" * 16), ("resize", "clean")]
)
def test_another_extractor_is_refused(tmp_path, field, value):
    write_statistics(tmp_path / "ref.npz", measure(EXTRACT, pictures(), ABOUT), EXTRACT)
    other = dataclasses.replace(EXTRACT, **{field: value})
    with pytest.raises(ValueError, match=f"made with extractor {field} .*this one has '{value}'"):
        read_statistics(tmp_path / "ref.npz", other)


def test_bad_files(tmp_path):
    path = tmp_path / "ref.npz"
    with pytest.raises(FileNotFoundError, match="does not exist, where a reference .npz"):
        read_statistics(path, EXTRACT)
    path.write_text("no statistics")
    with pytest.raises(ValueError, match="is no .npz file of statistics"):
        read_statistics(path, EXTRACT)
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(3))
    with pytest.raises(ValueError, match=r"features \(2048,\).* means makes 3: .*another"):
        read_statistics(path, EXTRACT)
    np.savez(path, mu=np.full(3, np.nan), sigma=np.eye(3))
    with pytest.raises(ValueError, match="NaN"):
        read_statistics(path, EXTRACT)
    np.savez(path, means=np.zeros(3))
    with pytest.raises(ValueError, match="expected mu and sigma, or arr_0"):
        read_statistics(path, EXTRACT)
    with pytest.raises(ValueError, match="a reference needs two pictures or more: .*folder"):
        measure(EXTRACT, pictures(1), ABOUT)
