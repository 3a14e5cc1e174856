"""The study of compression: a latent diffusion model on each of six first stages.

    python -m ldm_jax.sweep --config=configs/compression.py --workdir=runs/compression

Rombach et al. 2022, §4.1, compare downsampling factors from 1 (pixels) to 32; docs/compression.md
says what came out of it here. The autoencoders train on the same number of pictures. Then on each a
UNet of about a million parameters trains for the same processor time, in which a UNet of pixels
sees an eleventh of the pictures that one of 8×8 latents sees. At the end `results.md` has a table
of the runs, and `compression.md`, `training.png` and `steps.png` have the comparison. The same
command goes on where it was stopped.

Variants

    f1, f2, f4, f8, f16, f32                  a diffusion model alone, on --config.first_stage
    f2-autoencoder … f32-autoencoder          its first stage
    f8-vector                                 f8, with the class added to the embedding of the time
    study                                     f8; its sweep is of all (default)
    smoke, smoke-f8, smoke-f8-autoencoder, …  the same with a few steps of tiny networks, for tests
"""

from functools import partial
from pathlib import Path

import ml_collections

from configs import autoencoder as first_stage
from configs import class2img, common
from ldm_jax.training.sweeps import Earlier

SECONDS = 480  # of a processor, for the training of each diffusion model
# By factor, the most telling first. `step`: seconds of a processor for a step of 32 pictures,
# measured on an AMD EPYC (Zen 4). All have 64 channels at the lowest resolution, where attention
# is, and 1.0 to 1.2 million parameters. `evaluations`: during training.
UNETS = {
    8: dict(model_channels=32, channel_mult=(1, 2), step=0.079, evaluations=12),
    1: dict(model_channels=16, channel_mult=(1, 2, 2, 2, 4), step=0.886, evaluations=4),
    4: dict(model_channels=32, channel_mult=(1, 1, 2), step=0.136, evaluations=12),
    16: dict(model_channels=64, channel_mult=(1,), step=0.057, evaluations=12),
    32: dict(model_channels=64, channel_mult=(1,), step=0.064, evaluations=12),
    2: dict(model_channels=32, channel_mult=(1, 1, 1, 2), step=0.371, evaluations=6),
}
# Patches of at most 8 pixels, then levels of half the sides.
AUTOENCODERS = {
    2: dict(patch_size=2, ch=16, ch_mult=(1,)),
    4: dict(patch_size=4, ch=32, ch_mult=(1,)),
    8: dict(patch_size=8, ch=64, ch_mult=(1,)),
    16: dict(patch_size=8, ch=64, ch_mult=(1, 2)),
    32: dict(patch_size=8, ch=64, ch_mult=(1, 2, 2)),
}


def scenes() -> dict:
    """One object of ten kinds on one of three grounds."""
    grounds = ("white", "beige", "light blue")
    few = dict(kinds=10, objects=(1, 1), grounds=grounds, train_scenes=8192, held_out_scenes=128)
    return common.scenes(**common.COMPOSED | few)


def channels(factor: int) -> int:
    """Of the latents: 2f, so that twice the factor gives half the numbers; 3 of pixels."""
    return 3 if factor == 1 else 2 * factor


def autoencoder(factor: int) -> ml_collections.ConfigDict:
    config, fields = first_stage.scenes(), AUTOENCODERS[factor]
    config.data = common.data(source="scenes", scenes=scenes())
    width = dict(z_channels=channels(factor), embed_dim=channels(factor))
    config.autoencoder.update(fields, encoder_ch=2 * fields["ch"], **width)
    # Little, as the paper's 1e-6: a short training with much makes smears of objects.
    config.loss.update(kl_weight=1e-4, disc_start=1000)  # the latter: never
    config.train.update(steps=1000, log_every=100, checkpoint_every=500, preview_every=0)
    config.evaluators.reconstruction.every = 250
    return config


