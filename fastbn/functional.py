"""The verbs: batch normalization and its gradient, in training and with fixed statistics.

Each verb but `gradient_sums` first offers its arguments, if there is no mask and no weight, to the
backend's plain entry, which does the whole call for contiguous arrays that fit and otherwise
answers None, having touched nothing. Only then are they checked (`Batch`, `Call`), and `_run` takes
the call through the backend's passes.
"""

from __future__ import annotations

from typing import Any, Literal, overload

from numpy.typing import NDArray

from fastbn import _run, checks
from fastbn._batch import Batch
from fastbn._call import Call
from fastbn.config import current
from fastbn.layouts import EACH_CHANNEL
from fastbn.results import (
    BatchNormResult,
    Gradients,
    GradientSums,
    ResidualGradients,
    Statistics,
    named,
)

Array = NDArray[Any]
ActivationName = str | tuple[str, float] | None
Sums = GradientSums | tuple[Array, Array, float | Array] | list[Any]


def batch_norm(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    eps: float = 1e-5,
    layout: str = "NCHW",
    activation: ActivationName = None,
    residual: Array | None = None,
    where: Array | None = None,
    weights: Array | None = None,
    virtual_batch: int | None = None,
    out: Array | None = None,
) -> BatchNormResult:
    """Normalize each channel of a batch by the batch's own statistics: the training transform.

    ``y = gamma * (x - mean) / sqrt(var + eps) + beta``, with mean and (biased) variance taken
    over every axis but the channels': Ioffe & Szegedy (2015), Algorithm 1. With an activation or
    a residual, ``activation(y + residual)``, as at the end of a residual block (He et al. 2016),
    in the same pass over memory.

    Parameters
    ----------
    x : ndarray of float32, float64, float16 or bfloat16
        The batch, of any rank from 2 up, with any strides and either byte order:
        (N, C, ...) for layout "NCHW", (N, ..., C) for "NHWC". Half types are computed in float32.
    gamma, beta : ndarray of any of these types, shape (C,), optional
        Scale and shift of each channel; 1 and 0 where not given. Half types are widened to float32.
    eps : float
        Added to the variance, zero or more. Where var + eps is 0, y = beta.
    layout : {"NCHW", "NHWC"}
        Where the channels are: axis 1, or the last axis.
    activation : {None, "relu", "relu6"} or ("leaky_relu", slope)
        What is done last; 0 < slope < 1.
    residual : ndarray, optional
        Of x's shape and dtype: what is added before the activation.
    where : ndarray of bool, optional
        Which places count, the same for all channels: broadcast against x, with a single channel,
        as of shape (N, 1, H, W) or (N, H, W, 1). What stands elsewhere, NaN included, changes
        nothing, and y is 0 there.
    weights : ndarray of float32 or float64, shape (N,), optional
        How much each sample counts in the statistics, zero or more; y is computed for all. All
        times one number they give the same; their sum over all values has to fit float64.
    virtual_batch : int, optional
        Normalize each group of so many consecutive samples by its own statistics, the last group
        perhaps a smaller one ("ghost" batches: Hoffer et al. 2017). Without `where` and `weights`.
    out : ndarray, optional
        Where y goes: native, of x's shape and dtype, any strides; `x` or `residual` itself works
        in place. A fresh large array costs more than the normalization: pass `out` in a loop.

    Returns
    -------
    y : ndarray
        x's shape and dtype, in native byte order and, where fresh, x's memory order.
    mean, var : ndarray of float64, shape (C,) or, with virtual batches, (groups, C)
        The statistics used; var is divided by the count, or the sum of the weights. A batch
        without values, or in which nothing counts, gives zeros.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type, shape or value; nothing has been written.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.random.default_rng(0).normal(5.0, 3.0, (32, 4, 8, 8)).astype(np.float32)
    >>> y, mean, var = fastbn.batch_norm(x)
    >>> bool(abs(y.mean()) < 1e-6), round(float(y.std()), 4)
    (True, 1.0)
    >>> bool((abs(mean - 5.0) < 0.5).all()), y.dtype, mean.dtype
    (True, dtype('float32'), dtype('float64'))
    """
    backend, threads = on = current()
    if where is None and weights is None:
        if virtual_batch is None:
            plain = backend.plain_batch_norm(
                x, gamma, beta, eps, layout, activation, residual, out, threads
            )
        else:
            sharing = EACH_CHANNEL, virtual_batch
            plain = backend.plain_samples(
                x, *sharing, gamma, beta, eps, layout, activation, residual, out, threads
            )
        if plain is not None:
            return BatchNormResult(*plain)
    batch = Batch(x, layout, where, weights)
    call = Call(on, batch, virtual_batch=virtual_batch, gamma=gamma, beta=beta)
    return _run.batch_norm(call, eps, activation, residual, out)


