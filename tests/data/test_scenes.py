"""Scenes: pure in the index, true to the pixel, told in words that can be read back, and split."""

import dataclasses
import itertools
import multiprocessing
import pickle
import re
import time
from collections import Counter

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common
from ldm_jax.data import scene_text
from ldm_jax.data.conditions import check_conditions, check_files, make_conditions
from ldm_jax.data.loader import Loader
from ldm_jax.data.scene_drawing import draw_ground, sprite
from ldm_jax.data.scene_layout import Draws, place
from ldm_jax.data.scene_options import SceneOptions
from ldm_jax.data.scenes import RELATIONS, SceneSource
from ldm_jax.data.sources import EmojiSource, open_source, sample
from ldm_jax.data.splits import is_held_out
from ldm_jax.data.transforms import flip

MANY = 3000
FEW = {"held_out_scenes": 100}
# Captions of the first scenes.
GOLDEN = [
    "a butterfly above a tractor on a blue background",
    "a rabbit face right of a carrot on a brown ground",
    "on the right one flame, on the left a giraffe, on a blue background",
]


@pytest.fixture(scope="module")
def train():
    return SceneSource("train")


@pytest.fixture(scope="module")
def held_out():
    return SceneSource("held_out", options={"held_out_scenes": MANY})


def same(a, b):
    return a.keys() == b.keys() and all(
        np.array_equal(a[k], b[k]) and type(a[k]) is type(b[k]) for k in a
    )


def _picture(source, index):
    return source[index]["image"].tobytes()


def test_a_scene_depends_on_its_index_alone(train, held_out):
    forwards = [train[i] for i in (0, 7, 9_999_999)]
    fresh = pickle.loads(pickle.dumps(SceneSource("train")))
    backwards = [fresh[i] for i in (9_999_999, 7, 0)][::-1]
    assert all(same(a, b) for a, b in zip(forwards, backwards, strict=True))
    assert same(train[-1], forwards[-1])
    assert not np.array_equal(train[0]["image"], held_out[0]["image"])
    other = SceneSource("train", options={"seed": 1})
    assert not np.array_equal(train[0]["image"], other[0]["image"])
    assert len({_picture(train, i) for i in range(300)}) == 300


def test_another_process_draws_the_same(train):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.starmap(_picture, [(train, i) for i in range(3)])
    assert there == [_picture(train, i) for i in range(3)]


def test_a_scene_stays_as_it_is(train):
    """Whoever trained on them resumes on the same."""
    assert [train.describe(i)["caption"] for i in range(3)] == GOLDEN


def test_all_is_training_and_then_held_out():
    options = {"train_scenes": 5, "held_out_scenes": 3}
    train, held_out, both = (
        SceneSource(split, options=options) for split in ("train", "held_out", "all")
    )
    assert (len(train), len(held_out), len(both)) == (5, 3, 8)
    assert all(same(a, b) for a, b in zip([*train, *held_out], both, strict=True))
    with pytest.raises(IndexError):
        both[8]
    assert len({e["name"] for e in both}) == 8


def test_an_example_is_what_every_source_gives(train):
    example, told = train[3], train.describe(3)
    assert example["image"].shape == (64, 64, 3) and example["image"].dtype == np.uint8
    assert told.keys() == {"caption", "label", "name"}
    assert same(told, {k: example[k] for k in told})
    assert train.classes[example["label"]] in scene_text.nouns(train.kinds[example["label"]])
    assert example["placement"].size == example["placement"].original == (64, 64)
    assert train.left_out == train.lost_captions == {}


@pytest.mark.parametrize("side", [64, 100, 256, 512])
def test_the_picture_is_the_sprites_over_the_ground(side):
    """Exact compositing, in closed form; on canvases of every size."""
    source = SceneSource(image_size=side)
    for index in range(12):
        scene = source.scene(index)
        expected = draw_ground(scene.ground, scene.texture, scene.look, side)
        for placed in scene.objects:
            pixels = sprite(source.kinds[placed.kind], placed.size)
            assert max(pixels.shape[:2]) == placed.size
            height, width = pixels.shape[:2]
            area = expected[placed.top : placed.top + height, placed.left : placed.left + width]
            assert area.shape[:2] == (height, width)  # all of it is on the canvas
            alpha = pixels[..., 3:] / 255.0
            area[...] = np.floor(pixels[..., :3] * alpha + area * (1 - alpha) + 0.5)
        assert np.array_equal(source.draw(scene), expected)
        assert 0.3 * side < min(p.size for p in scene.objects)
        assert max(p.size for p in scene.objects) < 0.45 * side


