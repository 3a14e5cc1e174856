"""CLIP's text encoders against transformers and OpenCLIP (see `scripts/write_text_goldens.py`)."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.clip import CLIPText, TextFeatures
from tests.models.torch_layout import Rules, to_flax

COMMON: Rules = [
    (r"^(text_model\.)?(embeddings|encoder)\.", ""),
    (r"^text_model\.", ""),
    (r"^token_embedding\.weight", "token_embedding.embedding"),
    (r"^position_embedding\.weight", "position_embedding"),
    (r"^layers\.(\d+)", r"layers_\1"),
]
OPEN_CLIP: Rules = [
    (r"^positional_embedding", "position_embedding.weight"),
    (r"^transformer\.resblocks\.", "layers."),
    (r"\bln_([12])\b", r"layer_norm\1"),
    (r"\bln_final\b", "final_layer_norm"),
    (r"\battn\.in_proj_(\w+)", r"self_attn.in_proj.\1"),
    (r"\battn\.out_proj\b", "self_attn.out_proj"),
    (r"\bc_fc\b", "fc1"),
    (r"\bc_proj\b", "fc2"),
    (r"^text_projection", "text_projection.kernel"),
    *COMMON,
]
SMALL = dict(vocab_size=60, heads=4, max_length=10)
NETWORKS = {
    "clip_text": CLIPText(**SMALL, width=48, depth=3),
    "clip_text_projection": CLIPText(
        **SMALL, width=32, depth=2, activation="gelu", projection=24, eos=50
    ),
    "clip_open_clip": CLIPText(**SMALL, width=32, depth=3, activation="gelu", projection=24),
}
# The table of `ldm_jax.models.clip`. Millions of parameters and the number of tensors are those of
# transformers 5.23.0 and open_clip 3.3.0 (whose attention has 2 tensors where ours has 6).
H, BIGG = dict(width=1024, heads=16), dict(width=1280, heads=20)
RELEASED = {
    "CLIP-L": (dict(), 123.060, 196),
    "OpenCLIP-H": (dict(**H, depth=24, activation="gelu", projection=1024), 354.033, 389),
    "OpenCLIP-H in SD 2": (dict(**H, depth=24, activation="gelu"), 352.984, 388),
    "OpenCLIP-H in diffusers' SD 2": (dict(**H, depth=23, activation="gelu"), 340.388, 372),
    "OpenCLIP-bigG": (dict(**BIGG, depth=32, activation="gelu", projection=1280), 694.660, 517),
}


def fused(params):
    """Queries, keys and values as OpenCLIP keeps them: one after another in one layer."""

    def fuse(layer):
        rest = dict(layer["self_attn"])
        parts = [rest.pop(f"{name}_proj") for name in "qkv"]
        join = lambda *arrays: jnp.concatenate(arrays, axis=-1)  # noqa: E731
        return layer | {"self_attn": rest | {"in_proj": jax.tree.map(join, *parts)}}

    return {k: fuse(v) if re.match(r"layers_\d", k) else v for k, v in params.items()}


def split(params):
    """The inverse of `fused`."""

    def cut(layer):
        rest = dict(layer["self_attn"])
        joined = {k: jnp.split(v, 3, axis=-1) for k, v in rest.pop("in_proj").items()}
        for i, name in enumerate("qkv"):
            rest[f"{name}_proj"] = {k: parts[i] for k, parts in joined.items()}
        return layer | {"self_attn": rest}

    return {k: cut(v) if re.match(r"layers_\d", k) else v for k, v in params.items()}


def every_output(network, params, tokens):
    """All hidden states, the last two through the final norm, and `pooled`, named as in goldens."""
    depth = network.depth
    choices = [(i, False) for i in range(depth + 1)] + [(depth - 1, True), (depth, True)]
    outputs = {}
    for i, final_norm in choices:
        chosen = network.clone(layer=i, final_norm=final_norm)
        name = f"{'normed' if final_norm else 'hidden'}_{i}"
        outputs[name], outputs["pooled"] = chosen.apply({"params": params}, tokens)
    return outputs


@pytest.mark.parametrize("name", ["clip_text", "clip_text_projection"])
def test_agrees_with_transformers(name, agrees):
    network = NETWORKS[name]
    agrees(
        name,
        COMMON,
        init=lambda tokens: network.init(jax.random.key(0), tokens)["params"],
        apply=lambda params, tokens: every_output(network, params, tokens),
        tolerance=1e-5,
    )


def test_agrees_with_open_clip(agrees):
    network = NETWORKS["clip_open_clip"]
    agrees(
        "clip_open_clip",
        OPEN_CLIP,
        init=lambda tokens: fused(network.init(jax.random.key(0), tokens)["params"]),
        apply=lambda params, tokens: every_output(network, split(params), tokens),
        tolerance=1e-5,
    )


@pytest.fixture(scope="module")
def tiny():
    """A network, its parameters and two prompts of it."""
    network = NETWORKS["clip_open_clip"].clone(depth=2)
    tokens = np.array([[58, 7, 1, 59, 0, 0], [58, 3, 9, 12, 40, 59]], np.int32)
    key = jax.random.key(0, impl="rbg")
    params = jax.jit(network.init)(key, tokens)
    return network, params, tokens


def test_layers_by_name_and_from_the_end(tiny):
    network, params, tokens = tiny
    synonyms = (("last", -1, 2), ("penultimate", -2, 1), (-3, 0))

    @jax.jit
    def run(params, tokens):
        return [
            [network.clone(layer=layer).apply(params, tokens).hidden for layer in same]
            for same in synonyms
        ]

    states = run(params, tokens)
    for first, *others in states:
        assert all(np.array_equal(first, other) for other in others)
    assert not np.array_equal(states[0][0], states[1][0])


def test_default_is_what_sd1_uses():
    network = CLIPText()
    assert (network.layer, network.final_norm, network.activation) == ("last", True, "quick_gelu")


def test_pooled_does_not_depend_on_layer_or_padding(tiny):
    network, params, tokens = tiny
    padded = np.concatenate([tokens, np.full((2, 4), 59, np.int32)], axis=1)

    @jax.jit
    def run(params, tokens, padded):
        return [
            network.apply(params, tokens),
            network.clone(layer=0, final_norm=False).apply(params, tokens),
            network.apply(params, padded),
            network.clone(eos=59).apply(params, padded),
        ]

    first, *others = run(params, tokens, padded)
    assert isinstance(first, TextFeatures) and first.pooled.shape == (2, 24)
    for other in others:
        np.testing.assert_allclose(other.pooled, first.pooled, atol=1e-6)


def test_mask_is_causal(tiny):
    network, params, tokens = tiny
    changed = tokens.copy()
    changed[:, 3] = 5
    run = jax.jit(lambda params, tokens: network.apply(params, tokens).hidden)
    before, after = (np.asarray(run(params, t)) for t in (tokens, changed))
    np.testing.assert_allclose(after[:, :3], before[:, :3], atol=1e-6)
    assert np.all(np.abs(after[:, 3:] - before[:, 3:]).max(axis=-1) > 1e-3)


def test_an_added_token_does_not_pass_for_the_end(tiny):
    """Where an id is higher than the end token's, only `eos` finds the end."""
    network, params, _ = tiny
    tokens = np.array([[50, 59, 57, 7], [50, 59, 57, 9]], np.int32)

    @jax.jit
    def run(params, tokens):
        return [network.clone(eos=eos).apply(params, tokens).pooled for eos in (57, None)]

    end, highest = run(params, tokens)
    np.testing.assert_allclose(end[0], end[1], atol=1e-6)
    assert np.abs(np.asarray(highest[0] - end[0])).max() > 1e-2


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes(name, size):
    options, millions, tensors = RELEASED[name]
    found = size(CLIPText(**options), jnp.zeros((1, 77), int))
    assert found == (pytest.approx(millions, abs=0.001), tensors)


