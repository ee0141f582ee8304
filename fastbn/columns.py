"""Statistics of tables with missing values: every column has a count of its own.

NaN are missing values. Columns that hold any are summed again by themselves without them; all
others are as `fastbn.moments` gives them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn import checks
from fastbn.backends.base import quiet
from fastbn.immutable import Immutable, locked
from fastbn.statistics import Moments

Array = NDArray[Any]
Vector = NDArray[np.float64]


class ColumnMoments(Immutable):
    """Count, mean and biased variance of each column of a table, NaN left out; they merge.

    Parameters
    ----------
    count : ndarray of float32 or float64, shape (C,)
        Values of each column, or the sums of their weights; zero or more.
    mean, var : ndarray of float32, float64, float16 or bfloat16, shape (C,)
        Mean and biased variance, as `fastbn.normalize` takes them; 0 of a column without values.

    Attributes
    ----------
    count, mean, var : ndarray of float64, shape (C,), read-only

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type, shape or value.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> table = np.float32([[1, 7], [np.nan, 9], [3, np.nan]])
    >>> found = fastbn.ColumnMoments.of(table[:2]).merge(fastbn.ColumnMoments.of(table[2:]))
    >>> found
    ColumnMoments(count=array([2., 2.]), mean=array([2., 8.]), var=array([1., 1.]))
    >>> fastbn.normalize(table, found.mean, found.var, eps=0.0)
    array([[-1., -1.],
           [nan,  1.],
           [ 1., nan]], dtype=float32)
    """

    __slots__ = ("__weakref__", "count", "mean", "var")
    _called = "ColumnMoments"
    _remedy = "make others"
    count: Vector
    mean: Vector
    var: Vector

    def __init__(self, count: Array, mean: Array, var: Array) -> None:
        owner = checks.vectors.owner_of(mean)
        given = {"count": count, "mean": mean, "var": var}
        vectors = {name: checks.vectors.channel_vector(name, a, owner) for name, a in given.items()}
        checks.vectors.variance(vectors["var"], nan=True)
        checks.statistics.column_counts(vectors["count"])
        self._fill(vectors)

    def _fill(self, vectors: dict[str, Array]) -> None:
        self._set({name: locked(np.asarray(a, np.float64)) for name, a in vectors.items()})

    @classmethod
    def _made(cls, count: Array, mean: Array, var: Array) -> ColumnMoments:
        """Without checks."""
        made = object.__new__(cls)
        made._fill({"count": count, "mean": mean, "var": var})
        return made

    @classmethod
    def of(cls, x: Array, *, weights: Array | None = None) -> ColumnMoments:
        """Of a table.

        Parameters
        ----------
        x : ndarray, shape (N, C)
            As `fastbn.moments` takes it. An infinite value leaves a mean that is not finite.
        weights : ndarray of float32 or float64, shape (N,), optional
            How much each row counts.
        """
        x = checks.arrays.table("x", x)
        whole = Moments.of(x, weights=weights)
        count, mean, var = (
            np.full(x.shape[1], float(whole.count)),
            whole.mean.copy(),
            whole.var.copy(),
        )
        for column in np.flatnonzero(~np.isfinite(mean)):
            there = ~np.isnan(x[:, column])
            if not there.all():
                some = None if weights is None else np.asarray(weights)[there]
                left = Moments.of(x[there, column][:, None], weights=some)
                count[column], mean[column], var[column] = left.count, left.mean[0], left.var[0]
        return cls._made(count, mean, var)

    @quiet
    def merge(self, other: ColumnMoments) -> ColumnMoments:
        """Those of both's values together (Chan, Golub & LeVeque 1983, equation 2.1)."""
        checks.statistics.same_channels(self.mean, other, ColumnMoments)
        count = self.count + other.count
        none = np.where(count == 0, 1.0, count)
        here, there = self.count / none, other.count / none
        apart = other.mean - self.mean
        mean = self.mean + apart * there
        var = here * self.var + there * other.var + here * apart * there * apart
        # What one of them has no values of is as the other has it, infinities too.
        for a, b in ((self, other), (other, self)):
            mean, var = np.where(a.count == 0, (b.mean, b.var), (mean, var))
        return self._made(count, mean, var)

    def to_dict(self) -> dict[str, list[float]]:
        """Lists of plain numbers, for JSON; `from_dict` takes them."""
        return {name: getattr(self, name).tolist() for name in ("count", "mean", "var")}

    @classmethod
    def from_dict(cls, given: dict[str, list[float]]) -> ColumnMoments:
        """What `to_dict` was made of."""
        known = checks.options.known_keys(given, ("count", "mean", "var"))
        return cls(**{name: np.array(numbers, np.float64) for name, numbers in known.items()})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ColumnMoments):
            return NotImplemented
        pairs = ((getattr(self, n), getattr(other, n)) for n in ("count", "mean", "var"))
        return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)

    __hash__ = None  # type: ignore[assignment]  # equal ones would have to have one hash

    def __reduce__(self) -> tuple[Any, ...]:
        given = self.count, self.mean, self.var
        return type(self)._made, given, self._added(ColumnMoments)

    def __repr__(self) -> str:
        return f"ColumnMoments(count={self.count!r}, mean={self.mean!r}, var={self.var!r})"
