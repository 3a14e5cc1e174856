"""Every network against the reference's: each layer's output, the network's, and the gradients.

A reference has tiny widths, the structure and flags of a published model, and random weights, so
that no layer is silent. Its state dict is read as any file's (`layout.read_params`) and must be the
same to the bit when written again; our gradients, written so too, are compared with autograd's
under the reference's own names. CompVis' code is stable-diffusion-sdkit 2.1.5.

In float32, relative to the norm of the reference's, layers agree to 1e-5, networks to 5e-5 and
gradients to 1e-4. LPIPS and adversarial losses are in none of these packages: goldens hold them.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import torch
import transformers
from diffusers.models.autoencoders.vq_model import VectorQuantizer
from diffusers.pipelines.latent_diffusion import pipeline_latent_diffusion as ldm_bert
from flax.traverse_util import flatten_dict
from ldm.models.autoencoder import AutoencoderKL
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.diffusionmodules.openaimodel import UNetModel

from ldm_jax.diffusion.noise import per_example
from ldm_jax.interop import layout
from ldm_jax.models.clip import CLIPText
from ldm_jax.models.embedders import concat_timestep_embedding
from ldm_jax.models.text import TextTransformer
from ldm_jax.models.unet import UNet
from ldm_jax.training.autoencoder_task import AutoencoderTask

LAYERS, OUTPUTS, GRADIENTS = 1e-5, 5e-5, 1e-4
MODULES = {"unet": UNet, "clip": CLIPText, "bert": TextTransformer, **layout.AUTOENCODERS}


@dataclass(frozen=True)
class Case:
    """A reference, and our network of it.

    Attributes:
      slots: arguments of `layout.slots`: network, fields, layout.
      build: makes the reference.
      theirs: function of the reference and its inputs to a tuple of outputs; pictures are NCHW.
      ours: the same of our module; pictures are NHWC.
      inputs: arrays by name; pictures are NHWC.
    """

    slots: tuple
    build: Callable[[], torch.nn.Module]
    theirs: Callable[..., tuple[torch.Tensor, ...]]
    ours: Callable[..., tuple[jax.Array, ...]]
    inputs: dict[str, np.ndarray]


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def nchw(array: np.ndarray) -> torch.Tensor:
    return torch.tensor(np.moveaxis(array, -1, 1) if array.ndim == 4 else array)


def nhwc(tensor: torch.Tensor) -> np.ndarray:
    array = tensor.detach().numpy()
    return np.moveaxis(array, 1, -1) if array.ndim == 4 else array


# UNets of 64 channels, two to each of the 32 groups: of one, a norm would forget every bias. Levels
# attend where a string has an x.


def conditioned_unet(model, x, t, context, y=None, **condition):
    return (model(x, t, context, class_labels=y, added_cond_kwargs=condition).sample,)


def our_unet(module, text_embeds=None, time_ids=None, **inputs):
    if time_ids is not None:
        inputs["y"] = jnp.hstack([text_embeds, concat_timestep_embedding(time_ids, 8)])
    return (module(**inputs),)


def unet_fields(attends: str, **fields: Any) -> dict[str, Any]:
    places = tuple(2**i for i, there in enumerate(attends) if there == "x")
    fields |= dict(attention_resolutions=places, channel_mult=(1, 2, 2)[: len(attends)])
    return fields | dict(model_channels=64, num_res_blocks=1)


def unet_inputs(fields: dict[str, Any], **more: np.ndarray) -> dict[str, np.ndarray]:
    more |= dict(x=draw(1, 2, 8, 8, fields.get("in_channels", 4)), t=np.array([20, 731]))
    return more | ({"context": draw(2, 2, 5, 24)} if "context_dim" in fields else {})


def unet_config(attends: str, attention: str, **config: Any) -> dict[str, Any]:
    """diffusers', whose blocks with attention are called so."""
    kinds = [attention * (there == "x") for there in attends]
    down, up = [f"{kind}DownBlock2D" for kind in kinds], [f"{kind}UpBlock2D" for kind in kinds]
    config |= dict(down_block_types=down, up_block_types=up[::-1], layers_per_block=1)
    return config | dict(block_out_channels=(64, 128, 128)[: len(attends)])


