"""One call of a verb: its checked array and vectors, and their arrangement for a backend.

Every verb that a plain entry did not do begins by making a `Call`, which refuses what is wrong
before anything is written, and then asks it for views, tables and results.

1. Its *spans* are samples whose runs are alike: all of them as one run, or whole virtual batches as
   so many runs, and what is left of the samples as a smaller one.
2. Statistics are tables with a row for each run.
3. A span is worked on in *parts*, some of its runs or channels, whose tables stay small.
4. Statistics of each sample by itself (group norm and its like) are those of virtual batches of
   one, in which consecutive channels are pooled.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbn import checks
from fastbn._batch import Batch
from fastbn._pool import empty
from fastbn.activations import LINEAR
from fastbn.backends.base import ActivationGrad, Backend, Epilogue, Part, Selection, Table
from fastbn.backends.tuning import CALLS_SHARE, ROW_BYTES, RUN_BYTES, SUM_BYTES, parts, scratch
from fastbn.elements import arithmetic
from fastbn.layouts import (
    ALL_CHANNELS,
    EACH_CHANNEL,
    LAST_AXIS,
    Arrangement,
    channel_axis,
    frame_of,
    moved,
)
from fastbn.results import GradientSums
from fastbn.weights import times_power

Array = NDArray[Any]

SMALLEST = 1 << 20
"""Bytes of x whose runs are worked on at once, however large their tables."""


class Span(NamedTuple):
    """Samples whose runs are alike, and how their memory is arranged."""

    samples: slice
    runs: slice
    """Their rows in tables of statistics."""
    arrangement: Arrangement
    selection: Selection | None
    backend: Backend
    threads: int

    def view(self, a: Array, pool: int = 1) -> Array:
        """Its part of `a`, of x's shape, as a (G, N, C, S) view that the backend walks. `pool`:
        channels whose moments are summed as one plane (forward alone), which must lie together."""
        a = np.asarray(a[self.samples], dtype=a.dtype.newbyteorder("="))
        v = self.arrangement.view(a)
        if v is not None and self.backend.walks(v, pool):
            return v
        v = self.arrangement.new(a.dtype)
        self.backend.copy(*self.arrangement.alike(a, v), self.threads)
        return v

    def target(self, out: Array) -> Array:
        """A view to write: of `out` itself if the backend walks it, else a fresh array."""
        v = self.arrangement.view(np.asarray(out[self.samples]))
        if v is not None and self.backend.walks(v):
            return v
        return self.arrangement.new(out.dtype)

    def deliver(self, result: Array, out: Array) -> None:
        """Bring `result`, what `target(out)` gave, home into `out`."""
        out = np.asarray(out[self.samples])
        if not np.may_share_memory(result, out):
            there, here = self.arrangement.alike(out, result)
            self.backend.copy(here, there, self.threads)

    def selected(self, part: Part) -> Selection | None:
        """What counts of a part."""
        return None if self.selection is None else self.selection.part(part)

    def epilogue(self, epilogue: Epilogue | None) -> Epilogue | None:
        """An epilogue on views."""
        if epilogue is None or epilogue.residual is None:
            return epilogue
        return Epilogue(epilogue.activation, self.view(epilogue.residual))

    def activation_grad(self, activation_grad: ActivationGrad | None) -> ActivationGrad | None:
        """The gradient through an activation on views, and its dresidual on one to write."""
        if activation_grad is None:
            return None
        wanted = (
            None if activation_grad.dresidual is None else self.target(activation_grad.dresidual)
        )
        return ActivationGrad(activation_grad.activation, self.view(activation_grad.y), wanted)

    def parts(self, array_bytes: int, held: int = SUM_BYTES, pool: int = 1) -> list[Part]:
        """All runs and channels, cut so that tables stay small beside the array; mostly one part.
        `held`: bytes of tables that the verb itself holds for each channel; of a fused walk the
        sums, or statistics, until they are in the results."""
        shape = self.arrangement.view_shape
        runs, _, channels, size = shape
        each, limit = held + self.backend.channel_bytes(shape), scratch(array_bytes, CALLS_SHARE)
        if runs == 1:
            return [Part(slice(0, 1), some) for some in parts(channels, size, limit, each, pool)]
        run_bytes, each = array_bytes // runs, each - held + RUN_BYTES
        at_once = max(limit // (each * channels), SMALLEST // run_bytes, 1)
        starts = range(0, runs, at_once)
        return [Part(slice(i, min(i + at_once, runs)), slice(0, channels)) for i in starts]

    def row_parts(self, array_bytes: int, period: int) -> list[Part]:
        """All rows, in parts of whole periods."""
        shape = self.arrangement.view_shape
        rows, limit = shape[2], scratch(array_bytes, CALLS_SHARE)
        each = period * (ROW_BYTES + self.backend.channel_bytes(shape))
        at_once = max(limit // each, SMALLEST * rows // array_bytes // period, 1) * period
        starts = range(0, rows, at_once)
        return [Part(slice(0, 1), slice(i, min(i + at_once, rows))) for i in starts]

    def at(self, part: Part, pool: int = 1) -> tuple[slice, slice]:
        """Where a part stands in tables of statistics."""
        first, channels = self.runs.start, part.channels
        of_run = slice(channels.start // pool, channels.stop // pool)
        return slice(first + part.runs.start, first + part.runs.stop), of_run


class Sharing(NamedTuple):
    """What shares statistics in each sample: groups of `pool` consecutive channels; the shape of a
    table of them as the caller sees it."""

    groups: int
    pool: int
    shape: tuple[int, ...]

    @staticmethod
    def of(groups: int, x: Array, channels: int) -> Sharing:
        """By a number of groups, or one of the words of `layouts` for it."""
        samples = len(x)
        if groups == EACH_CHANNEL:
            return Sharing(channels, 1, (samples, channels))
        if groups == ALL_CHANNELS:
            return Sharing(1, max(channels, 1), (samples,))
        if groups == LAST_AXIS:
            return Sharing(1, max(channels, 1), x.shape[:-1])
        checks.options.divisor(groups, channels)
        return Sharing(groups, max(channels // groups, 1), (samples, groups))


class Call:
    """One call's checked array and per-channel vectors, and its spans."""

    def __init__(
        self,
        on: tuple[Backend, int],
        batch: Batch,
        *,
        virtual_batch: Any = None,
        groups: int | None = None,
        is_fixed: bool = True,
        is_part: bool = False,
        **vectors: Any,
    ) -> None:
        """`is_fixed`: mean and var are constants, of any type and not NaN; else the batch's own, in
        float64. `is_part`: the array is part of a batch that has these statistics."""
        (self.backend, self.threads), self.batch = on, batch
        self.array = x = batch.array
        self.channels, self.count = batch.channels, batch.count
        given = {"where": batch.where, "weights": batch.weights}
        self.virtual_batch = checks.options.virtual_batch(virtual_batch, **given)
        self.sharing = None if groups is None else Sharing.of(groups, x, self.channels)
        self.pool = 1
        self.of_rows = groups == LAST_AXIS
        if self.sharing is not None:
            self.virtual_batch, self.pool = 1, self.sharing.pool
        self.runs = None if self.virtual_batch is None else -(-len(x) // self.virtual_batch)
        if self.of_rows:
            self.runs = prod(x.shape[:-1])
        self.vectors = {key: self._vector(key, value, is_fixed) for key, value in vectors.items()}
        # Samples of a part may weigh nothing beside others, whose statistics normalize them.
        self.is_empty = x.size == 0 or (batch.places if is_part else self.count) == 0
        self.spans: list[Span] = []
        if not self.is_empty:
            by_sample = batch.weights is not None
            self.arrangement = (
                Arrangement.of_rows(x)
                if self.of_rows
                else Arrangement.of(x, batch.layout, by_sample=by_sample)
            )
            self.spans = list(self._spans())

    def _vector(self, key: str, value: Any, is_fixed: bool) -> Array | None:
        """A parameter or statistic, checked."""
        if key in ("mean", "var", "mean_square"):
            return self._statistic(key, value, is_fixed)
        return checks.vectors.parameter(key, value, *self._of)

    @property
    def _of(self) -> tuple[str, Array, str]:
        """The name, array and layout that vectors are checked against, and messages name."""
        layout = checks.vectors.LAST if self.of_rows else self.batch.layout
        return self.batch.name, self.array, layout

    def _statistic(self, key: str, value: Any, is_fixed: bool) -> Array:
        """mean or var as given: of the whole batch, each run, or what shares it in each sample."""
        shared, x = self.sharing, self.array
        if shared is not None:
            given = checks.vectors.sample_statistic(key, value, self.batch.name, x, shared.shape)
        else:
            options: dict[str, Any] = {"is_fixed": is_fixed, "runs": self.runs}
            given = checks.vectors.statistic(key, value, *self._of, **options)
        if key != "mean":
            checks.vectors.variance(given, nan=not is_fixed, name=key)
        if shared is None or self.runs is None:
            return given
        return given.reshape(self.runs, shared.groups)

    def _spans(self) -> Iterator[Span]:
        """All samples as one run; or whole virtual batches as so many, and what is left as one."""
        n, k, start, run = len(self.array), self.virtual_batch, 0, 0
        on = self.backend, self.threads
        if self.of_rows:
            yield Span(slice(0, n), slice(0, self.runs), self.arrangement, None, *on)
            return
        if k is None:
            selection = self._selected()
            yield Span(slice(0, n), slice(0, 1), self.arrangement, selection, *on)
            return
        while start < n:
            runs = max((n - start) // k, 1)
            samples = slice(start, min(start + runs * k, n))
            some = self.array[samples]
            order: dict[str, Any] = {"whole": self.array, "runs": runs, "pool": self.pool}
            of_runs = Arrangement.of(some, self.batch.layout, **order)
            selection = None if of_runs.by_row else self._selected_of_samples(of_runs)
            yield Span(samples, slice(run, run + runs), of_runs, selection, *on)
            start, run = samples.stop, run + runs

    @property
    def row_mask(self) -> Array | None:
        """Of rows those that count, if not all."""
        where, sharing = self.batch.where, self.sharing
        if where is None or sharing is None:
            return None
        return np.repeat(where.reshape(-1), sharing.groups)

    @property
    def hidden_samples(self) -> Array | None:
        """Samples of which nothing counts, where there may be any."""
        if self.batch.where is None or self.sharing is None or self.of_rows:
            return None
        hidden: Array = ~self.batch.where.any(tuple(range(1, self.array.ndim)))
        return hidden

    @property
    def by_row(self) -> bool:
        """Whether what shares statistics is rows of memory."""
        return any(span.arrangement.by_row for span in self.spans)

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
            return self._checked_output(name, out, in_place=in_place, apart=apart or {})
        dtype = x.dtype.newbyteorder("=")
        if self.is_empty:
            return np.empty_like(x, dtype, subok=False)
        return self.arrangement.fresh(x.shape, dtype)

    def result(self, out: Any, residual: Array | None, dtype: np.dtype[Any], layout: str) -> Array:
        """Where y goes that may be of another type than x and in another layout, with x's axes: the
        checked `out`, or a fresh array, in another layout a dense one."""
        x, axis = self.array, channel_axis(self.batch.layout, self.array.ndim)
        there = channel_axis(layout, x.ndim)
        shape = list(x.shape)
        shape.insert(there, shape.pop(axis))
        if out is not None:
            like: dict[str, Any] = {"shape": tuple(shape), "dtype": dtype}
            in_place = {"x": x, "residual": residual}
            y = self._checked_output("out", out, in_place=in_place, apart={}, **like)
        elif there == axis and not self.is_empty:
            return self.arrangement.fresh(x.shape, dtype)
        else:
            y = empty(tuple(shape), dtype)
        return moved(y, there, axis)

    def moves(self, y: Array, epilogue: Epilogue | None) -> bool:
        """Whether y is of another type than x, or in another order of memory that it can be brought
        into on the way; or whether a curve follows, which is applied there."""
        x, layout = self.array, self.batch.layout
        if y.dtype != x.dtype.newbyteorder("=") or (epilogue and epilogue.activation.curve):
            return True
        if self.batch.where is not None or (epilogue and epilogue.residual is not None):
            return False
        v = self.arrangement.view(y)
        walks = v is not None and self.backend.walks(v)
        return not walks and frame_of(x, layout) is not None and frame_of(y, layout) is not None

    def widened(self, dtype: np.dtype[Any]) -> Call:
        """The same call on an array of `dtype`, in x's memory order."""
        same = copy(self)
        same.array = self.array.astype(dtype)
        return same

    def _checked_output(self, name: str, out: Any, *, apart: Any, **rest: Any) -> Array:
        """An output of the caller's, apart from all that is read."""
        masks = {"where": self.batch.where, "weights": self.batch.weights}
        apart = self.vectors | masks | apart
        return checks.memory.output(name, out, self.batch.name, self.array, apart=apart, **rest)

    def _selected(self) -> Selection | None:
        """What counts, as a backend takes it."""
        batch, where = self.batch, self.batch.where
        if where is None and batch.scaled_weights is None:
            return None
        if where is None:
            shape = list(self.array.shape)
            shape[channel_axis(batch.layout, self.array.ndim)] = 1
            where = np.broadcast_to(np.True_, shape)
        mask = self.arrangement.mask(where)
        if batch.scaled_weights is None or not self.count:
            return Selection(mask, None, np.array([batch.places], np.float64))
        count = np.array([self._scaled_count(self.count)])
        return Selection(mask, batch.scaled_weights.values[None], count)

    def _selected_of_samples(self, arrangement: Arrangement) -> Selection | None:
        """What counts in samples that have statistics of their own."""
        if self.batch.where is None:
            return None
        mask = arrangement.mask(self.batch.where)
        counts = np.count_nonzero(mask, axis=(1, 2)).astype(np.float64)
        return Selection(mask, None, np.maximum(counts, 1))

    def _scaled_count(self, count: float) -> float:
        """A sum of weights as given, as one of weights as a backend takes them."""
        weights = self.batch.scaled_weights
        return count if weights is None else times_power(count, weights.exponent)

    def sums(self, given: Any) -> GradientSums | None:
        """Those of a whole batch, checked, as a backend takes them; None for None."""
        if given is None:
            return None
        known = checks.statistics.gradient_sums(given, self.count, *self._of)
        return known._replace(count=self._scaled_count(known.count))

    def epilogue(
        self,
        activation: Any,
        residual: Any,
        dtype: np.dtype[Any] | None = None,
        *,
        curves: bool = False,
    ) -> Epilogue | None:
        """What follows normalization, on arrays; None for nothing. `dtype`: a residual's, if not
        x's. `curves`: activations of inference too."""
        if residual is not None:
            of = self.batch.name, self.array, dtype
            residual = checks.arrays.companion("residual", residual, *of)
        asked = checks.options.activation(activation, curves=curves)
        return None if residual is None and asked == LINEAR else Epilogue(asked, residual)

    def backward_outputs(
        self,
        activation: Any,
        y: Any,
        dresidual: Any,
        out: Any,
        dy: Array,
        x: Array | None,
        dsum: Array | None = None,
    ) -> tuple[ActivationGrad | None, Array]:
        """What stands before the normalization on the way back, on arrays, None for nothing; and
        where dx goes.

        Where only dresidual is wanted, dy stands in for y: with no activation, no slope is taken
        from it.
        """
        known, y = checks.arrays.activation_grad(y, activation, self.batch.name, self.array)
        activation_grad = None if y is None else ActivationGrad(known, y, None)
        given = None if checks.arrays.as_ndarray(dresidual) is None else dresidual
        if given is not None or checks.options.flag("dresidual", dresidual):
            wanted = self.output("dresidual", given, {"dy": dy}, {"x": x, "y": y, "dsum": dsum})
            activation_grad = ActivationGrad(known, dy if y is None else y, wanted)
        apart = {"y": y, "dsum": dsum}
        apart["dresidual"] = activation_grad and activation_grad.dresidual
        return activation_grad, self.output("out", out, {"dy": dy, "x": x}, apart)

    def given(self, name: str, span: Span, part: Part, dtype: Any = None) -> Array | None:
        """A part's statistics or parameter as a (G, C) table, as it came if no type is wanted; None
        for None."""
        vector, runs = self.vectors[name], part.runs.stop - part.runs.start
        if vector is None:
            return None
        some = vector[part.channels] if vector.ndim == 1 else vector[span.at(part, self.pool)]
        wanted = some.dtype.newbyteorder("=") if dtype is None else dtype
        if some.dtype != wanted or not some.flags.aligned:
            some = np.require(some, wanted, ["ALIGNED"])
        if vector.ndim == 2:
            return some
        return some[None] if runs == 1 else np.broadcast_to(some, (runs, some.size))

    def table(self, name: str, default: float, span: Span, part: Part) -> Table:
        """The same in float64, or a table of its default."""
        given = self.given(name, span, part, np.float64)
        if given is None:
            given = np.full(part.channels.stop - part.channels.start, default)[None]
        return given

    def new_statistics(self) -> Table:
        """A table of zeros, a row for each run."""
        groups = self.channels if self.sharing is None else self.sharing.groups
        return np.zeros((1 if self.runs is None else self.runs, groups))

    def shaped(self, statistics: Table) -> Table:
        """As they are returned: of one run in all, a vector."""
        if self.sharing is not None:
            return statistics.reshape(self.sharing.shape)
        return statistics[0] if self.runs is None else statistics

    def new_gradient(self) -> Array:
        """Zeros for a gradient of gamma or beta: in gamma's type or, without, in arithmetic's."""
        gamma = self.vectors["gamma"]
        dtype = arithmetic(self.array.dtype) if gamma is None else gamma.dtype
        return np.zeros(self.channels, dtype.newbyteorder("="))
