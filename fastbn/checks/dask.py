"""Arrays of dask's, looked at without importing it."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from fastbn.checks.words import described


def is_lazy(value: Any) -> bool:
    """Whether this is an array of dask's: there is none before its module is imported."""
    return isinstance(value, getattr(sys.modules.get("dask.array"), "Array", ()))


def array(name: str, value: Any) -> Any:
    """An array of dask's whose shape is known."""
    if not is_lazy(value):
        raise TypeError(
            f"{name} is {described(value)}, expected a dask.array.Array; make one with "
            f"dask.array.from_array({name}), or call fastbn's function of this name for what fits "
            "into memory"
        )
    for axis, length in enumerate(value.shape):
        if math.isnan(length):
            raise ValueError(
                f"{name} has chunks of unknown size along axis {axis} (shape {value.shape}), "
                f"expected known ones; pass {name}.compute_chunk_sizes() or, where it comes from "
                "a data frame, ask its to_dask_array for lengths=True"
            )
    return value


def stand_in(name: str, value: Any) -> Any:
    """What other checks look at: for an array of dask's one of NumPy's with its shape and type and
    no memory, or what its chunks are if they are not NumPy's; anything else as it came."""
    if not is_lazy(value):
        return value
    chunk = array(name, value)._meta
    if not isinstance(chunk, np.ndarray) or isinstance(chunk, np.ma.MaskedArray):
        return chunk
    return np.broadcast_to(np.zeros((), value.dtype), value.shape)


def some_values(name: str, x: Any) -> None:
    """An array of dask's that is not empty."""
    if not x.size:
        raise ValueError(
            f"{name} has no values (shape {x.shape}), expected one or more of each channel; there "
            "is no mean and no deviation to bring them to"
        )


def no_output(value: Any) -> None:
    """None, where the result is lazy."""
    if value is not None:
        raise TypeError(
            f"out is {described(value)}, expected None for a dask array, of which the result is "
            "lazy; leave it out, and store the result by its to_zarr or by dask.array's store"
        )
