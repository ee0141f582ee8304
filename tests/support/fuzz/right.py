"""What is right about the results of public functions, of dense copies of their arguments.

By the oracles in extended precision and within the bounds of docs/numerics.md; only of channels in
the domain of those promises. Each function has results by name, and arguments by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import fastbn
from oracle import formulas
from oracle.arrays import Array, Wide, by_sample, channel_axis, limits, rows, vector, wide
from oracle.bounds import (
    bound_double_backward,
    bound_gated,
    bound_mean,
    bound_var,
    bound_y,
    double_backward_terms,
    factor,
    stored,
    subnormal_terms,
    unit,
)
from oracle.formulas import DoubleBackwardProblem
from support import rms_norms, sample_norms
from support.bits import assert_same_bits
from support.judge import Judged, assert_within, judge_backward, judge_y

Results = dict[str, Any]
NORMAL = float(np.finfo(np.float64).smallest_normal)
FARTHEST = {2: 1e6, 4: 1e6, 8: 1e12}
"""Up to which |mean|/s there are promises, by the bytes of a value."""


def arrays_of(results: Results) -> dict[str, Array]:
    return {name: a for name, a in results.items() if isinstance(a, np.ndarray)}


@dataclass
class Selected:
    """Arrays of a batch as (n, C): the places that count of some samples, as if they stood alone.

    All of them are judged in layout NHWC.
    """

    shape: tuple[int, ...]
    layout: str
    where: Array | None
    samples: slice = field(default_factory=lambda: slice(None))

    def __post_init__(self) -> None:
        self.axis = channel_axis(len(self.shape), self.layout)
        single = [n for axis, n in enumerate(self.shape) if axis != self.axis]
        self.kept = np.broadcast_to(np.True_, single)
        if self.where is not None:
            full = (*self.shape[: self.axis], 1, *self.shape[self.axis + 1 :])
            self.kept = np.broadcast_to(self.where, full).squeeze(self.axis)
        self.count = int(np.count_nonzero(self.kept[self.samples]))

    def of(self, a: Array) -> Array:
        """The values of an array like x."""
        return np.moveaxis(a, self.axis, -1)[self.samples][self.kept[self.samples]]

    def by_place(self, weights: Array) -> Wide:
        """A weight for each of the values."""
        kept = self.kept[self.samples]
        one = weights[self.samples].astype(np.longdouble).reshape(-1, *[1] * (kept.ndim - 1))
        every: Wide = np.broadcast_to(one, kept.shape)[kept]
        return every

    def assert_zero_elsewhere(self, a: Array, what: str) -> None:
        rest = np.moveaxis(a, self.axis, -1)[~self.kept].astype(np.float64)
        assert not rest.any(), f"{what} is not 0 where nothing counts"


def domain(x: Wide, mean: Wide, var: Wide, eps: float, itemsize: int) -> Array:
    """The channels, rows of x, for which there are promises."""
    inside = (var == 0) | ((var >= NORMAL) & (1 / var >= NORMAL))
    inside &= np.abs(mean) * formulas.rstd_of(var, eps) <= FARTHEST[itemsize]
    return np.asarray(inside & np.isfinite(x).all(1))


def largest(dtype: Any) -> float:
    """Of a term, with room for an error: half types are computed in float32."""
    return float(np.finfo(np.float64 if np.dtype(dtype).itemsize == 8 else np.float32).max) / 4


def finite(dtype: Any, *vectors: Array | None) -> Array:
    """Channels whose parameters are numbers of x's type."""
    with np.errstate(over="ignore"):
        return np.asarray(
            np.logical_and.reduce([np.abs(v) < largest(dtype) for v in vectors if v is not None])
        )


def verify(judged: Iterable[Judged], inside: Array) -> None:
    """All is within its bound, of those channels (the first axes) where all terms fit."""
    for actual, expected, bound, what in judged:
        terms = bound / (4 * unit(actual.dtype)) if what == "dx" else 0
        sizes = np.maximum(np.abs(expected), terms).reshape(*inside.shape, -1)
        chosen = inside & (sizes.max(-1, initial=0) < largest(actual.dtype))
        if chosen.any():
            assert_within(actual[chosen], expected[chosen], bound[chosen], what)


