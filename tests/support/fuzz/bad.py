"""Random calls with an illegal argument among legal ones: refused, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from support.fuzz.cases import VERBS, Case
from support.random_arrays import Array, Placed, Source

Corruption = Callable[[Any, Source], Any]
"""An illegal value in place of a legal one; None where there is none such."""


def _longer(a: Placed, s: Source) -> Array:
    """One more along an axis."""
    shape = list(a.view.shape)
    shape[s.random.randrange(len(shape))] += 1
    return np.ones(shape, a.view.dtype)


def _other_type(a: Placed, s: Source) -> Array:
    own = a.view.dtype.type
    others = [t for t in (np.float16, np.float32, np.float64, np.int32) if t is not own]
    return np.ones(a.view.shape, s.choice(others))


def _no_result(a: Placed, s: Source) -> Array:
    """Neither x's type nor one that it may become."""
    own = a.view.dtype.type
    return np.ones(a.view.shape, np.int32 if own is np.float64 else np.float64)


def _no_numbers(a: Placed, s: Source) -> Any:
    return np.ones(a.view.shape).astype(s.choice(["i8", "c8", "?", "O", "U3"]))


def _no_array(a: Placed, s: Source) -> Any:
    return s.choice((a.view.tolist(), "x", 1.5, np.ma.array(a.view)))


def _flat(a: Placed, s: Source) -> Array:
    return np.ones(a.view.size, a.view.dtype)


def _one_bad(*values: float) -> Corruption:
    """A value that is not allowed, somewhere."""

    def corrupt(a: Placed, s: Source) -> Any:
        if not a.view.size:
            return None
        bad = np.array(a.view, a.view.dtype.newbyteorder("="))
        bad.flat[s.random.randrange(bad.size)] = s.choice(values)
        return bad

    return corrupt


def _read_only(a: Placed, s: Source) -> Array:
    view = np.ones(a.view.shape, a.view.dtype)
    view.flags.writeable = False
    return view


def _of_values(*values: Any) -> Corruption:
    return lambda given, s: s.choice(values)


LIKE_X = (_longer, _other_type, _no_numbers, _no_array)
VECTOR = (_longer, _no_numbers, _no_array)
CORRUPTIONS: dict[str, tuple[Corruption, ...]] = {
    "x": (_flat, _no_numbers, _no_array),
    **dict.fromkeys(("dy", "residual", "y", "ddx", "skip", "dsum"), LIKE_X),
    **dict.fromkeys(("gamma", "beta", "mean", "ddgamma", "ddbeta"), VECTOR),
    **dict.fromkeys(("var", "mean_square"), (*VECTOR, _one_bad(-1.0, -1e-5))),
    "out": (_longer, _no_result, _no_numbers, _no_array, _read_only),
    "dtype": (_of_values("i4", "f4x", ">f4", 3, np.int16, "S3"),),
    "out_layout": (_of_values("NCWH", "nchw", 3, b"NCHW"),),
    "where": (
        lambda a, s: np.ones(a.view.shape, np.int8),
        lambda a, s: np.ones((2, *[1] * 7), bool),
        lambda a, s: a.view.tolist(),
    ),
    "weights": (*VECTOR, _one_bad(-1.0, np.nan, np.inf)),
    "layout": (_of_values("NCWH", "nchw", 3, None, b"NCHW"),),
    "axes": (_of_values("rows", "first", -1, None, b"last"),),
    "eps": (_of_values(-1.0, -1e-300, np.nan, np.inf, True, "1e-5", None, 1j),),
    "activation": (_of_values("gelu", ("leaky_relu", 2.0), ("leaky_relu",), 5, ("relu",)),),
    "virtual_batch": (_of_values(0, -1, 2.5, True, "2"),),
    "params": (_of_values(1, None, "yes"),),
    **dict.fromkeys(("dgamma_of_sums", "dbeta_of_sums"), VECTOR),
    "count_of_sums": (_of_values(-1.0, np.nan, np.inf, True, "9", None),),
    "dresidual": (_of_values("yes", 1, None),),
}


MAY_BE_NONE = ("axes", "layout", "eps", "params", "dresidual", "count_of_sums")
"""Options for which None is illegal."""


def bad(s: Source) -> Case:
    """A verb's case with one argument made illegal."""
    (made,) = s.random.choices(list(VERBS), list(VERBS.values()))
    case = made(s)
    names = [n for n, v in case.arguments.items() if n in CORRUPTIONS and v is not None]
    name = s.choice(names)
    given = case.arguments[name]
    # Where there is no x, dy has a shape of its own.
    alone = name == "dy" and case.arguments["x"] is None
    wrong = s.choice(CORRUPTIONS["x" if alone else name])(given, s)
    if wrong is None and name not in MAY_BE_NONE:
        return bad(s)
    case.arguments[name] = wrong
    came = f"{wrong.dtype} {wrong.shape}" if isinstance(wrong, np.ndarray) else f"{wrong!r:.60}"
    case.errors, case.wrong = (TypeError, ValueError), f"{name}, {came}"
    return case