def diffusers_unet(attends: str, fields: dict, config: dict, vector="add_embedding", **inputs):
    """UNet2DConditionModel of `config`, our UNet of `fields`."""
    fields = unet_fields(attends, context_dim=24, **fields)
    config = unet_config(attends, "CrossAttn", cross_attention_dim=24, **config)
    build = partial(diffusers.UNet2DConditionModel, **config)
    inputs = unet_inputs(fields, **inputs)
    return Case(("unet", fields, "diffusers", vector), build, conditioned_unet, our_unet, inputs)


def sdxl(attends: str, depth: int | tuple[int, ...], heads: tuple[int, ...], numbers: int) -> Case:
    """With so many numbers in its vector, each embedded to 8."""
    width = 20 + 8 * numbers
    fields = SD2 | dict(transformer_depth=depth, num_classes="sequential", adm_in_channels=width)
    config = dict(addition_embed_type="text_time", addition_time_embed_dim=8)
    config |= dict(transformer_layers_per_block=depth, projection_class_embeddings_input_dim=width)
    config |= dict(attention_head_dim=heads, use_linear_projection=True)
    inputs = dict(text_embeds=draw(3, 2, 20), time_ids=100 * np.arange(2 * numbers).reshape(2, -1))
    return diffusers_unet(attends, fields, config, **inputs)


def celebahq() -> Case:
    """UNet2DModel."""
    fields = unet_fields("-xx", in_channels=3, out_channels=3, num_head_channels=32)
    build = partial(diffusers.UNet2DModel, **unet_config("-xx", "Attn", attention_head_dim=32))

    def theirs(model, x, t):
        return (model(x, t).sample,)

    return Case(("unet", fields, "diffusers"), build, theirs, our_unet, unet_inputs(fields))


def compvis_unet(attends: str, y: np.ndarray | None = None, **fields: Any) -> Case:
    """UNetModel, whose arguments are our fields, but for few."""
    fields = unet_fields(attends, **fields)
    config = dict(image_size=8, in_channels=4, out_channels=4, **fields)
    build = partial(UNetModel, use_spatial_transformer="context_dim" in fields, **config)

    def theirs(model, x, t, **condition):
        return (model(x, t, **condition),)

    inputs = unet_inputs(fields, **({} if y is None else {"y": y}))
    return Case(("unet", fields, "compvis"), build, theirs, our_unet, inputs)


SD1, THEIR_SD1 = dict(num_heads=8), dict(attention_head_dim=8)  # which are heads, in truth
SD2 = dict(num_head_channels=32, use_linear_in_transformer=True)
THEIR_SD2 = dict(attention_head_dim=(2, 4), use_linear_projection=True)
UPSCALER = dict(num_heads=8, use_linear_in_transformer=True, num_classes=10)
UPSCALER |= dict(disable_self_attentions=(True, False))
THEIR_UPSCALER = dict(attention_head_dim=8, use_linear_projection=True, num_class_embeds=10)
THEIR_UPSCALER |= dict(only_cross_attention=(True, False), in_channels=7)
UNCLIP = SD2 | dict(num_classes="sequential", adm_in_channels=20)
THEIR_UNCLIP = dict(class_embed_type="projection", projection_class_embeddings_input_dim=20)
CHURCHES = dict(num_heads=8, use_scale_shift_norm=True, resblock_updown=True)
NINE, LABELS = dict(in_channels=9), np.array([3, 8])
UNETS = {
    "unet: SD 1 (diffusers)": diffusers_unet("x-", SD1, THEIR_SD1),
    "unet: SD 1 inpainting (diffusers)": diffusers_unet("x-", SD1 | NINE, THEIR_SD1 | NINE),
    "unet: SD 2 (diffusers)": diffusers_unet("x-", SD2, THEIR_SD2),
    "unet: SD 2 upscaler (diffusers)": diffusers_unet(
        "xx", UPSCALER | dict(in_channels=7), THEIR_UPSCALER, y=LABELS
    ),
    "unet: SD 2 unCLIP (diffusers)": diffusers_unet(
        "x-", UNCLIP, THEIR_SD2 | THEIR_UNCLIP, "class_embedding", y=draw(3, 2, 20)
    ),
    "unet: SDXL base (diffusers)": sdxl("-xx", (1, 1, 2), (2, 4, 4), numbers=6),
    "unet: SDXL refiner (diffusers)": sdxl("x-", 2, (2, 4), numbers=5),
    "unet: ldm-celebahq-256 (diffusers)": celebahq(),
    "unet: lsun_churches256 (CompVis)": compvis_unet("xx", **CHURCHES),
    "unet: cin256-v2 (CompVis)": compvis_unet("xx", num_heads=1, context_dim=24),
    "unet: SD 2 upscaler (CompVis)": compvis_unet("xx", LABELS, context_dim=24, **UPSCALER),
}


