"""The kinds of embedders, by the key `kind` of a config's sections `conditioning.<name>`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ldm_jax.conditions.added import added
from ldm_jax.conditions.base import Conditioning, Embedder
from ldm_jax.conditions.control import control, t2i
from ldm_jax.conditions.image_prompt import ip_adapter
from ldm_jax.conditions.tokenizer import (
    BytePair,
    FolderTokenizer,
    SentencePiece,
    WordPiece,
    make_tokenizer,
)
from ldm_jax.models.build import Autoencoder
from ldm_jax.models.clip import CLIPText
from ldm_jax.models.embedders import (
    ClassEmbedder,
    Patches,
    SpatialRescaler,
    concat_timestep_embedding,
)
from ldm_jax.models.text import TextTransformer
from ldm_jax.pictures import to_signed

# Methods that several embedders share.


def _negative_prompts(self, raw: np.ndarray, entries: dict[str, Any]) -> np.ndarray:
    """The negative prompts or, without them, no prompt."""
    return self.prepare(entries) if "caption" in entries else self.null(len(raw))


def _cut_prompts(self, batch: dict[str, Any]) -> list[str]:
    """A sentence for each prompt that is longer than the network's text."""
    ends = [self.tokenizer.overflow(prompt) for prompt in dict.fromkeys(batch["caption"])]
    length = self.tokenizer.max_length
    return [f"a prompt is longer than {length} tokens; cut: {end!r}" for end in ends if end]


def _same(self, raw: np.ndarray, entries: dict[str, Any]) -> np.ndarray:
    """Not guided: both sides of guidance get the same input."""
    return raw


def _uncut(self, batch: dict[str, Any]) -> list[str]:
    """There is no text to cut."""
    return []


@dataclasses.dataclass(frozen=True)
class TextEmbedder:
    """Prompts → context, through a text transformer trained with the UNet (as in LDM)."""

    name: str
    network: TextTransformer
    tokenizer: WordPiece | FolderTokenizer
    dropout: float
    needs = ("caption",)
    guided = True
    negative, cut = _negative_prompts, _cut_prompts

    def prepare(self, batch: dict[str, Any]) -> np.ndarray:
        """Tokens int32 (B, L) of batch["caption"]."""
        return self.tokenizer(list(batch["caption"]))

    def null(self, count: int) -> np.ndarray:
        """The empty prompt."""
        return np.repeat(self.tokenizer([""]), count, axis=0)

    def __call__(self, params, raw, **dropout) -> Conditioning:
        return Conditioning(context=self.network.apply({"params": params}, raw, **dropout))


@dataclasses.dataclass(frozen=True)
class ClipEmbedder:
    """Prompts → CLIP's features: every token as context, or the whole text as vector, or both.

    With `zero_null` the features of no prompt are 0 (SDXL) and its tokens −1; otherwise they are
    those of the empty prompt (SD 1 and 2).
    """

    name: str
    network: CLIPText
    tokenizer: BytePair | SentencePiece | FolderTokenizer
    dropout: float
    context: bool = True
    pooled: bool = False
    zero_null: bool = False
    needs = ("caption",)
    guided = True
    negative, cut = _negative_prompts, _cut_prompts

    def prepare(self, batch: dict[str, Any]) -> np.ndarray:
        """Tokens int32 (B, L) of batch["caption"]; "" is the empty prompt, not "no prompt"."""
        return self.tokenizer(list(batch["caption"]))

    def null(self, count: int) -> np.ndarray:
        """No prompt."""
        empty = np.repeat(self.tokenizer([""]), count, axis=0)
        return np.full_like(empty, -1) if self.zero_null else empty

    def __call__(self, params, raw, **_) -> Conditioning:
        features = self.network.apply({"params": params}, jnp.maximum(raw, 0))
        if self.zero_null:
            given = raw[:, 0] >= 0
            features = jax.tree.map(
                lambda f: jnp.where(given.reshape(-1, *[1] * (f.ndim - 1)), f, 0.0), features
            )
        return Conditioning(
            context=features.hidden if self.context else None,
            vector=features.pooled if self.pooled else None,
        )


@dataclasses.dataclass(frozen=True)
class LabelEmbedder:
    """Labels → a context of one token, or a vector. "No label" is `null_class`, one of the classes,
    or, with `zero_null`, an embedding of 0 with the label −1."""

    name: str
    network: ClassEmbedder
    null_class: int | None
    dropout: float
    output: str = "context"
    zero_null: bool = False
    needs = ("label",)
    guided = True
    cut = _uncut

    def prepare(self, batch: dict[str, Any]) -> np.ndarray:
        """Labels int32 (B,) of batch["label"]; raises ValueError for one out of range."""
        labels = np.asarray(batch["label"], np.int32)
        classes = self.network.n_classes
        wrong = labels[(labels < 0) | (labels >= classes)]
        if wrong.size:
            raise ValueError(f"label {wrong[0]}: this model knows 0 to {classes - 1}")
        return labels

    def null(self, count: int) -> np.ndarray:
        """The label for no label, or class 0 for a model that has none and drops nothing."""
        return np.full(count, -1 if self.zero_null else self.null_class or 0, np.int32)

    def negative(self, raw: np.ndarray, entries: dict[str, Any]) -> np.ndarray:
        """No label."""
        return self.null(len(raw))

    def __call__(self, params, raw, **_) -> Conditioning:
        context = self.network.apply({"params": params}, jnp.maximum(raw, 0))
        context = jnp.where(raw[:, None, None] >= 0, context, 0.0) if self.zero_null else context
        return Conditioning(**{self.output: context if self.output == "context" else context[:, 0]})


