"""The reader of scenes: right on real ones, blurred ones too, and not when they are wrong."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFilter

from ldm_jax.data.scenes import Placed, SceneSource
from ldm_jax.metrics.scene_reader import read_scene, score

COUNT = 64


@pytest.fixture(scope="module")
def source():
    return SceneSource("held_out")


@pytest.fixture(scope="module")
def scenes(source):
    return [source.scene(i) for i in range(1000, 1000 + COUNT)]


@pytest.fixture(scope="module")
def images(source, scenes):
    return np.stack([source.draw(scene) for scene in scenes])


def test_real_scenes_are_read(source, scenes, images):
    rates = score(images, scenes, source)
    assert rates.keys() == {"objects", "relation", "count", "scene"}
    assert min(rates.values()) >= 0.97, rates


def test_boxes_are_where_the_objects_are(source, scenes, images):
    for scene, found in zip(scenes[:24], read_scene(images[:24], source), strict=True):
        if Counter(f.kind for f in found) != dict(scene.groups):
            continue
        for placed in scene.objects:
            true = np.array(source.box(placed))
            overlaps = []
            for one in found:
                box = np.array(one.box)
                low = np.maximum(true[:2], box[:2])
                high = np.minimum(true[:2] + true[2:], box[:2] + box[2:])
                common = np.prod(np.maximum(high - low, 0))
                overlap = common / (np.prod(true[2:]) + np.prod(box[2:]) - common)
                overlaps.append(overlap if one.kind == placed.kind else 0)
            assert max(overlaps) > 0.8, scene.caption


def test_blurred_and_noisy_scenes_are_read(source, scenes, images):
    """As an autoencoder of 26 dB leaves them."""
    rng = np.random.default_rng(0)
    blurred = [Image.fromarray(i).filter(ImageFilter.GaussianBlur(1.0)) for i in images]
    noisy = np.stack(blurred) + rng.normal(0, 8, images.shape)
    noisy = np.clip(np.round(noisy), 0, 255).astype(np.uint8)
    rates = score(noisy, scenes, source)
    assert min(rates.values()) >= 0.93, rates


def test_scenes_of_others_are_wrong(source, scenes, images):
    rates = score(images[:16], scenes[16:32], source)
    assert max(rates.values()) <= 0.05, rates


def test_what_is_wrong_is_told_apart(source):
    """Exchanged objects, one too few, another kind: each fails what it is to fail."""
    pairs = [
        scene
        for scene in map(source.scene, range(200))
        if [n for _, n in scene.groups] == [1, 1] and scene.relation == "left of"
    ][:8]
    exchanged = []
    for scene in pairs:
        a, b = scene.objects
        top = min(a.top, b.top, 64 - 20)
        swapped = (Placed(a.kind, 20, top, 40), Placed(b.kind, 20, top, 4))
        exchanged.append(source.draw(dataclasses.replace(scene, objects=swapped)))
    rates = score(np.stack(exchanged), pairs, source)
    assert rates["objects"] >= 0.8 and rates["relation"] == rates["scene"] == 0
    assert np.isnan(rates["count"])

    several = [s for s in map(source.scene, range(200)) if s.groups[0][1] == 3][:8]
    fewer = [dataclasses.replace(s, objects=s.objects[1:]) for s in several]
    rates = score(np.stack([source.draw(s) for s in fewer]), several, source)
    assert rates["objects"] >= 0.8 and rates["count"] == rates["scene"] == 0


def test_large_canvases_and_nothing_at_all():
    for side in (100, 256):
        source = SceneSource(image_size=side, options={"kinds": 30, "textures": False})
        scenes = [source.scene(i) for i in range(12)]
        images = np.stack([source.draw(scene) for scene in scenes])
        assert score(images, scenes, source)["scene"] >= 0.9
        (found,) = read_scene(images[:1], source)
        true = np.array([source.box(placed) for placed in scenes[0].objects])
        assert abs(true.max() - max(max(f.box) for f in found)) <= side / 20
        assert read_scene(np.full((2, side, side, 3), 90, np.uint8), source) == [[], []]
    assert read_scene(images[:0], source) == []


def test_other_pictures_are_refused(source, images):
    with pytest.raises(ValueError, match=r"uint8 \(N, 64, 64, 3\).*got uint8 \(64, 32, 64, 3\)"):
        read_scene(images[:, ::2], source)
    with pytest.raises(ValueError, match="got float32"):
        read_scene(images.astype(np.float32), source)


def test_grounds_noise_and_ruins_hold_no_objects(source, scenes):
    bare = [source.draw(dataclasses.replace(scene, objects=())) for scene in scenes[:24]]
    assert read_scene(np.stack(bare), source) == [[]] * 24
    rng = np.random.default_rng(0)
    noise = rng.normal(128, 40, (4, 64, 64, 3)).clip(0, 255).astype(np.uint8)
    assert read_scene(noise, source) == [[]] * 4
    ruins = np.full((8, 64, 64, 3), 186.0)
    ruins[:, 20:44, 20:44] = 136 + rng.normal(0, 75, (8, 24, 24, 1))
    found = read_scene(ruins.clip(0, 255).astype(np.uint8), source)
    assert sum(map(len, found)) <= 4  # a kind may be as near as that by chance
