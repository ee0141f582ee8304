"""Every function's results on one problem, and comparing them bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastbn
from oracle.arrays import channel_axis

Array = NDArray[Any]
Results = dict[str, Array]
Place = Callable[[Array, Array], tuple[Array, Array, Array | None]]
"""Where x and dy lie for one call, and its `out`."""


def as_given(x: Array, dy: Array) -> tuple[Array, Array, None]:
    """The arrays themselves, and a fresh result."""
    return x, dy, None


def run_all(
    x: Array,
    dy: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    layout: str = "NCHW",
    eps: float = 1e-5,
    place: Place = as_given,
) -> Results:
    """What the five functions give for one problem, by name; each call's arrays are placed anew."""
    a, _, out = place(x, dy)
    y, mean, var = fastbn.batch_norm(a, gamma, beta, eps=eps, layout=layout, out=out)
    a, _, out = place(x, dy)
    statistics = fastbn.moments(a, layout=layout)
    # A NaN in var is for batch_norm_backward alone: normalize refuses it.
    v = np.where(np.isnan(var), 1.0, var)
    results: dict[str, Array | None] = {
        "y": y,
        "mean": mean,
        "var": var,
        "moments.mean": statistics.mean,
        "moments.var": statistics.var,
        "normalize": fastbn.normalize(a, mean, v, gamma, beta, eps=eps, layout=layout, out=out),
    }
    for params in (True, False):
        a, b, out = place(x, dy)
        got = fastbn.batch_norm_backward(
            b, a, mean, var, gamma, eps=eps, layout=layout, params=params, out=out
        )
        a, b, out = place(x, dy)
        given = a if params else None
        frozen = fastbn.normalize_backward(
            b, given, mean, v, gamma, eps=eps, layout=layout, params=params, out=out
        )
        for kind, gradients in (("batch_norm", got), ("normalize", frozen)):
            for name, value in gradients._asdict().items():
                results[f"{kind}_backward(params={params}).{name}"] = value
    return {name: value for name, value in results.items() if value is not None}


LEAKY = ("leaky_relu", 0.125)


def run_fused(
    x: Array,
    dy: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    layout: str = "NCHW",
    eps: float = 1e-5,
    place: Place = as_given,
) -> Results:
    """What the four functions that write give with activations and a residual, by name."""
    options: dict[str, Any] = {"eps": eps, "layout": layout}
    a, b, out = place(x, dy)
    y, mean, var = fastbn.batch_norm(
        a, gamma, beta, activation="relu", residual=b, out=out, **options
    )
    results = {"y": y.copy(), "mean": mean, "var": var}
    for activation in (LEAKY, "relu6"):
        a, b, out = place(x, dy)
        results[f"normalize, {activation}"] = fastbn.normalize(
            *(a, mean, var, gamma, beta), activation=activation, residual=b, out=out, **options
        ).copy()
    frozen = fastbn.FrozenBatchNorm(mean, var, gamma, beta, activation="relu6", **options)
    a, b, out = place(x, dy)
    results["frozen"] = frozen(a, residual=b, out=out)
    gates = (("relu", results["y"]), (LEAKY, results[f"normalize, {LEAKY}"]))
    for verb in (fastbn.batch_norm_backward, fastbn.normalize_backward):
        for activation, y in gates:
            a, b, out = place(x, dy)
            got = verb(
                *(b, a, mean, var, gamma),
                **(options | {"activation": activation, "y": y, "dresidual": True, "out": out}),
            )
            for name, value in got._asdict().items():
                results[f"{verb.__name__}, {activation}: {name}"] = value
    a, b, out = place(x, dy)
    lone = fastbn.normalize_backward(
        *(b, None, mean, var, gamma), params=False, activation=LEAKY, y=y, out=out, **options
    )
    return results | {"dx alone": lone.dx}


