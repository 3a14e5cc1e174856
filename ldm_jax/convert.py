"""Converts a model from any supported layout to another:

    python -m ldm_jax.convert IN OUT --to=diffusers

IN is any path that `ldm_jax.load` opens; the layouts are "single_file" (ours, with its config),
"compvis" (one file, as of CompVis' and Stability's code) and "diffusers" (a folder).
"""

from typing import Any

import jax
from absl import flags

from ldm_jax.interop.opening import DTYPES, LAYOUTS, export, read_any
from ldm_jax.runtime.console import run

TO = flags.DEFINE_enum("to", "single_file", list(LAYOUTS), "Layout of OUT.")
DTYPE = flags.DEFINE_enum("dtype", "float32", DTYPES, "Type in OUT.")
EMA = flags.DEFINE_enum(
    "ema",
    "auto",
    ["auto", "true", "false"],
    "Averaged weights, where IN has both; auto: only if the trained ones are incomplete.",
)
YAML = flags.DEFINE_string("yaml", "", "The training YAML of IN, for CompVis' or Stability's code.")
AUTOENCODER = flags.DEFINE_string("autoencoder", "", "A model whose autoencoder replaces IN's.")
TEXT = flags.DEFINE_string("text", "", "A model whose text encoders replace IN's.")
NEW_ATTENTION_ORDER = flags.DEFINE_bool(
    "new_attention_order", False, "Whether IN was trained with use_new_attention_order."
)


def convert(
    source: str,
    target: str,
    layout: str,
    dtype: str = "float32",
    ema: bool | str = "auto",
    **options: Any,
) -> None:
    """Reads a model with `options` of `read_any`, prints its networks and odd keys, and writes it.

    Raises:
      FileNotFoundError, FileExistsError, ValueError: see `read_any` and `export`; keys that are
        missing or misshapen. Nothing is written then.
    """
    found = read_any(source, dtype, ema, **options)
    print(f"{source}: {found.about}")
    for network, params in ((name, part) for name, part in found.params.items() if part):
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        print(f"{network}: {count:,} parameters in {len(jax.tree.leaves(params))} tensors")
    wrong = 0
    for network, report in found.reports.items():
        for odd in ("missing", "misshapen", "extra"):
            for key in getattr(report, odd):
                print(f"{network}: {odd} {key}")
        wrong += len(report.missing) + len(report.misshapen)
    if wrong:
        raise ValueError(f"{source}: {wrong} keys are missing or misshapen; nothing is written")
    export(target, found.config, found.params, dtype, layout)
    print(f"Written: {target} ({layout}, {dtype})")


def main(source: str, target: str):
    ema = {"true": True, "false": False}.get(EMA.value, "auto")
    options = dict(config=YAML.value, autoencoder=AUTOENCODER.value, text=TEXT.value)
    options["new_attention_order"] = NEW_ATTENTION_ORDER.value
    convert(source, target, TO.value, DTYPE.value, ema, **options)


if __name__ == "__main__":
    run(main, ("IN", "OUT"))
