"""The embedded emoji, the TensorFlow data sets and the choice between sources."""

import io
import json
import zipfile
from collections import Counter

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from ldm_jax.data.sources import EMOJI_ZIP, EmojiSource, is_held_out, open_source


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
    with pytest.raises(ValueError, match="'laion'; choose one of emoji, folder, tfds"):
        open_source(ConfigDict({"source": "laion", "image_size": 64}))
    with pytest.raises(ValueError, match="data.source='folder' needs data.path"):
        open_source(ConfigDict({"source": "folder", "path": "", "image_size": 64}))
    with pytest.raises(ValueError, match="'test'; choose one of train, held_out, all"):
        EmojiSource("test")


@pytest.fixture
def tfds_builder(tmp_path, monkeypatch):
    """Makes `tfds.builder` return a data set of 20 flat pictures 9x8, prepared on disk."""
    tfds = pytest.importorskip("tensorflow_datasets")

    def prepare(splits, features=("image", "label")):
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
                for i in range(20):
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


def open_tfds(split):
    config = ConfigDict({"source": "tfds", "path": "flat", "image_size": 8})
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


def test_tfds_without_labels_or_images(tfds_builder):
    tfds_builder(["train"], features=("image",))
    assert (open_tfds("train").classes, open_tfds("train")[0]["caption"]) == (("",), "")
    tfds_builder(["train"], features=("label",))
    with pytest.raises(ValueError, match=r"flat has the features \['label'\], no \"image\""):
        open_tfds("train")
