"""Changes of kernels that are kept beside the parameters: LoRA and its variants.

A change is W + scale·Δ, where Δ is (alpha/rank) times
  down·up, of low rank: LoRA (Hu et al. 2021), of a convolution LoCon;
  (down₁·up₁) ∘ (down₂·up₂), entry by entry: LoHa (Hyeon-Woo et al. 2022, FedPara);
  outer ⊗ inner, the Kronecker product: LoKr (Yeh et al. 2024, LyCORIS);
and with DoRA (Liu et al. 2024) m·(W + scale·Δ)/‖W + scale·Δ‖: see `Decomposed`.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ldm_jax.models.low_rank import DOWN, MAGNITUDE, SCALE, UP


class Factors(NamedTuple):
    """`down` (…, in, rank) and `up` (rank, out)."""

    down: np.ndarray
    up: np.ndarray


class Hadamard(NamedTuple):
    """Two changes that are multiplied entry by entry."""

    first: Factors
    second: Factors


class Kronecker(NamedTuple):
    """The Kronecker product of `outer` (in₁, out₁) and `inner` (…, in₂, out₂)."""

    outer: np.ndarray
    inner: np.ndarray


class Decomposed(NamedTuple):
    """A change, and the norms of the changed kernel, whatever the scale (DoRA).

    They are norms over the axes where `magnitude` has length 1: for each output (peft, and LyCORIS'
    `wd_on_output`), or for each input (LyCORIS without it). LyCORIS treats scales other than 1
    differently: it interpolates to m/‖W + Δ‖.
    """

    change: Factors | Hadamard | Kronecker
    magnitude: np.ndarray


Change = Factors | Hadamard | Kronecker | Decomposed
Lora = dict[str, Change]  # by path, "unet/input_blocks_1_1/proj_in/kernel"; alpha is in a factor


def delta(change: Change) -> jax.Array:
    """Δ of a kernel (…, in, out), float32."""
    if isinstance(change, Decomposed):
        return delta(change.change)
    if isinstance(change, Hadamard):
        return delta(change.first) * delta(change.second)
    options = dict(precision="highest", preferred_element_type=jnp.float32)
    if isinstance(change, Factors):
        return jnp.matmul(*change, **options)
    blocks = jnp.einsum("io,...jp->...ijop", *change, **options)
    *space, i, j, o, p = blocks.shape
    return blocks.reshape(*space, i * j, o * p)


def merge(params: dict[str, Any], lora: Lora, scale: float | jax.Array = 1.0) -> dict[str, Any]:
    """`params` with the changes of `lora`, by the formulas above.

    Computed in float32; the result has the kernel's type. Pure, and `scale` may be traced, so the
    LoRA can be added inside a jitted function with any scale.

    Raises ValueError for a kernel that `params` lacks or that has another shape.
    """
    flat = flatten_dict(params, sep="/", keep_empty_nodes=True)
    for path, change in lora.items():
        difference, old = delta(change), flat.get(path)
        if (found := getattr(old, "shape", None)) != difference.shape:
            raise ValueError(
                f"the LoRA changes {path} of shape {difference.shape}, which here is {found}"
            )
        kernel = jnp.asarray(old).astype(jnp.float32) + scale * difference
        if isinstance(change, Decomposed):
            axes = tuple(i for i, n in enumerate(change.magnitude.shape) if n == 1)
            norm = jnp.sqrt(jnp.sum(kernel**2, axes, keepdims=True))
            kernel *= change.magnitude / (norm + np.finfo(np.float32).eps)
        flat[path] = kernel.astype(old.dtype)
    return unflatten_dict(flat, sep="/")


def scale_of(alpha: float, rank: int, rslora: bool = False) -> np.float32:
    """alpha/rank, or alpha/√rank if "rank-stabilised" (Kalajdzievski 2023).

    Rounded as if read from a file, in which alpha is a float32 number.
    """
    return np.float32(float(stored_alpha(alpha, rank, rslora)) / rank)


def stored_alpha(alpha: float, rank: int, rslora: bool = False) -> np.float32:
    """The number a for which the change is a/rank·down·up."""
    return np.float32(alpha * math.sqrt(rank) if rslora else alpha)


def separated(params: dict[str, Any]) -> tuple[dict[str, Any], Lora]:
    """(parameters, LoRA) of parameters with factors beside their kernels: see `models.low_rank`."""
    flat = flatten_dict(params, sep="/", keep_empty_nodes=True)
    lora: Lora = {}
    for path in [path for path in flat if path.endswith(f"/{DOWN}")]:
        layer = path.removesuffix(DOWN)
        down, up, scale = (flat.pop(layer + name) for name in (DOWN, UP, SCALE))
        change: Change = Factors(down, scale * up)
        magnitude = flat.pop(layer + MAGNITUDE, None)
        if magnitude is not None:
            change = Decomposed(change, magnitude.reshape(*[1] * (down.ndim - 1), -1))
        lora[f"{layer}kernel"] = change
    flat = {path: leaf for path, leaf in flat.items() if not path.endswith(f"/{SCALE}")}
    return unflatten_dict(flat, sep="/"), lora
