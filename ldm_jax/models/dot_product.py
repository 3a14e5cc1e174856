"""Dot-product attention that never holds all its weights, forward or backward.

The weights softmax(QKᵀ/√d) of a part of the heads, or of a part of the queries, are computed at a
time, and again in the backward pass (Rabe & Staats 2021, arXiv 2112.05682; Dao et al. 2022, arXiv
2205.14135): a training step keeps queries, keys, values and the output. The batch is never cut, so
that each device of a mesh keeps its own rows.

The backward pass is written out, which forbids forward derivatives; `forward_derivatives` allows
them.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from ldm_jax.models import fused_attention

# Bytes of float32 weights that are held at a time: what a CPU's caches hold, and a TPU's memory on
# the chip; elsewhere what memory bears. And the fewest queries that are worth a product of their
# own: for each part, keys and values are read again and their gradients written.
AT_A_TIME = {"cpu": 2**22, "tpu": 2**25, "other": 2**29}
FEWEST_QUERIES = {"cpu": 64, "tpu": 256, "other": 64}


_both_ways = contextvars.ContextVar("forward_derivatives", default=False)


@contextlib.contextmanager
def forward_derivatives() -> Iterator[None]:
    """Within it, `attend` is traced so that it has `jax.jvp`, `jax.grad` and their combinations.

    Its gradient keeps no weights either, but is the one that JAX derives.
    """
    token = _both_ways.set(True)
    try:
        yield
    finally:
        _both_ways.reset(token)


def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Multi-head attention softmax(QKᵀ/√d)V (Vaswani et al. 2017, eq. 1), softmax in float32.

    In half precision on a GPU or a TPU it may be a kernel: see `fused_attention`. Has no forward
    derivatives but within `forward_derivatives`.

    Args: query (B, L, heads, d); key and value (B, S, heads, d). Returns (B, L, heads, d).
    """
    if _both_ways.get():
        return _value(query, key, value, again=jax.checkpoint)
    kernel = fused_attention.kernel(query, key) or _attend
    return kernel(query, key, value)


def _value(query, key, value, again=lambda function: function):
    def parts(limits, *arrays):
        return _attend_parts(limits, *arrays, again)

    return _by_heads(_on_platform(parts, *(_by_heads(a) for a in (query, key, value))))


@jax.custom_vjp
def _attend(query, key, value):
    return _value(query, key, value)


def _forward(query, key, value):
    out = _value(query, key, value)
    return out, (query, key, value, out)


def _backward(saved, gradient):
    query, key, value, out = saved
    # Σ_s w[s]·(g·v[s]) is g·out, which spares a pass over the weights (Dao et al. 2022, app. B.4).
    inner = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    arrays = (_by_heads(a) for a in (query, key, value, gradient))
    gradients = _on_platform(_backward_parts, *arrays, jnp.swapaxes(inner, 1, 2))
    return tuple(_by_heads(a) for a in gradients)


_attend.defvjp(_forward, _backward)


def _by_heads(array: jax.Array) -> jax.Array:
    """(B, L, heads, d) ↔ (B, heads, L, d).

    With the heads after the tokens in the products, XLA takes several times as long on a CPU, and
    reads 1.5 times as much on a TPU.
    """
    return jnp.swapaxes(array, 1, 2)


def _on_platform(function, *arrays):
    def of(platform):
        limits = AT_A_TIME[platform], FEWEST_QUERIES[platform]
        return lambda *arrays: function(limits, *arrays)

    return jax.lax.platform_dependent(*arrays, cpu=of("cpu"), tpu=of("tpu"), default=of("other"))


def _parts(size: int, total: int, limit: int, least: int) -> int:
    """Into how many equal parts of `least` or more `size` is cut, so that `total` fits `limit`."""
    parts = [n for n in range(1, size // least + 1) if size % n == 0]
    return next((n for n in parts if total / n <= limit), parts[-1] if parts else 1)


def _cut(array: jax.Array, axis: int, parts: int) -> jax.Array:
    """The parts of an axis, as a new first axis: of 6 in 3 parts, 0 and 3, 1 and 4, 2 and 5.

    So each device of a mesh that splits the axis has its share of every part.
    """
    shape = (*array.shape[:axis], -1, parts, *array.shape[axis + 1 :])
    return jnp.moveaxis(array.reshape(shape), axis + 1, 0)


def _join(array: jax.Array, axis: int) -> jax.Array:
    """The inverse of `_cut`."""
    array = jnp.moveaxis(array, 0, axis + 1)
    return array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])


