"""What the tensors of a published model do not tell, by the model they belong to.

Which model that is, `find_family` reads off the networks: first by what conditions them, which
holds for any width, then, of a UNet without anything beside it, by the widths that were released.
Sources: CompVis' and Stability's configurations (latent-diffusion, stable-diffusion,
stablediffusion, generative-models).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ldm_jax.models.build import tuples
from ldm_jax.models.unet import UNet

ONE, EIGHT = dict(num_heads=1), dict(num_heads=8)
OF_32, OF_64 = dict(num_head_channels=32), dict(num_head_channels=64)
SD, CELEBA, CHURCHES = (0.00085, 0.012), (0.0015, 0.0195), (0.0015, 0.0155)
INPAINTING, RDM, DDPM = (0.0015, 0.0205), (0.0015, 0.015), (1e-4, 2e-2)
# LDM's sampler ends at the table's first entry; SGM's has the grid of Lin et al. 2023, and noise 0.
LDM_GRID = dict(spacing="leading", offset=1, end="first"), "ddim"
SGM_GRID = dict(spacing="trailing"), "euler"


@dataclass(frozen=True)
class Family:
    """A published model, or several that are alike.

    Attributes:
      name: for people.
      fits: whether a UNet (without heads) is this one, told what conditions it ("clip", "openclip",
        "bert", "class", "rescaler", "sdxl", "refiner"; "" where the file has nothing, None where
        it is not known) and the kind of its autoencoder ("kl", "vq", None).
      heads: `num_heads` or `num_head_channels`.
      betas: first and last of the schedule "linear".
      scale: the autoencoder's `scale_factor`.
      size: pixels a side.
      guidance: the scale that the original's scripts take; 1.0 where they have none.
      parameterization: what the UNet's output means; "eps or v" where weights must tell.
      grid: `spacing`, `offset` and `end` of section `diffusion`, and the sampler: the original's.
      extra: the sections of `conditioning` for what the caller brings, of a UNet; None:
        `concat_sections`.
    """

    name: str
    fits: Callable[[UNet, str | None, str | None], bool]
    heads: dict[str, int]
    betas: tuple[float, float] = SD
    scale: float = 1.0
    size: int = 256
    guidance: float = 1.0
    parameterization: str = "eps"
    grid: tuple[dict[str, Any], str] = LDM_GRID
    extra: Callable[[UNet], dict[str, dict]] | None = None


def array(output: str, *shape: int | None, dropout: float = 0.0) -> dict[str, Any]:
    """The section of `conditioning` for an array that the caller brings."""
    return dict(kind="array", output=output, shape=list(shape), dropout=dropout)


def _masked(channels: int, mask_first: bool, hole: float, low: float) -> dict[str, Any]:
    section = dict(kind="masked_image", channels=channels, mask_first=mask_first, hole=hole)
    return section | dict(mask_range=[low, 1], dropout=0.0)


def concat_sections(in_channels: int, latents: int) -> dict[str, dict[str, Any]]:
    """What stands beside so many latents in Stable Diffusion's UNet: a mask and what it leaves of
    the picture, one more than the latents, or an array."""
    more = in_channels - latents
    if more == latents + 1:
        return dict(masked_image=_masked(latents, True, 0.0, 0))
    return dict(concat=array("concat", None, None, more)) if more else {}


def _vector(unet: UNet) -> bool:
    return unet.num_classes == "sequential"


def _plain(unet: UNet) -> bool:
    return unet.context_dim is None and not unet.use_spatial_transformer


LOW_RESOLUTION = dict(low_resolution=array("concat", None, None, 3))
STABLE = dict(scale=0.18215, size=512)
# In the order in which they are asked. `told` None: a UNet alone, of which its widths must say.
FAMILIES = (
    Family(
        "Stable Diffusion XL base",
        lambda u, told, _: told == "sdxl" or told is None and _vector(u) and u.context_dim == 2048,
        OF_64,
        scale=0.13025,
        size=1024,
        guidance=5.0,
        grid=SGM_GRID,
    ),
    Family(
        "Stable Diffusion XL refiner",
        lambda u, told, _: (
            told == "refiner" or told is None and _vector(u) and u.adm_in_channels == 2560
        ),
        OF_64,
        scale=0.13025,
        size=1024,
        guidance=5.0,
        grid=SGM_GRID,
    ),
    # SD 2. All but the upscaler have 64 channels a head (`num_head_channels: 64`).
    Family(
        "Stable Diffusion 2 upscaler (×4)",
        lambda u, *_: isinstance(u.num_classes, int) and u.use_linear_in_transformer,
        EIGHT,
        DDPM,
        scale=0.08333,
        size=512,
        guidance=9.0,
        parameterization="v",
        extra=lambda _: LOW_RESOLUTION | dict(noise_level=array("vector")),
    ),
    Family(
        "Stable unCLIP 2.1",
        lambda u, *_: u.use_linear_in_transformer and _vector(u),
        OF_64,
        scale=0.18215,
        size=768,
        guidance=10.0,
        parameterization="v",
        extra=lambda u: dict(image_embedding=array("vector", u.adm_in_channels, dropout=0.25)),
    ),
    Family(
        "Stable Diffusion 2 depth",
        lambda u, *_: u.use_linear_in_transformer and u.in_channels == 5,
        OF_64,
        guidance=9.0,
        extra=lambda _: dict(depth=array("concat", None, None, 1)),
        **STABLE,
    ),
    Family(
        "Stable Diffusion 2",
        lambda u, *_: u.use_linear_in_transformer,
        OF_64,
        guidance=9.0,
        parameterization="eps or v",
        **STABLE,
    ),
    # SGM's own examples: transformers everywhere, 32 channels a head without and 64 with a context.
    Family(
        "one of SGM's toys",
        lambda u, *_: u.use_spatial_transformer and u.context_dim is None,
        OF_32,
    ),
    Family("one of SGM's examples", lambda u, *_: _vector(u), OF_64, scale=0.13025, grid=SGM_GRID),
    # SD 1: a 1×1 convolution around each transformer, 8 heads at every width, 40 to 160 wide.
    Family(
        "Stable Diffusion 1",
        lambda u, told, _: (
            told == "clip" or told is None and u.model_channels == 320 and u.context_dim == 768
        ),
        EIGHT,
        guidance=7.5,
        **STABLE,
    ),
    # LDM. 32 channels a head, but for the models that say `num_heads`.
    Family(
        "latent diffusion txt2img-1p4B",
        lambda u, told, stage: (
            told == "bert" and stage == "kl" or told is None and u.context_dim == 1280
        ),
        EIGHT,
        scale=0.18215,
        guidance=5.0,
    ),
    Family(
        "latent diffusion text2img256",
        lambda u, told, _: told == "bert" or told is None and u.context_dim == 640,
        OF_32,
        CELEBA,
        guidance=5.0,
    ),
    Family(
        "latent diffusion layout2img-openimages256",
        lambda u, told, _: told == "boxes" or told is None and u.transformer_depth == 3,
        OF_32,
        INPAINTING,
    ),
    # `num_heads: 1`, and so one head of 384, 576 and 960.
    Family(
        "latent diffusion cin256-v2",
        lambda u, told, stage: (
            told == "class"
            and stage == "vq"
            and u.in_channels == 3
            or told is None
            and u.context_dim == 512
            and u.model_channels == 192
        ),
        ONE,
        CELEBA,
        guidance=3.0,
    ),
    Family(
        "latent diffusion cin256",
        lambda u, told, _: told == "class" or told is None and u.context_dim == 512,
        OF_32,
        CELEBA,
    ),
    Family(
        "retrieval-augmented diffusion 768",
        lambda u, told, _: not told and u.context_dim is not None,
        OF_32,
        RDM,
        scale=0.22765929,
        size=768,
        guidance=5.0,
        extra=lambda u: dict(neighbours=array("context", None, u.context_dim, dropout=0.1)),
    ),
    Family(
        "latent diffusion inpainting_big",
        lambda u, *_: _plain(u) and u.in_channels == 2 * u.out_channels + 1,
        EIGHT,
        INPAINTING,
        extra=lambda u: dict(masked_image=_masked(u.out_channels, False, -1.0, -1)),
    ),
    Family(
        "latent diffusion lsun_churches256",
        lambda u, *_: _plain(u) and u.use_scale_shift_norm and u.resblock_updown,
        EIGHT,
        CHURCHES,
    ),
    Family(
        "latent diffusion semantic_synthesis",
        lambda u, told, _: (
            told == "rescaler"
            or told is None
            and u.in_channels == 2 * u.out_channels
            and not u.attention_resolutions
        ),
        EIGHT,
        INPAINTING,
    ),
    Family(
        "latent diffusion bsr_sr (×4)",
        lambda u, told, _: not told and _plain(u) and u.in_channels == 2 * u.out_channels,
        OF_32,
        CHURCHES,
        extra=lambda _: LOW_RESOLUTION,
    ),
    Family(
        "latent diffusion without a condition (celeba256, ffhq256, lsun_beds256)",
        lambda u, told, _: not told and _plain(u) and u.in_channels == u.out_channels,
        OF_32,
        CELEBA,
    ),
)


def find_family(unet: dict[str, Any], told: str | None, stage: str | None) -> Family:
    """The first of `FAMILIES` that fits a UNet's fields; arguments as `Family.fits` takes them.

    Raises ValueError if none does, with what the UNet is like.
    """
    module = UNet(**tuples(unet))
    for family in FAMILIES:
        if family.fits(module, told, stage):
            return family
    raise ValueError(
        f"is no published model's: a UNet with in_channels={module.in_channels}, out_channels="
        f"{module.out_channels}, context_dim={module.context_dim}, num_classes="
        f"{module.num_classes!r}, conditioned by {told or 'nothing'}, autoencoder {stage!r}"
    )
