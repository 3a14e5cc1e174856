"""The embedded emoji, the TensorFlow data sets and the choice between sources."""

import io
import json
import pickle
import sys
import zipfile
from collections import Counter

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from ldm_jax.data.emoji import EMOJI_ZIP, EmojiSource
from ldm_jax.data.placement import Placement
from ldm_jax.data.sources import of_classes, open_source
from ldm_jax.data.splits import is_held_out


def test_pack_is_one_small_file():
    assert EMOJI_ZIP.stat().st_size < 8e6
    with zipfile.ZipFile(EMOJI_ZIP) as pack:
        assert pack.namelist() == ["emoji.json", "sheet.webp", "LICENSES.txt"]


def test_split_is_fixed():
    train, held_out, both = (EmojiSource(split) for split in ("train", "held_out", "all"))
    assert (len(train), len(held_out), len(both)) == (1697, 209, 1906)
    names = [{e["name"] for e in source} for source in (train, held_out, both)]
    assert names[0] | names[1] == names[2] and len(names[2]) == 1906
    assert {"grinning face", "flag: Japan"} <= names[0]
    assert {"robot", "volcano", "flag: Morocco"} <= names[1]
    with zipfile.ZipFile(EMOJI_ZIP) as pack:
        records = json.loads(pack.read("emoji.json"))["emoji"]
    assert all(r["held_out"] == is_held_out(r["name"], 0.1) for r in records)


def test_the_pictures_are_not_sent_to_worker_processes():
    source = EmojiSource("held_out")
    sent = pickle.dumps(source)
    assert len(sent) < 10_000
    np.testing.assert_array_equal(pickle.loads(sent)[7]["image"], source[7]["image"])


def test_is_held_out_fraction():
    names = [f"{i}.png" for i in range(4000)]
    assert sum(is_held_out(n, 0.1) for n in names) == pytest.approx(400, abs=60)
    assert not any(is_held_out(n, 0.0) for n in names) and all(is_held_out(n, 1.0) for n in names)


def test_emoji_classes():
    source = EmojiSource("all")
    assert source.classes == (
        "smileys & emotion",
        "people & body",
        "animals & nature",
        "food & drink",
        "travel & places",
        "activities",
        "objects",
        "symbols",
        "flags",
    )
    counts = Counter(example["label"] for example in source)
    assert [counts[i] for i in range(9)] == [169, 386, 159, 131, 218, 85, 264, 224, 270]


def test_emoji_example():
    example = next(e for e in EmojiSource("all") if e["name"] == "red apple")
    assert example["caption"] == "red apple" and example["label"] == 3
    assert "fruit" in example["tags"]
    image = example["image"]
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert image[0, 0].tolist() == [255, 255, 255]
    red, green, blue = image[36:52, 16:48].reshape(-1, 3).mean(0)
    assert red > 180 and green < 100 and blue < 100


def test_emoji_background_and_size():
    kwargs = {"image_size": 32, "background": (0, 128, 255)}
    example = EmojiSource("held_out", **kwargs)[0]
    assert example["image"].shape == (32, 32, 3)
    assert example["image"][0, 0].tolist() == [0, 128, 255] == list(example["background"])
    rgba = example["rgba"].astype(float)
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + np.array([0, 128, 255]) * (1 - alpha)
    assert np.abs(example["image"] - expected).max() <= 0.5


PICTURE_ENTRIES = {"image", "placement", "rgba", "background"}


def same_but_for_pixels(source, index):
    example, told = source[index], source.describe(index)
    assert told == {k: v for k, v in example.items() if k not in PICTURE_ENTRIES}
    return told


def test_describe_and_placement():
    source = EmojiSource("held_out", image_size=32)
    assert source.left_out == source.lost_captions == {}
    assert same_but_for_pixels(source, -1)["tags"]
    assert source[0]["placement"] == Placement.centre((64, 64), (32, 32))
    subset = of_classes(source, ["flags"])
    told = [same_but_for_pixels(subset, i)["label"] for i in range(len(subset))]
    assert told and set(told) == {source.classes.index("flags")}
    assert subset.left_out is source.left_out and subset.lost_captions is source.lost_captions


def test_a_subset_decodes_nothing(monkeypatch):
    source = EmojiSource("held_out")
    monkeypatch.setattr(EmojiSource, "__getitem__", None)
    assert 0 < len(of_classes(source, ["flags"])) < len(source)
    with pytest.raises(ValueError, match="no class 'flag'; this source has .'smileys"):
        of_classes(source, ["flag"])


@pytest.mark.parametrize("index", [-1, 208])
def test_emoji_is_a_sequence(index):
    source = EmojiSource("held_out")
    assert source[index]["name"] == list(source)[index]["name"]
    with pytest.raises(IndexError):
        source[209]


def test_open_source_passes_the_fields_on():
    config = ConfigDict({"source": "emoji", "path": "", "image_size": 48})
    config.background = (1, 2, 3)
    source = open_source(config, "held_out")
    assert len(source) == 209
    assert source[0]["image"].shape == (48, 48, 3) and source[0]["image"][0, 0].tolist() == [
        1,
        2,
        3,
    ]


