"""Batch norm takes the scale out of the weights before it, and their gradient has the inverse.

    python examples/scale_invariance.py [--quick] [--output PATH]

Ioffe & Szegedy (2015), section 3.3: BN((aW)u) = BN(Wu), the gradient through it with respect to u
is the same, and with respect to aW it is 1/a times that with respect to W. Here u are 256
handwritten digits of 64 pixels, W is Gaussian, 64 by 100, and the loss's gradient is Gaussian; all
in float32, where powers of two scale without any rounding. A change is the largest of any value, as
a share of the largest value; one rounding is 2^-23. The law is exact for eps = 0; with eps, the
batch norm of aWu is that of Wu with eps / a^2.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import experiment
import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

import fastbn
from fastbn.demo import QUIET, load_digits, table_of
from fastbn.demo.network import Array, Dense

IMAGES, PIXELS, CHANNELS = 256, 64, 100
FACTORS = {
    **{f"2^{k}": 2.0**k for k in (-20, -10, -1, 1, 10, 20)},
    **{f"10^{k}": 10.0**k for k in (-6, -3, -2, -1, 1, 2, 3, 6)},
}
EPSILONS = (0.0, 1e-5)
ROUNDING = float(np.finfo(np.float32).eps)


class Layered(NamedTuple):
    """A dense layer and batch norm: what comes out, and the gradients."""

    y: Array
    du: Array
    dweight: Array


class Change(NamedTuple):
    """What aW changes in place of W; of the gradient by the weights, once it is multiplied by a."""

    y: float
    du: float
    dweight: float
    ratio: float
    """Of the norm of the gradient by aW to that by W."""


Changes = dict[tuple[str, float], list[Change]]
"""For every factor and eps, those of the seeds."""


def propagate(dense: Dense, u: Array, dy: Array, eps: float) -> Layered:
    """Forward, and backward from dy."""
    x = dense.forward(u)
    y, mean, var = fastbn.batch_norm(x, eps=eps)
    du = dense.backward(fastbn.batch_norm_backward(dy, x, mean, var, eps=eps).dx)
    return Layered(y, du, dense.gradients[0])


def change(found: Array, expected: Array) -> float:
    """The largest difference, as a share of the largest value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def compare(seed: int, eps: float) -> list[Change]:
    """All factors, with one seed's weights."""
    rng = np.random.default_rng(seed)
    (u, _), *_ = experiment.batches(load_digits(), IMAGES, 1, seed)
    dense = Dense(PIXELS, CHANNELS, rng)
    dy = rng.standard_normal((IMAGES, CHANNELS), np.float32)
    weight, expected = dense.weight, propagate(dense, u, dy, eps)
    found = []
    for factor in FACTORS.values():
        dense.weight = np.float32(factor) * weight
        y, du, dweight = propagate(dense, u, dy, eps)
        ratio = float(np.linalg.norm(dweight) / np.linalg.norm(expected.dweight))
        dweight *= np.float32(factor)
        each = change(y, expected.y), change(du, expected.du), change(dweight, expected.dweight)
        found.append(Change(*each, ratio))
    return found


def measure(quick: bool, track: experiment.Track) -> Changes:
    """All factors, with every seed's weights and every eps."""
    changes: Changes = {(name, eps): [] for name in FACTORS for eps in EPSILONS}
    for seed, eps in track([(seed, eps) for seed in experiment.seeds(quick) for eps in EPSILONS]):
        for name, found in zip(FACTORS, compare(seed, eps), strict=True):
            changes[name, eps].append(found)
    return changes


def tables(changes: Changes) -> Iterable[Table]:
    """Without eps, in roundings; with eps, in percent."""
    without, eps = EPSILONS
    exact = table_of(
        "eps = 0: changes in roundings, median (lowest to highest) of the seeds",
        ("y", "gradient by u", "a * gradient by aW"),
    )
    approximate = table_of(f"eps = {eps:g}", ("change of y", "a * ratio of gradients' norms"))
    for name, factor in FACTORS.items():
        columns = list(zip(*changes[name, without], strict=True))[:3]
        each = (experiment.spread(share / ROUNDING for share in column) for column in columns)
        exact.add_row(name, *(one.text(".1f") for one in each))
        own = changes[name, eps]
        ratio = experiment.spread(factor * one.ratio for one in own)
        approximate.add_row(
            name, experiment.spread(one.y for one in own).text(".2%"), ratio.text(".4f")
        )
    return exact, approximate


def draw(changes: Changes, figure: Figure) -> None:
    """Changes without and with eps, and the gradient's norm, against the factor."""
    *panels, norms = figure.subplots(1, 3)
    names = sorted(FACTORS, key=lambda name: FACTORS[name])
    factors = [FACTORS[name] for name in names]
    for axes, eps, unit in zip(panels, EPSILONS, (ROUNDING, 0.01), strict=True):
        for quantity, colour, text in (
            ("y", experiment.BLUE, "y"),
            ("dweight", experiment.VERMILION, "a * gradient"),
        ):
            each = (
                experiment.spread(getattr(one, quantity) / unit for one in changes[n, eps])
                for n in names
            )
            low, middle, high = np.array(list(each)).T
            ends = (middle - low, high - middle)
            axes.errorbar(factors, middle, ends, fmt="o", color=colour, markersize=4, label=text)
        axes.set_xscale("log")
        experiment.label(axes, f"Largest change, eps = {eps:g}", "a", "%" if eps else "roundings")
        axes.legend(frameon=False, loc=(0.3, 0.2))  # where neither panel has points
    for eps, colour in zip(EPSILONS, (experiment.BLUE, experiment.ORANGE), strict=True):
        ratios = [[one.ratio for one in changes[name, eps]] for name in names]
        experiment.band(norms, factors, np.transpose(ratios).tolist(), colour, f"eps = {eps:g}")
    norms.plot(factors, 1 / np.array(factors), color=QUIET, linestyle=":", label="1 / a")
    norms.set(xscale="log", yscale="log")
    experiment.label(norms, "Gradient by aW over that by W", "a", "ratio of norms")
    norms.legend(frameon=False)


if __name__ == "__main__":
    experiment.run(__doc__, measure, tables, draw)
