"""Makes modules from the sections of a config."""

from typing import Any

from ldm_jax.models.autoencoder import AutoencoderKL, Identity
from ldm_jax.models.tiny_autoencoder import TinyAutoencoder
from ldm_jax.models.vq import VQModel

Autoencoder = AutoencoderKL | VQModel | TinyAutoencoder | Identity
AUTOENCODERS = {
    "kl": AutoencoderKL,
    "vq": VQModel,
    "tiny": TinyAutoencoder,
    "identity": Identity,
}


def tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields with JSON's lists as the tuples that make a module hashable."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def make_autoencoder(section: dict[str, Any], dtype: Any = None, **options: Any) -> Autoencoder:
    """The autoencoder of a config's section `autoencoder`: its `kind` (default "kl"), its fields.

    It computes in `dtype`; None: the type of its inputs. `options` are further fields.

    Raises:
      ValueError: an unknown kind.
    """
    fields = dict(section)
    kind = fields.pop("kind", "kl")
    if kind not in AUTOENCODERS:
        raise ValueError(f"autoencoder.kind={kind!r}: choose one of {', '.join(AUTOENCODERS)}")
    return AUTOENCODERS[kind](**tuples(fields), dtype=dtype, **options)
