"""The structure of the package: modules of at most 400 lines, each with a docstring.

`make lint` checks the imports.
"""

import ast
from pathlib import Path

import pytest

import ldm_jax

ROOT = Path(ldm_jax.__file__).parent
MODULES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


@pytest.mark.parametrize("module", MODULES)
def test_module(module):
    text = (ROOT / module).read_text(encoding="utf-8")
    assert text.count("\n") <= 400, "more than 400 lines: make it two modules"
    assert ast.get_docstring(ast.parse(text)), "no module docstring"