def test_epsilons(epsilons):
    found = epsilons(NETWORKS["clip_text"], jnp.zeros((1, 4), int))
    assert len(found) == 7 and set(found.values()) == {1e-5}


def test_bfloat16(tiny):
    """Arithmetic in bfloat16, parameters as they are, the same numbers to its precision."""
    network, params, tokens = tiny
    exact = jax.jit(network.apply)(params, tokens)
    rounded = jax.jit(network.clone(dtype=jnp.bfloat16).apply)(params, tokens)
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(b - a, np.float64)) / np.linalg.norm(a)
        assert 1e-4 < error < 0.03
    half = NETWORKS["clip_text"].clone(param_dtype=jnp.bfloat16)
    shapes = jax.eval_shape(half.init, jax.random.key(0), tokens)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    "fields, tokens, message",
    [
        ({}, np.zeros((1, 11), int), "11 tokens, but max_length is 10"),
        ({}, np.array([[58, 60]]), "token 60, but vocab_size is 60"),
        ({}, jnp.array([[58, -1]]), "token -1, but vocab_size is 60"),
        (
            dict(layer="first"),
            np.zeros((1, 3), int),
            "layer='first': choose one of last, penultimate, or an index from -4 to 3",
        ),
        (dict(layer=4), np.zeros((1, 3), int), "layer=4: choose"),
        (dict(layer=-5), np.zeros((1, 3), int), "layer=-5: choose"),
        (dict(activation="relu"), np.zeros((1, 3), int), "choose one of quick_gelu, gelu"),
        (dict(heads=5), np.zeros((1, 3), int), "width=48 does not divide into heads=5"),
        (dict(eos=60), np.zeros((1, 3), int), "eos=60, but vocab_size is 60"),
    ],
)
def test_mistakes(fields, tokens, message):
    network = NETWORKS["clip_text"].clone(**fields)
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(lambda key: network.init(key, tokens), jax.random.key(0))


def test_an_id_too_high_under_jit_is_not_a_number(tiny):
    network, params, tokens = tiny
    tokens = tokens.copy()
    tokens[0, 2] = 60
    hidden, pooled = jax.jit(network.apply)(params, tokens)
    assert np.isnan(pooled[0]).all() and np.isfinite(hidden[1]).all()


def test_missing_parameters_are_named():
    """A checkpoint that keeps 2 blocks does not pass for one that keeps 3."""
    network = NETWORKS["clip_text"]
    like = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 4), int))["params"]
    state = {"encoder.layers.0.layer_norm1.weight": np.ones(48, np.float32)}
    with pytest.raises(KeyError, match="layers_2/mlp/fc1/kernel"):
        to_flax(state, COMMON, like)
