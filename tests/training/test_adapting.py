"""Every variant of every config that starts from a model: data, two steps, export, load, draw.

On a folder of small pictures. One of each method is trained; the others, which differ from it or
from those of test_resuming in the model, the text encoders or the numbers, are traced. The variants
scenes, and smoke, the same for fewer steps, are trained in tests of their own: test_adapters,
test_inversion, test_control, test_t2i, test_distillation and test_resuming.
"""

from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import ldm_jax
from ldm_jax.interop.native import save_model
from ldm_jax.training.loop import train
from ldm_jax.training.tasks import make_task
from tests import tiny_models
from tests.conftest import ROOT
from tests.models.published import config_file
from tests.training.variants import photographs

FILES = ("finetune", "lora", "dreambooth", "textual_inversion", "controlnet", "distill")
SIDE = 16
MODELS = {"sdxl": tiny_models.XL}  # by variant; of the others
MODEL = tiny_models.config(
    tiny_models.STABLE["conditioning"],
    channel_mult=[1, 2],
    attention_resolutions=[1],
    context_dim=16,
)
TRACED = (
    *(("finetune", "", ""), ("textual_inversion", "sdxl", ""), ("distill", "lora", "")),
    *(("lora", "sd15", ""), ("lora", "sdxl", ""), ("dreambooth", "lora", "")),
    *(("dreambooth", "sd15", ""), ("dreambooth", "sdxl", "")),
    *(("textual_inversion", "sd15", ""), ("controlnet", "sd15", ""), ("controlnet", "sdxl", "t2i")),
    *(("distill", "sd15", ""), ("distill", "sdxl", "")),
)


def variants():
    """(file, variant, changes) of every one; of a ControlNet also those of a T2I-Adapter."""
    found = []
    for file in FILES:
        names = getattr(config_file(ROOT / "configs" / f"{file}.py"), "VARIANTS", {"": None})
        names = [name for name in names if name not in ("scenes", "smoke")]
        found += [(file, name, "") for name in names]
        found += [(file, name, "t2i") for name in names if file == "controlnet"]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models, and pictures with captions and hints."""
    path = tmp_path_factory.mktemp("adapting")
    for name, model in (("", MODEL), *MODELS.items()):
        save_model(path / f"base{name}.safetensors", model, tiny_models.random_params(model))
    pictures = photographs(path / "pictures", 24)
    for picture in list(pictures.rglob("*.jpg")):
        with Image.open(picture) as image:
            image.convert("L").save(picture.with_suffix(".control.png"))
        picture.with_suffix(".txt").write_text("a <mine> on a table")
    return path


def reduced(folder: Path, file: str, variant: str, kind: str):
    get_config = config_file(ROOT / "configs" / f"{file}.py").get_config
    config = get_config(variant) if variant else get_config()
    config.init_from = str(folder / f"base{variant if variant in MODELS else ''}.safetensors")
    config.train.update(steps=2, batch_size=8, log_every=1, preview_every=2, checkpoint_every=2)
    config.data.update(source="folder", path=str(folder / "pictures"), held_out=0.2)
    config.data.image_size = SIDE
    if "prior" in config and config.prior.prompt:
        config.prior.count = 8
    if "adapters" in config:
        config.adapters.rank = 2
        targets = config.adapters.targets  # of small convolutions no rank is small enough
        own = (target if "text" in target else r"^unet/.*/attn[12]/" for target in targets)
        config.adapters.targets = tuple(own)
    if "inversion" in config:
        config.inversion.start = "apple"
    if kind:
        config.control.kind = kind
    config.sampling.steps = 2
    return config


@pytest.mark.long
@pytest.mark.parametrize("file, variant, kind", [v for v in variants() if v not in TRACED])
def test_variant(folder, tmp_path, file, variant, kind):
    config = reduced(folder, file, variant, kind)
    metrics = train(config, tmp_path)
    assert not metrics or np.isfinite(metrics["loss"])
    pipe = ldm_jax.load(tmp_path)
    hint = np.random.default_rng(0).uniform(size=(SIDE, SIDE, 3)).astype(np.float32)
    told = {"control": hint} if file == "controlnet" else None
    prompt = "a <mine> on a table" if file == "textual_inversion" else "a dog on a table"
    picture = pipe(prompt, conditions=told, steps=2)
    assert picture.shape == (1, SIDE, SIDE, 3) and np.isfinite(picture).all() and picture.std() > 0


@pytest.mark.long
@pytest.mark.parametrize("file, variant, kind", TRACED)
def test_variant_by_shape(folder, file, variant, kind):
    config = reduced(folder, file, variant, kind)
    if "prior" in config:
        config.prior.prompt = ""  # its pictures are drawn when training starts
    task, key = make_task(config), jax.random.key(0)
    params = jax.eval_shape(task.init, key, task.loaded)
    _, batch = next(task.batches(0))
    grads, metrics = jax.eval_shape(
        lambda *arguments: task.gradients(*arguments, None), params, task.frozen, batch, key
    )
    assert jax.tree.map(np.shape, grads) == jax.tree.map(np.shape, params)
    assert metrics["loss"].shape == ()


def test_every_config_that_starts_from_a_model_is_here():
    """Those of which a variant is empty of networks."""
    others = {"autoencoder", "published", "common", "__init__"}
    for path in (ROOT / "configs").glob("*.py"):
        if path.stem in others:
            continue
        module = config_file(path)
        first = next(iter(getattr(module, "VARIANTS", {}).values()), module.get_config)()
        assert (path.stem in FILES) == (not first.get("unet")), path.stem
