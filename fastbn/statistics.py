"""Statistics of more than one batch: merged, summed elsewhere, of a whole population.

1. `Moments` are a count, a mean and a biased variance for each channel, in float64. Two of them
   merge into those of all their values by Chan, Golub & LeVeque (1983), equation 2.1, written in
   variances: no two large squares are subtracted. Where values weigh, the count is the sum of
   their weights, and their effective number (Kish 1965) is held as well: unlike a sum of squared
   weights it is a float64, whatever the weights are.
2. What is reduced elsewhere (by MPI, Dask, a socket) goes there as one flat array, to be gathered
   and merged, or summed. Sums are taken about a vector that everyone knows; near the mean it keeps
   their digits.
3. Statistics of a population are those of its batches, merged; or averaged, as in Ioffe & Szegedy
   (2015), Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn import _run, checks
from fastbn._batch import Batch
from fastbn._call import Call
from fastbn.backends.base import quiet
from fastbn.config import current
from fastbn.functional import moments
from fastbn.immutable import Immutable, locked
from fastbn.integers import Totals
from fastbn.results import PopulationStatistics
from fastbn.weights import SEVERAL

Array = NDArray[Any]
Vector = NDArray[np.float64]


class Moments(Immutable):
    """Count, mean and biased variance of each channel, which merge with those of other values.

    Parameters
    ----------
    count : int or float, also in an array of shape ()
        Values of a channel, or the sum of their weights; zero or more.
    mean, var : ndarray of float32, float64, float16 or bfloat16, shape (C,)
        Mean and biased variance; they are copied. No variance may be negative.
    effective_count : int or float, optional
        With weights w, ``sum(w)**2 / sum(w**2)``: 1 or more, and 0 where count is. Where it is not
        given values weigh 1: it is count, or 1 where that is less.

    Attributes
    ----------
    count, mean, var, effective_count
        As given; the arrays are float64 and read-only. Moments with the same are equal, and NaN
        is the same as NaN.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type, shape or value.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.random.default_rng(0).normal(3.0, 2.0, (100, 4, 5, 5)).astype(np.float32)
    >>> whole = fastbn.Moments.of(x)
    >>> parts = fastbn.Moments.of(x[:70]).merge(fastbn.Moments.of(x[70:]))
    >>> parts.count, bool(np.allclose(parts.var, whole.var, rtol=1e-12))
    (2500, True)
    """

    __slots__ = ("__weakref__", "count", "effective_count", "mean", "var")
    _called = "Moments"
    _remedy = "make others"
    count: float
    mean: Vector
    var: Vector
    effective_count: float

    def __init__(
        self,
        count: float | Array,
        mean: Array,
        var: Array,
        *,
        effective_count: float | None = None,
    ) -> None:
        owner = checks.vectors.owner_of(mean)
        mean = checks.vectors.channel_vector("mean", mean, owner)
        var = checks.vectors.channel_vector("var", var, owner)
        checks.vectors.variance(var, nan=True)
        count = checks.statistics.count("count", count)
        self._fill(count, mean, var, checks.statistics.effective_count(effective_count, count))

    @classmethod
    def of(
        cls,
        x: Array,
        *,
        layout: str = "NCHW",
        where: Array | None = None,
        weights: Array | None = None,
    ) -> Moments:
        """The moments of an array; all is given as to `fastbn.moments`.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> fastbn.Moments.of(np.float32([[1, 7], [3, 7]]))
        Moments(count=2, mean=array([2., 7.]), var=array([1., 0.]))
        """
        return cls._of(Batch(x, layout, where, weights, types=checks.arrays.DATA))

    @classmethod
    def _of(cls, batch: Batch) -> Moments:
        """The moments of a checked batch."""
        if batch.counts_all:
            mean, var = moments(batch.array, layout=batch.layout)
        else:
            mean, var = _run.moments(Call(current(), batch))
        return cls._made(batch.count, mean, var, batch.effective)

    @property
    @quiet
    def unbiased_var(self) -> Vector:
        """``var * n / (n - 1)`` with ``n = effective_count``; a ValueError where that is not above
        1, but for 1e-12."""
        return np.asarray(
            self.var * checks.statistics.unbiased_factor(self.count, self.effective_count)
        )

    @quiet
    def merge(self, other: Moments) -> Moments:
        """The moments of both's values together; of a fixed order the bits are fixed.

        With ``d = other.mean - mean`` and counts n and m: ``mean + d * m / (n + m)`` and
        ``(n * var + m * other.var) / (n + m) + d**2 * n * m / (n + m)**2``. Sums of squared
        weights, ``count**2 / effective_count``, are added.

        Parameters
        ----------
        other : Moments
            Of as many channels; without values it changes nothing.

        Returns
        -------
        Moments

        Raises
        ------
        TypeError, ValueError
            `other` is no Moments, or has another number of channels; or the counts add up to
            more than float64 holds.
        """
        checks.statistics.same_channels(self.mean, other, Moments)
        if not self.count or not other.count:
            return self if not other.count else other
        count = checks.statistics.count("the sum of both counts", self.count + other.count)
        here, there = self.count / count, other.count / count
        apart = other.mean - self.mean
        var = here * self.var + there * other.var + here * apart * there * apart
        effective = count
        if self._is_weighed or other._is_weighed:
            # In shares of the whole: squares of the weights may be no float64.
            squares = here * (here / self.effective_count) + there * (there / other.effective_count)
            effective = max(1 / squares, SEVERAL)
        return self._made(count, self.mean + apart * there, var, effective)

    @property
    def _is_weighed(self) -> bool:
        """Whether not all values weigh 1."""
        return self.effective_count != self.count

    def to_array(self) -> Vector:
        """``[count, effective_count, *mean, *var]``: to be gathered, made Moments again and
        merged."""
        counts = [float(self.count), float(self.effective_count)]
        return np.concatenate([counts, self.mean, self.var])

    @classmethod
    def from_array(cls, array: Array) -> Moments:
        """What `to_array` was made of.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> one = fastbn.Moments.of(np.float32([[1, 7], [3, 7]]))
        >>> fastbn.Moments.from_array(one.to_array())
        Moments(count=2, mean=array([2., 7.]), var=array([1., 0.]))
        """
        count, effective, mean, var = checks.statistics.flat_moments("array", array)
        return cls(count, mean, var, effective_count=effective)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists of them, for JSON; `from_dict` takes them."""
        vectors = {"mean": self.mean.tolist(), "var": self.var.tolist()}
        return {"count": self.count, **vectors, "effective_count": self.effective_count}

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Moments:
        """What `to_dict` was made of.

        Examples
        --------
        >>> import json, numpy as np, fastbn
        >>> text = json.dumps(fastbn.Moments.of(np.float32([[1, 7], [3, 7]])).to_dict())
        >>> fastbn.Moments.from_dict(json.loads(text))
        Moments(count=2, mean=array([2., 7.]), var=array([1., 0.]))
        """
        known = checks.options.known_keys(given, ("count", "mean", "var", "effective_count"))
        mean, var = (np.array(known[name], np.float64) for name in ("mean", "var"))
        return cls(known["count"], mean, var, effective_count=known["effective_count"])

    @quiet
    def to_sums(self, about: Array | None = None) -> Vector:
        """``[count, sum(w**2), *sum(x - about), *sum((x - about)**2)]``: those of parts, added up,
        are those of the whole. With weights w, the last two are sums of their products; without,
        the first two are the count.

        What is outside float64's range there, as squares of weights beyond 1e150 or below 1e-140,
        `from_sums` refuses; weights may all be multiplied by one number before.

        Parameters
        ----------
        about : ndarray of float32, float64, float16 or bfloat16, shape (C,), optional
            The same for all parts; 0 where not given. Of its 52 bits the variance loses
            ``log2(1 + ((mean - about) / s)**2)``, s the standard deviation: hardly any about the
            mean of a part or a running mean, most about 0 where |mean|/s is large. The means of the
            parts are float64, too, which alone may change it by 2^-51 |mean|/s, relatively.
        """
        apart = self.mean - _about(about, self.mean)
        squares = self.var + apart * apart
        count = float(self.count)
        if not count:
            return np.zeros(2 + 2 * len(apart))
        counts = [count, count * (count / self.effective_count)]
        return np.concatenate([counts, count * apart, count * squares])

    @classmethod
    @quiet
    def from_sums(cls, sums: Array, about: Array | None = None) -> Moments:
        """The moments of all whose `to_sums`, about the same vector, were added up.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> parts = (fastbn.Moments.of(np.float32([row])) for row in ([1, 7], [3, 7]))
        >>> fastbn.Moments.from_sums(sum(part.to_sums() for part in parts))
        Moments(count=2, mean=array([2., 7.]), var=array([1., 0.]))
        """
        count, weighed, first, second = checks.statistics.flat_moments("sums", sums)
        effective = checks.statistics.squared_weights(weighed, count)
        shift = _about(about, first)
        if not count:
            return cls._made(count, np.zeros_like(first), np.zeros_like(first), effective)
        apart = first / count
        # Rounding may leave less than nothing.
        var = np.maximum(second / count - apart * apart, 0)
        return cls._made(count, shift + apart, var, effective)

    @classmethod
    def _of_totals(cls, totals: Totals) -> Moments:
        return cls._made(totals.values, *totals.moments(), totals.values)

    @classmethod
    def _made(cls, count: float, mean: Array, var: Array, effective_count: float) -> Moments:
        """Without checks."""
        made = object.__new__(cls)
        made._fill(count, mean, var, effective_count)
        return made

    def _fill(self, count: float, mean: Array, var: Array, effective_count: float) -> None:
        mean, var = (locked(np.asarray(vector, np.float64)) for vector in (mean, var))
        self._set({"count": count, "effective_count": effective_count, "mean": mean, "var": var})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Moments):
            return NotImplemented
        counts = self.count, self.effective_count
        pairs = (self.mean, other.mean), (self.var, other.var)
        return counts == (other.count, other.effective_count) and all(
            np.array_equal(a, b, equal_nan=True) for a, b in pairs
        )

    def __reduce__(self) -> tuple[Any, ...]:
        given = self.count, self.mean, self.var, self.effective_count
        return type(self)._made, given, self._added(Moments)

    def __repr__(self) -> str:
        effective = f", effective_count={self.effective_count}" if self._is_weighed else ""
        return f"Moments(count={self.count}, mean={self.mean!r}, var={self.var!r}{effective})"


