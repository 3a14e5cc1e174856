"""The files that `sample.py` writes for every edit, with the bundled model."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

import ldm_jax
from ldm_jax.data.sources import EmojiSource
from ldm_jax.gallery import Edit, draw, load_drawing, with_controls, with_ip_adapters, with_loras
from ldm_jax.pictures import centre, fit_picture, fitted_size, to_uint8

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


@pytest.mark.parametrize("given, expected", [
    ("style.safetensors", ("style.safetensors", 1.0)),
    ("style.safetensors:0.8", ("style.safetensors", 0.8)),
    ("runs/a:b:-1", ("runs/a:b", -1.0)),
    ("runs/a:b", ("runs/a:b", 1.0)),
    ("5", ("5", 1.0)),
])  # fmt: skip
def test_a_lora_and_its_scale(given, expected):
    class Pipe(list):
        def with_lora(self, *added):
            return Pipe([*self, added])

    assert with_loras(Pipe(), [given, "x:2"]) == [expected, ("x", 2.0)]


class Controlled:
    """Stands for a pipeline: remembers what was added."""

    def __init__(self, *added):
        self.added, self.model = added, self
        self.embedders = [SimpleNamespace(name=f"control_{i}") for i in range(len(added))]

    def with_control(self, *given):
        return Controlled(*self.added, given)

    def with_ip_adapter(self, *given):
        return Controlled(*self.added, given)


@pytest.mark.parametrize("given, added, hint", [
    ("net.pth:edges.png", ("net.pth", 1.0), "edges.png"),
    ("runs/a:dir/edges.png:0.5", ("runs/a", 0.5), "dir/edges.png"),
    ("a:b:c.png", ("a:b", 1.0), "c.png"),
    ("a:b.png:-1", ("a", -1.0), "b.png"),
])  # fmt: skip
def test_a_controlnet_its_hint_and_its_scale(given, added, hint):
    pipe, hints = with_controls(Controlled(), [given, "x:y.png:2"])
    assert pipe.added == (added, ("x", 2.0))
    assert hints == {"control_0": hint, "control_1": "y.png"}


@pytest.mark.parametrize("given", ["net.pth", "net.pth:", ":edges.png", "net.pth:0.5"])
def test_a_controlnet_without_a_hint(given):
    with pytest.raises(ValueError, match=f"--control={given}: name the hint, a picture, after a c"):
        with_controls(Controlled(), [given])


def test_an_ip_adapter_its_picture_and_its_scale(tmp_path):
    picture = tmp_path / "a.png"
    Image.fromarray(np.full((3, 2, 3), 7, np.uint8)).save(picture)
    given = [f"x.bin:{picture}:0.5", f"y.bin:{picture}"]
    pipe, shown = with_ip_adapters(Controlled(), given, "encoder/")
    assert pipe.added == (("x.bin", "encoder/", 0.5), ("y.bin", "encoder/", 1.0))
    assert [*shown] == ["control_0", "control_1"]
    np.testing.assert_array_equal(shown["control_0"], np.full((3, 2, 3), 7, np.uint8))
    with pytest.raises(ValueError, match="--ip_adapter=x.bin: name the prompt, a picture, after a"):
        with_ip_adapters(Controlled(), ["x.bin"])


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


def test_a_soft_mask_blends(pipe, picture, tmp_path):
    """Black pixels come back untouched, grey ones lie between the picture and what is drawn."""
    ramp = np.zeros((64, 64), np.uint8)
    ramp[:, 32:] = np.linspace(0, 255, 32)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    Image.fromarray(np.uint8(255 * (ramp > 0))).save(tmp_path / "hard.png")
    images = {}
    for name in ("ramp", "hard"):
        edit = Edit(picture, mask=str(tmp_path / f"{name}.png"))
        draw(pipe, ["rainbow"], SETTINGS, tmp_path / name, edit=edit)
        images[name] = read(tmp_path / name / "0000-rainbow.png").astype(int)
    before = read(picture).astype(int)
    changes = {name: np.abs(image - before).mean(axis=(0, 2)) for name, image in images.items()}
    assert changes["ramp"][:33].max() == 0.0 and changes["ramp"][56:].mean() > 5
    near = changes["ramp"][33:40].mean()
    assert 0.0 < near < changes["hard"][33:40].mean() / 3


def test_a_source_prompt_inverts_the_picture_first(pipe, picture, tmp_path):
    settings = SETTINGS | {"steps": 12}
    draw(pipe, ["cat face"], settings, tmp_path, edit=Edit(picture, source="cat face"))
    about = json.loads((tmp_path / "settings.json").read_text())
    assert about["guidance"] == 1.0  # as inversion has none
    again = pipe.decode(pipe.encode(read(picture)[None]))
    assert np.abs(read(tmp_path / "0000-cat-face.png") / 255.0 - again).mean() < 0.06


@pytest.mark.parametrize("edit, more, message", [
    (Edit("{}", outpaint=(1, 2)), {}, "outpaint 1,2: give pixels to add at left,top,right,bottom"),
    (Edit("{}", fit="squash"), {}, "fit='squash': choose one of crop, pad, resize"),
    (Edit("{}", mask="{}", source="cat"), {}, r"inverted \(--source\) whole: no mask"),
    (Edit("{}"), {"interpolate": 3}, "interpolation draws one prompt from noise"),
])  # fmt: skip
def test_edits_that_make_no_sense_are_refused(pipe, picture, tmp_path, edit, more, message):
    edit = dataclasses.replace(edit, image=picture, mask=edit.mask and picture)
    with pytest.raises(ValueError, match=message):
        draw(pipe, ["cat face"], SETTINGS, tmp_path / "out", edit=edit, **more)
    assert not (tmp_path / "out").exists()


def test_depth_is_written_with_sixteen_bits(tmp_path):
    """High byte 3, low byte 7: 775. One picture a label, named by its class."""
    made = np.zeros((3, 8, 8, 6), np.float32)
    made[..., 4], made[..., 5] = 3 / 255, 7 / 255

    class Six:
        config = {"sampling": {"guidance": 1.0}}
        classes = ("tulip", "rose", "野菊")

        def __call__(self, prompt, **settings):
            assert prompt is None and settings["labels"] == ["rose", 2, 3]
            return made

    settings = {"n": 1, "steps": 1, "seed": 0, "compose": None, "labels": ["rose", 2, 3]}
    draw(Six(), [], settings, tmp_path)
    depth = read(tmp_path / "0001-野菊-depth.png")
    assert depth.dtype == np.uint16 and (depth == 775).all()
    for name in ("0000-rose.png", "0001-野菊.png", "0002-label-3.png"):
        assert read(tmp_path / name).shape == (8, 8, 3)
    assert json.loads((tmp_path / "settings.json").read_text())["classes"][1] == "野菊"


@pytest.mark.parametrize("fit, expected", [
    ("crop", (64, 96)), ("pad", (72, 104)), ("resize", (72, 104)),
])  # fmt: skip
def test_a_picture_of_any_size_is_fitted_with_its_mask(pipe, tmp_path, fit, expected):
    """70×101 pixels, of which the right half is drawn anew: as much of the left half comes back as
    the model draws, and all of it, in its size, after padding."""
    image = np.random.default_rng(0).integers(0, 256, (70, 101, 3), np.uint8)
    mask = np.zeros((70, 101), np.uint8)
    mask[:, 50:] = 255
    for name, pixels in (("image", image), ("mask", mask)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    edit = Edit(str(tmp_path / "image.png"), str(tmp_path / "mask.png"), fit=fit)
    given = edit.arguments(pipe, 4)[0]
    assert given["image"].shape == (*expected, 3) and given["mask"].shape == expected
    draw(pipe, ["rainbow"], SETTINGS, tmp_path / "out", edit=edit, previews=2)
    drawn = read(tmp_path / "out" / "0000-rainbow.png")
    before, kept = (image, mask) if fit == "pad" else (given["image"], given["mask"])
    assert drawn.shape == before.shape
    np.testing.assert_array_equal(drawn[kept == 0], before[kept == 0])
    assert (drawn[kept > 0] != before[kept > 0]).mean() > 0.9
    sheet = read(tmp_path / "out" / "previews.png")
    assert sheet.shape == (before.shape[0], 2 * before.shape[1] + 2, 3)


@pytest.mark.parametrize("size", [(64, 64), (65, 79), (70, 101), (33, 16), (7, 200)])
@pytest.mark.parametrize("fit", ["crop", "pad", "resize"])
def test_fitting_keeps_picture_and_mask_together(size, fit):
    """Every pixel of this picture says where it lies, and so does every pixel of the mask."""
    rows, columns = np.indices(size).astype(np.uint8)
    picture = np.stack([rows, columns, 0 * rows], axis=-1)
    if fit == "crop" and min(size) < 16:
        with pytest.raises(ValueError, match="7×200 .* cannot be cropped to multiples of 16"):
            fit_picture(picture, 16, fit)
        return
    fitted = fit_picture(picture, 16, fit)
    assert not np.any(np.mod(fitted.shape[:2], 16)) and fitted.shape[:2] == fitted_size(
        size, 16, fit
    )
    for channel, mask in enumerate((rows, columns)):
        beside = fit_picture(mask, 16, fit, binary=True)
        assert beside.shape == fitted.shape[:2]
        error = np.abs(beside.astype(int) - fitted[..., channel])
        assert error.max() <= (2 if fit == "resize" else 0)
    if fit == "pad":
        np.testing.assert_array_equal(centre(fitted, size), picture)


def test_a_fitted_mask_stays_black_and_white():
    mask = 255 * (np.indices((70, 101)).sum(axis=0) // 5 % 2).astype(np.uint8)
    for fit in ("crop", "pad", "resize"):
        assert np.unique(fit_picture(mask, 16, fit, binary=True)).tolist() == [0, 255]


@pytest.mark.parametrize("fit, size, expected", [
    ("crop", (70, 101), (64, 96)), ("crop", (64, 96), (64, 96)), ("pad", (70, 101), (80, 112)),
    ("pad", (3, 64), (16, 64)), ("resize", (70, 70), (64, 64)), ("resize", (73, 73), (80, 80)),
    ("resize", (3, 64), (16, 64)), ("resize", (100, 150), (96, 144)),
    ("resize", (1000, 1500), (992, 1488)),
])  # fmt: skip
def test_sizes_that_pictures_are_fitted_to(fit, size, expected):
    assert fitted_size(size, 16, fit) == expected


def test_an_outpainted_picture_is_fitted_as_a_whole(pipe, picture, tmp_path):
    edit = Edit(picture, outpaint=(5, 0, 0, 0), fit="pad")
    draw(pipe, ["cat face"], SETTINGS, tmp_path, edit=edit)
    wide = read(tmp_path / "0000-cat-face.png")
    assert wide.shape == (64, 69, 3)
    np.testing.assert_array_equal(wide[:, 5:], read(picture))


def test_a_mask_of_another_size_is_refused_before_fitting(pipe, picture, tmp_path):
    path = str(tmp_path / "mask.png")
    Image.fromarray(np.zeros((70, 70), np.uint8)).save(path)
    with pytest.raises(ValueError, match="mask.png is 70×70 .* as large as its picture, 64×64"):
        draw(pipe, ["cat face"], SETTINGS, tmp_path / "out", edit=Edit(picture, path))


def test_previews_and_pictures_do_not_depend_on_the_batch(pipe, tmp_path):
    for name, batch in (("whole", None), ("parts", 2)):
        settings = SETTINGS | {"n": 3, "batch": batch}
        draw(pipe, ["rainbow"], settings, tmp_path / name, previews=2)
    for name in ("previews.png", "0002-rainbow.png"):
        whole, parts = (read(tmp_path / folder / name).astype(int) for folder in ("whole", "parts"))
        assert whole.shape == parts.shape and np.abs(whole - parts).max() <= 2


def test_an_autoencoder_draws_nothing(pipe, tmp_path):
    path = str(tmp_path / "autoencoder.safetensors")
    pipe.first_stage.save(path)
    with pytest.raises(ValueError, match=r"holds an autoencoder alone.*config.first_stage=.*auto"):
        load_drawing(path)
    assert jax.tree.leaves(load_drawing("").params)
