"""Foreign tensors as our leaves and back, against what the references call and compute."""

import dataclasses
import functools
import json
import tracemalloc
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from ldm_jax.interop.files import open_state, write_safetensors
from ldm_jax.interop.layout import LAYOUTS, read_params, shapes, slots, write_params
from ldm_jax.interop.networks import networks
from ldm_jax.interop.reports import Report
from ldm_jax.models.blocks import AttentionBlock
from ldm_jax.models.text import TextTransformer
from ldm_jax.models.unet import UNet
from scripts.write_goldens import random_weights, uniform
from tests.interop.make_names import GOLDEN, TOKENS
from tests.interop.systems import SYSTEMS, system
from tests.models.conftest import distance, run_once
from tests.models.test_autoencoder import NETWORKS as AUTOENCODERS
from tests.models.test_autoencoder import SMALL as AUTOENCODER
from tests.models.test_clip import COMMON
from tests.models.test_clip import NETWORKS as CLIPS
from tests.models.test_unet import NETWORKS as UNETS
from tests.models.test_unet import RULES
from tests.models.test_vq import SMALL as VQ
from tests.models.torch_layout import AUTOENCODER as AUTOENCODER_RULES
from tests.models.torch_layout import TEXT, TINY_AUTOENCODER, convert
from tests.models.torch_layout import UNET as UNET_RULES

MODELS = Path(__file__).parents[1] / "models" / "golden"


def fields_of(module):
    """A module's fields as a config has them."""
    fields = {field.name: getattr(module, field.name) for field in dataclasses.fields(module)}
    return {k: v for k, v in fields.items() if k not in ("name", "parent", "dtype", "param_dtype")}


UNET = dict(model_channels=32, channel_mult=(1, 2), in_channels=5, out_channels=3)
TINY = dict(kind="tiny", width=8, encoder_blocks=[1, 2, 1], decoder_blocks=[2, 1, 1])
BERT = dict(vocab_size=60, width=32, depth=2, heads=4, head_dim=8, max_length=10)
CLIP = dict(vocab_size=60, width=32, depth=2, heads=4, max_length=10)
# Golden of tests/models → network, fields, layout, and the rules that its own test converts by.
CONVERTED = {
    f"unet_{name}": (
        "unet",
        UNET | fields,
        "diffusers" if name in ("sdxl", "refiner") else "compvis",
        RULES.get(name, UNET_RULES),
    )
    for name, fields in UNETS.items()
}
CONVERTED |= {
    f"autoencoder_{name}": ("autoencoder", AUTOENCODER | fields, "compvis", AUTOENCODER_RULES)
    for name, fields in AUTOENCODERS.items()
}
VQ_FIELDS = dict(VQ, kind="vq", n_embed=20, attn_resolutions=[8])
CONVERTED |= {
    "autoencoder_vq": ("autoencoder", VQ_FIELDS, "compvis", AUTOENCODER_RULES),
    "autoencoder_tiny": ("autoencoder", TINY, "diffusers", TINY_AUTOENCODER),
    "text": ("bert", BERT | dict(vocab_size=50, heads=8, head_dim=64), "compvis", TEXT),
    "clip_text": ("clip", fields_of(CLIPS["clip_text"]), "diffusers", COMMON),
    "clip_text_projection": (
        "clip",
        fields_of(CLIPS["clip_text_projection"]),
        "diffusers",
        COMMON,
    ),
}

