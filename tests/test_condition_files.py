"""Conditions of a drawing from files, as `sample.py` reads them."""

import json

import numpy as np
import pytest
from PIL import Image

from ldm_jax.condition_files import condition_arguments
from ldm_jax.data.condition_kinds import Boxes, LowResolution, Segmentation
from ldm_jax.data.placement import Placement
from ldm_jax.data.scenes import SceneSource
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.pipeline import Pipeline
from tests import tiny_models

RESCALER = dict(kind="rescaler", n_stages=1, out_channels=3)
TOKENS = dict(kind="transformer", vocab_size=1090, width=32, depth=1, heads=2, max_length=14)
PATCHES = dict(kind="patches", size=1, out_channels=3)


def pipeline(beside=3, context=None, **section):
    config = tiny_models.model(
        tiny_models.unet(beside=beside, context_dim=context), tiny_models.kl(1.0), section, size=32
    )
    return Pipeline(LatentDiffusion.from_config(config), tiny_models.random_params(config), config)


@pytest.fixture(scope="module")
def segmented():
    section = tiny_models.array("concat", None, None, 41, network=RESCALER)
    return pipeline(segmentation=section)


@pytest.fixture(scope="module")
def laid_out():
    return pipeline(0, 32, boxes=tiny_models.array("context", 14, network=TOKENS))


def test_a_segmentation_is_what_training_reads(segmented, tmp_path):
    example = SceneSource("train", 64, dict(kinds=40))[3]
    Image.fromarray(example["segmentation"].astype(np.uint8)).save(tmp_path / "classes.png")
    files = {"segmentation": str(tmp_path / "classes.png")}
    made = condition_arguments(segmented, files, None, None)
    trained = Segmentation("segmentation", classes=41)(example, None)["segmentation"]
    np.testing.assert_array_equal(made["conditions"]["segmentation"], trained[None])
    assert (made["height"], made["width"]) == (64, 64)
    image = segmented(**made, steps=1, guidance=1.0)
    assert image.shape == (1, 64, 64, 3)


def test_a_layout_is_what_training_reads(laid_out, tmp_path):
    """Objects may stand in another order: training shuffles them."""
    example = SceneSource("train", 64, dict(kinds=40))[3]
    objects = [
        {"category_id": int(kind), "bbox": box.tolist()}
        for kind, box in zip(example["categories"], example["boxes"], strict=True)
    ]
    (tmp_path / "boxes.json").write_text(json.dumps(objects))
    made = condition_arguments(laid_out, {"layout": str(tmp_path / "boxes.json")}, 64, 64)
    trained = Boxes("boxes", objects=4, tokens=1090)(example, np.random.default_rng(0))["boxes"]

    def triples(tokens):
        return sorted(map(tuple, tokens[:12].reshape(4, 3).tolist())), tokens[12:].tolist()

    assert triples(made["conditions"]["boxes"][0]) == triples(trained)
    assert laid_out(**made, steps=1, guidance=1.0).shape == (1, 64, 64, 3)


def test_a_small_picture_is_what_training_reads(tmp_path):
    section = tiny_models.array("concat", None, None, 3, network=PATCHES)
    enlarging = pipeline(low_resolution=section)
    source = SceneSource("train", 64, dict(kinds=40))
    small = LowResolution("low_resolution", factor=2)(source[0], None)["low_resolution"]
    picture = np.round((small + 1.0) * 127.5).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "small.png")
    made = condition_arguments(
        enlarging, {"low_resolution": str(tmp_path / "small.png")}, None, None
    )
    np.testing.assert_allclose(made["conditions"]["low_resolution"][0], small, atol=1e-6)
    assert (made["height"], made["width"]) == (64, 64)
    assert enlarging(**made, steps=1, guidance=1.0).shape == (1, 64, 64, 3)


@pytest.mark.parametrize(
    "objects, message",
    [
        ([{"category_id": 1090, "bbox": [0, 0, 9, 9]}], "categories lie in 0 … 1088"),
        ([{"category_id": 1, "bbox": [0, 0, 9]}], "expected .*bbox"),
        ([{"bbox": [0, 0, 9, 9]}], "expected .*category_id"),
        ([{"category_id": 1, "bbox": [0, 0, 9, 9]}] * 5, "has 5 objects; this model is told 4"),
    ],
)
def test_layouts_that_are_refused(laid_out, tmp_path, objects, message):
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(objects))
    with pytest.raises(ValueError, match=message):
        condition_arguments(laid_out, {"layout": str(path)}, None, None)


def test_segmentations_that_are_refused(segmented, laid_out, tmp_path):
    path = tmp_path / "classes.png"
    files = {"segmentation": str(path)}
    Image.fromarray(np.full((32, 32), 41, np.uint8)).save(path)
    with pytest.raises(ValueError, match="class 41, but this model knows 0 … 40"):
        condition_arguments(segmented, files, None, None)
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(path)
    with pytest.raises(ValueError, match="has 3 channels: expected a grey or palette"):
        condition_arguments(segmented, files, None, None)
    Image.fromarray(np.zeros((32, 48), np.uint8)).save(path)
    with pytest.raises(ValueError, match="a drawing of width 48, not 32"):
        condition_arguments(segmented, files, 32, 32)
    with pytest.raises(ValueError, match="not told segmentation; of such files it takes --layout"):
        condition_arguments(laid_out, files, None, None)


def test_boxes_outside_of_the_picture_are_refused(laid_out, tmp_path):
    path = tmp_path / "boxes.json"
    for box in ([-5, 0, 10, 10], [30, 0, 10, 10], [3, 3, 0, 5]):
        path.write_text(json.dumps([{"category_id": 1, "bbox": box}]))
        with pytest.raises(ValueError, match=r"boxes.json: the box .* empty or not inside 32×32"):
            condition_arguments(laid_out, {"layout": str(path)}, None, None)


def test_one_side_may_be_asked_for(laid_out, tmp_path):
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps([{"category_id": 1, "bbox": [40, 0, 20, 20]}]))
    made = condition_arguments(laid_out, {"layout": str(path)}, None, 64)
    assert (made["height"], made["width"]) == (32, 64)
    assert condition_arguments(laid_out, {}, 32, 64) == {}


def test_a_placement_of_a_whole_picture():
    whole = Placement((32, 64), (32, 64), (0, 0), (32, 64))
    np.testing.assert_allclose(whole.boxes(np.array([[0.0, 0.0, 0.5, 1.0]])), [[0, 0, 0.5, 1]])