SIZES = {"original_size": 2, "crop": 2, "target_size": 2, "aesthetic_score": 1}


def default_sizes(height: int, width: int) -> dict[str, Any]:
    """SDXL's entries for a picture that was neither scaled nor cropped."""
    size = (height, width)
    return {"original_size": size, "crop": (0, 0), "target_size": size, "aesthetic_score": 6.0}


@dataclasses.dataclass(frozen=True)
class SizeEmbedder:
    """Numbers about a picture → vector, each as `dim` sinusoids (SDXL, Podell et al. 2023, §2.2).

    `fields` are keys of `SIZES`, in their order: pixels (height, width) or (top, left), points.
    """

    name: str
    fields: tuple[str, ...]
    dropout: float
    dim: int = 256
    network = None
    guided = False
    cut = _uncut

    @property
    def needs(self) -> tuple[str, ...]:
        return self.fields

    def prepare(self, batch: dict[str, Any]) -> np.ndarray:
        """float32 (B, N) of the batch's entries, (B, 2), or (B,) for a score."""
        parts = [np.asarray(batch[field], np.float32) for field in self.fields]
        return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)

    def null(self, count: int) -> np.ndarray:
        """Zeros."""
        return np.zeros((count, sum(SIZES[f] for f in self.fields)), np.float32)

    def negative(self, raw: np.ndarray, entries: dict[str, Any]) -> np.ndarray:
        """The negative sizes; a batch with sizes has all of them."""
        return self.prepare(entries)

    def __call__(self, params, raw, **_) -> Conditioning:
        return Conditioning(vector=concat_timestep_embedding(raw, self.dim))


@dataclasses.dataclass(frozen=True)
class ArrayEmbedder:
    """The caller's array, or tokens or a map through a network → `output`.

    `shape` is that of one example, with None for sides of any length. A map may also be given as
    integers without a channel axis, the class of each pixel: it becomes one-hot on the device.
    """

    name: str
    network: nn.Module | None
    shape: tuple[int | None, ...]
    output: str
    dropout: float
    cut = _uncut

    @property
    def guided(self) -> bool:
        """Whether training dropped it, so that the model knows predictions without it."""
        return self.dropout > 0.0

    def negative(self, raw: np.ndarray, entries: dict[str, Any]) -> np.ndarray:
        """Zeros, or, if training never dropped it, the same."""
        return np.zeros_like(raw) if self.guided else raw

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def dtype(self) -> type:
        """Tokens and labels are integers."""
        whole = isinstance(self.network, TextTransformer) or not self.shape
        return np.int32 if whole else np.float32

    def prepare(self, batch: dict[str, Any]) -> np.ndarray:
        """batch[name]; raises ValueError for another shape."""
        array = np.asarray(batch[self.name])
        classes = array.ndim == len(self.shape) and np.issubdtype(array.dtype, np.integer)
        if classes and self.output == "concat":
            if not self.dropout:
                return array.astype(np.int32)
            array = np.eye(self.shape[-1], dtype=np.float32)[array]
        array = array.astype(self.dtype)
        given, expected = array.shape[1:], self.shape
        fits = len(given) == len(expected) and all(
            side in (None, size) for side, size in zip(expected, given, strict=True)
        )
        if not fits:
            raise ValueError(f"condition {self.name!r} of shape {given}: expected {expected}")
        return array

    def null(self, count: int) -> np.ndarray:
        """Zeros; a side of any length is as short as the network allows."""
        side = getattr(self.network, "factor", 1)
        return np.zeros((count, *(n or side for n in self.shape)), self.dtype)

    def __call__(self, params, raw, **dropout) -> Conditioning:
        if self.output == "concat" and raw.ndim == len(self.shape):
            raw = jax.nn.one_hot(raw, self.shape[-1])
        if self.network is not None:
            dropout = dropout if isinstance(self.network, TextTransformer) else {}
            raw = self.network.apply({"params": params}, raw, **dropout)
        return Conditioning(**{self.output: raw})


