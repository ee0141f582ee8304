"""Batch norm with fixed statistics as an object, for inference: what does not depend on x is
computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from fastbn import checks, fixed
from fastbn.affine_map import AffineMap
from fastbn.backends.base import Affine, quiet
from fastbn.functional import ActivationName, normalize_backward
from fastbn.immutable import locked
from fastbn.results import Gradients, ResidualGradients

Array = NDArray[Any]


class FrozenBatchNorm(AffineMap):
    """Normalize by given statistics, again and again: `normalize` without its repeated part.

    ``y = activation(gamma * (x - mean) / sqrt(var + eps) + beta + residual)``, bit for bit what
    `normalize` gives. It cannot be changed, so any number of threads may share it; it copies and
    pickles. Each call runs on the backend in force then.

    Parameters
    ----------
    mean, var, gamma, beta : ndarray of float32, float64, float16 or bfloat16, shape (C,)
        As given to `normalize`; they are copied, half types as float32.
    eps, layout, activation, dtype, out_layout
        As given to `normalize`.

    Attributes
    ----------
    scale, shift : ndarray of float64, shape (C,), read-only
        ``gamma / sqrt(var + eps)`` and ``beta - mean * scale``: y = x * scale + shift. (Calls
        compute from x - mean, which keeps digits that this loses.)
    mean, var, gamma, beta, eps, layout, activation, dtype, out_layout
        As given, or widened; the arrays are read-only.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type, shape or value.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> frozen = fastbn.FrozenBatchNorm(np.float64([2, 20]), np.float64([1, 100]), eps=0.0)
    >>> frozen(np.float32([[1, 10], [3, 30]]))
    array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    >>> frozen.scale, frozen.shift
    (array([1. , 0.1]), array([-2., -2.]))
    """

    __slots__ = ("beta", "eps", "gamma", "mean", "scale", "shift", "var")
    _called = "FrozenBatchNorm"
    _remedy = "make another"
    mean: Array
    var: Array
    gamma: Array | None
    beta: Array | None
    eps: float
    scale: NDArray[np.float64]
    shift: NDArray[np.float64]

    def __init__(
        self,
        mean: Array,
        var: Array,
        gamma: Array | None = None,
        beta: Array | None = None,
        *,
        eps: float = 1e-5,
        layout: str = "NCHW",
        activation: ActivationName = None,
        dtype: Any = None,
        out_layout: str | None = None,
    ) -> None:
        owner = checks.vectors.owner_of(mean)
        given = fixed.checked(mean, var, gamma, beta, owner)
        eps = checks.options.epsilon(eps)
        affine = Affine(*map(locked, fixed.affine(given, eps, owner.channels)))
        self._set_map(affine, layout, activation, dtype, out_layout)
        mine: dict[str, Any] = {
            **{name: None if v is None else locked(v) for name, v in given.items()},
            "eps": eps,
            "scale": affine.scale,
            "shift": locked(_shift(affine)),
        }
        self._set(mine)

    @overload
    def backward(
        self,
        dy: Array,
        x: Array | None,
        *,
        params: bool = ...,
        y: Array | None = ...,
        where: Array | None = ...,
        dresidual: Literal[False] = ...,
        out: Array | None = ...,
    ) -> Gradients: ...
    @overload
    def backward(
        self,
        dy: Array,
        x: Array | None,
        *,
        params: bool = ...,
        y: Array | None = ...,
        where: Array | None = ...,
        dresidual: Literal[True] | Array,
        out: Array | None = ...,
    ) -> ResidualGradients: ...
    def backward(
        self,
        dy: Array,
        x: Array | None,
        *,
        params: bool = True,
        y: Array | None = None,
        where: Array | None = None,
        dresidual: bool | Array = False,
        out: Array | None = None,
    ) -> Gradients | ResidualGradients:
        """The gradient, for fine-tuning with frozen statistics: `normalize_backward`.

        Parameters
        ----------
        dy, x, params, y, dresidual, where, out
            As given to `normalize_backward`.

        Returns
        -------
        dx, dgamma, dbeta, dresidual
            As `normalize_backward` returns them.

        Raises
        ------
        TypeError, ValueError
            An argument has a wrong type, shape or value; nothing has been written.
        """
        checks.layers.keeps_form(self.dtype, self.out_layout)
        backward: Callable[..., Gradients | ResidualGradients] = normalize_backward
        return backward(
            dy,
            x,
            self.mean,
            self.var,
            self.gamma,
            eps=self.eps,
            layout=self.layout,
            params=params,
            activation=self.activation,
            y=y,
            dresidual=dresidual,
            where=where,
            out=out,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        vectors = self.mean, self.var, self.gamma, self.beta
        names = "eps", "layout", "activation", "dtype", "out_layout"
        options = {name: getattr(self, name) for name in names}
        return _made, (type(self), vectors, options), self._added(FrozenBatchNorm)

    def __repr__(self) -> str:
        return (
            f"FrozenBatchNorm({len(self.mean)} channels, eps={self.eps}, layout={self.layout!r}, "
            f"activation={self.activation!r})"
        )


def _made(kind: type[FrozenBatchNorm], vectors: Any, options: Any) -> FrozenBatchNorm:
    """One of this class, whatever a subclass's constructor takes."""
    frozen = object.__new__(kind)
    FrozenBatchNorm.__init__(frozen, *vectors, **options)
    return frozen


@quiet
def _shift(affine: Affine) -> Array:
    shift: Array = affine.beta - affine.mean * affine.scale
    return shift