def _exponentials(query, key):
    """softmax(QKᵀ/√d) = weights/sums: weights (B, heads, L, S) in the type of the inputs, and sums
    (B, heads, L, 1) in float32.

    Dividing is left to what is smaller than the weights. They are rounded at once and summed as
    they are used, so that a TPU never writes float32 ones to its memory.
    """
    logits = jnp.einsum("bhld,bhsd->bhls", query, key, preferred_element_type=jnp.float32)
    logits = logits * query.shape[-1] ** -0.5
    highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - highest).astype(query.dtype)
    return weights, jnp.sum(weights, axis=-1, keepdims=True, dtype=jnp.float32)


@jax.jit
def again_exponentials(query, key):
    """`_exponentials`, under a name by which `runtime.meters` knows what is computed again."""
    return _exponentials(query, key)


def _plan(query, key, limits):
    """Parts of the heads, and of the queries of each part, of what each device has."""
    limit, fewest = limits
    batch, heads, queries, width = query.shape
    batch, heads = fused_attention.share((batch, queries, heads, width)) or (batch, heads)
    total = 4 * batch * heads * queries * key.shape[2]
    by_head = _parts(heads, total, limit, 1)
    return by_head, _parts(queries, total // by_head, limit, fewest)


def _attend_parts(limits, query, key, value, again):
    """Attention on (B, heads, L, d). `again` transforms what computes a part."""
    by_head, by_query = _plan(query, key, limits)

    @again
    def some(query, key, value):
        weights, sums = _exponentials(query, key)
        out = jnp.einsum("bhls,bhsd->bhld", weights, value, preferred_element_type=jnp.float32)
        return (out / sums).astype(value.dtype)

    def some_heads(query, key, value):
        if by_query == 1:
            return some(query, key, value)
        out = jax.lax.map(lambda part: some(part, key, value), _cut(query, 2, by_query))
        return _join(out, 2)

    if by_head == 1:
        return some_heads(query, key, value)
    parts = tuple(_cut(array, 1, by_head) for array in (query, key, value))
    return _join(jax.lax.map(lambda part: some_heads(*part), parts), 1)


def _backward_parts(limits, query, key, value, gradient, inner):
    """Gradients for query, key and value, (B, heads, L, d), from that of the output.

    `inner` (B, heads, L) are the products of output and gradient.
    """
    by_head, by_query = _plan(query, key, limits)
    scale = query.shape[-1] ** -0.5

    def some(key, value, query, gradient, inner):
        """The gradients for key and value are (B, heads, d, S).

        In this order XLA's products on a CPU are six times as fast as in the other one.
        """
        weights, sums = again_exponentials(query, key)
        gradient = (gradient / sums).astype(gradient.dtype)
        of_weights = jnp.einsum(
            "bhld,bhsd->bhls", gradient, value, preferred_element_type=jnp.float32
        )
        of_logits = scale * weights * (of_weights - inner[..., None] / sums)
        of_logits = of_logits.astype(query.dtype)
        return (
            jnp.einsum("bhls,bhsd->bhld", of_logits, key),
            jnp.einsum("bhld,bhls->bhds", query, of_logits),
            jnp.einsum("bhld,bhls->bhds", gradient, weights),
        )

    def some_heads(key, value, *of_queries):
        if by_query == 1:
            return some(key, value, *of_queries)

        def add(totals, part):
            of_query, *others = some(key, value, *part)
            both = zip(totals, others, strict=True)
            return tuple(a + b.astype(a.dtype) for a, b in both), of_query

        shape = (*key.shape[:2], key.shape[3], key.shape[2])
        totals = (jnp.zeros(shape, jnp.float32),) * 2
        parts = tuple(_cut(array, 2, by_query) for array in of_queries)
        totals, of_query = jax.lax.scan(add, totals, parts)
        return _join(of_query, 2), *(a.astype(key.dtype) for a in totals)

    arrays = (key, value, query, gradient, inner)
    if by_head == 1:
        of_query, of_key, of_value = some_heads(*arrays)
    else:
        parts = tuple(_cut(array, 1, by_head) for array in arrays)
        gradients = jax.lax.map(lambda part: some_heads(*part), parts)
        of_query, of_key, of_value = (_join(a, 1) for a in gradients)
    return of_query, jnp.swapaxes(of_key, 2, 3), jnp.swapaxes(of_value, 2, 3)