def weighed(x: Wide, weights: Wide) -> tuple[Wide, Wide]:
    """Mean and biased variance of each row, whose values weigh; what weighs nothing may be NaN."""
    w = weights / weights.sum()
    x = np.where(w > 0, x, 0)
    shift = x[:, np.argmax(w > 0)][:, None]
    centred = np.where(w > 0, x - shift, 0)
    offset = (w * centred).sum(1, keepdims=True)
    centred -= offset
    residue = (w * centred).sum(1, keepdims=True)
    var = (w * centred**2).sum(1) - residue[:, 0] ** 2
    return (shift + (offset + residue))[:, 0], np.maximum(var, 0)


def assert_zeros(results: Results, **shapes: tuple[int, ...] | None) -> None:
    """What nothing at all gives."""
    for name, shape in shapes.items():
        if results.get(name) is not None:
            assert results[name].shape == shape, f"{name} has shape {results[name].shape}"
            assert not results[name].astype(np.float64).any(), f"{name} is not 0"


def expected_type(x: Array, gamma: Array | None) -> np.dtype[Any]:
    """Of dgamma and dbeta."""
    if gamma is not None:
        return np.dtype(gamma.dtype.type)
    return np.dtype(x.dtype if x.dtype.itemsize > 2 else np.float32)


def assert_parameters(
    results: Results, x: Array, channels: int, a: dict[str, Any], *names: str
) -> None:
    """dgamma and dbeta, or those named, are there where they are wanted, of a shape and type."""
    names = names or ("dgamma", "dbeta")
    wanted = a.get("wanted", names if a.get("params", True) else ())
    of_gamma = expected_type(x, a.get("gamma"))
    for name in names:
        found = results[name]
        assert (found is not None) == (name in wanted), f"{name} is {found}"
        if found is not None:
            assert (found.shape, found.dtype) == ((channels,), of_gamma), f"{name} is {found.dtype}"


def assert_types(results: Results, x: Array, *like_x: str) -> None:
    for name in like_x:
        a = results.get(name)
        if a is not None:
            assert (a.shape, a.dtype) == (x.shape, x.dtype), f"{name} is {a.dtype} {a.shape}"


def judge_normalized(results: Results, a: dict[str, Any]) -> None:
    """y, mean and var of what went by a batch's own statistics."""
    x, layout, k = a["x"], a["layout"], a.get("virtual_batch")
    if x.dtype.kind in "iu":
        x = x.astype(np.float32)
        a = a | {"x": x}
    channels = x.shape[channel_axis(x.ndim, layout)]
    assert_types(results, x, "y")
    groups = groups_of(len(x), k)
    shape = (channels,) if k is None else (len(groups), channels)
    assert results["mean"].shape == results["var"].shape == shape
    for i, group in enumerate(groups):
        selected = Selected(x.shape, layout, a.get("where"), group)
        of_group = results | {
            n: results[n].reshape(len(groups), channels)[i] for n in ("mean", "var")
        }
        _judge_group(of_group, a, selected)
        if a.get("where") is not None and "y" in results:
            selected.assert_zero_elsewhere(results["y"], "y")


def _judge_group(results: Results, a: dict[str, Any], selected: Selected) -> None:
    x, mean_found, var_found = selected.of(a["x"]), results["mean"], results["var"]
    weights = a.get("weights")
    w = None if weights is None else selected.by_place(weights)
    if not x.size or (w is not None and not w.sum()):
        assert_zeros(results, mean=mean_found.shape, var=mean_found.shape)
        if "y" in results:
            assert not selected.of(results["y"]).astype(np.float64).any(), "y is not 0"
        return
    dtype, c, values = x.dtype, x.shape[1], wide(x, "NHWC")
    mean, var = formulas.moments(values) if w is None else weighed(values, w)
    eps = a.get("eps", 0.0)
    counted = values if w is None else values[:, w > 0]
    inside = domain(counted, mean, var, eps, dtype.itemsize)
    verify(
        [
            Judged(mean_found, mean, bound_mean(mean, var, eps), "mean"),
            Judged(var_found, var, bound_var(var), "var"),
        ],
        inside,
    )
    lost = ~np.isfinite(counted).all(1)
    assert not np.isfinite(mean_found[lost]).any(), "mean is finite where x is not"
    assert np.isnan(var_found[lost]).all(), "var is a number where x has NaN or infinity"
    if "y" not in results:
        return
    gamma, beta = (vector(a.get(n), i, c) for n, i in (("gamma", 1), ("beta", 0)))
    judge_y_by(results["y"], a, selected, mean, var, gamma, beta, inside)
    y = selected.of(results["y"]).astype(np.float64)
    assert np.isnan(y[:, lost]).all(), "y is a number in a channel with NaN or infinity"