def test_unknown_choices():
    with pytest.raises(
        ValueError, match="'laion'; choose one of emoji, scenes, folder, shards, tfds"
    ):
        open_source(ConfigDict({"source": "laion", "image_size": 64}))
    with pytest.raises(ValueError, match="data.source='folder' needs data.path"):
        open_source(ConfigDict({"source": "folder", "path": "", "image_size": 64}))
    with pytest.raises(ValueError, match="'test'; choose one of train, held_out, all"):
        EmojiSource("test")


@pytest.fixture
def tfds_builder(tmp_path, monkeypatch):
    """Makes `tfds.builder` return a data set of 20 flat pictures 9x8, prepared on disk."""
    tfds = pytest.importorskip("tensorflow_datasets")

    def prepare(splits, features=("image", "label"), count=20):
        class Flat(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                all_features = {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(names=["even", "odd"]),
                }
                chosen = tfds.features.FeaturesDict({f: all_features[f] for f in features})
                return tfds.core.DatasetInfo(builder=self, features=chosen)

            def _split_generators(self, downloads):
                return {split: self._generate_examples() for split in splits}

            def _generate_examples(self):
                for i in range(count):
                    file = io.BytesIO()
                    Image.new("RGB", (9, 8), (i, i, i)).save(file, "PNG")
                    file.seek(0)
                    yield (
                        i,
                        {k: v for k, v in {"image": file, "label": i % 2}.items() if k in features},
                    )

        builder = Flat(data_dir=tmp_path, file_format="array_record")
        monkeypatch.setattr(tfds, "builder", lambda name, **kwargs: builder)

    return prepare


def open_tfds(split, **kwargs):
    config = ConfigDict({"source": "tfds", "path": "flat", "image_size": 8} | kwargs)
    return open_source(config, split)


def test_tfds_without_a_test_split_holds_out_a_slice(tfds_builder):
    tfds_builder(["train"])
    train, held_out, both = map(open_tfds, ("train", "held_out", "all"))
    assert (len(train), len(held_out), len(both)) == (18, 2, 20)
    values = [{int(e["image"][0, 0, 0]) for e in source} for source in (train, held_out, both)]
    assert not values[0] & values[1] and values[0] | values[1] == values[2] == set(range(20))


def test_tfds_examples(tfds_builder):
    tfds_builder(["train", "test"])
    train, held_out = open_tfds("train"), open_tfds("held_out")
    assert (len(train), len(held_out), train.classes) == (20, 20, ("even", "odd"))
    example = held_out[3]
    assert example["image"].shape == (8, 8, 3) and example["name"] == "flat/held_out/3"
    assert example["label"] == example["image"][0, 0, 0] % 2
    assert example["caption"] == train.classes[example["label"]]


def test_tfds_describe_and_placement(tfds_builder, monkeypatch):
    tfds_builder(["train"])
    source = open_tfds("train")
    assert source[0]["placement"] == Placement.centre((8, 9), (8, 8))
    assert source.left_out == source.lost_captions == {}
    for index in (0, 7, -1):
        same_but_for_pixels(source, index)
    with pytest.raises(IndexError):
        source.describe(18)
    subset = open_tfds("train", classes=("odd",))
    assert {subset.describe(i)["caption"] for i in range(len(subset))} == {"odd"}
    monkeypatch.setattr(Image, "open", None)  # nothing is decoded
    assert source.describe(0)["label"] in (0, 1)


@pytest.mark.parametrize("count", [1, 2, 5, 20])
@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.1, 0.5, 1.0])
def test_small_tfds_sets_train(tfds_builder, count, fraction):
    tfds_builder(["train"], count=count)
    train, held_out, both = (
        [e["image"][0, 0, 0] for e in open_tfds(split, held_out=fraction)]
        for split in ("train", "held_out", "all")
    )
    assert train and sorted(train + held_out) == sorted(both) and len(both) == count
    assert not held_out or fraction not in (0.0, 1.0)
    assert (count, fraction) != (20, 0.5) or len(held_out) == 10


@pytest.mark.parametrize(
    "name", ["no_such_set", "No Such", "mnist/foo", "mnist:9.9.9", "/nowhere", "hf:x", "~/x"]
)
def test_unknown_tfds_names(name):
    pytest.importorskip("tensorflow_datasets")
    config = ConfigDict({"source": "tfds", "path": name, "image_size": 8})
    with pytest.raises(ValueError) as caught:
        open_source(config)
    assert str(caught.value) == (
        f"data.path {name!r} is no data set of TensorFlow Datasets; "
        "https://www.tensorflow.org/datasets/catalog lists them"
    )


def test_tfds_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"source=tfds: .*; pip install -r requirements\.txt"):
        open_tfds("train")


def test_tfds_without_labels_or_images(tfds_builder):
    tfds_builder(["train"], features=("image",))
    assert (open_tfds("train").classes, open_tfds("train")[0]["caption"]) == (("",), "")
    tfds_builder(["train"], features=("label",))
    with pytest.raises(ValueError, match=r"flat has the features \['label'\], no \"image\""):
        open_tfds("train")