def normalize(
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    eps: float = 1e-5,
    layout: str = "NCHW",
    activation: ActivationName = None,
    residual: Array | None = None,
    where: Array | None = None,
    dtype: Any = None,
    out_layout: str | None = None,
    out: Array | None = None,
) -> Array:
    """Normalize each channel by given statistics: the inference transform, "frozen" batch norm.

    ``y = gamma * (x - mean) / sqrt(var + eps) + beta``: Ioffe & Szegedy (2015), Algorithm 2.
    It is computed from ``x - mean``, not as one multiply-add of x, which would lose the digits
    that a large mean takes.

    Parameters
    ----------
    x : ndarray of float32, float64, float16, bfloat16, uint8, int8, uint16 or int16
        As in `batch_norm`. Integers are computed in float32, which holds them.
    gamma, beta, eps, layout, where
        As in `batch_norm`.
    activation : {None, "relu", "relu6", "hard_sigmoid", "hard_swish", "silu"} or ("leaky_relu", a)
        What is done last; 0 < a < 1. With v the value before: hard_sigmoid is
        ``min(max(v + 3, 0), 6) / 6`` and hard_swish v times that (Howard et al. 2019), silu is
        ``v / (1 + exp(-v))`` (Elfwing et al. 2018). These three have no backward here.
    mean, var : ndarray of float32, float64, float16 or bfloat16, shape (C,)
        Statistics of each channel; no variance may be negative or NaN.
    residual : ndarray, optional
        As in `batch_norm`; of x's shape, and of y's dtype.
    dtype : dtype, optional
        y's: of float32 and of integers float32, float16 or bfloat16, else x's own. Where it is not
        given `out` says it; else it is x's, and float32 for integers.
    out_layout : {None, "NCHW", "NHWC"}
        The layout of y, if not that of x: y is dense in it, written in the same pass. Without
        `residual` and `where`.
    out : ndarray, optional
        Where y goes: native, of y's shape and dtype, any strides; `x` or `residual` itself works
        in place. One in another memory order than x's is written in the same pass, too.

    Returns
    -------
    y : ndarray
        Of x's shape, or what that is in `out_layout`; in native byte order and, where fresh and of
        the same layout, in x's memory order.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type, shape or value; nothing has been written.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.float32([[1, 10], [3, 30]])
    >>> fastbn.normalize(x, np.float64([2, 20]), np.float64([1, 100]), eps=0.0)
    array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    >>> images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    >>> mean, var = fastbn.moments(images, layout="NHWC")
    >>> y = fastbn.normalize(images, mean, var, layout="NHWC", out_layout="NCHW")
    >>> y.shape, y.dtype, bool(abs(y.mean()) < 1e-6)
    ((2, 3, 32, 32), dtype('float32'), True)
    """
    backend, threads = on = current()
    if where is None:
        form = dtype, out_layout, out
        plain = backend.plain_normalize(
            x, mean, var, gamma, beta, eps, layout, activation, residual, *form, threads
        )
        if plain is not None:
            return plain
    vectors: dict[str, Any] = {"gamma": gamma, "beta": beta, "mean": mean, "var": var}
    call = Call(on, Batch(x, layout, where, types=checks.arrays.DATA), **vectors)
    return _run.normalize(call, eps, activation, residual, out, dtype, out_layout)