def judge_y_by(
    y: Array,
    a: dict[str, Any],
    selected: Selected,
    mean: Wide,
    var: Wide,
    gamma: Wide,
    beta: Wide,
    inside: Array,
    extra: Any = 0,
) -> None:
    """y by statistics; where a sample weighs nothing x may be anything."""
    values, residual = wide(selected.of(a["x"]), "NHWC"), a.get("residual")
    bn = formulas.normalize(values, mean, var, gamma, beta, a["eps"])
    bound = bound_y(a["x"].dtype, bn, mean, var, gamma, beta, a["eps"]) + extra
    z = None if residual is None else selected.of(residual)
    judged = judge_y(selected.of(y), bn, bound, "NHWC", a.get("activation"), z)
    inside = inside & finite(a["x"].dtype, gamma, beta) & np.isfinite(values).all(1)
    if z is not None:
        inside = inside & np.isfinite(wide(z, "NHWC")).all(1)
    terms = np.abs(bn - beta[:, None]).max(1, initial=0)
    verify([judged], inside & (terms < largest(a["x"].dtype)))


def groups_of(n: int, k: int | None) -> list[slice]:
    if k is None:
        return [slice(0, n)]
    return [slice(start, min(start + k, n)) for start in range(0, n, k)]


def judge_fixed(results: Results, a: dict[str, Any]) -> None:
    """y by given statistics."""
    x, selected = a["x"], Selected(a["x"].shape, a["layout"], a.get("where"))
    assert_types(results, x, "y")
    selected.assert_zero_elsewhere(results["y"], "y")
    if not selected.count or not x.size:
        return
    c = x.shape[selected.axis]
    mean, var, gamma, beta = (
        vector(a.get(n), i, c) for n, i in (("mean", 0), ("var", 1), ("gamma", 1), ("beta", 0))
    )
    inside = domain(wide(selected.of(x), "NHWC"), mean, var, a["eps"], x.dtype.itemsize)
    judge_y_by(results["y"], a, selected, mean, var, gamma, beta, inside)


def judge_form(results: Results, a: dict[str, Any]) -> None:
    """y of another type than x, or in another layout: that of floats in their own, rounded."""
    x, y, layout = a["x"], results["y"], a["layout"]
    usual = np.dtype(np.float32) if x.dtype.kind in "iu" else x.dtype
    other = {n: v for n, v in a.items() if n not in ("dtype", "out_layout", "out")}
    other["x"] = x.astype(usual)
    if a.get("residual") is not None:
        other["residual"] = a["residual"].astype(usual)
    expected = fastbn.normalize(**other)
    axes = (channel_axis(x.ndim, word) for word in (layout, a["out_layout"] or layout))
    expected = np.moveaxis(expected, *axes)
    assert (y.shape, y.dtype) == (expected.shape, a["dtype"] or usual), f"y is {y.dtype} {y.shape}"
    assert_same_bits({"y": y}, {"y": expected.astype(y.dtype)})


