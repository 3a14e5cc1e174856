"""Kernels of attention that never write its weights to memory (Dao et al. 2022, arXiv 2205.14135):
cuDNN's on NVIDIA GPUs, and JAX's splash attention on TPUs. Both take half precision, with a softmax
in float32.

What is traced is for the devices of the mesh in use, which may be described and not there, else for
the default device.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

CUDNN_LARGEST, CUDNN_MULTIPLE = 128, 8  # of the width of a head
CUDNN_CAPABILITY = 8  # of a GPU, at least: Ampere and newer
# On a TPU our own attention moves less than a kernel, as long as it can keep float32 weights of 256
# queries of the whole batch on the chip: bytes of these from which the kernel moves less, by
# `benchmarks.attention --topology`. On a v5p it always does.
SPLASH_FROM = {
    "TPU v5": 0,
    "TPU v5p": 0,
    "TPU v5 lite": 2**26,
    "TPU v5e": 2**26,
    "TPU v6 lite": 2**26,
    "TPU v6e": 2**26,
}
SPLASH_TOKENS, SPLASH_LARGEST = 1024, 128  # at least, of queries and keys; the width of a head
BLOCK = 1024  # queries, or keys, at a time
HEADS_AXIS = "tensor"  # of a mesh; its other axes split the batch


def kernel(query: jax.Array, key: jax.Array) -> Callable[..., jax.Array] | None:
    """The kernel that takes the place of `dot_product.attend` for query (B, L, heads, d) and key
    (B, S, heads, d), if there is one and it pays."""
    if query.dtype != key.dtype:
        return None
    platform, kind, capability = _device()
    if platform == "gpu" and capability >= CUDNN_CAPABILITY and _cudnn_has(query):
        return cudnn
    if platform == "tpu" and _splash_pays(query, key, kind):
        return splash
    return None


def _device() -> tuple[str, str, int]:
    """(platform, kind, major number of the compute capability; 0 if it has none)."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    default = jax.config.jax_default_device
    if described is not None:
        platform, kind = described.platform, described.device_kind
        there = [device for device in jax.local_devices() if device.device_kind == kind]
        if platform == "gpu" and not there:
            return platform, kind, CUDNN_CAPABILITY
    elif isinstance(default, str):
        return default, "", 0
    else:
        there = [default or jax.local_devices()[0]]
        platform, kind = there[0].platform, there[0].device_kind
    # An AMD GPU's is a name, such as gfx942.
    major = getattr(there[0], "compute_capability", "").partition(".")[0] if there else ""
    return platform, kind, int(major) if major.isdecimal() else 0


def _cudnn_has(query: jax.Array) -> bool:
    width = query.shape[-1]
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    return half and width <= CUDNN_LARGEST and width % CUDNN_MULTIPLE == 0


def cudnn(
    query: jax.Array, key: jax.Array, value: jax.Array, implementation: str = "cudnn"
) -> jax.Array:
    """`dot_product.attend` by cuDNN.

    An odd number of tokens, for which cuDNN has no gradient, becomes even by one that is masked.

    Args:
      implementation: of `jax.nn.dot_product_attention`; "xla" runs anywhere.
    """
    batch, queries, keys = query.shape[0], query.shape[1], key.shape[1]
    lengths = {}
    if queries % 2 or keys % 2:
        lengths = dict(
            query_seq_lengths=jnp.full(batch, queries, jnp.int32),
            key_value_seq_lengths=jnp.full(batch, keys, jnp.int32),
        )
        query, key, value = map(_even, (query, key, value))
    out = jax.nn.dot_product_attention(query, key, value, implementation=implementation, **lengths)
    return out[:, :queries]


def _even(array: jax.Array) -> jax.Array:
    return jnp.pad(array, ((0, 0), (0, array.shape[1] % 2), (0, 0), (0, 0)))


def _splash_pays(query: jax.Array, key: jax.Array, kind: str) -> bool:
    (_, queries, _, width), keys = query.shape, key.shape[1]
    fits = query.dtype == jnp.bfloat16 and width <= SPLASH_LARGEST
    long = min(queries, keys) >= SPLASH_TOKENS and not queries % BLOCK and not keys % BLOCK
    if not fits or not long or kind not in SPLASH_FROM:
        return False
    own = share(query.shape)
    return own is not None and 4 * own[0] * 256 * keys >= SPLASH_FROM[kind]


def share(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """(rows of the batch, heads) of arrays (B, tokens, heads, d) that each device of the mesh in
    use has; None if they do not divide over it."""
    mesh = jax.sharding.get_abstract_mesh()
    (batch, _, heads, _), of_heads = shape, mesh.shape.get(HEADS_AXIS, 1)
    of_batch = mesh.size // of_heads if mesh.axis_names else 1
    auto = all(kind == AxisType.Auto for kind in mesh.axis_types)
    if not auto or batch % of_batch or heads % of_heads:
        return None
    return batch // of_batch, heads // of_heads


def splash(
    query: jax.Array, key: jax.Array, value: jax.Array, interpret: bool = False
) -> jax.Array:
    """`dot_product.attend` by splash attention: each device of the mesh in use has its rows of the
    batch, and its heads.

    `interpret` runs the kernel anywhere, slowly.
    """
    names = jax.sharding.get_abstract_mesh().axis_names
    attend = functools.partial(_splash, interpret=interpret)
    if names:
        of_batch = tuple(axis for axis in names if axis != HEADS_AXIS)
        spec = PartitionSpec(of_batch, None, HEADS_AXIS if HEADS_AXIS in names else None)
        attend = jax.shard_map(attend, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    return attend(query, key, value)


def _splash(query: jax.Array, key: jax.Array, value: jax.Array, interpret: bool) -> jax.Array:
    # Pallas takes a while to import, and is needed on TPUs alone.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        FullMask,
        MultiHeadMask,
        make_splash_mha,
    )

    queries, keys, heads = query.shape[1], key.shape[1], query.shape[2]
    of_queries, of_keys = min(BLOCK, queries), min(BLOCK, keys)
    sizes = BlockSizes(
        block_q=of_queries,
        block_q_dkv=of_queries,
        block_q_dq=of_queries,
        block_kv=of_keys,
        block_kv_compute=of_keys,
        block_kv_dkv=of_keys,
        block_kv_dkv_compute=of_keys,
        block_kv_dq=of_keys,
    )
    attend = make_splash_mha(
        MultiHeadMask([FullMask((queries, keys))] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    scaled = (query.astype(jnp.float32) * query.shape[-1] ** -0.5).astype(query.dtype)
    by_heads = (jnp.swapaxes(array, 1, 2) for array in (scaled, key, value))
    return jnp.swapaxes(jax.vmap(attend)(*by_heads), 1, 2)