@overload
def batch_norm_backward(
    dy: Array,
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    *,
    eps: float = ...,
    layout: str = ...,
    params: bool = ...,
    activation: ActivationName = ...,
    y: Array | None = ...,
    dresidual: Literal[False] = ...,
    where: Array | None = ...,
    weights: Array | None = ...,
    sums: Sums | None = ...,
    virtual_batch: int | None = ...,
    out: Array | None = ...,
) -> Gradients: ...
@overload
def batch_norm_backward(
    dy: Array,
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    *,
    eps: float = ...,
    layout: str = ...,
    params: bool = ...,
    activation: ActivationName = ...,
    y: Array | None = ...,
    dresidual: Literal[True] | Array,
    where: Array | None = ...,
    weights: Array | None = ...,
    sums: Sums | None = ...,
    virtual_batch: int | None = ...,
    out: Array | None = ...,
) -> ResidualGradients: ...
def batch_norm_backward(
    dy: Array,
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    *,
    eps: float = 1e-5,
    layout: str = "NCHW",
    params: bool = True,
    activation: ActivationName = None,
    y: Array | None = None,
    dresidual: bool | Array = False,
    where: Array | None = None,
    weights: Array | None = None,
    sums: Sums | None = None,
    virtual_batch: int | None = None,
    out: Array | None = None,
) -> Gradients | ResidualGradients:
    """Gradient of `batch_norm`, through the batch's own statistics.

    With ``xhat = (x - mean) / sqrt(var + eps)``: ``dbeta = sum(dy)``,
    ``dgamma = sum(dy * xhat)`` and ``dx = gamma / sqrt(var + eps) * (dy - mean(dy) -
    xhat * mean(dy * xhat))``: Ioffe & Szegedy (2015), section 3, collected. With an activation,
    dy is first multiplied by its slope where it gave `y`; at 0 that is the negative side's, and
    where relu6 gave 6 it is 0.

    Parameters
    ----------
    dy : ndarray
        Gradient with respect to y, of x's shape and dtype.
    x, gamma, eps, layout
        As given to `batch_norm`.
    mean, var : ndarray of float64, shape (C,) or (groups, C)
        As `batch_norm` returned them. No variance may be negative; a NaN stays in its channel.
    params : bool
        Whether dgamma and dbeta are wanted; None stands in their place otherwise.
    activation
        As given to `batch_norm`.
    y : ndarray, optional
        What `batch_norm` returned; needed with an activation, and not looked at without one.
    dresidual : bool or ndarray
        Whether the residual's gradient is wanted or, like `out`, where it goes; `dy` works in
        place.
    where, weights
        As given to `batch_norm`. dx is 0 where nothing counts; with weights w of sum W its means
        are ``w * sum(dy) / W`` and ``w * sum(dy * xhat) / W``.
    sums : (dgamma, dbeta, count), optional
        What `gradient_sums` gave, added up over all parts of a batch of which x is one, a tuple or
        list: used in place of this part's own. mean and var must then be those of the whole batch,
        too.
    virtual_batch : int, optional
        As given to `batch_norm`; without `where`, `weights` and `sums`.
    out : ndarray, optional
        Where dx goes: native, of x's shape and dtype, any strides; `dy` or `x` works in place.

    Returns
    -------
    dx : ndarray
        x's shape and dtype.
    dgamma, dbeta : ndarray, shape (C,), or None
        In gamma's dtype or, where gamma is None, in x's; float32 in place of half types.
    dresidual : ndarray
        dy as the activation lets it through; a fourth field, only where asked for.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type, shape or value; nothing has been written.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> rng = np.random.default_rng(0)
    >>> x, dy = rng.normal(size=(2, 16, 3, 5, 5))
    >>> y, mean, var = fastbn.batch_norm(x)
    >>> dx, dgamma, dbeta = fastbn.batch_norm_backward(dy, x, mean, var)
    >>> bool(np.allclose(dbeta, dy.sum((0, 2, 3)))), bool(abs(dx.sum()) < 1e-9)
    (True, True)
    """
    arguments = dy, x, mean, var, gamma, eps, layout, params, activation, y, dresidual
    apart: dict[str, Any] = {"sums": sums, "virtual_batch": virtual_batch}
    return _gradients(arguments, out, where, weights, frozen=False, **apart)


