"""Every network against the reference's: each layer's output, the network's, and the gradients.

A reference has tiny widths, two or three levels, the flags of a published model, and random
weights, so that no layer is silent. Its state dict is read as any file's (`layout.read_params`) and
must be the same to the bit when written again; our gradients, written so too, are compared with
autograd's under the reference's own names. CompVis' code is stable-diffusion-sdkit 2.1.5.

In float32, relative to the norm of the reference's, layers agree to 1e-5, networks to 5e-5 and
gradients to 1e-4. LPIPS and adversarial losses are in none of these packages: goldens hold them.
"""

import operator
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel
from flax.traverse_util import flatten_dict
from ldm.models.autoencoder import AutoencoderKL
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ldm_jax.diffusion.noise import per_example
from ldm_jax.interop import layout
from ldm_jax.models.clip import CLIPText
from ldm_jax.models.embedders import concat_timestep_embedding, guidance_embedding
from ldm_jax.models.text import TextTransformer
from ldm_jax.models.unet import UNet
from ldm_jax.training.autoencoder_task import AutoencoderTask

LAYERS, OUTPUTS, GRADIENTS = 1e-5, 5e-5, 1e-4
MODULES = {"unet": UNet, "clip": CLIPText, "bert": TextTransformer, **layout.AUTOENCODERS}


class Case(NamedTuple):
    """A reference, made by `build`, and our network of it.

    `slots` are arguments of `layout.slots`: network, fields, layout. `theirs` and `ours` make of
    a network and the inputs, by name, one output or several; pictures are NCHW there and NHWC here
    and in `inputs`.
    """

    slots: tuple
    build: Callable[[], torch.nn.Module]
    theirs: Callable[..., Any]
    ours: Callable[..., Any]
    inputs: dict[str, np.ndarray]


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def nchw(array: np.ndarray) -> torch.Tensor:
    return torch.tensor(np.moveaxis(array, -1, 1) if array.ndim == 4 else array)


def nhwc(tensor: torch.Tensor) -> np.ndarray:
    array = tensor.detach().numpy()
    return np.moveaxis(array, 1, -1) if array.ndim == 4 else array


def bare(output: Any) -> Any:
    """Without the class in which diffusers and transformers hand everything over."""
    return output[0] if isinstance(output, dict) else output


def listed(outputs: Any) -> list:
    return list(outputs) if isinstance(outputs, tuple) else [bare(outputs)]


# UNets of 64 channels, two to each of the 32 groups: of one, a norm would forget every bias. Levels
# attend where a string has an x.


def their_unet(model, x, t, context=None, y=None, timestep_cond=None, **condition):
    if isinstance(model, diffusers.UNet2DConditionModel):
        told = dict(class_labels=y, timestep_cond=timestep_cond, added_cond_kwargs=condition)
        return model(x, t, context, **told)
    return model(x, t) if context is None else model(x, t, context, y)


def our_unet(module, text_embeds=None, time_ids=None, **inputs):
    if time_ids is not None:
        inputs["y"] = jnp.hstack([text_embeds, concat_timestep_embedding(time_ids, 8)])
    return module(**inputs)


def unet(build: Callable, fields: dict[str, Any], *layout: str, **inputs: np.ndarray) -> Case:
    inputs |= dict(x=draw(1, 2, 8, 8, fields.get("in_channels", 4)), t=np.array([20, 731]))
    inputs |= {"context": draw(2, 2, 5, 24)} if "context_dim" in fields else {}
    return Case(("unet", fields, *layout), build, their_unet, our_unet, inputs)


def unet_fields(attends: str, **fields: Any) -> dict[str, Any]:
    places = tuple(2**i for i, there in enumerate(attends) if there == "x")
    size = dict(channel_mult=(1, 2, 2)[: len(attends)], model_channels=64, num_res_blocks=1)
    return size | dict(attention_resolutions=places) | fields


def unet_config(attends: str, attention: str, **config: Any) -> dict[str, Any]:
    """diffusers', whose blocks with attention are called so."""
    kinds = [attention * (there == "x") for there in attends]
    down, up = [f"{kind}DownBlock2D" for kind in kinds], [f"{kind}UpBlock2D" for kind in kinds]
    size = dict(down_block_types=down, up_block_types=up[::-1], layers_per_block=1)
    return size | dict(block_out_channels=(64, 128, 128)[: len(attends)]) | config