def test_masks_boxes_and_segmentation_agree_with_the_pixels(train):
    """Drawn without an object, the picture differs where the object is, and nowhere else."""
    for index in range(200):
        scene, example = train.scene(index), train[index]
        assert example["masks"].shape == (len(scene.objects), 64, 64)
        assert example["masks"].sum(0).max() <= 1  # no overlap
        for i, placed in enumerate(scene.objects):
            fewer = tuple(o for o in scene.objects if o != placed)
            without = train.draw(dataclasses.replace(scene, objects=fewer))
            changed = (example["image"] != without).any(-1)
            mask, box = example["masks"][i], example["boxes"][i].astype(int)
            left, top, width, height = box
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert (rows[0], rows[-1] + 1) == (top, top + height)
            assert (columns[0], columns[-1] + 1) == (left, left + width)
            # Where colours are those of the ground by chance, nothing changes.
            assert (changed & mask).sum() > 0.9 * mask.sum()
            grown = np.zeros((64, 64), bool)
            # Antialiased edges and thin aerials are less than half opaque.
            grown[max(top - 3, 0) : top + height + 3, max(left - 3, 0) : left + width + 3] = True
            assert not (changed & ~grown).any()
            assert (example["segmentation"][mask] == 1 + placed.kind).all()
            assert example["categories"][i] == placed.kind
        assert (example["segmentation"][~example["masks"].any(0)] == 0).all()


def combinations(source, scene):
    """What the picture shows, by the boxes of its objects alone, as names that are hashed."""
    names = [source.kinds[placed.kind] for placed in scene.objects]
    shown = set()
    if len(names) == 1:
        shown.add(f"{names[0]} on {tuple(scene_text.GROUNDS)[scene.ground]}")
    shown |= {f"{count} {name}" for name, count in Counter(names).items() if count > 1}
    boxes = np.array([source.box(placed) for placed in scene.objects], float)
    hulls = {}
    for name in dict.fromkeys(names):
        own = boxes[[n == name for n in names]]
        hulls[name] = np.stack([own[:, :2].min(0), (own[:, :2] + own[:, 2:]).max(0)])
    for a, b in itertools.permutations(hulls, 2):
        for axis, relation in enumerate(RELATIONS):
            apart = np.abs(hulls[b].mean(0) - hulls[a].mean(0))
            if hulls[a][1][axis] <= hulls[b][0][axis] and apart[axis] > 2 * apart[1 - axis]:
                shown.add(f"{a} {relation} {b}")
    return shown


def test_what_is_held_out_is_never_shown_in_training(train):
    seen = set()
    for index in range(2 * MANY):
        shown = combinations(train, train.scene(index))
        assert shown, index
        assert not any(is_held_out(name, 0.1) for name in shown), (index, shown)
        seen |= shown
    assert len(seen) > MANY


def test_held_out_scenes_show_what_is_held_out(held_out):
    forms = set()
    for index in range(MANY):
        scene = held_out.scene(index)
        shown = [n for n in combinations(held_out, scene) if is_held_out(n, 0.1)]
        assert shown, (index, scene)
        assert scene.relation != "with"
        forms |= {re.search(r"^\d| left of | above | on ", name)[0] for name in shown}
    assert forms == {"2", "3", "4", " left of ", " above ", " on "}


def test_a_tenth_is_held_out(train):
    pairs = [
        f"{a} {relation} {b}"
        for a, b in itertools.permutations(train.kinds, 2)
        for relation in RELATIONS
    ]
    assert np.mean([is_held_out(p, 0.1) for p in pairs]) == pytest.approx(0.1, abs=0.005)


# Reading captions back: an independent grammar.