@overload
def normalize_backward(
    dy: Array,
    x: Array | None,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    *,
    eps: float = ...,
    layout: str = ...,
    params: bool = ...,
    activation: ActivationName = ...,
    y: Array | None = ...,
    dresidual: Literal[False] = ...,
    where: Array | None = ...,
    out: Array | None = ...,
) -> Gradients: ...
@overload
def normalize_backward(
    dy: Array,
    x: Array | None,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    *,
    eps: float = ...,
    layout: str = ...,
    params: bool = ...,
    activation: ActivationName = ...,
    y: Array | None = ...,
    dresidual: Literal[True] | Array,
    where: Array | None = ...,
    out: Array | None = ...,
) -> ResidualGradients: ...
def normalize_backward(
    dy: Array,
    x: Array | None,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    *,
    eps: float = 1e-5,
    layout: str = "NCHW",
    params: bool = True,
    activation: ActivationName = None,
    y: Array | None = None,
    dresidual: bool | Array = False,
    where: Array | None = None,
    out: Array | None = None,
) -> Gradients | ResidualGradients:
    """Gradient of `normalize`: the statistics are constants and let none through.

    ``dx = gamma / sqrt(var + eps) * dy``; dgamma and dbeta as in `batch_norm_backward`.

    Parameters
    ----------
    dy, gamma, eps, layout, activation, y, dresidual, where, out
        As in `batch_norm_backward`.
    x : ndarray or None
        As given to `normalize`; with ``params=False`` it is not read and may be None.
    mean, var : ndarray of float32, float64, float16 or bfloat16, shape (C,)
        As given to `normalize`; no variance may be negative or NaN.
    params : bool
        Whether dgamma and dbeta are wanted; None stands in their place otherwise.

    Returns
    -------
    dx, dgamma, dbeta, dresidual
        As in `batch_norm_backward`.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type, shape or value; nothing has been written.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> dy = np.float32([[1, 2], [3, 4]])
    >>> mean, var = np.zeros(2), np.float64([4, 16])
    >>> fastbn.normalize_backward(dy, None, mean, var, eps=0.0, params=False).dx
    array([[0.5, 0.5],
           [1.5, 1. ]], dtype=float32)
    """
    arguments = dy, x, mean, var, gamma, eps, layout, params, activation, y, dresidual
    return _gradients(arguments, out, where, frozen=True)


def moments(
    x: Array,
    *,
    layout: str = "NCHW",
    where: Array | None = None,
    weights: Array | None = None,
    virtual_batch: int | None = None,
) -> Statistics:
    """Mean and biased variance of each channel, in float64.

    ``mean = sum(x) / n`` and ``var = sum((x - mean)**2) / n`` over the n values of a channel; with
    weights w ``mean = sum(w * x) / sum(w)`` and ``var = sum(w * (x - mean)**2) / sum(w)``.

    Parameters
    ----------
    x : ndarray of float32, float64, float16, bfloat16, uint8, int8, uint16 or int16
        As in `batch_norm`. Integers are summed exactly, where no weights are given.
    layout, where, weights, virtual_batch
        As in `batch_norm`.

    Returns
    -------
    mean, var : ndarray of float64, shape (C,) or, with virtual batches, (groups, C)
        Zeros where no value counts; var is exactly 0 on a constant channel.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type, shape or value.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> fastbn.moments(np.float32([[1, 7], [3, 7]]))
    Statistics(mean=array([2., 7.]), var=array([1., 0.]))
    """
    backend, threads = on = current()
    if where is None and weights is None and virtual_batch is None:
        plain = backend.plain_moments(x, layout, threads)
        if plain is not None:
            return Statistics(*plain)
    batch = Batch(x, layout, where, weights, types=checks.arrays.DATA)
    return _run.moments(Call(on, batch, virtual_batch=virtual_batch))


