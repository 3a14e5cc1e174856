"""Augmentations: functions of the generator alone, that change what they say and nothing else."""

import numpy as np
import pytest

from ldm_jax.data.images import composite
from ldm_jax.data.sources import EmojiSource
from ldm_jax.data.transforms import TRANSFORMS, compose


@pytest.fixture(scope="module")
def example():
    apple = next(e for e in EmojiSource("all") if e["name"] == "red apple")
    return apple | {"captions": ("red apple", "an apple, red, with a leaf")}


def draws(name, example, n=20):
    return [compose([name])(example, np.random.default_rng(i)) for i in range(n)]


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_deterministic_and_changing(name, example):
    if name.endswith("_tags"):
        example = example | {"caption": "red apple, fruit, leaf, round, sweet"}
    before = {key: np.copy(value) for key, value in example.items()}
    first, again = draws(name, example), draws(name, example)
    assert all(map(same, first, again))
    assert sum(not same(e, example) for e in first) >= 5
    results = len({e["image"].tobytes() + e["caption"].encode() for e in first})
    assert results == 1 if name == "unit_range" else results >= 2  # the former draws nothing
    assert all(e["image"].shape == (64, 64, 3) and e["image"].dtype == np.uint8 for e in first)
    assert all(np.array_equal(example[key], before[key]) for key in before)


def test_flip(example):
    images = [e["image"] for e in draws("flip", example)]
    mirrored = [np.array_equal(image, example["image"][:, ::-1]) for image in images]
    kept = [np.array_equal(image, example["image"]) for image in images]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True)) and 5 <= sum(kept) <= 15


def test_background(example):
    for e in draws("background", example):
        np.testing.assert_array_equal(e["image"], composite(example["rgba"], e["background"]))
    opaque = {"image": example["image"]}
    assert all(e is opaque for e in draws("background", opaque))


def test_shift_moves_and_fills(example):
    row = np.zeros((64, 64, 3), np.uint8)
    row[30:34, 30:34] = 255
    offsets = set()
    for e in draws("shift", {"image": row, "background": (0, 0, 7)}, 200):
        top, left = np.argwhere(e["image"][..., 0] == 255)[0]
        offsets.add((int(top) - 30, int(left) - 30))
        assert (e["image"][..., 0] == 255).sum() == 16
        filled = e["image"][..., 2] == 7
        assert filled.sum() == 64 * 64 - (64 - abs(top - 30)) * (64 - abs(left - 30))
    assert {abs(o) for pair in offsets for o in pair} == set(range(9))


def test_shift_repeats_the_edge_of_an_opaque_picture():
    columns = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    for e in draws("shift", {"image": columns}):
        row = e["image"][0, :, 0].astype(int)
        np.testing.assert_array_equal(row, np.clip(np.arange(64) + row[32] - 32, 0, 63))


def test_zoom_range():
    square = np.zeros((64, 64, 3), np.uint8)
    square[22:42, 22:42] = 255
    areas = [e["image"][..., 0].mean() / 255 * 64**2 for e in draws("zoom", {"image": square}, 100)]
    sides = np.sqrt(areas) / 20
    assert 0.77 < sides.min() < 0.85 and 1.18 < sides.max() < 1.29


def test_color_permutes_channels():
    image = np.zeros((8, 8, 3), np.uint8) + np.uint8([40, 130, 220])
    orders = {tuple(np.argsort(e["image"][0, 0])) for e in draws("color", {"image": image}, 60)}
    assert len(orders) == 6


def test_tags(example):
    known = {example["caption"], *example["tags"]}
    captions = [e["caption"] for e in draws("tags", example, 60)]
    assert 15 <= captions.count("red apple") <= 45
    said = [caption.split(", ") for caption in captions]
    assert {len(words) for words in said} == {1, 2, 3}
    assert all(len(words) == len(set(words)) for words in said)
    assert {word for words in said for word in words} == known
    untagged = example | {"tags": ()}
    assert {e["caption"] for e in draws("tags", untagged)} == {"red apple"}
    with pytest.raises(ValueError, match='augment "tags": only data.source="emoji" has tags'):
        draws("tags", {"image": example["image"], "caption": "a"})


@pytest.mark.parametrize(
    ("name", "stay"),
    [("shuffle_tags", ["a"]), ("shuffle_tags:0", []), ("shuffle_tags:3", ["a", "b c", "d"])],
)
def test_shuffled_tags(name, stay):
    captions = [e["caption"] for e in draws(name, {"caption": "a, b c,d ,, e"}, 40)]
    parts = [caption.split(", ") for caption in captions]
    assert all(sorted(p) == ["a", "b c", "d", "e"] and p[: len(stay)] == stay for p in parts)
    assert len(set(captions)) == 1 if len(stay) == 3 else len(set(captions)) >= 5
    assert draws(name, {"caption": "a"}, 1) == [{"caption": "a"}]


def test_dropped_tags():
    """Each is left out with the probability that is said, but for the first."""
    captions = [e["caption"] for e in draws("drop_tags:0.3:2", {"caption": "a,b,c,d"}, 1000)]
    parts = [caption.split(", ") for caption in captions]
    assert all(p[:2] == ["a", "b"] for p in parts)
    assert abs(np.mean(["c" in p for p in parts]) - 0.7) < 0.05
    assert {e["caption"] for e in draws("drop_tags:1", {"caption": "a,b,c"}, 5)} == {"a"}
    both = compose(("shuffle_tags", "drop_tags:0.5"))
    seen = {both({"caption": "a,b,c"}, np.random.default_rng(i))["caption"] for i in range(99)}
    assert seen == {"a", "a, b", "a, c", "a, b, c", "a, c, b"}


@pytest.mark.parametrize("name", ["flip:1", "drop_tags:1:2:3", "drop_tags:often", "drop_tags:-1"])
def test_options_that_a_transform_has_not(name):
    options = "none" if name.startswith("flip") else "share and kept"
    with pytest.raises(ValueError, match=f"augment '{name}': its options are {options}, numbers"):
        compose([name])


def test_compose_order_and_names(example):
    rng = np.random.default_rng
    both = compose(["shift", "background"])(example, rng(3))
    assert same(both, compose(["background", "shift"])(example, rng(3)))
    assert compose([])(example, rng(0)) is example
    with pytest.raises(ValueError, match="'rotate'; choose from background, flip, zoom"):
        compose(["flip", "rotate"])


def test_the_range_of_mlperf_s_data():
    """What the networks get, x / 127.5 − 1, is x / 255, to half a step of 8 bits."""
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    (drawn,) = draws("unit_range", {"image": image}, 1)
    assert drawn["image"].dtype == np.uint8
    np.testing.assert_allclose(drawn["image"] / 127.5 - 1, image / 255, atol=0.51 / 127.5)
