"""Ours beside a peer on a CPU: the same inputs and work, by turns.

    python -m venv .venv-peer
    .venv-peer/bin/pip install torch==2.13.0 diffusers==0.42.1 transformers==5.23.0
    python -m benchmarks.peers --peer=diffusers --python=.venv-peer/bin/python [--repeats=3]

    python -m venv .venv-dew
    .venv-dew/bin/pip install dewml          # Python 3.12 or newer
    python -m benchmarks.peers --peer=dew --python=.venv-dew/bin/python [--work=109m:forward]

Each side in its turn does the work `--repeats` times, after a time that does not count, in two
rounds. Printed are, of each work, medians of the time on the clock, the ratio of the peer's to ours
(more than 1: ours is faster), seconds until the first result, which includes compiling, the most
memory of the process while it works, and how far apart the first results are, as a part of the
largest number. diffusers opens our random weights, in its own layout; Dew draws its own, so that
its results are others. A training step is the mean squared error, its gradient, AdamW and an
average of the parameters.
"""

import argparse

from benchmarks.peers.turns import System, compare

SYSTEMS = {
    "109m": System(
        name="sd1",
        latents=(8, 32, 32, 4),
        steps=25,
        works={
            "forward": (8, "images"),
            "step": (8, "images"),
            "sample": (25, "steps"),
            "encode": (1, "images"),
            "decode": (1, "images"),
        },
        fields=dict(model_channels=128, channel_mult=(1, 2, 4), attention_resolutions=(1, 2, 4)),
    ),
    "sd15": System(
        name="sd1",
        latents=(2, 64, 64, 4),
        steps=25,
        works={"forward": (2, "images"), "forward_bfloat16": (2, "images")},
    ),
}
OF_DEW = ["109m:forward", "109m:step"]


def main() -> None:
    names = [f"{name}:{work}" for name, system in SYSTEMS.items() for work in system.works]
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", choices=["diffusers", "dew"], default="diffusers")
    parser.add_argument("--python", required=True, help="of the peer's environment")
    parser.add_argument("--work", action="append", choices=names)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    chosen = asked.work or (OF_DEW if asked.peer == "dew" else names)
    compare(SYSTEMS, chosen, asked.peer, asked.python, asked.repeats)


if __name__ == "__main__":
    main()
