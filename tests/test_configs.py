"""Every published model is a configuration of our modules: of its size, and of parts that fit."""

import functools

import jax
import jax.numpy as jnp
import pytest

from ldm_jax.diffusion.grids import sampling_grid
from ldm_jax.diffusion.objective import Objective
from ldm_jax.diffusion.samplers import get_sampler
from ldm_jax.diffusion.schedule import make_schedule
from ldm_jax.models.autoencoder import AutoencoderKL
from ldm_jax.models.clip import CLIPText
from ldm_jax.models.embedders import ClassEmbedder, SpatialRescaler
from ldm_jax.models.text import TextTransformer
from ldm_jax.models.tiny_autoencoder import TinyAutoencoder
from ldm_jax.models.unet import UNet
from ldm_jax.models.vq import VQModel
from ldm_jax.published import AUTOENCODERS, MODELS, RECIPES
from ldm_jax.training.optimizer import learning_rate
from ldm_jax.training.workdir import config_dict
from tests.models.published import (
    AUTOENCODER_TENSORS,
    CONDITIONER_TENSORS,
    CONFIGS,
    UNET_TENSORS,
    WITH_VARIANCE,
    config_file,
    published,
)

DIFFUSION = [name for name in CONFIGS.VARIANTS if name not in AUTOENCODERS]
AUTOENCODER_KINDS = {"kl": AutoencoderKL, "vq": VQModel, "tiny": TinyAutoencoder}
SIZE_WIDTHS = {"original_size": 512, "crop": 512, "target_size": 512, "aesthetic_score": 256}


def tuples(fields):
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


@functools.cache
def size(module, *inputs, y=None):
    """(Parameters, tensors) of a module that takes inputs of these shapes and types."""

    def array(described):
        return jnp.zeros(*described) if isinstance(described, tuple) else described

    def init():
        named = {} if y is None else {"y": array(y)}
        return module.init(jax.random.key(0), *map(array, inputs), **named)["params"]

    counts = [leaf.size for leaf in jax.tree.leaves(jax.eval_shape(init))]
    return sum(counts), len(counts)


def unet_size(unet):
    side = 2 ** len(unet.channel_mult)
    context = None if unet.context_dim is None else ((1, 1, unet.context_dim),)
    y = {None: None, "sequential": ((1, unet.adm_in_channels),)}.get(unet.num_classes, ((1,), int))
    return size(unet, ((1, side, side, unet.in_channels),), ((1,),), context, y=y)


@pytest.mark.parametrize("name", MODELS)
def test_unet(name):
    model = MODELS[name]
    assert unet_size(UNet(**model.unet)) == (model.networks["unet"], UNET_TENSORS[name])
    assert model.learn_sigma == (name in WITH_VARIANCE)


@pytest.mark.parametrize("name", WITH_VARIANCE)
def test_unet_with_a_learned_variance(name):
    parameters, _ = unet_size(UNet(**MODELS[name].unet | dict(out_channels=6)))
    assert parameters == WITH_VARIANCE[name]


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoder(name):
    fields = dict(AUTOENCODERS[name].fields)
    module = AUTOENCODER_KINDS[fields.pop("kind", "kl")](**fields)
    expected = AUTOENCODERS[name].parameters, AUTOENCODER_TENSORS[name]
    assert size(module, ((1, 64, 64, 3),)) == expected


def conditioner(section):
    """Network of a section, and shape and type of its input."""
    fields, tokens = dict(section["network"]), ((1, 4), int)
    kind = fields.pop("kind", section["kind"])
    if kind in ("text", "transformer"):
        return TextTransformer(**fields), tokens
    if kind == "clip":
        return CLIPText(**fields), tokens
    if kind == "class":
        return ClassEmbedder(**fields), ((1,), int)
    return SpatialRescaler(**fields), ((1, 8, 8, section["shape"][-1]),)


@pytest.mark.parametrize("name", MODELS)
def test_conditioners(name):
    model = MODELS[name]
    networks = {key: conditioner(s) for key, s in model.conditions.items() if "network" in s}
    tensors = CONDITIONER_TENSORS.get(name, {})
    expected = {key: (model.networks[key], count) for key, count in tensors.items()}
    assert {key: size(*network) for key, network in networks.items()} == expected
    assert model.networks.keys() == {"unet", *networks}


def test_the_whole_of_a_model():
    assert round(MODELS["sd1"].parameters / 1e6, 1) == round(859.52 + 123.06 + 83.65, 1)


