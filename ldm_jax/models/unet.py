"""The denoising UNet of latent diffusion (Rombach et al. 2022, §3.2–3.3; Dhariwal & Nichol 2021).

Modules have the originals' names (`input_blocks_3_0` is their `input_blocks.3.0`), so that they
correspond to a checkpoint's keys.
"""

import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import linen as nn

from ldm_jax.models.attention import SpatialTransformer
from ldm_jax.models.blocks import AttentionBlock, ResBlock
from ldm_jax.models.layers import (
    Dense,
    Embed,
    GroupNorm,
    check_channels,
    check_sides,
    conv,
    level_widths,
    timestep_embedding,
    uniform_init,
    upsample,
    with_feature,
)
from ldm_jax.models.remat import rematerialised


class UNet(nn.Module):
    """Noisy latents (B, h, w, in_channels) at timesteps (B,) → (B, h, w, out_channels).

    Attention is a SpatialTransformer over `context` (B, L, context_dim), or, without `context_dim`
    and unless `use_spatial_transformer`, a plain AttentionBlock. It is used at the *down-sampling
    factors* `attention_resolutions`, as in the originals, and in the middle. Exactly one of
    `num_heads` and `num_head_channels` counts: the latter if it is positive. Channels must be
    divisible into heads, so there is no field for the originals' `legacy`, which differs only if
    they are not. `num_heads`, `transformer_depth` and `disable_self_attentions` apply to all levels
    or are tuples with an entry for each level; the middle has the last level's heads and depth, and
    always self-attention. Level i has model_channels·channel_mult[i] channels, rounded.
    `use_linear_in_transformer` changes nothing here: it is how checkpoints store projections.

    `num_classes` is the kind of `y`, whose embedding is added to that of the time:
      a number n: labels (B,), integers in [0, n) (SD 2's upscaler, whose labels are noise levels);
      "sequential": vectors (B, adm_in_channels) (unCLIP, SDXL);
      "continuous": numbers (B, 1), through one linear layer;
      "timestep": numbers (B,), which are embedded like timesteps.

    With `time_cond_proj_dim`, `timestep_cond` (B, time_cond_proj_dim) is projected and added to the
    sinusoids of the time; None is zeros. Guidance-distilled models use it (Meng et al. 2023; Luo et
    al. 2023) for the embedding of the guidance scale, see `embedders.guidance_embedding`.

    `residuals` are a ControlNet's (see `controlnet.py`): one for each skip, in the order of the way
    down, and one for the middle; they are added to these before the way up.

    `features` are a T2I-Adapter's (see `t2i_adapter.py`): maps for the levels from the first, of
    `feature_places`, and at most one for the middle.

    With `branch`, the number of a skip, 0 the outermost, the result is (output, deep): `deep` are
    the features that meet this skip on the way up. Given as `deep` of another call, all that is
    inside of the branch is left out (DeepCache, Ma et al. 2023, §3.2); `residuals` are then those
    of the skips that remain.

    `remat` names what blocks keep for the backward pass: see `models/remat.py`.

    Raises ValueError for shapes that would fail late, or build another network.
    """

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[float, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (4, 2, 1)
    num_heads: int | tuple[int, ...] = 8
    num_head_channels: int = -1
    context_dim: int | None = None
    use_spatial_transformer: bool = False
    transformer_depth: int | tuple[int, ...] = 1
    disable_self_attentions: bool | tuple[bool, ...] = False
    use_linear_in_transformer: bool = False
    num_classes: int | str | None = None
    adm_in_channels: int | None = None
    time_cond_proj_dim: int | None = None
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    groups: int = 32
    dropout: float = 0.0
    remat: str = ""
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @property
    def skips(self) -> int:
        """The number of skips between the way down and the way up."""
        return (self.num_res_blocks + 1) * len(self.channel_mult)

    def _check(
        self,
        x: jax.Array,
        context: jax.Array | None,
        y: jax.Array | None,
        timestep_cond: jax.Array | None,
        branch: int | None = None,
    ) -> None:
        check_channels(x, "UNet with in_channels", self.in_channels)
        for field in ("num_heads", "transformer_depth", "disable_self_attentions"):
            self._per_level(field)  # for its check
        if branch is not None and not 0 <= branch < self.skips:
            last = self.skips - 1
            raise ValueError(f"cache_branch={branch}: this UNet has the branches 0…{last}")
        if self.resblock_updown:  # its blocks would drop the last pixel of an odd side
            check_sides(x, "UNet latents", 2 ** (len(self.channel_mult) - 1))
        width = None if context is None else context.shape[-1]
        if width != self.context_dim:
            shape = None if context is None else context.shape
            raise ValueError(f"UNet with context_dim={self.context_dim} got context={shape}")

        batch, kind = x.shape[0], self.num_classes
        shapes = {
            "sequential": (batch, self.adm_in_channels),
            "continuous": (batch, 1),
            "timestep": (batch,),
        }
        if isinstance(kind, str) and kind not in shapes:
            raise ValueError(f"UNet: num_classes={kind!r} is no number and none of {list(shapes)}")
        if kind == "sequential" and self.adm_in_channels is None:
            raise ValueError("UNet with num_classes='sequential' needs adm_in_channels, y's width")
        expected = None if kind is None else shapes.get(kind, (batch,))
        found = None if y is None else y.shape
        if found != expected:
            raise ValueError(f"UNet with num_classes={kind!r} takes y={expected} and got y={found}")
        if timestep_cond is not None and timestep_cond.shape != (batch, self.time_cond_proj_dim):
            raise ValueError(
                f"UNet with time_cond_proj_dim={self.time_cond_proj_dim} got "
                f"timestep_cond={timestep_cond.shape} for {batch} latents"
            )
        if isinstance(kind, int) and not jnp.issubdtype(y.dtype, jnp.integer):
            raise ValueError(f"UNet with num_classes={kind} takes integers as y and got {y.dtype}")

    def _per_level(self, field: str) -> tuple:
        """A field's entry for each level, from one for all of them or from a tuple."""
        value, levels = getattr(self, field), len(self.channel_mult)
        value = (value,) * levels if isinstance(value, int) else tuple(value)
        if len(value) != levels:
            raise ValueError(
                f"UNet: {field}={value} has {len(value)} entries for {levels} levels (channel_mult)"
            )
        return value

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        context: jax.Array | None = None,
        deterministic: bool = True,
        *,
        y: jax.Array | None = None,
        timestep_cond: jax.Array | None = None,
        residuals: tuple[jax.Array, ...] | None = None,
        features: tuple[jax.Array, ...] = (),
        branch: int | None = None,
        deep: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self._check(x, context, y, timestep_cond, branch)
        widths = level_widths(self.model_channels, self.channel_mult)
        only_cross = self._per_level("disable_self_attentions")
        emb = time_and_vector(self, x, t, y, timestep_cond)
        outermost = None if deep is None else branch
        h, skips = encode(self, x, emb, context, deterministic, None, features, outermost)
        if residuals is not None:
            inside = () if h is None else (h,)
            if len(residuals) != len(skips) + len(inside):
                raise ValueError(
                    f"UNet takes {len(skips)} + 1 residuals and got {len(residuals)}: they are of "
                    "a ControlNet of another UNet"
                )
            added = [a + more for a, more in zip((*skips, *inside), residuals, strict=True)]
            skips, h = added[: len(skips)], h if h is None else added[-1]
        h = deep if h is None else h

        # Up: each block takes one skip.
        for place in reversed(range(len(skips))):
            level, first = divmod(place, self.num_res_blocks + 1)
            attends = 2**level in self.attention_resolutions
            deep = h if place == branch else deep
            name = f"output_blocks_{self.skips - 1 - place}"
            h = jnp.concatenate([h, skips.pop()], axis=-1)
            h = _resblock(self, f"{name}_0", widths[level])(h, emb, deterministic)
            if attends:
                cross = only_cross[level]
                h = _attention(self, f"{name}_1", h, level, context, deterministic, cross)
            if level and not first:
                name = f"{name}_{2 if attends else 1}"
                if self.resblock_updown:
                    h = _resblock(self, name, h.shape[-1], "up")(h, emb, deterministic)
                else:
                    height, width = skips[-1].shape[1:3]
                    odd = height % 2 or width % 2  # half of an odd side was rounded up
                    h = upsample(h)[:, :height, :width] if odd else h
                    h = conv(h.shape[-1], upsampled=not odd, name=name, **types)(h)

        h = nn.silu(GroupNorm(self.groups, name="out_0", **types)(h))
        h = conv(self.out_channels, zero_init=True, name="out_2", **types)(h)
        return h if branch is None else (h, deep)


# Parts of a UNet that a ControlNet has as well. They make modules within the compact method that
# calls them; of `unet` they use the fields alone.


def _resblock(unet: UNet, name: str, features: int, resize: str = "") -> nn.Module:
    return rematerialised(ResBlock, unet.remat, static=(3,))(
        features,
        unet.groups,
        unet.dropout,
        unet.use_scale_shift_norm,
        resize,
        name=name,
        dtype=unet.dtype,
        param_dtype=unet.param_dtype,
    )


def _attention(
    unet: UNet,
    name: str,
    h: jax.Array,
    level: int,
    context: jax.Array | None,
    deterministic: bool,
    cross: bool = False,
) -> jax.Array:
    types = dict(dtype=unet.dtype, param_dtype=unet.param_dtype)
    channels, size = h.shape[-1], unet.num_head_channels
    count = channels // size if size > 0 else unet._per_level("num_heads")[level]
    if count < 1 or channels % (size if size > 0 else count):
        raise ValueError(
            f"UNet: {channels} channels do not divide into heads (num_heads="
            f"{unet.num_heads}, num_head_channels={unet.num_head_channels})"
        )
    if unet.context_dim is None and not unet.use_spatial_transformer:
        block = rematerialised(AttentionBlock, unet.remat)
        return block(count, unet.groups, name=name, **types)(h)
    transformer = SpatialTransformer(
        count,
        channels // count,
        unet._per_level("transformer_depth")[level],
        unet.groups,
        unet.dropout,
        cross,
        unet.remat,
        name=name,
        **types,
    )
    return transformer(h, context, deterministic)


def time_and_vector(
    unet: UNet,
    x: jax.Array,
    t: jax.Array,
    y: jax.Array | None,
    timestep_cond: jax.Array | None,
) -> jax.Array:
    """The embedding (B, 4·model_channels) of the time and the other vector inputs of a UNet. The
    names are the originals'."""
    types = dict(dtype=unet.dtype, param_dtype=unet.param_dtype)

    def dense(name, values):
        width = 4 * unet.model_channels
        return Dense(width, kernel_init=uniform_init, name=name, **types)(values)

    def perceptron(name, values):
        values = values.astype(unet.dtype or x.dtype)
        return dense(f"{name}_2", nn.silu(dense(f"{name}_0", values)))

    time = timestep_embedding(t, unet.model_channels)
    if unet.time_cond_proj_dim is not None:
        if timestep_cond is None:
            timestep_cond = jnp.zeros((len(x), unet.time_cond_proj_dim))
        project = Dense(
            unet.model_channels,
            use_bias=False,
            kernel_init=uniform_init,
            name="time_embed_cond_proj",
            **types,
        )
        time = time + project(timestep_cond.astype(unet.dtype or x.dtype))
    emb = perceptron("time_embed", time)
    if unet.num_classes == "sequential":
        emb += perceptron("label_emb_0", y)
    elif unet.num_classes == "timestep":
        emb += perceptron("label_emb_1", timestep_embedding(y, unet.model_channels))
    elif unet.num_classes == "continuous":
        emb += dense("label_emb", y.astype(emb.dtype))
    elif unet.num_classes is not None:
        normal = nn.initializers.normal(1.0)
        shape = (unet.num_classes, emb.shape[-1])
        emb += Embed(*shape, embedding_init=normal, name="label_emb", **types)(y)
    return emb


def encode(
    unet: UNet,
    x: jax.Array,
    emb: jax.Array,
    context: jax.Array | None,
    deterministic: bool = True,
    hint: jax.Array | None = None,
    features: tuple[jax.Array, ...] = (),
    branch: int | None = None,
) -> tuple[jax.Array | None, list[jax.Array]]:
    """The way down and the middle of a UNet: (the middle's output, the skips).

    A ControlNet's `hint` (B, h, w, C) is added after the first convolution; `features` are those of
    `UNet.__call__`. With `branch`, the number of a skip, the way ends there: (None, the skips).
    """
    left = iter(features)
    levels = len(unet.channel_mult)
    down = _down(unet, x, emb, context, deterministic, hint, left)
    if branch is not None:
        return None, [*itertools.islice(down, branch + 1)]
    skips = [*down]
    h = _resblock(unet, "middle_block_0", skips[-1].shape[-1])(skips[-1], emb, deterministic)
    h = _attention(unet, "middle_block_1", h, levels - 1, context, deterministic)
    h = with_feature(_resblock(unet, "middle_block_2", h.shape[-1])(h, emb, deterministic), left)
    if next(left, None) is not None:
        raise ValueError(f"UNet takes {levels} + 1 features and got {len(features)}")
    return h, skips


def _down(
    unet: UNet,
    x: jax.Array,
    emb: jax.Array,
    context: jax.Array | None,
    deterministic: bool,
    hint: jax.Array | None,
    left: Iterator[jax.Array],
) -> Iterator[jax.Array]:
    """The output of every block of the way down, in order: the skips."""
    types = dict(dtype=unet.dtype, param_dtype=unet.param_dtype)
    widths = level_widths(unet.model_channels, unet.channel_mult)
    only_cross = unet._per_level("disable_self_attentions")
    # The first convolution is as wide as the first level (guided diffusion at 512: half).
    h = conv(widths[0], name="input_blocks_0_0", **types)(x)
    h = h if hint is None else h + hint
    yield h
    number, levels = 1, len(widths)
    for level, width in enumerate(widths):
        attends = 2**level in unet.attention_resolutions
        inside = attends or level == levels - 1
        for i in range(unet.num_res_blocks):
            name = f"input_blocks_{number}"
            h = _resblock(unet, f"{name}_0", width)(h, emb, deterministic)
            if attends:
                cross = only_cross[level]
                h = _attention(unet, f"{name}_1", h, level, context, deterministic, cross)
            if inside and i == unet.num_res_blocks - 1:
                h = with_feature(h, left)
            yield h
            number += 1
        if level < levels - 1:
            name = f"input_blocks_{number}_0"
            if unet.resblock_updown:
                h = _resblock(unet, name, h.shape[-1], "down")(h, emb, deterministic)
            else:
                h = conv(h.shape[-1], stride=2, name=name, **types)(h)
            if not inside:
                h = with_feature(h, left)
            yield h
            number += 1