def diffusion(factor: int) -> ml_collections.ConfigDict:
    # Without guidance, as in figures 6 and 7 of the paper.
    sampling = dict(labels=(), guidance=1.0, steps=20)
    config = common.scenes_diffusion(class2img.label(), sampling, context_dim=64)
    fields, width = dict(UNETS[factor]), channels(factor)
    evaluations = fields.pop("evaluations")
    steps = 10 * round(SECONDS / fields.pop("step") / 10)
    config.data.scenes = scenes()
    if factor == 1:
        config.autoencoder = dict(kind="identity", in_channels=3, scale_factor=1.0)
    lowest = 2 ** (len(fields["channel_mult"]) - 1)
    config.unet.update(fields, in_channels=width, out_channels=width)
    config.unet.update(attention_resolutions=(lowest,), groups=8)
    config.conditioning.label.network.embed_dim = 64
    config.optimizer.update(name="adamw", lr=2e-3, warmup=20)
    every = -(-steps // evaluations)
    config.train.update(steps=steps, batch_size=32, ema_decay=0.99, preview_every=0)
    config.train.update(checkpoint_every=every, log_every=max(steps // 20, 1))
    config.evaluators.validation_loss.update(every=every, count=64)
    config.evaluators.distance.update(every=every, count=128)
    return config


def vector() -> ml_collections.ConfigDict:
    """f8 without cross-attention: its class is a vector, added to the embedding of the time."""
    config = diffusion(8)
    config.conditioning.label.output = "vector"
    config.unet.update(context_dim=None, use_spatial_transformer=True)
    config.unet.update(num_classes="sequential", adm_in_channels=64)
    return config


def smoke(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A few steps of a tiny network."""
    config.data.scenes.update(train_scenes=32, held_out_scenes=32)
    config.train.update(steps=4, batch_size=8, log_every=2, checkpoint_every=4)
    config.optimizer.update(name="adamw", lr=1e-3)  # Muon takes long to compile
    if config.task == "autoencoder":
        config.autoencoder.update(ch=8, encoder_ch=8)
        config.discriminator.ndf = 8
        config.evaluators.reconstruction.every = -1
        return config
    config.unet.update(model_channels=8, channel_mult=(1, 1), num_head_channels=8)
    config.unet.attention_resolutions = (2,)
    config.evaluators.validation_loss.every = 2
    config.evaluators.distance.update(every=4, count=8)
    config.sampling.steps = config.evaluators.distance.steps = 2
    return config


VARIANTS = {"study": partial(diffusion, 8)}
VARIANTS |= {f"f{factor}": partial(diffusion, factor) for factor in UNETS}
VARIANTS |= {f"f{factor}-autoencoder": partial(autoencoder, factor) for factor in AUTOENCODERS}
VARIANTS["f8-vector"] = vector
VARIANTS |= {f"smoke-{name}": lambda make=make: smoke(make()) for name, make in VARIANTS.items()}
VARIANTS["smoke"] = VARIANTS["smoke-study"]
get_config = common.chooser("compression", VARIANTS, "study")


def sweep(variant: str) -> list[dict]:
    """Each first stage and then its diffusion model; of "smoke" the small ones, f8 and f1."""
    prefix, factors = ("smoke-", (8, 1)) if variant == "smoke" else ("", UNETS)
    settings = []
    for factor in factors:
        first, second = f"{prefix}f{factor}-autoencoder", {"variant": f"{prefix}f{factor}"}
        if factor in AUTOENCODERS:
            settings.append({"variant": first})
            second["first_stage"] = Earlier(first)
        settings.append(second)
    if variant != "smoke":
        settings.append({"variant": "f8-vector", "first_stage": Earlier("f8-autoencoder")})
    return settings


def after(root: Path, variant: str) -> None:
    """The comparison; its pictures are measured once."""
    from benchmarks.compression import compare

    compare(root, steps=(2,) if variant == "smoke" else None)
