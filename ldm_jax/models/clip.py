"""The text encoders of CLIP (Radford et al. 2021, §2.4) and of its reproductions by OpenCLIP.

The encoders of Stable Diffusion, as fields of `CLIPText`, which default to the first row. Each has
49408 tokens and a text length of 77.

| encoder | width, depth, heads | activation | projection | used by: layer, final_norm |
|---|---|---|---|---|
| CLIP ViT-L/14 | 768, 12, 12 | quick_gelu | None | SD 1: "last", True; SDXL: 11, False |
| OpenCLIP ViT-H/14 | 1024, 24, 16 | gelu | None | SD 2: "penultimate", True |
| OpenCLIP ViT-bigG/14 | 1280, 32, 20 | gelu | 1280 | SDXL: "penultimate", False, and pooled |

All three have a projection of their own width; only SDXL uses one. In diffusers' files, SD 2 has
depth 23 and layer "last": the unused block is missing.

Parameters are named as in transformers, less `text_model.`, `embeddings.` and `encoder.`, with
`layers_0` for `layers.0`. OpenCLIP's `resblocks.N` is `layers_N`: `ln_1`, `ln_2` are `layer_norm1`,
`layer_norm2`; `mlp.c_fc`, `mlp.c_proj` are `mlp/fc1`, `mlp/fc2`; the thirds of `attn.in_proj` are
`self_attn/q_proj`, `k_proj`, `v_proj`; and its `text_projection`, (width, D), is the kernel as it
is.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ldm_jax.models.layers import Dense, Layer, LayerNorm
from ldm_jax.models.tokens import TokenEmbed


def quick_gelu(x: jax.Array) -> jax.Array:
    """x·σ(1.702x), Hendrycks & Gimpel 2016, §2: close to GELU, and used by OpenAI."""
    return x * nn.sigmoid(1.702 * x)


def exact_gelu(x: jax.Array) -> jax.Array:
    """x·Φ(x) by erf (Hendrycks & Gimpel 2016, eq. 1)."""
    return nn.gelu(x, approximate=False)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": exact_gelu}
# By name, indices of the list of hidden states: the embeddings, then the output of every block.
LAYERS = {"last": -1, "penultimate": -2}


def layer_norm(name: str, epsilon: float, **types) -> LayerNorm:
    """With the two-pass variance."""
    return LayerNorm(epsilon=epsilon, use_fast_variance=False, name=name, **types)


def layer_index(layer: int | str, depth: int) -> int:
    """Index of `CLIPText.layer` in the list of hidden states; ValueError if there is none."""
    index = LAYERS.get(layer, layer)
    if not isinstance(index, int) or not -depth - 1 <= index <= depth:
        raise ValueError(
            f"layer={layer!r}: choose one of {', '.join(LAYERS)}, or an index from {-depth - 1} to "
            f"{depth}, 0 being the embeddings"
        )
    return index


class TextFeatures(NamedTuple):
    """`hidden` (B, L, width): every token in its context. `pooled` (B, D): the whole text."""

    hidden: jax.Array
    pooled: jax.Array


class CausalAttention(nn.Module):
    """Each token of (B, L, C) attends to itself and to those before it; scale head_dim^−½.

    `depth`, of the whole encoder, sets the initial scale of `out_proj`.
    """

    heads: int
    depth: int
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)

        def project(name):
            init = nn.initializers.normal(width**-0.5)
            projected = Dense(width, kernel_init=init, name=name, **types)(x)
            return projected.reshape(*x.shape[:-1], self.heads, width // self.heads)

        query, key, value = (project(name) for name in ("q_proj", "k_proj", "v_proj"))
        # Scaled by head_dim^−½, softmax in float32 whatever the dtype.
        out = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        init = nn.initializers.normal((2 * width * self.depth) ** -0.5)
        return Dense(width, kernel_init=init, name="out_proj", **types)(out.reshape(x.shape))


class MLP(nn.Module):
    """Two-layer perceptron on (B, L, C), `inner` wide inside; `depth` as above, for `fc2`."""

    inner: int
    activation: str
    depth: int
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        init = nn.initializers.normal((2 * width) ** -0.5)
        h = Dense(self.inner, kernel_init=init, name="fc1", **types)(x)
        init = nn.initializers.normal((2 * width * self.depth) ** -0.5)
        h = ACTIVATIONS[self.activation](h)
        return Dense(width, kernel_init=init, name="fc2", **types)(h)


class CLIPLayer(nn.Module):
    """x + causal self-attention, x + MLP, each on a LayerNorm."""

    heads: int
    inner: int
    activation: str
    depth: int
    epsilon: float = 1e-5
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        attention = CausalAttention(self.heads, self.depth, name="self_attn", **types)
        x = x + attention(layer_norm("layer_norm1", self.epsilon, **types)(x))
        mlp = MLP(self.inner, self.activation, self.depth, name="mlp", **types)
        return x + mlp(layer_norm("layer_norm2", self.epsilon, **types)(x))


class CLIPText(Layer):
    """Tokens (B, L ≤ max_length), int32 → `TextFeatures`: Radford et al. 2021, §2.4.

    Pre-norm blocks with learned absolute positions; the causal mask is the only one, so padding
    after the end token changes neither what comes before it nor `pooled`.

    Fields:
      mlp_width: of the perceptrons inside; None: four times `width`, as in every published model.
      activation: "gelu" (exact) or "quick_gelu".
      projection: width D of `pooled`; None for no projection, D = width.
      layer: which hidden state `hidden` is: an index, 0 for the embeddings, i for the output of the
        i-th block, −1 for that of the last; or "last" or "penultimate".
      final_norm: whether `hidden` passes through the final LayerNorm.
      eos: `pooled` is the last hidden state, through the final LayerNorm, at the end token, times
        `text_projection`. None: the end is where the id is highest, as in the originals. Else: it
        is the first token of this id (the first of all if there is none), as in transformers where
        `eos_token_id` is not 2. With CLIP's ids, where the end token 49407 is the highest, both
        agree.
      added: the numbers of vectors of tokens that were added, see `TokenEmbed`; never the end.

    An unused one of hidden and pooled, and the blocks that only it needs, cost nothing under jit.

    Raises:
      ValueError: more tokens than max_length; ids outside the vocabulary, unless traced (under jit,
        an id too high turns its row to NaN); fields that fit no network.
    """

    vocab_size: int = 49408
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int | None = None
    max_length: int = 77
    activation: str = "quick_gelu"
    projection: int | None = None
    layer: int | str = "last"
    final_norm: bool = True
    eos: int | None = None
    added: tuple[int, ...] = ()
    epsilon: float = 1e-5
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> TextFeatures:
        self._check(tokens)
        index = layer_index(self.layer, self.depth)
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        embed = TokenEmbed(self.vocab_size, self.width, self.added, name="token_embedding", **types)
        shape = (self.max_length, self.width)
        init = nn.initializers.normal(0.01)
        positions = self.param("position_embedding", init, shape, self.param_dtype)
        h = embed(tokens)
        hidden = [h + positions[: tokens.shape[1]].astype(h.dtype)]
        for i in range(self.depth):
            block = CLIPLayer(
                self.heads,
                self.mlp_width or 4 * self.width,
                self.activation,
                self.depth,
                self.epsilon,
                name=f"layers_{i}",
                **types,
            )
            hidden.append(block(hidden[-1]))

        norm = layer_norm("final_layer_norm", self.epsilon, **types)
        own = jnp.where(tokens < self.vocab_size, tokens, -1) if self.added else tokens
        ends = jnp.argmax(own if self.eos is None else own == self.eos, axis=1)
        pooled = norm(jnp.take_along_axis(hidden[-1], ends[:, None, None], axis=1)[:, 0])
        if self.projection is not None:
            init = nn.initializers.normal(self.width**-0.5)
            project = Dense(
                self.projection, use_bias=False, kernel_init=init, name="text_projection", **types
            )
            pooled = project(pooled)
        return TextFeatures(norm(hidden[index]) if self.final_norm else hidden[index], pooled)

    def _check(self, tokens: jax.Array) -> None:
        """Raises ValueError for inputs and fields on which `__call__` would fail or be wrong."""
        if self.width % self.heads:
            raise ValueError(f"width={self.width} does not divide into heads={self.heads}")
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation={self.activation!r}: choose one of {known}")
        if self.eos is not None and not 0 <= self.eos < self.vocab_size:
            raise ValueError(f"eos={self.eos}, but vocab_size is {self.vocab_size}")
        if tokens.shape[1] > self.max_length:
            raise ValueError(f"{tokens.shape[1]} tokens, but max_length is {self.max_length}")
        if not isinstance(tokens, jax.core.Tracer):
            ids = np.asarray(tokens)
            size = self.vocab_size + sum(self.added)
            wrong = ids[(ids < 0) | (ids >= size)]
            if wrong.size:
                raise ValueError(f"token {wrong[0]}, but vocab_size is {size}")
