"""The folders of GenEval, DPG-Bench and HPSv2: their layouts, and that a stopped run goes on."""

import json
import zlib

import numpy as np
import pytest
from PIL import Image

from ldm_jax.evaluation.suites import SUITES, draw_suite
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.pipeline import Pipeline
from tests import tiny_models

SIDE = 16
GENEVAL = [
    {"tag": "single_object", "include": [{"class": c, "count": 1}], "prompt": f"a photo of a {c}"}
    for c in ("bench", "cow", "bicycle", "clock", "carrot")
]
DPG = {"1": "A red truck.", "COCOval2014000000001": "Two cats\n", "drawtext.v2": "The word ICE."}
HPSV2 = {
    "anime": ["a girl", "a robot", "a fox"],
    "concept-art": ["a castle", "a ship", "a tower"],
    "paintings": ["a field", "a lake", "a boat"],
    "photo": ["a dog", "a cup", "a road"],
}


def colour(prompt, seed, index):
    """Of a picture, by all that its noise depends on."""
    return np.frombuffer(zlib.crc32(f"{prompt} {seed} {index}".encode()).to_bytes(4), np.uint8)[:3]


@pytest.fixture
def calls(monkeypatch):
    """The calls of a pipeline whose pictures are of one colour each."""
    calls = []

    def draw(self, prompts, n, seed, **drawing):
        calls.append((list(prompts), n, seed, drawing))
        colours = [colour(p, seed, i * n + k) for i, p in enumerate(prompts) for k in range(n)]
        return np.ones((SIDE, SIDE, 1)) * np.stack(colours)[:, None, None] / 255

    monkeypatch.setattr(Pipeline, "__call__", draw)
    return calls


def pipeline(config=tiny_models.STABLE, seed=0):
    model, params = LatentDiffusion.from_config(config), tiny_models.random_params(config, seed)
    return Pipeline(model, params, config)


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """The file or folder of each benchmark."""
    root = tmp_path_factory.mktemp("prompts")
    lines = "".join(json.dumps(line) + "\n" for line in GENEVAL)
    (root / "evaluation_metadata.jsonl").write_text(lines)
    for name, folder in (("dpg", DPG), ("hpsv2", HPSV2)):
        (root / name).mkdir()
        for file, content in folder.items():
            text = content if name == "dpg" else json.dumps(content)
            (root / name / f"{file}.{'txt' if name == 'dpg' else 'json'}").write_text(text)
    (root / "hpsv2" / "drawbench.json").write_text('["not of the benchmark"]')
    places = {name: root / name for name in ("dpg", "hpsv2")}
    return places | {"geneval": root / "evaluation_metadata.jsonl"}


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def pixels(path):
    return np.asarray(Image.open(path))


def test_geneval(calls, pipe, prompts, tmp_path):
    then = draw_suite(pipe, "geneval", prompts["geneval"], tmp_path / "out", seed=3, batch=8)
    assert then == f"python evaluation/evaluate_images.py {tmp_path / 'out'}"
    samples = [f"samples/{i:05d}.png" for i in range(4)]
    expected = {f"{i:05d}/{f}" for i in range(5) for f in ("metadata.jsonl", *samples)}
    assert set(files(tmp_path / "out")) == expected
    assert [(call[0], call[2]) for call in calls] == [
        (["a photo of a bench", "a photo of a cow"], 3),
        (["a photo of a bicycle", "a photo of a clock"], 5),
        (["a photo of a carrot"] * 2, 7),
    ]
    folder = tmp_path / "out" / "00003"
    assert json.loads((folder / "metadata.jsonl").read_text()) == GENEVAL[3]
    for i in range(4):
        picture = pixels(folder / samples[i])
        assert picture.shape == (SIDE, SIDE, 3)
        np.testing.assert_array_equal(picture[5, 5], colour("a photo of a clock", 5, 4 + i))
    about = json.loads(Image.open(folder / samples[0]).text["ldm_jax"])
    assert about["prompt"] == "a photo of a clock" and about["seed"] == 3
    written = json.loads((tmp_path / "out.json").read_text())
    assert written == {k: v for k, v in about.items() if k != "prompt"}
    assert written["benchmark"] == "geneval" and written["steps"] == calls[0][3]["steps"]


def test_dpg_bench(calls, pipe, prompts, tmp_path):
    """Its code crops four pictures out of one, and looks the name up to the first dot up."""
    then = draw_suite(pipe, "dpg", prompts["dpg"], tmp_path / "out")
    assert then == f"bash dpg_bench/dist_eval.sh {tmp_path / 'out'} {SIDE}"
    assert set(files(tmp_path / "out")) == {"1.png", "COCOval2014000000001.png", "drawtext.png"}
    with Image.open(tmp_path / "out" / "COCOval2014000000001.png") as sheet:
        assert sheet.size == (2 * SIDE, 2 * SIDE)
        for i, (left, top) in enumerate([(0, 0), (SIDE, 0), (0, SIDE), (SIDE, SIDE)]):
            crop = np.asarray(sheet.crop((left, top, left + SIDE, top + SIDE)))
            assert (crop == colour("Two cats", 0, 4 + i)).all()


