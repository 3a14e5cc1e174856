"""T2I-Adapters in every layout and back, and files that are none or are for another model.

`parity/test_t2i_adapter.py` compares them with diffusers'.
"""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from ldm_jax.interop import hints, layout
from ldm_jax.interop.files import open_state, write_safetensors
from ldm_jax.interop.hints import add_control, read_hinted
from ldm_jax.interop.native import save_model
from ldm_jax.interop.recognise import recognise
from ldm_jax.interop.t2i import FILE, PREFIXES, read_t2i, t2i_slots, write_t2i
from ldm_jax.published import MODELS
from tests import tiny_models
from tests.interop.systems import edit
from tests.tiny_models import STABLE

# Its first level has no attention, as in SDXL.
AFTER = tiny_models.config(
    STABLE["conditioning"], context_dim=16, channel_mult=[1, 2, 2], attention_resolutions=[2, 4]
)
FULL = dict(channels=[16, 32], halved=[1], hint_in=3, factor=2, num_res_blocks=2, light=False)
XL = FULL | dict(channels=[16, 32, 32, 32], halved=[2], factor=4)
SECTIONS = {
    "full": (STABLE, FULL),
    "full, with the middle": (STABLE, FULL | dict(channels=[16, 32, 32])),
    "grey": (STABLE, FULL | dict(hint_in=1, num_res_blocks=3)),
    "first level": (STABLE, FULL | dict(channels=[16], halved=[])),
    "light": (STABLE, FULL | dict(channels=[16, 32, 32], light=True, num_res_blocks=1)),
    "xl": (AFTER, XL),
    "xl, without the middle": (AFTER, XL | dict(channels=[16, 32, 32])),
}
ONE = np.ones(1, np.float32)