def _about(about: Array | None, like: Vector) -> Vector:
    """The vector that sums are taken about."""
    if about is None:
        return np.zeros_like(like)
    owner = checks.vectors.Owner(len(like), f"the moments have {len(like)} channels")
    return checks.vectors.channel_vector("about", about, owner).astype(np.float64)


def population_statistics(
    batches: Iterable[Array], *, layout: str = "NCHW", method: str = "exact"
) -> PopulationStatistics:
    """Mean and unbiased variance of each channel over many batches.

    Parameters
    ----------
    batches : iterable of ndarray
        Arrays as `fastbn.moments` takes them, of as many channels each; a generator will do.
    layout : {"NCHW", "NHWC"}
        As in `fastbn.batch_norm`.
    method : {"exact", "average"}
        "exact": the statistics of all values together, as `Moments.merge` gives them. "average":
        ``E[x] = E[mean_B]``, ``Var[x] = m / (m - 1) * E[var_B]`` over batches of m values a
        channel: Ioffe & Szegedy (2015), Algorithm 2, step 10. Where sizes differ each batch has
        its own m, and all batches weigh the same.

    Returns
    -------
    mean, var : ndarray of float64, shape (C,)
        var is unbiased: of all values n / (n - 1) times the biased one.
    count : int
        Values of a channel.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type, shape or value; there are fewer than two values a channel or,
        with "average", in any batch that is not empty.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> batches = np.random.default_rng(0).normal(3.0, 2.0, (10, 32, 4)).astype(np.float32)
    >>> mean, var, count = fastbn.population_statistics(batches)
    >>> bool(np.allclose(var, batches.reshape(320, 4).var(0, ddof=1))), count
    (True, 320)
    """
    population = Population(checks.options.option("method", method, checks.options.METHODS))
    checks.statistics.reiterable(batches)
    for x in batches:
        population.add_batch(Batch(x, layout, types=checks.arrays.DATA))
    return population.statistics("batches")


