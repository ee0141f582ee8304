"""Drives a backend's passes over a checked call: its spans, and their parts.

One function a verb, with its loop over spans and parts; the loops of fused forward and backward,
and how sums of parts are added, have sections of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbn import checks
from fastbn._call import Call, Span
from fastbn.backends.base import (
    ActivationGrad,
    Affine,
    BackwardRowTables,
    BackwardTables,
    Epilogue,
    ForwardRowTables,
    ForwardTables,
    GradientCoefficients,
    Part,
    Table,
    frozen_coefficients,
    gradient_coefficients,
    inverse_deviation,
    normal_scale,
    quiet,
)
from fastbn.backends.tuning import CHANNEL_BYTES, SUM_BYTES
from fastbn.elements import SINGLE
from fastbn.integers import Totals
from fastbn.layouts import channel_axis, frame, moved
from fastbn.results import (
    BatchNormResult,
    Gradients,
    GradientSums,
    ResidualGradients,
    Statistics,
    named,
)

Array = NDArray[Any]


# ---- From a call to a result ----


def returned(given: Any, written: Any) -> Any:
    """The caller's own array, where it gave one (perhaps a subclass), else the one written."""
    return written if checks.arrays.as_ndarray(given) is None else given


def batch_norm(
    call: Call, eps: Any, activation: Any, residual: Any, out: Any, *, is_centred: bool = True
) -> BatchNormResult:
    """Normalize by the statistics of the batch, or of what shares them in it; what is not centred
    are rows."""
    eps = checks.options.epsilon(eps)
    epilogue = call.epilogue(activation, residual)
    y = call.output("out", out, {"x": call.array, "residual": epilogue and epilogue.residual})
    if call.by_row:
        mean, var = _forward_rows(call, eps, epilogue, y, is_centred)
    else:
        mean, var = _forward(call, eps, epilogue, y)
    hidden = call.hidden_samples
    if hidden is not None:
        mean[hidden] = var[hidden] = 0
    return BatchNormResult(returned(out, y), call.shaped(mean), call.shaped(var))


def normalize(
    call: Call,
    eps: Any,
    activation: Any,
    residual: Any,
    out: Any,
    dtype: Any = None,
    out_layout: Any = None,
) -> Array:
    """Normalize by given statistics, or by a given scale in place of gamma, var and eps."""
    eps, layout, dtype, epilogue = form(call, eps, activation, residual, out, dtype, out_layout)
    x, batch = call.array, call.batch
    y = call.result(out, epilogue and epilogue.residual, dtype, layout)
    if call.is_empty:
        y.fill(0)
    elif call.moves(y, epilogue):
        _normalize_into(call, eps, epilogue, y)
    else:
        _normalize(call, eps, epilogue, y)
    axes = channel_axis(batch.layout, x.ndim), channel_axis(layout, x.ndim)
    result: Array = returned(out, moved(y, *axes))
    return result


class Form(NamedTuple):
    """How a batch is normalized by given statistics, checked."""

    eps: float
    layout: str
    """y's."""
    dtype: np.dtype[Any]
    """y's."""
    epilogue: Epilogue | None


def form(
    call: Call,
    eps: Any,
    activation: Any,
    residual: Any,
    out: Any,
    dtype: Any = None,
    out_layout: Any = None,
) -> Form:
    """Check what `normalize` is given beside a call; a given scale needs no eps."""
    eps = 0.0 if "scale" in call.vectors else checks.options.epsilon(eps)
    x, batch = call.array, call.batch
    apart = {"residual": residual, "where": batch.where}
    layout = checks.options.out_layout(out_layout, batch.layout, **apart)
    dtype = checks.options.result_dtype(dtype, checks.arrays.as_ndarray(out), batch.name, x)
    own = dtype == x.dtype.newbyteorder("=")
    epilogue = call.epilogue(activation, residual, None if own else dtype, curves=True)
    return Form(eps, layout, dtype, epilogue)


def _normalize(call: Call, eps: float, epilogue: Epilogue | None, y: Array) -> None:
    """Write y, of x's type, by the arrangement of x."""
    for span in call.spans:
        view, target, of_span = span.view(call.array), span.target(y), span.epilogue(epilogue)
        for part in span.parts(call.array.nbytes, CHANNEL_BYTES):
            mean, beta = call.table("mean", 0.0, span, part), call.table("beta", 0.0, span, part)
            affine = Affine(mean, _scale(call, eps, span, part), beta)
            of_part = of_span and of_span.part(part)
            on = part.of(view), affine, part.of(target), call.threads, of_part, span.selected(part)
            call.backend.normalize(*on)
        span.deliver(target, y)


