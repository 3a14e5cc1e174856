"""Meters of a run: the FLOPs of a function, counted from its jaxpr, and what a device can do.

XLA's own count misses what runs in loops and in libraries' kernels (cuDNN): a scan's body counts
once. Here only products count, of matrices and of convolutions, 2 FLOPs for each multiplication
that a result needs: multiplications by the zeros of padding and dilation do not count.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

GIGA, TERA, GIB = 1e9, 1e12, 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip can do at most, from its maker's tables.

    Attributes:
      name: as in the name of a topology.
      flops: products of bfloat16, a second, without sparsity.
      memory: bytes.
      bandwidth: of the memory, bytes a second.
      interconnect: bytes a second that it sends to other chips of its slice or host, over all its
        links: half of the bidirectional bandwidth.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    interconnect: float


_V5E = Chip("v5e", 197 * TERA, 16 * GIB, 819 * GIGA, 200 * GIGA)
_V5P = Chip("v5p", 459 * TERA, 95 * GIB, 2765 * GIGA, 600 * GIGA)
_V6E = Chip("v6e", 918 * TERA, 32 * GIB, 1638 * GIGA, 400 * GIGA)
# By jax's `device_kind`.
CHIPS = {
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "NVIDIA A100-SXM4-40GB": Chip("A100", 312 * TERA, 40 * GIB, 1555 * GIGA, 300 * GIGA),
    "NVIDIA A100-SXM4-80GB": Chip("A100", 312 * TERA, 80 * GIB, 2039 * GIGA, 300 * GIGA),
    "NVIDIA H100 80GB HBM3": Chip("H100", 989 * TERA, 80 * GIB, 3350 * GIGA, 450 * GIGA),
    "NVIDIA H200": Chip("H200", 989 * TERA, 141 * GIGA, 4800 * GIGA, 450 * GIGA),
}


def chip_of(device: Any) -> Chip | None:
    """What a jax device can do; None if it is not in the table."""
    return CHIPS.get(device.device_kind)


def rates(flops: float, seconds: float, devices: Sequence[Any]) -> dict[str, float]:
    """`tflops`, TFLOP/s of each device, and, where the device's peak is known, `mfu`, its share.

    `flops` are those of one step on all devices, and `seconds` its time.
    """
    speed, chip = flops / seconds / len(devices), chip_of(devices[0])
    values = {"tflops": speed / TERA}
    return values if chip is None else values | {"mfu": speed / chip.flops}


def memory_in_use(devices: Sequence[Any]) -> dict[str, float]:
    """`memory_gb`, the most that any of this process's devices has used so far; {} if unknown."""
    stats = [device.memory_stats() or {} for device in devices]
    peaks = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    return {"memory_gb": max(peaks) / GIGA} if peaks else {}


def model_flops(function: Callable, *args: Any) -> float:
    """FLOPs of the products in `function(*args)`; the arguments may be shapes.

    A scan's body counts for each of its rounds. A product of the same operands counts once, so that
    what `jax.checkpoint` computes again does not count; within the gradient of a scan it does. Of
    the branches of a condition the most expensive one counts; a loop of unknown length counts one
    round.
    """
    return jaxpr_flops(jax.make_jaxpr(function)(*args))


AGAIN = "again_"  # how the name of a jitted function begins that computes something again


def jaxpr_flops(closed: ClosedJaxpr) -> float:
    """`model_flops` of a function that was traced to a jaxpr."""
    fresh = itertools.count()
    _, total = _walk(closed.jaxpr, closed.consts, [next(fresh) for _ in closed.in_avals], {}, fresh)
    return total


def _walk(
    jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[Any], seen: dict, fresh: itertools.count
) -> tuple[list[Any], float]:
    """(names of the outputs, FLOPs) of a jaxpr whose inputs have the names `inputs`.

    Values that are computed in the same way have the same name. `seen` holds the names of the
    results of every equation so far, by primitive, parameters and names of the operands.
    """
    names = dict(zip(jaxpr.invars, inputs, strict=True))
    names |= {var: ("const", id(value)) for var, value in zip(jaxpr.constvars, consts, strict=True)}
    total = 0.0

    def name(atom):
        if isinstance(atom, Literal):
            return "literal", str(atom.aval), repr(atom.val)
        return names[atom]

    for eqn in jaxpr.eqns:
        operands = tuple(name(atom) for atom in eqn.invars)
        inner = _inlined(eqn)
        if inner is not None:
            results, flops = _walk(*inner, operands, seen, fresh)
            if eqn.primitive.name == "shard_map":
                flops *= eqn.params["mesh"].size
            elif eqn.params.get("name", "").startswith(AGAIN):
                flops = 0.0
        else:
            key = _key(eqn, operands)
            flops = 0.0 if key in seen else _flops(eqn)
            results = seen.setdefault(key, [])
            # A kernel may also return what a gradient needs, after its results.
            results += [next(fresh) for _ in range(len(eqn.outvars) - len(results))]
        names |= zip(eqn.outvars, results, strict=False)
        total += flops
    return [name(atom) for atom in jaxpr.outvars], total


