"""Random calls of the public functions, and what is right about each.

1. A case is a call by keyword: arrays as they are placed, and options. Its results are arrays by
   name.
2. What is right follows from dense copies of the arguments, by the oracles in extended precision,
   within the bounds of docs/numerics.md; of channels inside the domain of those promises alone.
3. The same call with dense arrays, fresh results in place of `out`, gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import samples
from bits import assert_same_bits
from checks import Judged, assert_within, judge_backward, judge_y
from drawn import Array, Placed, Source
from memory import dense, dense_in_its_order

import fastbn
from benchmarks import oracle
from benchmarks.oracle import Wide, channel_axis, vector, wide

Results = dict[str, Any]
NORMAL = float(np.finfo(np.float64).smallest_normal)
FARTHEST = {2: 1e6, 4: 1e6, 8: 1e12}
"""Up to which |mean|/s there are promises, by the bytes of a value."""
PLACES = ("out", "dresidual", "into")
"""Arguments that are written."""


@dataclass
class Case:
    """A call, and what its results are to be held against."""

    name: str
    call: Callable[..., Results]
    arguments: dict[str, Any]
    judge: Callable[[Results, dict[str, Any]], None]
    """Of the results and the arguments as dense copies."""
    threads: int = 1
    errors: tuple[type[Exception], ...] = ()
    """Of which the call must raise one."""
    wrong: str = ""
    """The argument that must be refused."""

    def words(self) -> str:
        """The call, to be read."""
        lines = [f"{self.name}, {self.threads} threads"]
        if self.errors:
            lines[0] += f", to be refused: {self.wrong}"
        named: dict[int, str] = {}
        for name, value in self.arguments.items():
            words = value.words() if isinstance(value, Placed) else repr(value)
            if isinstance(value, Placed) and id(value.memory) in named:
                words = f"{named[id(value.memory)]} itself"
            elif isinstance(value, Placed):
                named[id(value.memory)] = name
            lines.append(f"    {name}: {words}")
        return "\n".join(lines)

    def placed(self) -> dict[str, Placed]:
        return {name: a for name, a in self.arguments.items() if isinstance(a, Placed)}

    def run(self) -> None:
        """Call, and compare."""
        placed = self.placed()
        before = {name: p.memory.copy() for name, p in placed.items()}
        given = {n: p.view if isinstance(p, Placed) else p for n, p in self.arguments.items()}
        if self.errors:
            self._is_refused(given)
            self._memory_is_as_it_was(placed, before, written=())
            return
        plain = {n: dense(a) if isinstance(a, np.ndarray) else a for n, a in given.items()}
        twins = {
            n: dense_in_its_order(a) if isinstance(a, np.ndarray) and n not in PLACES else a
            for n, a in given.items()
        }
        with fastbn.use_num_threads(self.threads):
            results = self.call(**given)
        self._are_where_they_should(results, given)
        self._memory_is_as_it_was(placed, before, written=PLACES)
        with np.errstate(all="ignore"):
            self.judge(results, plain)
        if any(p.words() != f"{p.view.dtype.name} {p.view.shape}" for p in placed.values()) or (
            "out" in placed
        ):
            for name in ("out", "into"):
                twins.pop(name, None)
            if isinstance(twins.get("dresidual"), np.ndarray):
                twins["dresidual"] = True
            with fastbn.use_num_threads(1):
                expected = self.call(**twins)
            try:
                assert_same_bits(arrays_of(results), arrays_of(expected))
            except AssertionError as error:
                raise AssertionError(f"not the bits of dense arrays: {error}") from None

    def _are_where_they_should(self, results: Results, given: dict[str, Any]) -> None:
        """What was given to be written is what came back."""
        main = "y" if "y" in results else "dx"
        for name, result in (("out", main), ("dresidual", "dresidual"), ("into", "dx")):
            if isinstance(given.get(name), np.ndarray):
                assert results[result] is given[name], f"{result} is not {name}"

    def _is_refused(self, given: dict[str, Any]) -> None:
        try:
            self.call(**given)
        except self.errors:
            return
        raise AssertionError(f"{self.wrong} was not refused")

    def _memory_is_as_it_was(
        self, placed: dict[str, Placed], before: dict[str, Array], written: tuple[str, ...]
    ) -> None:
        """All bytes, but for the values of arrays that are written."""
        targets = {id(placed[name].memory) for name in written if name in placed}
        for name, (view, memory) in placed.items():
            now = memory
            if id(memory) in targets:
                now = memory.copy()
                _same_place(view, now, memory)[...] = _same_place(view, before[name], memory)
            where = np.flatnonzero(now != before[name])
            assert not where.size, f"bytes {where[:9]} of {name}'s memory were written"


def _same_place(view: Array, memory: Array, own: Array) -> Array:
    """A view of other bytes where one lies in its own."""
    start = view.__array_interface__["data"][0] - own.__array_interface__["data"][0]
    return np.ndarray(view.shape, view.dtype, memory.data, start, view.strides)


def arrays_of(results: Results) -> dict[str, Array]:
    return {name: a for name, a in results.items() if isinstance(a, np.ndarray)}


# --- what is right ------------------------------------------------------------------------------


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
    inside &= np.abs(mean) * oracle.rstd_of(var, eps) <= FARTHEST[itemsize]
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
        terms = bound / (4 * oracle.unit(actual.dtype)) if what == "dx" else 0
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


def assert_parameters(results: Results, x: Array, channels: int, a: dict[str, Any]) -> None:
    """dgamma and dbeta are there where they are wanted, of a shape and type."""
    wanted = a.get("wanted", ("dgamma", "dbeta") if a.get("params", True) else ())
    of_gamma = expected_type(x, a.get("gamma"))
    for name in ("dgamma", "dbeta"):
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
    mean, var = oracle.moments(values) if w is None else weighed(values, w)
    eps = a.get("eps", 0.0)
    counted = values if w is None else values[:, w > 0]
    inside = domain(counted, mean, var, eps, dtype.itemsize)
    verify(
        [
            Judged(mean_found, mean, oracle.bound_mean(mean, var, eps), "mean"),
            Judged(var_found, var, oracle.bound_var(var), "var"),
        ],
        inside,
    )
    unknown = np.isnan(counted).any(1)
    assert np.isnan(mean_found[unknown]).all(), "mean is a number where x has NaN"
    if "y" not in results:
        return
    gamma, beta = (vector(a.get(n), i, c) for n, i in (("gamma", 1), ("beta", 0)))
    judge_y_by(results["y"], a, selected, mean, var, gamma, beta, inside)
    y = selected.of(results["y"]).astype(np.float64)
    assert np.isnan(y[:, unknown]).all(), "y is a number in a channel with NaN"


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
    bn = oracle.normalize(values, mean, var, gamma, beta, a["eps"])
    bound = oracle.bound_y(a["x"].dtype, bn, mean, var, gamma, beta, a["eps"]) + extra
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
    if not given["x"].size or (w is not None and not w.sum()):
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
        d = oracle.gated(d, wide(y, "NHWC"), a["activation"])
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
    exact = oracle.backward(d, x, mean, var, gamma, eps, frozen=False)
    n = x.shape[1]
    sums: Any = (exact.dgamma, exact.dbeta)
    sizes: Any = (n * exact.mean_dy_xhat, n * exact.mean_dy)
    w = np.ones(n, np.longdouble) if weights is None else weights
    total = w.sum()
    if a.get("sums") is not None:
        sums = tuple(s.astype(np.longdouble) for s in a["sums"][:2])
        sizes, total = tuple(np.abs(s) for s in sums), np.longdouble(a["sums"][2])
    share = w / total
    rstd = oracle.rstd_of(var, eps)
    of_sums, of_sizes = (
        share * (s[1][:, None] + np.abs(exact.xhat) * s[0][:, None] * sign)
        for s, sign in ((sums, np.sign(exact.xhat)), (sizes, 1))
    )
    dx = (gamma * rstd)[:, None] * (d - of_sums)
    k = oracle.factor(dtype, mean, rstd)
    bound = (2 * k * np.abs(gamma) * rstd)[:, None] * (np.abs(d) + of_sizes)
    subnormal = float(oracle.limits(np.promote_types(dtype, np.float32)).smallest_subnormal)
    bound += np.longdouble(subnormal) * (1 + np.abs(exact.xhat) / 2)
    if a.get("activation") is not None:
        bound = oracle.bound_gated(dtype, d * (gamma * rstd)[:, None], bound)
    return Judged(judged.actual, dx, oracle.stored(dtype, dx, bound), "dx")


def judge_gradient_sums(results: Results, a: dict[str, Any]) -> None:
    """The sums of `gradient_sums`, which are not weighed, and the count, which is."""
    x, selected = a["x"], Selected(a["x"].shape, a["layout"], a.get("where"))
    c = x.shape[selected.axis]
    weights = a.get("weights")
    count = selected.count if weights is None else float(selected.by_place(weights).sum())
    count = count if c else 0
    assert abs(results["count"] - count) <= 1e-12 * count, f"count is {results['count']}"
    if not x.size or not count:
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
    values = oracle.by_sample(x, layout)
    told = {"eps": a["eps"], "layout": layout, "activation": a.get("activation")}
    beside = a.get("dy", a.get("residual"))
    found: Any
    if "y" in results:
        mean, var = oracle.sample_moments(values, groups)
        found = fastbn.BatchNormResult(*(results[n] for n in ("y", "mean", "var")))
        judged = samples.judge_forward(
            found, groups, x, a.get("gamma"), a.get("beta"), residual=beside, **told
        )
    else:
        mean, var = (a[n].astype(np.longdouble).reshape(-1, groups) for n in ("mean", "var"))
        zeros = np.zeros(c, expected_type(x, a.get("gamma")))
        dgamma, dbeta = (zeros if results[n] is None else results[n] for n in ("dgamma", "dbeta"))
        found = fastbn.Gradients(results["dx"], dgamma, dbeta)
        if results.get("dresidual") is not None:
            found = fastbn.ResidualGradients(results["dx"], dgamma, dbeta, results["dresidual"])
        y = a["y"] if a.get("activation") is not None else None
        judged = samples.judge_backward(
            found, groups, a["dy"], x, a["mean"], a["var"], a.get("gamma"), y=y, **told
        )
    rows = values.reshape(len(x) * groups, -1)
    inside = domain(rows, mean.reshape(-1), var.reshape(-1), a["eps"], x.dtype.itemsize)
    if beside is not None:
        inside &= np.isfinite(oracle.by_sample(beside, layout).reshape(len(rows), -1)).all(1)
    inside &= _fit(rows, mean, var, a)
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
    rstd = oracle.rstd_of(var.reshape(-1), a["eps"])[:, None]
    xhat = (x - mean.reshape(-1)[:, None]) * rstd
    size, limit = np.abs(xhat).max(1), largest(a["x"].dtype)
    if "dy" in a:
        d = np.abs(oracle.by_sample(a["dy"], a["layout"])).reshape(len(x), -1)
        size = (d * np.maximum(np.abs(xhat), 1)).max(1) * np.maximum(rstd[:, 0], 1)
    gamma = a.get("gamma")
    most = 1.0 if gamma is None else float(np.abs(gamma).max(initial=0))
    return np.asarray(size * max(most, 1.0) < limit)


def judge_second(results: Results, a: dict[str, Any], *, frozen: bool) -> None:
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
    p = oracle.SecondProblem(ddx, ddgamma, ddbeta, dy, values, mean, var, gamma, a["eps"], frozen)
    exact, bounds, terms = (
        oracle.second(p),
        oracle.bound_second(dtype, of_gamma, p),
        (oracle.terms_of_second(p)),
    )
    inside = domain(values, mean, var, a["eps"], dtype.itemsize) & finite(dtype, gamma)
    for array in (dy, ddx):
        inside &= True if array is None else np.isfinite(array).all(1)
    inside &= _numbers_are_normal(p)
    found = {"ddy": oracle.rows(results["ddy"], layout), "dx": oracle.rows(results["dx"], layout)}
    found["dgamma"] = results["dgamma"]
    for i, (name, actual) in enumerate(found.items()):
        sizes = terms[i].reshape(c, -1).max(1, initial=0)
        judged = Judged(actual, exact[i], bounds[i], "second " + name)
        verify([judged], inside & (sizes < largest(dtype)))


_SECOND = ("ddgamma", "ddbeta")


def _numbers_are_normal(p: oracle.SecondProblem) -> Array:
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


# --- what is drawn ------------------------------------------------------------------------------


class Drawn:
    """Arrays of one problem, as they come to be needed."""

    def __init__(self, s: Source) -> None:
        self.s, self.layout, self.dtype = s, s.layout(), s.dtype()
        self.shape = s.shape(self.layout)
        self.axis = channel_axis(len(self.shape), self.layout)
        self.channels = self.shape[self.axis]
        self.arguments: dict[str, Any] = {}

    def put(self, name: str, values: Array, *, written: bool = False) -> Array:
        """An argument, as a dense copy of what it became."""
        self.arguments[name] = placed = self.s.place(values, written=written)
        return dense(placed.view)

    def plain(self, name: str) -> Array | None:
        """A dense copy of an argument."""
        placed = self.arguments.get(name)
        return None if placed is None else dense(placed.view)

    def x(self, *, masked: bool = True) -> Array:
        """x, and perhaps the mask that goes with it."""
        values = self.s.batch(self.shape, self.layout, self.dtype)
        if masked and self.s.chance(0.25):
            self.put("where", self.s.mask(self.shape, self.layout))
        return self.put("x", self._hidden(values))

    def like_x(self, name: str, values: Array) -> Array:
        return self.put(name, self._hidden(values))

    def _hidden(self, values: Array) -> Array:
        """With NaN where nothing counts."""
        where = self.plain("where")
        if where is None or self.s.chance(0.3):
            return values
        full = (*self.shape[: self.axis], 1, *self.shape[self.axis + 1 :])
        kept = np.broadcast_to(where, full)
        return np.where(kept, values, self.dtype.type(np.nan))

    def vectors(self, *names: str) -> None:
        for name in names:
            if self.s.chance(0.7):
                self.put(name, self.s.vector(self.channels))

    def weights(self) -> None:
        if self.s.chance(0.25):
            self.put("weights", self.s.weights(self.shape[0]))

    def virtual(self) -> None:
        """Groups of samples, where nothing speaks against them."""
        mine = self.arguments
        if not {"where", "weights"} & mine.keys() and self.s.chance(0.2):
            mine["virtual_batch"] = self.s.choice((1, 2, 3, 5, 16, 100))

    def options(self, *names: str) -> None:
        made = {"eps": self.s.eps, "activation": self.s.activation}
        self.arguments["layout"] = self.layout
        for name in names:
            self.arguments[name] = made[name]()

    def residual(self) -> None:
        if self.s.chance(0.35):
            self.like_x("residual", self.s.gradient(self.shape, self.dtype))

    def out(self, *in_place: str) -> None:
        """Fresh, of its own, or one of the arguments."""
        kind = self.s.random.random()
        usable = [n for n in in_place if n in self.arguments and self.is_writeable(n)]
        if kind < 0.2 and usable:
            self.arguments["out"] = self.arguments[self.s.choice(usable)]
        elif kind < 0.6:
            self.put("out", np.full(self.shape, 77, self.dtype), written=True)

    def is_writeable(self, name: str) -> bool:
        a = self.arguments[name].view
        apart = all(t != 0 or n == 1 for n, t in zip(a.shape, a.strides, strict=True))
        return bool(a.flags.writeable and a.dtype.isnative and apart)

    def statistics(self, x: Array, *, exact: bool) -> None:
        """mean and var: mostly x's own, as a forward would have given them."""
        mine, s = self.arguments, self.s
        groups = groups_of(len(x), mine.get("virtual_batch"))
        mean, var = np.empty((2, len(groups), self.channels))
        own = s.chance(0.8)
        for i, group in enumerate(groups):
            some = Selected(self.shape, self.layout, self.plain("where"), group).of(x)
            mean[i], var[i] = s.values.normal(size=self.channels), s.values.random(self.channels)
            if own and some.size:
                with np.errstate(all="ignore"):
                    mean[i], var[i] = oracle.moments(wide(some, "NHWC"))
        bad = ~(np.isfinite(mean) & (var >= 0))
        mean[bad], var[bad] = 0.0, 1.0
        if "virtual_batch" not in mine:
            mean, var = mean[0], var[0]
        for name, value in (("mean", mean), ("var", var)):
            single = not exact and s.chance(0.4) and (abs(value) < 1e30).all()
            self.put(name, value.astype(np.float32) if single else value)

    def gate(self) -> None:
        """The forward's y where there is an activation, and where the residual's gradient goes."""
        mine, s = self.arguments, self.s
        if mine["activation"] is not None:
            self.like_x("y", s.activated(self.shape, self.dtype))
        kind = s.random.random()
        if kind < 0.15:
            mine["dresidual"] = True
        elif kind < 0.3:
            self.put("dresidual", np.full(self.shape, 77, self.dtype), written=True)
        elif kind < 0.35 and self.is_writeable("dy"):
            mine["dresidual"] = mine["dy"]


