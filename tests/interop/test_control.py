"""ControlNets in every layout and back, and files that are none or are for another model.

`parity/test_controlnet.py` compares them with diffusers'.
"""

import functools
import json
import logging

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from ldm_jax.interop import control, diffusers
from ldm_jax.interop.control import FILE, PREFIXES, control_slots, read_control, write_control
from ldm_jax.interop.fields import canonical
from ldm_jax.interop.files import open_state, write_safetensors
from ldm_jax.interop.native import save_model
from ldm_jax.interop.recognise import recognise
from ldm_jax.models.build import tuples
from ldm_jax.models.controlnet import ControlNet
from ldm_jax.models.unet import UNet
from ldm_jax.published import STABLE_2
from tests import tiny_models
from tests.interop.systems import edit
from tests.tiny_models import INPAINTING, STABLE, UNCONDITIONAL, XL

LINEAR = tiny_models.config(
    STABLE["conditioning"], context_dim=16, use_linear_in_transformer=True, num_heads=[1, 2]
)
CONFIGS = dict(stable=STABLE, linear=LINEAR, xl=XL)
HINTS = dict(hint_in=3, hint_channels=[6, 10], bgr=False)
SINGLE = ("native", "compvis")


@pytest.fixture(scope="module", autouse=True)
def shapes_once():
    """Tracing is most of the time."""
    trace = control.shapes
    cached = functools.cache(lambda network, fields: trace(network, json.loads(fields)))
    patch = pytest.MonkeyPatch()
    patch.setattr(control, "shapes", lambda network, fields: cached(network, json.dumps(fields)))
    yield
    patch.undo()


def section_of(config, **fields):
    return HINTS | fields | dict(unet=dict(config["unet"]))


def random_params(section, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = control.shapes("control", section)
    flat = {path: rng.standard_normal(shape).astype(dtype) for path, shape in shapes.items()}
    return unflatten_dict(flat, sep="/")


def written(tmp_path, layout="compvis", config=STABLE, section=None, **changes):
    """The path of a ControlNet; in one file tensors are changed, or left out if None."""
    section = section or section_of(config)
    path = tmp_path / ("net" if layout == "diffusers" else "net.safetensors")
    write_control(path, section, random_params(section), layout)
    if changes:
        rewrite(path, {name.replace("__", "."): array for name, array in changes.items()})
    return path


def rewrite(path, changes, rename=lambda name: name):
    state = open_state(path)
    tensors = {rename(name): state[name] for name in state} | changes
    kept = {name: array for name, array in tensors.items() if array is not None}
    write_safetensors(path, kept, state.metadata)


def same(found, params):
    ours, theirs = (flatten_dict(tree, sep="/") for tree in (found, params))
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        assert ours[path].dtype == leaf.dtype
        np.testing.assert_array_equal(ours[path], leaf, path)


@pytest.mark.parametrize("layout", PREFIXES)
@pytest.mark.parametrize("name", CONFIGS)
def test_written_and_read_again(name, layout, tmp_path):
    config = CONFIGS[name]
    section = section_of(config)
    params = random_params(section)
    write_control(tmp_path / "a" / "net", section, params, layout)
    found, read = read_control(tmp_path / "a" / "net", config)
    same(read, params)
    assert json.loads(json.dumps(found)) == found
    assert {key: found[key] for key in HINTS} == HINTS
    assert canonical(dict(unet=found["unet"])) == canonical(dict(unet=config["unet"]))
    module = ControlNet(UNet(**tuples(found.pop("unet"))), **tuples(found))
    assert module.factor == 2


@pytest.mark.parametrize("layout", PREFIXES)
def test_half_precision_is_kept(layout, tmp_path):
    section = section_of(STABLE)
    params = random_params(section, ml_dtypes.bfloat16)
    write_control(tmp_path / "net", section, params, layout)
    same(read_control(tmp_path / "net", STABLE, "bfloat16")[1], params)


def test_a_model_without_context_in_our_file_and_in_the_original_layout(tmp_path):
    config = UNCONDITIONAL
    section = section_of(config)
    params = random_params(section)
    for layout in SINGLE:
        write_control(tmp_path / layout, section, params, layout)
        same(read_control(tmp_path / layout, config)[1], params)
    with pytest.raises(ValueError, match="unet.context_dim=None: no ControlNet of diffusers has"):
        write_control(tmp_path / "folder", section, params, "diffusers")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(SINGLE)


def test_the_order_of_colours(tmp_path):
    section = section_of(STABLE, bgr=True, hint_in=4)
    params = random_params(section)
    for layout in ("native", "diffusers"):
        write_control(tmp_path / layout, section, params, layout)
        found = read_control(tmp_path / layout, STABLE)[0]
        assert (found["bgr"], found["hint_in"]) == (True, 4)
    about = json.loads((tmp_path / "diffusers" / "config.json").read_text())
    assert about["controlnet_conditioning_channel_order"] == "bgr"
    with pytest.raises(ValueError, match="layout='compvis' has no place for bgr=True"):
        write_control(tmp_path / "compvis", section, params, "compvis")
    with pytest.raises(ValueError, match="layout='peft': choose one of native, diffusers, compv"):
        write_control(tmp_path / "peft", section, params, "peft")
    with pytest.raises(FileExistsError, match="diffusers exists and is not empty"):
        write_control(tmp_path / "diffusers", section, params, "diffusers")


@pytest.mark.parametrize("layout", PREFIXES)
def test_inpainting_controls_the_latents_alone(layout, tmp_path):
    """The model's UNet takes nine channels, its ControlNet four or nine."""
    for channels in (4, 9):
        config = INPAINTING | dict(unet=INPAINTING["unet"] | dict(in_channels=channels))
        section = section_of(config)
        params = random_params(section)
        path = tmp_path / f"net{channels}"
        write_control(path, section, params, layout)
        found, read = read_control(path, INPAINTING)
        assert (found["unet"]["in_channels"], found["unet"]["out_channels"]) == (channels, 4)
        same(read, params)
    with pytest.raises(ValueError, match="takes latents of 9 channels, and this model's have 4"):
        read_control(path, STABLE)


def test_outputs_are_the_models(tmp_path):
    """diffusers' JSON does not have them."""
    config = dict(unet=STABLE["unet"] | dict(in_channels=3, out_channels=3))
    for layout in PREFIXES:
        found = read_control(written(tmp_path / layout, layout, config), config)[0]
        assert found["unet"]["out_channels"] == 3


def test_a_run_beside_other_files(tmp_path):
    path = written(tmp_path, "native")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"task": "diffusion"}')
    with pytest.raises(FileNotFoundError, match=f"no ControlNet in .*/run: it has neither {FILE}"):
        read_control(tmp_path / "run", STABLE)
    path.rename(tmp_path / "run" / FILE)
    same(read_control(tmp_path / "run", STABLE)[1], random_params(section_of(STABLE)))


