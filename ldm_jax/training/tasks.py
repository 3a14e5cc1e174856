"""Tasks by name: makes the task of a config for the loop."""

import logging
from pathlib import Path
from typing import Any

import jax
from safetensors.numpy import load_file

from ldm_jax.conditions.kinds import make_embedders
from ldm_jax.conditions.requests import check_guidance
from ldm_jax.data.conditions import check_conditions, check_files, make_conditions
from ldm_jax.data.sources import open_source
from ldm_jax.interop.layout import Imported
from ldm_jax.interop.opening import open_any
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.models.build import Autoencoder, make_autoencoder
from ldm_jax.models.remat import check_remat
from ldm_jax.training import inversion
from ldm_jax.training import mean_flow as mean_flows
from ldm_jax.training.abstract import blank_source, first_stage_shapes
from ldm_jax.training.autoencoder_task import DISCRIMINATOR_LOSSES, AutoencoderTask
from ldm_jax.training.diffusion_task import DiffusionTask
from ldm_jax.training.initialise import check_frozen, loaded_parameters
from ldm_jax.training.latents import IN_MEMORY, LATENTS, LatentSource
from ldm_jax.training.methods import begin, changed_config, read_methods
from ldm_jax.training.precision import compute_type
from ldm_jax.training.prior import with_prior
from ldm_jax.training.state import Params, Task
from ldm_jax.training.text_states import with_states
from ldm_jax.training.trainable import like, merge, split
from ldm_jax.training.workdir import config_dict

log = logging.getLogger(__name__)
PICTURE_AUGMENTS = ("flip", "zoom", "shift", "color", "background", "unit_range")
# Sections that come from the model that training starts from, if the config leaves them empty.
OF_THE_MODEL = ("autoencoder", "unet", "conditioning", "diffusion")


def make_task(config: Any, index: Path | None = None, abstract: bool = False) -> Task:
    """The task `config.task` names, with its data opened.

    `index` is a file that stores the findings in a folder of pictures between starts. With
    `abstract` no data are opened, parameters that do not train are shapes, and the task can only
    be traced: see `abstract.py`.

    Raises:
      ValueError: an unknown task, or a setting that it cannot use.
    """
    compute_type(config)
    check_remat("train.remat", config.train.get("remat", ""))
    if config.task not in TASKS:
        raise ValueError(f"task={config.task!r}: choose one of {', '.join(TASKS)}")
    read_methods(config)  # for its checks
    return TASKS[config.task](config, index, abstract)


def _autoencoder(config: Any, index: Path | None, abstract: bool) -> AutoencoderTask:
    opened = open_any(config.init_from) if config.init_from else None
    config = config.copy_and_resolve_references()
    if not config.autoencoder and opened is not None:
        config.autoencoder = opened.config["autoencoder"]
    if opened is not None:  # an encoder that does not train keeps its latents' scale
        with config.unlocked():
            config.autoencoder.scale_factor = opened.config["autoencoder"]["scale_factor"]
    if config.data.get("buckets"):
        raise ValueError("data.buckets: an autoencoder trains on squares; use buckets in stage 2")
    if config.autoencoder.get("kind") == "tiny":
        raise ValueError(
            "autoencoder.kind='tiny' imitates the latents of a larger autoencoder, which training "
            "from pictures alone cannot do, and distilling one is not supported: load a trained one"
        )
    if config.loss.disc_loss not in DISCRIMINATOR_LOSSES:
        raise ValueError(
            f"loss.disc_loss={config.loss.disc_loss!r}: choose one of "
            f"{', '.join(DISCRIMINATOR_LOSSES)}"
        )
    if not config.loss.lpips:
        log.info("loss.lpips names no file: training without the perceptual term")
    source, held_out = _sources(config, index, abstract)
    task = AutoencoderTask(
        config=config,
        frozen={},
        loaded={},
        source=source,
        held_out=held_out,
        perceptual=load_file(config.loss.lpips) if config.loss.lpips else None,
    )
    fresh = jax.eval_shape(task.fresh, jax.random.key(0))
    loaded, frozen = _start(config, opened, fresh, abstract)
    return task.replace(loaded=loaded, frozen=frozen)