def _normalize_into(call: Call, eps: float, epilogue: Epilogue | None, y: Array) -> None:
    """Write y of another type than x, in another order of memory, or along a curve, in one pass;
    and 0 where a mask says so."""
    x, layout = call.array, call.batch.layout
    of_x, of_y = frame(x, layout), frame(y, layout)
    residual = None if epilogue is None else epilogue.residual
    beside = None if residual is None else frame(residual, layout)
    (span,) = call.spans
    for part in span.parts(x.size * y.itemsize, CHANNEL_BYTES):
        mean, beta = call.table("mean", 0.0, span, part), call.table("beta", 0.0, span, part)
        affine = Affine(mean, _scale(call, eps, span, part), beta)
        fused = epilogue and epilogue._replace(residual=part.of_frame(beside))
        some = part.of_frame(of_x), affine, part.of_frame(of_y)
        call.backend.normalize_into(*some, call.threads, fused)
    if not np.may_share_memory(y, of_y):
        there = moved(y, channel_axis(layout, y.ndim), 1)
        there[...] = of_y.reshape(there.shape)
    if call.batch.where is not None:
        np.copyto(y, 0, where=~call.batch.where)


def _scale(call: Call, eps: float, *at: Any) -> Table:
    """gamma / sqrt(var + eps) of a part."""
    if "scale" in call.vectors:
        return call.table("scale", 1.0, *at)
    return normal_scale(call.table("gamma", 1.0, *at), call.table("var", 1.0, *at), eps)


def moments(call: Call) -> Statistics:
    """Mean and variance alone."""
    batch = call.batch
    if batch.is_integer and call.runs is None and batch.weights is None:
        return Statistics(*Totals.of(batch, (call.backend, call.threads)).moments())
    if batch.is_integer:
        call = call.widened(SINGLE)
    mean, var = call.new_statistics(), call.new_statistics()
    for span in call.spans:
        view = span.view(call.array)
        for part in span.parts(call.array.nbytes):
            at, on = span.at(part), (part.of(view), call.threads, span.selected(part))
            mean[at], var[at] = call.backend.moments(*on)
    return Statistics(call.shaped(mean), call.shaped(var))


class BackwardOptions(NamedTuple):
    """What the backward functions are asked for, as the caller gave it."""

    eps: Any
    params: bool
    activation: Any
    y: Any
    dresidual: Any
    out: Any
    dsum: Any = None
    """What is added to dx."""


class _Work(NamedTuple):
    """What a backward reads, and where it writes."""

    dy: Array
    x: Array | None
    """None where it is not read."""
    eps: float
    activation_grad: ActivationGrad | None
    dx: Array
    parameters: list[Array]
    """dgamma and dbeta, where they are wanted."""
    is_fixed: bool
    total: GradientSums | None
    """The sums of a whole batch of which this is a part."""
    dsum: Array | None
    """What is added to dx, of rows."""


def gradients(
    call: Call,
    dy: Any,
    options: BackwardOptions,
    *,
    has_x: bool = True,
    is_fixed: bool = False,
    sums: Any = None,
) -> Gradients | ResidualGradients:
    """Go back through the batch's statistics, or through what shares them, or by fixed ones; the
    call is one of dy without x."""
    dy = checks.arrays.companion("dy", dy, call.batch.name, call.array)
    eps, total = checks.options.epsilon(options.eps), call.sums(sums)
    x = call.array if has_x else None
    _, params, activation, y, dresidual, out, dsum = options
    if dsum is not None:
        checks.options.goes_alone("dsum", activation=activation, dresidual=dresidual)
        dsum = checks.arrays.companion("dsum", dsum, call.batch.name, call.array)
    grad, dx = call.backward_outputs(activation, y, dresidual, out, dy, x, dsum)
    parameters = [call.new_gradient(), call.new_gradient()] if params else []
    read = None if is_fixed and not params else x
    work = _Work(dy, read, eps, grad, dx, parameters, is_fixed, total, dsum)
    (_backward_rows if call.by_row else _backward)(call, work)
    dgamma, dbeta = parameters or (None, None)
    return named(returned(out, dx), dgamma, dbeta, grad and returned(dresidual, grad.dresidual))


@quiet
def gradient_sums(call: Call, dy: Any, eps: Any, activation: Any, y: Any) -> GradientSums:
    """dgamma, dbeta and count of a part of a batch."""
    x, dy = call.array, checks.arrays.companion("dy", dy, "x", call.array)
    eps = checks.options.epsilon(eps)
    known, y = checks.arrays.activation_grad(y, activation, "x", x)
    grad = None if y is None else ActivationGrad(known, y, None)
    dgamma, dbeta = np.zeros((2, call.channels))
    if call.is_empty:
        return GradientSums(dgamma, dbeta, 0)
    (span,) = call.spans
    dy_view, x_view, grad = span.view(dy), span.view(x), span.activation_grad(grad)
    for part in span.parts(x.nbytes, CHANNEL_BYTES):
        arrays = part.of(dy_view), part.of(x_view), call.table("mean", 0.0, span, part)
        of_part = grad and grad.part(part)
        found = call.backend.gradient_moments(*arrays, call.threads, of_part, span.selected(part))
        rstd = inverse_deviation(call.table("var", 1.0, span, part), eps)
        sum_dy, sum_dy_xmu = found
        dgamma[part.channels], dbeta[part.channels] = (sum_dy_xmu * rstd)[0], sum_dy[0]
    return GradientSums(dgamma, dbeta, call.count)