STABLE = dict(model_channels=32, channel_mult=[1, 2, 2], num_res_blocks=1, context_dim=24)
STABLE_1 = STABLE | dict(attention_resolutions=[1, 2], num_heads=4)
STABLE_2 = STABLE_1 | dict(use_linear_in_transformer=True, num_head_channels=32)
PLAIN = dict(in_channels=3, out_channels=3, model_channels=32, channel_mult=[1, 2])
KL = dict(ch=32, ch_mult=[1, 2], num_res_blocks=1)
# Network of names.json → network, fields and further arguments of `slots`.
NAMED = {
    "unet_sd1": ("unet", STABLE_1),
    "unet_sd2": ("unet", STABLE_2),
    "unet_unclip": (
        "unet",
        STABLE_2 | dict(num_classes="sequential", adm_in_channels=12),
        "class_embedding",
    ),
    "unet_upscaler": (
        "unet",
        STABLE_2 | dict(num_classes=10, disable_self_attentions=[True, True, False]),
    ),
    "unet_sdxl": (
        "unet",
        STABLE_2
        | dict(attention_resolutions=[2, 4], transformer_depth=[1, 2, 3])
        | dict(num_classes="sequential", adm_in_channels=20),
    ),
    "unet_celebahq": ("unet", PLAIN | dict(attention_resolutions=[2], num_head_channels=16)),
    "unet_churches": (
        "unet",
        PLAIN
        | dict(attention_resolutions=[1], num_heads=2, num_classes=10)
        | dict(use_scale_shift_norm=True, resblock_updown=True),
    ),
    "autoencoder_kl": ("autoencoder", KL),
    "autoencoder_no_quant_conv": (
        "autoencoder",
        KL | dict(kind="kl", use_quant_conv=False, mid_attn=False),
    ),
    "autoencoder_vq": ("autoencoder", VQ_FIELDS | dict(embed_dim=3)),
    "autoencoder_tiny": ("autoencoder", TINY),
    "clip": ("clip", CLIP),
    "clip_projection": ("clip", CLIP | dict(projection=24)),
    "bert": ("bert", BERT),
    # These two are CompVis' alone.
    "class": ("class", dict(n_classes=7, embed_dim=4)),
    "rescaler": ("rescaler", dict(kind="rescaler", n_stages=2, in_channels=5, out_channels=3)),
}
NAMES = json.loads((GOLDEN / "names.json").read_text(encoding="utf-8"))["shapes"]


@functools.cache
def where_of(name, layout="diffusers"):
    network, fields, *vector = NAMED[name]
    return slots(network, fields, layout, *vector)


def random_params(where):
    return unflatten_dict({path: uniform(path, where[path].shape) for path in where}, sep="/")


def equal(found, expected):
    assert found.keys() == expected.keys()
    for key in expected:
        np.testing.assert_array_equal(found[key], expected[key], err_msg=key)


def flat(params):
    return flatten_dict(params, sep="/")


@pytest.mark.parametrize("golden", CONVERTED)
def test_leaves_are_those_of_the_networks_own_tests(golden):
    """So those tests of a network also apply to imported weights. And back, bit by bit."""
    network, fields, layout, rules = CONVERTED[golden]
    with np.load(MODELS / f"{golden}.npz") as file:
        weights = random_weights(json.loads(str(file["about"]))["shapes"])
    where = slots(network, fields, layout)
    params, report = read_params(weights, where)
    assert report == Report()
    converted = dict(convert(name, array, rules) for name, array in weights.items())
    equal(flat(params), {k: v.reshape(where[k].shape) for k, v in converted.items()})

    written = write_params(params, where)
    if golden == "clip_text":  # transformers 5 has no such part in its names
        written = {k.removeprefix("text_model."): v for k, v in written.items()}
    equal(written, weights)


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_are_diffusers(name):
    """There and back, with names and shapes that `make_names` took from the libraries."""
    where, weights = where_of(name), random_weights(NAMES[name])
    params, report = read_params(weights, where)
    assert report == Report() and flat(params).keys() == where.keys()
    weights = {k: v for k, v in weights.items() if not k.startswith("to_logits")}
    if name == "clip":
        weights = {f"text_model.{k}": v for k, v in weights.items()}
    equal(write_params(params, where), weights)


@pytest.mark.parametrize("name", ["unet_celebahq", "bert"])
def test_what_is_read_computes_the_same(name):
    """Names do not say in which order channels lie; numbers do."""
    network, fields = NAMED[name]
    params, _ = read_params(random_weights(NAMES[name]), where_of(name))
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    if network == "unet":
        module = UNet(**fields)
        inputs = uniform("x", (2, 3, 8, 4)).transpose(0, 2, 3, 1), jnp.array([10, 990])
    else:
        module, inputs = TextTransformer(**fields), (jnp.asarray(TOKENS),)
    computed = run_once(module.apply, {"params": params}, *inputs)
    with np.load(GOLDEN / "outputs.npz") as file:
        expected = file[name]
    expected = np.moveaxis(expected, 1, -1) if expected.ndim == 4 else expected
    assert distance(computed, expected) < 1e-5


KINDS = ("unet_celebahq", "autoencoder_vq", "autoencoder_tiny", "clip_projection", "bert")


