"""scikit-learn's StandardScaler on fastbn's kernels; `pip install "fastbn[sklearn]"`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin, clone
from sklearn.utils.validation import (
    _check_sample_weight,
    check_array,
    check_is_fitted,
    validate_data,
)

from fastbn import checks
from fastbn.columns import ColumnMoments
from fastbn.functional import moments, normalize

Array = NDArray[Any]
FLOATS = [np.float64, np.float32, np.float16]
"""Kept as they are; all else becomes the first."""


class StandardScaler(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """`sklearn.preprocessing.StandardScaler` for dense tables: ``(X - mean_) / scale_``.

    Parameters, methods and fitted attributes are those of scikit-learn's. NaN are missing values.
    What differs: `mean_` and `var_` are right where the mean is large beside the deviation, in
    float32 too; `scale_` is 1 where `var_` is exactly 0, and only there (scikit-learn's is also
    where its own roundings could explain the variance); fitted scalers merge; sparse tables are
    refused. dask arrays of known chunk sizes are taken chunk by chunk: fits compute at once, what
    transforms gives a lazy dask array, which looks for no infinity and is never in place.

    Parameters
    ----------
    copy : bool
        False: `transform` writes into the table itself, where that is an ndarray of floats.
    with_mean, with_std : bool
        Whether to subtract the mean, and to divide by the deviation.

    Attributes
    ----------
    mean_, var_, scale_ : ndarray of float64, shape (C,), or None
        The last is what is divided by. None as in scikit-learn.
    n_samples_seen_ : int, float or ndarray of shape (C,)
        Rows, or the sum of their weights; of each column where values are missing.
    n_features_in_, feature_names_in_
        As in all of scikit-learn's estimators.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.sklearn import StandardScaler
    >>> scaler = StandardScaler().fit(np.float32([[1, 10], [3, 30]]))
    >>> scaler.transform(np.float32([[1, 10], [3, 30]]))
    array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    """

    def __init__(self, *, copy: bool = True, with_mean: bool = True, with_std: bool = True) -> None:
        self.copy = copy
        self.with_mean = with_mean
        self.with_std = with_std

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> StandardScaler:
        """Learn from a table, and nothing from before."""
        with self._as_it_was_if_that_fails():
            self._forget()
            self._learn(self._checked(X, reset=True), sample_weight)
        return self

    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> StandardScaler:
        """Learn from one more part of a table."""
        with self._as_it_was_if_that_fails():
            self._learn(self._checked(X, reset=not hasattr(self, "n_samples_seen_")), sample_weight)
        return self

    def fit_transform(self, X: Any, y: Any = None, sample_weight: Any = None) -> Array:
        """`fit`, then `transform` of the same table."""
        with self._as_it_was_if_that_fails():
            self._forget()
            table = self._checked(X, reset=True, writes=not self.copy)
            self._learn(table, sample_weight)
        return self._scaled(table, None if self.copy else table)

    def transform(self, X: Any, copy: bool | None = None) -> Array:
        """``(X - mean_) / scale_``."""
        check_is_fitted(self)
        writes = not (self.copy if copy is None else copy)
        table = self._checked(X, reset=False, writes=writes)
        if not checks.dask.is_lazy(table):
            _refuse_infinity(table, moments(table).mean)
        return self._scaled(table, table if writes else None)

    def inverse_transform(self, X: Any, copy: bool | None = None) -> Array:
        """``X * scale_ + mean_``."""
        check_is_fitted(self)
        _refuse_sparse(X)
        writes = not (self.copy if copy is None else copy)
        if checks.dask.is_lazy(X):
            table = _lazy_table(X)
        else:
            options = {"force_writeable": writes, "ensure_all_finite": "allow-nan"}
            table = check_array(X, dtype=FLOATS, **options)
        gamma = self.scale_ if self.with_std else None
        beta = self.mean_ if self.with_mean else None
        return _mapped(table, np.zeros(table.shape[1]), gamma, beta, table if writes else None)

    def merge(self, other: StandardScaler) -> StandardScaler:
        """What a fit of both's tables, one after the other, would have given: a new scaler."""
        for scaler in (self, other):
            check_is_fitted(scaler)
        made: StandardScaler = clone(self)
        names = [name for name in vars(self) if name.endswith("_in_")]
        made.__dict__.update({name: getattr(self, name) for name in names})
        made._know(self._columns.merge(other._columns), self._weighs or other._weighs)
        return made

    def _checked(self, X: Any, *, reset: bool, writes: bool = False) -> Array:
        """The table as an array of floats; infinity is looked for elsewhere."""
        _refuse_sparse(X)
        for name in ("copy", "with_mean", "with_std"):
            checks.options.flag(name, getattr(self, name))
        options = {"dtype": FLOATS, "force_writeable": writes, "ensure_all_finite": False}
        if checks.dask.is_lazy(X):
            X, options = _lazy_table(X), {"skip_check_array": True}
        table: Array = validate_data(self, X, reset=reset, **options)
        return table

    def _learn(self, table: Array, sample_weight: Any) -> None:
        weights = sample_weight
        if weights is not None:
            weights = _check_sample_weight(weights, table, dtype=np.float64)
        found = _columns(table, weights)
        _refuse_infinity(table, found.mean)
        is_first = not hasattr(self, "n_samples_seen_")
        weighs = weights is not None or (not is_first and self._weighs)
        self._know(found if is_first else self._columns.merge(found), weighs)

    def _know(self, columns: ColumnMoments, weighs: bool) -> None:
        """Set what a fit leaves."""
        self._columns, self._weighs = columns, weighs
        count = columns.count if weighs else columns.count.astype(np.int64)
        self.n_samples_seen_ = count[0] if (count == count[0]).all() else count
        with_any = self.with_mean or self.with_std
        self.mean_ = columns.mean.copy() if with_any else None
        self.var_ = columns.var.copy() if self.with_std else None
        self.scale_ = np.sqrt(np.where(columns.var == 0, 1, columns.var)) if self.with_std else None

    def _scaled(self, table: Array, out: Array | None) -> Array:
        zero = np.zeros(table.shape[1])
        mean = zero if self.mean_ is None or not self.with_mean else self.mean_
        gamma = None if self.scale_ is None else 1 / self.scale_
        return _mapped(table, mean, gamma, None, out)

    def _forget(self) -> None:
        for name in [name for name in vars(self) if name.endswith("_") or name.startswith("_c")]:
            delattr(self, name)

    @contextmanager
    def _as_it_was_if_that_fails(self) -> Iterator[None]:
        before = vars(self).copy()
        try:
            yield
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32", "float16"]
        return tags


