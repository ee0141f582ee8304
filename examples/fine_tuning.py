"""Fine-tuning on shifted data: which statistics should batch norm go by?

    python examples/fine_tuning.py [--quick] [--output PATH]

A small convolutional network learns 1,000 handwritten digits (600 steps of 32, rate 0.1) and is
then given 64 others that look different: inverted, or faded to half the contrast on a grey ground,
and with Gaussian noise of deviation 0.2. It is fine-tuned on these for 300 steps, in batches of 4
or of 32, and judged on the held-out digits, shifted in the same way. The rate is that of 0.01,
0.02, 0.05 and 0.1 that was best for the inverted digits, in the mean of all ways and three other
seeds, on training digits left over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from itertools import product
from typing import NamedTuple

import experiment
import numpy as np
from experiment import RunningNorm, convolutional, images
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

import fastbn
from fastbn.demo import HELD_OUT, Digits, load_digits, table_of
from fastbn.demo.network import Array, Network

Shift = Callable[[Array], Array]
SHIFTS: dict[str, Shift] = {"inverted": lambda x: 1 - x, "faded": lambda x: 0.5 + 0.5 * x}
SOURCE, TARGET = 1_000, 64  # digits learned first, and for fine-tuning
NOISE = 0.2
BATCH, RATE, STEPS = 32, 0.1, 600  # at first
FINE_BATCHES = (4, 32)
FINE_RATE = 0.05
FINE_STEPS, QUICK_FINE_STEPS = 300, 60


def split(digits: Digits, shift: Shift, seed: int) -> tuple[Digits, Digits]:
    """The digits to learn first, and shifted ones to fine-tune on; each with its held-out ones."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(digits.train_x))

    def part(chosen: Array, change: Shift) -> Digits:
        x, labels = change(images(digits.train_x[chosen])), digits.train_labels[chosen]
        return Digits(x, labels, change(images(digits.test_x)), digits.test_labels)

    def noisy(x: Array) -> Array:
        noise: Array = rng.standard_normal(x.shape, np.float32)
        return shift(x) + np.float32(NOISE) * noise

    source, target = order[:SOURCE], order[SOURCE : SOURCE + TARGET]
    return part(source, lambda x: x), part(target, noisy)


def batch_norm(channels: int) -> RunningNorm:
    """The norm of the network."""
    return RunningNorm(fastbn.BatchNorm(channels, layout="NHWC"))


def norms(network: Network) -> list[fastbn.BatchNorm]:
    """The network's norms."""
    return [layer.layer for layer in network.layers if isinstance(layer, RunningNorm)]


def update(network: Network, x: Array) -> None:
    """Each batch's own statistics, which go on into the running ones: nothing to prepare."""


def freeze(network: Network, x: Array) -> None:
    """The running statistics of the first digits."""
    for layer in norms(network):
        layer.frozen_statistics = True


def reestimate(network: Network, x: Array) -> None:
    """The statistics of the digits to fine-tune on; it takes no labels."""
    fastbn.reestimate(norms(network), network.scores, [x])
    freeze(network, x)


def fold(network: Network, x: Array) -> None:
    """The affine map that the first digits' statistics make: its own scale and shift are learned,
    as gamma and beta of a norm with mean 0, variance 1 and eps 0."""
    freeze(network, x)
    for layer in norms(network):
        frozen = layer.to_frozen()
        layer.eps = 0.0
        layer.load_state_dict(
            {
                "weight": frozen.scale,
                "bias": frozen.shift,
                "running_mean": np.zeros(layer.channels),
                "running_var": np.ones(layer.channels),
                "num_batches_tracked": 0,
            }
        )


class Way(NamedTuple):
    """How the network is prepared for the shifted digits, and whether it then learns them."""

    prepare: Callable[[Network, Array], None]
    learns: bool


WAYS = {
    "as it is": Way(update, False),
    "re-estimated": Way(reestimate, False),
    "fine-tuned, updated": Way(update, True),
    "fine-tuned, frozen": Way(freeze, True),
    "fine-tuned, re-estimated": Way(reestimate, True),
    "fine-tuned, folded": Way(fold, True),
}
Accuracies = dict[tuple[str, str, int], list[float]]
"""For every shift, way and batch size, those of the seeds."""


def pretrain(source: Digits, seed: int) -> Network:
    """A network that knows the digits as they were."""
    network = convolutional(batch_norm, seed)
    experiment.fit(network, experiment.batches(source, BATCH, STEPS, seed), RATE)
    return network


def tune(network: Network, target: Digits, way: Way, size: int, steps: int, seed: int) -> float:
    """The accuracy that a copy of the network gets to."""
    network = deepcopy(network)
    way.prepare(network, target.train_x)
    if way.learns:
        experiment.fit(network, experiment.batches(target, size, steps, seed), FINE_RATE)
    return network.accuracy(target.test_x, target.test_labels)


def measure(quick: bool, track: experiment.Track) -> Accuracies:
    """Every shift and way with every seed."""
    digits, steps = load_digits(), QUICK_FINE_STEPS if quick else FINE_STEPS
    found: Accuracies = {key: [] for key in product(SHIFTS, WAYS, FINE_BATCHES)}
    for shift, seed in track(list(product(SHIFTS, experiment.seeds(quick)))):
        source, target = split(digits, SHIFTS[shift], seed)
        network = pretrain(source, seed)
        for way, size in product(WAYS, FINE_BATCHES):
            accuracy = tune(network, target, WAYS[way], size, steps, seed)
            found[shift, way, size].append(accuracy)
    return found


def tables(found: Accuracies) -> Iterable[Table]:
    """The accuracies."""
    for shift in SHIFTS:
        table = table_of(
            f"{HELD_OUT} {shift} held-out digits: median (lowest to highest) of the seeds",
            [f"batches of {size}" for size in FINE_BATCHES],
        )
        for way in WAYS:
            each = (experiment.spread(found[shift, way, size]).text() for size in FINE_BATCHES)
            table.add_row(way, *each)
        yield table


def draw(found: Accuracies, figure: Figure) -> None:
    """The accuracies, from left to right; a panel for each shift."""
    panels = figure.subplots(1, len(SHIFTS), sharey=True)
    for axes, shift in zip(panels, SHIFTS, strict=True):
        draw_shift(axes, {key[1:]: own for key, own in found.items() if key[0] == shift})
        experiment.label(axes, f"{TARGET} {shift} digits", "accuracy, held-out digits, %", "")
    panels[0].invert_yaxis()
    panels[0].legend(frameon=False)


def draw_shift(axes: Axes, found: dict[tuple[str, int], list[float]]) -> None:
    """The medians, with lines from the lowest to the highest."""
    colours = (experiment.VERMILION, experiment.BLUE)
    for offset, size, colour in zip((-0.1, 0.1), FINE_BATCHES, colours, strict=True):
        each = [experiment.spread(100 * share for share in found[way, size]) for way in WAYS]
        low, middle, high = np.array(each).T
        where = np.arange(len(WAYS)) + offset
        ends = (middle - low, high - middle)
        text = f"batches of {size}"
        axes.errorbar(middle, where, xerr=ends, fmt="o", color=colour, capsize=3, label=text)
    axes.set_yticks(range(len(WAYS)), WAYS)
    axes.set_xlim(0, 100)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.8)


if __name__ == "__main__":
    experiment.run(__doc__, measure, tables, draw, size=(10, 3.6))
