"""Makes notebooks/*.ipynb, which Colab opens, from the text in notebooks/*.py.

    python -m scripts.build_notebooks

Needs jupytext (`pip install -e '.[test]'`).
"""

import json
from pathlib import Path

import jupytext

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def built(text: Path) -> str:
    """The notebook of a text, whose cells start with `# %%`; magics are comments in the text."""
    notebook = jupytext.read(text)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"  # by default random
    notebook.metadata.pop("jupytext", None)
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


if __name__ == "__main__":
    for text in sorted(NOTEBOOKS.glob("*.py")):
        text.with_suffix(".ipynb").write_text(built(text), encoding="utf-8")
