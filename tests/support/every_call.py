"""Every public function that takes arrays, called in each way that is a way of its own.

What a call is given is drawn for a shape; each of its arrays lies where the caller places it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastbn
from oracle.arrays import channel_axis
from oracle.formulas import CURVES

Array = NDArray[Any]
Place = Callable[[Array], Array]


class Given:
    """All that calls take, for a shape; an attribute is placed anew each time."""

    def __init__(
        self,
        shape: tuple[int, ...],
        layout: str,
        dtype: Any,
        place: Place = np.array,
        seed: int = 0,
    ) -> None:
        rng, axis = np.random.default_rng(seed), channel_axis(len(shape), layout)
        self.shape, self.layout, self.channels = shape, layout, shape[axis]
        self.single = (*shape[:axis], 1, *shape[axis + 1 :])
        self.place = place
        divisors = (n for n in range(2, self.channels) if self.channels % n == 0)
        self.groups = next(divisors, 1)
        x, dy, residual, y, ddx = rng.normal(1, 2, (5, *shape)).astype(dtype)
        self.made: dict[str, Array] = {"x": x, "dy": dy, "residual": residual, "y": y, "ddx": ddx}
        self.made["integers"] = rng.integers(0, 256, shape, np.uint8)
        vectors = rng.normal(size=(4, self.channels))
        self.made |= dict(zip(("gamma", "beta", "ddgamma", "ddbeta"), vectors, strict=True))
        self.made["where"] = rng.random(self.single) < 0.8
        self.made["weights"] = rng.uniform(0.5, 1.5, len(x))
        for name in ("where", "weights"):
            self.made[name].flat[-1:] = 1

    def __getattr__(self, name: str) -> Array:
        if name in ("out", "dresidual"):
            return self.place(np.full_like(self.made["x"], 77))
        return self.place(self.made[name])

    @property
    def other_shape(self) -> tuple[int, ...]:
        """x's in the other layout."""
        axis = channel_axis(len(self.shape), self.layout)
        rest = self.shape[:axis] + self.shape[axis + 1 :]
        there = len(self.shape) - axis  # from 1 to the last, and back
        return (*rest[:there], self.channels, *rest[there:])

    def statistics(self, *shape: int) -> dict[str, Array]:
        """mean and var of some shape; (C,) without."""
        rng = np.random.default_rng(1)
        shape = shape or (self.channels,)
        return {
            "mean": self.place(rng.normal(size=shape)),
            "var": self.place(rng.exponential(size=shape)),
        }

    def sums(self) -> tuple[Array, Array, float]:
        dgamma, dbeta = np.random.default_rng(2).normal(size=(2, self.channels))
        return self.place(dgamma), self.place(dbeta), 10.0 * max(int(np.prod(self.single)), 1)


Arguments = dict[str, Any]
Way = Callable[[Given], Arguments]
"""Some arguments of a call, by name; later ones stand in place of earlier."""
Call = Callable[[Given], Any]
ALL: dict[str, dict[str, Call]] = {}
"""Ways to call, by the public name that is called."""


def _put(name: str, how: str, *ways: Way) -> None:
    """A call of a public function by the arguments of some ways."""
    of = getattr(fastbn, name)

    def call(g: Given) -> Any:
        arguments: Arguments = {}
        for way in ways:
            arguments |= way(g)
        return of(**arguments)

    ALL.setdefault(name, {})[how] = call


def _of(*names: str) -> Way:
    """Attributes of what is given, as the arguments of the same names."""
    return lambda g: {name: getattr(g, name) for name in names}


def _statistics(g: Given) -> Arguments:
    return g.statistics()


def _relu(g: Given) -> Arguments:
    return {"activation": "relu"}


def _gated(g: Given) -> Arguments:
    return {"activation": "relu", "y": g.y, "dresidual": g.dresidual}


def _virtual(g: Given) -> Arguments:
    return {"virtual_batch": 2}


