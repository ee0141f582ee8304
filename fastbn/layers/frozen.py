"""Batch norm with fixed statistics as an object, for inference: what does not depend on x is
computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from fastbn import _run, checks, fixed
from fastbn._batch import Batch
from fastbn._call import Call
from fastbn.activations import Activation
from fastbn.backends.base import Affine, Backend, quiet
from fastbn.config import current
from fastbn.functional import ActivationName, normalize_backward
from fastbn.immutable import Immutable, locked
from fastbn.results import Gradients, ResidualGradients

Array = NDArray[Any]


class FrozenBatchNorm(Immutable):
    """Normalize by given statistics, again and again: `normalize` without its repeated part.

    ``y = activation(gamma * (x - mean) / sqrt(var + eps) + beta + residual)``, bit for bit what
    `normalize` gives. It cannot be changed, so any number of threads may share it; it copies and
    pickles. Each call runs on the backend in force then.

    Parameters
    ----------
    mean, var, gamma, beta : ndarray of float32, float64, float16 or bfloat16, shape (C,)
        As given to `normalize`; they are copied, half types as float32.
    eps, layout, activation
        As given to `normalize`.

    Attributes
    ----------
    scale, shift : ndarray of float64, shape (C,), read-only
        ``gamma / sqrt(var + eps)`` and ``beta - mean * scale``: y = x * scale + shift. (Calls
        compute from x - mean, which keeps digits that this loses.)
    mean, var, gamma, beta, eps, layout, activation
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

    __slots__ = (
        "__weakref__",
        "_activation",
        "_affine",
        "_plain",
        "activation",
        "beta",
        "eps",
        "gamma",
        "layout",
        "mean",
        "scale",
        "shift",
        "var",
    )
    _called = "FrozenBatchNorm"
    _remedy = "make another"
    mean: Array
    var: Array
    gamma: Array | None
    beta: Array | None
    eps: float
    layout: str
    activation: ActivationName
    scale: NDArray[np.float64]
    shift: NDArray[np.float64]
    _affine: Affine
    _activation: Activation
    _plain: dict[Backend, Callable[..., Array | None]]

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
    ) -> None:
        owner = checks.vectors.owner_of(mean)
        given = fixed.checked(mean, var, gamma, beta, owner)
        eps = checks.options.epsilon(eps)
        affine = Affine(*map(locked, fixed.affine(given, eps, owner.channels)))
        mine: dict[str, Any] = {
            **{name: None if v is None else locked(v) for name, v in given.items()},
            "eps": eps,
            "layout": checks.options.layout(layout),
            "activation": checks.options.activation_name(activation),
            "_activation": checks.options.activation(activation),
            "_affine": affine,
            "scale": affine.scale,
            "shift": locked(_shift(affine)),
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
                made = backend.plain_frozen(self._affine, self.layout, self._activation)
                plain = self._plain.setdefault(backend, made)
            y = plain(x, residual, out, threads)
            if y is not None:
                return y
        batch = Batch(x, self.layout, where, made_for=("FrozenBatchNorm", len(self.mean)))
        call = Call(on, batch, **self._affine._asdict())
        return _run.normalize(call, None, self.activation, residual, out)

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
        options = {"eps": self.eps, "layout": self.layout, "activation": self.activation}
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