def judge_gradients(results: Results, a: dict[str, Any], *, frozen: bool = False) -> None:
    """dx, dgamma, dbeta and dresidual."""
    dy, layout, k = a["dy"], a["layout"], a.get("virtual_batch")
    x = a["x"] if a.get("x") is not None else dy
    channels = x.shape[channel_axis(x.ndim, layout)]
    assert_types(results, x, "dx", "dresidual")
    assert_parameters(results, x, channels, a)
    sums: dict[str, list[tuple[Judged, Array]]] = {"dgamma": [], "dbeta": []}
    groups = groups_of(len(x), k)
    for i, group in enumerate(groups):
        selected = Selected(x.shape, layout, a.get("where"), group)
        of_group = a | {"x": x}
        for name in ("mean", "var"):
            of_group[name] = a[name].reshape(len(groups), channels)[i]
        for judged, inside in gradients_of(results, of_group, selected, frozen):
            if judged.what in sums:
                sums[judged.what].append((judged, inside))
            else:
                verify([judged], inside)
        if a.get("where") is not None:
            for name in ("dx", "dresidual"):
                if results.get(name) is not None:
                    selected.assert_zero_elsewhere(results[name], name)
    _judge_sums(results, a, sums)


def _judge_sums(
    results: Results, a: dict[str, Any], groups: dict[str, list[tuple[Judged, Array]]]
) -> None:
    """dgamma and dbeta, which are the sums over groups; or those that were given."""
    for i, (name, parts) in enumerate(groups.items()):
        found = results[name]
        if found is None:
            continue
        if a.get("sums") is not None:
            np.testing.assert_array_equal(found, a["sums"][i].astype(found.dtype))
        elif not parts:
            assert not found.any(), f"{name} is not 0"
        else:
            expected: Wide = np.sum([judged.expected for judged, _ in parts], 0)
            bound: Wide = np.sum([judged.bound for judged, _ in parts], 0)
            inside = np.logical_and.reduce([p[1] for p in parts])
            verify([Judged(found, expected, bound, name)], inside)


def gradients_of(
    results: Results, a: dict[str, Any], selected: Selected, frozen: bool
) -> list[tuple[Judged, Array]]:
    """What is judged of a group, and the channels for which there are promises."""
    weights, given = a.get("weights"), {n: selected.of(a[n]) for n in ("dy", "x")}
    c = given["x"].shape[1]
    w = None if weights is None else selected.by_place(weights)
    y = None if a.get("y") is None or a.get("activation") is None else selected.of(a["y"])
    nothing = w is not None and not w.sum() and a.get("sums") is None
    if not given["x"].size or nothing:
        for name in ("dx", "dresidual"):
            if results.get(name) is not None:
                assert not selected.of(results[name]).astype(np.float64).any(), f"{name} is not 0"
        return []
    dtype = a["x"].dtype
    zeros = np.zeros(c, expected_type(a["x"], a.get("gamma")))
    dx, dresidual = (None if results.get(n) is None else selected.of(results[n]) for n in _WIDE)
    found = fastbn.Gradients(dx, zeros, zeros)  # type: ignore[arg-type]
    if dresidual is not None:
        found = fastbn.ResidualGradients(dx, zeros, zeros, dresidual)  # type: ignore[arg-type,assignment]
    arguments = *given.values(), a["mean"], a["var"], a.get("gamma")
    told: dict[str, Any] = {"activation": a.get("activation"), "y": y, "eps": a["eps"]}
    judged = judge_backward(found, *arguments, layout="NHWC", frozen=frozen, **told)
    mean, var, gamma = (vector(a.get(n), 1, c) for n in ("mean", "var", "gamma"))
    d, x = (wide(given[n], "NHWC") for n in ("dy", "x"))
    inside = finite(dtype, gamma) & np.isfinite(d).all(1)
    if y is not None:
        d = formulas.gated(d, wide(y, "NHWC"), a["activation"])
    of_x = domain(x, mean, var, a["eps"], dtype.itemsize)
    if not (frozen and not a.get("params", True)):
        products = np.abs(d * (x - mean[:, None])).sum(1)
        inside &= of_x & (products < largest(np.float64))
    else:
        inside &= domain(np.zeros_like(d), mean, var, a["eps"], dtype.itemsize)
    if w is not None or a.get("sums") is not None:
        judged[0] = _dx_by_shares(judged[0], a, d, x, mean, var, gamma, w)
    return [(j, inside) for j in judged]


_WIDE = ("dx", "dresidual")