def _diffusion(config: Any, index: Path | None, abstract: bool) -> DiffusionTask:
    if config.latents not in LATENTS:
        raise ValueError(f"latents={config.latents!r}: choose one of {', '.join(LATENTS)}")
    pictures = [name for name in config.data.augment if name in PICTURE_AUGMENTS]
    if pictures and config.latents == "memory":
        raise ValueError(
            f"data.augment: {', '.join(pictures)} would change the pictures, but latents='memory' "
            "encodes each once; use latents='step', or augment captions only"
        )
    if config.data.get("buckets") and config.latents == "memory":
        raise ValueError(
            "data.buckets: latents='memory' keeps latents of one shape; use latents='step'"
        )
    opened = open_any(config.init_from) if config.init_from else None
    config, resolved = _resolved(config, opened)
    methods = read_methods(config)
    config.trainable = methods.trainable or config.trainable
    resolved, given = changed_config(methods, resolved, opened)
    conditions = make_conditions(config.data.conditions)
    embedders = make_embedders(resolved["conditioning"])
    check_conditions(conditions, {e.name: e.needs for e in embedders}, config.data.source)
    check_guidance(embedders, resolved["sampling"]["guidance"])  # previews and sampling
    resolved["autoencoder"], first_stage = _first_stage(config, resolved, opened, abstract)

    source, held_out = _sources(config, index, abstract)
    for kept in ("latents", "text_states"):
        if config[kept] == "memory" and len(source) > IN_MEMORY:
            raise ValueError(
                f"{kept}='memory' keeps at most {IN_MEMORY:,} pictures, and data.source="
                f"{config.data.source!r} has {len(source):,}: use {kept}='step'"
            )
    for pictures in (source, held_out):
        check_files(conditions, pictures)
    _fit_labels(resolved, source.classes)
    model = LatentDiffusion.from_config(
        resolved, compute_type(config), config.train.get("remat", "")
    )
    mean_flow = mean_flows.read_options(config, model)
    _check_pixels(config, source, model.autoencoder)
    side = config.data.image_size // model.autoencoder.downsampling
    shape = (side, side, model.latent_channels)

    def init(key):
        return model.init(key, shape)

    fresh = jax.eval_shape(init, jax.random.key(0))
    loaded, frozen = _start(config, opened, fresh, abstract and not methods)
    params = first_stage_shapes(model) if abstract else jax.device_put(first_stage)
    if not abstract:
        before = merge(loaded, frozen) | {"autoencoder": params}
        described = resolved | {"image_size": config.data.image_size}
        folder = None if index is None else index.with_name("prior")
        source = with_prior(source, config, model, before, described, folder)
    paths = (config.init_from, config.first_stage)
    adapters, frozen, loaded = begin(methods, resolved, init, loaded, frozen, given, paths)
    trains = adapters.networks if adapters else split(fresh, config.trainable)[0]
    if abstract:
        loaded, frozen = jax.eval_shape(lambda: (loaded, frozen))
    embedders = with_states(model.embedders, config.text_states, frozen, trains)
    if config.latents == "memory":
        pixels = bool(conditions) or any("image" in e.needs for e in model.embedders)
        source, held_out = (
            LatentSource(pictures, make_autoencoder(resolved["autoencoder"]), params, pixels)
            for pictures in (source, held_out)
        )
    if methods.inversion and not abstract:  # after latents, for which conditions read pictures
        conditions += inversion.captions(methods.inversion, source)
    frozen = frozen | {"autoencoder": params}
    parts = (config, resolved, model, embedders, frozen, loaded, source, held_out)
    return DiffusionTask(*parts, conditions, adapters, methods.distill, mean_flow)


def _sources(config: Any, index: Path | None, abstract: bool) -> tuple[Any, Any]:
    """The data that training sees and those that are held out."""
    if abstract:
        return blank_source(config.data), blank_source(config.data)
    return tuple(open_source(config.data, split, index) for split in ("train", "held_out"))


def _start(
    config: Any, opened: Imported | None, fresh: Params, abstract: bool
) -> tuple[Params, Params]:
    """(loaded parameters that train, parameters that do not train); `fresh` are shapes of all."""
    trained, frozen = split(fresh, config.trainable)
    if abstract:
        return {}, frozen
    if opened is None:
        check_frozen(frozen, {})
        return {}, {}
    loaded = loaded_parameters(fresh, opened, config.init_from, config.init_networks)
    check_frozen(frozen, loaded)
    return like(loaded, trained), like(loaded, frozen)  # a file may lack a network that trains