@pytest.mark.parametrize("name, layout", [
    (name, layout) for name in (*KINDS, "class", "rescaler") for layout in LAYOUTS[NAMED[name][0]]
])  # fmt: skip
def test_every_layout_gives_back_what_it_took(name, layout, tmp_path):
    where = where_of(name, layout)
    params = random_params(where)
    tensors = write_params(params, where, "a.prefix.")
    assert all(key.startswith("a.prefix.") for key in tensors)
    write_safetensors(tmp_path / "file", tensors)
    found, report = read_params(open_state(tmp_path / "file"), where, "a.prefix.")
    assert report == Report()
    equal(flat(found), flat(params))


def guided_attention(x, weights, heads):
    """guided-diffusion's AttentionBlock of x (B, C, T) in its new order: q, k, v, then heads."""
    groups = x.reshape(len(x), 32, -1)
    spread = np.sqrt(groups.var(-1, keepdims=True) + 1e-5)
    h = ((groups - groups.mean(-1, keepdims=True)) / spread).reshape(x.shape)
    h = h * weights["norm.weight"][:, None] + weights["norm.bias"][:, None]
    qkv = weights["qkv.weight"][..., 0] @ h + weights["qkv.bias"][:, None]
    q, k, v = (part.reshape(len(x), heads, -1, x.shape[-1]) for part in np.split(qkv, 3, axis=1))
    logits = np.einsum("bhct,bhcs->bhts", q, k) / np.sqrt(q.shape[2])
    weight = np.exp(logits - logits.max(-1, keepdims=True))
    weight /= weight.sum(-1, keepdims=True)
    h = np.einsum("bhts,bhcs->bhct", weight, v).reshape(x.shape)
    return x + weights["proj_out.weight"][..., 0] @ h + weights["proj_out.bias"][:, None]


@pytest.mark.parametrize("heads", [dict(num_heads=4), dict(num_head_channels=16)])
def test_new_attention_order(heads):
    """q, k and v before the heads, as in many weights of guided-diffusion, become ours."""
    fields = dict(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, **heads)
    fields |= dict(attention_resolutions=(2,))
    where = slots("unet", fields, "compvis", new_attention_order=True)
    names = [name for slot in where.values() for name in slot.names]
    weights = random_weights({slot.names[0]: slot.foreign for slot in where.values()})
    params, report = read_params(weights, where)
    assert report == Report() and len(names) == len(weights)
    x = uniform("x", (2, 64, 6)).astype(np.float64)
    here = {k.removeprefix("middle_block.1."): v for k, v in weights.items()}
    expected = guided_attention(x, here, 4)
    block = AttentionBlock(4)
    given = x.transpose(0, 2, 1).reshape(2, 2, 3, 64).astype(np.float32)
    found = run_once(block.apply, {"params": params["middle_block_1"]}, given)
    np.testing.assert_allclose(found.reshape(2, 6, 64), expected.transpose(0, 2, 1), atol=1e-5)
    legacy, _ = read_params(weights, slots("unet", fields, "compvis"))
    other = run_once(block.apply, {"params": legacy["middle_block_1"]}, given)
    assert distance(other.reshape(2, 6, 64), expected.transpose(0, 2, 1)) > 1e-2
    equal(write_params(params, where), weights)


def test_a_learned_variance_is_left_out():
    fields = dict(model_channels=32, channel_mult=(1,), num_res_blocks=1, out_channels=3)
    where = slots("unet", fields, "compvis", learn_sigma=True)
    weights = random_weights({slot.names[0]: slot.foreign for slot in where.values()})
    assert weights["out.2.weight"].shape == (6, 32, 3, 3) and weights["out.2.bias"].shape == (6,)
    params, report = read_params(weights, where)
    assert report == Report()
    assert params["out_2"]["kernel"].shape == (3, 3, 32, 3)
    np.testing.assert_array_equal(params["out_2"]["bias"], weights["out.2.bias"][:3])
    kernel = weights["out.2.weight"][:3].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(params["out_2"]["kernel"], kernel)


def test_dimensions_of_attention():
    """1×1 convolutions, of one or two dimensions, or matrices: as each code has them."""

    def shape(name, path):
        return where_of(name, "compvis")[path].foreign

    assert shape("unet_sd1", "middle_block_1/proj_in/kernel") == (64, 64, 1, 1)
    assert shape("unet_sd2", "middle_block_1/proj_in/kernel") == (64, 64)
    assert shape("unet_celebahq", "middle_block_1/qkv/kernel") == (192, 64, 1)
    assert shape("unet_celebahq", "middle_block_1/proj_out/kernel") == (64, 64, 1)
    assert shape("autoencoder_kl", "encoder/mid_attn_1/q/kernel") == (64, 64, 1, 1)


