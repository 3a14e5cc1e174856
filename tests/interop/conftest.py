"""Small models in diffusers' folders, written once; networks are traced once for their shapes.

Tracing is most of the time that these tests take.
"""

import functools
import json
import shutil

import pytest

from ldm_jax.interop import diffusers, layout
from tests.interop.systems import random_params, system


@pytest.fixture(scope="session", autouse=True)
def shapes_once():
    trace = layout.shapes
    cached = functools.cache(lambda network, fields: trace(network, json.loads(fields)))
    patch = pytest.MonkeyPatch()
    patch.setattr(layout, "shapes", lambda network, fields: cached(network, json.dumps(fields)))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """(folder, config, params) of a system, written once."""
    made = {}

    def make(name):
        if name not in made:
            config, folder = system(name), tmp_path_factory.mktemp("written") / name
            params = random_params(config)
            diffusers.write(folder, config, params)
            made[name] = folder, config, params
        return made[name]

    return make


@pytest.fixture
def copied(folders, tmp_path):
    """A copy of a system's folder, to be changed."""

    def copy(name):
        return shutil.copytree(folders(name)[0], tmp_path / "copy")

    return copy