NUMBER = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "2": 2, "3": 3, "4": 4}


def said(caption, kinds):
    """(groups in the order in which they stand, relation, ground words) of a caption."""
    words = {}
    for name in kinds:
        for noun in scene_text.nouns(name):
            words[noun] = words[scene_text.plural(noun)] = name
    text = caption
    ground = None
    if found := re.search(r",? on (?:an? )([a-z ]+) (?:ground|background)$", text):
        ground, text = found[1], text[: found.start()]
    nouns = "|".join(sorted(map(re.escape, words), key=len, reverse=True))
    phrase = rf"(?:\b({'|'.join(NUMBER)}) )?(?<!\w)({nouns})(?!\w)"
    groups = [(words[m[2]], NUMBER[m[1] or "one"], m[2]) for m in re.finditer(phrase, text)]
    rest = re.sub(phrase, "@", text)
    for name, count, noun in groups:
        plural = noun in {scene_text.plural(n) for n in scene_text.nouns(name)}
        assert plural == (count > 1) or noun.endswith("fish"), caption
    grammar = {
        "@": ("", 1),
        "@ left of @": ("left of", 1),
        "@ to the left of @": ("left of", 1),
        "@ right of @": ("left of", -1),
        "@ to the right of @": ("left of", -1),
        "@ on the left and @ on the right": ("left of", 1),
        "on the right @, on the left @": ("left of", -1),
        "@ above @": ("above", 1),
        "@ over @": ("above", 1),
        "@ below @": ("above", -1),
        "@ under @": ("above", -1),
        "@ at the top and @ at the bottom": ("above", 1),
        "at the bottom @, at the top @": ("above", -1),
        "@ and @": ("with", 1),
        "@ with @": ("with", 1),
        "@, @ and @ from left to right": ("left of", 1),
        "from left to right: @, @ and @": ("left of", 1),
        "@, @ and @ from right to left": ("left of", -1),
        "@, @ and @ from top to bottom": ("above", 1),
        "from top to bottom: @, @ and @": ("above", 1),
        "@, @ and @ from bottom to top": ("above", -1),
    }
    relation, order = grammar[rest]
    return [g[:2] for g in groups][::order], relation, ground, rest


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_captions_say_what_is_there(split, train, held_out):
    source = {"train": train, "held_out": held_out}[split]
    forms, nouns = Counter(), Counter()
    for index in range(MANY):
        scene = source.scene(index)
        groups, relation, ground, form = said(scene.caption, source.kinds)
        expected = [(source.kinds[kind], count) for kind, count in scene.groups]
        assert relation == scene.relation, scene.caption
        if relation == "with":
            assert sorted(groups) == sorted(expected), scene.caption
        else:
            assert groups == expected, scene.caption
            shown = combinations(source, scene)
            for (a, _), (b, _) in itertools.combinations(groups, 2):
                assert f"{a} {relation} {b}" in shown, scene.caption
        if ground:
            *texture, colour = re.fullmatch(
                rf"(?:({'|'.join(scene_text.TEXTURES)}) )?(.*)", ground
            ).groups()
            assert colour == tuple(scene_text.GROUNDS)[scene.ground], scene.caption
            assert texture[0] in (None, scene.texture), scene.caption
        forms[form, bool(ground)] += 1
        nouns.update(groups)
    wordings = {form for form, _ in forms}
    assert len(wordings) == (21 if split == "train" else 19)
    assert {count for _, count in nouns} == {1, 2, 3, 4}
    assert {name for name, _ in nouns} == set(source.kinds)


def test_nouns_are_of_one_kind_each(train):
    every = [noun for name in train.kinds for noun in scene_text.nouns(name)]
    every += [scene_text.plural(noun) for noun in every if not noun.endswith("fish")]
    assert len(set(every)) == len(every)
    assert len(train.kinds) == 160 and set(train.kinds) <= {e["name"] for e in EmojiSource("all")}