def diffusers_unet(attends: str, fields: dict, config: dict, vector="add_embedding", **inputs):
    """UNet2DConditionModel of `config`, our UNet of `fields`."""
    fields = unet_fields(attends, context_dim=24, **fields)
    config = unet_config(attends, "CrossAttn", cross_attention_dim=24, **config)
    build = partial(diffusers.UNet2DConditionModel, **config)
    return unet(build, fields, "diffusers", vector, **inputs)


def sdxl(attends: str, depth: int | tuple[int, ...], numbers: int) -> Case:
    """With so many numbers in its vector, each embedded to 8."""
    width = 20 + 8 * numbers
    fields = SD2 | dict(transformer_depth=depth, num_classes="sequential", adm_in_channels=width)
    config = THEIR_SD2 | dict(addition_embed_type="text_time", addition_time_embed_dim=8)
    config |= dict(transformer_layers_per_block=depth, projection_class_embeddings_input_dim=width)
    inputs = dict(text_embeds=draw(3, 2, 20), time_ids=100 * np.arange(2 * numbers).reshape(2, -1))
    return diffusers_unet(attends, fields, config, **inputs)


def celebahq() -> Case:
    """UNet2DModel."""
    fields = unet_fields("-xx", in_channels=3, out_channels=3, num_head_channels=32)
    config = unet_config("-xx", "Attn", attention_head_dim=32)
    return unet(partial(diffusers.UNet2DModel, **config), fields, "diffusers")


def compvis_unet(attends: str, fields: dict[str, Any], **inputs: np.ndarray) -> Case:
    """UNetModel, whose arguments are our fields, but for few."""
    fields = unet_fields(attends, **fields)
    config = dict(image_size=8, in_channels=4, out_channels=4, **fields)
    build = partial(UNetModel, use_spatial_transformer="context_dim" in fields, **config)
    return unet(build, fields, "compvis", **inputs)


CONTEXT = dict(context_dim=24)
SD1, THEIR_SD1 = dict(num_heads=8), dict(attention_head_dim=8)  # which are heads, in truth
SD2 = dict(num_head_channels=32, use_linear_in_transformer=True)
THEIR_SD2 = dict(attention_head_dim=(2, 4), use_linear_projection=True)
UPSCALER = dict(num_heads=8, use_linear_in_transformer=True, num_classes=10)
UPSCALER |= dict(disable_self_attentions=(True, False))
THEIR_UPSCALER = dict(attention_head_dim=8, use_linear_projection=True, num_class_embeds=10)
THEIR_UPSCALER |= dict(only_cross_attention=(True, False))
UNCLIP = SD2 | dict(num_classes="sequential", adm_in_channels=20)
THEIR_UNCLIP = THEIR_SD2 | dict(class_embed_type="projection")
THEIR_UNCLIP |= dict(projection_class_embeddings_input_dim=20)
CHURCHES = dict(num_heads=8, use_scale_shift_norm=True, resblock_updown=True)
LCM = dict(channel_mult=(1, 1.5), num_heads=(2, 6), time_cond_proj_dim=10)
THEIR_LCM = dict(block_out_channels=(64, 96), attention_head_dim=(2, 6), time_cond_proj_dim=10)
SEVEN, NINE, LABELS = dict(in_channels=7), dict(in_channels=9), dict(y=np.array([3, 8]))
UNETS = {
    "SD 1 (diffusers)": diffusers_unet("x-", SD1, THEIR_SD1),
    "SD 1 inpainting (diffusers)": diffusers_unet("x-", SD1 | NINE, THEIR_SD1 | NINE),
    "SD 2 (diffusers)": diffusers_unet("x-", SD2, THEIR_SD2),
    "SD 2 upscaler (diffusers)": diffusers_unet(
        "x-", UPSCALER | SEVEN, THEIR_UPSCALER | SEVEN, **LABELS
    ),
    "SD 2 unCLIP (diffusers)": diffusers_unet(
        "x-", UNCLIP, THEIR_UNCLIP, "class_embedding", y=draw(3, 2, 20)
    ),
    "LCM, uneven widths and heads (diffusers)": diffusers_unet(
        "x-", LCM, THEIR_LCM, timestep_cond=draw(3, 2, 10)
    ),
    "SDXL base (diffusers)": sdxl("x-", (1, 2), numbers=6),
    "SDXL refiner (diffusers)": sdxl("-x", 2, numbers=5),
    "ldm-celebahq-256 (diffusers)": celebahq(),
    "lsun_churches256 (CompVis)": compvis_unet("xx", CHURCHES),
    "cin256-v2 (CompVis)": compvis_unet("-x", CONTEXT | dict(num_heads=1)),
    "SD 2 upscaler (CompVis)": compvis_unet("x-", UPSCALER | CONTEXT, **LABELS),
}


