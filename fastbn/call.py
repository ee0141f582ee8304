"""One call of a verb: its checked array and vectors, and their arrangement for a backend.

Every verb that a plain entry did not do begins by making a `Call`, which refuses what is wrong
before anything is written, and then asks it for views, tables and results.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn import checks
from fastbn._caches import CALLS_SHARE, parts, scratch
from fastbn.activations import LINEAR
from fastbn.backends.base import Backend, Gate, Selection, Table, Tail
from fastbn.elements import arithmetic
from fastbn.layouts import Arrangement, channel_axis

Array = NDArray[Any]

CHANNEL_BYTES = 160
"""Of the tables that a call makes here, for a channel: up to twenty float64 vectors at a time."""
WEIGHED = 16384
"""Samples whose weights are added up at a time."""


def count(x: Array, channels: int, where: Array | None, weights: Array | None) -> float:
    """Values of a channel that count, or the sum of their weights."""
    places = int(x.size // channels) if channels else 0
    if weights is None:
        return places if where is None else int(np.count_nonzero(where))
    weights = weights.astype(np.float64, copy=False)
    if where is None or not places:
        return float(weights.sum()) * (places / max(len(x), 1))
    where = where.reshape(len(x), -1)
    if where.shape[1] == 1:
        # In blocks that stay in cache, where there may be a weight for every few values.
        blocks = range(0, len(x), WEIGHED)
        return float(
            sum((where[i : i + WEIGHED, 0] * weights[i : i + WEIGHED]).sum() for i in blocks)
        )
    # Counted as bits: a sum of bytes over one axis takes ten times as long.
    each = np.bitwise_count(np.packbits(where, axis=1)).sum(1, dtype=np.int64)
    return float((each * weights).sum())


def count_of(x: Array, layout: str, where: Array | None, weights: Array | None) -> float:
    """The same of arguments as the verbs take them."""
    selected = None if where is None else checks.where(where, "x", x, layout)
    return count(x, x.shape[channel_axis(layout, x.ndim)], selected, weights)


class Call:
    """One call's checked array and per-channel vectors, and how its memory is arranged."""

    def __init__(
        self,
        x: Any,
        name: str,
        layout: Any,
        where: Any = None,
        weights: Any = None,
        *,
        single: bool = True,
        **vectors: Any,
    ) -> None:
        self.array, self.name = checks.batch(name, x), name
        self.layout = checks.layout(layout)
        self.channels = x.shape[channel_axis(layout, x.ndim)]
        self.vectors: dict[str, Array | None] = {}
        for key, value in vectors.items():
            if key in ("mean", "var"):
                self.vectors[key] = checks.statistic(key, value, name, x, layout, single=single)
            else:
                self.vectors[key] = checks.parameter(key, value, name, x, layout)
        selected = None if where is None else checks.where(where, name, x, layout)
        weights = None if weights is None else checks.weights(weights, name, x)
        self.apart = {"where": selected, "weights": weights}
        self.count = count(x, self.channels, selected, weights)
        self.is_empty = prod(x.shape) == 0 or self.count == 0
        if not self.is_empty:
            self.arrangement = Arrangement.of(x, layout, by_sample=weights is not None)
            self.selection = self._selected(selected, weights)

    def output(
        self,
        name: str,
        out: Any,
        in_place: dict[str, Array | None],
        apart: dict[str, Array | None] | None = None,
    ) -> Array:
        """The checked `out`, or a fresh array in x's memory order."""
        x = self.array
        if out is not None:
            apart = self.vectors | self.apart | (apart or {})
            return checks.output(name, out, self.name, x, in_place=in_place, apart=apart)
        dtype = x.dtype.newbyteorder("=")
        if self.is_empty:
            return np.empty_like(x, dtype, subok=False)
        return self.arrangement.fresh(x.shape, dtype)

    def _selected(self, where: Array | None, weights: Array | None) -> Selection | None:
        """What counts, as a backend takes it."""
        if where is None and weights is None:
            return None
        if where is None:
            shape = list(self.array.shape)
            shape[channel_axis(self.layout, self.array.ndim)] = 1
            where = np.broadcast_to(np.True_, shape)
        of_runs = None
        if weights is not None:
            of_runs = np.ascontiguousarray(weights, np.float64)[None]
        return Selection(self.arrangement.mask(where), of_runs, self.count)

    def tail(self, activation: Any, residual: Any) -> Tail | None:
        """What follows normalization, on arrays; None for nothing."""
        if residual is not None:
            residual = checks.companion("residual", residual, self.name, self.array)
        asked = checks.activation(activation)
        return None if residual is None and asked == LINEAR else Tail(asked, residual)

    def arranged(self, tail: Tail | None) -> Tail | None:
        """A tail on views."""
        if tail is None or tail.residual is None:
            return tail
        return Tail(tail.activation, self.view(tail.residual))

    def gate(self, activation: Any, y: Any, dresidual: Any, dy: Array, x: Any) -> Gate | None:
        """What stands before the normalization on the way back, on arrays; None for nothing.

        Where only the residual's gradient is wanted, dy is its own gate.
        """
        asked, y = checks.activation(activation), checks.gate(y, activation, self.name, self.array)
        given = dresidual if isinstance(dresidual, np.ndarray) else None
        if given is not None or checks.flag("dresidual", dresidual):
            wanted = self.output("dresidual", given, {"dy": dy}, {"x": x, "y": y})
            return Gate(asked, dy if y is None else y, wanted)
        return None if y is None else Gate(asked, y, None)

    def view(self, a: Array) -> Array:
        """`a`, of x's shape, as a (G, N, C, S) view."""
        return self.arrangement.view(a)

    def parts(self, backend: Backend) -> list[slice]:
        """The channels, in parts whose tables stay small beside x; mostly one."""
        shape = self.arrangement.view_shape
        each = CHANNEL_BYTES + backend.channel_bytes(shape)
        return parts(shape[2], shape[3], scratch(self.array.nbytes, CALLS_SHARE), each)

    def table(self, name: str, default: float, part: slice) -> Table:
        """Part of a per-channel vector, or of its default, as a (G, C) table."""
        vector = self.vectors[name]
        if vector is None:
            return np.full((1, part.stop - part.start), default)
        return vector[part].astype(np.float64)[None]

    def zeros(self, dtype: Any) -> Array:
        """A vector of zeros, one a channel."""
        return np.zeros(self.channels, dtype)

    def gradient(self) -> Array:
        """Zeros for a gradient of gamma or beta: in gamma's type or, without, in arithmetic's."""
        gamma = self.vectors["gamma"]
        dtype = arithmetic(self.array.dtype) if gamma is None else gamma.dtype
        return self.zeros(dtype.newbyteorder("="))