def selection(shape: tuple[int, ...], layout: str) -> tuple[Array, Array]:
    """A mask and weights for arrays of some shape; the last place counts."""
    rng, axis = np.random.default_rng(1), channel_axis(len(shape), layout)
    where = rng.random((*shape[:axis], 1, *shape[axis + 1 :])) < 0.7
    weights = rng.uniform(0.5, 1.5, shape[0]) * (rng.random(shape[0]) < 0.9)
    where.flat[-1], weights[-1] = True, 1.0
    return where, weights


def run_masked(
    x: Array,
    dy: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    layout: str = "NCHW",
    eps: float = 1e-5,
    place: Place = as_given,
) -> Results:
    """What the verbs give where some places count, weighed and not, by name."""
    where, weights = selection(x.shape, layout)
    fixed: dict[str, Any] = {"eps": eps, "layout": layout, "where": where}
    results: Results = {}
    for how, options in (("masked", fixed), ("weighed", fixed | {"weights": weights})):
        a, _, out = place(x, dy)
        y, mean, var = fastbn.batch_norm(a, gamma, beta, out=out, **options)
        results |= {f"{how} y": y.copy(), f"{how} mean": mean, f"{how} var": var}
        a, b, out = place(x, dy)
        got = fastbn.batch_norm_backward(b, a, mean, var, gamma, out=out, **options)
        results |= {f"{how} {name}": np.copy(value) for name, value in got._asdict().items()}
    a, b, out = place(x, dy)
    results["normalize"] = fastbn.normalize(a, mean, var, gamma, beta, out=out, **fixed).copy()
    a, b, out = place(x, dy)
    got = fastbn.normalize_backward(b, a, mean, var, gamma, out=out, **fixed)
    return results | {f"normalize: {name}": value for name, value in got._asdict().items()}


def run_group_norms(
    x: Array,
    dy: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    layout: str = "NCHW",
    eps: float = 1e-5,
    place: Place = as_given,
) -> Results:
    """What group, instance and layer norm give, plain and fused, by name."""
    channels = x.shape[channel_axis(x.ndim, layout)]
    groups = next((n for n in range(2, channels + 1) if channels % n == 0), 1)
    plain: dict[str, Any] = {"eps": eps, "layout": layout}
    results: Results = {}
    for n, activation in ((1, None), (groups, None), (channels, None), (groups, "relu6")):
        options = plain | {"activation": activation}
        a, b, out = place(x, dy)
        residual = None if activation is None else b
        given: Any = (a, n, gamma, beta)
        y, mean, var = fastbn.group_norm(*given, residual=residual, out=out, **options)
        y = y.copy()
        a, b, out = place(x, dy)
        gate: dict[str, Any] = {} if activation is None else {"y": y, "dresidual": True}
        got = fastbn.group_norm_backward(b, a, mean, var, n, gamma, out=out, **gate, **options)
        found = {"y": y, "mean": mean, "var": var, **got._asdict()}
        results |= {f"{n} groups, {activation}: {k}": np.copy(v) for k, v in found.items()}
    return results


def of_channels(results: Results, chosen: Array, layout: str) -> Results:
    """The results of some channels alone."""
    return {
        name: a.compress(chosen, channel_axis(a.ndim, layout) if a.ndim > 1 else 0)
        for name, a in results.items()
    }


def assert_same_bits(actual: Results, expected: Results) -> None:
    """Equal names, shapes, dtypes and bits; only a NaN's payload may differ."""
    assert actual.keys() == expected.keys()
    for name, a in actual.items():
        b = expected[name]
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        different = _integers(a) != _integers(b)
        different &= ~(np.isnan(a) & np.isnan(b))
        assert not different.any(), (
            f"{name}: {int(different.sum())} of {a.size} values differ in their bits, "
            f"as {a[different][0]!r} and {b[different][0]!r}"
        )


def _integers(a: Array) -> Array:
    """The bits of each value as an unsigned integer."""
    return np.ascontiguousarray(a).view(f"u{a.itemsize}").reshape(a.shape)