# Autoencoders of two levels.

SMALL = dict(ch=64, ch_mult=(1, 2), num_res_blocks=1)
BLOCKS = dict(block_out_channels=(64, 128), layers_per_block=1)
BLOCKS |= dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
COMPVIS = SMALL | dict(in_channels=3, out_ch=3, z_channels=4, embed_dim=3)
COMPVIS |= dict(resolution=16, attn_resolutions=())  # which only place attention


def autoencoder(layout: str, build: Callable, theirs: Callable, ours: Callable, **fields) -> Case:
    inputs = {"x": draw(1, 2, 16, 16, fields.get("in_channels", 3))}
    return Case(("autoencoder", fields, layout), build, theirs, ours, inputs)


def our_kl(module, x):
    mean, logvar = module.moments(x)
    return mean, logvar, module.last_layer(module.features(mean))


def our_vq(module, x):
    z = module.prequant(x)
    found = module.nearest(z)
    return z, found.loss, module.last_layer(module.features(found.latents))


def their_vq(model, x):
    h = model.encode(x).latents
    return h, model.quantize(h)[1], model.decode(h).sample


def diffusers_kl(fields: dict[str, Any], **config: Any) -> Case:
    def theirs(model, x):
        posterior = model.encode(x).latent_dist
        return posterior.mean, posterior.logvar, model.decode(posterior.mean).sample

    build = partial(diffusers.AutoencoderKL, latent_channels=4, **BLOCKS, **config)
    return autoencoder("diffusers", build, theirs, our_kl, kind="kl", **SMALL, **fields)


def diffusers_vq() -> Case:
    config = dict(latent_channels=3, vq_embed_dim=3, num_vq_embeddings=32, **BLOCKS)
    build = partial(diffusers.VQModel, **config)
    return autoencoder("diffusers", build, their_vq, our_vq, kind="vq", n_embed=32, **SMALL)


def diffusers_tiny() -> Case:
    def theirs(model, x):
        latents = model.encode(x).latents
        return latents, model.decode(latents).sample

    def ours(module, x):
        latents = module.encode(x)
        return latents, module.decode(latents)

    config = dict(num_encoder_blocks=(1, 2), num_decoder_blocks=(2, 1))
    config |= dict(encoder_block_out_channels=(32, 32), decoder_block_out_channels=(32, 32))
    fields = dict(kind="tiny", width=32, encoder_blocks=(1, 2), decoder_blocks=(2, 1))
    build = partial(diffusers.AutoencoderTiny, **config)
    return autoencoder("diffusers", build, theirs, ours, **fields)


def compvis_kl() -> Case:
    def theirs(model, x):
        posterior = model.encode(x)
        return posterior.mean, posterior.logvar, model.decode(posterior.mean)

    fields = COMPVIS | dict(kind="kl", attn_resolutions=(8,))
    loss = {"target": "torch.nn.Identity"}
    build = partial(AutoencoderKL, fields | {"double_z": True}, loss, fields["embed_dim"])
    return autoencoder("compvis", build, theirs, our_kl, **fields)


def compvis_vq() -> Case:
    """Of CompVis' encoder and decoder and of taming's quantiser, which diffusers has."""

    def build():
        options = COMPVIS | dict(attn_type="none", double_z=False)
        parts = dict(encoder=Encoder(**options), decoder=Decoder(**options))
        parts |= dict(quant_conv=torch.nn.Conv2d(4, 3, 1), post_quant_conv=torch.nn.Conv2d(3, 4, 1))
        return torch.nn.ModuleDict(parts | dict(quantize=VectorQuantizer(32, 3, beta=0.25)))

    def theirs(model, x):
        h = model["quant_conv"](model["encoder"](x))
        quantised, loss, _ = model["quantize"](h)
        return h, loss, model["decoder"](model["post_quant_conv"](quantised))

    fields = COMPVIS | dict(kind="vq", mid_attn=False, n_embed=32)
    return autoencoder("compvis", build, theirs, our_vq, **fields)