# Autoencoders of two levels; kl, vq and tiny are of either side.

SMALL = dict(ch=64, ch_mult=(1, 2), num_res_blocks=1)
BLOCKS = dict(block_out_channels=(64, 128), layers_per_block=1)
BLOCKS |= dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)


def kl(network, x):
    if isinstance(network, torch.nn.Module):
        posterior = bare(network.encode(x))
        mean, logvar = posterior.mean, posterior.logvar
    else:
        mean, logvar = network.moments(x)
    return mean, logvar, bare(network.decode(mean))


def vq(network, x):
    h = bare(network.encode(x))
    theirs = isinstance(network, torch.nn.Module)
    return h, network.quantize(h)[1] if theirs else network.nearest(h).loss, bare(network.decode(h))


def tiny(network, x):
    latents = bare(network.encode(x))
    return latents, bare(network.decode(latents))


def autoencoder(layout: str, kind: type, fields: dict[str, Any], config: dict[str, Any]) -> Case:
    outputs = {"kl": kl, "vq": vq, "tiny": tiny}[fields["kind"]]
    inputs = {"x": draw(1, 2, 16, 16, fields.get("in_channels", 3))}
    slots = ("autoencoder", fields, layout)
    return Case(slots, partial(kind, **config), outputs, outputs, inputs)


def compvis_kl(fields: dict[str, Any], **options: Any) -> Case:
    """AutoencoderKL, whose `ddconfig` are our fields, but for few."""
    config = dict(ddconfig=fields | options | dict(double_z=True), embed_dim=fields["embed_dim"])
    config |= dict(lossconfig={"target": "torch.nn.Identity"})
    return autoencoder("compvis", AutoencoderKL, fields, config)


diffusers_kl = partial(autoencoder, "diffusers", diffusers.AutoencoderKL)
KL, VQ = SMALL | dict(kind="kl"), SMALL | dict(kind="vq", n_embed=32)
THEIR_KL = BLOCKS | dict(latent_channels=4)
THEIR_VQ = BLOCKS | dict(latent_channels=3, vq_embed_dim=3, num_vq_embeddings=32)
COMPVIS = KL | dict(in_channels=3, out_ch=3, z_channels=4, embed_dim=3)
COMPVIS |= dict(resolution=16, attn_resolutions=())  # which only place attention
TINY = dict(kind="tiny", width=32, encoder_blocks=(1, 2), decoder_blocks=(2, 1))
THEIR_TINY = dict(num_encoder_blocks=(1, 2), num_decoder_blocks=(2, 1))
THEIR_TINY |= dict(encoder_block_out_channels=(32, 32), decoder_block_out_channels=(32, 32))
SIX, THEIR_SIX = dict(in_channels=6, out_ch=6), dict(in_channels=6, out_channels=6)
BARE = dict(use_quant_conv=False)
THEIR_BARE = dict(use_quant_conv=False, use_post_quant_conv=False)
AUTOENCODERS = {
    "SD (diffusers)": diffusers_kl(KL, THEIR_KL),
    "ldm3d (diffusers)": diffusers_kl(KL | SIX, THEIR_KL | THEIR_SIX),
    "uneven widths (diffusers)": diffusers_kl(
        KL | dict(ch_mult=(1, 1.5)), THEIR_KL | dict(block_out_channels=(64, 96))
    ),
    "without quant_conv (diffusers)": diffusers_kl(KL | BARE, THEIR_KL | THEIR_BARE),
    "ldm-celebahq-256 (diffusers)": autoencoder("diffusers", diffusers.VQModel, VQ, THEIR_VQ),
    "TAESD (diffusers)": autoencoder("diffusers", diffusers.AutoencoderTiny, TINY, THEIR_TINY),
    "KL, more attention (CompVis)": compvis_kl(COMPVIS | dict(attn_resolutions=(8,))),
    "KL, no attention (CompVis)": compvis_kl(COMPVIS | dict(mid_attn=False), attn_type="none"),
}


