"""CLIP's score: invariances of it, both namings of a file, and what is refused.

`parity/test_extractors.py` compares it with transformers.
"""

import json

import numpy as np
import pytest
from PIL import Image

from ldm_jax.interop.files import write_safetensors
from ldm_jax.metrics.clip_score import load_clip
from ldm_jax.pictures import cropped
from tests.metrics.clip_file import image_tower, in_open_clip_names, in_transformers_names

CAPTIONS = ["a red apple", "two cats left of a star", "a red apple"]
LONG = "one two three four five six seven eight nine ten eleven twelve"


@pytest.fixture(scope="module")
def state():
    return in_transformers_names()


@pytest.fixture(scope="module")
def folder(state, tmp_path_factory):
    """As transformers saves it, with the activation of OpenCLIP's networks."""
    path = tmp_path_factory.mktemp("clip")
    write_safetensors(path / "model.safetensors", state)
    act = {"hidden_act": "gelu"}
    (path / "config.json").write_text(json.dumps({"text_config": act, "vision_config": act}))
    return path


@pytest.fixture(scope="module")
def clip(folder):
    return load_clip(folder, batch_size=2)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 40, 52, 3), np.uint8)


def test_scores(clip, images):
    scores = clip(images, CAPTIONS)
    assert (clip.side, clip.length, len(clip.hash)) == (32, 12, 16)
    assert clip.name == "clip-vision-width64-patch16-gelu"
    pictures, texts = clip.images(images), clip.texts(CAPTIONS)
    assert pictures.shape == texts.shape == (3, 24)
    for vectors in (pictures, texts):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-12)
    np.testing.assert_allclose(texts[0], texts[2], atol=1e-6)
    assert np.abs(texts[0] - texts[1]).max() > 1e-2
    expected = 100 * np.maximum(np.diag(pictures @ texts.T), 0)
    np.testing.assert_allclose(scores, expected, atol=1e-9)
    assert clip(images[:0], []).shape == (0,)


def test_a_cosine_below_zero_counts_as_zero(clip, images):
    """Of a picture and 40 captions some are below, as of any random vectors."""
    captions = [f"a {word}" for word in LONG.split()] + CAPTIONS
    cosines = clip.texts(captions) @ clip.images(images[:1])[0]
    scores = clip(np.repeat(images[:1], len(captions), axis=0), captions)
    assert (cosines < 0).any() and (cosines > 0).any()
    np.testing.assert_allclose(scores, 100 * np.clip(cosines, 0, 1), atol=1e-4)


def test_the_same_network_in_open_clip_names(clip, images, state, tmp_path):
    """From a file and from a folder; without a config its activation is GELU."""
    write_safetensors(tmp_path / "open_clip_model.safetensors", in_open_clip_names(state))
    for path in (tmp_path, tmp_path / "open_clip_model.safetensors"):
        found = load_clip(path)(images, CAPTIONS)
        np.testing.assert_allclose(found, clip(images, CAPTIONS), atol=1e-4)
    config = {"model_cfg": {"quick_gelu": True, "text_cfg": {"heads": 1}, "vision_cfg": {}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    other = load_clip(tmp_path)(images, CAPTIONS)
    assert np.abs(other - clip(images, CAPTIONS)).max() > 1e-3


def test_shards_have_one_hash(state, images, clip, folder, tmp_path):
    names = sorted(state)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in halves.items():
        write_safetensors(tmp_path / file, {name: state[name] for name in part})
    weight_map = {name: file for file, part in halves.items() for name in part}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    found = load_clip(tmp_path, batch_size=2)
    np.testing.assert_array_equal(found(images, CAPTIONS), clip(images, CAPTIONS))
    assert len(found.hash) == 16 and found.hash != clip.hash


def test_what_clip_sees_of_a_picture():
    """Of a wide or tall picture the middle square, after the shorter side became the network's."""
    image = np.random.default_rng(1).integers(0, 256, (1, 32, 56, 3), np.uint8)
    np.testing.assert_array_equal(cropped(image, 32), image[:, :, 12:44])
    tall = image.swapaxes(1, 2)
    np.testing.assert_array_equal(cropped(tall, 32), tall[:, 12:44])
    half = Image.fromarray(image[0]).resize((28, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(cropped(image, 16)[0], np.asarray(half)[:, 6:22])


def test_captions_that_are_too_long(clip, images):
    assert clip.cut(CAPTIONS) == []
    short = LONG.partition(" eleven")[0]
    assert clip.cut([short]) == []
    np.testing.assert_array_equal(clip.texts([LONG]), clip.texts([short]))
    (sentence,) = clip.cut([*CAPTIONS, LONG, short + " or eleven"])
    assert sentence == (
        "clip_score reads 12 tokens: 2 of 5 captions are longer, and were cut; the end of the "
        "first, 'eleven twelve', counts for nothing"
    )


def test_bad_pictures(clip, images):
    with pytest.raises(ValueError, match="3 pictures and 1 captions: one for each"):
        clip(images, ["a"])
    with pytest.raises(ValueError, match=r"expected images uint8 \(N, H, W, 3\), got float64 \(3"):
        clip.images(images / 255)


def refused(path, state, message):
    write_safetensors(path, state)
    with pytest.raises(ValueError, match=message):
        load_clip(path)


def test_files_that_are_no_whole_clip(state, tmp_path):
    path = tmp_path / "model.safetensors"
    images = {name: state[name] for name in image_tower()}
    texts = {name: tensor for name, tensor in state.items() if name not in images}
    embedding = "text_model.embeddings.token_embedding.weight"
    refused(path, images, f"holds CLIP's image tower alone: .* the text tower has {embedding}")
    refused(path, texts, "holds CLIP's text tower alone: .* the image tower has vision_model.embed")
    theirs = in_open_clip_names(state)
    alone = {name: theirs[name] for name in theirs if name.startswith("visual")}
    refused(path, alone, "image tower alone: .* the text tower has token_embedding.weight")
    refused(path, {"conv.weight": np.zeros(2)}, "is no CLIP: .* 1 tensors, such as conv.weight")
    less = {name: tensor for name, tensor in state.items() if name != "text_projection.weight"}
    refused(path, less, "its text tower lacks text_projection.weight: without it captions")
    other = state | {embedding: state[embedding][:1000]}
    refused(path, other, "knows 1000 pieces of text, and CLIP's tokenizer has 49408: it is of an")
    other = state | {"text_projection.weight": np.zeros((7, 64), np.float32)}
    refused(path, other, "pictures become 24 numbers and captions 7, which have no cosine")
    less = dict(state)
    del less["text_model.encoder.layers.1.layer_norm2.bias"]
    refused(path, less, "its text tower does not fit: text_model.encoder.layers.1.layer_norm2.bias")
    broken = state | {"text_model.final_layer_norm.bias": np.full(64, np.nan, np.float32)}
    refused(path, broken, "text_model.final_layer_norm.bias holds NaN or infinity")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no weights in"):
        load_clip(tmp_path / "empty")