def named(result: Any) -> Results:
    return dict(result._asdict())


def batch_norm(s: Source) -> Case:
    d = Drawn(s)
    d.x()
    d.vectors("gamma", "beta")
    d.weights()
    d.virtual()
    d.options("eps", "activation")
    d.residual()
    d.out("x", "residual")
    return Case(
        "batch_norm", lambda **a: named(fastbn.batch_norm(**a)), d.arguments, judge_normalized
    )


def moments(s: Source) -> Case:
    d = Drawn(s)
    d.x()
    d.weights()
    d.virtual()
    d.options()
    return Case("moments", lambda **a: named(fastbn.moments(**a)), d.arguments, judge_normalized)


def normalize(s: Source) -> Case:
    d = Drawn(s)
    x = d.x()
    d.statistics(x, exact=False)
    d.vectors("gamma", "beta")
    d.options("eps", "activation")
    d.residual()
    d.out("x", "residual")
    return Case("normalize", lambda **a: {"y": fastbn.normalize(**a)}, d.arguments, judge_fixed)


def batch_norm_backward(s: Source) -> Case:
    d = Drawn(s)
    x = d.x()
    d.weights()
    d.virtual()
    d.statistics(x, exact=True)
    d.like_x("dy", s.gradient(d.shape, d.dtype))
    d.vectors("gamma")
    d.options("eps", "activation")
    d.gate()
    _sums(d)
    if s.chance(0.2):
        d.arguments["params"] = False
    _apart(d, "dy", "x")
    return Case(
        "batch_norm_backward",
        lambda **a: named(fastbn.batch_norm_backward(**a)),
        d.arguments,
        judge_gradients,
    )


