"""Fine-tuning of a latent diffusion model on a folder of pictures with captions.

    python train.py --config=configs/finetune.py --workdir=runs/mine \\
        --config.init_from=stable-diffusion-v1-5/ --config.data.path=DIR
    python sample.py --model=runs/mine --prompt="..."
    python -m ldm_jax.convert runs/mine mine/ --to=diffusers

`init_from` is any path that `ldm_jax.load` opens: a diffusers folder, a .ckpt, a .safetensors, a
workdir. Networks, conditions, noise and size are the model's own; its UNet trains, its text
encoders and its autoencoder do not. To train other parts,

    --config.trainable='("^unet/", "^text/")'      the UNet and the text encoder
    --config.trainable='("/attn2/",)'              only cross-attention

Stable Diffusion 1 at 512 pixels needs 14 GB for parameters, average, gradients and moments, and
more memory for the activations of a step. On a TPU or a GPU with bfloat16, these need less:

    --config.precision=bfloat16               activations by a third; parameters stay float32
    --config.train.remat=blocks               recomputes them, for about a quarter more arithmetic
    --config.train.accumulate=4               a batch in four parts, with the same gradients
    --config.optimizer.moments=bfloat16       1.7 GB less
"""

import ml_collections

from configs import common


def get_config() -> ml_collections.ConfigDict:
    config = common.from_model(held_out=0.05)
    config.trainable = ("^unet/",)
    config.optimizer = common.optimizer(lr=1e-5, warmup=100, clip=1.0)
    config.train = common.train(
        steps=2000, batch_size=4, ema_decay=0.999, log_every=20, checkpoint_every=500
    )
    config.train.preview_every = 500
    return config
