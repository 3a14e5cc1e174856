"""Writes the tables of docs/ that are made from code: python -m scripts.write_docs."""

import re
from pathlib import Path

from ldm_jax.diffusion.plan import Guidance, Sampling, flags

SAMPLERS = Path(__file__).parents[1] / "docs" / "samplers.md"


def options_table() -> str:
    """The fields of `Sampling` and `Guidance`: flag, field, what it does."""
    rows = ["| flag | field | does |", "|---|---|---|"]
    for cls in (Sampling, Guidance):
        for flag, field in flags(cls).items():
            about = field.metadata
            name = f"`{cls.__name__}.{field.name}`"
            rows.append(f"| `--{flag}={about['example']}` | {name} | {about['help']} |")
    return "\n".join(rows)


def with_options(text: str) -> str:
    """The text of docs/samplers.md with the current table of options."""
    pattern = r"(<!-- options -->\n).*?(<!-- /options -->)"
    return re.sub(pattern, lambda m: f"{m[1]}{options_table()}\n{m[2]}", text, flags=re.DOTALL)


if __name__ == "__main__":
    SAMPLERS.write_text(with_options(SAMPLERS.read_text(encoding="utf-8")), encoding="utf-8")