def _sums(d: Drawn) -> None:
    """Those of a larger batch."""
    if "virtual_batch" in d.arguments or not d.s.chance(0.15):
        return
    selected = Selected(d.shape, d.layout, d.plain("where"))
    weights = d.plain("weights")
    own = selected.count if weights is None else float(selected.by_place(weights).sum())
    if 0 < own < 1e-200 or own > 1e200:
        return
    factor = d.s.choice((1, 2, 10))
    dgamma, dbeta = d.s.values.normal(0, max(own, 1e-30) * factor, (2, d.channels))
    d.arguments["sums"] = (dgamma, dbeta, own * factor + (own * factor == 0) + own * 1e-9)


def _apart(d: Drawn, *in_place: str) -> None:
    """`out`, which may not be dresidual's place too."""
    taken = d.arguments.get("dresidual")
    d.out(*(n for n in in_place if d.arguments.get(n) is not taken))


def normalize_backward(s: Source) -> Case:
    d = Drawn(s)
    x = d.x()
    d.statistics(x, exact=False)
    d.like_x("dy", s.gradient(d.shape, d.dtype))
    d.vectors("gamma")
    d.options("eps", "activation")
    d.gate()
    if s.chance(0.3):
        d.arguments["params"] = False
        if s.chance(0.7):
            d.arguments["x"] = None
    _apart(d, *(("dy",) if d.arguments["x"] is None else ("dy", "x")))
    return Case(
        "normalize_backward",
        lambda **a: named(fastbn.normalize_backward(**a)),
        d.arguments,
        lambda results, a: judge_gradients(results, a, frozen=True),
    )


