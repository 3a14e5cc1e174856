"""Conditions of training examples: closed forms, distributions, and what is refused."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data.conditions import (
    check_conditions,
    check_files,
    make_conditions,
)
from ldm_jax.data.masks import RECIPES, draw_mask
from ldm_jax.data.placement import Placement


def one(name, **section):
    (condition,) = make_conditions({name: section})
    return condition


def example(tmp_path=None, size=64, original=(64, 96)):
    y, x = np.mgrid[0:size, 0:size]
    image = np.stack([x * 4, y * 4, x * 2 + y * 2], axis=-1).clip(0, 255).astype(np.uint8)
    made = {"image": image, "placement": Placement.centre(original, (size, size)), "name": "a"}
    return made | ({"path": str(tmp_path / "a.jpg")} if tmp_path else {})


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("recipe", RECIPES)
def test_masks_are_of_their_size_and_neither_empty_nor_whole(recipe):
    covered = []
    for seed in range(200):
        mask = draw_mask(RECIPES[recipe], 64, 96, rng(seed))
        assert mask.shape == (64, 96) and set(np.unique(mask)) <= {0, 1}
        covered.append(mask.mean())
    assert min(covered) > 0 and 0.02 < np.mean(covered) < 0.7


def test_lengths_scale_with_the_picture():
    small = np.mean([draw_mask(RECIPES["lama"], 64, 64, rng(s)).mean() for s in range(300)])
    large = np.mean([draw_mask(RECIPES["lama"], 256, 256, rng(s)).mean() for s in range(300)])
    assert small == pytest.approx(large, rel=0.1)


def test_lama_draws_as_many_boxes_as_lines():
    """A box is the only mask whose rows are all the same runs."""
    recipe = RECIPES["lama"]
    boxes = 0
    for seed in range(400):
        mask = draw_mask(recipe, 64, 64, rng(seed))
        rows = {tuple(row) for row in mask if row.any()}
        boxes += len(rows) <= 8
    assert boxes / 400 == pytest.approx(0.5, abs=0.08)


def test_stable_diffusion_masks_the_whole_picture_at_its_rate():
    mask = one("mask", recipe="sd512_large", whole=0.25)
    whole = [mask(example(), rng(seed))["mask"].mean() == 1.0 for seed in range(600)]
    assert np.mean(whole) == pytest.approx(0.25, abs=0.06)
    assert mask(example(), rng())["mask"].shape == (64, 64, 1)


def test_low_resolution_is_the_picture_shrunk():
    made = one("low_resolution", factor=4)(example(), rng())
    assert made.keys() == {"low_resolution"}
    image = example()["image"].astype(np.float32) / 127.5 - 1.0
    blocks = image.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
    assert np.abs(made["low_resolution"] - blocks)[2:-2, 2:-2].max() < 0.02


def test_low_resolution_gets_the_noise_of_its_level():
    condition = one("low_resolution", factor=4, noise_levels=350)
    clean = one("low_resolution", factor=4)(example(), rng())["low_resolution"]
    levels, ratios = [], []
    for seed in range(200):
        made = condition(example(), rng(seed))
        level = int(made["noise_level"])
        levels.append(level)
        kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[level]
        noise = made["low_resolution"] - np.sqrt(kept) * clean
        ratios.append(noise.std() / np.sqrt(1 - kept))
    assert min(levels) < 20 and 330 < max(levels) < 350
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.02)


def test_sizes_are_those_of_the_file_and_of_the_crop():
    made = one("sizes", aesthetic_score=5.5)(example(size=32, original=(64, 128)), rng())
    assert {k: v.tolist() for k, v in made.items()} == {
        "original_size": [64, 128],
        "crop": [0, 16],
        "target_size": [32, 32],
        "aesthetic_score": [5.5],
    }


def test_segmentation_is_read_beside_the_picture_and_cropped_with_it(tmp_path):
    labels = np.repeat(np.arange(96, dtype=np.uint8)[None], 64, axis=0)
    Image.fromarray(labels).save(tmp_path / "a.segmentation.png")
    made = one("segmentation", classes=100)(example(tmp_path), rng())["segmentation"]
    assert made.dtype == np.int32 and (made == np.arange(16, 80)).all()
    flipped = example(tmp_path) | {"placement": Placement.centre((64, 96), (64, 64)).flipped()}
    mirrored = one("segmentation", classes=100)(flipped, rng())["segmentation"]
    assert (mirrored == made[:, ::-1]).all()
    with pytest.raises(ValueError, match=r"a\.segmentation\.png: class 95, but .*classes is 90"):
        one("segmentation", classes=90)(example(tmp_path), rng())


def test_a_palette_gives_its_indices(tmp_path):
    image = Image.fromarray(np.full((64, 96), 3, np.uint8), mode="P")
    image.putpalette([0, 0, 0, 9, 9, 9, 50, 60, 70, 255, 0, 0])
    image.save(tmp_path / "a.segmentation.png")
    assert (one("segmentation")(example(tmp_path), rng())["segmentation"] == 3).all()


def test_a_coloured_label_picture_is_refused(tmp_path):
    Image.new("RGB", (96, 64)).save(tmp_path / "a.segmentation.png")
    with pytest.raises(ValueError, match="has 3 channels: expected a grey or palette picture"):
        one("segmentation")(example(tmp_path), rng())


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_depth_is_stretched_to_the_size_of_the_latents(tmp_path, dtype):
    depth = np.repeat(np.linspace(10, 200, 96)[None], 64, axis=0).astype(dtype)
    Image.fromarray(depth).save(tmp_path / "a.depth.png")
    made = one("depth", factor=8)(example(tmp_path), rng())["depth"]
    assert made.shape == (8, 8, 1) and made.min() == -1 and made.max() == 1
    assert (np.diff(made[0, :, 0]) > 0).all()
    Image.fromarray(np.full((64, 96), 7, dtype)).save(tmp_path / "a.depth.png")
    assert (one("depth")(example(tmp_path), rng())["depth"] == 0).all()


def test_edges_are_white_where_the_brightness_jumps():
    """Closed form: the gradient of a step after a Gaussian is that Gaussian."""
    image = np.zeros((16, 32, 3), np.uint8)
    image[:, 16:] = 255
    sigma = 1.5
    made = one("control", kind="edges", sigma=sigma, gain=1.0)({"image": image}, rng())["control"]
    x = np.arange(32) - 15.5
    expected = np.exp(-(x**2) / (2 * sigma**2)) / (sigma * np.sqrt(2 * np.pi))
    assert made.shape == (16, 32, 1) and made.dtype == np.float32
    np.testing.assert_allclose(made[8, :, 0], expected, atol=6e-3)
    assert one("control", kind="edges", gain=100.0)({"image": image}, rng())["control"].max() == 1.0


def test_a_hint_lies_beside_the_picture_and_moves_with_it(tmp_path):
    hint = np.zeros((64, 96, 3), np.uint8)
    hint[:, :48, 0] = 255
    Image.fromarray(hint).save(tmp_path / "a.control.png")
    there = example(tmp_path)
    made = one("control", kind="hint")(there, rng())["control"]
    assert made.shape == (64, 64, 3) and made.dtype == np.float32
    assert (made[:, :28, 0] == 1).all() and (made[:, 36:, 0] == 0).all() and not made[..., 1].any()
    mirrored = there | {"placement": there["placement"].flipped()}
    other = one("control", kind="hint")(mirrored, rng())["control"]
    np.testing.assert_allclose(other, made[:, ::-1], atol=1e-2)
    Image.fromarray(hint[..., 0]).save(tmp_path / "a.control.png")
    grey = one("control", kind="hint")(there, rng())["control"]
    np.testing.assert_array_equal(grey, made[..., :1].repeat(3, axis=-1))


def boxes(tmp_path, objects):
    (tmp_path / "a.boxes.json").write_text(json.dumps(objects))


def test_boxes_become_ldms_tokens(tmp_path):
    """Of a file 96 wide the picture is columns 16 to 80."""
    whole = {"category_id": 5, "bbox": [16, 0, 64, 64]}
    part = {"category_id": 9, "bbox": [48, 32, 48, 32]}
    outside = {"category_id": 1, "bbox": [0, 0, 10, 10]}
    boxes(tmp_path, [whole, part, outside])
    tokens = one("boxes")(example(tmp_path), rng())["boxes"]
    assert tokens.shape == (92,) and tokens.dtype == np.int32
    triples = {tuple(t) for t in tokens[:90].reshape(30, 3).tolist()}
    last = 89 * 90 + 89
    assert triples == {
        (5, 0, last),
        (9, round(0.5 * 89) * 90 + round(0.5 * 89), last),
        (8191, 8191, 8191),
    }
    crop = [round(16 / 96 * 89), round(80 / 96 * 89) + 89 * 90]
    assert tokens[90:].tolist() == crop


def test_objects_are_shuffled_and_limited(tmp_path):
    boxes(tmp_path, [{"category_id": k, "bbox": [20, 5, 40, 40]} for k in range(40)])
    first, second = (one("boxes")(example(tmp_path), rng(s))["boxes"][:90:3] for s in (0, 1))
    assert len(set(first.tolist())) == 30 and (first != second).any()


@pytest.mark.parametrize(
    "content",
    ["not json", "{}", '[{"bbox": [1, 2, 3, 4]}]', '[{"category_id": 1, "bbox": [1]}]', "[3]"],
)
def test_malformed_boxes_name_the_file(tmp_path, content):
    (tmp_path / "a.boxes.json").write_text(content)
    if content == "{}":  # an empty list in another guise
        assert (one("boxes")(example(tmp_path), rng())["boxes"][:90] == 8191).all()
        return
    with pytest.raises(ValueError, match=r'a\.boxes\.json: expected \[\{"category_id"'):
        one("boxes")(example(tmp_path), rng())


def test_arrays_are_read_beside_the_picture(tmp_path):
    np.save(tmp_path / "a.neighbours.npy", np.ones((4, 8), np.float64))
    made = one("neighbours", kind="array")(example(tmp_path), rng())["neighbours"]
    assert made.shape == (4, 8) and made.dtype == np.float32
    np.save(tmp_path / "a.neighbours.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"a\.neighbours\.npy is no array of numbers"):
        one("neighbours", kind="array")(example(tmp_path), rng())


def test_conditions_reach_worker_processes():
    conditions = make_conditions({"mask": {}, "sizes": {}, "x": dict(kind="array")})
    assert pickle.loads(pickle.dumps(conditions)) == conditions


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"smell": {}}, "data.conditions.smell: kind 'smell' is none of mask, low_resolution"),
        ({"mask": dict(style="lama")}, "data.conditions.mask: no parameter 'style'; mask has rec"),
        ({"mask": dict(recipe="mine")}, "recipe='mine': choose one of lama, ldm, sd256"),
    ],
)
def test_bad_sections_are_refused_by_name(sections, message):
    with pytest.raises(ValueError, match=message):
        make_conditions(sections)


def test_what_lacks_its_data_is_refused_before_anything_is_read():
    with pytest.raises(ValueError, match=r"conditioning\.depth needs the entry 'depth' of each"):
        check_conditions((), {"text": ("caption",), "depth": ("depth",)}, "folder")
    with pytest.raises(ValueError, match=r"conditions\.neighbours = dict\(kind='array'\)"):
        check_conditions((), {"x": ("neighbours",)}, "folder")
    depth = make_conditions({"depth": {}})
    with pytest.raises(
        ValueError, match=r"picture\.depth\.png beside each .*source='emoji' has no"
    ):
        check_conditions(depth, {"depth": ("depth",)}, "emoji")
    check_conditions(depth, {"depth": ("depth",), "text": ("caption",)}, "folder")


def test_missing_files_are_counted(tmp_path):
    class Source:
        def __len__(self):
            return 3

        def describe(self, index):
            return {"path": str(tmp_path / f"{index}.jpg")}

    Image.new("L", (4, 4)).save(tmp_path / "1.depth.png")
    with pytest.raises(FileNotFoundError, match=r"2 of 3 pictures have no file \.depth\.png .*0\."):
        check_files(make_conditions({"depth": {}}), Source())


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_mask_of_the_loss_has_the_size_of_the_latents(tmp_path, dtype):
    """White counts whole and black as much as asked; a latent has the mean of its pixels."""
    white = np.iinfo(dtype).max
    mask = np.zeros((64, 96), dtype)
    mask[:20, 16:] = white  # two rows of latents and half of the third; the crop is central
    Image.fromarray(mask).save(tmp_path / "a.mask.png")
    expected = np.repeat(np.float32([1, 1, 0.5, 0, 0, 0, 0, 0])[:, None], 8, axis=1)
    made = one("loss_mask")(example(tmp_path), rng())["loss_mask"]
    assert made.dtype == np.float32 and made.shape == (8, 8, 1)
    np.testing.assert_allclose(made[..., 0], expected, atol=1e-6)
    made = one("loss_mask", unmasked=0.2, factor=4)(example(tmp_path), rng())["loss_mask"]
    np.testing.assert_allclose(made[::2, ::2, 0], 0.2 + 0.8 * (expected > 0), atol=1e-6)

    Image.fromarray(np.zeros((64, 96), dtype)).save(tmp_path / "a.mask.png")
    with pytest.raises(ValueError, match=r"a\.mask\.png is black: white is what the model is to"):
        one("loss_mask")(example(tmp_path), rng())
    with pytest.raises(ValueError, match=r"loss_mask\.unmasked=2\.0: choose 0 … 1"):
        one("loss_mask", unmasked=2.0)
