"""Stable Diffusion on one GPU, beside diffusers with torch.compile.

    python -m pip install -U "jax[cuda13]"
    python -m venv .venv-peer
    .venv-peer/bin/pip install torch==2.13.0 diffusers==0.42.1 transformers==5.23.0
    python -m benchmarks.gpu --python=.venv-peer/bin/python [--work=sd15:sample_bfloat16]

Drawing is a batch of one in bfloat16: Stable Diffusion 1.5 in 50 steps, XL in 20 steps at 1024
pixels, both with guidance. Training is the UNet of MLPerf's Stable Diffusion 2, on latents and text
states: bfloat16 with float32 parameters, AdamW and an average. The sides take turns as whole
processes; memory is the GPU's, the most since a process began. `python -m benchmarks.peers` says
what the columns are. With `--small` the networks are narrow, the latents are 16 × 16, and any
machine runs it in minutes: that shows that both sides work, and no speed.
"""

import argparse

from benchmarks.peers.turns import System, compare

SYSTEMS = {
    "sd15": System("sd1", (1, 64, 64, 4), 50, {"sample_bfloat16": (50, "steps")}),
    "sdxl": System("sdxl-base", (1, 128, 128, 4), 20, {"sample_bfloat16": (1, "images")}),
    "sd2": System("mlperf_sd2", (32, 64, 64, 4), 50, {"step_bfloat16": (32, "images")}),
}


def _small(system: System) -> System:
    return system._replace(
        latents=(system.latents[0], 16, 16, 4),
        steps=2,
        works={work: (1, "calls") for work in system.works},
        fields=dict(model_channels=64, num_res_blocks=1),
        autoencoder=dict(ch=32),
    )


def main() -> None:
    names = [f"{name}:{work}" for name, system in SYSTEMS.items() for work in system.works]
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", required=True, help="of the peer's environment")
    parser.add_argument("--work", action="append", choices=names)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32, help="of training")
    parser.add_argument("--small", action="store_true")
    asked = parser.parse_args()
    train = SYSTEMS["sd2"]._replace(
        latents=(asked.batch, *SYSTEMS["sd2"].latents[1:]),
        works={"step_bfloat16": (asked.batch, "images")},
    )
    systems = SYSTEMS | {"sd2": train}
    if asked.small:
        systems = {name: _small(system) for name, system in systems.items()}
    compare(systems, asked.work or names, "diffusers", asked.python, asked.repeats, together=False)


if __name__ == "__main__":
    main()