class Population:
    """What is known of the batches so far: their moments, merged, and the sums of averages; of
    integers their totals, which do not depend on how they are cut into batches."""

    def __init__(self, method: str) -> None:
        self.averages = method == "average"
        self._merged: Moments | None = None
        self._totals: Totals | None = None
        self.batches = 0
        self.mean: Any = 0.0
        self.var: Any = 0.0

    def add_batch(self, batch: Batch) -> None:
        """One more batch, of an array."""
        if not batch.is_integer:
            self.add(Moments._of(batch))
            return
        totals = Totals.of(batch, current())
        self._same_channels(Moments._of_totals(totals))
        self._totals = totals if self._totals is None else self._totals.merge(totals)
        self._count(Moments._of_totals(totals))

    def add(self, batch: Moments) -> None:
        """One more batch; an empty one adds nothing."""
        self._same_channels(batch)
        self._merged = batch if self._merged is None else self._merged.merge(batch)
        self._count(batch)

    def _same_channels(self, batch: Moments) -> None:
        known = self._merged.mean if self._totals is None and self._merged else None
        known = known if self._totals is None else self._totals.sums
        if known is not None:
            checks.statistics.same_channels(known, batch, Moments)

    @quiet
    def _count(self, batch: Moments) -> None:
        """Add a batch to the averages."""
        if batch.count and self.averages:
            self.mean, self.var = self.mean + batch.mean, self.var + batch.unbiased_var
        self.batches += batch.count > 0

    @property
    def merged(self) -> Moments | None:
        """The moments of all."""
        totals = None if self._totals is None else Moments._of_totals(self._totals)
        if totals is None or self._merged is None:
            return self._merged if totals is None else totals
        return self._merged.merge(totals)

    @quiet
    def statistics(self, name: str) -> PopulationStatistics:
        """The population's; `name` is what an error calls the batches."""
        checks.statistics.population(name, self.batches)
        merged = self.merged
        assert merged is not None
        if self.averages:
            n = self.batches
            return PopulationStatistics(self.mean / n, self.var / n, merged.count)
        return PopulationStatistics(merged.mean.copy(), merged.unbiased_var, merged.count)
