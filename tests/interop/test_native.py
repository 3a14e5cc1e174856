"""Our own file keeps all of a model, words included."""

import shutil

import jax
import numpy as np

from ldm_jax.conditions.tokenizer import VOCABULARIES, WordPiece
from ldm_jax.interop.native import save_model
from ldm_jax.interop.opening import open_any
from tests.interop.systems import random_params, system


def test_a_vocabulary_of_ones_own_travels_inside(tmp_path):
    words = tmp_path / "words.txt"
    shutil.copy(VOCABULARIES / "emoji.txt", words)
    config = system("ldm-text2im-large-256")
    config["conditioning"]["text"]["vocabulary"] = str(words)
    params = random_params(config)
    save_model(tmp_path / "model.safetensors", config, params)
    words.unlink()
    found = open_any(tmp_path / "model.safetensors")
    vocabulary = found.config["conditioning"]["text"]["vocabulary"]
    np.testing.assert_array_equal(
        WordPiece(vocabulary, 8)(["red apple"]), WordPiece("emoji", 8)(["red apple"])
    )
    found.config["conditioning"]["text"]["vocabulary"] = str(words)
    assert found.config == config
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