@dataclasses.dataclass(frozen=True)
class MaskedImageEmbedder:
    """A mask, 1 where to draw, and the latents of the picture without that part → concat.

    The latents are those of `autoencoder`, with whose parameters it is called. `hole` is the value
    of masked pixels, in [−1, 1]; the mask is scaled to `mask_range`. Stable Diffusion puts the mask
    first; LDM puts it last, with −1 for "keep" and for the hole.
    """

    name: str
    autoencoder: Autoencoder
    mask_first: bool
    hole: float
    mask_range: tuple[float, float]
    dropout: float
    network = None
    needs = ("mask", "image")
    guided = False
    negative, cut = _same, _uncut

    @property
    def parameters(self) -> str:
        """The network whose parameters `__call__` takes."""
        return "autoencoder"

    def prepare(self, batch: dict[str, Any]) -> np.ndarray:
        """float32 (B, H, W, 1 + C): batch["mask"] in [0, 1], cut at ½, and batch["image"], uint8 or
        float in [0, 1], scaled to [−1, 1], with the hole in it."""
        mask, image = np.asarray(batch["mask"]), to_signed(np.asarray(batch["image"]))
        mask = np.float32(mask > 0.5)
        masked = np.where(mask > 0.0, self.hole, image)
        return np.concatenate([mask, masked], axis=-1, dtype=np.float32)

    def null(self, count: int) -> np.ndarray:
        """A mask of 1, one latent wide."""
        side, channels = self.autoencoder.downsampling, self.autoencoder.in_channels
        mask = np.ones((count, side, side, 1), np.float32)
        image = np.full((count, side, side, channels), self.hole, np.float32)
        return np.concatenate([mask, image], axis=-1)

    def __call__(self, params, raw, **_) -> Conditioning:
        mask, image = raw[..., :1], raw[..., 1:]
        latents = self.autoencoder.apply({"params": params}, image, method="encode")
        factor = image.shape[1] // latents.shape[1]
        low, high = self.mask_range
        cells = low + (high - low) * mask[:, ::factor, ::factor]
        parts = (cells, latents) if self.mask_first else (latents, cells)
        return Conditioning(concat=jnp.concatenate(parts, axis=-1))


def _text(name: str, section: dict[str, Any], dtype: Any, _: Autoencoder) -> TextEmbedder:
    network = dict(section["network"])
    tokenizer = make_tokenizer(section, network["max_length"])
    network = TextTransformer(vocab_size=tokenizer.size, dtype=dtype, **network, **added(section))
    return TextEmbedder(name, network, tokenizer, section["dropout"])


def _clip(name: str, section: dict[str, Any], dtype: Any, _: Autoencoder) -> ClipEmbedder:
    network = CLIPText(**section["network"], **added(section), dtype=dtype)
    tokenizer = make_tokenizer(section, network.max_length)
    options = {k: section[k] for k in ("context", "pooled", "zero_null") if k in section}
    return ClipEmbedder(name, network, tokenizer, section["dropout"], **options)


def _class(name: str, section: dict[str, Any], dtype: Any, _: Autoencoder) -> LabelEmbedder:
    network = ClassEmbedder(**section["network"], dtype=dtype)
    options = {k: section[k] for k in ("output", "zero_null") if k in section}
    return LabelEmbedder(name, network, section.get("null"), section["dropout"], **options)


def _sizes(name: str, section: dict[str, Any], dtype: Any, _: Autoencoder) -> SizeEmbedder:
    unknown = [field for field in section["fields"] if field not in SIZES]
    if unknown:
        raise ValueError(
            f"conditioning.{name}.fields: {unknown[0]!r} is none of {', '.join(SIZES)}"
        )
    options = {k: section[k] for k in ("dim",) if k in section}
    return SizeEmbedder(name, tuple(section["fields"]), section["dropout"], **options)


def _array(name: str, section: dict[str, Any], dtype: Any, _: Autoencoder) -> ArrayEmbedder:
    network = None
    if section.get("network"):
        fields = dict(section["network"])
        kinds = dict(rescaler=SpatialRescaler, transformer=TextTransformer, patches=Patches)
        network = kinds[fields.pop("kind")](**fields, dtype=dtype)
    return ArrayEmbedder(
        name, network, tuple(section["shape"]), section["output"], section["dropout"]
    )


def _masked_image(
    name: str, section: dict[str, Any], dtype: Any, autoencoder: Autoencoder
) -> MaskedImageEmbedder:
    fields = {key: section[key] for key in ("mask_first", "hole", "dropout")}
    return MaskedImageEmbedder(name, autoencoder, mask_range=tuple(section["mask_range"]), **fields)


EMBEDDERS = {
    "text": _text,
    "clip": _clip,
    "class": _class,
    "sizes": _sizes,
    "array": _array,
    "masked_image": _masked_image,
    "control": control,
    "t2i": t2i,
    "ip_adapter": ip_adapter,
}


def make_embedders(
    config: dict[str, Any], dtype: Any = None, autoencoder: Autoencoder | None = None
) -> tuple[Embedder, ...]:
    """An embedder for every section of `config.conditioning`, chosen by its `kind`.

    The networks compute in `dtype`; `autoencoder` is the model's own, which encodes masked
    pictures.
    """
    for name, section in config.items():
        if section["kind"] not in EMBEDDERS:
            raise ValueError(
                f"conditioning.{name}.kind={section['kind']!r}: choose one of "
                f"{', '.join(EMBEDDERS)}"
            )
    return tuple(
        EMBEDDERS[section["kind"]](name, section, dtype, autoencoder)
        for name, section in config.items()
    )
