"""Images and tables brought to zero mean and unit variance, the way people write it.

``y = (x / divisor - mean) / std`` is ``(x - divisor * mean) / (divisor * std)``: an affine map of
each channel, by the kernels of `normalize`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn import _run, checks
from fastbn._batch import Batch
from fastbn._call import Call
from fastbn.affine_map import AffineMap
from fastbn.backends.base import Affine
from fastbn.config import current
from fastbn.elements import arithmetic
from fastbn.immutable import locked
from fastbn.statistics import Moments, Population

Array = NDArray[Any]
Vector = NDArray[np.float64]

_KEYS = ("mean", "std", "divisor", "layout", "out_layout", "dtype")


class Standardizer(AffineMap):
    """Standardize data by fixed statistics: ``y = (x / divisor - mean) / std``, channel by channel.

    It cannot be changed, so any number of threads may share it; it copies and pickles. Each call
    runs on the backend in force then.

    Parameters
    ----------
    mean, std : ndarray, list or tuple of C numbers
        In units of x / divisor; std is above 0.
    divisor : float
        What x is divided by: 255 for the bytes of images whose mean and std are given for 0 to 1.
    layout, out_layout, dtype
        As given to `normalize`: x's layout, y's if that is another one, and y's type: without,
        float32 for integers and x's own for floats.

    Attributes
    ----------
    mean, std : ndarray of float64, shape (C,), read-only
    divisor, layout, out_layout, dtype
        As given. Two with the same are equal.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type, shape or value.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> imagenet = fastbn.Standardizer(
    ...     [0.485, 0.456, 0.406], [0.229, 0.224, 0.225],
    ...     divisor=255, layout="NHWC", out_layout="NCHW",
    ... )
    >>> images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    >>> y = imagenet(images)
    >>> y.shape, y.dtype
    ((2, 3, 32, 32), dtype('float32'))
    >>> bool(abs(imagenet.inverse(y) - images).max() < 1e-4)
    True
    """

    __slots__ = ("_inverse", "divisor", "mean", "std")
    _called = "Standardizer"
    _remedy = "make another"
    mean: Vector
    std: Vector
    divisor: float
    _inverse: Affine

    def __init__(
        self,
        mean: Array | list[float] | tuple[float, ...],
        std: Array | list[float] | tuple[float, ...],
        *,
        divisor: float = 1,
        layout: str = "NCHW",
        out_layout: str | None = None,
        dtype: Any = None,
    ) -> None:
        mean, std = checks.standardizer.vectors(mean, std)
        divisor = checks.standardizer.divisor(divisor)
        self._set({"mean": locked(mean), "std": locked(std), "divisor": divisor})
        with np.errstate(all="ignore"):
            there, scale, zero = mean * divisor, 1 / (std * divisor), np.zeros(len(mean))
            back = Affine(*map(locked, (zero, std * divisor, there)))
        self._set({"_inverse": back})
        self._set_map(Affine(*map(locked, (there, scale, zero))), layout, None, dtype, out_layout)

    @classmethod
    def of(
        cls,
        batches: Array | Iterable[Array],
        *,
        divisor: float = 1,
        layout: str = "NCHW",
        out_layout: str | None = None,
        dtype: Any = None,
        progress: Callable[[int], object] | None = None,
    ) -> Standardizer:
        """By the mean and the (biased) deviation of some data.

        A constant channel is divided by 1, in units of x / divisor. Of integers the result does not
        depend on how they are cut into batches.

        Parameters
        ----------
        batches : ndarray, dask.array.Array, or iterable of ndarray
            All of the data, or batches of it: memory maps, a generator; of one type and rank.
        progress : callable, optional
            Is given the number of samples so far, after each batch; a dask array is one.
        divisor, layout, out_layout, dtype
            As given to `Standardizer`.

        Raises
        ------
        TypeError, ValueError
            An argument has a wrong type, shape or value, or a batch differs from the first.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> table = np.float32([[1, 10], [3, 30]])
        >>> fastbn.Standardizer.of(table)(table)
        array([[-1., -1.],
               [ 1.,  1.]], dtype=float32)
        """
        divisor = checks.standardizer.divisor(divisor)
        layout = checks.options.layout(layout)
        checks.standardizer.progress(progress)
        merged = _merged(batches, layout, progress)
        options: dict[str, Any] = {"layout": layout, "out_layout": out_layout, "dtype": dtype}
        return cls._by(merged, divisor, options)

    @classmethod
    def _by(cls, data: Moments, divisor: float, options: dict[str, Any]) -> Standardizer:
        """By the moments of some data."""
        std = np.where(data.var == 0, 1.0, np.sqrt(data.var) / divisor)
        return cls(data.mean / divisor, std, divisor=divisor, **options)

    def __call__(self, x: Array, *, out: Array | None = None) -> Array:  # type: ignore[override]
        """Standardize `x`.

        Parameters
        ----------
        x : ndarray of float32, float64, float16, bfloat16, uint8, int8, uint16 or int16
            Of C channels on the layout's axis; or a dask.array.Array of them.
        out : ndarray, optional
            As given to `normalize`; not with a dask array.

        Returns
        -------
        y : ndarray
            As `normalize` returns it, and of a dask array as `fastbn.dask.normalize` does: lazy.

        Raises
        ------
        TypeError, ValueError
            An argument has a wrong type, shape or value; nothing has been written.
        """
        if checks.dask.is_lazy(x):
            checks.dask.no_output(out)
            options = {"dtype": self.dtype, "out_layout": self.out_layout}
            return self._lazily("x", x, self._affine, {"layout": self.layout, **options})
        return super().__call__(x, out=out)

    def _lazily(self, name: str, x: Any, affine: Affine, options: dict[str, Any]) -> Array:
        """A map of a dask array: lazy."""
        from fastbn.dask import mapped

        made_for = self._called, len(self.mean)
        y: Array = mapped(name, x, affine, made_for, options)
        return y

    def inverse(self, y: Array) -> Array:
        """What a call has made `y` of, as floats in `layout`: ``(y * std + mean) * divisor``.

        Parameters
        ----------
        y : ndarray, or dask.array.Array, of float32, float64, float16 or bfloat16
            In `out_layout`, or `layout` where there is none.

        Returns
        -------
        x : ndarray, or of a dask array a lazy one
            Of y's type, of half types float32; not rounded to integers.

        Raises
        ------
        TypeError, ValueError
            y has a wrong type or shape.
        """
        layout = self.out_layout or self.layout
        made_for = self._called, len(self.mean)
        if checks.dask.is_lazy(y):
            checks.arrays.batch("y", checks.dask.stand_in("y", y))
            wide = y.astype(arithmetic(y.dtype), copy=False)
            options = {"layout": layout, "out_layout": self.layout}
            return self._lazily("y", wide, self._inverse, options)
        y = checks.arrays.batch("y", y)
        wide = y.astype(arithmetic(y.dtype), copy=False)
        call = Call(
            current(), Batch(wide, layout, made_for=made_for, name="y"), **self._inverse._asdict()
        )
        return _run.normalize(call, None, None, None, None, None, self.layout)

    def to_dict(self) -> dict[str, Any]:
        """All that was given, as plain numbers and words, for a JSON file beside a model.

        Examples
        --------
        >>> import json, numpy as np, fastbn
        >>> one = fastbn.Standardizer([2.0, 20.0], [1.0, 10.0], dtype=np.float16)
        >>> text = json.dumps(one.to_dict())
        >>> fastbn.Standardizer.from_dict(json.loads(text)) == one
        True
        """
        words = {"layout": self.layout, "out_layout": self.out_layout}
        dtype = None if self.dtype is None else self.dtype.name
        vectors = {"mean": self.mean.tolist(), "std": self.std.tolist()}
        return {**vectors, "divisor": self.divisor, **words, "dtype": dtype}

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Standardizer:
        """What `to_dict` was made of. A dtype of "bfloat16" needs ml_dtypes."""
        return cls(**checks.options.known_keys(given, _KEYS))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Standardizer):
            return NotImplemented
        return self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # equal ones would have to have one hash

    def __reduce__(self) -> tuple[Any, ...]:
        return _made, (type(self), self.to_dict()), self._added(Standardizer)

    def __repr__(self) -> str:
        given = self.to_dict()
        mean, std = given.pop("mean"), given.pop("std")
        options = "".join(f", {name}={value!r}" for name, value in given.items() if value)
        return f"Standardizer({mean}, {std}{options})"


def _made(kind: type[Standardizer], given: dict[str, Any]) -> Standardizer:
    """One of this class, whatever a subclass's constructor takes."""
    made = object.__new__(kind)
    Standardizer.__init__(made, **given)
    return made


def _merged(given: Any, layout: str, progress: Callable[[int], object] | None) -> Moments:
    """The moments of all batches."""
    if checks.dask.is_lazy(given):
        from fastbn.dask import merged

        checks.dask.some_values("batches", given)
        found = merged("batches", given, layout)
        if progress is not None:
            progress(len(given))
        return found
    population, samples, first = Population("exact"), 0, None
    for batch in _batches(given, layout):
        first = batch if first is None else first
        checks.standardizer.like_the_first(batch, first)
        population.add_batch(batch)
        samples += len(batch.array)
        if progress is not None:
            progress(samples)
    checks.statistics.population("batches", population.batches)
    assert population.merged is not None
    return population.merged


def _batches(given: Any, layout: str) -> Iterator[Batch]:
    """The batches, each checked as it comes."""
    if checks.arrays.is_array(given):
        yield Batch(given, layout, name="batches", types=checks.arrays.DATA)
        return
    checks.statistics.reiterable(given)
    for number, x in enumerate(given):
        yield Batch(x, layout, name=f"batches[{number}]", types=checks.arrays.DATA)
