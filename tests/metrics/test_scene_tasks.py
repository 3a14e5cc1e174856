"""The judges of scenes: near perfect on the scenes themselves, and low where something is wrong."""

import dataclasses

import numpy as np
import pytest

from ldm_jax.data.condition_kinds import Boxes, Edges, LowResolution, Mask
from ldm_jax.data.scenes import SceneSource
from ldm_jax.metrics.scene_tasks import JUDGES, biharmonic, judge, overlap

COUNT = 12


@pytest.fixture(scope="module")
def scenes():
    source = SceneSource("held_out", 64, dict(kinds=40))
    rng = np.random.default_rng(0)
    examples = [source[i] for i in range(COUNT)]
    for example in examples:
        example |= Mask("mask", whole=0.0)(example, rng)
        example |= LowResolution("low_resolution")(example, rng)
        example |= Edges("control")(example, rng)
        example |= Boxes("boxes", objects=4, tokens=1090)(example, rng)  # tokens, not boxes
    images = np.stack([example["image"] for example in examples])
    return images, examples, [source.scene(i) for i in range(COUNT)], source


def judged(scenes, told, images=None):
    real, *rest = scenes
    return judge(real if images is None else images, {told}, *rest)


def test_the_scenes_themselves(scenes):
    assert judged(scenes, "caption")["scene"] == 1.0
    assert judged(scenes, "boxes") == {"boxes": 1.0}
    assert judged(scenes, "segmentation")["miou"] > 0.97
    mask = judged(scenes, "mask")
    assert mask["masked_psnr"] == 60.0 and mask["known_error"] == 0.0
    assert 5.0 < mask["mean_colour_psnr"] < 25.0
    assert mask["biharmonic_psnr"] > mask["mean_colour_psnr"]
    small = judged(scenes, "low_resolution")
    assert small["agreement"] == small["drawn_psnr"] == 60.0 and 15.0 < small["bicubic_psnr"] < 30.0


def test_edges(scenes):
    assert judged(scenes, "control")["edge_correlation"] == pytest.approx(1.0)
    moved = judged(scenes, "control", np.roll(scenes[0], 12, axis=2))["edge_correlation"]
    assert -0.2 < moved < 0.5
    assert judged(scenes, "control", np.zeros_like(scenes[0])) == {"edge_correlation": 0.0}
    examples = [dict(control=np.ones((64, 64, 3)))] * COUNT  # hints that are no edges
    assert judge(scenes[0], {"control"}, examples, *scenes[2:]) == {}


def test_other_scenes(scenes):
    """Each picture judged by what was asked of the next."""
    images = np.roll(scenes[0], 1, axis=0)
    assert judged(scenes, "caption", images)["objects"] < 0.2
    assert judged(scenes, "boxes", images)["boxes"] < 0.2
    assert judged(scenes, "segmentation", images)["miou"] < 0.2
    mask = judged(scenes, "mask", images)
    assert mask["masked_psnr"] < 20.0 and mask["known_error"] > 100.0
    assert judged(scenes, "low_resolution", images)["agreement"] < 20.0


def test_objects_at_other_places(scenes):
    """Moved by 12 pixels, the kinds are right and the boxes wrong."""
    images = np.roll(scenes[0], 12, axis=2)
    assert judged(scenes, "boxes", images)["boxes"] < 0.35
    assert judged(scenes, "caption", images)["objects"] > 0.5


def test_other_objects_at_the_right_places(scenes):
    """A box is right only with what was asked to be in it."""
    _, _, asked, source = scenes
    others = [
        dataclasses.replace(
            scene,
            objects=tuple(dataclasses.replace(o, kind=(o.kind + 1) % 40) for o in scene.objects),
        )
        for scene in asked
    ]
    images = np.stack([source.draw(scene) for scene in others])
    assert judged(scenes, "boxes", images)["boxes"] < 0.1
    assert judged(scenes, "segmentation", images)["miou"] < 0.2


def test_a_label_asks_for_one_kind(scenes):
    assert judged(scenes, "label") == {"class": judged(scenes, "caption")["objects"]}


def test_what_has_no_judge_is_left_out(scenes):
    assert judged(scenes, "image") == {} and "image" not in JUDGES


def test_overlap():
    assert overlap((0, 0, 4, 4), (0, 0, 4, 4)) == 1.0
    assert overlap((0, 0, 4, 4), (2, 0, 4, 4)) == pytest.approx(8 / 24)
    assert overlap((0, 0, 4, 4), (4, 0, 4, 4)) == 0.0


def test_biharmonic_surfaces_are_continued():
    """Cubic polynomials solve Δ²u = 0, on the grid too; known pixels stay."""
    y, x = np.mgrid[-1:1:32j, -1:1:40j]
    surfaces = [x**3 - y, x**3 - 3 * x * y**2 + y**2 - x**2, x * y + 0.3 * x]
    image = np.round(np.stack([127.5 + 50.0 * s for s in surfaces], -1)).astype(np.uint8)
    mask = np.zeros((32, 40), bool)
    mask[8:20, 10:30] = True
    hidden = np.where(mask[..., None], 0, image).astype(np.uint8)
    filled = biharmonic(hidden, mask)
    assert np.abs(filled.astype(int) - image).max() <= 6  # of values rounded to 8 bits
    np.testing.assert_array_equal(filled[~mask], image[~mask])
    edge = np.zeros((32, 40), bool)
    edge[:, 35:] = edge[:5] = True
    grey = np.full_like(image, 77)
    np.testing.assert_array_equal(biharmonic(np.where(edge[..., None], 0, grey), edge), grey)