@pytest.mark.parametrize(
    "noun, one, several",
    [
        ("red apple", "a red apple", "red apples"),
        ("umbrella", "an umbrella", "umbrellas"),
        ("unicorn", "a unicorn", "unicorns"),
        ("hourglass", "an hourglass", "hourglasses"),
        ("bus", "a bus", "buses"),
        ("mouse", "a mouse", "mice"),
        ("maple leaf", "a maple leaf", "maple leaves"),
        ("butterfly", "a butterfly", "butterflies"),
        ("fish", "a fish", "fish"),
        ("tomato", "a tomato", "tomatoes"),
        ("monkey", "a monkey", "monkeys"),
        ("slice of pizza", "a slice of pizza", "slices of pizza"),
        ("smiling face with sunglasses", "a smiling face with sunglasses",
         "smiling faces with sunglasses"),
        ("grapes", "grapes", "grapes"),
    ],
)  # fmt: skip
def test_english(noun, one, several):
    assert scene_text.with_article(noun) == one
    assert scene_text.plural(noun) == several


def test_objects_can_be_seen(train):
    """The least visible object still differs from its ground."""
    for index in range(500):
        scene, example = train.scene(index), train[index]
        bare = train.draw(dataclasses.replace(scene, objects=())).astype(int)
        differs = np.linalg.norm(example["image"].astype(int) - bare, axis=-1) > 40
        for mask in example["masks"]:
            assert differs[mask].mean() > 0.6, (index, scene.caption)


@pytest.mark.parametrize("vertical", [False, True])
def test_aligned_lines_do_not_differ_by_more_than_a_third(vertical):
    for seed in range(500):
        draws = Draws(seed)
        lines = draws.pick(([1, 1], [1, 2], [2, 1], [2, 2], [1, 1, 1]))
        most = 19 if len(lines) == 3 else 28
        shapes = [[(most - draws.below(9), most - draws.below(9)) for _ in range(n)] for n in lines]
        corners = place(shapes, 64, vertical, True, draws)
        hulls = []
        for line, starts in zip(shapes, corners, strict=True):
            boxes = np.hstack([starts, np.add(starts, line)])
            assert boxes.min() >= 1 and boxes.max() <= 63
            hulls.append(np.concatenate([boxes[:, :2].min(0), boxes[:, 2:].max(0)]))
        along, across = (0, 1) if vertical else (1, 0)
        for a, b in itertools.combinations(hulls, 2):
            apart = [abs(b[i] + b[i + 2] - a[i] - a[i + 2]) / 2 for i in (along, across)]
            assert a[along + 2] <= b[along]
            assert apart[1] <= apart[0] / 3 + 0.51, (seed, lines)


@pytest.mark.parametrize("side, size", [(64, 0.25), (64, 0.4375), (100, 0.28), (256, 0.47)])
@pytest.mark.parametrize("grid", [2, 4, 8, 16])
def test_objects_begin_at_multiples_of_the_grid(grid, side, size):
    """They do not overlap, stay on the canvas and are still where the relation says."""
    source = SceneSource(image_size=side, options={"size": (size, size), "grid": grid})
    seen = set()
    for index in range(150):
        scene = source.scene(index)
        corners = [(placed.top, placed.left) for placed in scene.objects]
        assert not np.any(np.array(corners) % grid)
        seen.update(corners)
        assert source.masks(scene).sum(0).max() == 1
        if not scene.axis:
            continue
        along, across = (0, 1) if scene.axis == "above" else (1, 0)
        spans, objects = [], iter(scene.objects)
        for _, count in scene.groups:
            parts = list(itertools.islice(objects, count))
            shapes = [sprite(source.kinds[p.kind], p.size).shape[:2] for p in parts]
            first = np.array([(p.top, p.left) for p in parts])
            spans.append((first.min(0), (first + shapes).max(0)))
        for (begin, end), (other, last) in itertools.combinations(spans, 2):
            apart = np.abs(begin + end - other - last)
            assert end[along] <= other[along] and 3 * apart[across] <= apart[along]
    assert len(seen) > 3  # and they do move


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"objects": (1, 1)}, {1}),
        ({"objects": (2, 2)}, {2}),
        ({"objects": (3, 3)}, {3}),
        ({"objects": (4, 4)}, {4}),
        ({"objects": (2, 3), "kinds": 12}, {2, 3}),
        ({"names": ("rocket",)}, {1, 2, 3, 4}),
        ({"names": ("rocket", "house"), "objects": (2, 4)}, {2, 3, 4}),
    ],
)
def test_how_many_objects(options, expected):
    source = SceneSource(options=options)
    counts = Counter(len(source.scene(i).objects) for i in range(300))
    assert counts.keys() <= expected
    assert {min(expected), max(expected)} == {min(counts), max(counts)} or len(source.kinds) < 3
    assert len(source.kinds) == options.get("kinds", len(options.get("names", range(160))))