def gradient_sums(s: Source) -> Case:
    d = Drawn(s)
    x = d.x()
    d.weights()
    d.statistics(x, exact=True)
    d.like_x("dy", s.gradient(d.shape, d.dtype))
    d.options("eps", "activation")
    if d.arguments["activation"] is not None:
        d.like_x("y", s.activated(d.shape, d.dtype))
    return Case(
        "gradient_sums",
        lambda **a: named(fastbn.gradient_sums(**a)),
        d.arguments,
        judge_gradient_sums,
    )


def norm_of(d: Drawn) -> tuple[samples.Norm, int, tuple[int, ...]]:
    """Instance norm, layer norm, or groups of any divisor; how many groups, and the shape of
    mean and var."""
    kind = d.s.choice(("instance", "layer", "groups", "groups"))
    divisors = [n for n in range(1, d.channels + 1) if d.channels % n == 0] or [1, 3]
    n = {"instance": d.channels, "layer": 1, "groups": d.s.choice(divisors)}[kind]
    norm = samples.Norm(n if kind == "groups" else kind)
    return norm, n, (d.shape[0],) if kind == "layer" else (d.shape[0], n)


def sample_norm(s: Source) -> Case:
    d = Drawn(s)
    norm, groups, shape = norm_of(d)
    d.x(masked=False)
    d.vectors("gamma", "beta")
    d.options("eps", "activation")
    d.residual()
    d.out("x", "residual")

    def judge(results: Results, a: dict[str, Any]) -> None:
        assert results["mean"].shape == results["var"].shape == shape
        judge_samples(results, a | {"groups": groups})

    return Case(f"{norm}", lambda **a: named(norm.forward(**a)), d.arguments, judge)


