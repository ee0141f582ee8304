"""Normalization by fixed statistics as an object: what does not depend on x is computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn import _run, checks
from fastbn._batch import Batch
from fastbn._call import Call
from fastbn.activations import Activation
from fastbn.backends.base import Affine, Backend
from fastbn.config import current
from fastbn.functional import ActivationName
from fastbn.immutable import Immutable

Array = NDArray[Any]


class AffineMap(Immutable):
    """``y = activation((x - mean) * scale + beta + residual)``: what `FrozenBatchNorm` and
    `Standardizer` have in common."""

    __slots__ = (
        "__weakref__",
        "_activation",
        "_affine",
        "_plain",
        "activation",
        "dtype",
        "layout",
        "out_layout",
    )
    layout: str
    activation: ActivationName
    dtype: np.dtype[Any] | None
    out_layout: str | None
    _affine: Affine
    _activation: Activation
    _plain: dict[Backend, Callable[..., Array | None]]

    def _set_map(
        self, affine: Affine, layout: Any, activation: Any, dtype: Any, out_layout: Any
    ) -> None:
        """Check the options, and keep them with the map, whose vectors are read-only."""
        layout = checks.options.layout(layout)
        mine: dict[str, Any] = {
            "layout": layout,
            "activation": checks.options.activation_name(activation, curves=True),
            "dtype": None if dtype is None else checks.options.result_type(dtype),
            "out_layout": None
            if out_layout is None
            else checks.options.out_layout(out_layout, layout),
            "_activation": checks.options.activation(activation, curves=True),
            "_affine": affine,
            "_plain": {},
        }
        self._set(mine)

    def __call__(
        self,
        x: Array,
        *,
        residual: Array | None = None,
        where: Array | None = None,
        out: Array | None = None,
    ) -> Array:
        """Normalize `x`; the arguments are those of `normalize`.

        Parameters
        ----------
        x : ndarray
            Of C channels on the layout's axis, as `normalize` takes it.
        residual, where, out : ndarray, optional
            As given to `normalize`.

        Returns
        -------
        y : ndarray
            As `normalize` returns it.

        Raises
        ------
        TypeError, ValueError
            An argument has a wrong type, shape or value; nothing has been written.
        """
        backend, threads = on = current()
        if where is None:
            plain = self._plain.get(backend)
            if plain is None:
                form = self.dtype, self.out_layout
                made = backend.plain_frozen(self._affine, self.layout, self._activation, *form)
                plain = self._plain.setdefault(backend, made)
            y = plain(x, residual, out, threads)
            if y is not None:
                return y
        made_for, types = (self._called, len(self._affine.mean)), checks.arrays.DATA
        batch = Batch(x, self.layout, where, made_for=made_for, types=types)
        call = Call(on, batch, **self._affine._asdict())
        to = self.dtype, self.out_layout
        return _run.normalize(call, None, self.activation, residual, out, *to)
