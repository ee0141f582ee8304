"""The one exception of the library that NumPy does not have, and how messages show a value."""

from __future__ import annotations

from enum import Enum
from itertools import islice
from numbers import Number
from typing import Any

import numpy as np

MOST = 60
"""Characters of a value in a message."""
FEW, DEEP = 3, 4
"""Items of a container, and levels of containers in it, that are shown."""
BRACKETS: dict[type, str] = {list: "[]", tuple: "()", set: "{}", dict: "{}"}


class BackendError(RuntimeError):
    """A backend or instruction set was asked for that cannot run here."""


def shown(value: Any) -> str:
    """A value as messages show it, in `MOST` characters and in no time: the beginning of what is
    long, and the type of what is neither a number, a word nor a container of Python's own."""
    try:
        text = _text(value, 0)
    except Exception:  # of somebody's __repr__
        text = f"<{type(value).__name__}>"
    return text if len(text) <= MOST else f"{text[: MOST - 3]}..."


def _text(value: Any, level: int) -> str:
    kind = type(value)
    if kind in BRACKETS and level < DEEP:
        return _items(value, level + 1)
    if isinstance(value, str) and not isinstance(value, Enum):
        return repr(str.__getitem__(value, slice(MOST)))
    if isinstance(value, bytes):
        return repr(bytes.__getitem__(value, slice(MOST)))
    if issubclass(kind, np.ndarray):
        a = np.ndarray.view(value, np.ndarray)
        if a.size <= FEW and a.dtype.kind in "biufcU":
            return repr(a)
        return f"<ndarray of shape {a.shape} and dtype {a.dtype}>"
    if value is None or isinstance(value, Number | np.bool_ | Enum | type):
        return repr(value)
    return f"<{kind.__name__}>"


def _items(value: Any, level: int) -> str:
    """A container's first items, between its brackets."""
    brackets = BRACKETS[type(value)]
    texts = [_text(item, level) for item in islice(value, FEW)]
    if isinstance(value, dict):
        texts = [f"{key}: {_text(value[k], level)}" for key, k in zip(texts, value, strict=False)]
    if len(value) > FEW:
        texts.append("...")
    comma = "," if isinstance(value, tuple) and len(value) == 1 else ""
    return f"{brackets[0]}{', '.join(texts)}{comma}{brackets[1]}"