# ---- Forward ----


def _forward(call: Call, eps: float, epilogue: Epilogue | None, y: Array) -> tuple[Table, Table]:
    """Write y; gives the tables of mean and variance."""
    mean, var = call.new_statistics(), call.new_statistics()
    if call.is_empty:
        y.fill(0)
    for span in call.spans:
        view, target = span.view(call.array, call.pool), span.target(y)
        of_span = span.epilogue(epilogue)
        for part in span.parts(call.array.nbytes, pool=call.pool):
            gamma, beta = (call.given(name, span, part) for name in ("gamma", "beta"))
            tables = ForwardTables(gamma, beta, eps, call.pool)
            fused = of_span and of_span.part(part), span.selected(part)
            at, on = span.at(part, call.pool), (part.of(view), tables, part.of(target))
            mean[at], var[at] = call.backend.forward(*on, call.threads, *fused)
        span.deliver(target, y)
    return mean, var


def _forward_rows(
    call: Call, eps: float, epilogue: Epilogue | None, y: Array, is_centred: bool
) -> tuple[Table, Table]:
    """The same of rows."""
    (span,) = call.spans
    of_columns = _by_column(call, "gamma", 1.0), _by_column(call, "beta", 0.0)
    tables, mask = ForwardRowTables(*of_columns, eps, is_centred), call.row_mask
    statistics = mean, var = call.new_statistics(), call.new_statistics()
    view, target, of_span = span.view(call.array), span.target(y), span.epilogue(epilogue)
    for part in span.row_parts(call.array.nbytes, len(tables.gamma)):
        of_part = of_span and of_span.part(part)
        arrays = part.of(view), tables, part.of(target)
        of_mask = None if mask is None else mask[part.channels]
        found = call.backend.forward_rows(*arrays, call.threads, of_part, of_mask)
        for table, rows in zip(statistics, found, strict=True):
            table.reshape(-1)[part.channels] = rows[0]
    span.deliver(target, y)
    return mean, var


def _of_rows(statistic: Array | None) -> Table:
    """mean or var of rows, as a backend takes it."""
    return np.require(statistic, np.float64, ["ALIGNED"]).reshape(1, -1)


def _by_column(call: Call, name: str, default: float) -> Table:
    """gamma or beta as a row of float64 for each group."""
    vector, shape = call.vectors[name], (-1, call.pool)
    if vector is None:
        return np.full(call.channels, default).reshape(shape)
    return vector.astype(np.float64).reshape(shape)


# ---- Backward ----


def _backward(call: Call, work: _Work) -> None:
    """Write dx, dresidual, dgamma and dbeta, as far as they are wanted."""
    if call.is_empty:
        _clear(work)
        return
    totals = work.parameters if call.runs is None else _nothing(work.parameters)
    held = SUM_BYTES if _is_fused(work) else CHANNEL_BYTES
    for span in call.spans:
        on_views, target = _on_views(work, span), span.target(work.dx)
        for part in span.parts(call.array.nbytes, held, call.pool):
            sums = _part_backward(call, on_views, span, part, part.of(target))
            _add_into(totals, part.channels, sums, anew=call.runs is None)
            del sums  # the next part's are made while these are held
        _deliver(work, on_views, span, target)
    if call.runs is not None:
        _round_into(work.parameters, totals)


def _backward_rows(call: Call, work: _Work) -> None:
    """The same of rows."""
    (span,) = call.spans
    gamma, mask = _by_column(call, "gamma", 1.0), call.row_mask
    is_centred = "mean_square" not in call.vectors
    var = _of_rows(call.vectors["var" if is_centred else "mean_square"])
    mean = _of_rows(call.vectors["mean"]) if is_centred else np.zeros_like(var)
    totals = [np.full_like(gamma, -0.0), np.full_like(gamma, -0.0)]  # to which -0.0 may be added
    on_views, target = _on_views(work, span), span.target(work.dx)
    for part in span.row_parts(call.array.nbytes, len(gamma)):
        rows = part.channels
        of_mask = None if mask is None else mask[rows]
        tables = BackwardRowTables(mean[:, rows], var[:, rows], gamma, work.eps, is_centred)
        arrays = part.of(on_views.dy), part.of(on_views.x), tables, part.of(target)
        of_part = on_views.activation_grad and on_views.activation_grad.part(part)
        dsum = part.of(on_views.dsum)
        _add(totals, call.backend.backward_rows(*arrays, call.threads, of_part, of_mask, dsum))
    _deliver(work, on_views, span, target)
    _round_into(work.parameters, [total.reshape(-1) for total in totals])


