"""Checks of numbers that callers pass, with messages that name them."""

import numbers
from typing import Any

import numpy as np


def check_finite(**arguments: Any) -> None:
    """Raises ValueError, by name, for values that are not numbers or not finite; None passes."""
    for name, value in arguments.items():
        if value is None:
            continue
        try:
            array = np.asarray(value)
        except ValueError:  # lists of different lengths
            array = np.asarray(None)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"{name}={value!r}: must be a number")
        wrong = array[~np.isfinite(array)]
        if wrong.size:
            raise ValueError(f"{name}={wrong.flat[0]:g}: must be a finite number")


def check_number(**arguments: Any) -> None:
    """As `check_finite`, and for arrays and lists."""
    check_finite(**arguments)
    for name, value in arguments.items():
        if np.ndim(value):
            raise ValueError(f"{name}={value!r}: must be one number")


def whole(**arguments: Any) -> tuple[int | None, ...]:
    """The values as int; None passes. Raises ValueError, by name, for any but whole numbers."""
    for name, value in arguments.items():
        fits = value is None or isinstance(value, numbers.Real) and value == value // 1
        if not fits or isinstance(value, bool) or value is not None and abs(value) >= 2**63:
            raise ValueError(f"{name}={value!r}: must be a whole number")
    return tuple(None if value is None else int(value) for value in arguments.values())
