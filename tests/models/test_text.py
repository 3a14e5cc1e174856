"""LDM's text transformer against LDM's copy of x_transformers (its `BERTEmbedder`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.text import TextTransformer
from tests.models.torch_layout import TEXT

# ldm-facts §2.2, without the head for logits that is never used.
RELEASED = {
    "txt2img-1p4B": (dict(width=1280, depth=32), 542.90),
    "text2img256": (dict(width=640, depth=32), 166.59),
    "layout2img-openimages256": (
        dict(width=512, depth=16, vocab_size=8192, max_length=92),
        54.66,
    ),
}


def test_agrees_with_original(agrees):
    network = TextTransformer(vocab_size=50, width=32, depth=2, max_length=10)
    agrees(
        "text",
        TEXT,
        init=lambda tokens: network.init(jax.random.key(0), tokens)["params"],
        apply=lambda params, tokens: {"y": network.apply({"params": params}, tokens)},
        tolerance=5e-5,
    )


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes(name, size):
    options, millions = RELEASED[name]
    tensors = 2 + 13 * options["depth"] + 2
    found = size(TextTransformer(**options), jnp.zeros((1, 4), int))
    assert found == (pytest.approx(millions, abs=0.01), tensors)


def test_epsilons(epsilons):
    network = TextTransformer(vocab_size=50, width=32, depth=2, max_length=10)
    found = epsilons(network, jnp.zeros((1, 4), int))
    assert len(found) == 5 and set(found.values()) == {1e-5}


def test_padding_is_attended_to(fresh):
    """There is no mask: the padding changes every token's output."""
    network = TextTransformer(vocab_size=9, width=8, depth=1, heads=1, head_dim=8, max_length=4)
    tokens = jnp.array([[1, 2, 0, 0], [1, 2, 0, 3]])
    y, _ = fresh(network, tokens)
    assert np.all(np.any(y[0] != y[1], axis=-1))