def gradient_sums(
    dy: Array,
    x: Array,
    mean: Array,
    var: Array,
    *,
    eps: float = 1e-5,
    layout: str = "NCHW",
    activation: ActivationName = None,
    y: Array | None = None,
    where: Array | None = None,
    weights: Array | None = None,
) -> GradientSums:
    """The sums of `batch_norm_backward` alone, for a batch whose parts are elsewhere.

    ``dbeta = sum(dy)`` and ``dgamma = sum(dy * xhat)``, ``xhat = (x - mean) / sqrt(var + eps)``:
    Ioffe & Szegedy (2015), section 3. Those of all parts, added up, are the `sums` that
    `batch_norm_backward` takes for each part.

    Parameters
    ----------
    dy, x, eps, layout, activation, y, where, weights
        As given to `batch_norm_backward`, of this part.
    mean, var : ndarray of float64, shape (C,)
        Of the whole batch, as `fastbn.Moments` merges them.

    Returns
    -------
    dgamma, dbeta : ndarray of float64, shape (C,)
    count : int or float
        Values of a channel in this part, or the sum of their weights.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type, shape or value.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x, dy = np.random.default_rng(0).normal(size=(2, 16, 3, 5))
    >>> mean, var = fastbn.moments(x)
    >>> parts = [fastbn.gradient_sums(dy[i : i + 8], x[i : i + 8], mean, var) for i in (0, 8)]
    >>> sums = tuple(sum(fields) for fields in zip(*parts))
    >>> dx = fastbn.batch_norm_backward(dy[:8], x[:8], mean, var, sums=sums).dx
    >>> bool(np.allclose(dx, fastbn.batch_norm_backward(dy, x, mean, var).dx[:8]))
    True
    """
    batch = Batch(x, layout, where, weights)
    call = Call(current(), batch, is_fixed=False, is_part=True, mean=mean, var=var)
    return _run.gradient_sums(call, dy, eps, activation, y)


def _gradients(
    arguments: tuple[Any, ...],
    out: Any,
    where: Any,
    weights: Any = None,
    *,
    frozen: bool,
    sums: Any = None,
    virtual_batch: Any = None,
) -> Gradients | ResidualGradients:
    """Both backward functions; `frozen` is what tells them apart."""
    backend, threads = on = current()
    if where is None and weights is None and sums is None:
        if virtual_batch is None:
            plain = backend.plain_backward(*arguments, frozen, out, threads)
        else:
            sharing = EACH_CHANNEL, virtual_batch
            plain = backend.plain_samples_backward(
                *arguments[:2], *sharing, *arguments[2:], out, threads
            )
        if plain is not None:
            return named(*plain)
    dy, x, mean, var, gamma, eps, layout, params, activation, y, dresidual = arguments
    params = checks.options.flag("params", params)
    without_x = checks.arrays.may_lack_x(x, frozen=frozen, params=params)
    checks.options.virtual_batch(virtual_batch, sums=sums)
    kind = {"is_fixed": frozen, "is_part": sums is not None, "virtual_batch": virtual_batch}
    vectors = {"gamma": gamma, "mean": mean, "var": var}
    given = layout, where, weights
    batch = Batch(dy, *given, name="dy") if without_x else Batch(x, *given)
    call = Call(on, batch, **kind, **vectors)
    options = _run.BackwardOptions(eps, params, activation, y, dresidual, out)
    kind = {"has_x": not without_x, "is_fixed": frozen}
    return _run.gradients(call, dy, options, **kind, sums=sums)