def test_old_names_and_shapes_are_read():
    """As in the published ldm-celebahq-256, older autoencoders, and CLIP of either version."""
    for name in ("unet_celebahq", "autoencoder_kl"):
        where, weights = where_of(name), random_weights(NAMES[name])
        expected, _ = read_params(weights, where)
        renamed = {}
        for key, value in weights.items():
            for new, old in (
                ("to_q", "query"),
                ("to_k", "key"),
                ("to_v", "value"),
                ("to_out.0", "proj_attn"),
            ):
                key = key.replace(f".{new}.", f".{old}.")
            four = ".attentions." in key and value.ndim == 2 and name == "autoencoder_kl"
            renamed[key] = value[..., None, None] if four else value
        assert "mid_block.attentions.0.query.weight" in " ".join(renamed)
        found, report = read_params(renamed, where)
        assert report == Report()
        equal(flat(found), flat(expected))

    where, weights = where_of("clip_projection"), random_weights(NAMES["clip_projection"])
    expected, _ = read_params(weights, where)
    bare = {key.removeprefix("text_model."): value for key, value in weights.items()}
    found, report = read_params(bare, where)
    assert report == Report()
    equal(flat(found), flat(expected))


def test_a_vector_is_read_wherever_it_goes_in():
    weights = random_weights(NAMES["unet_unclip"])
    network, fields, _ = NAMED["unet_unclip"]
    assert read_params(weights, slots(network, fields, "diffusers"))[1] == Report()


def test_a_network_is_traced_once(monkeypatch):
    """However its fields are ordered; and what a caller does to the answer is its own."""
    fields = dict(width=48, depth=1, heads=2, vocab_size=11, max_length=7)
    found = shapes("clip", fields)
    expected = dict(found)
    found.clear()
    monkeypatch.delattr("jax.eval_shape")
    assert shapes("clip", dict(reversed(fields.items()))) == expected
    with pytest.raises(AttributeError, match="eval_shape"):
        shapes("clip", fields | dict(width=64))


def test_open_clip():
    """Queries, keys and values are thirds of one tensor; the projection is not transposed."""
    with np.load(MODELS / "clip_open_clip.npz") as file:
        weights = random_weights(json.loads(str(file["about"]))["shapes"])
    where = slots("clip", fields_of(CLIPS["clip_open_clip"]), "openclip")
    buffers = {"logit_scale": np.zeros(()), "attn_mask": np.full((10, 10), -np.inf)}
    params, report = read_params(weights | buffers, where)
    assert report == Report()
    equal(write_params(params, where), weights)
    layer = params["layers_1"]["self_attn"]
    three = [layer[f"{x}_proj"]["kernel"].T for x in "qkv"]
    expected = weights["transformer.resblocks.1.attn.in_proj_weight"]
    np.testing.assert_array_equal(np.concatenate(three), expected)
    expected = weights["text_projection"]
    np.testing.assert_array_equal(params["text_projection"]["kernel"], expected)


def test_reading_takes_little_more_memory_than_the_weights(tmp_path):
    where = slots("bert", BERT | dict(width=256, heads=8, depth=4), "compvis")
    write_safetensors(tmp_path / "file", write_params(random_params(where), where))
    weights = sum(4 * np.prod(slot.shape) for slot in where.values())
    for dtype, share in (("float32", 1.0), ("bfloat16", 0.5)):
        tracemalloc.start()
        params, _ = read_params(open_state(tmp_path / "file"), where, dtype=dtype)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert sum(leaf.nbytes for leaf in flat(params).values()) == share * weights
        largest = 4 * max(np.prod(slot.shape) for slot in where.values())
        assert peak < share * weights + 3 * largest
        assert all(leaf.dtype == dtype for leaf in flat(params).values())


