"""The version, apart so that `pyproject.toml` and every checkpoint read the same."""

__version__ = "0.1.0"
