"""Arrays of dask's, chunk by chunk; `pip install "fastbn[dask]"`.

1. Statistics are records (`Moments`, of integers `Totals`, of tables with missing values
   `ColumnMoments`), one of each chunk. Those of as many channels are merged in pairs, in the order
   of the chunks, and then joined: no result depends on which worker was ready first.
2. A chunk is read in C order, in which its values are summed: in which order a worker has it in
   memory depends on whether it came over the network.
3. Tasks run on one thread each, for the scheduler has as many of them as there are cores, and on
   the backend that was in force where the graph was made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn import _run, checks, functional
from fastbn._batch import Batch
from fastbn._call import Call
from fastbn.backends.base import Affine
from fastbn.columns import ColumnMoments
from fastbn.config import current, get_backend, use_backend, use_num_threads
from fastbn.functional import ActivationName
from fastbn.integers import Totals
from fastbn.layouts import channel_axis
from fastbn.results import Statistics
from fastbn.standardizer import Standardizer
from fastbn.statistics import Moments

try:
    import dask
    import dask.array as da
except ImportError as error:
    raise ImportError(
        "fastbn.dask needs dask and its arrays, which cannot be imported here; install them with "
        'pip install "fastbn[dask]"'
    ) from error

Array = NDArray[Any]
AT_ONCE = 16
"""Records that a task merges: a power of two, so that the whole is one tree of pairs."""


def moments(x: da.Array, *, layout: str = "NCHW") -> Statistics:
    """Mean and biased variance of each channel of a dask array, computed at once.

    ``mean = sum(x) / n`` and ``var = sum((x - mean)**2) / n`` over the n values of a channel, as
    `fastbn.moments` has them: statistics of chunks, merged in pairs.

    Parameters
    ----------
    x : dask.array.Array of float32, float64, float16, bfloat16, uint8, int8, uint16 or int16
        As `fastbn.moments` takes arrays; in chunks along any axes, of known sizes.
    layout : {"NCHW", "NHWC"}
        As in `fastbn.batch_norm`.

    Returns
    -------
    mean, var : ndarray of float64, shape (C,)
        Of chunks of the same sizes the same bits, whatever the scheduler and the number of workers;
        of integers also of any other chunks, and those of `fastbn.moments`.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type, shape or value.

    Examples
    --------
    >>> import dask.array as da, numpy as np
    >>> import fastbn.dask
    >>> x = da.from_array(np.float32([[1, 7], [3, 7]]), chunks=1)
    >>> fastbn.dask.moments(x)
    Statistics(mean=array([2., 7.]), var=array([1., 0.]))
    """
    found = merged("x", x, layout)
    return Statistics(found.mean.copy(), found.var.copy())


def normalize(
    x: da.Array,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    eps: float = 1e-5,
    layout: str = "NCHW",
    activation: ActivationName = None,
    residual: da.Array | Array | None = None,
    where: da.Array | Array | None = None,
    dtype: Any = None,
    out_layout: str | None = None,
) -> da.Array:
    """Normalize each channel of a dask array by given statistics, lazily, chunk by chunk.

    ``y = gamma * (x - mean) / sqrt(var + eps) + beta``: what `fastbn.normalize` gives of the whole
    array, bit for bit.

    Parameters
    ----------
    x : dask.array.Array
        Of the types that `fastbn.normalize` takes; in chunks along any axes, of known sizes.
    mean, var, gamma, beta : ndarray, shape (C,)
        As given to `fastbn.normalize`: of NumPy, not lazy.
    eps, layout, activation, dtype, out_layout
        As given to `fastbn.normalize`.
    residual, where : dask.array.Array or ndarray, optional
        As given to `fastbn.normalize`. They are brought into the chunks of x.

    Returns
    -------
    y : dask.array.Array
        Of x's shape and chunks, or what these are in `out_layout`. Nothing is computed yet.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type, shape or value.

    Examples
    --------
    >>> import dask.array as da, numpy as np
    >>> import fastbn.dask
    >>> x = da.from_array(np.float32([[1, 10], [3, 30]]), chunks=1)
    >>> y = fastbn.dask.normalize(x, np.float64([2, 20]), np.float64([1, 100]), eps=0.0)
    >>> y.chunks
    ((1, 1), (1, 1))
    >>> y.compute()
    array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    """
    vectors: dict[str, Any] = {"mean": mean, "var": var, "gamma": gamma, "beta": beta}
    batch = _batch("x", x, layout, where=checks.dask.stand_in("where", where))
    call = Call(current(), batch, **vectors)
    beside = checks.dask.stand_in("residual", residual)
    form = _run.form(call, eps, activation, beside, None, dtype, out_layout)
    axis, index = channel_axis(batch.layout, x.ndim), tuple(range(x.ndim))
    operands: list[Any] = [x, index]
    for vector in call.vectors.values():
        operands += (None, None) if vector is None else (_cut(vector, x.chunks[axis]), (axis,))
    known = form.epilogue and form.epilogue.residual, batch.where
    for given, checked in zip((residual, where), known, strict=True):
        there = given if checks.dask.is_lazy(given) else checked
        operands += (None, None) if there is None else (_like(there, x), index)
    options = {"eps": form.eps, "layout": batch.layout, "activation": activation}
    options |= {"dtype": form.dtype, "out_layout": form.layout}
    order = list(index)
    order.insert(channel_axis(form.layout, x.ndim), order.pop(axis))
    meta = np.empty((0,) * x.ndim, form.dtype)
    how: dict[str, Any] = {"backend": get_backend(), "options": options}
    how |= {"dtype": form.dtype, "meta": meta, "align_arrays": False}
    return da.blockwise(_normalized, tuple(order), *operands, **how)


def standardize(
    x: da.Array, *, layout: str = "NCHW", dtype: Any = None, out_layout: str | None = None
) -> da.Array:
    """Bring each channel of a dask array to mean 0 and deviation 1, in two passes over it.

    The first computes the moments at once; the second is the lazy result. Each holds a few chunks
    in memory, where one graph of both would hold all chunks until the moments are known.

    Parameters
    ----------
    x : dask.array.Array
        As given to `moments`.
    layout, dtype, out_layout
        As given to `fastbn.normalize`.

    Returns
    -------
    y : dask.array.Array
        As `normalize` returns it; a constant channel becomes 0.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type, shape or value, or x has no values.

    Examples
    --------
    >>> import dask.array as da
    >>> import fastbn.dask
    >>> x = da.random.default_rng(0).normal(5.0, 3.0, (1000, 8), chunks=(100, 4))
    >>> y = fastbn.dask.standardize(x)
    >>> mean, var = fastbn.dask.moments(y)
    >>> bool(abs(mean).max() < 1e-12), bool(abs(var - 1).max() < 1e-12)
    (True, True)
    """
    call = Call(current(), _batch("x", x, layout))
    _run.form(call, 0.0, None, None, None, dtype, out_layout)
    checks.dask.some_values("x", x)
    options: dict[str, Any] = {"layout": layout, "dtype": dtype, "out_layout": out_layout}
    return Standardizer._by(merged("x", x, layout), 1, options)(x)


def mapped(
    name: str, x: da.Array, affine: Affine, made_for: tuple[str, int], options: dict[str, Any]
) -> da.Array:
    """``(x - mean) * scale + beta``, lazily."""
    _batch(name, x, options["layout"], made_for=made_for)
    one = np.ones(len(affine.mean))
    return normalize(x, affine.mean, one, affine.scale, affine.beta, eps=0.0, **options)


def merged(name: str, x: Any, layout: Any) -> Moments:
    """The moments of an array, computed at once."""
    layout = _batch(name, x, layout).layout
    axis = channel_axis(layout, x.ndim)
    parts = [
        Moments._of_totals(part) if isinstance(part, Totals) else part
        for part in _merged_by_channels(axis, _of_chunk, x, layout=layout)
    ]
    mean, var = (np.concatenate([getattr(p, name) for p in parts]) for name in ("mean", "var"))
    count = parts[0].count
    return Moments._made(count, mean, var, count)


def columns(x: da.Array, weights: Array | None) -> ColumnMoments:
    """Those of a table whose rows weigh so much, computed at once."""
    beside = [] if weights is None else [_cut(weights, x.chunks[0]), (0,)]
    parts = _merged_by_channels(1, _of_table, x, *beside)
    names = ("count", "mean", "var")
    return ColumnMoments._made(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in names)
    )


# ---- Graphs ----


def _batch(name: str, x: Any, layout: Any, **options: Any) -> Batch:
    """The checked stand-in of an array of dask's."""
    stand_in = checks.dask.stand_in(name, checks.dask.array(name, x))
    return Batch(stand_in, layout, name=name, types=checks.arrays.DATA, **options)


