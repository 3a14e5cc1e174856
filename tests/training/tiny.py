"""Both stages at a width that compiles in seconds, on pictures of 16 pixels."""

from typing import Any

from tests.conftest import ROOT
from tests.models.published import config_file


def config(stage: str, steps: int = 20) -> Any:
    """The config of "diffusion" (of pixels, with text) or "autoencoder"."""
    name = {"diffusion": "txt2img", "autoencoder": "autoencoder"}[stage]
    config = config_file(ROOT / "configs" / f"{name}.py").get_config("smoke")
    config.data.image_size = 16
    config.train.update(steps=steps, log_every=1, checkpoint_every=10, preview_every=steps)
    config.optimizer.update(name="adamw", lr=1e-3)  # Muon takes long to compile
    if stage == "diffusion":
        config.autoencoder = dict(kind="identity")
        config.unet.update(in_channels=3, out_channels=3, model_channels=16, groups=4)
        config.unet.update(num_head_channels=8, context_dim=16)
        config.conditioning.text.network.update(width=16, depth=1, heads=2)
        config.sampling.update(steps=1)
    else:
        # As the originals are, with GroupNorm over the whole picture and attention.
        config.autoencoder.update(local=False, encoder_ch=0, mid_attn=True, patch_size=1)
        config.autoencoder.update(ch=8, ch_mult=(1, 1), groups=4, z_channels=4, embed_dim=4)
        config.loss.disc_start = steps // 2
    return config