@pytest.mark.parametrize("named", ["control_model.", ""])
def test_beside_a_whole_model_and_without_prefix(named, tmp_path, caplog):
    """The first release of the originals contains the model; others omit the prefix."""
    path = written(tmp_path)
    old = PREFIXES["compvis"]
    other = {"model.diffusion_model.out.0.bias": np.zeros(3, np.float32)} if named else {}
    rewrite(path, other, lambda name: name.replace(old, named))
    with caplog.at_level(logging.WARNING):
        same(read_control(path, STABLE)[1], random_params(section_of(STABLE)))
    assert not caplog.records


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_of_diffusers_without_their_json(name, tmp_path):
    folder = written(tmp_path, "diffusers", CONFIGS[name])
    found, params = read_control(folder / "diffusion_pytorch_model.safetensors", CONFIGS[name])
    assert found == section_of(CONFIGS[name])
    same(params, random_params(section_of(CONFIGS[name])))


def test_half_precision_variant_and_shards(tmp_path):
    folder = written(tmp_path, "diffusers")
    stem, params = "diffusion_pytorch_model", random_params(section_of(STABLE))
    whole = (folder / f"{stem}.safetensors").rename(folder / f"{stem}.fp16.safetensors")
    same(read_control(folder, STABLE)[1], params)
    state, files = open_state(whole), {}
    for i in range(2):
        part = {name: state[name] for name in list(state)[i::2]}
        write_safetensors(folder / f"{stem}-{i}.safetensors", part)
        files |= dict.fromkeys(part, f"{stem}-{i}.safetensors")
    whole.unlink()
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps(dict(weight_map=files)))
    same(read_control(folder, STABLE)[1], params)


def test_a_guided_models_control_lacks_the_guidance(tmp_path):
    """A ControlNet of Stable Diffusion is used with its guidance-distilled UNet."""
    guided = STABLE | dict(unet=STABLE["unet"] | dict(time_cond_proj_dim=12))
    for layout in PREFIXES:
        path = written(tmp_path / layout, layout)
        assert "time_cond_proj_dim" not in read_control(path, guided)[0]["unet"]
    section = section_of(guided)
    path = written(tmp_path / "own", "compvis", section=section)
    assert read_control(path, guided)[0]["unet"]["time_cond_proj_dim"] == 12
    with pytest.raises(ValueError, match="unet.time_cond_proj_dim: no ControlNet of diffusers"):
        write_control(tmp_path / "guided", section, random_params(section), "diffusers")