def _cut(vector: Array, chunks: tuple[int, ...]) -> da.Array:
    """A vector in as many chunks as the axis that it belongs to."""
    return da.from_array(vector, chunks=(chunks,))


def _like(beside: Any, x: da.Array) -> da.Array:
    """What stands beside x, in its chunks; axes of one place are broadcast in the tasks."""
    beside = beside[(None,) * (x.ndim - beside.ndim)]
    if not checks.dask.is_lazy(beside):
        # dask copies an array, and makes a name of its values: of those that are in memory.
        once = (slice(None if stride else 1) for stride in beside.strides)
        beside = da.from_array(beside[tuple(once)], name=False)
    axes = zip(beside.shape, x.shape, x.chunks, strict=True)
    return beside.rechunk(tuple(cuts if n == length else (n,) for n, length, cuts in axes))


def _merged_by_channels(
    axis: int, of: Callable[..., Any], x: da.Array, *beside: Any, **options: Any
) -> list[Any]:
    """The records that `of` makes of chunks, merged: one for each chunk of the channels."""
    index = tuple(range(x.ndim))
    meta = np.empty((0,) * x.ndim, object)
    how: dict[str, Any] = {"dtype": object, "meta": meta, "align_arrays": False}
    how |= {"of": of, "backend": get_backend(), **options}
    # Blocks of records, so that dask makes one task of a chunk's loading and its record.
    records = da.blockwise(_record, index, x, index, *beside, **how).to_delayed()
    of_channels = [list(some.ravel()) for some in np.moveaxis(records, axis, 0)]
    return list(dask.compute(*map(_tree, of_channels)))