SIX, THEIR_SIX = dict(in_channels=6, out_ch=6), dict(in_channels=6, out_channels=6)
NO_QUANT = dict(use_quant_conv=False)
AUTOENCODERS = {
    "autoencoder: SD (diffusers)": diffusers_kl({}),
    "autoencoder: ldm3d (diffusers)": diffusers_kl(SIX, **THEIR_SIX),
    "autoencoder: no quant_conv (diffusers)": diffusers_kl(
        NO_QUANT, use_post_quant_conv=False, **NO_QUANT
    ),
    "autoencoder: ldm-celebahq-256, VQ (diffusers)": diffusers_vq(),
    "autoencoder: TAESD (diffusers)": diffusers_tiny(),
    "autoencoder: KL with attention (CompVis)": compvis_kl(),
    "autoencoder: vq-f4-noattn (CompVis)": compvis_vq(),
}


# Text encoders of 50 tokens, whose last one ends a text.

TOKENS = {"tokens": np.array([[48, 3, 17, 5, 49, 49, 0], [48, 9, 49, 0, 0, 0, 0]])}


def clip(fields: dict[str, Any], kind=transformers.CLIPTextModel, **config: Any) -> Case:
    def theirs(model, tokens):
        found = model(tokens, output_hidden_states=True)
        if fields.get("layer") == "penultimate":
            return found.hidden_states[-2], found.text_embeds
        return found.last_hidden_state, found.pooler_output

    config |= dict(vocab_size=50, max_position_embeddings=7, bos_token_id=48, pad_token_id=0)
    config |= dict(hidden_size=32, intermediate_size=128, hidden_act=fields["activation"])
    config |= dict(num_hidden_layers=3, num_attention_heads=4)
    sizes = dict(vocab_size=50, max_length=7, width=32, depth=3, heads=4)
    slots = "clip", fields | sizes, "diffusers"
    build = partial(lambda config: kind(transformers.CLIPTextConfig(**config)), config)
    return Case(slots, build, theirs, lambda module, tokens: module(tokens), TOKENS)


def bert() -> Case:
    config = dict(vocab_size=50, max_position_embeddings=7, d_model=32, encoder_ffn_dim=128)
    config |= dict(encoder_layers=2, encoder_attention_heads=2, head_dim=8)
    fields = dict(vocab_size=50, max_length=7, width=32, depth=2, heads=2, head_dim=8)
    return Case(
        ("bert", fields, "diffusers"),
        lambda: ldm_bert.LDMBertModel(ldm_bert.LDMBertConfig(**config)),
        lambda model, tokens: (model(tokens).last_hidden_state,),
        lambda module, tokens: (module(tokens),),
        TOKENS,
    )


BIGG = dict(activation="gelu", projection=20, layer="penultimate", final_norm=False, eos=49)
TEXTS = {
    "clip: SD 1 (transformers)": clip(dict(activation="quick_gelu"), eos_token_id=2),
    "clip: SDXL's second (transformers)": clip(
        BIGG, transformers.CLIPTextModelWithProjection, projection_dim=20, eos_token_id=49
    ),
    "bert: ldm-text2im-large-256 (diffusers)": bert(),
}
CASES = UNETS | AUTOENCODERS | TEXTS


class Reference:
    """A case's reference with random weights, `model`, and what it is here.

    Attributes:
      module: our network.
      slots: its, by the names that this reference has.
      params: the weights; `layout` took all of them, and gave them back as they were.
    """

    def __init__(self, case: Case):
        network, fields, *_ = case.slots
        fields = dict(fields)
        self.module = MODULES[fields.pop("kind", network)](**fields)
        self.model, self.slots = case.build().eval(), layout.slots(*case.slots)
        draws = np.random.default_rng(0)
        for name, parameter in self.model.named_parameters():
            values = draws.standard_normal(parameter.shape, np.float32)
            if parameter.ndim > 1:
                values /= parameter[0].numel() ** 0.5
            else:
                values = name.endswith("weight") + 0.3 * values
            parameter.data.copy_(torch.tensor(values))
        state = {name: tensor.numpy() for name, tensor in self.model.state_dict().items()}
        if network == "clip" and "embeddings.token_embedding.weight" in state:
            # What transformers 5 writes has the names of earlier versions.
            self.slots = {k: replace(v, names=v.others[0]) for k, v in self.slots.items()}
        self.params, report = layout.read_params(state, self.slots)
        assert report == layout.Report()
        written = layout.write_params(self.params, self.slots)
        assert written.keys() == {n for n in state if not re.fullmatch(layout.IGNORED, n)}
        for name, tensor in written.items():
            np.testing.assert_array_equal(tensor, state[name], name)

    def layers(self) -> dict[str, np.ndarray]:
        """Filled by the next pass: outputs by our path, channels last."""
        found = {}

        def note(path, layer, inputs, output):
            first = isinstance(layer, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.GroupNorm)
            output = output.movedim(1, -1) if first else output
            found.setdefault(path, output.detach().numpy())  # of several calls the first

        for path, slot in self.slots.items():
            name, _, leaf = slot.names[0].rpartition(".")
            if leaf == "weight" and len(slot.names) == 1:
                layer = self.model.get_submodule(name)
                layer.register_forward_hook(partial(note, path.rpartition("/")[0]))
        return found

    def gradients(self) -> dict[str, np.ndarray]:
        """By name, after a backward pass."""
        names = [name for slot in self.slots.values() for name in slot.names]
        return {name: self.model.get_parameter(name).grad.numpy() for name in names}