def test_shallower_attention_is_described_by_the_json(tmp_path):
    """diffusers' smaller ControlNets of SDXL have less attention than their model."""
    unet = XL["unet"] | dict(attention_resolutions=[2], transformer_depth=1)
    section = HINTS | dict(unet=unet)
    params = random_params(section)
    for layout in ("native", "diffusers"):
        write_control(tmp_path / layout, section, params, layout)
        same(read_control(tmp_path / layout, XL)[1], params)


def test_attention_at_a_size_of_heads(tmp_path):
    config = tiny_models.config(
        STABLE["conditioning"], context_dim=16, num_heads=-1, num_head_channels=8
    )
    for layout in PREFIXES:
        found = read_control(written(tmp_path / layout, layout, config), config)[0]
        assert found["unet"]["num_head_channels"] == 8


# What is none, or is another's.

OTHER_BASES = [
    (dict(context_dim=24), "is for a model with context_dim=24, and this one has 16"),
    (dict(channel_mult=[1, 3]), r"whose way down has 3 × 16, 48 channels, .* has 3 × 16, 32$"),
    (dict(num_res_blocks=2), r"whose way down has 4 × 16, 2 × 32 channels, and"),
    (dict(channel_mult=[1, 2, 2], attention_resolutions=[1, 2, 4]), r"3 × 16, 3 × 32 channels"),
]


@pytest.mark.parametrize("layout", [*PREFIXES, "weights"])
@pytest.mark.parametrize("fields, message", OTHER_BASES)
def test_of_another_model(layout, fields, message, tmp_path):
    section = HINTS | dict(unet=STABLE["unet"] | fields)
    path = written(tmp_path, layout if layout != "weights" else "diffusers", section=section)
    path = path / "diffusion_pytorch_model.safetensors" if layout == "weights" else path
    with pytest.raises(ValueError, match=message):
        read_control(path, STABLE)


@pytest.mark.parametrize("layout", ["compvis", "diffusers"])
def test_attention_elsewhere(layout, tmp_path):
    section = HINTS | dict(unet=STABLE["unet"] | dict(attention_resolutions=[2]))
    path = written(tmp_path, layout, section=section)
    path = path / "diffusion_pytorch_model.safetensors" if layout == "diffusers" else path
    message = r"with attention in the input blocks \[3\], and this one has it in \[1, 3\]"
    with pytest.raises(ValueError, match=message):
        read_control(path, STABLE)


def test_the_published_model_is_named(tmp_path):
    """The base is compared before the weights are opened."""
    about = diffusers.unets.control_to(HINTS | dict(unet=STABLE_2), vector="")
    (tmp_path / "config.json").write_text(json.dumps(about))
    message = "context_dim=1024, such as Stable Diffusion 2, and this one has 16"
    with pytest.raises(ValueError, match=message):
        read_control(tmp_path, STABLE)
    edit(tmp_path / "config.json", cross_attention_dim=16)
    with pytest.raises(ValueError, match=r"way down has 4 × 320, 3 × 640, 5 × 1280 channels, and"):
        read_control(tmp_path, STABLE)


