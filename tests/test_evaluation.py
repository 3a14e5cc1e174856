"""The metrics of a whole model, on a handful of pictures."""

from types import SimpleNamespace

import numpy as np
import pytest

import ldm_jax
from ldm_jax.data.conditions import make_conditions
from ldm_jax.data.scenes import SceneSource
from ldm_jax.data.sources import EmojiSource
from ldm_jax.diffusion.plan import Sampling
from ldm_jax.evaluation import clip_metrics, drawn_metrics, evaluate, scene_metrics
from ldm_jax.evaluation.run import open_evaluation
from ldm_jax.interop.files import write_safetensors
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.metrics.clip_score import load_clip
from ldm_jax.metrics.extractors import load_extractor
from ldm_jax.metrics.reconstruction import codebook_entries, reconstruction_quality
from ldm_jax.metrics.scene_tasks import bicubic
from ldm_jax.models.build import make_autoencoder
from ldm_jax.pictures import to_signed
from ldm_jax.pipeline import Pipeline
from tests import tiny_models
from tests.metrics.clip_file import in_transformers_names

SET = {"fd", "kid", "precision", "recall", "density", "coverage"}


class Few:
    """The first 40 training emoji."""

    def __init__(self):
        self._source = EmojiSource("train")
        self.classes = self._source.classes

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return self._source[index]


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "model.safetensors"
    write_safetensors(path, in_transformers_names())
    return path


def test_metrics_of_captions(clip_file):
    clip = load_clip(clip_file)
    drawn = drawn_metrics(ldm_jax.load(), Few(), 12, clip=clip, steps=4, batch_size=4)
    metrics, images = drawn.metrics, drawn.images
    assert images.shape == (12, 64, 64, 3) and images.dtype == np.uint8
    captions = {"r@1", "r@5", "group", "group@5", "clip_score", "real_clip_score"}
    assert set(metrics) == captions | {"fd_floor"} | SET
    # Each has an interval that holds it, but what is of real pictures alone.
    assert drawn.intervals.keys() == metrics.keys() - {"fd_floor", "real_clip_score"}
    assert all(low <= metrics[name] <= high for name, (low, high) in drawn.intervals.items())
    reference = drawn.about["reference"]
    assert reference["count"] == 40 and reference["image_size"] == [64, 64]
    assert len(reference["hash"]) == 16
    assert any("12 drawn pictures and 1280 features" in note for note in drawn.notes)
    with pytest.raises(ValueError, match="count=41: there are 40 captions, with one picture each"):
        drawn_metrics(ldm_jax.load(), Few(), 41)
    with pytest.raises(ValueError, match="count=1: the distances need two pictures or more"):
        drawn_metrics(ldm_jax.load(), Few(), 1)
    assert 0 <= metrics["r@1"] <= metrics["r@5"] <= 1
    assert metrics["fd"] > 0 and metrics["fd_floor"] > 0


@pytest.mark.parametrize("kind", ["LABELS", "UNCONDITIONAL"])
def test_metrics_without_captions(kind):
    config = getattr(tiny_models, kind)
    if kind == "LABELS":
        config = config | {"classes": list(Few().classes)}
    model, params = LatentDiffusion.from_config(config), tiny_models.random_params(config)
    metrics, images, intervals, *_ = drawn_metrics(
        Pipeline(model, params, config), Few(), 3, Few(), steps=2, batch_size=2
    )
    assert images.shape == (3, 16, 16, 3)
    assert set(metrics) == {"fd", "fd_floor", "kid", "copied", "novelty_p"}
    assert intervals["copied"][0] == 0.0 and 0.5 < intervals["copied"][1] < 0.6  # of three
    assert metrics["copied"] == 0.0  # noise is far from all of them


def test_a_model_of_other_conditions_is_refused():
    config = tiny_models.INPAINTING
    model, params = LatentDiffusion.from_config(config), tiny_models.random_params(config)
    with pytest.raises(ValueError, match="and this model needs image too: .*--count=0"):
        drawn_metrics(Pipeline(model, params, config), Few(), 3)


def test_reconstruction_quality_of_known_errors():
    """Pictures darkened by 0.1 have a PSNR of 20 dB, but where 8 bits cannot be that dark."""

    class Grey(Few):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"image": np.full((64, 64, 3), 153, np.uint8)}

    quality = reconstruction_quality(lambda x: x / 255.0 - 0.1, Grey())
    # 0.6 − 0.1 = 127.5 / 255 rounds to 128, an error of 25 / 255.
    assert quality["psnr"] == pytest.approx(20 * np.log10(255 / 25), abs=1e-3)
    same = reconstruction_quality(lambda x: x / 255.0, Few())
    assert same["ssim"] == pytest.approx(1.0) and same["ms_ssim"] == pytest.approx(1.0)
    assert same.keys() == {"psnr", "ssim", "ms_ssim"}


