"""Moments in tars: read where they lie, by an index that is made once, and refused."""

import io
import os
import pickle
import tarfile

import numpy as np
import pytest

from ldm_jax.data import moment_tars
from ldm_jax.data.moment_tars import TarMoments, find_tars
from ldm_jax.data.sources import sample
from tests.tiny_data_sets import write_tar

SHAPE = (2, 3, 8)  # of the moments, NHWC


def moments(seed, shape=(8, 2, 3), dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Two tars, the samples of which have their members in another order, and more of them."""
    write_tar(
        tmp_path / "00000.tar",
        {
            "000000.npy": npy(moments(0)),
            "000000.txt": " a dog\n",
            "000000.json": "{}",
            "000001.txt": "a cat",
            "000001.npy": npy(moments(1)),
            "000002.txt": "without",
            "deep/000003.npy": npy(moments(3)[None].astype(np.float16)),
        },
    )
    write_tar(tmp_path / "00001.tar", {"000010.npy": npy(moments(10)), "000010.txt": b"\xff no"})
    return tmp_path


def read(folder, split="all", **options):
    return TarMoments(find_tars(folder), SHAPE, split, **options)


def test_samples_are_what_was_written(folder):
    source = read(folder)
    known = [source.describe(i) for i in range(len(source))]
    assert [k["name"] for k in known] == [
        "00000.tar/000000", "00000.tar/000001", "00000.tar/deep/000003", "00001.tar/000010"
    ]  # fmt: skip
    assert [k["caption"] for k in known] == ["a dog", "a cat", "", "\ufffd no"]
    assert source.left_out == {"no moments": 1} and source.classes == ("",)
    for i, seed in enumerate((0, 1, 3, 10)):
        found = np.asarray(source[i]["moments"])
        expected = moments(seed).transpose(1, 2, 0)
        assert found.dtype == np.float32 and found.shape == SHAPE
        np.testing.assert_allclose(found, expected, atol=0 if seed != 3 else 2e-3)
    assert source[-1]["caption"] == "\ufffd no"
    with pytest.raises(IndexError):
        source[4]
    again = pickle.loads(pickle.dumps(source))  # as worker processes get it
    np.testing.assert_array_equal(again[1]["moments"], source[1]["moments"])
    assert len(sample(source, 2)) == 2  # not all captions are looked at


def test_the_index_is_made_once(folder, tmp_path, monkeypatch):
    index = tmp_path / "index.npz"
    first, second = read(folder, index=index), None
    with monkeypatch.context() as patch:
        patch.setattr(moment_tars, "_look_through", None)
        second = read(folder, index=index)
    assert [second.describe(i) for i in range(4)] == [first.describe(i) for i in range(4)]
    assert second.left_out == first.left_out
    write_tar(folder / "00002.tar", {"1.npy": npy(moments(1))})
    assert len(read(folder, index=index)) == 5
    index.write_bytes(b"no index")
    assert len(read(folder, index=index)) == 5


def test_splits_are_by_name(folder):
    splits = [read(folder, split, held_out=0.5) for split in ("train", "held_out")]
    names = [[s.describe(i)["name"] for i in range(len(s))] for s in splits]
    assert sorted(names[0] + names[1]) == [d["name"] for d in map(read(folder).describe, range(4))]
    assert names[0] and names[1]
    assert len(read(folder, "train", held_out=1.0)) == 4  # not none
    assert len(read(folder, "held_out", held_out=0.0)) == 0


def test_which_tars(folder):
    (folder / "sha512sums.txt").touch()
    both = [str(folder / name) for name in ("00000.tar", "00001.tar")]
    assert find_tars(folder) == find_tars(f"{folder}/0000*.tar") == find_tars(f"{folder}/*") == both
    assert find_tars(both[1]) == both[1:]
    assert find_tars(folder / "nothing") == []


def test_bad_tars_are_refused_in_a_sentence(folder, tmp_path):
    write_tar(tmp_path / "more" / "0.tar", {"1.jpg": b"", "1.txt": "a picture"})
    with pytest.raises(
        ValueError, match=r"0\.tar holds no moments: none of its members is a \.npy"
    ):
        read(tmp_path / "more")
    with pytest.raises(
        ValueError, match=r"tar/000000\.npy has the shape \(8, 2, 3\), .* are \(8, 4, 4\)"
    ):
        TarMoments(find_tars(folder), (4, 4, 8))
    path = folder / "00001.tar"
    write_tar(path, {"000010.npy": npy(moments(0)), "2.npy": b"no array"})
    with pytest.raises(ValueError, match=r"00001\.tar/2\.npy is no array of numbers: "):
        np.asarray(read(folder)[4]["moments"])
    source = read(folder)
    os.truncate(path, 700)
    with pytest.raises(
        ValueError, match=r"00001\.tar has become shorter: 00001\.tar/000010 is cut"
    ):
        np.asarray(source[3]["moments"])
    with pytest.raises(
        ValueError, match=r"00001\.tar is damaged or truncated \(.*\): get it again"
    ):
        read(folder)
    path.write_bytes(b"<html>" * 1000)
    with pytest.raises(
        ValueError, match=r"00001\.tar is damaged or truncated \(.*\): get it again"
    ):
        read(folder)


def test_a_tar_of_another_program(tmp_path):
    """Long names and other headers, as of GNU's and of POSIX' tar."""
    for number, kind in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        with tarfile.open(tmp_path / f"{number}.tar", "w", format=kind) as tar:
            info = tarfile.TarInfo(f"{'é' * 120}.npy")
            info.size = len(content := npy(moments(number)))
            tar.addfile(info, io.BytesIO(content))
    source = read(tmp_path)
    for number in (0, 1):
        assert source.describe(number)["name"] == f"{number}.tar/{'é' * 120}"
        expected = moments(number).transpose(1, 2, 0)
        np.testing.assert_array_equal(source[number]["moments"], expected)
