"""Arrays as the oracle sees them, and the element types it speaks of.

Every array is seen as rows, (C, n), one row a channel; those of group, instance and layer norm as
(N, C, places).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Wide = NDArray[np.longdouble]

DTYPES = (np.float32, np.float64)
HALVES: tuple[Any, ...] = (np.float16,)
"""With bfloat16, where ml_dtypes is installed."""
LAYOUTS = ("NCHW", "NHWC")

_finfo: Any = np.finfo
try:
    import ml_dtypes
except ImportError:
    pass
else:
    HALVES = (*HALVES, ml_dtypes.bfloat16)
    _finfo = ml_dtypes.finfo

assert np.finfo(np.longdouble).eps < 2**-60, "the oracle needs an extended long double"


def channel_axis(ndim: int, layout: str) -> int:
    """The axis of the channels."""
    return 1 if layout == "NCHW" else ndim - 1


def channels_of(x: Array, layout: str) -> int:
    """The number of channels."""
    return int(x.shape[channel_axis(x.ndim, layout)])


def rows(a: Array, layout: str) -> Array:
    """The values as (C, n): a row is a channel."""
    axis = channel_axis(a.ndim, layout)
    return np.moveaxis(a, axis, 0).reshape(a.shape[axis], -1)


def wide(a: Array, layout: str) -> Wide:
    """The rows in extended precision."""
    return rows(a, layout).astype(np.longdouble)


def to_layout(a: Array, layout: str) -> Array:
    """An NCHW array as a dense array of `layout`."""
    return a if layout == "NCHW" else np.ascontiguousarray(np.moveaxis(a, 1, -1))


def vector(v: Array | None, default: float, channels: int) -> Wide:
    """A parameter, or its default, in extended precision."""
    if v is None:
        return np.full(channels, default, np.longdouble)
    return v.astype(np.longdouble)


def by_sample(a: Array, layout: str) -> Wide:
    """The values as (N, C, P) in extended precision."""
    moved = np.moveaxis(a, channel_axis(a.ndim, layout), 1)
    return moved.reshape(*moved.shape[:2], -1).astype(np.longdouble)


def limits(dtype: Any) -> Any:
    """eps, max and smallest_subnormal of a type, of bfloat16 too."""
    return _finfo(np.dtype(dtype))