def _key(eqn: Any, operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """Equal for equations that compute the same."""
    if eqn.primitive.name == ATTENTION:
        return ATTENTION, operands
    if eqn.primitive.name == "pallas_call":
        return _name(eqn).partition("_residuals")[0].removesuffix("_no"), operands
    return eqn.primitive.name, _parameters(eqn.params), operands


def _parameters(params: dict[str, Any]) -> str:
    """The parameters of an equation as text, for comparison. Two jaxprs count as different."""
    return repr([(k, id(v) if _is_jaxpr(v) else v) for k, v in sorted(params.items())])


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, Jaxpr | ClosedJaxpr)


def _opened(jaxpr: Jaxpr | ClosedJaxpr) -> tuple[Jaxpr, Sequence[Any]]:
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, ClosedJaxpr) else (jaxpr, ())


def _alone(jaxpr: Jaxpr | ClosedJaxpr) -> float:
    """FLOPs of a jaxpr by itself."""
    jaxpr, consts = _opened(jaxpr)
    fresh = itertools.count()
    return _walk(jaxpr, consts, [next(fresh) for _ in jaxpr.invars], {}, fresh)[1]


def _inlined(eqn: Any) -> tuple[Jaxpr, Sequence[Any]] | None:
    """The jaxpr that an equation calls with its operands, once: jit, checkpoint, custom_jvp, …"""
    if eqn.primitive.name in REPEATED:
        return None
    jaxprs = [value for value in eqn.params.values() if _is_jaxpr(value)]
    jaxpr, consts = _opened(jaxprs[0]) if len(jaxprs) == 1 else (None, ())
    fits = jaxpr is not None and len(jaxpr.invars) == len(eqn.invars)
    return (jaxpr, consts) if fits and len(jaxpr.outvars) == len(eqn.outvars) else None


def _dot(eqn: Any) -> float:
    contracted = eqn.params["dimension_numbers"][0][0]
    depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    return 2.0 * depth * math.prod(eqn.outvars[0].aval.shape)


def _convolution(eqn: Any) -> float:
    params, (lhs, rhs) = eqn.params, (operand.aval.shape for operand in eqn.invars)
    out, (of_lhs, of_rhs, of_out) = eqn.outvars[0].aval.shape, params["dimension_numbers"]
    products = out[of_out[0]] * out[of_out[1]] * rhs[of_rhs[1]]
    for i, (low, _) in enumerate(params["padding"]):
        places = params["window_strides"][i] * np.arange(out[of_out[2 + i]])[:, None]
        places = places + params["rhs_dilation"][i] * np.arange(rhs[of_rhs[2 + i]]) - low
        gap = params["lhs_dilation"][i]
        within = (places >= 0) & (places <= gap * (lhs[of_lhs[2 + i]] - 1)) & (places % gap == 0)
        products *= int(within.sum())
    return 2.0 * products


def _scan(eqn: Any) -> float:
    return eqn.params["length"] * _alone(eqn.params["jaxpr"])


def _while(eqn: Any) -> float:
    return _alone(eqn.params["cond_jaxpr"]) + _alone(eqn.params["body_jaxpr"])


def _cond(eqn: Any) -> float:
    return max(map(_alone, eqn.params["branches"]))


# Of the products of splash attention's kernels for the gradient, the share that is not again what
# another one computes: QKᵀ in both, and the gradient of the weights in the second.
SPLASH_OWN = {"splash_mha_dkv": 3 / 4, "splash_mha_dq": 1 / 3}


def _name(kernel: Any) -> str:
    return str(kernel.params.get("name"))


def _kernel(eqn: Any) -> float:
    grid, name = eqn.params["grid_mapping"].grid, _name(eqn)
    own = next((share for start, share in SPLASH_OWN.items() if name.startswith(start)), 1.0)
    return own * math.prod(map(int, grid)) * _alone(eqn.params["jaxpr"])


ATTENTION = "dot_product_attention_fwd_wrapper"


def _attention(eqn: Any) -> float:
    """cuDNN's, forward: two products; its operands (B, L, heads, d) and (B, S, heads, d)."""
    query, key = (operand.aval.shape for operand in eqn.invars[:2])
    return 4.0 * math.prod(query) * key[1]


def _attention_gradient(eqn: Any) -> float:
    """Four products; the fifth is that of the forward pass, again."""
    return 2.0 * _attention(eqn)


# Equations whose jaxpr runs several times, or not at all.
REPEATED = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "pallas_call": _kernel,
}
COUNTED = REPEATED | {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    ATTENTION: _attention,
    "dot_product_attention_bwd_wrapper": _attention_gradient,
}


def _flops(eqn: Any) -> float:
    return COUNTED[eqn.primitive.name](eqn) if eqn.primitive.name in COUNTED else 0.0
