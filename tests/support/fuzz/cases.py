"""Random calls of the public functions.

1. A case is a call by keyword: arrays as they are placed, and options. Its results are arrays by
   name, and are held against what is right.
2. Nothing but what is to be written has changed, the bytes around and between values neither.
3. The same call with dense arrays, fresh results in place of `out`, gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import fastbn
from oracle import formulas
from oracle.arrays import LAYOUTS, by_sample, channel_axis, wide
from oracle.formulas import CURVES
from support import sample_norms
from support.bits import assert_same_bits
from support.fuzz.right import (
    Results,
    Selected,
    arrays_of,
    groups_of,
    judge_double_backward,
    judge_fixed,
    judge_form,
    judge_gradient_sums,
    judge_gradients,
    judge_normalized,
    judge_rows,
    judge_samples,
)
from support.memory import dense, dense_in_its_order
from support.random_arrays import (
    BRAIN,
    DOUBLE,
    HALF,
    PARAMETERS,
    SINGLE,
    Array,
    Placed,
    Source,
)

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
        plain = {n: _plain(n, a) for n, a in given.items()}
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


VECTORS = ("gamma", "beta", "mean", "var", "ddgamma", "ddbeta")
"""Of half types they are widened."""


def _plain(name: str, value: Any) -> Any:
    """An argument as what is right is told of."""
    if not isinstance(value, np.ndarray):
        return value
    widens = name in VECTORS and value.dtype.itemsize == 2
    return value.astype(np.float32) if widens else dense(value)


def _same_place(view: Array, memory: Array, own: Array) -> Array:
    """A view of other bytes where one lies in its own."""
    start = view.__array_interface__["data"][0] - own.__array_interface__["data"][0]
    return np.ndarray(view.shape, view.dtype, memory.data, start, view.strides)


class Drawn:
    """Arrays of one problem, as they come to be needed."""

    def __init__(
        self, s: Source, dtype: np.dtype[Any] | None = None, layout: str | None = None
    ) -> None:
        self.s, self.layout, self.dtype = s, layout or s.layout(), dtype or s.dtype()
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

    def x(self, *, masked: bool = True, written: bool = False) -> Array:
        """x, and perhaps the mask that goes with it; a place for each value where it is written."""
        values = self.s.batch(self.shape, self.layout, self.dtype)
        if masked and self.s.chance(0.25):
            self.put("where", self.s.mask(self.shape, self.layout))
        return self.put("x", self._hidden(values), written=written)

    def like_x(self, name: str, values: Array) -> Array:
        return self.put(name, self._hidden(values))

    def _hidden(self, values: Array) -> Array:
        """With NaN where nothing counts."""
        where = self.plain("where")
        if where is None or self.s.chance(0.3) or values.dtype.kind in "iu":
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

    def skip(self) -> None:
        if self.s.chance(0.4):
            self.like_x("skip", self.s.gradient(self.shape, self.dtype))

    def dsum(self) -> None:
        """Where it may be, of any row."""
        mine = self.arguments
        alone = mine.get("activation") is None and mine.get("dresidual", False) is False
        if alone and self.s.chance(0.5):
            self.put("dsum", self.s.gradient(self.shape, self.dtype))

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
                    mean[i], var[i] = formulas.moments(wide(some, "NHWC"))
        bad = ~(np.isfinite(mean) & (var >= 0))
        mean[bad], var[bad] = 0.0, 1.0
        if "virtual_batch" not in mine:
            mean, var = mean[0], var[0]
        for name, value in (("mean", mean), ("var", var)):
            dtype = s.choice(PARAMETERS)
            if exact or dtype.itemsize == 8 or not (abs(value) < 1e4).all():
                dtype = DOUBLE
            self.put(name, value.astype(dtype))

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
    d = Drawn(s, s.datum())
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


def normalize_data(s: Source) -> Case:
    """Integers, results of other types, and in the other layout."""
    d = Drawn(s, s.datum())
    mine, single = d.arguments, d.dtype == SINGLE or d.dtype.kind in "iu"
    moves = s.chance(0.5)
    x = d.x(masked=not moves)
    d.statistics(x, exact=False)
    d.vectors("gamma", "beta")
    d.options("eps", "activation")
    dtype = s.choice((SINGLE, HALF, BRAIN)) if single else d.dtype
    to = s.choice(LAYOUTS) if moves else d.layout
    mine["dtype"] = dtype if dtype != d.dtype or s.chance(0.3) else None
    if s.chance(0.3):
        mine["activation"] = s.choice(CURVES)
    mine["out_layout"] = to if moves else s.choice((None, d.layout))
    there = channel_axis(len(d.shape), to)
    shape = np.moveaxis(np.empty(d.shape, bool), d.axis, there).shape
    if to == d.layout and s.chance(0.35):
        d.put("residual", s.gradient(d.shape, dtype))
    if s.chance(0.4):
        d.put("out", np.full(shape, 77, dtype), written=True)
    return Case("normalize_data", lambda **a: {"y": fastbn.normalize(**a)}, mine, judge_form)


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
        lambda **a: named(fastbn.batch_norm_backward(**_with_sums(a))),
        d.arguments,
        lambda results, a: judge_gradients(results, _with_sums(a)),
    )


def _with_sums(a: dict[str, Any]) -> dict[str, Any]:
    """The arguments, those of sums as one."""
    if "count_of_sums" not in a:
        return a
    a = dict(a)
    names = ("dgamma_of_sums", "dbeta_of_sums", "count_of_sums")
    return a | {"sums": tuple(a.pop(name) for name in names)}


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
    d.put("dgamma_of_sums", dgamma)
    d.put("dbeta_of_sums", dbeta)
    d.arguments["count_of_sums"] = own * factor + (own == 0) + own * 1e-9


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


def norm_of(d: Drawn) -> tuple[sample_norms.Norm, int, tuple[int, ...]]:
    """Instance norm, layer norm, or groups of any divisor; how many groups, and the shape of
    mean and var."""
    kind = d.s.choice(("instance", "layer", "groups", "groups"))
    divisors = [n for n in range(1, d.channels + 1) if d.channels % n == 0] or [1, 3]
    n = {"instance": d.channels, "layer": 1, "groups": d.s.choice(divisors)}[kind]
    norm = sample_norms.Norm(n if kind == "groups" else kind)
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
            exact = formulas.sample_moments(by_sample(x, d.layout), groups)
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


def row_norm(s: Source) -> Case:
    """Layer norm over the last axis, or RMS norm."""
    d, is_centred = Drawn(s, layout="NHWC"), s.chance(0.5)
    d.x()
    if is_centred:
        d.vectors("gamma", "beta")
        d.options("eps", "activation")
        d.residual()
        d.arguments |= {"axes": "last", "layout": s.choice(LAYOUTS)}
    else:
        d.vectors("gamma")
        d.arguments["eps"] = s.eps()
    d.skip()
    d.out("x", "skip", "residual")
    verb: Any = fastbn.layer_norm if is_centred else fastbn.rms_norm
    return Case(
        f"{verb.__name__} of rows",
        lambda **a: named(verb(**a)),
        d.arguments,
        lambda results, a: judge_rows(results, a, is_centred=is_centred),
    )


def row_norm_backward(s: Source) -> Case:
    d, is_centred = Drawn(s, layout="NHWC"), s.chance(0.5)
    for name, a in row_statistics(d, d.x(), is_centred=is_centred).items():
        d.put(name, a)
    d.like_x("dy", s.gradient(d.shape, d.dtype))
    d.vectors("gamma")
    if is_centred:
        d.options("eps", "activation")
        d.gate()
        d.arguments |= {"axes": "last", "layout": s.choice(LAYOUTS)}
    else:
        d.arguments["eps"] = s.eps()
    d.dsum()
    if s.chance(0.2):
        d.arguments["params"] = False
    _apart(d, "dy", "x")
    verb: Any = fastbn.layer_norm_backward if is_centred else fastbn.rms_norm_backward
    return Case(
        f"{verb.__name__} of rows",
        lambda **a: named(verb(**a)),
        d.arguments,
        lambda results, a: judge_rows(results, a, is_centred=is_centred),
    )


def row_statistics(d: Drawn, x: Array, *, is_centred: bool) -> dict[str, Array]:
    """Those of the rows that count, as a forward would have given them."""
    kept = Selected(d.shape, "NHWC", d.plain("where"))
    found = np.zeros((2, *d.shape[:-1]))
    if x.size:
        with np.errstate(all="ignore"):
            mean, var = formulas.moments(x.reshape(-1, d.channels).astype(np.longdouble))
            found[0] = mean.reshape(d.shape[:-1])
            found[1] = (var if is_centred else var + mean**2).reshape(d.shape[:-1])
    bad = ~(np.isfinite(found).all(0) & (found[1] >= 0))
    found[0, bad], found[1, bad] = 0.0, 1.0
    found[:, ~kept.kept] = 0
    names = ("mean", "var") if is_centred else ("", "mean_square")
    return {name: a for name, a in zip(names, found, strict=True) if name}


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
        lambda results, a: judge_double_backward(results, a, frozen=frozen),
    )


VERBS: dict[Callable[[Source], Case], int] = {
    batch_norm: 20,
    batch_norm_backward: 20,
    normalize: 10,
    normalize_data: 8,
    normalize_backward: 10,
    moments: 6,
    gradient_sums: 6,
    sample_norm: 10,
    sample_norm_backward: 10,
    row_norm: 8,
    row_norm_backward: 8,
    double_backward: 8,
}
"""What is drawn, and how often."""
