"""What `sample.py` writes for every edit, on the shipped model."""

import json

import numpy as np
import pytest
from PIL import Image

import ldm_jax
from ldm_jax.data.sources import EmojiSource
from ldm_jax.gallery import Edit, draw
from ldm_jax.pictures import to_uint8

SETTINGS = dict(n=1, steps=4, seed=3, guidance=None, compose=None, height=None, width=None)


@pytest.fixture(scope="module")
def pipe():
    return ldm_jax.load()


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "cat.png"
    Image.fromarray(EmojiSource("train")[700]["image"]).save(path)
    return str(path)


def read(path):
    return np.asarray(Image.open(path))


def test_interpolation_goes_from_this_seed_to_the_next(pipe, tmp_path):
    draw(pipe, ["rainbow"], SETTINGS, tmp_path, interpolate=3)
    ends = [to_uint8(pipe("rainbow", steps=4, seed=seed))[0] for seed in (3, 4)]
    frames = [read(tmp_path / f"000{i}-rainbow.png").astype(int) for i in range(3)]
    for frame, end in zip((frames[0], frames[2]), ends, strict=True):
        assert np.abs(frame - end).max() <= 2
    with Image.open(tmp_path / "interpolation.gif") as film:
        assert film.n_frames == 4  # there and back
    assert json.loads((tmp_path / "settings.json").read_text())["interpolate"] == 3


def test_previews_show_the_way_to_the_picture(pipe, tmp_path):
    draw(pipe, ["rainbow", "cat face"], SETTINGS, tmp_path, previews=3)
    sheet = read(tmp_path / "previews.png")
    assert sheet.shape == (130, 196, 3)  # a row for each picture, three moments
    end = read(tmp_path / "0001-cat-face.png").astype(int)
    assert np.abs(sheet[66:130, 132:196].astype(int) - end).max() <= 2
    assert np.abs(sheet[66:130, :64].astype(int) - end).mean() > 3


def test_an_edit_of_no_strength_has_no_previews_to_show(pipe, picture, tmp_path):
    settings = SETTINGS | {"strength": 0.0}
    draw(pipe, ["cat face"], settings, tmp_path, edit=Edit(picture), previews=3)
    assert not (tmp_path / "previews.png").exists() and (tmp_path / "grid.png").exists()


def test_outpainting_grows_the_picture_and_keeps_it(pipe, picture, tmp_path):
    draw(pipe, ["cat face"], SETTINGS, tmp_path, edit=Edit(picture, outpaint=(16, 0, 0, 16)))
    wide = read(tmp_path / "0000-cat-face.png")
    assert wide.shape == (80, 80, 3)
    np.testing.assert_array_equal(wide[:64, 16:], read(picture))
    about = json.loads((tmp_path / "settings.json").read_text())
    assert about["edit"]["outpaint"] == [16, 0, 0, 16]


def test_a_mask_file_says_what_to_draw_anew(pipe, picture, tmp_path):
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 40:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    draw(pipe, ["rainbow"], SETTINGS, tmp_path, edit=Edit(picture, str(tmp_path / "mask.png")))
    drawn = read(tmp_path / "0000-rainbow.png")
    np.testing.assert_array_equal(drawn[:, :40], read(picture)[:, :40])
    assert (drawn[:, 40:] != read(picture)[:, 40:]).any()


def test_a_source_prompt_inverts_the_picture_first(pipe, picture, tmp_path):
    settings = SETTINGS | {"steps": 12}
    draw(pipe, ["cat face"], settings, tmp_path, edit=Edit(picture, source="cat face"))
    about = json.loads((tmp_path / "settings.json").read_text())
    assert about["guidance"] == 1.0  # as inversion has none
    again = pipe.decode(pipe.encode(read(picture)[None]))
    assert np.abs(read(tmp_path / "0000-cat-face.png") / 255.0 - again).mean() < 0.06


@pytest.mark.parametrize("edit, more, message", [
    (Edit("{}", outpaint=(1, 2)), {}, "outpaint 1,2: give pixels to add at left,top,right,bottom"),
    (Edit("{}", outpaint=(5, 0, 0, 0)), {}, "width=69: this model draws multiples of 16"),
    (Edit("{}", mask="{}", source="cat"), {}, r"inverted \(--source\) whole: no mask"),
    (Edit("{}", mask="{}"), {}, "must be binary, 0 to keep and 1"),
    (Edit("{}"), {"interpolate": 3}, "interpolation draws one prompt from noise"),
])  # fmt: skip
def test_edits_that_make_no_sense_are_refused(pipe, picture, tmp_path, edit, more, message):
    edit = Edit(picture, edit.mask and picture, edit.outpaint, edit.source)
    with pytest.raises(ValueError, match=message):
        draw(pipe, ["cat face"], SETTINGS, tmp_path / "out", edit=edit, **more)
    assert not (tmp_path / "out").exists()


def test_depth_is_written_with_sixteen_bits(tmp_path):
    """High byte 3, low byte 7: 775. One picture a label, named by it."""
    made = np.zeros((2, 8, 8, 6), np.float32)
    made[..., 4], made[..., 5] = 3 / 255, 7 / 255

    class Six:
        config = {"sampling": {"guidance": 1.0}}

        def __call__(self, prompt, **settings):
            assert prompt is None and settings["labels"] == [1, 2]
            return made

    settings = {"n": 1, "steps": 1, "seed": 0, "compose": None, "labels": [1, 2]}
    draw(Six(), [], settings, tmp_path)
    depth = read(tmp_path / "0001-label-2-depth.png")
    assert depth.dtype == np.uint16 and (depth == 775).all()
    assert read(tmp_path / "0001-label-2.png").shape == (8, 8, 3)
