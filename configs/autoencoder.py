"""Stage 1: the KL autoencoder whose latents all other configs use.

    python train.py --config=configs/autoencoder.py --workdir=runs/autoencoder
    python evaluate.py --model=runs/autoencoder

Variants, as in --config=configs/autoencoder.py:smoke

    scenes  scenes and emoji in turn, 64 px → 8×8×16 latents (default; 45 minutes on two CPU cores)
    emoji   1,697 training emoji alone
    decoder the decoder alone, from --config.init_from=runs/autoencoder, on noisy latents, so that
            it forgives the errors of drawn ones. Latents stay bit for bit as they are, and models
            trained on them can go on
    vq      a codebook of 1,024 entries in place of KL, 64 px → 16×16×4 latents
    smoke   a few steps of a tiny network, for tests

L1 + KL, and from `loss.disc_start` on the discriminator (by default, never). The perceptual term
needs a file of VGG-16 and LPIPS weights: `python -m scripts.build_lpips lpips.safetensors` makes
one, and --config.loss.lpips=lpips.safetensors uses it.
"""

import ml_collections

from configs import common


def scenes() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict(dict(task="autoencoder") | common.start())
    config.data = common.data(source="scenes+emoji", augment=("flip", "shift", "zoom"))
    config.autoencoder = dict(
        kind="kl",
        ch=144,
        ch_mult=(1,),
        num_res_blocks=2,
        patch_size=8,
        local=True,
        encoder_ch=256,
        mid_attn=False,
        resolution=64,
        z_channels=16,
        embed_dim=16,
    )
    config.discriminator = dict(ndf=32, n_layers=2)
    config.loss = dict(
        kl_weight=5e-3,
        codebook_weight=1.0,  # of kind "vq"
        revival_weight=0.0,  # the same; draws unused entries of the codebook towards latents
        logvar_init=-6.0,
        latent_noise=0.0,  # what the decoder reads, in standard deviations of the latents
        lpips="",
        perceptual_weight=1.0,
        disc_start=7500,  # never
        disc_weight=0.1,
        disc_loss="hinge",  # or vanilla
    )
    config.optimizer = common.optimizer(
        name="muon", lr=3e-3, schedule="cosine", warmup=100, b2=0.99, weight_decay=0.0
    )
    config.train = common.train(steps=7500, batch_size=16, preview_every=1000)
    return config


def emoji() -> ml_collections.ConfigDict:
    config = scenes()
    config.data.source = "emoji"
    return config


def decoder() -> ml_collections.ConfigDict:
    config = scenes()
    config.trainable = ("^autoencoder/(decoder|post_quant_conv|conv_out)/", "^discriminator/")
    config.loss.latent_noise = 0.2
    config.optimizer.lr = 1e-3
    config.train.steps = 3000
    return config


def vq() -> ml_collections.ConfigDict:
    config = scenes()
    config.autoencoder.update(kind="vq", n_embed=1024, z_channels=4, embed_dim=4)
    config.autoencoder.update(patch_size=4, ch=64, encoder_ch=128)
    config.loss.revival_weight = 0.1
    config.train.steps = 2500
    return config


def smoke() -> ml_collections.ConfigDict:
    config = emoji()
    config.data.update(classes=("food & drink",), augment=())
    config.autoencoder.update(ch=8, encoder_ch=16)
    config.discriminator.ndf = 8
    config.loss.disc_start = 4
    config.optimizer.update(name="adamw", lr=1.5e-3)  # Muon takes long to compile
    config.train.update(steps=8, batch_size=8, log_every=2, checkpoint_every=4, preview_every=8)
    return config


VARIANTS = {"scenes": scenes, "emoji": emoji, "decoder": decoder, "vq": vq, "smoke": smoke}
get_config = common.chooser("autoencoder", VARIANTS)
