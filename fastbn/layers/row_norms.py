"""RMS norm as a layer: the verb with a scale and its gradient."""

from __future__ import annotations

from typing import Any, overload

from numpy.typing import DTypeLike, NDArray

from fastbn import checks
from fastbn.layers.base import Layer
from fastbn.layers.saved import Saved
from fastbn.results import RMSGradients
from fastbn.row_norms import rms_norm, rms_norm_backward

Array = NDArray[Any]


class RMSNorm(Layer):
    """An RMS normalization layer: a scale, and the last call's gradient.

    ``y = gamma * x / sqrt(mean(x**2) + eps)``, with the mean of each row along the last axis (Zhang
    & Sennrich 2019). There are no running statistics: training and evaluation are the same.

    Parameters
    ----------
    channels : int
        The values of a row, one or more.
    eps : float
        Added to the mean square, zero or more. PyTorch's default is the least eps of x's type.
    scale : bool
        Whether there is a gamma.
    frozen_affine : bool
        Compute no dgamma.
    dtype : {"float32", "float64"}
        Of gamma, whatever the arrays are.

    Attributes
    ----------
    gamma : ndarray of `dtype`, shape (C,), or None
        The scale, at first 1; "weight" in a state, as in PyTorch's.
    dgamma : ndarray of `dtype`, shape (C,), or None
        Its gradient, of the last `backward`, at first 0; None where there is no gamma, or it is
        frozen.
    training, frozen_affine : bool
        As `GroupNorm` has them.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type or value.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> layer = fastbn.RMSNorm(64)
    >>> x, attention = np.random.default_rng(0).normal(size=(2, 8, 128, 64)).astype(np.float32)
    >>> y, stream = layer(x, skip=attention)  # what a transformer's block goes on with
    >>> bool(np.array_equal(stream, x + attention)), bool(abs((y**2).mean(-1) - 1).max() < 1e-4)
    (True, True)
    >>> dx = layer.backward(np.ones_like(y), dsum=np.ones_like(stream))
    >>> dx.shape, layer.dgamma.shape, layer
    ((8, 128, 64), (64,), RMSNorm(64))
    """

    def __init__(
        self,
        channels: int,
        *,
        eps: float = 1e-5,
        scale: bool = True,
        frozen_affine: bool = False,
        dtype: DTypeLike = "float32",
    ) -> None:
        options: dict[str, Any] = {"eps": eps, "scale": scale, "dtype": dtype}
        super().__init__(channels, frozen_affine=frozen_affine, **options)

    @overload
    def __call__(
        self,
        x: Array,
        *,
        skip: None = ...,
        where: Array | None = ...,
        out: Array | None = ...,
        keep: bool = ...,
    ) -> Array: ...
    @overload
    def __call__(
        self,
        x: Array,
        *,
        skip: Array,
        where: Array | None = ...,
        out: Array | None = ...,
        keep: bool = ...,
    ) -> tuple[Array, Array]: ...
    def __call__(
        self,
        x: Array,
        *,
        skip: Array | None = None,
        where: Array | None = None,
        out: Array | None = None,
        keep: bool = True,
    ) -> Array | tuple[Array, Array]:
        """Normalize `x`, or `x` + `skip`, in training and in evaluation alike.

        Parameters
        ----------
        x : ndarray
            With rows of C values, as `fastbn.rms_norm` takes it.
        skip, where, out : ndarray, optional
            As given to `fastbn.rms_norm`. After ``out=x`` without `skip` there is no backward.
        keep : bool
            Whether the layer keeps the call for `backward`: x or, with `skip`, the sum; and
            `where`, neither copied. False: it keeps none, an earlier one neither.

        Returns
        -------
        y : ndarray
            As `fastbn.rms_norm` returns it.
        sum : ndarray
            With `skip`: x + skip. The backward reads it, so do not overwrite it before.

        Raises
        ------
        TypeError, ValueError
            An argument has a wrong type, shape or value. Nothing has been written.
        """
        keep = checks.options.flag("keep", keep)
        y, *total, saved = self._forward(x, skip, where, out)
        self._last = saved if keep else None
        return (y, *total) if total else y

    @overload
    def forward(
        self,
        x: Array,
        *,
        skip: None = ...,
        where: Array | None = ...,
        out: Array | None = ...,
    ) -> tuple[Array, Saved]: ...
    @overload
    def forward(
        self,
        x: Array,
        *,
        skip: Array,
        where: Array | None = ...,
        out: Array | None = ...,
    ) -> tuple[Array, Array, Saved]: ...
    def forward(
        self,
        x: Array,
        *,
        skip: Array | None = None,
        where: Array | None = None,
        out: Array | None = None,
    ) -> tuple[Array, Saved] | tuple[Array, Array, Saved]:
        """A call of the layer that leaves what `backward` needs to the caller; of the layer nothing
        is written.

        Parameters
        ----------
        x, skip, where, out
            As a call takes them.

        Returns
        -------
        y, sum : ndarray
            As a call returns them; the sum only with `skip`.
        saved : Saved
            To be passed to `backward`.

        Raises
        ------
        TypeError, ValueError
            As of a call.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> layer, x = fastbn.RMSNorm(3), np.eye(3)
        >>> y, saved = layer.forward(x)
        >>> y, stream, saved = layer.forward(x, skip=x)
        >>> dx = layer.backward(np.ones_like(y), saved, dsum=np.ones_like(stream))
        """
        found: tuple[Array, Saved] | tuple[Array, Array, Saved]
        found = self._forward(x, skip, where, out)
        return found

    def _forward(self, x: Any, skip: Any, where: Any, out: Any) -> Any:
        """y; with a skip the sum; and what is saved."""
        x = checks.arrays.rows_made_for(x, type(self).__name__, self.channels)
        options = self._options()
        y, mean_square, *total = rms_norm(x, self.gamma, skip=skip, where=where, out=out, **options)
        read = total[0] if total else x
        return y, *total, self._saved(options, read, y, out, mean_square=mean_square, where=where)

    def backward(
        self,
        dy: Array,
        saved: Saved | None = None,
        *,
        dsum: Array | None = None,
        accumulate: bool = False,
        out: Array | None = None,
    ) -> Array:
        """The gradient of a forward with respect to x, and to `skip`; leaves `dgamma`.

        Parameters
        ----------
        dy : ndarray
            Gradient with respect to y, of its shape and dtype.
        saved : Saved, optional
            Which forward: what `forward` gave last. It serves any number of backwards, until one
            writes dx over what it reads. None: the last call, if it was kept.
        dsum, out : ndarray, optional
            As given to `fastbn.rms_norm_backward`; `dsum` is the gradient that reaches x + skip by
            its other uses, and is added to dx.
        accumulate : bool
            Add to `dgamma`, in its dtype, instead of overwriting it.

        Returns
        -------
        dx : ndarray
            As `fastbn.rms_norm_backward` returns it.

        Raises
        ------
        TypeError, ValueError
            An argument has a wrong type, shape or value, `saved` is of another layer, or there was
            no forward to go back through. Nothing has been written.
        """
        return self._go_back(dy, saved, accumulate, dsum=dsum, out=out)

    def _gradients(self, dy: Array, saved: Saved, options: dict[str, Any]) -> RMSGradients:
        given: Any = dy, saved.x, saved.mean_square, self._scale()
        return rms_norm_backward(*given, where=saved.where, **options)
