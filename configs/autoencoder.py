"""Stage 1: the KL autoencoder whose latents all other configs use.

    python train.py --config=configs/autoencoder.py --workdir=runs/autoencoder
    python evaluate.py --model=runs/autoencoder

Variants, as in --config=configs/autoencoder.py:smoke

    emoji   1,697 training emoji, 64 px → 8×8×16 latents (default; two hours on two CPU cores)
    scenes  scenes and emoji in turn, from an autoencoder of emoji (50 minutes):
            --config.init_from=runs/autoencoder
    decoder the same, of the decoder alone (27 minutes): latents stay bit for bit as they are, and
            models trained on them can go on
    vq      the same with a codebook of 1,024 entries in place of KL, not tuned
    smoke   a few steps of a tiny network, for tests

L1 + KL, and from `loss.disc_start` on the discriminator (`scenes` and `decoder` end before). The
perceptual term needs a file of VGG-16 and LPIPS weights: `python -m scripts.build_lpips
lpips.safetensors` makes one, and --config.loss.lpips=lpips.safetensors uses it.
"""

import ml_collections

from configs import common


def emoji() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict(dict(task="autoencoder") | common.start())
    config.data = common.data(augment=("flip", "shift", "zoom"))
    config.autoencoder = dict(
        kind="kl",
        ch=60,
        ch_mult=(1, 2),
        num_res_blocks=2,
        patch_size=4,
        resolution=64,
        z_channels=16,
        embed_dim=16,
        groups=12,
    )
    config.discriminator = dict(ndf=32, n_layers=2)
    config.loss = dict(
        kl_weight=1e-6,
        codebook_weight=1.0,  # of kind "vq"
        logvar_init=-6.0,
        lpips="",
        perceptual_weight=1.0,
        disc_start=40000,
        disc_weight=0.1,
        disc_loss="hinge",  # or vanilla
    )
    config.optimizer = common.optimizer(
        lr=1.5e-3, schedule="cosine", lr_end=0.02, warmup=200, b2=0.99, weight_decay=0.0
    )
    config.train = common.train(steps=44000, batch_size=8, preview_every=1000)
    return config


def scenes() -> ml_collections.ConfigDict:
    config = emoji()
    config.data.update(source="scenes+emoji", augment=())
    config.loss.disc_start = 12000  # never
    config.optimizer.update(lr=1e-3, warmup=50)
    config.train.update(steps=12000)
    return config


def decoder() -> ml_collections.ConfigDict:
    config = scenes()
    config.trainable = ("^autoencoder/(decoder|post_quant_conv|conv_out)/", "^discriminator/")
    config.loss.disc_start = 9000  # never
    config.train.steps = 9000
    return config


def vq() -> ml_collections.ConfigDict:
    config = emoji()
    config.autoencoder.update(kind="vq", n_embed=1024, z_channels=8, embed_dim=8)
    return config


def smoke() -> ml_collections.ConfigDict:
    config = emoji()
    config.data.classes = ("food & drink",)
    config.autoencoder.update(ch=8, ch_mult=(1, 1, 2), num_res_blocks=1, patch_size=2, groups=8)
    config.discriminator.ndf = 8
    config.loss.disc_start = 4
    config.train.update(steps=8, batch_size=8, log_every=2, checkpoint_every=4, preview_every=8)
    return config


VARIANTS = {"emoji": emoji, "scenes": scenes, "decoder": decoder, "vq": vq, "smoke": smoke}
get_config = common.chooser("autoencoder", VARIANTS, "emoji")
