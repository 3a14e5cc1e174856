"""Vision transformers that make features of pictures: CLIP's and OpenCLIP's towers, and DINOv2.

A picture is cut into patches; a class token and learned positions are added; pre-norm blocks attend
everywhere (Dosovitskiy et al. 2021, eq. 1 to 4). CLIP's has a norm before the first block and a
projection after the last (Radford et al. 2021, §2.4); DINOv2's scales each branch by a learned
vector and may have registers, tokens that mean nothing (Oquab et al. 2023; Darcet et al. 2023).
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ldm_jax.models.clip import ACTIVATIONS, layer_norm
from ldm_jax.models.layers import Conv, Dense, Layer


class ViTBlock(Layer):
    """x + s₁·attention(norm x), x + s₂·MLP(norm x) on (B, L, C); s is 1 unless `layer_scale`."""

    heads: int
    inner: int
    activation: str
    epsilon: float
    layer_scale: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]

        def scaled(name: str, h: jax.Array) -> jax.Array:
            if not self.layer_scale:
                return h
            return h * self.param(name, nn.initializers.constant(1e-5), (width,))

        h = layer_norm("norm1", self.epsilon)(x)
        split = (*x.shape[:-1], self.heads, width // self.heads)
        parts = [Dense(width, name=name)(h).reshape(split) for name in ("query", "key", "value")]
        h = jax.nn.dot_product_attention(*parts).reshape(x.shape)
        x = x + scaled("scale1", Dense(width, name="out")(h))
        h = Dense(self.inner, name="fc1")(layer_norm("norm2", self.epsilon)(x))
        h = Dense(width, name="fc2")(ACTIVATIONS[self.activation](h))
        return x + scaled("scale2", h)


class VisionTransformer(Layer):
    """Images (B, side, side, 3) → the class token after the final norm, (B, width); through a
    projection, (B, projection), if there is one.

    Fields:
      side: of the pictures in pixels, a multiple of `patch`.
      inner: width inside the MLPs.
      patch_bias: whether the patches' convolution has a bias.
      pre_norm: whether a norm stands before the first block.
      layer_scale: whether each branch is scaled by a vector.
      hidden: whether the result is all tokens, (B, 1 + patches, width), as they enter the last
        block, which is left out with what follows.
      registers: number of tokens without a position after the class token.
    """

    side: int
    patch: int
    width: int
    depth: int
    heads: int
    inner: int
    activation: str = "gelu"
    epsilon: float = 1e-6
    patch_bias: bool = True
    pre_norm: bool = False
    layer_scale: bool = False
    registers: int = 0
    projection: int | None = None
    hidden: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        patch, count, init = (self.patch, self.patch), len(images), nn.initializers.normal(0.02)
        x = Conv(self.width, patch, patch, "VALID", use_bias=self.patch_bias, name="patches")(
            images
        ).reshape(count, -1, self.width)
        positions = self.param("positions", init, (1 + x.shape[1], self.width))

        def tokens(name: str, number: int) -> jax.Array:
            shape = (number, self.width)
            return jnp.broadcast_to(self.param(name, init, shape), (count, *shape))

        x = jnp.concatenate([tokens("class_token", 1), x], axis=1) + positions
        if self.registers:
            x = jnp.concatenate([x[:, :1], tokens("registers", self.registers), x[:, 1:]], axis=1)
        if self.pre_norm:
            x = layer_norm("norm_pre", self.epsilon)(x)
        for i in range(self.depth - self.hidden):
            block = ViTBlock(
                self.heads,
                self.inner,
                self.activation,
                self.epsilon,
                self.layer_scale,
                name=f"layers_{i}",
            )
            x = block(x)
        if self.hidden:
            return x
        x = layer_norm("norm", self.epsilon)(x[:, 0])
        if self.projection is None:
            return x
        return Dense(self.projection, use_bias=False, name="projection")(x)