def run_once(function: Callable, *args: Any) -> Any:
    """What jit of the function gives, compiled in half the time by the older emitters."""
    lowered = jax.jit(function).lower(*args)
    return lowered.compile({"xla_cpu_use_fusion_emitters": False})(*args)


@pytest.mark.parametrize("name", CASES)
def test_network(name, near):
    case = CASES[name]
    reference = Reference(case)
    layers = reference.layers()
    inputs = {k: nchw(array) for k, array in case.inputs.items()}
    floats = {k: v.requires_grad_() for k, v in inputs.items() if v.is_floating_point()}
    outputs = case.theirs(reference.model, **inputs)
    weights = [draw(9, *nhwc(output).shape) for output in outputs]
    sum((o * nchw(w)).sum() for o, w in zip(outputs, weights, strict=True)).backward()

    def loss(params, floats):
        outputs, state = reference.module.apply(
            {"params": params},
            method=lambda module: case.ours(module, **case.inputs | floats),
            capture_intermediates=True,
        )
        return sum(map(jnp.vdot, outputs, weights)), (outputs, state["intermediates"])

    gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
    ours = run_once(gradient, reference.params, {k: case.inputs[k] for k in floats})
    (of_params, of_inputs), (our_outputs, calls) = ours

    calls = flatten_dict(calls, sep="/")
    found = {path: calls[f"{path}/__call__"][0] for path in layers}
    found = {k: np.concatenate(v, -1) if isinstance(v, tuple) else v for k, v in found.items()}
    near("layers", found, {k: v.reshape(found[k].shape) for k, v in layers.items()}, LAYERS)
    near("outputs", dict(enumerate(our_outputs)), dict(enumerate(map(nhwc, outputs))), OUTPUTS)
    near("gradients", of_inputs, {k: nhwc(v.grad) for k, v in floats.items()}, GRADIENTS)
    of_params = layout.write_params(of_params, reference.slots)
    near("gradients", of_params, reference.gradients(), GRADIENTS)


def test_autoencoder_loss(near):
    """L1 and KL through a sample of the posterior: `AutoencoderTask` against torch autograd."""
    case, key = compvis_kl(), jax.random.key(5)
    reference = Reference(case)
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in case.slots[1].items()}
    config = ml_collections.ConfigDict(dict(autoencoder=fields, loss=dict(kl_weight=0.3)))
    task = AutoencoderTask(config, source=None, held_out=None, perceptual=None)
    images = np.random.default_rng(6).integers(0, 256, (2, 16, 16, 3), np.uint8)
    params = {"autoencoder": reference.params, "discriminator": {}}
    ours = partial(task.gradients, phase=False)
    gradients, metrics = run_once(ours, params, {"image": images}, key)

    x = nchw(images / np.float32(127.5) - 1)
    posterior = reference.model.encode(x)
    noise = per_example(jax.random.normal, key, nhwc(posterior.mean).shape)
    x_hat = reference.model.decode(posterior.mean + posterior.std * nchw(np.asarray(noise)))
    loss = (x - x_hat).abs().sum() / len(x) + 0.3 * posterior.kl().mean()
    loss.backward()
    near("outputs", {"loss": metrics["loss"]}, {"loss": loss.detach().numpy()}, LAYERS)
    gradients = layout.write_params(gradients["autoencoder"], reference.slots)
    near("gradients", gradients, reference.gradients(), GRADIENTS)