def test_hpsv2(calls, pipe, prompts, tmp_path):
    draw_suite(pipe, "hpsv2", prompts["hpsv2"], tmp_path / "out", batch=2)
    expected = {f"{style}/{i:05d}.jpg" for style in HPSV2 for i in range(3)}
    assert set(files(tmp_path / "out")) == expected
    picture = pixels(tmp_path / "out" / "paintings" / "00001.jpg")
    assert np.abs(picture - colour("a lake", 0, 1).astype(int)).max() <= 2
    calls.clear()
    draw_suite(pipe, "hpsv2", prompts["hpsv2"] / "photo.json", tmp_path / "one")
    assert set(files(tmp_path / "one")) == {f"photo/{i:05d}.jpg" for i in range(3)}


@pytest.mark.parametrize("benchmark", SUITES)
def test_a_run_that_was_stopped_goes_on(calls, pipe, prompts, tmp_path, benchmark, monkeypatch):
    options = dict(benchmark=benchmark, prompts=prompts[benchmark], batch=4)
    draw_suite(pipe, **options, out=tmp_path / "whole")
    whole, draw, parts = files(tmp_path / "whole"), Pipeline.__call__, len(calls)

    def fail(self, *given, **asked):
        if len(calls) == parts + 2:
            raise KeyboardInterrupt
        return draw(self, *given, **asked)

    draw_suite(pipe, **options, out=tmp_path / "out", count=1)
    tried = len(calls) - parts
    monkeypatch.setattr(Pipeline, "__call__", fail)
    if tried < 2:
        with pytest.raises(KeyboardInterrupt):
            draw_suite(pipe, **options, out=tmp_path / "out")
    monkeypatch.setattr(Pipeline, "__call__", draw)
    assert 0 < len(files(tmp_path / "out")) < len(whole)
    draw_suite(pipe, **options, out=tmp_path / "out")
    assert files(tmp_path / "out") == whole
    more = 4 if benchmark == "hpsv2" else 0  # each style has a part of which a picture was there
    assert len(calls) == 2 * parts + more
    name = sorted(name for name in whole if name.endswith(("png", "jpg")))[-1]
    (tmp_path / "out" / name).unlink()
    draw_suite(pipe, **options, out=tmp_path / "out")
    assert files(tmp_path / "out") == whole and len(calls) == 2 * parts + more + 1
    draw_suite(pipe, **options, out=tmp_path / "out")
    assert len(calls) == 2 * parts + more + 1


def test_pictures_of_other_settings_are_kept_apart(calls, pipe, prompts, tmp_path):
    draw_suite(pipe, "geneval", prompts["geneval"], tmp_path / "out", count=1)
    other = dict(seed=1), dict(steps=7), dict(batch=2), dict(guidance=2.5), dict(sampler="euler")
    for asked in other:
        (name,) = asked
        with pytest.raises(ValueError, match=f"out has pictures of {name}=.* choose another fold"):
            draw_suite(pipe, "geneval", prompts["geneval"], tmp_path / "out", **asked)
    with pytest.raises(ValueError, match="out has pictures of weights='"):
        draw_suite(pipeline(seed=1), "geneval", prompts["geneval"], tmp_path / "out")
    with pytest.raises(ValueError, match="out has pictures of benchmark='geneval', and 'dpg' is"):
        draw_suite(pipe, "dpg", prompts["dpg"], tmp_path / "out")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "holiday.png").touch()
    with pytest.raises(ValueError, match="own is not empty, and own.json beside it does not say"):
        draw_suite(pipe, "dpg", prompts["dpg"], tmp_path / "own")


def refused(pipe, benchmark, prompts, message, kind=ValueError, **asked):
    with pytest.raises(kind, match=message):
        draw_suite(pipe, benchmark, prompts, prompts.parent / "out", **asked)
    assert not (prompts.parent / "out").exists()


def test_bad_prompts(calls, pipe, tmp_path):
    path = tmp_path / "prompts"
    refused(pipe, "geneval", path, "prompts does not exist, where prompts", FileNotFoundError)
    refused(pipe, "dpg", path, "prompts is no folder: DPG-Bench has its prompts in files, NAME.txt")
    path.write_text('{"prompt": "a", "tag": "colors"}\n{')
    refused(pipe, "geneval", path, "prompts, line 2 is no JSON")
    path.write_text('\n{"prompt": "a"}')
    refused(pipe, "geneval", path, "prompts, line 2: expected an object with prompt and tag")
    path.write_text("")
    refused(pipe, "geneval", path, "prompts holds no prompts")
    path.write_text('{"a": 1}')
    refused(pipe, "hpsv2", path, "prompts: expected a list of prompts, as in HPSv2's anime.json")
    path.write_text('["a", ""]')
    refused(pipe, "hpsv2", path, "the prompt of prompts/00001.jpg is empty")
    folder = tmp_path / "folder"
    folder.mkdir()
    refused(pipe, "dpg", folder, "folder holds no prompts")
    refused(pipe, "hpsv2", folder, "anime.json does not exist", FileNotFoundError)
    (folder / "a.txt").write_text("one")
    (folder / "a.b.txt").write_text("two")
    refused(pipe, "dpg", folder, "two prompts have the picture a.png")
    refused(pipe, "dpg", folder, "count=0: one or more", count=0)
    refused(pipeline(tiny_models.LABELS), "dpg", folder, "text alone; this is told label")
    assert not calls