def sample_norm_backward(s: Source) -> Case:
    d = Drawn(s)
    norm, groups, shape = norm_of(d)
    x = d.x(masked=False)
    mean, var = np.zeros((2, len(x), groups))
    if x.size:
        with np.errstate(all="ignore"):
            exact = oracle.sample_moments(oracle.by_sample(x, d.layout), groups)
        mean[...], var[...] = exact
        bad = ~(np.isfinite(mean) & (var >= 0))
        mean[bad], var[bad] = 0.0, 1.0
    d.put("mean", mean.reshape(shape))
    d.put("var", var.reshape(shape))
    d.like_x("dy", s.gradient(d.shape, d.dtype))
    d.vectors("gamma")
    d.options("eps", "activation")
    d.gate()
    if s.chance(0.2):
        d.arguments["params"] = False
    _apart(d, "dy", "x")

    def judge(results: Results, a: dict[str, Any]) -> None:
        judge_samples(results, a | {"groups": groups})

    return Case(f"{norm} backward", lambda **a: named(norm.backward(**a)), d.arguments, judge)


def double_backward(s: Source) -> Case:
    d = Drawn(s)
    frozen = s.chance(0.4)
    x = d.x(masked=False)
    d.statistics(x, exact=not frozen)
    d.like_x("dy", s.gradient(d.shape, d.dtype))
    chosen = s.random.randrange(1, 8)
    for i, name in enumerate(("ddx", "ddgamma", "ddbeta")):
        d.arguments[name] = None
        if chosen >> i & 1:
            made = s.gradient(d.shape, d.dtype) if i == 0 else s.vector(d.channels)
            d.put(name, made)
    d.vectors("gamma")
    d.options("eps")
    verb = fastbn.normalize_double_backward if frozen else fastbn.batch_norm_double_backward
    return Case(
        verb.__name__,
        lambda **a: named(verb(**a)),
        d.arguments,
        lambda results, a: judge_second(results, a, frozen=frozen),
    )


VERBS: dict[Callable[[Source], Case], int] = {
    batch_norm: 20,
    batch_norm_backward: 20,
    normalize: 10,
    normalize_backward: 10,
    moments: 6,
    gradient_sums: 6,
    sample_norm: 10,
    sample_norm_backward: 10,
    double_backward: 8,
}
"""What is drawn, and how often."""
