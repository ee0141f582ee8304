"""Sigmoids with and without batch norm: how fast they learn, and what reaches one of them.

    python examples/saturating_sigmoids.py [--quick] [--output PATH]

Ioffe & Szegedy (2015), section 4.1: three hidden layers of 100 sigmoids, weights from a small
Gaussian, batches of 60. Theirs learned MNIST for 50,000 steps; these learn 1,437 handwritten
digits of 8x8 pixels for 10,000, by plain gradient descent at the demonstration's rate.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import experiment
import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from fastbn.demo import BATCH, HELD_OUT, RATE, SIZES, Digits, load_digits, table_of
from fastbn.demo.network import BatchNorm, Chain, perceptron

STEPS, QUICK_STEPS = 10_000, 1_000
EVALUATE_EVERY = 50  # steps
PERCENTILES = (15, 50, 85)
UNIT = 0  # the sigmoid of the last hidden layer that is looked at
GOAL = 0.9


class Run(NamedTuple):
    """One network's training, at every evaluation."""

    steps: list[int]
    accuracy: list[float]
    inputs: list[list[float]]
    """Percentiles of what reaches the sigmoid, over the held-out digits."""


Runs = dict[str, list[Run]]


def measure(quick: bool, track: experiment.Track) -> Runs:
    """Train every network."""
    digits, steps = load_digits(), QUICK_STEPS if quick else STEPS
    runs: Runs = {name: [] for name in experiment.NORMALIZED}
    for name, seed in track(
        [(n, s) for n in experiment.NORMALIZED for s in experiment.seeds(quick)]
    ):
        runs[name].append(train(digits, experiment.NORMALIZED[name], steps, seed))
    return runs


def train(digits: Digits, batch_norm: bool, steps: int, seed: int) -> Run:
    """Train one network, and look at one of its sigmoids all the while."""
    network = perceptron(SIZES, norm=BatchNorm if batch_norm else None, seed=seed)
    before_sigmoid = Chain(network.layers[:-2])  # the sigmoid and the output layer come last
    found = Run([], [], [])
    data = experiment.batches(digits, BATCH, steps, seed)
    for step in experiment.learn(network, data, RATE, EVALUATE_EVERY):
        found.steps.append(step)
        found.accuracy.append(network.accuracy(digits.test_x, digits.test_labels))
        inputs = before_sigmoid.serve(digits.test_x)[:, UNIT]
        found.inputs.append(np.percentile(inputs, PERCENTILES).tolist())
    return found


def drift(each: Run) -> float:
    """How far the median input moves during training."""
    return float(np.ptp(np.array(each.inputs)[:, 1]))


def widening(each: Run) -> float:
    """The largest distance of the outer percentiles, in units of the smallest."""
    width = np.array(each.inputs)[:, 2] - np.array(each.inputs)[:, 0]
    return float(width.max() / width.min())


def tables(runs: Runs) -> Iterable[Table]:
    """What was reached, and how the sigmoid's input changed."""
    last = next(iter(runs.values()))[0].steps[-1]
    accuracy = table_of(
        f"{HELD_OUT} held-out digits: median (lowest to highest) of the seeds",
        (f"accuracy after {last}", f"steps to {GOAL:.0%}"),
    )
    inputs = table_of(
        "input of one sigmoid, last hidden layer, over training",
        ("its median moves by", "its spread grows by a factor of"),
    )
    for name, own in runs.items():
        final = experiment.spread(each.accuracy[-1] for each in own)
        soon = (experiment.first_step(each.steps, each.accuracy, GOAL) for each in own)
        accuracy.add_row(name, final.text(), experiment.spread(soon).text(".0f"))
        moves, grows = experiment.spread(map(drift, own)), experiment.spread(map(widening, own))
        inputs.add_row(name, moves.text(".2f"), grows.text(".1f"))
    return accuracy, inputs


def draw(runs: Runs, figure: Figure) -> None:
    """Accuracy, and the percentiles of the first seed's networks, the others' medians behind."""
    left, *others = figure.subplots(1, 3, width_ratios=(1.2, 1, 1))
    for (name, own), right in zip(runs.items(), others, strict=True):
        colour, steps = experiment.NORMALIZED_COLOURS[name], own[0].steps
        percent = [[100 * share for share in each.accuracy] for each in own]
        experiment.band(left, steps, percent, colour, name)
        for each in own[1:]:
            right.plot(steps, np.array(each.inputs)[:, 1], color=colour, alpha=0.3, linewidth=0.8)
        low, middle, high = np.array(own[0].inputs).T
        right.fill_between(steps, low, high, color=colour, alpha=0.25, linewidth=0)
        right.plot(steps, middle, color=colour, linewidth=1.8)
        experiment.label(right, f"Input, {name}", "training steps", "")
    others[1].sharey(others[0])
    others[0].set_ylabel("input of one sigmoid, percentiles 15, 50, 85")
    experiment.label(left, "Held-out digits", f"training steps of {BATCH}", "accuracy, %")
    left.legend(frameon=False)


if __name__ == "__main__":
    experiment.run(__doc__, measure, tables, draw)