def _tree(records: list[Any]) -> Any:
    """A lazy record of all."""
    merge = dask.delayed(_merged_in_pairs, pure=True)
    while len(records) > 1:
        records = [merge(records[i : i + AT_ONCE]) for i in range(0, len(records), AT_ONCE)]
    return records[0]


# ---- Tasks ----


@contextmanager
def _on(backend: str) -> Iterator[None]:
    """Calls of a task."""
    with use_backend(backend), use_num_threads(1):
        yield


def _normalized(
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None,
    beta: Array | None,
    residual: Array | None,
    where: Array | None,
    *,
    backend: str,
    options: dict[str, Any],
) -> Array:
    if residual is not None:
        residual = np.broadcast_to(residual, x.shape)
    with _on(backend):
        return functional.normalize(
            x, mean, var, gamma, beta, residual=residual, where=where, **options
        )


def _record(x: Array, *beside: Array, of: Callable[..., Any], backend: str, **options: Any) -> Any:
    with _on(backend):
        return of(np.ascontiguousarray(x), *beside, **options)


def _of_chunk(x: Array, *, layout: str) -> Moments | Totals:
    batch = Batch(x, layout, types=checks.arrays.DATA)
    return Totals.of(batch, current()) if batch.is_integer else Moments._of(batch)


def _of_table(x: Array, weights: Array | None = None) -> ColumnMoments:
    return ColumnMoments.of(x, weights=weights)


def _merged_in_pairs(records: list[Any]) -> Any:
    """Neighbours merge, and what they make, until one is left."""
    while len(records) > 1:
        pairs = [records[i : i + 2] for i in range(0, len(records), 2)]
        records = [pair[0].merge(pair[1]) if len(pair) > 1 else pair[0] for pair in pairs]
    return records[0]