@pytest.mark.parametrize("changes, message", [
    (dict(num_class_embeds=10), "for a model with num_classes=10, and this one has None"),
    (dict(in_channels=8), "takes latents of 8 channels, and this model's have 4"),
    (dict(conditioning_embedding_out_channels=[6, 8, 10]), "takes hints 4 times the size of the"),
    (dict(global_pool_conditions=True), "config.json: global_pool_conditions=True is not support"),
    (dict(mid_block_type="UNetMidBlock2D"), "mid_block_type='UNetMidBlock2D' is not supported"),
    (dict(controlnet_conditioning_channel_order="hsv"), "expected 'rgb' or 'bgr'"),
    (dict(_class_name="ControlNetUnionModel"), "_class_name='ControlNetUnionModel' is not support"),
    (dict(_class_name="UNet2DConditionModel"), "'UNet2DConditionModel' .* 'ControlNetModel'"),
])  # fmt: skip
def test_json(changes, message, tmp_path):
    path = written(tmp_path, "diffusers")
    edit(path / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        read_control(path, STABLE)


ONE = np.ones(1, np.float32)


@pytest.mark.parametrize("name, message", [
    ("task_embedding", "is a union of ControlNets in one network, which is not supported"),
    ("control_model.task_embedding", "is a union of ControlNets in one network, which is not"),
    ("down_blocks.0.ctrl_to_base.0.weight", "is a ControlNet-XS, which is not supported"),
    ("down_blocks.0.motion_modules.0.norm.bias", "is a SparseCtrl, for videos, which is not"),
    ("lora_controlnet", "is a Control-LoRA, which is not supported .it has lora_controlnet"),
    ("lllite_unet_input_blocks_1.down.0.weight", "is a ControlNet-LLLite"),
    ("difference", "stored as the difference from its model, which is not supported"),
    ("lora_unet_mid_block.lora_up.weight", "holds no ControlNet, but a LoRA .it has"),
    ("model.diffusion_model.out.0.weight", "holds no ControlNet, but a whole model or its UNet"),
    ("input_blocks.0.0.weight", "holds no ControlNet, but a UNet .it has input_blocks.0.0.weight"),
    ("conv_in.weight", "holds no ControlNet, but one network of a diffusers folder .it has conv"),
    ("control_model.out", "no whole ControlNet: control_model.input_hint_block.0.weight is miss"),
    ("controlnet_mid_block.bias", "no whole ControlNet: controlnet_cond_embedding.conv_in.weight"),
    ("a", "looked for input_hint_block.0.weight and .* found 1 tensors, such as a"),
])  # fmt: skip
def test_files_of_something_else(name, message, tmp_path):
    write_safetensors(tmp_path / "other.safetensors", {name: ONE})
    with pytest.raises(ValueError, match=f"other.safetensors .*{message}"):
        read_control(tmp_path / "other.safetensors", STABLE)


def test_relatives_are_told_from_whole_files(tmp_path):
    path = written(tmp_path, "compvis", control_model__task_embedding=ONE)
    with pytest.raises(ValueError, match="a union of ControlNets"):
        read_control(path, STABLE)


def test_shuffle_by_its_name(tmp_path):
    path = written(tmp_path)
    for name in ("control_v11e_sd15_shuffle.pth", "control_v11e_sd15_shuffle_fp16.safetensors"):
        path = path.rename(tmp_path / name)
        with pytest.raises(ValueError, match="averaged over the picture: that is not supported"):
            read_control(path, STABLE)
    read_control(path.rename(tmp_path / "my_shuffled.safetensors"), STABLE)


def test_our_file_of_a_model(tmp_path):
    save_model(tmp_path / "model.safetensors", STABLE, {"unet": {"out_2": {"bias": ONE}}})
    with pytest.raises(ValueError, match="holds no ControlNet, but a model of ldm_jax"):
        read_control(tmp_path / "model.safetensors", STABLE)


def test_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="no ControlNet at .*/none: there is no such"):
        read_control(tmp_path / "none", STABLE)
    written(tmp_path, "diffusers").rename(tmp_path / "controlnet")
    with pytest.raises(FileNotFoundError, match="no ControlNet in .*; there is one in .*/control"):
        read_control(tmp_path, STABLE)
    with pytest.raises(ValueError, match="for models with a UNet; this one has none"):
        read_control(tmp_path, dict(task="autoencoder"))


@pytest.mark.parametrize("layout, name", [
    ("compvis", "control_model.middle_block_out.0.weight"),
    ("native", "control/middle_block_out_0/kernel"),
])  # fmt: skip
def test_tensors_that_are_missing_misshapen_or_broken(layout, name, tmp_path):
    path = written(tmp_path, layout)
    right = open_state(path)[name]
    for array, message in (
        (None, f"the ControlNet is not whole: {name} is missing"),
        (np.ones((3, 3), np.float32), f"{name}: expected .*, found .3, 3."),
        (np.full_like(right, np.nan), f"{name} holds NaN or infinity"),
    ):
        rewrite(path, {name: array})
        with pytest.raises(ValueError, match=message):
            read_control(path, STABLE)


def test_unused_tensors_are_logged(tmp_path, caplog):
    path = written(tmp_path, "compvis", control_model__more=ONE)
    read_control(path, STABLE)
    assert "1 tensors are not used, such as control_model.more" in caplog.text


@pytest.mark.parametrize("prefix", ["control_model.", ""])
def test_a_model_was_expected(prefix):
    section = section_of(STABLE)
    state = {
        prefix + name: jax.ShapeDtypeStruct(slot.foreign, np.float32)
        for slot in control_slots(section, "compvis").values()
        for name in slot.names
    }
    with pytest.raises(ValueError, match="a ControlNet: .* beside a model, --control=PATH:HINT"):
        recognise(state)