def random_params(section, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = layout.shapes("t2i", section)
    flat = {path: rng.standard_normal(shape).astype(dtype) for path, shape in shapes.items()}
    return unflatten_dict(flat, sep="/")


def written(tmp_path, name="compvis", section=FULL, **changes):
    """The path of an adapter; in one file tensors are changed, or left out if None."""
    path = tmp_path / ("net" if name == "diffusers" else "net.safetensors")
    write_t2i(path, section, random_params(section), name)
    if changes:
        state = open_state(path)
        tensors = {key: state[key] for key in state}
        tensors |= {key.replace("__", "."): array for key, array in changes.items()}
        kept = {key: array for key, array in tensors.items() if array is not None}
        write_safetensors(path, kept, state.metadata)
    return path


def same(found, params):
    ours, theirs = (flatten_dict(tree, sep="/") for tree in (found, params))
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        assert ours[path].dtype == leaf.dtype
        np.testing.assert_array_equal(ours[path], leaf, path)


# diffusers has no type for a middle that is not halved, and files of the original code are read
# for a model: halved as that is.
@pytest.mark.parametrize("name", PREFIXES)
@pytest.mark.parametrize("case", SECTIONS)
def test_written_and_read_again(case, name, tmp_path):
    config, section = SECTIONS[case]
    if name == "diffusers" and case in ("full, with the middle", "light"):
        with pytest.raises(ValueError, match="layout='diffusers' has no adapter_type for .*use 'n"):
            write_t2i(tmp_path / "net", section, random_params(section), name)
        assert not list(tmp_path.iterdir())
        return
    params = random_params(section)
    write_t2i(tmp_path / "a" / "net", section, params, name)
    found, read = read_hinted(tmp_path / "a" / "net", config)
    assert found == dict(kind="t2i", dropout=0.0, network=section)
    same(read, params)
    if name == "diffusers":
        weights = tmp_path / "a" / "net" / "diffusion_pytorch_model.safetensors"
        assert read_hinted(weights, config)[0] == found


@pytest.mark.parametrize("name", PREFIXES)
def test_half_precision_is_kept(name, tmp_path):
    params = random_params(FULL, ml_dtypes.bfloat16)
    write_t2i(tmp_path / "net", FULL, params, name)
    same(read_t2i(tmp_path / "net", STABLE, "bfloat16")[1], params)


def test_names_of_the_originals(tmp_path):
    """Residual blocks are counted through the levels; those of a light one have their own list."""
    kernels = {k for k in open_state(written(tmp_path, section=FULL)) if k.endswith("weight")}
    blocks = {f"body.{i}.block{j}.weight" for i in range(4) for j in (1, 2)}
    assert kernels == blocks | {"conv_in.weight", "body.2.in_conv.weight"}
    light = written(tmp_path, section=FULL | dict(light=True, num_res_blocks=1))
    kernels = {k for k in open_state(light) if k.endswith("weight")}
    ends = ("in_conv", "body.0.block1", "body.0.block2", "out_conv")
    assert kernels == {f"body.{i}.{end}.weight" for i in (0, 1) for end in ends}


def test_a_run(tmp_path):
    written(tmp_path, "native").rename(tmp_path / FILE)
    same(read_hinted(tmp_path, STABLE)[1], random_params(FULL))


def test_it_is_added_with_its_scale(tmp_path):
    path = written(tmp_path)
    params = {"unet": {"out_2": {"bias": ONE}}}
    for scale in (1.0, 0.25):
        config, changed = add_control(path, STABLE, params, scale)
        assert config["conditioning"]["control"]["kind"] == "t2i"
        assert changed["control"].pop("scale") == np.float32(scale)
        same(changed["control"], random_params(FULL))
    config, changed = add_control(path, config, changed)
    assert {"control", "control_2"} < changed.keys()
    with pytest.raises(ValueError, match="scale=nan: choose a finite number"):
        add_control(path, STABLE, params, np.nan)
    with pytest.raises(ValueError, match="already has a condition 'text'; choose another"):
        add_control(path, STABLE, params, name="text")


# What is none, or is another's.


@pytest.mark.parametrize("name", PREFIXES)
@pytest.mark.parametrize("fields, message", [
    (dict(channels=[16, 48]), "is for a model whose levels have 16, 48 channels, and .* 16, 32$"),
    (dict(channels=[16, 32, 32, 64], halved=[1, 2, 3]), "16, 32, 32, 64 channels, .* 16, 32, 32$"),
    (dict(factor=4), "(levels are 4, 8 times smaller than the picture, and .* are 2, 4 times"
                     "|a value for 48 numbers of the hint, and this one's for 4, or 12 in colour)"),
])  # fmt: skip
def test_of_another_model(name, fields, message, tmp_path):
    path = written(tmp_path, name, FULL | fields)
    with pytest.raises(ValueError, match=message):
        read_hinted(path, STABLE)


@pytest.mark.parametrize("name", ["native", "diffusers"])
def test_levels_that_shrink_elsewhere(name, tmp_path):
    path = written(tmp_path, name, XL | dict(channels=[16, 32], halved=[], factor=2))
    with pytest.raises(ValueError, match="whose levels are 2, 2 times smaller .* are 2, 4 times"):
        read_hinted(path, STABLE)


def test_the_published_model_is_named(tmp_path):
    """By a folder's JSON, and by the tensors' shapes alone."""
    xl, stable = (
        dict(autoencoder=dict(m.autoencoder.fields), unet=m.unet, conditioning={})
        for m in (MODELS["sdxl-base"], MODELS["sd1"])
    )
    base = dict(_class_name="T2IAdapter", channels=[320, 640, 1280, 1280])
    about = tmp_path / "config.json"
    about.write_text(json.dumps(base))
    with pytest.raises(ValueError, match="are 8, 16, 32, 64 times .* such as Stable Diffusion 1, "):
        read_hinted(tmp_path, xl)
    about.write_text(json.dumps(base | dict(adapter_type="full_adapter_xl", downscale_factor=16)))
    with pytest.raises(ValueError, match="are 16, 16, 32, 32 times .* such as Stable Diffusion XL"):
        read_hinted(tmp_path, stable)
    section = dict(FULL, channels=[320, 640, 1280, 1280], halved=[1, 2, 3], factor=8)
    tensors = {
        name: np.broadcast_to(np.zeros((), np.float16), slot.foreign)
        for slot in t2i_slots(section, "compvis").values()
        for name in slot.names
    }
    found = Shaped(tensors)
    message = (
        "for 192 numbers of the hint, such as Stable Diffusion 1, and this one's for 256, or 768"
    )
    with pytest.raises(ValueError, match=message):
        hints.t2i._in_tensors(found, "compvis", xl)
    read = hints.t2i._in_tensors(found, "compvis", stable)
    assert read == section


class Shaped(dict):
    """Tensors of which the shapes are asked for."""

    def shape(self, name):
        return self[name].shape


@pytest.mark.parametrize("changes, message", [
    (dict(adapter_type="style_adapter"), "config.json: adapter_type='style_adapter' is not supp"),
    (dict(channels=[]), r"channels=\[\] is not supported: expected a list of numbers above 0"),
    (dict(channels=[16, "a"]), r"channels=\[16, 'a'\] is not supported"),
    (dict(downscale_factor=0), "downscale_factor=0 is not supported: expected a number above 0"),
    (dict(num_res_blocks=None), "num_res_blocks=None is not supported"),
    (dict(_class_name="MultiT2IAdapter"), "_class_name='MultiT2IAdapter' is not supported: expec"),
])  # fmt: skip
def test_json(changes, message, tmp_path):
    path = written(tmp_path, "diffusers")
    edit(path / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        read_hinted(path, STABLE)


@pytest.mark.parametrize("name, message", [
    ("spatial_feat_mapping.0.1.weight", "is the fuser of several T2I-Adapters .CoAdapter., which"),
    ("style_embedding", "is T2I-Adapter's style adapter, .*, which is not supported"),
    ("body.0.block1.bias", "lacks the tensor body.0.block1.weight"),
    ("a", "holds no ControlNet: looked for"),
])  # fmt: skip
def test_files_of_something_else(name, message, tmp_path):
    write_safetensors(tmp_path / "other.safetensors", {name: ONE})
    with pytest.raises(ValueError, match=f"other.safetensors .*{message}"):
        read_hinted(tmp_path / "other.safetensors", STABLE)


def test_of_no_use_to_this_reader(tmp_path):
    write_safetensors(tmp_path / "other.safetensors", {"a": ONE})
    with pytest.raises(ValueError, match="holds no T2I-Adapter: looked for body.0.* found 1 "):
        read_t2i(tmp_path / "other.safetensors", STABLE)
    save_model(tmp_path / "model.safetensors", STABLE, {"unet": {"out_2": {"bias": ONE}}})
    with pytest.raises(ValueError, match="holds no T2I-Adapter, but a model of ldm_jax"):
        read_t2i(tmp_path / "model.safetensors", STABLE)
    with pytest.raises(ValueError, match="a T2I-Adapter is for whole models with a UNet"):
        read_t2i(tmp_path / "model.safetensors", dict(task="autoencoder"))
    with pytest.raises(FileNotFoundError, match="no ControlNet at .*none: there is no such"):
        read_hinted(tmp_path / "none", STABLE)
    with pytest.raises(ValueError, match="layout='peft': choose one of native, diffusers, compv"):
        write_t2i(tmp_path / "peft", FULL, random_params(FULL), "peft")
    path = written(tmp_path, "diffusers")
    with pytest.raises(FileExistsError, match="net exists and is not empty"):
        write_t2i(path, FULL, random_params(FULL), "diffusers")


@pytest.mark.parametrize("layout, name", [
    ("compvis", "body.3.block2.weight"),
    ("native", "t2i/body_1_resnets_1_block2/kernel"),
])  # fmt: skip
def test_tensors_that_are_missing_misshapen_or_broken(layout, name, tmp_path):
    right = open_state(written(tmp_path, layout))[name]
    for array, message in (
        (None, f"the T2I-Adapter is not whole: {name} is missing"),
        (np.ones((3, 3), np.float32), f"{name}: expected .*, found .3, 3."),
        (np.full_like(right, np.nan), f"{name} holds NaN or infinity"),
    ):
        path = written(tmp_path, layout, **{name: array})
        with pytest.raises(ValueError, match=message):
            read_hinted(path, STABLE)


@pytest.mark.parametrize("name", ["compvis", "diffusers"])
@pytest.mark.parametrize("section", [FULL, FULL | dict(light=True)])
def test_a_model_was_expected(name, section):
    state = {
        PREFIXES[name] + called: jax.ShapeDtypeStruct(slot.foreign, np.float32)
        for slot in t2i_slots(section, name).values()
        for called in slot.names
    }
    with pytest.raises(ValueError, match="a T2I-Adapter: .* beside a model, --control=PATH:HINT"):
        recognise(state)