# Text encoders of 50 tokens, the last of which ends a text.

TOKENS = {"tokens": np.array([[48, 3, 17, 5, 49, 49, 0], [48, 9, 49, 0, 0, 0, 0]])}


def clip(fields: dict[str, Any], kind: type, **config: Any) -> Case:
    def theirs(model, tokens):
        found = model(tokens, output_hidden_states=True)
        if fields.get("layer") == "penultimate":
            return found.hidden_states[-2], found.text_embeds
        return found.last_hidden_state, found.pooler_output

    size = dict(vocab_size=50, max_position_embeddings=7, bos_token_id=48, pad_token_id=0)
    size |= dict(hidden_size=32, intermediate_size=128, hidden_act=fields["activation"])
    config = size | dict(num_hidden_layers=3, num_attention_heads=4) | config
    sizes = dict(vocab_size=50, max_length=7, width=32, depth=3, heads=4)
    slots = ("clip", fields | sizes, "diffusers")
    return Case(slots, partial(kind, CLIPTextConfig(**config)), theirs, operator.call, TOKENS)


def bert() -> Case:
    config = dict(vocab_size=50, max_position_embeddings=7, d_model=32, encoder_ffn_dim=128)
    config |= dict(encoder_layers=2, encoder_attention_heads=2, head_dim=8)
    fields = dict(vocab_size=50, max_length=7, width=32, depth=2, heads=2, head_dim=8)
    build = partial(LDMBertModel, LDMBertModel.config_class(**config))
    slots = ("bert", fields, "diffusers")
    return Case(slots, build, lambda model, tokens: model(tokens), operator.call, TOKENS)


NARROW = dict(activation="gelu", mlp_width=37, epsilon=1e-2)
THEIR_NARROW = dict(intermediate_size=37, layer_norm_eps=1e-2, eos_token_id=2)
BIGG = dict(activation="gelu", projection=20, layer="penultimate", final_norm=False, eos=49)
THEIR_BIGG = dict(projection_dim=20, eos_token_id=49)
TEXTS = {
    "CLIP-L (transformers)": clip(dict(activation="quick_gelu"), CLIPTextModel, eos_token_id=2),
    "CLIP-bigG (transformers)": clip(BIGG, CLIPTextModelWithProjection, **THEIR_BIGG),
    "narrow MLPs, another epsilon (transformers)": clip(NARROW, CLIPTextModel, **THEIR_NARROW),
    "ldm-text2im-large-256 (diffusers)": bert(),
}
CASES = {"unet": UNETS, "autoencoder": AUTOENCODERS, "text": TEXTS}
CASES = {f"{kind}: {name}": case for kind in CASES for name, case in CASES[kind].items()}


class Reference:
    """A case's reference with random weights, `model`, and what it is here: our `module` and its
    `params`, and its `slots`, by this reference's names. `layout` has taken every weight, and given
    it back as it was."""

    def __init__(self, case: Case):
        network, fields = case.slots[0], dict(case.slots[1])
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
            (ours, _, _), (name, _, leaf) = path.rpartition("/"), slot.names[0].rpartition(".")
            if ours and leaf == "weight" and len(slot.names) == 1:
                self.model.get_submodule(name).register_forward_hook(partial(note, ours))
        return found

    def gradients(self, ours: dict[str, Any]) -> tuple[dict[str, np.ndarray], ...]:
        """Of our parameters, and of theirs after a backward pass, both by their names."""
        written = layout.write_params(ours, self.slots)
        # A bias that all keys share shifts a query's logits alike: its gradient is rounding.
        names = [n for n in written if not re.search(r"\b(k|to_k|k_proj)\.bias$", n)]
        theirs = {name: self.model.get_parameter(name).grad.numpy() for name in names}
        return {name: written[name] for name in names}, theirs


