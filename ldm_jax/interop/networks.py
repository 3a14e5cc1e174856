"""The networks of a config."""

from typing import Any

from ldm_jax.conditions.tokenizer import make_tokenizer


def texts(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The sections of a config's text encoders."""
    sections = config.get("conditioning", {})
    return {name: s for name, s in sections.items() if s["kind"] in ("clip", "text")}


def networks(config: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name of each network of a config → (network, fields), as `slots` takes them."""
    found = {name: (name, config[name]) for name in ("unet", "autoencoder") if name in config}
    for name, section in config.get("conditioning", {}).items():
        fields = dict(section.get("network") or {})
        kind = fields.pop("kind", section["kind"])
        if not fields:
            continue
        if kind in ("text", "transformer"):
            kind = "bert"
            if "vocab_size" not in fields:
                fields["vocab_size"] = make_tokenizer(section, fields.get("max_length", 77)).size
        elif kind in ("rescaler", "patches"):
            fields["in_channels"] = section["shape"][-1]
        found[name] = kind, fields
    return found
