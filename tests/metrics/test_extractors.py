"""Networks from files: what is recognised, and what is refused.

`parity/test_extractors.py` compares the features with the references'.
"""

import json

import jax
import numpy as np
import pytest

from ldm_jax.interop.files import write_safetensors
from ldm_jax.metrics.extractors import load_extractor
from ldm_jax.metrics.inception import KEY
from ldm_jax.metrics.lpips import load_lpips
from ldm_jax.models.inception import InceptionV3
from scripts.write_goldens import random_weights


def dino(width=64, depth=1):
    block = {
        f"blocks.0.{name}": shape
        for name, shape in {
            "norm1.weight": (width,),
            "norm1.bias": (width,),
            "attn.qkv.weight": (3 * width, width),
            "attn.qkv.bias": (3 * width,),
            "attn.proj.weight": (width, width),
            "attn.proj.bias": (width,),
            "ls1.gamma": (width,),
            "norm2.weight": (width,),
            "norm2.bias": (width,),
            "mlp.fc1.weight": (4 * width, width),
            "mlp.fc1.bias": (4 * width,),
            "mlp.fc2.weight": (width, 4 * width),
            "mlp.fc2.bias": (width,),
            "ls2.gamma": (width,),
        }.items()
    }
    return random_weights(
        {
            "cls_token": (1, 1, width),
            "pos_embed": (1, 1 + 4 * 4, width),
            "patch_embed.proj.weight": (width, 3, 14, 14),
            "patch_embed.proj.bias": (width,),
            **block,
            "norm.weight": (width,),
            "norm.bias": (width,),
        }
    )


@pytest.fixture(scope="module")
def extract(tmp_path_factory):
    path = tmp_path_factory.mktemp("dino") / "dinov2.safetensors"
    write_safetensors(path, dino())
    return load_extractor(path, batch_size=2)


def test_a_file_is_recognised(extract, pictures):
    assert extract.name == "dinov2-width64-patch14"
    assert (extract.resize, extract.side, extract.width) == ("clean", 224, 64)
    assert len(extract.hash) == 16 and not extract.logits
    images = np.concatenate([pictures(32)] * 2)[:3]
    features, logits = extract.measure(images)
    assert features.shape == (3, 64) and features.dtype == np.float32 and logits is None
    np.testing.assert_allclose(features[0], features[2], rtol=1e-5)
    rounded = np.rint(images * 255).astype(np.uint8)
    np.testing.assert_allclose(extract(rounded), extract(rounded / 255.0), rtol=1e-4, atol=1e-5)
    assert extract(images[:0]).shape == (0, 64)


def test_resizing_moves_the_features(extract, tmp_path, pictures):
    write_safetensors(tmp_path / "same.safetensors", dino())
    other = load_extractor(tmp_path / "same.safetensors", "legacy", batch_size=2)
    assert other.hash == extract.hash
    small, own = pictures(32), pictures(224)
    assert np.abs(other(small) - extract(small)).max() > 1e-3
    np.testing.assert_allclose(other(own), extract(own), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 8, 8, 1), (2, 8, 8), (8, 8, 3), (2, 0, 8, 3)])
def test_pictures_must_be_rgb(extract, shape):
    with pytest.raises(ValueError, match=r"expected images of shape \(N, H, W, 3\), got"):
        extract(np.zeros(shape))


def test_features_must_be_finite(extract, tmp_path, pictures):
    images = np.concatenate([pictures(16)] * 2)
    images[3, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="features of picture 3 by dinov2-width64.* not finite"):
        extract(images)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    write_safetensors(path, {"conv.weight": np.zeros((1, 2))})
    with pytest.raises(ValueError, match="none of the networks .* holds 1 tensors, such as conv"):
        load_extractor(path)
    with pytest.raises(ValueError, match="resize='bilinear': choose one of legacy, clean, adm"):
        load_extractor(path, "bilinear")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_extractor(tmp_path / "nothing.pth")
    write_safetensors(path, {KEY: np.zeros(1), "fc.weight": np.zeros((1000, 2048), np.float16)})
    with pytest.raises(ValueError, match="not the Inception-v3 of FID, which has 1008 classes"):
        load_extractor(path)
    write_safetensors(path, {KEY: np.zeros(1)})
    with pytest.raises(ValueError, match="lacks fc.weight"):
        load_extractor(path)
    weights = dino()
    write_safetensors(path, weights | {"blocks.0.mlp.w12.weight": np.zeros((2, 2))})
    with pytest.raises(ValueError, match="ViT-g"):
        load_extractor(path)
    write_safetensors(path, {k: v for k, v in weights.items() if k != "norm.bias"})
    with pytest.raises(ValueError, match=r"does not fit .*\['norm'\]\['bias'\] is missing"):
        load_extractor(path)
    del weights["blocks.0.attn.proj.weight"]
    write_safetensors(path, weights)
    with pytest.raises(ValueError, match="lacks blocks.0.attn.proj.weight"):
        load_extractor(path)
    write_safetensors(path, {"visual.conv1.weight": np.zeros(1), "visual.attn_pool.x": np.zeros(1)})
    with pytest.raises(ValueError, match="pools by attention"):
        load_extractor(path)


def test_a_damaged_config_beside_is_named(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", dino())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is no JSON"):
        load_extractor(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dict(num_attention_heads=2)))
    two = load_extractor(tmp_path / "model.safetensors", batch_size=1)
    (tmp_path / "config.json").unlink()
    one = load_extractor(tmp_path / "model.safetensors", batch_size=1)
    image = np.full((1, 32, 32, 3), 99, np.uint8)
    assert np.abs(one(image) - two(image)).max() > 1e-3


def test_parameter_count_of_inception():
    """torchvision's Inception3 has 21,785,568 but for its classifier; ours has no scales."""
    image = jax.ShapeDtypeStruct((1, 299, 299, 3), np.float32)
    shapes = jax.eval_shape(InceptionV3().init, jax.random.key(0), image)["params"]
    assert shapes.pop("fc")["kernel"].shape == (2048, 1008)
    leaves = jax.tree.leaves(shapes)
    biases = sum(leaf.size for leaf in leaves if leaf.ndim == 1)
    assert sum(leaf.size for leaf in leaves) + biases == 21_785_568


def test_lpips_files_that_do_not_fit(tmp_path):
    write_safetensors(tmp_path / "odd", {"features.0.weight": np.zeros((64, 3, 7, 7))})
    with pytest.raises(ValueError, match="neither VGG-16 nor AlexNet .* features.0.weight"):
        load_lpips(tmp_path / "odd")
    shapes = {0: (64, 3, 11, 11), 3: (1, 1, 5, 5), 6: (1, 1, 3, 3), 8: (1,) * 4, 10: (1,) * 4}
    trunk = {f"features.{i}.weight": np.zeros(s, np.float16) for i, s in shapes.items()}
    trunk |= {f"features.{i}.bias": np.zeros(1) for i in shapes}
    write_safetensors(tmp_path / "alex", trunk)
    with pytest.raises(ValueError, match="without LPIPS's heads: .* alex.pth"):
        load_lpips(tmp_path / "alex")
    heads = {f"lin{i}.model.1.weight": np.zeros((1, 64, 1, 1)) for i in range(5)}
    write_safetensors(tmp_path / "heads", heads)
    with pytest.raises(ValueError, match=r"lin1.* shape \(1, 64, 1, 1\): the heads of alex have"):
        load_lpips(tmp_path / "alex", tmp_path / "heads")