def test_what_does_not_come_out_even_is_reported():
    where = where_of("unet_celebahq")
    weights = {f"model.{k}": v for k, v in random_weights(NAMES["unet_celebahq"]).items()}
    del weights["model.mid_block.attentions.0.to_k.weight"], weights["model.conv_in.bias"]
    weights["model.conv_out.weight"] = np.zeros((3, 32, 5, 5), np.float32)
    weights |= {"model.unheard.of": np.zeros(2), "other.conv_in.bias": np.zeros(2)}
    params, report = read_params(weights, where, "model.")
    assert set(report.missing) == {
        "model.conv_in.bias",
        "model.mid_block.attentions.0.to_k.weight",
    }
    # What is left of the fused layer has no use alone.
    assert set(report.extra) == {
        "model.unheard.of",
        "model.mid_block.attentions.0.to_q.weight",
        "model.mid_block.attentions.0.to_v.weight",
    }
    expected = "model.conv_out.weight: expected (3, 32, 3, 3), found (3, 32, 5, 5)"
    assert report.misshapen == (expected,)
    left_out = {"input_blocks_0_0/bias", "middle_block_1/qkv/kernel", "out_2/kernel"}
    assert flat(params).keys() == where.keys() - left_out


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(value, tmp_path):
    where = slots("class", dict(n_classes=3, embed_dim=2), "compvis")
    weights = {"embedding.weight": np.zeros((3, 2), np.float16)}
    weights["embedding.weight"][2, 1] = value
    write_safetensors(tmp_path / "broken", weights)
    with pytest.raises(ValueError, match=r"broken: embedding\.weight holds NaN or infinity"):
        read_params(open_state(tmp_path / "broken"), where)
    with pytest.raises(ValueError, match=r"^embedding\.weight holds NaN or infinity"):
        read_params(weights, where)


def test_writing_wants_all_leaves_and_no_others():
    where = slots("class", dict(n_classes=3, embed_dim=2), "compvis")
    with pytest.raises(ValueError, match=r"missing \['embedding/embedding'\]"):
        write_params({"other": np.zeros(2)}, where)
    with pytest.raises(ValueError, match=r"embedding/embedding: expected \(3, 2\), found \(2, 3\)"):
        write_params({"embedding": {"embedding": np.zeros((2, 3))}}, where)


@pytest.mark.parametrize("arguments, message", [
    (("unett", {}, "compvis"), "network 'unett': choose one of unet, autoencoder"),
    (("unet", {}, "openclip"), "layout 'openclip' of network 'unet': choose one of compvis"),
    (("unet", {}, "diffusers", "addition"), "vector='addition': choose one of add_embedding"),
    (("unet", {"width": 3}, "compvis"), "unet: .*unexpected keyword argument 'width'"),
    (("autoencoder", {"kind": "vae"}, "compvis"), "kind='vae': choose one of kl, vq, tiny"),
    (("rescaler", {"out_channels": 3}, "compvis"), "with out_channels needs in_channels"),
])  # fmt: skip
def test_unknown_choices_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        slots(*arguments)


def test_the_networks_of_a_config():
    found = {name: networks(system(name)) for name in SYSTEMS}
    kinds = {name: {key: kind for key, (kind, _) in parts.items()} for name, parts in found.items()}
    both = dict(unet="unet", autoencoder="autoencoder")
    assert kinds["stable-diffusion-xl-base"] == both | dict(text="clip", text_2="clip")
    assert kinds["cin256-v2"] == both | dict(label="class")
    assert kinds["semantic_synthesis256"] == both | dict(segmentation="rescaler")
    assert kinds["inpainting_big"] == both
    assert kinds["vq-f4"] == dict(autoencoder="autoencoder")
    # What a section leaves to its tokenizer and its shape.
    assert found["ldm-text2im-large-256"]["text"][1]["vocab_size"] == 30522
    assert found["semantic_synthesis256"]["segmentation"][1]["in_channels"] == 182
    boxes = dict(kind="array", network=dict(kind="transformer", vocab_size=9, width=8))
    assert networks(dict(conditioning=dict(boxes=boxes)))["boxes"] == (
        "bert",
        dict(vocab_size=9, width=8),
    )


def test_heads_for_each_level_are_split_as_heads_of_one_size():
    sizes = dict(model_channels=32, channel_mult=[1, 1.5], groups=16, num_res_blocks=1)
    sizes |= dict(attention_resolutions=[2, 1])
    by_level = slots("unet", sizes | dict(num_heads=[2, 3]), "diffusers")
    assert by_level == slots("unet", sizes | dict(num_head_channels=16), "diffusers")
    heads = {slot.heads for slot in by_level.values()}
    assert heads == {None, 2, 3}
