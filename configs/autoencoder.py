"""Stage 1: a KL autoencoder.

    python train.py --config=configs/autoencoder.py --workdir=runs/autoencoder
"""

import ml_collections


def get_config(variant: str = "emoji") -> ml_collections.ConfigDict:
    """See the module's docstring."""
    config = ml_collections.ConfigDict()
    config.task = "autoencoder"
    config.seed = 0
    config.data = dict(
        source="emoji",
        path="",
        image_size=64,
        background=(255, 255, 255),
        held_out=0.1,
        min_size=0,
        on_error="skip",
        augment=("flip", "shift", "zoom", "color"),
    )
    config.autoencoder = dict(
        ch=32,
        ch_mult=(1, 2, 4),
        num_res_blocks=1,
        patch_size=2,
        resolution=64,
        z_channels=16,
        embed_dim=16,
        groups=8,
    )
    config.discriminator = dict(ndf=32, n_layers=2)
    config.loss = dict(
        kl_weight=1e-6, lpips="", perceptual_weight=1.0, disc_start=6000, disc_weight=0.5
    )
    config.optimizer = dict(
        lr=1e-3, schedule="cosine", lr_end=0.02, warmup=200, b1=0.5, b2=0.9, weight_decay=0.0,
        clip=0.0, multipliers=(),
    )
    config.train = dict(
        steps=8000, batch_size=16, ema_decay=0.999, log_every=50, checkpoint_every=500,
        preview_every=500, keep=2,
    )
    config.mesh = dict(data=-1, fsdp=1)
    return config
