"""Published first stages, one row each."""

from dataclasses import dataclass, replace
from typing import Any

Section = dict[str, Any]

LDM, SD = "CompVis/latent-diffusion: ", "CompVis/stable-diffusion: configs/stable-diffusion/"
RUNWAY = "runwayml/stable-diffusion: configs/stable-diffusion/"
SD2 = "Stability-AI/stablediffusion: configs/stable-diffusion/"
SGM = "Stability-AI/generative-models: configs/"


@dataclass(frozen=True)
class Autoencoder:
    """A first stage.

    Attributes:
      fields: section `autoencoder`.
      parameters: their number.
      source: repository, and configuration in it.
    """

    fields: Section
    parameters: int
    source: str

    @property
    def scale(self) -> float:
        """The `scale_factor` of its latents."""
        return self.fields.get("scale_factor", 1.0)

    def but(self, **fields: Any) -> "Autoencoder":
        """This first stage with other fields, which change no parameter."""
        return replace(self, fields=self.fields | fields)


# Without a `kind` they are "kl".
F4, F8, F8_VQ = (1, 2, 4), (1, 2, 4, 4), (1, 2, 2, 4)
F16, F32 = (1, 1, 2, 2, 4), (1, 1, 2, 2, 4, 4)


def kl(channels: int, mult: tuple, *attention: int, **fields: Any) -> Section:
    common = dict(ch=128, num_res_blocks=2, attn_resolutions=attention, resolution=256)
    return common | dict(ch_mult=mult, z_channels=channels, embed_dim=channels) | fields


def vq(channels: int, mult: tuple, n_embed: int, *attention: int, **fields: Any) -> Section:
    return kl(channels, mult, *attention, kind="vq", n_embed=n_embed, **fields)


STAGES, EXAMPLES = LDM + "models/first_stage_models/", SGM + "example_training/autoencoder/kl-f4/"
# fmt: off
AUTOENCODERS = {
    "kl-f4": Autoencoder(kl(3, F4), 55_312_063, STAGES + "kl-f4"),
    "kl-f8": Autoencoder(kl(4, F8), 83_653_863, STAGES + "kl-f8"),
    "kl-f16": Autoencoder(kl(16, F16, 16), 69_610_963, STAGES + "kl-f16"),
    "kl-f32": Autoencoder(kl(64, F32, 16, 8), 103_880_131, STAGES + "kl-f32"),
    "vq-f4": Autoencoder(vq(3, F4, 8192), 55_322_782, STAGES + "vq-f4"),
    "vq-f4-noattn": Autoencoder(
        vq(3, F4, 8192, mid_attn=False), 53_219_486, STAGES + "vq-f4-noattn"),
    "vq-f8": Autoencoder(vq(4, F8_VQ, 16384, 32), 67_717_295, STAGES + "vq-f8"),
    "vq-f8-n256": Autoencoder(vq(4, F8_VQ, 256, 32), 67_652_783, STAGES + "vq-f8-n256"),
    "vq-f16": Autoencoder(vq(8, F16, 16384, 16), 69_593_371, STAGES + "vq-f16"),
    "sd-vae": Autoencoder(  # kl-f8
        kl(4, F8, scale_factor=0.18215), 83_653_863, SD + "v1-inference.yaml"),
    "sdxl-vae": Autoencoder(
        kl(4, F8, scale_factor=0.13025), 83_653_863, SGM + "inference/sd_xl_base.yaml"),
    "sd2-upscaler-vae": Autoencoder(
        kl(4, F4, scale_factor=0.08333), 55_325_927, SD2 + "x4-upscaling.yaml"),
    "taesd": Autoencoder(dict(kind="tiny"), 2_445_063, "madebyollin/taesd: taesd.py"),
    "sgm-imagenet-attnfree-logvar": Autoencoder(
        kl(4, F4, num_res_blocks=4, mid_attn=False, use_quant_conv=False), 78_016_651,
        EXAMPLES + "imagenet-attnfree-logvar.yaml"),
    "sgm-imagenet-kl_f8_8chn": Autoencoder(
        kl(8, F8, use_quant_conv=False), 83_709_075, EXAMPLES + "imagenet-kl_f8_8chn.yaml"),
}
# fmt: on
PIXELS = Autoencoder(dict(kind="identity"), 0, "none")
