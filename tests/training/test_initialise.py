"""What trains, where it starts, and what is refused."""

import logging

import jax
import numpy as np
import pytest

from ldm_jax.interop.layout import Imported
from ldm_jax.training.initialise import check_frozen, loaded_parameters
from ldm_jax.training.trainable import like, merge, split

UNET = {"unet/input_blocks_0_0/kernel", "unet/input_blocks_0_0/bias", "unet/out/kernel"}


def tree(**shapes):
    """A tree of arrays: tree(a__b=(2, 3)) is {"a": {"b": …}}."""
    made = {}
    for path, shape in shapes.items():
        *parents, leaf = path.split("__")
        place = made
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = np.random.default_rng(len(path)).normal(size=shape).astype(np.float32)
    return made


def whole():
    return tree(
        unet__input_blocks_0_0__kernel=(3, 3, 4, 8),
        unet__input_blocks_0_0__bias=(8,),
        unet__out__kernel=(8, 4),
        text__embedding=(10, 8),
    )


def abstract(params):
    return jax.eval_shape(lambda: jax.tree.map(np.asarray, params))


def opened(params):
    return Imported({"task": "diffusion"}, params, "a model", {})


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    ("rules", "paths"),
    [
        ((".*",), UNET | {"text/embedding"}),
        (("^unet/",), UNET),
        (
            ("kernel$", "^text"),
            {"unet/input_blocks_0_0/kernel", "unet/out/kernel", "text/embedding"},
        ),
    ],
)
def test_split_and_merge(rules, paths):
    params = whole()
    trained, frozen = split(params, rules)
    found = jax.tree_util.tree_leaves_with_path(trained)
    assert {"/".join(key.key for key in path) for path, _ in found} == paths
    assert_same(merge(frozen, trained), params)
    assert_same(like(params, trained), trained)


def test_a_rule_that_matches_nothing_shows_what_there_is():
    with pytest.raises(ValueError, match=r"no parameter matches 'lora'; paths look like text/emb"):
        split(whole(), ("^unet/", "lora"))


def test_what_a_file_has_is_loaded_and_the_rest_is_fresh(caplog):
    there = whole()
    del there["text"], there["unet"]["out"]
    there["vision"] = {"w": np.ones(3)}
    with caplog.at_level(logging.INFO, logger="ldm_jax"):
        loaded = loaded_parameters(abstract(whole()), opened(there), "x.ckpt")
    assert_same(loaded, {"unet": there["unet"]})
    text = "\n".join(caplog.messages)
    assert "unet: 296 parameters loaded from x.ckpt, 32 fresh" in text
    assert "text: 80 fresh" in text and "left out vision" in text


def test_new_input_channels_start_at_zero(caplog):
    wide = tree(unet__input_blocks_0_0__kernel=(3, 3, 9, 8))
    with caplog.at_level(logging.INFO, logger="ldm_jax"):
        loaded = loaded_parameters(abstract(wide), opened(whole()), "x")
    kernel = loaded["unet"]["input_blocks_0_0"]["kernel"]
    np.testing.assert_array_equal(kernel[:, :, :4], whole()["unet"]["input_blocks_0_0"]["kernel"])
    assert kernel.shape == (3, 3, 9, 8) and not kernel[:, :, 4:].any()
    assert "5 input channels added, at 0" in caplog.text


@pytest.mark.parametrize("shape", [(3, 3, 3, 8), (1, 1, 4, 8), (3, 3, 4, 16)])
def test_another_shape_is_named(shape):
    other = tree(unet__input_blocks_0_0__kernel=shape)
    expected = (
        rf"unet/input_blocks_0_0/kernel \[3, 3, 4, 8\] there, \[{', '.join(map(str, shape))}\] here"
    )
    with pytest.raises(ValueError, match=expected):
        loaded_parameters(abstract(other), opened(whole()), "x")


def test_only_the_networks_that_are_asked_for():
    loaded = loaded_parameters(abstract(whole()), opened(whole()), "x", ("text",))
    assert loaded.keys() == {"text"}
    with pytest.raises(ValueError, match="x has no network 'unet'; it has text"):
        there = opened({"text": whole()["text"]})
        loaded_parameters(abstract(whole()), there, "x", ("unet",))
    with pytest.raises(ValueError, match="this model has no network 'vision'; it has text, unet"):
        loaded_parameters(abstract(whole()), opened(whole()), "x", ("vision",))


def test_random_numbers_are_not_frozen():
    _, frozen = split(whole(), ("^unet/",))
    with pytest.raises(ValueError, match=r"text frozen at random .*give weights with init_from"):
        check_frozen(frozen, {})
    check_frozen(frozen, {"text": frozen["text"]})
