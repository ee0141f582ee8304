"""Random calls of layers and of `Moments`, and what is right about each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

import fastbn
from oracle import bounds, formulas
from oracle.arrays import LAYOUTS, Wide, channel_axis, vector, wide
from support.bits import assert_same_bits
from support.fuzz.cases import Case, Drawn, named, norm_of
from support.fuzz.right import (
    Results,
    Selected,
    assert_zeros,
    domain,
    gradients_of,
    groups_of,
    judge_fixed,
    judge_gradients,
    judge_normalized,
    judge_rows,
    judge_samples,
    judge_y_by,
    verify,
    weighed,
)
from support.judge import Judged
from support.memory import dense_in_its_order
from support.random_arrays import Array, Source

PARAMETERS = {"weight": "gamma", "bias": "beta"}
STATE = (*PARAMETERS, "running_mean", "running_var", "num_batches_tracked")


# --- what all layers have -----------------------------------------------------------------------


def _put_parameters(d: Drawn, options: dict[str, Any], *, shift: bool = True) -> None:
    for name, has in (("weight", "scale"), ("bias", "shift"))[: 1 + shift]:
        options[has] = d.s.chance(0.85)
        if options[has]:
            d.put(name, d.s.vector(d.channels))


def _put_backward(d: Drawn, *, residual: bool = True) -> None:
    """dy, what is to become of it, and where."""
    d.like_x("dy", d.s.gradient(d.shape, d.dtype))
    mine, kind = d.arguments, d.s.random.random()
    if residual:
        mine["dresidual"] = kind < 0.3
    if residual and kind < 0.15:
        d.put("dresidual", np.full(d.shape, 77, d.dtype), written=True)
    if d.s.chance(0.3):
        d.put("into", np.full(d.shape, 77, d.dtype), written=True)
    elif d.s.chance(0.2) and d.is_writeable("dy"):
        mine["into"] = mine["dy"]


def _put_out(d: Drawn) -> None:
    if d.s.chance(0.4):
        d.put("out", np.full(d.shape, 77, d.dtype), written=True)


def _put_way(d: Drawn) -> None:
    """By a call or by forward; whether the backward adds to what an earlier one left."""
    d.arguments["by_forward"] = d.s.chance(0.4)
    d.arguments["accumulates"] = d.s.chance(0.3)


def _ran(layer: Any, a: dict[str, Any], *names: str) -> Results:
    """What a layer's forward and backward give."""
    given = {name: a[name] for name in ("residual", "out", *names) if name in a}
    saved, into = None, {"out": a.get("into")}
    into |= {name: a[name] for name in ("dresidual", "dsum") if name in a}
    if a["by_forward"]:
        *found, saved = layer.forward(a["x"], **given)
    else:
        found = layer(a["x"], **given)
        found = found if "skip" in given else [found]
    y, *total = found
    if a["accumulates"]:
        layer.backward(dense_in_its_order(a["dy"]), saved)
        once = _gradients(layer)
        dx = layer.backward(a["dy"], saved, accumulate=True, **into)
        with np.errstate(all="ignore"):
            assert_same_bits(_gradients(layer), {name: 2 * g for name, g in once.items()})
        for name, g in once.items():
            getattr(layer, name)[...] = g
    else:
        dx = layer.backward(a["dy"], saved, **into)
    sums = {"sum": total[0]} if total else {}
    gradients = {n: getattr(layer, n, None) for n in ("dgamma", "dbeta", "dresidual")}
    return {"y": y, **sums, "dx": dx, **gradients}


def _gradients(layer: Any) -> dict[str, Array]:
    """Copies of those that there are."""
    held = {name: getattr(layer, name, None) for name in ("dgamma", "dbeta")}
    return {name: a.copy() for name, a in held.items() if a is not None}


