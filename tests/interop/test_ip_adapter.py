"""IP-Adapters from files, in pipelines, and files that are none or are for another model.

`parity/test_ip_adapter.py` compares them with diffusers'.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ldm_jax
from ldm_jax.diffusion.plan import Sampling
from ldm_jax.interop.files import write_safetensors
from ldm_jax.interop.ip_adapter import add_ip_adapter, ip_adapter_slots, places_of, read_ip_adapter
from ldm_jax.interop.layout import write_params
from ldm_jax.interop.vision_transformers import HF_CLIP
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.models.ip_adapter import make_ip_adapter
from ldm_jax.pipeline import Pipeline
from ldm_jax.programs import generate
from ldm_jax.published import MODELS
from tests import tiny_models
from tests.tiny_models import STABLE, UNCONDITIONAL, XL

SIDE, WIDTH, EMBEDDING = 8, 12, 10
PICTURE = np.linspace(0.0, 1.0, 16 * 20 * 3, dtype=np.float32).reshape(16, 20, 3)
ENCODER = dict(side=SIDE, patch=4, width=WIDTH, depth=2, heads=1, inner=24, patch_bias=False)
ENCODER |= dict(activation="quick_gelu", epsilon=1e-5, pre_norm=True, projection=EMBEDDING)


def section_of(config, plus=False):
    unet = config["unet"]
    fields = dict(encoder=ENCODER | dict(hidden=plus), tokens=4, width=unet["context_dim"])
    fields["channels"] = [*places_of(unet).values()]
    return fields | dict(resampler=[64, 2, 1] if plus else None)


def random_tree(tree, rng):
    if isinstance(tree, dict):
        return {name: random_tree(leaf, rng) for name, leaf in tree.items()}
    return np.float32(0.5 * rng.standard_normal(tree.shape))


def written(tmp_path, config=STABLE, plus=False, changes=()):
    """The path of an adapter, with `image_encoder` beside it; tensors changed, or left out."""
    section, rng = section_of(config, plus), np.random.default_rng(0)
    net = make_ip_adapter(section)
    images = jnp.zeros((1, SIDE, SIDE, 3))
    params = random_tree(jax.eval_shape(net.init, jax.random.key(0), images)["params"], rng)
    encoder = make_ip_adapter(section | dict(resampler=None, encoder=ENCODER)).encoder
    own = random_tree(jax.eval_shape(encoder.init, jax.random.key(0), images)["params"], rng)
    tensors = write_params(
        {name: leaves for name, leaves in params.items() if name != "encoder"},
        ip_adapter_slots(section),
    )
    tensors = {
        name: array for name, array in (tensors | dict(changes)).items() if array is not None
    }
    path = tmp_path / "adapter.safetensors"
    write_safetensors(path, tensors, {})
    (tmp_path / "image_encoder").mkdir(exist_ok=True)
    write_safetensors(tmp_path / "image_encoder" / "model.safetensors", clip_tensors(own), {})
    return path


def clip_tensors(params):
    """In transformers' names."""
    made = {}

    def put(name, leaf):
        if not isinstance(leaf, dict):
            made[name] = leaf.reshape(-1) if "class_embedding" in name else leaf
            return
        for kind, array in leaf.items():
            foreign = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
            end = "bias" if kind == "bias" else "weight"
            made[f"{name}.{end}"] = np.ascontiguousarray(foreign)

    for name, place in HF_CLIP.top.items():
        if name in params:
            put(place, params[name])
    for i in range(ENCODER["depth"]):
        for name, place in HF_CLIP.block.items():
            put(place.format(i), params[f"layers_{i}"][name])
    return made


@pytest.fixture(scope="module")
def pipe():
    params = tiny_models.random_params(STABLE)
    return Pipeline(LatentDiffusion.from_config(STABLE), params, STABLE)


def test_numbers_are_those_of_diffusers():
    """16 of SD 1 and 70 of SDXL: down, up, then the middle."""
    sd, xl = (places_of(MODELS[name].unet) for name in ("sd1", "sdxl-base"))
    assert len(sd) == 16 and len(xl) == 70
    assert [*sd.values()] == [320] * 2 + [640] * 2 + [1280] * 2 + [1280] * 3 + [640] * 3 + [
        320
    ] * 3 + [1280]
    assert [*sd][0].startswith("input_blocks_1_1/") and [*sd][-1].startswith("middle_block_1/")
    assert [*xl][9].startswith("input_blocks_7_1/transformer_blocks_5")