def test_sizes_kinds_and_textures_are_chosen():
    options = {"size": (0.25, 0.25), "kinds": 5, "textures": False}
    source = SceneSource(image_size=128, options=options)
    scenes = [source.scene(i) for i in range(200)]
    assert {placed.size for scene in scenes for placed in scene.objects} == {32}
    assert {placed.kind for scene in scenes for placed in scene.objects} == set(range(5))
    assert {scene.texture for scene in scenes} == {""}
    grounds = ("white", "purple")
    source = SceneSource("all", options={"grounds": grounds, "train_scenes": 100} | FEW)
    shown = {tuple(scene_text.GROUNDS)[source.scene(i).ground] for i in range(200)}
    assert shown == set(grounds)
    hidden = {"red": "kiss mark", "purple": "alien monster", "blue": "ZZZ", "beige": "bone"}
    for ground, name in hidden.items():  # also for objects of which nothing shows on it
        source = SceneSource(options={"grounds": (ground,), "names": (name, "star", "rocket")})
        drawn = {tuple(scene_text.GROUNDS)[source.scene(i).ground] for i in range(50)}
        assert drawn == {ground}
    # Objects that hardly show on the only ground are drawn alone as well.
    source = SceneSource(options={"grounds": ("white",), "objects": (1, 1)})
    alone = {source.scene(i).objects[0].kind for i in range(3000)}
    assert source.kinds.index("ghost") in alone
    some = SceneSource(options={"names": ("robot", "flag: Japan", "grapes")})
    assert some.classes == ("robot", "flag: Japan", "grapes")
    assert any("grapes" in some.describe(i)["caption"] for i in range(20))


def test_nothing_held_out():
    source = SceneSource("held_out", fraction=0.0)
    assert len(source) == 0
    everything = SceneSource("train", fraction=0.0, options={"kinds": 3})
    shown = set().union(*(combinations(everything, everything.scene(i)) for i in range(2000)))
    assert sum("left of" in name for name in shown) == 6


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": 3}, "no option 'kind'; it has kinds, names"),
        ({"kinds": 0}, "kinds=0: choose 1 … 160"),
        ({"kinds": 161}, "kinds=161: choose 1 … 160"),
        ({"names": ("red aple",)}, "no emoji 'red aple'; near it are red apple"),
        ({"names": ("qqqqq",)}, "no emoji 'qqqqq'$"),
        ({"names": ("cat face", "cat")}, "'cat face' and 'cat' are both called 'cat'"),
        ({"names": ("star", "star")}, "'star' and 'star' are both called 'star'"),
        ({"objects": (0, 2)}, r"objects=\(0, 2\): .* within 1 … 4"),
        ({"objects": (3, 2)}, r"objects=\(3, 2\): .* within 1 … 4"),
        ({"objects": (1, 5)}, r"objects=\(1, 5\): .* within 1 … 4"),
        ({"objects": 3}, "objects=3: expected two numbers"),
        ({"size": (0.4,)}, "size=.*: expected two numbers"),
        ({"size": (0.1, 0.3)}, r"size=\(0.1, 0.3\): .* 0.25 … 0.469 for image_size=64"),
        ({"size": (0.3, 0.5)}, r"size=\(0.3, 0.5\): .* up to 4 objects"),
        ({"size": (0.4, 0.3)}, r"size=\(0.4, 0.3\): the least and the greatest"),
        ({"grid": 3}, "grid=3: choose 1, 2, 4, 8, 16 pixels"),
        ({"grounds": ("whit",)}, "grounds: there is no 'whit'; choose of white, grey"),
        ({"train_scenes": 0}, "train_scenes=0: expected 1 or more"),
        ({"held_out_scenes": -1}, "held_out_scenes=-1: expected 0 or more"),
        ({"seed": -1}, "seed=-1: expected 0 or more"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=f"data.scenes.*{message}"):
        SceneSource(options=options)


