"""Folders of pictures: every kind of file, good and bad, and where classes and captions are."""

import json
import logging

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from ldm_jax.data.images import fit_square, read_image
from ldm_jax.data.sources import FolderSource, open_source


def save(path, color=(200, 100, 50), size=(16, 16), mode="RGB", **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **kwargs)


def folder(path, split="all", **kwargs):
    return FolderSource(path, split, image_size=16, **kwargs)


def only(path, **kwargs):
    source = folder(path, **kwargs)
    assert len(source) == 1
    return source[0]


@pytest.mark.parametrize(
    ("file", "mode", "color", "expected"),
    [
        ("a.png", "RGB", (200, 100, 50), (200, 100, 50)),
        ("a.PNG", "L", 77, (77, 77, 77)),
        ("a.png", "1", 1, (255, 255, 255)),
        ("a.bmp", "RGB", (1, 2, 3), (1, 2, 3)),
        ("a.png", "RGBA", (255, 0, 0, 0), (0, 0, 255)),
        ("a.webp", "RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("a.png", "LA", (100, 51), (20, 20, 224)),
        ("a.tif", "CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("a.png", "I;16", 65535, (255, 255, 255)),
        ("a.png", "I;16", 257 * 40, (40, 40, 40)),
        ("a.tiff", "I;16", 257 * 200 + 100, (200, 200, 200)),
        ("a.gif", "P", 0, (0, 0, 0)),
    ],
)
def test_modes(tmp_path, file, mode, color, expected):
    save(tmp_path / file, color, mode=mode, **({"lossless": True} if "webp" in file else {}))
    image = only(tmp_path, background=(0, 0, 255))["image"]
    assert image.shape == (16, 16, 3) and image.dtype == np.uint8
    np.testing.assert_array_equal(image, np.broadcast_to(np.uint8(expected), (16, 16, 3)))


def test_palette_with_a_transparent_color(tmp_path):
    image = Image.new("P", (16, 16), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.paste(0, (0, 0, 8, 16))
    image.save(tmp_path / "a.png", transparency=0)
    example = only(tmp_path)
    assert example["image"][0, 0].tolist() == [255, 255, 255]
    assert example["image"][0, 15].tolist() == [0, 255, 0]
    assert example["rgba"][0, 0, 3] == 0


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("L", (16, 16), value) for value in (10, 250)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (only(tmp_path)["image"] == 10).all()


def test_exif_orientation(tmp_path):
    image = Image.new("RGB", (32, 16), (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side: turn clockwise to see it
    image.save(tmp_path / "a.png", exif=exif)
    upright = read_image(tmp_path / "a.png")
    assert upright.shape == (32, 16, 3)
    assert (upright[:16] == 0).all() and (upright[16:] == 255).all()


def test_resize_and_centre_crop():
    image = np.zeros((40, 120, 3), np.uint8)
    image[:, 40:80] = 200
    assert (fit_square(image, 20)[:, 3:-3] == 200).all()
    checkers = np.indices((64, 64)).sum(0) % 2 * 255
    grey = fit_square(np.repeat(checkers[..., None], 3, -1).astype(np.uint8), 8)
    assert np.abs(grey.astype(int) - 127).max() <= 2  # an aliased one would be black or white
    assert fit_square(image, 40).shape == (40, 40, 3)


def broken_files(path):
    """One good picture and one of each kind of bad one; what is said about each."""
    save(path / "good.png")
    save(path / "tiny.png", size=(7, 20))
    (path / "zero.png").touch()
    (path / "text.jpg").write_text("not a picture")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("cut.png", "cut.jpg"):
        Image.fromarray(noise).save(path / name)
        (path / name).write_bytes((path / name).read_bytes()[:1500])
    Image.new("F", (16, 16)).save(path / "float.tiff")
    return {
        "tiny.png": "7x20 pixels, the short side is under min_size=8",
        "zero.png": "the file is empty (0 bytes)",
        "text.jpg": "not a picture that Pillow can read",
        "cut.png": "truncated",
        "cut.jpg": "truncated",
        "float.tiff": "pixels of mode F beyond 16 bits are not supported",
    }


def test_bad_files_are_skipped_by_name(tmp_path, caplog):
    faults = broken_files(tmp_path)
    with caplog.at_level(logging.WARNING, logger="absl"):
        assert only(tmp_path)["name"] == "good.png"
    for name, fault in faults.items():
        assert [m for m in caplog.messages if name in m and fault in m], (name, caplog.messages)
    assert caplog.messages[-1] == f"{tmp_path}: skipped 6 of 7 pictures"


def test_at_most_ten_warnings(tmp_path, caplog):
    save(tmp_path / "good.png")
    for i in range(12):
        (tmp_path / f"{i}.png").touch()
    with caplog.at_level(logging.WARNING, logger="absl"):
        folder(tmp_path)
    assert len(caplog.messages) == 11 and "skipped 12 of 13" in caplog.messages[-1]


def test_on_error_raise(tmp_path):
    (tmp_path / "zero.png").touch()
    with pytest.raises(ValueError, match=r"zero\.png: the file is empty"):
        folder(tmp_path, on_error="raise")
    with pytest.raises(ValueError, match='\'ignore\'; choose "skip" or "raise"'):
        folder(tmp_path, on_error="ignore")


def test_min_size(tmp_path):
    save(tmp_path / "a.png", size=(7, 7))
    assert only(tmp_path, min_size=7)["image"].shape == (16, 16, 3)
    with pytest.raises(ValueError, match=r"none of its 1 pictures is left.*0 are usable"):
        folder(tmp_path)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere' is not a folder"):
        folder(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("no picture")
    save(tmp_path / ".thumbnails" / "hidden.png")
    with pytest.raises(ValueError, match=f"{tmp_path} holds no picture; looked .* png, jpg"):
        folder(tmp_path)


def test_classes(tmp_path):
    for name in ("dog/1.png", "cat/deep/2.png", "3.png"):
        save(tmp_path / name)
    source = folder(tmp_path)
    assert source.classes == ("", "cat", "dog")
    found = [(e["name"], e["label"], e["caption"]) for e in source]
    assert found == [("3.png", 0, ""), ("cat/deep/2.png", 1, "cat"), ("dog/1.png", 2, "dog")]
    save(tmp_path / "flat" / "a.png")
    assert folder(tmp_path / "flat").classes == ("",)


def test_captions(tmp_path):
    for name in ("dog/1.png", "dog/2.png", "dog/3.png", "dog/4.png"):
        save(tmp_path / name)
    (tmp_path / "dog" / "1.txt").write_text(" a brown dog\n")
    write_lines(
        tmp_path / "metadata.jsonl",
        {"file_name": "dog/1.png", "text": "the .txt goes first"},
        {"file_name": "dog/2.png", "text": "a café dog"},
        {"file_name": "dog/3.png", "text": "the nearer file goes first"},
    )
    write_lines(tmp_path / "dog" / "metadata.jsonl", {"file_name": "3.png", "caption": "a dog"})
    assert [e["caption"] for e in folder(tmp_path)] == ["a brown dog", "a café dog", "a dog", "dog"]


def write_lines(path, *entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


def test_malformed_metadata(tmp_path):
    save(tmp_path / "a.png")
    write_lines(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": "fine"}, {"file": "b"})
    with pytest.raises(ValueError, match=r'metadata\.jsonl:2: expected \{"file_name": .*"file"'):
        folder(tmp_path)


def test_splits(tmp_path):
    for i in range(30):
        save(tmp_path / "ab"[i % 2] / f"{i}.png", size=(8, 8))
    config = ConfigDict({"source": "folder", "path": str(tmp_path), "image_size": 8})
    config.held_out = 0.3
    train, held_out, both = (open_source(config, s) for s in ("train", "held_out", "all"))
    names = [[e["name"] for e in source] for source in (train, held_out, both)]
    assert sorted(names[0] + names[1]) == names[2] and len(names[2]) == 30
    assert len(names[1]) == 10 and train.classes == held_out.classes == ("a", "b")
    config.held_out = 0.0
    with pytest.raises(ValueError, match="left for the split 'held_out' .30 are usable"):
        open_source(config, "held_out")