def test_the_entries_of_a_codebook_that_pictures_use():
    """Together, and not those of the pictures that fill the last batch."""
    whole = {"task": "autoencoder", "autoencoder": tiny_models.VQ}
    autoencoder = make_autoencoder(tiny_models.VQ)
    params = tiny_models.random_params(whole)["autoencoder"]
    entries = codebook_entries(autoencoder, params)
    images = np.stack([Few()[i]["image"] for i in range(40)])
    z = autoencoder.apply({"params": params}, to_signed(images), method="prequant")
    table = np.asarray(params["quantize"]["embedding"]["embedding"])
    by_hand = np.argmin(np.square(np.asarray(z)[..., None, :] - table).sum(-1), axis=-1)
    np.testing.assert_array_equal(entries(images), by_hand)
    quality = reconstruction_quality(lambda x: x / 255.0, Few(), entries=entries)
    assert quality["codebook_used"] == len(np.unique(by_hand)) > 1
    marked = reconstruction_quality(lambda x: x / 255.0, Few(), entries=lambda x: x[:, 32, 32, 0])
    assert marked["codebook_used"] == len(np.unique(images[:, 32, 32, 0]))
    assert codebook_entries(make_autoencoder(tiny_models.KL), {}) is None


def test_reconstructions_in_features(monkeypatch):
    """The Fréchet distance of means alone: every picture moves by the same step in one feature."""

    def extract(images):
        return np.stack([images[:, 0, 0, 0], images[:, 5, 5, 1]], axis=1) / np.float32(255.0)

    class Noise(Few):
        def __getitem__(self, index):
            pixels = np.random.default_rng(index).integers(0, 200, (32, 32, 3), np.uint8)
            return super().__getitem__(index) | {"image": pixels}

    def reconstruct(images):
        moved = images.copy()
        moved[:, 0, 0, 0] += 51
        return moved / 255.0

    rng = np.random.default_rng(0)
    shapes = {"alex1": (11, 3, 4), "alex2": (5, 4, 4)} | {f"alex{i}": (3, 4, 4) for i in (3, 4, 5)}
    weights = {f"lin{i}": np.ones(4, np.float32) for i in range(5)}
    for name, (side, before, after) in shapes.items():
        kernel = rng.standard_normal((side, side, before, after), np.float32)
        weights |= {f"{name}/kernel": kernel, f"{name}/bias": np.zeros(4, np.float32)}
    found = reconstruction_quality(reconstruct, Noise(), weights, extract)
    assert found["rfd"] == pytest.approx(0.2**2, rel=1e-4)
    assert found["lpips"] > 0.0
    exact = reconstruction_quality(lambda x: x / 255.0, Noise(), weights, extract)
    assert exact["lpips"] == pytest.approx(0.0, abs=1e-6)
    assert exact["rfd"] == pytest.approx(0.0, abs=1e-6)


def test_scenes_are_drawn_from_held_out_captions_and_read(monkeypatch):
    """A pipeline that returns the asked scenes themselves scores as the reader does on them."""
    source = SceneSource("held_out", 64, dict(kinds=40))
    images = np.stack([source[i]["image"] for i in range(6)])
    pipe = ldm_jax.load()
    asked = []

    def draw(self, prompt, **settings):
        start = len(asked)
        asked.extend(prompt)
        return images[[min(start + i, 5) for i in range(len(prompt))]] / 255.0

    monkeypatch.setattr(Pipeline, "__call__", draw)
    metrics, pictures, intervals, *_ = scene_metrics(pipe, source, 6, steps=1, batch_size=6)
    assert asked == [source.describe(i)["caption"] for i in range(6)]
    np.testing.assert_array_equal(pictures, images)
    assert metrics["objects"] == metrics["real_objects"] == metrics["scene"] == 1.0
    assert intervals["objects"] == pytest.approx((0.6096657, 1.0))  # Wilson's, of 6 of 6
    images[:] = 128
    assert scene_metrics(pipe, source, 6, batch_size=6).metrics["objects"] == 0.0
    with pytest.raises(ValueError, match="count=5000: there are 2048 held-out scenes"):
        scene_metrics(pipe, source, 5000)


class Enlarging:
    """Stands for a pipeline that is told small pictures, and draws the scenes themselves."""

    classes = ()
    model = SimpleNamespace(embedders=[SimpleNamespace(name="small", needs=("low_resolution",))])

    def __init__(self, images):
        self.images = images

    def __call__(self, prompt=None, **_):
        return self.images / 255.0


def test_enlarged_pictures_are_compared_in_features():
    extract = load_extractor(batch_size=4)
    source = SceneSource("held_out", 64, dict(kinds=40))
    images = np.stack([source[i]["image"] for i in range(4)])
    small = make_conditions({"low_resolution": {}})
    settings = dict(conditions=small, extract=extract, batch_size=4)
    found = scene_metrics(Enlarging(images), source, 4, **settings)
    assert found.metrics["drawn_feature_distance"] == pytest.approx(0.0, abs=1e-4)
    low, high = found.intervals["bicubic_feature_distance"]
    assert 1.0 < low <= found.metrics["bicubic_feature_distance"] <= high
    example = small[0](source[0], np.random.default_rng(0))
    smooth = bicubic(example["low_resolution"], (64, 64))
    assert smooth.shape == (64, 64, 3) and 2.0 < np.abs(images[0].astype(int) - smooth).mean() < 40
    again = scene_metrics(Enlarging(np.stack([smooth] * 4)), source, 4, **settings).metrics
    assert again["drawn_feature_distance"] > again["bicubic_feature_distance"]