def _columns(table: Array, weights: Array | None) -> ColumnMoments:
    if checks.dask.is_lazy(table):
        from fastbn.dask import columns

        return columns(table, weights)
    return ColumnMoments.of(table, weights=weights)


def _mapped(
    table: Array, mean: Array, gamma: Array | None, beta: Array | None, out: Array | None
) -> Array:
    """``(table - mean) * gamma + beta``; `out` is for what is not lazy."""
    given = table, mean, np.ones(len(mean)), gamma, beta
    if checks.dask.is_lazy(table):
        from fastbn.dask import normalize as lazily

        y: Array = lazily(*given, eps=0.0)
        return y
    return normalize(*given, eps=0.0, out=out)


def _lazy_table(X: Any) -> Any:
    """A dask array of floats; what is none is seen before anything is computed."""
    checks.dask.some_values("X", X)
    if X.dtype.kind not in "fiub":
        raise ValueError(
            f"X has dtype {X.dtype}, expected numbers; convert it with X.astype(float)"
        )
    table = X if X.dtype in FLOATS else X.astype(np.float64)
    checks.arrays.table("X", checks.dask.stand_in("X", table))
    return table


def _refuse_sparse(X: Any) -> None:
    if sparse.issparse(X):
        raise TypeError(
            f"X is a sparse {type(X).__name__}, expected a dense table: centred it would be dense; "
            "scale sparse data with sklearn.preprocessing.MaxAbsScaler"
        )


def _refuse_infinity(table: Array, mean: Array) -> None:
    """Infinity leaves no finite mean; NaN do not count."""
    for column in np.flatnonzero(~np.isfinite(mean)):
        if np.isinf(table[:, column]).any():
            raise ValueError(
                f"Input X contains infinity in column {column}, expected finite values, or NaN for "
                "missing ones; replace it before"
            )