def _own(a: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The layer's arrays, as it holds them."""
    own = {n: a[n].astype(dtype) for n in STATE[:4] if n in a}
    own |= {ours: own[name] for name, ours in PARAMETERS.items() if name in own}
    return own


def _as_verb(a: dict[str, Any], own: dict[str, Any], dtype: str, channels: int) -> dict[str, Any]:
    """The arguments of the verbs that a layer's backward is of."""
    wanted = [f"d{n}" for n in PARAMETERS.values() if n in own and not a.get("frozen_affine")]
    gamma = own.get("gamma", np.ones(channels, dtype))
    return a | {"gamma": gamma, "wanted": wanted, "params": bool(wanted)}


# --- batch norm ---------------------------------------------------------------------------------


def _batch_norm_options(s: Source) -> dict[str, Any]:
    options: dict[str, Any] = {
        "unbiased": s.chance(0.5),
        "one_value": s.choice(("raise", "skip", "skip")),
        "nonfinite": s.choice(("update", "update", "skip")),
        "dtype": s.choice(("float32", "float64")),
    }
    options["track_running_stats"] = tracks = s.chance(0.85)
    kind = s.random.random()
    if kind < 0.3:
        options["momentum"] = None
    elif kind < 0.6:
        options["decay"] = s.choice((0.0, 0.5, 0.99, 1.0))
    if s.chance(0.15):
        options["virtual_batch"] = s.choice((1, 2, 3, 16, 100))
    elif tracks and s.chance(0.2):
        limits: dict[str, Any] = {
            "start": s.choice((0, 2)),
            "r_end": s.choice((2, 10)),
            "d_end": s.choice((2, 9)),
        }
        limits |= {"r_max": s.choice((1.0, 1.5, 100.0)), "d_max": s.choice((0.0, 0.3, 100.0))}
        options["renormalization"] = fastbn.Renormalization(**limits)
    elif tracks and s.chance(0.2):
        options["one_value"] = "running"
    if tracks and s.chance(0.25):
        options["domains"] = ("day", "night")
    return options


def effective(selected: Selected, weights: Array | None) -> float:
    """Kish's number of values: (sum w)**2 / sum(w**2); the count where all weigh the same."""
    if weights is None:
        return selected.count
    w = selected.by_place(weights)
    if not w.size or not w.max():
        return 0
    w = w / w.max()
    return float(w.sum() ** 2 / (w**2).sum())


def _values(a: dict[str, Any], shape: tuple[int, ...], k: int | None) -> Array:
    """How many values a channel has in each group, as far as statistics are concerned."""
    layout, where = a["layout"], a.get("where")
    return np.array(
        [
            effective(Selected(shape, layout, where, group), a.get("weights"))
            for group in groups_of(shape[0], k)
        ],
        np.longdouble,
    )


def batch_norm_layer(s: Source) -> Case:
    """Training, evaluation, or frozen statistics; by the batch's own, where none are running."""
    d, options = Drawn(s), _batch_norm_options(s)
    tracks = options["track_running_stats"]
    mode = s.choice(("training", "training", "evaluation", "frozen")[: 4 if tracks else 3])
    if not d.channels:
        return batch_norm_layer(s)
    if "virtual_batch" not in options:
        d.x()
        d.weights()
    else:
        d.x(masked=False)
    d.options("eps", "activation")
    _put_parameters(d, options)
    if tracks:
        d.put("running_mean", s.values.normal(size=d.channels))
        d.put("running_var", s.values.exponential(size=d.channels))
        d.arguments["num_batches_tracked"] = s.choice((0, 1, 5, 100))
    d.arguments["frozen_affine"] = s.chance(0.1)
    d.residual()
    _put_out(d)
    _put_backward(d)
    _put_way(d)
    d.arguments |= {"options": options, "mode": mode, "layout": d.layout}
    d.arguments["update"] = s.chance(0.8)
    if "domains" in options:
        d.arguments["domain"] = s.choice(options["domains"])
    k = options.get("virtual_batch") if mode == "training" else None
    plain = {n: d.plain(n) for n in ("where", "weights")} | {"layout": d.layout}
    counts = _values(plain, d.shape, k)
    if ((counts > 1) & (counts < 1.001)).any():
        return batch_norm_layer(s)
    case = Case("BatchNorm", _batch_norm_call, d.arguments, _judge_batch_norm)
    bad = counts.any() and (counts <= 1).any() and (mode == "training" or not tracks)
    if bad and options["one_value"] == "raise":
        case.errors, case.wrong = (ValueError,), "one value a channel"
    return case


def _batch_norm_call(**a: Any) -> Results:
    channels = a["x"].shape[channel_axis(a["x"].ndim, a["layout"])]
    told = {n: a[n] for n in ("eps", "layout", "activation")}
    bn = fastbn.BatchNorm(channels, **a["options"], **told)
    before, names = bn.state_dict(), {name: name for name in STATE}
    if "domain" in a:
        names |= {name: f"{name}.{a['domain']}" for name in STATE[2:]}
    bn.load_state_dict(before | {names[name]: a[name] for name in STATE if name in a})
    bn.train(a["mode"] != "evaluation")
    bn.frozen_statistics, bn.frozen_affine = a["mode"] == "frozen", a["frozen_affine"]
    k = a["options"].get("virtual_batch") if a["mode"] == "training" else None
    selected = {n: a[n] for n in ("where", "weights") if n in a}
    mean, var = fastbn.moments(a["x"], layout=a["layout"], virtual_batch=k, **selected)
    found = _ran(bn, a, *selected, "domain", "update") | {"mean": mean, "var": var}
    after = bn.state_dict()
    others = [name for name in after if name not in names.values()]
    assert_same_bits(*({name: state[name] for name in others} for state in (after, before)))
    return found | {name: after[names[name]] for name in STATE[2:] if names[name] in after}


def _judge_batch_norm(results: Results, a: dict[str, Any]) -> None:
    options = a["options"]
    trains, dtype, channels = a["mode"] == "training", options["dtype"], results["mean"].shape[-1]
    tracks = options["track_running_stats"]
    k = options.get("virtual_batch") if trains else None
    own, a = _own(a, dtype), a | {"virtual_batch": k}
    counts = _values(a, a["x"].shape, k)
    one = len(counts) == 1 and 0 < counts[0] <= 1
    runs = tracks and (not trains or (one and options["one_value"] == "running"))
    verb = _as_verb(a, own, dtype, channels)
    of_y = a | {n: own[n] for n in PARAMETERS.values() if n in own}
    fits = tracks and not runs and bool((counts > 1).any())
    if runs:
        fixed = {"mean": own["running_mean"], "var": own["running_var"]}
        judge_fixed(results, of_y | fixed)
        judge_gradients(
            results,
            verb | fixed | {"virtual_batch": None, "weights": None} | _y(results, a),
            frozen=True,
        )
    elif fits and "renormalization" in options:
        judge_normalized({n: results[n] for n in ("mean", "var")}, a)
        _judge_renormalized(results, verb, own)
    else:
        judge_normalized(results, of_y)
        statistics = {n: results[n] for n in ("mean", "var")}
        judge_gradients(results, verb | statistics | _y(results, a))
    if tracks:
        _judge_running(results, a, own, counts, fits and a["update"])


def _y(results: Results, a: dict[str, Any]) -> dict[str, Any]:
    return {"y": None if a["activation"] is None else results["y"]}


def _judge_running(
    results: Results, a: dict[str, Any], own: dict[str, Any], counts: Array, updates: bool
) -> None:
    """The running statistics after the call."""
    options, batches = a["options"], a["num_batches_tracked"]
    means, variances = (
        results[n].reshape(len(counts), len(own["running_mean"])).astype(np.longdouble)
        for n in ("mean", "var")
    )
    expected = {}
    if updates:
        kept = counts > 1
        share = (counts[kept] / counts[kept].sum())[:, None]
        loss = (counts[kept] / (counts[kept] - 1))[:, None]
        biased = (share * variances[kept]).sum(0)
        runs = (share * variances[kept] * (loss if options["unbiased"] else 1)).sum(0)
        new = 1 - np.longdouble(options["decay"]) if "decay" in options else np.longdouble(0.1)
        if options.get("momentum", 0.1) is None:
            new = 1 / np.longdouble(batches + 1)
        of_groups = share * means[kept]
        for name, statistic, terms in (
            ("mean", of_groups.sum(0), np.abs(of_groups).sum(0)),
            ("var", runs, runs),
        ):
            running = own[f"running_{name}"].astype(np.longdouble)
            value = (1 - new) * running + new * statistic
            size = (1 - new) * np.abs(running) + new * terms  # groups' means may cancel
            rounding = bounds.unit(options["dtype"]) / 2 + 2.0**-49 * (1 + loss.max())
            rounding += 2.0**-53 * len(share)  # of a sum of so many
            expected[name] = Judged(results[f"running_{name}"], value, rounding * size, name)
        limit = float(np.finfo(options["dtype"]).max)
        numbers = [biased, of_groups]
        bad = not all(np.isfinite(v).all() for v in numbers)
        bad |= not all((np.abs(e.expected) <= limit).all() for e in expected.values())
        if bad and options["nonfinite"] == "skip":
            expected = {}
    tracked = results["num_batches_tracked"]
    assert tracked == batches + bool(expected), f"num_batches_tracked is {tracked}"
    for name in ("mean", "var"):
        if expected:
            finite = np.isfinite(expected[name].expected)
            verify([expected[name]], finite)
        else:
            np.testing.assert_array_equal(results[f"running_{name}"], own[f"running_{name}"])


def _judge_renormalized(results: Results, a: dict[str, Any], own: dict[str, Any]) -> None:
    """y is batch norm's at gamma r and beta + gamma d, and so are the gradients."""
    limits, batches = a["options"]["renormalization"], a["num_batches_tracked"]
    opened = [
        float(batches >= end)
        if end == limits.start
        else (min(max(batches - limits.start, 0) / (end - limits.start), 1.0))
        for end in (limits.r_end, limits.d_end)
    ]
    r_max, d_max = 1 + opened[0] * (limits.r_max - 1), opened[1] * limits.d_max
    c, eps = len(own["running_mean"]), a["eps"]
    mean, var, running_mean, running_var = (
        v.astype(np.longdouble)
        for v in (results["mean"], results["var"], own["running_mean"], own["running_var"])
    )
    rstd = formulas.rstd_of(running_var, eps)
    r = np.clip(np.sqrt(var + np.longdouble(eps)) * rstd, 1 / np.longdouble(r_max), r_max)
    d = np.clip((mean - running_mean) * rstd, -d_max, d_max)
    gamma, beta = vector(own.get("gamma"), 1, c), vector(own.get("beta"), 0, c)
    selected = Selected(a["x"].shape, a["layout"], a.get("where"))
    values = wide(selected.of(a["x"]), "NHWC")
    inside = domain(values, mean, var, a["eps"], a["x"].dtype.itemsize)
    judge_y_by(results["y"], a, selected, mean, var, gamma * r, beta + gamma * d, inside)
    scaled = a | {"gamma": (gamma * r).astype(np.float64), "mean": results["mean"]}
    scaled |= {"var": results["var"]} | _y(results, a)
    (dx, fits), *rest = gradients_of(results, scaled, selected, frozen=False)
    verify([dx], fits)
    by_name = {judged.what: judged for judged, _ in rest}
    of_gamma, of_beta = (by_name[n] for n in ("dgamma", "dbeta"))
    unit = bounds.unit(own["running_mean"].dtype)
    value = r * of_gamma.expected + d * of_beta.expected
    bound = (
        r * of_gamma.bound
        + np.abs(d) * of_beta.bound
        + unit * (np.abs(value) + np.abs(d * of_beta.expected))
    )
    wanted = {
        "dgamma": Judged(results["dgamma"], value, bound, "dgamma"),
        "dbeta": of_beta._replace(actual=results["dbeta"]),
    }
    for name, judged in wanted.items():
        assert (results[name] is not None) == (name in a["wanted"]), f"{name} is {results[name]}"
        if results[name] is not None:
            verify([judged._replace(bound=judged.bound + unit * np.abs(judged.expected))], fits)


# --- group, instance and layer norm; frozen batch norm ------------------------------------------


def sample_norm_layer(s: Source) -> Case:
    d = Drawn(s)
    if not d.channels:
        return sample_norm_layer(s)
    norm, groups, _ = norm_of(d)
    d.x(masked=False)
    options: dict[str, Any] = {"dtype": s.choice(("float32", "float64"))}
    _put_parameters(d, options)
    d.options("eps", "activation")
    d.residual()
    _put_out(d)
    _put_backward(d)
    _put_way(d)
    d.arguments |= {"options": options}

    def call(**a: Any) -> Results:
        told = {n: a[n] for n in ("eps", "layout", "activation")} | a["options"]
        if isinstance(norm.kind, int):
            layer: Any = fastbn.GroupNorm(norm.kind, d.channels, **told)
        else:
            kind = {"instance": fastbn.InstanceNorm, "layer": fastbn.LayerNorm}[norm.kind]
            layer = kind(d.channels, **told)
        layer.load_state_dict({name: a[name] for name in PARAMETERS if name in a})
        alone = norm.forward(a["x"], eps=a["eps"], layout=a["layout"])
        return {"mean": alone.mean, "var": alone.var, **_ran(layer, a)}

    def judge(results: Results, a: dict[str, Any]) -> None:
        own = _own(a, options["dtype"])
        forward = {n: results[n] for n in ("y", "mean", "var")}
        of_y = a | {n: own[n] for n in PARAMETERS.values() if n in own} | {"groups": groups}
        judge_samples(forward, {n: v for n, v in of_y.items() if n != "dy"})
        verb = _as_verb(a, own, options["dtype"], d.channels) | {"groups": groups}
        statistics = {n: results[n] for n in ("mean", "var")}
        gradients = {n: results[n] for n in ("dx", "dgamma", "dbeta", "dresidual")}
        judge_samples(gradients, verb | statistics | _y(results, a))

    return Case(f"layer of {norm}", call, d.arguments, judge)


def row_norm_layer(s: Source) -> Case:
    """Layer norm over the last axis, or RMS norm."""
    d, is_centred = Drawn(s, layout="NHWC"), s.chance(0.5)
    if not d.channels:
        return row_norm_layer(s)
    d.x()
    options: dict[str, Any] = {"dtype": s.choice(("float32", "float64"))}
    _put_parameters(d, options, shift=is_centred)
    d.arguments |= {"eps": s.eps(), "activation": None, "options": options}
    if is_centred:
        d.residual()
        d.arguments["activation"] = activation = s.activation()
        options |= {"axes": "last", "layout": s.choice(LAYOUTS), "activation": activation}
    d.skip()
    _put_out(d)
    _put_backward(d, residual=is_centred)
    d.dsum()
    _put_way(d)
    kind: Any = fastbn.LayerNorm if is_centred else fastbn.RMSNorm
    verb: Any = partial(fastbn.layer_norm, axes="last") if is_centred else fastbn.rms_norm
    statistics = ("mean", "var") if is_centred else ("mean_square",)

    def call(**a: Any) -> Results:
        layer = kind(d.channels, eps=a["eps"], **a["options"])
        layer.load_state_dict({name: a[name] for name in PARAMETERS if name in a})
        beside = {name: a[name] for name in ("skip", "where") if name in a}
        alone = verb(a["x"], eps=a["eps"], **beside)
        return {n: getattr(alone, n) for n in statistics} | _ran(layer, a, *beside)

    def judge(results: Results, a: dict[str, Any]) -> None:
        own = _own(a, options["dtype"])
        of_y = a | {n: own[n] for n in PARAMETERS.values() if n in own}
        forward = {n: results[n] for n in ("y", "sum", *statistics) if n in results}
        told = {n: v for n, v in of_y.items() if n not in ("dy", "dsum")}
        judge_rows(forward, told, is_centred=is_centred)
        verb = _as_verb(a, own, options["dtype"], d.channels) | {n: results[n] for n in statistics}
        verb |= _y(results, a) | {"x": results.get("sum", a["x"]), "skip": None}
        gradients = {n: results[n] for n in ("dx", "dgamma", "dbeta", "dresidual")}
        judge_rows(gradients, verb, is_centred=is_centred)

    return Case(f"{kind.__name__} of rows", call, d.arguments, judge)


def frozen_batch_norm(s: Source) -> Case:
    d = Drawn(s)
    x = d.x()
    d.statistics(x, exact=False)
    d.vectors("gamma", "beta")
    d.options("eps", "activation")
    d.residual()
    _put_out(d)
    _put_backward(d)
    d.arguments["params"] = s.chance(0.7)

    def call(**a: Any) -> Results:
        vectors: dict[str, Any] = {n: a.get(n) for n in ("mean", "var", "gamma", "beta")}
        told: dict[str, Any] = {n: a[n] for n in ("eps", "layout", "activation")}
        frozen: Any = fastbn.FrozenBatchNorm(**vectors, **told)
        given: dict[str, Any] = {n: a.get(n) for n in ("residual", "where")}
        alone = fastbn.normalize(a["x"], **vectors, **told, **given)
        y = frozen(a["x"], **given, out=a.get("out"))
        kept = {"y": None if a["activation"] is None else y, "where": a.get("where")}
        kept["dresidual"] = a["dresidual"]
        gradients = frozen.backward(a["dy"], a["x"], params=a["params"], out=a.get("into"), **kept)
        return {"y": y, "normalize": alone, **named(gradients)}

    def judge(results: Results, a: dict[str, Any]) -> None:
        assert_same_bits({"y": results["y"]}, {"y": results["normalize"]})
        judge_fixed(results, a)
        judge_gradients(results, a | _y(results, a), frozen=True)

    return Case("FrozenBatchNorm", call, d.arguments, judge)


# --- moments ------------------------------------------------------------------------------------


def merged_moments(s: Source) -> Case:
    """Moments of parts, merged, and their sums added up."""
    d = Drawn(s)
    d.x(written=True)  # parts of what a stride of 0 repeats are not in the order of the whole
    d.weights()
    d.options()
    n = d.shape[0]
    ends = sorted(s.random.randrange(n + 1) for _ in range(s.choice((0, 1, 2, 3))))
    d.arguments["ends"] = [0, *ends, n]
    return Case("Moments", _merged, d.arguments, _judge_merged)


def _parts(a: dict[str, Any]) -> list[slice]:
    ends = a["ends"]
    return [slice(*pair) for pair in pairwise(ends)]


def _merged(**a: Any) -> Results:
    x, parts = a["x"], []
    where = a.get("where")
    if where is not None:
        full = list(x.shape)
        full[1 if a["layout"] == "NCHW" else -1] = 1
        where = np.broadcast_to(where, full)
    for samples in _parts(a):
        some: dict[str, Any] = {"where": None if where is None else where[samples]}
        some["weights"] = None if a.get("weights") is None else a["weights"][samples]
        parts.append(fastbn.Moments.of(x[samples], layout=a["layout"], **some))
    whole, about = parts[0], parts[0].mean
    for part in parts[1:]:
        whole = whole.merge(part)
    merged = {"about": about, "count": whole.count, "mean": whole.mean, "var": whole.var}
    again = fastbn.Moments.from_array(whole.to_array())
    assert again == whole, f"{again} is not {whole}"
    if whole.count and not 1e-100 < whole.count < 1e100:
        return merged  # sums of squared weights may be no float64
    total = fastbn.Moments.from_sums(np.sum([p.to_sums(about) for p in parts], 0), about)
    sums = {"sums count": total.count, "sums mean": total.mean, "sums var": total.var}
    return merged | sums


def _judge_merged(results: Results, a: dict[str, Any]) -> None:
    """docs/numerics.md, "Merged"; of parts whose means lie apart the largest is felt."""
    x, layout, weights = a["x"], a["layout"], a.get("weights")
    of_parts: list[tuple[Wide, Wide, Wide]] = []
    if not x.size:
        assert_zeros(results, mean=results["mean"].shape, var=results["mean"].shape)
        return
    inside: Any = True
    for part in [slice(None), *_parts(a)]:
        selected = Selected(x.shape, layout, a.get("where"), part)
        values = wide(selected.of(x), "NHWC")
        w = np.ones(values.shape[1], np.longdouble)
        if weights is not None:
            w = Selected(x.shape, layout, a.get("where"), part).by_place(weights)
        if not w.any():
            if part == slice(None):
                c = x.shape[selected.axis]
                assert_zeros(results, mean=(c,), var=(c,))
                return
            continue
        mean, var = weighed(values, w)
        inside = inside & domain(values[:, w > 0], mean, var, 0.0, x.dtype.itemsize)
        of_parts.append((mean, var, w.sum()))
    (mean, var, count), *parts = of_parts
    for name in ("count", "sums count"):
        found = results.get(name, count)
        assert abs(found - count) <= 1e-12 * count, f"{name} is {found}"
    unit, merges, s = np.longdouble(2.0**-52), len(parts) - 1, np.sqrt(var)
    most = np.max([np.abs(m) for m, _, _ in parts], 0)
    e = (merges + 1) * unit * most
    mean_off, var_off = e + 1e-12 * s, merges * (e * s + e**2) + 1e-10 * var
    verify(
        [
            Judged(results["mean"], mean, mean_off, "mean"),
            Judged(results["var"], var, var_off, "var"),
        ],
        inside,
    )
    if "sums var" not in results:
        return
    square = var + (mean - results["about"]) ** 2
    e = unit * most + 1e-12 * np.max([np.sqrt(v) for _, v, _ in parts], 0)
    mean_off = e + (len(parts) + 2) * unit * np.sqrt(square) + unit * np.abs(mean)
    var_off = 1e-10 * var + 2 * s * e + e**2 + (2 * len(parts) + 8) * unit * square
    verify(
        [
            Judged(results["sums mean"], mean, mean_off, "mean of sums"),
            Judged(results["sums var"], var, var_off, "var of sums"),
        ],
        inside,
    )


LAYERS: dict[Callable[[Source], Case], int] = {
    batch_norm_layer: 14,
    sample_norm_layer: 6,
    row_norm_layer: 6,
    frozen_batch_norm: 6,
    merged_moments: 5,
}
"""What is drawn, and how often."""
