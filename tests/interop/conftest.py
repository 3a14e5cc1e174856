"""Networks are traced once for their shapes: that is most of the time that these tests take."""

import functools
import json

import pytest

from ldm_jax.interop import layout


@pytest.fixture(scope="session", autouse=True)
def shapes_once():
    trace = layout.shapes
    cached = functools.cache(lambda network, fields: trace(network, json.loads(fields)))
    patch = pytest.MonkeyPatch()
    patch.setattr(layout, "shapes", lambda network, fields: cached(network, json.dumps(fields)))
    yield
    patch.undo()
