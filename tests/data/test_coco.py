"""Captions and boxes of COCO's files."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import layout
from ldm_jax.data.coco import read_annotations
from ldm_jax.data.conditions import check_files, make_conditions
from ldm_jax.data.folder import FolderSource
from ldm_jax.data.sources import open_source
from ldm_jax.data.transforms import compose

IMAGES = [{"id": 7, "file_name": "a.jpg"}, {"id": 3, "file_name": "b.jpg"}]
# As in COCO, ids are neither in order nor without gaps.
CATEGORIES = [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}]
OBJECTS = [
    {"image_id": 7, "category_id": 90, "bbox": [10, 4, 20, 8], "iscrowd": 0},
    {"image_id": 7, "category_id": 1, "bbox": [0, 0, 5, 5], "iscrowd": 1},
    {"image_id": 7, "category_id": 1, "bbox": [0, 0, 5.5, 5], "iscrowd": 0},
    {"image_id": 3, "category_id": 1, "bbox": [0, 0, 0, 5], "iscrowd": 0},
]
TEXTS = [
    {"image_id": 3, "caption": "A bus.\n"},
    {"image_id": 7, "caption": "a dog "},
    {"image_id": 7, "caption": "a  brown dog"},
]


@pytest.fixture
def written(tmp_path):
    def written(name, annotations, images=IMAGES, **more):
        path = tmp_path / name
        path.write_text(json.dumps({"images": images, "annotations": annotations} | more))
        return str(path)

    return written


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        Image.new("RGB", (40, 20), (200, 10, 10)).save(folder / name)
    (folder / "c.txt").write_text("from beside")
    (folder / "b.txt").write_text("not this")
    return folder


@pytest.fixture
def files(written):
    return [
        written("instances.json", OBJECTS, categories=CATEGORIES),
        written("captions.json", TEXTS),
    ]


def test_captions_and_boxes(pictures, files):
    source = FolderSource(pictures, "all", image_size=16, annotations=files)
    a, b, c = (source[i] for i in range(3))
    assert a["caption"] == "a dog" and a["captions"] == ("a dog", "a brown dog")
    assert b["caption"] == "A bus." and c["captions"] == ("from beside",)
    np.testing.assert_array_equal(a["categories"], [1, 0])  # person is 0, toothbrush 1
    np.testing.assert_array_equal(a["boxes"], [[10, 4, 20, 8], [0, 0, 5.5, 5]])
    assert b["boxes"].shape == c["boxes"].shape == (0, 4)
    assert source.lost_captions == {}
    assert {"categories", "captions"} <= source.describe(0).keys()


def test_boxes_are_tokens_of_a_layout(pictures, files):
    """The picture is 40 × 20, and its middle square is seen: 10 … 30."""
    conditions = make_conditions(layout.get_config().data.conditions)
    example = FolderSource(pictures, "all", image_size=16, annotations=files)[0]
    tokens = conditions[0](example, np.random.default_rng(0))[conditions[0].name]
    objects = tokens[:-2].reshape(-1, 3)
    sections = int(conditions[0].tokens ** 0.5)
    above_left, below_right = (divmod(int(place), sections) for place in objects[0, 1:])
    assert objects[0, 0] == 1 and (objects[1:] == conditions[0].tokens - 1).all()
    last = sections - 1
    assert above_left == (round(4 / 20 * last), 0)
    assert below_right == (round(12 / 20 * last), last)


def test_boxes_of_annotations_need_no_files_beside_the_pictures(pictures, files):
    conditions = make_conditions(layout.get_config().data.conditions)
    check_files(conditions, FolderSource(pictures, "all", image_size=16, annotations=files))
    with pytest.raises(FileNotFoundError, match="3 of 3 pictures have no file .boxes.json beside"):
        check_files(conditions, FolderSource(pictures, "all", image_size=16))
    with pytest.raises(FileNotFoundError, match="3 of 3 pictures have no file .boxes.json beside"):
        captions = FolderSource(pictures, "all", image_size=16, annotations=files[1:])
        check_files(conditions, captions)


def test_a_random_caption(pictures, files):
    example = FolderSource(pictures, "all", image_size=16, annotations=files)[0]
    choose = compose(("captions",))
    chosen = {choose(example, np.random.default_rng(seed))["caption"] for seed in range(20)}
    assert chosen == {"a dog", "a brown dog"}
    with pytest.raises(ValueError, match='"captions": only a folder with data.annotations has'):
        choose({"caption": "a"}, np.random.default_rng(0))


def test_pictures_that_are_not_there_are_counted(pictures, written, caplog):
    images = [*IMAGES, {"id": 8, "file_name": "gone.jpg"}]
    path = written("captions.json", [*TEXTS, {"image_id": 8, "caption": "x"}], images)
    source = FolderSource(pictures, "all", image_size=16, annotations=[path])
    assert source.lost_captions == {"annotations of pictures that are not there": 1}
    assert "captions.json names gone.jpg, which is not there" in caplog.text
    assert "boxes" not in source[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "x.json: expected COCO's format"),
        ("{", "x.json: expected COCO's format"),
        ('{"images": [{"id": 1}], "annotations": []}', "KeyError.'file_name'"),
        ('{"images": [], "annotations": [{"image_id": 1, "bbox": [1, 2]}]}', "category_id"),
        ('{"images": [], "annotations": [{"image_id": 1, "segments_info": []}]}', "neither a capt"),
        (
            '{"images": [], "categories": [{"id": 1, "name": "a"}], '
            '"annotations": [{"image_id": 1, "category_id": 2, "bbox": [0, 0, 1, 1]}]}',
            "no category has the id 2",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_annotations([str(path)], ["a.jpg"])


def test_refusals(tmp_path, written):
    with pytest.raises(FileNotFoundError, match=r"data.annotations: '.*none.json' is not a file"):
        read_annotations([str(tmp_path / "none.json")], [])
    two = [written(f"{i}.json", [], categories=[{"id": 1, "name": name}])
           for i, name in enumerate(("cat", "dog"))]  # fmt: skip
    with pytest.raises(ValueError, match="1.json: category 1 is 'dog', but 'cat' in a file before"):
        read_annotations(two, [])
    config = ConfigDict(dict(source="emoji", image_size=64, annotations=("x.json",)))
    with pytest.raises(ValueError, match="data.annotations: data.source='emoji' has its own"):
        open_source(config)