def test_the_clip_score_of_drawn_pictures(clip_file, monkeypatch):
    """A pipeline that draws the real pictures scores as they do; the captions are what it is
    asked for, evenly spaced; and other pictures score otherwise."""
    source, asked = Few(), []
    real = np.stack([source[i]["image"] for i in (0, 20, 39)])

    def draw(self, prompt, **_):
        asked.extend(prompt)
        return real / 255.0

    monkeypatch.setattr(Pipeline, "__call__", draw)
    clip = load_clip(clip_file, batch_size=4)
    drawn = clip_metrics(ldm_jax.load(), source, clip, 3, batch_size=3)
    assert asked == [source[i]["caption"] for i in (0, 20, 39)]
    assert drawn.metrics["clip_score"] == drawn.metrics["real_clip_score"]
    assert drawn.metrics["clip_score"] == pytest.approx(clip(real, asked).mean())
    low, high = drawn.intervals["clip_score"]
    assert low <= drawn.metrics["clip_score"] <= high and low < high
    real = 255 - real
    other = clip_metrics(ldm_jax.load(), source, clip, 3, batch_size=3).metrics
    assert other["real_clip_score"] == drawn.metrics["real_clip_score"] != other["clip_score"]
    source = SceneSource("held_out", 64, dict(kinds=40))
    found = scene_metrics(ldm_jax.load(), source, 3, clip=clip, batch_size=3)
    assert found.metrics.keys() >= {"objects", "real_objects"}
    assert "clip_score reads 12 tokens" in found.notes[-1]
    with pytest.raises(ValueError, match="count=41: there are 40 captions, with one picture each"):
        clip_metrics(ldm_jax.load(), Few(), clip, 41)


def test_the_clip_of_a_score_stands_in_its_protocol(clip_file, monkeypatch):
    def draw(self, prompt, **_):
        return np.zeros((len(prompt), 64, 64, 3), np.float32)

    monkeypatch.setattr(Pipeline, "__call__", draw)
    metrics, _ = evaluate("", count=2, clip=str(clip_file))
    about = metrics["protocol"]["clip"]
    assert about.pop("hash") == load_clip(clip_file).hash
    assert about == {"name": "clip-vision-width64-patch16-quick_gelu", "side": 32, "length": 12}
    assert metrics["intervals"]["clip_score"][0] <= metrics["clip_score"]
    assert metrics["protocol"]["drawing"]["steps"] == 50  # the model's own
    asked, _ = evaluate("", count=2, clip=str(clip_file), steps=3)
    assert asked["protocol"]["drawing"]["steps"] == 3
    opened = open_evaluation("", count=2, clip=str(clip_file))
    cached, _ = opened.measure(sampler=Sampling(cache_interval=3))
    assert cached["protocol"]["drawing"]["cache"] == {"interval": 3, "branch": 0}


def test_models_without_captions_have_no_clip_score(clip_file, tmp_path):
    config = tiny_models.LABELS
    model, params = LatentDiffusion.from_config(config), tiny_models.random_params(config)
    pipe = Pipeline(model, params, config)
    with pytest.raises(ValueError, match="drawn from, and this model is told label"):
        clip_metrics(pipe, Few(), load_clip(clip_file), 3)
    pipe.save(tmp_path / "labels.safetensors")
    with pytest.raises(ValueError, match="drawn from, and this model is told label"):
        evaluate(tmp_path / "labels.safetensors", "emoji", clip=str(clip_file))
    with pytest.raises(ValueError, match="--clip scores drawn pictures: it needs"):
        evaluate("", count=0, clip=str(clip_file))


def test_a_model_is_measured_on_data_like_its_own(tmp_path):
    """What `evaluate` opens without a source is what the model stores of its training data."""
    own = dict(source="scenes", scenes=dict(kinds=5, held_out_scenes=3))
    model = ldm_jax.load()
    model.config["data"] = own
    model.save(tmp_path / "model.safetensors")
    metrics, images = evaluate(tmp_path / "model.safetensors", count=0)
    assert images is None and metrics["psnr"] > 0
    with pytest.raises(ValueError, match="there are 3 held-out scenes"):
        evaluate(tmp_path / "model.safetensors", count=4)
    assert evaluate(tmp_path / "model.safetensors", "emoji", count=0)[0] != metrics
    model.config["data"] = dict(source="scenes", held_out=0.0, scenes=dict(names=("elephant",)))
    model.save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"nothing is held out of scenes .data.held_out=0.0 in tr"):
        evaluate(tmp_path / "model.safetensors")
    model.config["data"] = dict(source="folder")
    model.save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="of source 'folder': name them with --path"):
        evaluate(tmp_path / "model.safetensors", count=0)