def _clear(work: _Work) -> None:
    """The gradients of what is empty, or of what does not count."""
    if work.dsum is not None:
        work.dx[...] = work.dsum
        return
    for array in (work.dx, work.activation_grad and work.activation_grad.dresidual):
        if array is not None:
            array.fill(0)
    if work.total is not None:
        _round_into(work.parameters, (work.total.dgamma, work.total.dbeta))


def _on_views(work: _Work, span: Span) -> _Work:
    """The work on a span's views."""
    dy, x = span.view(work.dy), None if work.x is None else span.view(work.x)
    dsum = None if work.dsum is None else span.view(work.dsum)
    grad = span.activation_grad(work.activation_grad)
    return work._replace(dy=dy, x=x, activation_grad=grad, dsum=dsum)


def _deliver(work: _Work, on_views: _Work, span: Span, target: Array) -> None:
    """Bring home what was written of a span."""
    span.deliver(target, work.dx)
    grad, written = work.activation_grad, on_views.activation_grad
    if grad and written and grad.dresidual is not None and written.dresidual is not None:
        span.deliver(written.dresidual, grad.dresidual)


def _is_fused(work: _Work) -> bool:
    """Whether a backend's `backward` does it: sums, coefficients and dx in one call."""
    return work.x is not None and work.total is None


def _part_backward(call: Call, work: _Work, span: Span, part: Part, dx: Array) -> tuple[Table, ...]:
    """Write dx and dresidual of a part; gives dgamma and dbeta, if x was read for them."""
    dy, x, total = part.of(work.dy), part.of(work.x), work.total
    fused = work.activation_grad and work.activation_grad.part(part), span.selected(part)
    if _is_fused(work):
        given: dict[str, Any] = {
            name: call.given(name, span, part) for name in ("mean", "var", "gamma")
        }
        tables = BackwardTables(**given, eps=work.eps, is_fixed=work.is_fixed, pool=call.pool)
        return call.backend.backward(dy, x, tables, dx, call.threads, *fused)
    sums = None
    if total is not None:
        dgamma, dbeta = (a[None, part.channels] for a in (total.dgamma, total.dbeta))
        sums = GradientSums(dgamma, dbeta, total.count)
    mean, var, gamma = (call.table(name, 1.0, span, part) for name in ("mean", "var", "gamma"))
    # What weighs nothing has no part in the statistics.
    coefficients = _coefficients(mean, var, gamma, work.eps, sums if call.count else None)
    call.backend.input_gradient(dy, x, coefficients, dx, call.threads, *fused)
    return () if sums is None else (sums.dgamma, sums.dbeta)


@quiet
def _coefficients(
    mean: Table, var: Table, gamma: Table, eps: float, sums: GradientSums | None
) -> GradientCoefficients:
    """Of the input's gradient by known sums or, without, through fixed statistics."""
    rstd = inverse_deviation(var, eps)
    if sums is None:
        return frozen_coefficients(mean, rstd, gamma)
    return gradient_coefficients(sums.dbeta, sums.dgamma, sums.count, mean, rstd, gamma)


# ---- Sums of parts ----


@quiet
def _add(totals: list[Table], found: tuple[Table, Table]) -> None:
    """Add the sums of some rows to those of all."""
    for total, sums in zip(totals, found, strict=True):
        total += sums


@quiet
def _add_into(totals: list[Array], at: slice, sums: tuple[Table, ...], *, anew: bool) -> None:
    """Add the sums of some runs to those of channels, or put them there."""
    for total, found in zip(totals, sums, strict=False):
        total[at] = found[0] if anew else _in_turn(total[at], found)


def _in_turn(total: Array, found: Table) -> Array:
    """total + found[0] + found[1] + ... in this order, so that no bit depends on the parts in which
    runs are worked on; `found` is used up. Of a single column `sum` would add up pairs."""
    found[0] += total
    return np.asarray(np.add.accumulate(found)[-1] if found.shape[1] == 1 else found.sum(0))


def _nothing(parameters: list[Array]) -> list[Array]:
    """Float64 totals of no runs, to which -0.0 may be added."""
    return [np.full(parameter.shape, -0.0) for parameter in parameters]


@quiet
def _round_into(parameters: list[Array], totals: Sequence[Table]) -> None:
    """Sums as the gradients of parameters, in their type."""
    for parameter, total in zip(parameters, totals, strict=False):
        parameter[...] = total
