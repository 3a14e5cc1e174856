"""The published model that a file's model is, or is most similar to.

It determines what no tensor does: a UNet's heads, the noise, the size of pictures, and the
conditions that the caller has to provide.
"""

import functools
import json
from typing import Any

from ldm_jax import published
from ldm_jax.interop.fields import canonical
from ldm_jax.published import MODELS, Model

Section = dict[str, Any]


def lists(value: Any) -> Any:
    """A section in JSON's form: lists instead of tuples."""
    return json.loads(json.dumps(value))


def array(output: str, *shape: int | None, **section: Any) -> Section:
    """The section of `conditioning` for an array of the caller."""
    return lists(published.array(output, *shape, **section))


def concat_sections(in_channels: int, latents: int) -> dict[str, Section]:
    """The condition joined to the latents of Stable Diffusion's UNet: a mask and the masked
    picture, which have one channel more than the latents, or an array."""
    more = in_channels - latents
    if more == latents + 1:
        section = published.STABLE_MASK["masked_image"] | dict(channels=latents)
        return lists(dict(masked_image=section))
    return dict(concat=array("concat", None, None, more)) if more else {}


def _beside(unet: Section) -> str | int:
    """The condition joined to a UNet's latents, by its channels: those of a picture, of a picture
    and its mask, or another number."""
    more, latents = unet["in_channels"] - unet["out_channels"], unet["out_channels"]
    return {latents: "picture", latents + 1: "masked picture"}.get(more, more)


def brought_sections(model: Model, unet: Section) -> dict[str, Section]:
    """The sections for the conditions that the caller provides, for a UNet like the model's."""
    latents, alike = unet["out_channels"], _beside(unet) == _beside(model.unet)
    widths = dict(vector=unet.get("adm_in_channels"), context=unet.get("context_dim"))
    widths["concat"] = unet["in_channels"] - latents
    sections = {}
    for name, section in lists(model.conditions).items():
        output = section.get("output", "concat")
        if "network" in section or section["kind"] == "sizes" or output == "concat" and not alike:
            continue
        if section["kind"] == "masked_image":
            sections[name] = section | dict(channels=latents)
        else:
            shape = section["shape"] and [*section["shape"][:-1], widths[output]]
            sections[name] = section | dict(shape=shape)
    return sections if alike else sections | concat_sections(unet["in_channels"], latents)


def _networks(sections: dict[str, Section]) -> list[tuple[str, str]]:
    """Name and kind of the sections with a network; CLIP and OpenCLIP are of one kind."""
    return sorted((name, s["kind"]) for name, s in sections.items() if "network" in s)


def _traits(unet: Section, stage: str | None) -> tuple[Section, Section]:
    """All fields of a UNet except its heads; and the distinguishing ones, most important first."""
    fields = canonical(dict(unet=unet))["unet"]
    del fields["num_heads"]
    names = ("num_classes", "use_linear_in_transformer", "use_scale_shift_norm", "resblock_updown")
    traits = {name: fields[name] for name in (*names, "use_spatial_transformer")}
    if isinstance(unet.get("num_classes"), int):
        traits["num_classes"] = "a number"
    more = dict(beside=_beside(unet), stage=stage, out_channels=unet["out_channels"])
    return fields, traits | more


@functools.cache
def _published(name: str) -> tuple[Section, Section]:
    model = MODELS[name]
    outputs = model.unet["out_channels"] * (1 + model.learn_sigma)
    kind = model.autoencoder.fields.get("kind", "kl")
    return _traits(model.unet | dict(out_channels=outputs), kind)


def find_family(unet: Section, sections: dict[str, Section] | None, stage: str | None) -> Model:
    """The published model whose UNet has the same fields, or else the one most like it.

    Of those with the same networks in their conditions, it is the one that agrees in the first of
    `_traits`, then in the second, and so on, and last in most fields. Without cross-attention, the
    condition joined to the latents has to agree.

    Args:
      unet: the fields, but heads, of the UNet as the file has it.
      sections: of `conditioning`, those with networks; None for a UNet alone.
      stage: the kind of its autoencoder, "kl" or "vq"; None for a UNet alone.

    Raises ValueError, with the UNet's fields, if there is none.
    """
    fields, traits = _traits(unet, stage)
    likeness = {}
    for name, model in MODELS.items():
        theirs, its = _published(name)
        fits = sections is None or _networks(sections) == _networks(model.conditions)
        fits &= (fields["context_dim"] is None) == (theirs["context_dim"] is None)
        fits &= stage is None or its["stage"] != "identity"
        if not sections and fields["context_dim"] is None:
            fits &= traits["beside"] == its["beside"]
        if fits:
            alike = [its[trait] == value for trait, value in traits.items()]
            count = sum(theirs[field] == value for field, value in fields.items())
            likeness[name] = [theirs == fields, *alike, count]
    if not likeness:
        given = ", ".join(sections or ()) or "nothing"
        raise ValueError(
            f"is no published model's: a UNet with in_channels={unet['in_channels']}, out_channels="
            f"{unet['out_channels']}, context_dim={unet.get('context_dim')}, num_classes="
            f"{unet.get('num_classes')!r}, conditioned by {given}, autoencoder {stage!r}"
        )
    return MODELS[max(likeness, key=likeness.get)]