def widths(section):
    """What a section adds to the UNet's context, to its input and to its vector, in channels."""
    network = section.get("network", {})
    match section["kind"]:
        case "text":
            return dict(context=network["width"])
        case "clip":
            pooled = network["projection"] or network["width"]
            return dict(context=network["width"], vector=pooled if section.get("pooled") else 0)
        case "class":
            return {section.get("output", "context"): network["embed_dim"]}
        case "sizes":
            return dict(vector=sum(SIZE_WIDTHS[field] for field in section["fields"]))
        case "masked_image":
            return dict(concat=1 + section["channels"])
        case "array":
            own = section["shape"][-1] if section["shape"] else 0  # a label is embedded by the UNet
            return {section["output"]: network.get("width") or network.get("out_channels") or own}


@pytest.mark.parametrize("name", DIFFUSION)
def test_parts_fit(name):
    config = published(name)
    unet, stage = config["unet"], config["autoencoder"]
    sections = [widths(section) for section in config["conditioning"].values()]
    context, concat, vector = (
        sum(section.get(output, 0) for section in sections)
        for output in ("context", "concat", "vector")
    )
    assert context == unet.get("context_dim", 0)
    assert vector == unet.get("adm_in_channels", 0)
    assert unet["in_channels"] == unet["out_channels"] + concat
    assert unet["out_channels"] == stage.get("embed_dim", unet["out_channels"])

    config = CONFIGS.get_config(name)
    Objective(**config.objective)
    get_sampler(config.sampling.sampler)
    schedule = make_schedule(**config.diffusion.schedule)
    sampling_grid(schedule, config.sampling.steps, config.diffusion.spacing)
    learning_rate(config.optimizer, config.train.steps)


def keys(config, *left_out):
    """The settings of a config, so that every one can be changed on a command line."""
    return {
        f"{section}.{key}" if isinstance(value, dict) else section
        for section, value in config.items()
        if section not in left_out
        for key in (value if isinstance(value, dict) else [""])
    }


@pytest.fixture
def own_config(root):
    def own_config(name):
        return config_dict(config_file(root / "configs" / f"{name}.py").get_config())

    return own_config


@pytest.mark.parametrize("name", CONFIGS.VARIANTS)
def test_settings_are_those_of_our_own_configs(name, own_config):
    config = published(name)
    own = own_config({"autoencoder": "autoencoder", "diffusion": "txt2img"}[config["task"]])
    about_the_model = ("unet", "autoencoder", "conditioning", "diffusion")
    optional = {"sampling.labels"}
    optional |= {f"loss.{name}_weight" for name in ("kl", "codebook", "revival")}
    assert keys(config, *about_the_model) - optional == keys(own, *about_the_model) - optional


def test_every_variant_is_counted_and_in_the_docstring():
    upsamplers = {"adm-64-256", "adm-128-512"}  # nothing makes their condition of a picture
    models = AUTOENCODERS.keys() | MODELS.keys() | RECIPES.keys()
    assert CONFIGS.VARIANTS.keys() == models - upsamplers
    words = CONFIGS.__doc__.replace(",", " ").split()
    assert [name for name in CONFIGS.VARIANTS if name not in words] == []


def test_mlperf_s_recipe():
    """Facts of mlcommons/training, retired_benchmarks/stable_diffusion."""
    config, model = CONFIGS.get_config("mlperf_sd2"), RECIPES["mlperf_sd2"]
    assert unet_size(UNet(**model.unet)) == (model.networks["unet"], UNET_TENSORS["sd2"])
    assert size(*conditioner(model.conditions["text"])) == (model.networks["text"], 372)
    differs = {k for k, v in model.unet.items() if MODELS["sd2"].unet.get(k) != v}
    assert differs == {"groups"} and config.unet.groups == 16
    assert config.autoencoder.scale_factor == 0.18215 and config.data.image_size == 512
    assert config.conditioning.text.dropout == 0 and config.trainable == ("^unet/",)
    schedule = dict(name="linear", timesteps=1000, start=0.00085, end=0.012)
    assert config.diffusion.schedule.to_dict() == schedule | dict(zero_terminal_snr=False)
    assert config.diffusion.parameterization == "v"
    optimizer, train = config.optimizer, config.train
    assert (optimizer.b1, optimizer.b2, optimizer.weight_decay) == (0.9, 0.999, 0.01)
    rate = learning_rate(optimizer, train.steps)
    assert rate(2000) == rate(4999) == pytest.approx(6.4e-5) and rate(500) < 0.51 * 6.4e-5
    assert train.ema_decay == 0 and train.batch_size * train.steps == 2_560_000


def test_unknown_variant_is_refused_with_a_list():
    with pytest.raises(ValueError, match="no variant 'sd3' of published: choose kl-f4, .*, sd1, "):
        CONFIGS.get_config("sd3")


def test_a_changed_config_leaves_the_next_one_as_it_was():
    config = CONFIGS.get_config("sd1")
    config.unet.context_dim = 1
    config.conditioning.text.network.width = 1
    assert CONFIGS.get_config("sd1").unet.context_dim == 768
    assert CONFIGS.get_config("sd1").conditioning.text.network.width == 768