def test_other_settings_that_cannot_be():
    with pytest.raises(ValueError, match="data.image_size=32: scenes have 64 … 512"):
        SceneSource(image_size=32)
    with pytest.raises(ValueError, match="a share of 0 … 1, below 1, not 1.0"):
        SceneSource(fraction=1.0)
    with pytest.raises(ValueError, match="unknown split 'test'"):
        SceneSource("test")
    with pytest.raises(
        ValueError, match="all scenes of 1 kinds .* are held out .data.held_out=0.9"
    ):
        SceneSource(fraction=0.999, options={"kinds": 1, "objects": (4, 4)})


def config(**fields):
    return ConfigDict(
        {"source": "scenes", "image_size": 64, "classes": (), "held_out": 0.1} | fields
    )


def test_the_config_has_the_options_and_their_defaults():
    assert common.data()["scenes"] == dataclasses.asdict(SceneOptions())
    made = ConfigDict(common.data(source="scenes"))
    assert same(open_source(made, "held_out")[5], SceneSource("held_out")[5])
    few = open_source(config(scenes=dict(kinds=3, held_out_scenes=9)), "held_out")
    assert len(few) == 9 and len(few.classes) == 3
    with pytest.raises(
        ValueError, match="choose the kinds with data.scenes.names or data.scenes.k"
    ):
        open_source(config(classes=("rocket",)))


def test_an_endless_source_starts_at_once(train):
    begin = time.perf_counter()
    loader = Loader(train, 4, seed=3)
    assert loader.batch(2)["index"].tolist() == [8, 9, 10, 11]
    assert time.perf_counter() - begin < 1
    assert sample(train, 10)[9]["name"] == train[9]["name"] and len(sample(train, 10)) == 10
    small = SceneSource(options={"train_scenes": 10})
    assert sample(small, 10) is small


def test_conditions_take_what_a_scene_knows(train):
    layout, segmentation = make_conditions(
        {"boxes": {"tokens": 8192}, "parts": {"kind": "segmentation", "classes": 161}}
    )
    check_conditions((layout, segmentation), {"layout": ["boxes"]}, "scenes")
    check_files((layout, segmentation), train)
    index = next(i for i in range(99) if len(train.scene(i).objects) == 2)
    example, rng = train[index], np.random.default_rng(0)
    assert np.array_equal(segmentation(example, rng)["parts"], example["segmentation"])
    tokens = layout(example, rng)["boxes"]
    triples = tokens[:90].reshape(30, 3)
    told = triples[triples[:, 0] != 8191]
    left, top, width, height = example["boxes"].T / 64
    corners = [np.round(x * 89) + np.round(y * 89) * 90 for x, y in
               ((left, top), (left + width, top + height))]  # fmt: skip
    expected = np.stack([example["categories"], *corners], axis=-1)
    assert sorted(told.tolist()) == sorted(expected.astype(int).tolist())

    seed = next(s for s in range(9) if np.random.default_rng(s).random() < 0.5)
    flipped = flip(example, np.random.default_rng(seed))
    mirrored = segmentation(flipped, rng)["parts"]
    assert np.array_equal(mirrored, example["segmentation"][:, ::-1])
    (few,) = make_conditions({"segmentation": {"classes": 5}})
    worst = next(train[i] for i in range(99) if train[i]["label"] > 5)
    with pytest.raises(ValueError, match="scenes/0/train/.*classes is 5"):
        few(worst, rng)


def test_other_sources_without_files_still_refuse():
    (segmentation,) = make_conditions({"segmentation": {}})
    with pytest.raises(ValueError, match="data.source='emoji' has no files"):
        check_conditions((segmentation,), {}, "emoji")
    (depth,) = make_conditions({"depth": {}})
    with pytest.raises(ValueError, match="data.source='scenes' has no files"):
        check_conditions((depth,), {}, "scenes")