@pytest.mark.parametrize("plus", [False, True])
def test_a_picture_and_its_scale(pipe, tmp_path, plus):
    """Scale 0 changes no bit, other scales compile nothing, and guidance leads away from none."""
    path = written(tmp_path, plus=plus)
    asked = dict(steps=2, guidance=3.0, seed=1)
    shown = dict(conditions={"image_prompt": PICTURE})
    plain = pipe("an apple", **asked)
    none = pipe.with_ip_adapter(path, scale=0.0)("an apple", **asked, **shown)
    np.testing.assert_array_equal(none, plain)
    before = generate.jitted._cache_size()
    whole = pipe.with_ip_adapter(path)("an apple", **asked, **shown)
    half = pipe.with_ip_adapter(path, scale=0.5)("an apple", **asked, **shown)
    assert generate.jitted._cache_size() == before
    assert np.abs(whole - plain).max() > 1e-2 and np.abs(whole - half).max() > 1e-3
    other = pipe.with_ip_adapter(path)(
        "an apple", **asked, conditions={"image_prompt": PICTURE[::-1]}
    )
    assert np.abs(other - whole).max() > 1e-3


def test_xl_and_a_cache(tmp_path):
    """Beside DeepCache, in tiles, and in a model that is saved and opened again, as our file."""
    base = Pipeline(LatentDiffusion.from_config(XL), tiny_models.random_params(XL), XL)
    mine = base.with_ip_adapter(written(tmp_path, XL, plus=True), scale=0.7)
    asked = dict(steps=2, guidance=3.0, conditions={"image_prompt": PICTURE})
    sampler = Sampling("ddim", cache_interval=2)
    drawn = mine("an apple", **asked, sampler=sampler)
    assert np.isfinite(drawn).all()
    with pytest.raises(ValueError, match="has no place for the IP-Adapter 'image_prompt': use 'si"):
        mine.save(tmp_path / "folder", layout="diffusers")
    with pytest.raises(ValueError, match="an IP-Adapter: it is drawn with beside a model, --ip_ad"):
        ldm_jax.load(tmp_path / "adapter.safetensors")
    tiled = mine("an apple", **asked, width=24, tile=16)
    assert tiled.shape == (1, 16, 24, 3) and np.isfinite(tiled).all()
    mine.save(tmp_path / "whole.safetensors")
    again = ldm_jax.load(tmp_path / "whole.safetensors")("an apple", **asked, sampler=sampler)
    np.testing.assert_array_equal(again, drawn)


K = "ip_adapter.1.to_k_ip.weight"
BAD = [
    (dict(config=XL), r"is for a model with context_dim=32, and this one has 16"),
    (dict(changes={K: np.zeros((20, 16), np.float32)}), r"have 1 × 20, .* this one's have 1 × 16"),
    (dict(changes={"image_proj.proj.2.bias": np.zeros(1, np.float32)}), r"an IP-Adapter of faces"),
    (dict(changes={"image_proj.norm.bias": None}), r"not whole: image_proj.norm.bias is missing"),
    (dict(changes={"image_proj.norm.weight": None}), r"it lacks the tensor image_proj.norm.weight"),
    (dict(changes={"image_proj.proj.weight": np.zeros((64, 7), np.float32)}),
     r"takes embeddings of 7 numbers, and those of .*image_encoder have 10: it is for another im"),
]  # fmt: skip


@pytest.mark.parametrize("made, message", BAD)
def test_what_does_not_fit_is_refused(tmp_path, made, message):
    with pytest.raises(ValueError, match=message):
        read_ip_adapter(written(tmp_path, **made), "", STABLE)


def test_other_files_are_refused(tmp_path):
    path = written(tmp_path)
    encoder = tmp_path / "image_encoder" / "model.safetensors"
    with pytest.raises(ValueError, match="holds no IP-Adapter: looked for image_proj"):
        read_ip_adapter(encoder, "", STABLE)
    with pytest.raises(ValueError, match="holds no image encoder of CLIP: found"):
        read_ip_adapter(path, path, STABLE)
    with pytest.raises(FileNotFoundError, match="no image encoder at .*nowhere, for .*: name CLIP"):
        read_ip_adapter(path, tmp_path / "nowhere", STABLE)
    with pytest.raises(FileNotFoundError, match="it is a folder: name the file in it"):
        read_ip_adapter(tmp_path, "", STABLE)
    with pytest.raises(ValueError, match="with context_dim=16, and this one has None"):
        read_ip_adapter(path, "", UNCONDITIONAL)
    for arguments, message in {
        (float("nan"), ""): "scale=nan: choose a finite number",
        (1.0, "text"): "already has a condition 'text'; choose another name",
    }.items():
        with pytest.raises(ValueError, match=message):
            add_ip_adapter(path, "", STABLE, {}, *arguments)


@pytest.mark.parametrize("picture, message", [
    (np.zeros((4, 4)), r"conditions\['image_prompt'\]: image of shape \(4, 4\)"),
    (np.zeros((4, 4, 4)), "expected three colours"),
    (np.full((4, 4, 3), 2.0), r"conditions\['image_prompt'\]: image values 2 … 2: expected"),
])  # fmt: skip
def test_a_picture_that_is_none(pipe, tmp_path, picture, message):
    mine = pipe.with_ip_adapter(written(tmp_path))
    with pytest.raises(ValueError, match=message):
        mine("an apple", steps=1, conditions={"image_prompt": picture})
    with pytest.raises(ValueError, match="this model needs conditions={'image_prompt': an array}"):
        mine("an apple", steps=1)