def run_once(function: Callable, *args: Any) -> Any:
    """What jit of the function gives, compiled in half the time by XLA's old emitters."""
    lowered = jax.jit(function).lower(*args)
    try:
        return lowered.compile({"xla_cpu_use_fusion_emitters": False})(*args)
    except jax.errors.JaxRuntimeError:  # a jaxlib that has no others
        return lowered.compile()(*args)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_network(case, near):
    reference = Reference(case)
    layers = reference.layers()
    inputs = {k: nchw(array) for k, array in case.inputs.items()}
    floats = {k: v.requires_grad_() for k, v in inputs.items() if v.is_floating_point()}
    outputs = listed(case.theirs(reference.model, **inputs))
    weights = [draw(9, *nhwc(output).shape) for output in outputs]
    sum((o * nchw(w)).sum() for o, w in zip(outputs, weights, strict=True)).backward()

    def loss(params, floats):
        outputs, state = reference.module.apply(
            {"params": params},
            method=lambda module: case.ours(module, **case.inputs | floats),
            capture_intermediates=True,
        )
        outputs = listed(outputs)
        return sum(map(jnp.vdot, outputs, weights)), (outputs, state["intermediates"])

    gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
    ours = run_once(gradient, reference.params, {k: case.inputs[k] for k in floats})
    (of_params, of_inputs), (our_outputs, calls) = ours

    layers.pop("final_layer_norm", None)  # of CLIP: there of every token, here of those asked for
    calls = flatten_dict(calls, sep="/")
    found = {path: calls[f"{path}/__call__"][0] for path in layers}
    found = {k: np.concatenate(v, -1) if isinstance(v, tuple) else v for k, v in found.items()}
    near("layers", found, {k: v.reshape(found[k].shape) for k, v in layers.items()}, LAYERS)
    near("outputs", dict(enumerate(our_outputs)), dict(enumerate(map(nhwc, outputs))), OUTPUTS)
    of_params, theirs = reference.gradients(of_params)
    theirs |= {k: nhwc(v.grad) for k, v in floats.items()}
    near("gradients", of_params | of_inputs, theirs, GRADIENTS)


def test_autoencoder_loss(near):
    """L1 and KL through a sample of the posterior: `AutoencoderTask` against torch autograd."""
    case, key = AUTOENCODERS["KL, more attention (CompVis)"], jax.random.key(5)
    reference = Reference(case)
    sections = dict(autoencoder=case.slots[1], loss=dict(kl_weight=0.3), train={})
    config = ml_collections.ConfigDict(sections)
    unused = dict.fromkeys(("source", "held_out", "perceptual"))
    task = AutoencoderTask(config, frozen={}, loaded={}, **unused)
    images = np.random.default_rng(6).integers(0, 256, (2, 16, 16, 3), np.uint8)
    params = {"autoencoder": reference.params, "discriminator": {}}
    ours = partial(task.gradients, phase=False)
    gradients, metrics = run_once(ours, params, {}, {"image": images}, key)

    x = nchw(images / np.float32(127.5) - 1)
    posterior = reference.model.encode(x)
    noise = per_example(jax.random.normal, key, nhwc(posterior.mean).shape)
    x_hat = reference.model.decode(posterior.mean + posterior.std * nchw(np.asarray(noise)))
    loss = (x - x_hat).abs().sum() / len(x) + 0.3 * posterior.kl().mean()
    loss.backward()
    near("outputs", {"loss": metrics["loss"]}, {"loss": loss.detach().numpy()}, LAYERS)
    near("gradients", *reference.gradients(gradients["autoencoder"]), GRADIENTS)


@pytest.mark.parametrize("dim", [10, 11, 256])
def test_guidance_embedding(dim):
    """Of a scale; theirs is of what is above 1."""
    scales = np.array([1.0, 2.5, 7.5, 12.0], np.float32)
    theirs = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
    expected = theirs(None, torch.tensor(scales) - 1, embedding_dim=dim).numpy()
    np.testing.assert_allclose(guidance_embedding(scales, dim), expected, atol=2e-3)