def _resolved(config: Any, opened: Imported | None) -> tuple[Any, dict[str, Any]]:
    """The config, completed by the model that training starts from; also as plain values."""
    config, resolved = config.copy_and_resolve_references(), config_dict(config)
    for section in OF_THE_MODEL:
        if section not in ("autoencoder", "conditioning") and not resolved.get(section):
            if opened is None or section not in opened.config:
                raise ValueError(f"{section} is empty: name a model to start from, init_from=PATH")
            resolved[section] = opened.config[section]
    if resolved.get("conditioning") is None:
        resolved["conditioning"] = opened.config["conditioning"]
    if opened is not None:
        of_the_model = opened.config.get("sampling", {})
        resolved["sampling"] = of_the_model | resolved["sampling"]
    if not config.data.image_size:
        if opened is None:
            raise ValueError("data.image_size is 0: name a size, or a model to start from")
        config.data.image_size = opened.config["image_size"]
    return config, resolved


def _first_stage(
    config: Any, resolved: dict[str, Any], opened: Imported | None, abstract: bool
) -> tuple[dict[str, Any], Params]:
    """Section and parameters of the autoencoder whose latents the model works on.

    The first of: `config.first_stage`; the autoencoder of the model that training starts from; for
    a config that does not name an autoencoder, the bundled one.
    """
    wanted = resolved.get("autoencoder")
    if config.first_stage:
        path, found = config.first_stage, open_any(config.first_stage)
    elif wanted and (abstract or wanted.get("kind") == "identity"):
        return wanted, {}
    elif opened is not None and "autoencoder" in opened.params:
        path, found = config.init_from, opened
    elif not wanted:
        path, found = "the bundled autoencoder", open_any()
    else:
        raise ValueError(
            f"this model works on latents of {_latents(wanted)}: name an autoencoder that has "
            "them, first_stage=PATH, or a whole model to start from, init_from=PATH"
        )
    section = found.config["autoencoder"]
    channels = resolved["unet"]["out_channels"]
    if make_autoencoder(section).embed_dim != channels:
        raise ValueError(
            f"{path} has latents of {_latents(section)}, and unet.out_channels is {channels}: name "
            "an autoencoder of such latents, first_stage=PATH"
        )
    if wanted and make_autoencoder(wanted).downsampling != make_autoencoder(section).downsampling:
        raise ValueError(
            f"{path} has latents of {_latents(section)}, and this model needs {_latents(wanted)}"
        )
    return section, found.params.get("autoencoder", {})


def _latents(section: dict[str, Any]) -> str:
    autoencoder = make_autoencoder(section)
    return f"{autoencoder.embed_dim} channels at 1/{autoencoder.downsampling} of the size"


def _check_pixels(config: Any, source: Any, autoencoder: Autoencoder) -> None:
    if autoencoder.in_channels not in (1, 3):
        raise ValueError(
            f"the autoencoder takes pictures of {autoencoder.in_channels} channels; data sources "
            "give three"
        )
    if config.data.image_size % autoencoder.downsampling:
        raise ValueError(
            f"data.image_size={config.data.image_size} is no multiple of the autoencoder's factor "
            f"{autoencoder.downsampling}"
        )
    for height, width in getattr(source, "shapes", ()):
        if height % autoencoder.downsampling or width % autoencoder.downsampling:
            raise ValueError(
                f"data.buckets: pictures of {height} × {width} are no multiple of the "
                f"autoencoder's factor {autoencoder.downsampling}; use a larger data.image_size"
            )


def _fit_labels(resolved: dict[str, Any], classes: tuple[str, ...]) -> None:
    """Sets `n_classes` of 0 to the number of classes and one for "none", and checks the others."""
    for name, section in resolved["conditioning"].items():
        if section["kind"] != "class":
            continue
        network = section["network"]
        if not network["n_classes"]:
            if not classes:
                raise ValueError(
                    f"conditioning.{name}.network.n_classes=0 stands for the number of the data's "
                    "classes, which is not known without the data: give it, and one more for none"
                )
            network["n_classes"], section["null"] = len(classes) + 1, len(classes)
        free = network["n_classes"] - (section.get("null") is not None)
        if len(classes) > free:
            raise ValueError(
                f"the data has {len(classes)} classes, and conditioning.{name}.network.n_classes="
                f"{network['n_classes']} leaves room for {free}"
            )


TASKS = {"autoencoder": _autoencoder, "diffusion": _diffusion}