def _dx_by_shares(
    judged: Judged,
    a: dict[str, Any],
    d: Wide,
    x: Wide,
    mean: Wide,
    var: Wide,
    gamma: Wide,
    weights: Wide | None,
) -> Judged:
    """dx where places weigh, or the sums are those of a larger batch: each has its share of the
    sums, w / W, in the values and in the bound."""
    dtype, eps = a["x"].dtype, a["eps"]
    exact = formulas.backward(d, x, mean, var, gamma, eps, frozen=False)
    n = x.shape[1]
    sums: Any = (exact.dgamma, exact.dbeta)
    sizes: Any = (n * exact.mean_dy_xhat, n * exact.mean_dy)
    w = np.ones(n, np.longdouble) if weights is None else weights
    total = w.sum()
    if a.get("sums") is not None:
        sums = tuple(s.astype(np.longdouble) for s in a["sums"][:2])
        sizes, total = tuple(np.abs(s) for s in sums), np.longdouble(a["sums"][2])
    share = w / total
    rstd = formulas.rstd_of(var, eps)
    of_sums, of_sizes = (
        share * (s[1][:, None] + np.abs(exact.xhat) * s[0][:, None] * sign)
        for s, sign in ((sums, np.sign(exact.xhat)), (sizes, 1))
    )
    dx = (gamma * rstd)[:, None] * (d - of_sums)
    k = factor(dtype, mean, rstd)
    bound = (2 * k * np.abs(gamma) * rstd)[:, None] * (np.abs(d) + of_sizes)
    bound += subnormal_terms(dtype, exact.xhat)
    if a.get("activation") is not None:
        bound = bound_gated(dtype, d * (gamma * rstd)[:, None], bound)
    return Judged(judged.actual, dx, stored(dtype, dx, bound), "dx")


def judge_gradient_sums(results: Results, a: dict[str, Any]) -> None:
    """The sums of `gradient_sums`, which are not weighed, and the count, which is."""
    x, selected = a["x"], Selected(a["x"].shape, a["layout"], a.get("where"))
    c = x.shape[selected.axis]
    weights = a.get("weights")
    count = selected.count if weights is None else float(selected.by_place(weights).sum())
    count = count if c else 0
    assert abs(results["count"] - count) <= 1e-12 * count, f"count is {results['count']}"
    if not x.size or not selected.count:
        assert_zeros(results, dgamma=(c,), dbeta=(c,))
        return
    zeros = np.zeros(c)
    y = None if a.get("activation") is None else selected.of(a["y"])
    given = selected.of(a["dy"]), selected.of(x), a["mean"], a["var"]
    fake = fastbn.Gradients(given[0], zeros, zeros)
    told: dict[str, Any] = {"activation": a.get("activation"), "y": y, "eps": a["eps"]}
    one = np.ones(c)
    judged = judge_backward(fake, *given, one, layout="NHWC", frozen=True, **told)[1:]
    values, mean, var = wide(given[1], "NHWC"), vector(a["mean"], 0, c), vector(a["var"], 1, c)
    inside = domain(values, mean, var, a["eps"], x.dtype.itemsize)
    inside &= np.isfinite(wide(given[0], "NHWC")).all(1)
    verify([j._replace(actual=results[j.what]) for j in judged], inside)