def _virtual_statistics(g: Given) -> Arguments:
    return g.statistics(-(-g.shape[0] // 2), g.channels)


def _nothing(g: Given) -> Arguments:
    return {}


X, BACK = _of("x", "layout"), _of("dy", "x", "gamma", "layout")
AFFINE = _of("gamma", "beta")
SELECTIONS = {
    "where": _of("where"),
    "weights": _of("weights"),
    "where and weights": _of("where", "weights"),
}


def _put_forwards() -> None:
    """batch_norm, normalize and moments."""
    fused = _of("residual", "out")
    for how, ways in {
        "plain": (_nothing,),
        "out": (_of("out"),),
        "fused": (fused, _relu),
        "where": (_of("where"),),
        "fused, where": (fused, _relu, _of("where")),
    }.items():
        _put("batch_norm", how, X, AFFINE, *ways)
        _put("normalize", how, X, _statistics, AFFINE, *ways)
    for curve in CURVES:
        along: Way = lambda g, curve=curve: {"activation": curve}  # type: ignore[misc] # noqa: E731
        _put("normalize", curve, X, _statistics, along)
        _put("normalize", f"{curve}, fused, where", X, _statistics, along, fused, _of("where"))
    for how, way in (SELECTIONS | {"plain": _nothing, "virtual batches": _virtual}).items():
        _put("batch_norm", f"no parameters, {how}", X, way)
        _put("moments", how, X, way)


def _put_data() -> None:
    """Integers, and y of another type or in the other layout."""

    def integers(g: Given) -> Arguments:
        return {"x": g.integers, "layout": g.layout}

    def other(g: Given) -> Arguments:
        return {"out_layout": "NHWC" if g.layout == "NCHW" else "NCHW"}

    half: Way = lambda g: {"dtype": np.float16}  # noqa: E731
    for how, ways in {
        "integers": (integers,),
        "integers, where": (integers, _of("where")),
        "integers to halves": (integers, _relu, half),
        "integers to the other layout": (integers, other),
        "to the other layout": (X, other),
    }.items():
        _put("normalize", how, X, _statistics, AFFINE, *ways)
    for how, way in (SELECTIONS | {"plain": _nothing, "virtual batches": _virtual}).items():
        _put("moments", f"integers, {how}", integers, way)


def _put_backwards() -> None:
    """batch_norm_backward, normalize_backward and gradient_sums."""
    ways: dict[str, tuple[Way, ...]] = {
        "plain": (_nothing,),
        "gated": (_gated,),
        "where": (_of("where", "out"),),
        "gated, where": (_gated, _of("where", "out")),
    }
    for how, some in ways.items():
        _put("batch_norm_backward", how, BACK, _statistics, *some)
        _put("normalize_backward", how, BACK, _statistics, *some)
    for how, some in {
        "weights": (SELECTIONS["weights"],),
        "where and weights": (SELECTIONS["where and weights"],),
        "sums": (lambda g: {"sums": g.sums()},),
        "virtual batches": (_virtual, _virtual_statistics),
    }.items():
        _put("batch_norm_backward", how, BACK, _statistics, *some)
    alone: Way = lambda g: {"x": None, "params": False}  # noqa: E731
    _put("normalize_backward", "without x", BACK, _statistics, alone)
    pair = _of("dy", "x", "layout")
    for how, way in (SELECTIONS | {"plain": _nothing}).items():
        _put("gradient_sums", how, pair, _statistics, way)
    _put("gradient_sums", "gated", pair, _statistics, _of("y"), _relu)


def _put_group_norms() -> None:
    """Group, instance and layer norm, and their gradients."""

    def by_group(g: Given) -> Arguments:
        return g.statistics(g.shape[0], g.groups)

    def by_channel(g: Given) -> Arguments:
        return g.statistics(g.shape[0], g.channels)

    def by_sample(g: Given) -> Arguments:
        return g.statistics(g.shape[0])

    kinds = (
        ("group", by_group, _of("groups")),
        ("instance", by_channel, _nothing),
        ("layer", by_sample, _nothing),
    )
    for kind, statistics, groups in kinds:
        forward, backward = f"{kind}_norm", f"{kind}_norm_backward"
        _put(forward, "plain", X, AFFINE, groups)
        _put(forward, "fused", X, AFFINE, groups, _of("residual", "out"), _relu)
        _put(backward, "plain", BACK, statistics, groups)
        _put(backward, "gated", BACK, statistics, groups, _gated, _of("out"))
        _put(forward, "where", X, AFFINE, groups, _of("residual", "out", "where"), _relu)
        _put(backward, "where", BACK, statistics, groups, _gated, _of("where"))


def _put_row_norms() -> None:
    """Layer norm over the last axis, RMS norm, and their gradients."""

    def gamma(g: Given) -> Arguments:
        return {"gamma": g.gamma} if g.shape[-1] == g.channels else {}

    def where(g: Given) -> Arguments:
        return {"where": g.place(np.random.default_rng(4).random((*g.shape[:-1], 1)) < 0.8)}

    def statistics(g: Given) -> Arguments:
        return g.statistics(*g.shape[:-1])

    def mean_square(g: Given) -> Arguments:
        return {"mean_square": statistics(g)["var"]}

    last: Way = lambda g: {"axes": "last", "layout": "NHWC"}  # noqa: E731
    skip: Way = lambda g: {"skip": g.residual}  # noqa: E731
    dsum: Way = lambda g: {"dsum": g.residual}  # noqa: E731
    x, back, out = _of("x"), _of("dy", "x"), _of("out")
    for how, some in {
        "of rows": (_nothing,),
        "of rows, skip": (skip, out),
        "of rows, where": (skip, where),
    }.items():
        _put("rms_norm", how, x, gamma, *some)
        _put("layer_norm", how, x, gamma, last, *some)
    _put("layer_norm", "of rows, fused", x, gamma, last, _of("residual"), _relu)
    for how, some in {
        "of rows": (_nothing,),
        "of rows, dsum": (dsum, out),
        "of rows, where": (dsum, where),
    }.items():
        _put("rms_norm_backward", how, back, mean_square, gamma, *some)
        _put("layer_norm_backward", how, back, statistics, gamma, last, *some)
    _put("layer_norm_backward", "of rows, gated", back, statistics, gamma, last, where, _gated)


def _put_double_backward() -> None:
    """Both double backward functions."""
    none: Way = lambda g: dict.fromkeys(("ddx", "ddgamma", "ddbeta"))  # noqa: E731
    for name in ("batch_norm_double_backward", "normalize_double_backward"):
        _put(name, "all", BACK, _statistics, _of("ddx", "ddgamma", "ddbeta"))
        _put(name, "of ddgamma", BACK, _statistics, none, _of("ddgamma"))


def _both_ways(layer: Any, g: Given, **selected: Any) -> Arguments:
    """A layer's forward and backward."""
    y = layer(g.x, residual=g.residual, out=g.out, **selected)
    dx = layer.backward(g.dy, dresidual=g.dresidual, out=g.out)
    gradients = {name: getattr(layer, name) for name in ("dresidual", "dgamma", "dbeta")}
    return {"y": y, "dx": dx, **gradients, **layer.state_dict()}


def _row_layer(g: Given, kind: Any, **options: Any) -> Arguments:
    """The same of rows, with a skip and a mask."""
    layer = kind(g.shape[-1], **options)
    where = g.place(np.random.default_rng(4).random((*g.shape[:-1], 1)) < 0.8)
    y, total = layer(g.x, skip=g.residual, where=where, out=g.out)
    dx = layer.backward(g.dy, dsum=g.ddx, out=g.out)
    return {"y": y, "sum": total, "dx": dx, "dgamma": layer.dgamma}


def _batch_norm(g: Given, mode: str, **options: Any) -> Arguments:
    told: Any = {"layout": g.layout, "activation": "relu", "one_value": "skip"}
    bn = fastbn.BatchNorm(g.channels, **told, **options)
    state: Arguments = {f"running_{name}": a for name, a in g.statistics().items()}
    bn.load_state_dict({"weight": g.gamma, "bias": g.beta, "num_batches_tracked": 7, **state})
    selected = {} if "virtual_batch" in options else {"where": g.where, "weights": g.weights}
    return _both_ways(bn.train(mode == "training"), g, **selected)


def _frozen(g: Given) -> Arguments:
    told: Any = {"layout": g.layout, "activation": "relu", **g.statistics()}
    norm: Any = fastbn.FrozenBatchNorm(gamma=g.gamma, beta=g.beta, **told)
    found = norm.backward(g.dy, g.x, y=g.y, dresidual=g.dresidual, where=g.where, out=g.out)
    fused = norm(g.x, residual=g.residual, where=g.where, out=g.out)
    return {"plain": norm(g.x), "y": fused, **found._asdict()}


def _reestimated(g: Given) -> Arguments:
    bn = fastbn.BatchNorm(g.channels, layout=g.layout)
    fastbn.reestimate([bn], bn, [g.x, g.dy])
    return dict(bn.state_dict())


def _merged(g: Given) -> Arguments:
    """Moments of x in two selections, merged, and by sums."""
    one = fastbn.Moments.of(g.x, layout=g.layout, where=g.where)
    two = fastbn.Moments.of(g.x, layout=g.layout, weights=g.weights)
    both, about = one.merge(two), g.beta
    added = fastbn.Moments.from_sums(g.place(one.to_sums(about) + two.to_sums(about)), about)
    again = fastbn.Moments.from_array(g.place(both.to_array()))
    return {"merged": again.to_array(), "added": added.to_array()}


def _standardized(g: Given) -> Arguments:
    """There and back, by given statistics and by those of the data."""
    found = g.statistics()
    one = fastbn.Standardizer(found["mean"], g.place(found["var"] + 1), divisor=2, layout=g.layout)
    y, integers = one(g.x), fastbn.Standardizer.of([g.integers], layout=g.layout)
    return {"y": y, "x": one.inverse(y), "mean": integers.mean, "std": integers.std}


def _of_columns(g: Given) -> Arguments:
    """Moments of a table with and without weights, merged."""
    table = g.x.reshape(g.shape[0], math.prod(g.shape[1:]))
    one, two = (fastbn.ColumnMoments.of(table, weights=w) for w in (None, g.weights))
    return dict(one.merge(two).to_dict())


def _put_layers() -> None:
    opened = fastbn.Renormalization(start=0, r_end=0, d_end=0)
    training = partial(_batch_norm, mode="training")
    ALL["BatchNorm"] = {
        "training": training,
        "evaluation": partial(_batch_norm, mode="evaluation"),
        "renormalization": partial(training, renormalization=opened),
        "virtual batches": partial(training, virtual_batch=2),
    }
    ALL["GroupNorm"] = {
        "": lambda g: _both_ways(fastbn.GroupNorm(g.groups, g.channels, layout=g.layout), g)
    }
    ALL["InstanceNorm"] = {
        "": lambda g: _both_ways(fastbn.InstanceNorm(g.channels, layout=g.layout), g)
    }
    ALL["LayerNorm"] = {
        "": lambda g: _both_ways(fastbn.LayerNorm(g.channels, layout=g.layout), g),
        "of rows": partial(_row_layer, kind=fastbn.LayerNorm, axes="last"),
    }
    ALL["RMSNorm"] = {"": partial(_row_layer, kind=fastbn.RMSNorm)}
    ALL["FrozenBatchNorm"] = {"": _frozen}
    ALL["reestimate"] = {"": _reestimated}
    ALL["Moments"] = {"": _merged}
    ALL["ColumnMoments"] = {"": _of_columns}
    ALL["Standardizer"] = {"": _standardized}
    _put("population_statistics", "", lambda g: {"batches": [g.x, g.dy], "layout": g.layout})


def _put_folds() -> None:
    """Into weights of as many channels as x has."""

    def kernel(g: Given, rest: tuple[int, ...], transposed: bool) -> Arguments:
        channels = (rest[0], g.channels) if transposed else (g.channels, rest[0])
        weight = np.random.default_rng(3).normal(size=(*channels, *rest[1:]))
        return {"weight": g.place(weight), "bias": g.beta, "transposed": transposed}

    def linear(g: Given, before: bool) -> Arguments:
        shape = (3, g.channels) if before else (g.channels, 3)
        weight = np.random.default_rng(3).normal(size=shape)
        return {"weight": g.place(weight), "bias": g.place(np.ones(shape[0])), "before": before}

    for flag in (False, True):
        for rest in ((3, 1, 3), (1, 1, 1), (0, 3)):
            way = partial(kernel, rest=rest, transposed=flag)
            _put("fold_into_conv", f"{rest}, transposed: {flag}", way, _statistics, AFFINE)
        way = partial(linear, before=flag)
        _put("fold_into_linear", f"before: {flag}", way, _statistics, AFFINE)


_put_forwards()
_put_data()
_put_backwards()
_put_group_norms()
_put_row_norms()
_put_double_backward()
_put_layers()
_put_folds()


def results(found: Any) -> dict[str, Array]:
    """What a call gave, as arrays by name."""
    if isinstance(found, np.ndarray):
        found = {"y": found}
    if not isinstance(found, dict):
        found = found._asdict()
    return {name: np.asarray(a) for name, a in found.items() if a is not None}
