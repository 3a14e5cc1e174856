"""Several sources as one: `--config.data.source=scenes+emoji`."""

import itertools

import ml_collections
import numpy as np
import pytest

from ldm_jax.data.loader import Loader
from ldm_jax.data.mixture import Mixture
from ldm_jax.data.sources import open_source, sample


class Numbered:
    """Examples 0 … count − 1 of one class."""

    def __init__(self, name, count, **left_out):
        self.classes, self.count = (name,), count
        self.left_out, self.lost_captions = left_out, {}

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.describe(index) | {"image": np.full((1, 1, 3), index, np.uint8)}

    def describe(self, index):
        return {"caption": "", "label": 0, "name": f"{self.classes[0]} {range(self.count)[index]}"}


def test_each_source_has_its_turn_and_the_shorter_is_repeated():
    mixture = Mixture([Numbered("a", 5), Numbered("b", 2)])
    names = [example["name"] for example in mixture]
    assert len(mixture) == 10
    assert sorted(names[::2]) == [f"a {i}" for i in range(5)]
    assert {"b 0", "b 1"} == set(names[1::2]) and names[1] != names[3]
    assert [mixture.describe(i)["name"] for i in range(10)] == names
    with pytest.raises(IndexError):
        mixture[10]


def test_labels_are_numbered_through():
    mixture = Mixture([Numbered("a", 2), Numbered("b", 2)])
    assert mixture.classes == ("a", "b")
    assert [mixture[i]["label"] for i in range(4)] == [0, 1, 0, 1]
    assert all(mixture.classes[e["label"]] == e["name"][0] for e in mixture)


def test_what_was_left_out_is_added_up():
    mixture = Mixture([Numbered("a", 1, broken=2), Numbered("b", 1, broken=1, small=3)])
    assert mixture.left_out == {"broken": 3, "small": 3}


def config(source, **fields):
    return ml_collections.ConfigDict(dict(source=source, path="", image_size=64) | fields)


def test_scenes_and_emoji():
    scenes, emoji = (open_source(config(name)) for name in ("scenes", "emoji"))
    both = open_source(config("scenes+emoji"))
    assert len(both) == 2 * len(scenes) and both.endless and len(sample(both)) == 10_000
    np.testing.assert_array_equal(both[6]["image"], scenes[3]["image"])
    names = {both.describe(i)["name"] for i in range(1, 2 * len(emoji), 2)}
    assert names == {emoji.describe(i)["name"] for i in range(len(emoji))}
    batch = next(Loader(both, 4, seed=0).iterate(0))[1]
    assert batch["image"].shape == (4, 64, 64, 3)


def test_an_empty_split_of_one_is_left_out():
    both = open_source(config("scenes+emoji", scenes=dict(held_out_scenes=0)), "held_out")
    emoji = open_source(config("emoji"), "held_out")
    assert len(both) == len(emoji)
    assert {e["name"] for e in itertools.islice(both, 9)} <= {e["name"] for e in emoji}


@pytest.mark.parametrize(
    "source, fields, message",
    [
        ("scenes+emojis", {}, "unknown data.source 'emojis'; choose one of emoji, scenes"),
        ("emoji+folder", {}, "data.source='folder' needs data.path"),
        (
            "emoji+scenes",
            dict(classes=("flags",)),
            "choose classes of a single data.source",
        ),
    ],
)
def test_what_cannot_be_mixed_is_named(source, fields, message):
    with pytest.raises(ValueError, match=message):
        open_source(config(source, **fields))