def judge_samples(results: Results, a: dict[str, Any]) -> None:
    """Group, instance and layer norm, and their gradients."""
    x, layout, groups = a["x"], a["layout"], a["groups"]
    c = x.shape[channel_axis(x.ndim, layout)]
    assert_types(results, x, "y", "dx", "dresidual")
    if "dx" in results:
        assert_parameters(results, x, c, a)
    if not x.size:
        arrays = arrays_of(results)
        for array in arrays.values():
            assert not array.astype(np.float64).any(), "what is empty gave what is not 0"
        return
    values = by_sample(x, layout)
    told = {"eps": a["eps"], "layout": layout, "activation": a.get("activation")}
    beside = [a[n] for n in ("dy", "residual", "dsum") if a.get(n) is not None]
    found: Any
    if "y" in results:
        mean, var = formulas.sample_moments(values, groups)
        found = fastbn.BatchNormResult(*(results[n] for n in ("y", "mean", "var")))
        judged = sample_norms.judge_forward(
            found, groups, x, a.get("gamma"), a.get("beta"), residual=a.get("residual"), **told
        )
    else:
        mean, var = (a[n].astype(np.longdouble).reshape(-1, groups) for n in ("mean", "var"))
        zeros = np.zeros(c, expected_type(x, a.get("gamma")))
        dgamma, dbeta = (zeros if results[n] is None else results[n] for n in ("dgamma", "dbeta"))
        found = fastbn.Gradients(results["dx"], dgamma, dbeta)
        if results.get("dresidual") is not None:
            found = fastbn.ResidualGradients(results["dx"], dgamma, dbeta, results["dresidual"])
        y = a["y"] if a.get("activation") is not None else None
        judged = sample_norms.judge_backward(
            found,
            groups,
            *(a["dy"], x, a["mean"], a["var"], a.get("gamma")),
            y=y,
            dsum=a.get("dsum"),
            **told,
        )
    each_group = values.reshape(len(x) * groups, -1)
    inside = domain(each_group, mean.reshape(-1), var.reshape(-1), a["eps"], x.dtype.itemsize)
    for array in beside:
        inside &= np.isfinite(by_sample(array, layout).reshape(len(each_group), -1)).all(1)
    inside &= _fit(each_group, mean, var, a)
    inside = np.asarray(inside.reshape(len(x), groups))
    each = np.asarray(np.repeat(inside, c // groups, 1))
    ours: dict[str, Any] = {
        "mean": inside,
        "var": inside,
        "dgamma": each.all(0),
        "dbeta": each.all(0),
    }
    for one in judged:
        if results[one.what] is not None:
            verify([one], ours.get(one.what, each))


def _fit(x: Wide, mean: Wide, var: Wide, a: dict[str, Any]) -> Array:
    """Groups whose terms are numbers of the type."""
    rstd = formulas.rstd_of(var.reshape(-1), a["eps"])[:, None]
    xhat = (x - mean.reshape(-1)[:, None]) * rstd
    size, limit = np.abs(xhat).max(1), largest(a["x"].dtype)
    if "dy" in a:
        d = np.abs(by_sample(a["dy"], a["layout"])).reshape(len(x), -1)
        size = (d * np.maximum(np.abs(xhat), 1)).max(1) * np.maximum(rstd[:, 0], 1)
    gamma = a.get("gamma")
    most = 1.0 if gamma is None else float(np.abs(gamma).max(initial=0))
    return np.asarray(size * max(most, 1.0) < limit)


def judge_rows(results: Results, a: dict[str, Any], *, is_centred: bool) -> None:
    """Layer norm over the last axis, or RMS norm, or a gradient: of the rows that count as if they
    stood alone. x is what a gradient is told of, or a forward before the skip is added."""
    x, kept = a["x"], Selected(a["x"].shape, "NHWC", a.get("where")).kept
    assert_types(results, x, "y", "sum", "dx", "dresidual")
    if a.get("skip") is not None:
        a = a | {"x": x + a["skip"]}
        assert_same_bits({"sum": results["sum"]}, {"sum": a["x"]})
    for name, found in results.items():
        if name in ROW_STATISTICS:
            assert found.shape == x.shape[:-1], f"{name} has shape {found.shape}"
        if name == "dx" and a.get("dsum") is not None:
            assert_same_bits({name: found[~kept]}, {name: a["dsum"][~kept]})
        elif name in BY_ROW and found is not None:
            assert not found[~kept].astype(np.float64).any(), f"{name} is not 0 of other rows"

    def counted(some: dict[str, Any]) -> dict[str, Any]:
        arrays = {name: value for name, value in arrays_of(some).items() if name in BY_ROW}
        return some | {name: array[kept] for name, array in arrays.items()}

    results = {name: found for name, found in results.items() if name != "sum"}
    if is_centred:
        judge_samples(counted(results), counted(a) | {"groups": 1, "layout": "NHWC"})
    else:
        _judge_rms(counted(results), counted(a) | {"layout": "NHWC"})


ROW_STATISTICS = ("mean", "var", "mean_square")
BY_ROW = (*ROW_STATISTICS, "x", "y", "residual", "dy", "dx", "dresidual", "dsum")


def _judge_rms(results: Results, a: dict[str, Any]) -> None:
    """RMS norm of rows, (R, C)."""
    x, gamma, eps = a["x"], a.get("gamma"), a["eps"]
    if "dx" in results:
        assert_parameters(results, x, x.shape[1], a, "dgamma")
    if not x.size:
        assert_zeros(results, **{name: array.shape for name, array in arrays_of(results).items()})
        return
    values = x.astype(np.longdouble)
    if "y" in results:
        mean_square = np.square(values).mean(1)
        judged = rms_norms.judge_forward(results["y"], results["mean_square"], x, gamma, eps)
    else:
        mean_square = a["mean_square"].astype(np.longdouble)
        found, given = (results["dx"], results["dgamma"]), (a["dy"], x, a["mean_square"])
        judged = rms_norms.judge_backward(found, *given, gamma, eps, a.get("dsum"))
    inside = domain(values, 0 * mean_square, mean_square, eps, x.dtype.itemsize)
    inside &= ((values == 0) | ((np.abs(values) > 1e-150) & (np.abs(values) < 1e150))).all(1)
    for name in ("dy", "dsum"):
        if a.get(name) is not None:
            inside &= np.isfinite(a[name].astype(np.float64)).all(1)
    inside &= _fit(values, 0 * mean_square, mean_square, a)
    for one in judged:
        verify([one], np.full(x.shape[1], inside.all()) if one.what == "dgamma" else inside)


def judge_double_backward(results: Results, a: dict[str, Any], *, frozen: bool) -> None:
    """Second derivatives."""
    x, layout = a["x"], a["layout"]
    c, dtype = x.shape[channel_axis(x.ndim, layout)], x.dtype
    of_gamma = expected_type(x, a.get("gamma"))
    assert_types(results, x, "ddy", "dx")
    assert (results["dgamma"].shape, results["dgamma"].dtype) == ((c,), of_gamma)
    if not x.size:
        assert_zeros(results, ddy=x.shape, dx=x.shape, dgamma=(c,))
        return
    ddx = None if a.get("ddx") is None else wide(a["ddx"], layout)
    ddgamma, ddbeta = (None if a.get(n) is None else vector(a[n], 0, c) for n in _SECOND)
    dy, values = wide(a["dy"], layout), wide(x, layout)
    mean, var, gamma = (vector(a.get(n), 1, c) for n in ("mean", "var", "gamma"))
    p = DoubleBackwardProblem(ddx, ddgamma, ddbeta, dy, values, mean, var, gamma, a["eps"], frozen)
    exact, terms = formulas.double_backward(p), double_backward_terms(p)
    bounds = bound_double_backward(dtype, of_gamma, p)
    inside = domain(values, mean, var, a["eps"], dtype.itemsize) & finite(dtype, gamma)
    for array in (dy, ddx):
        inside &= True if array is None else np.isfinite(array).all(1)
    inside &= _numbers_are_normal(p)
    found = {"ddy": rows(results["ddy"], layout), "dx": rows(results["dx"], layout)}
    found["dgamma"] = results["dgamma"]
    for i, (name, actual) in enumerate(found.items()):
        sizes = terms[i].reshape(c, -1).max(1, initial=0)
        judged = Judged(actual, exact[i], bounds[i], "second " + name)
        # What stands between two passes is stored in the type itself.
        verify([judged], inside & (sizes < float(limits(actual.dtype).max) / 2))


_SECOND = ("ddgamma", "ddbeta")


def _numbers_are_normal(p: DoubleBackwardProblem) -> Array:
    """Whether what the arrays are multiplied by, gamma / s**2 times means, are normal float64."""
    v, a, _, g = (np.abs(column) for column in p.columns())
    s, xhat, dy = p.rstd, np.abs(p.xhat), np.abs(p.dy)
    numbers = [s, g * s, a * s]
    if not p.frozen:
        numbers += [
            g * s**2 * f.mean(1, keepdims=True) for f in (v, dy, v * xhat, dy * xhat, v * dy)
        ]
    fits = [(n == 0) | ((n > 1e20 * NORMAL) & (n < 1e-20 / NORMAL)) for n in numbers]
    return np.asarray(np.logical_and.reduce(fits)[:, 0])
