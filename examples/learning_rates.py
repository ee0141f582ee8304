"""Batch norm at 1, 5 and 30 times the learning rate that suits the network without it.

    python examples/learning_rates.py [--quick] [--output PATH]

Figures 2 and 3 of Ioffe & Szegedy (2015) in small. Theirs is Inception on ImageNet; this is six
hidden layers of 100 ReLUs, or of sigmoids, on 8x8 handwritten digits, in batches of 32, by plain
gradient descent at a constant rate. The base rate is that of 0.01, 0.02, 0.05, 0.1, 0.2, 0.5 and 1
with which the ReLUs without batch norm got best, in the mean of three other seeds, on a quarter of
the training digits. The goal is the best accuracy of those ReLUs, the median of the seeds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import experiment
import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from fastbn.demo import HELD_OUT, QUIET, Digits, load_digits, table_of
from fastbn.demo.network import BatchNorm, ReLU, Sigmoid, perceptron

SIZES = (64, *6 * (100,), 10)  # pixels, hidden layers, classes
SPREAD = np.sqrt(2 / 100)  # He et al. (2015), for 100 inputs
BATCH = 32
BASE_RATE = 0.2
STEPS, QUICK_STEPS = 3_000, 600
EVALUATE_EVERY = 20  # steps
NEAR = 0.95


class Contender(NamedTuple):
    """What is trained."""

    unit: type[ReLU | Sigmoid]
    batch_norm: bool
    times: int
    """The base rate."""
    colour: str

    def __str__(self) -> str:
        norm = "batch norm" if self.batch_norm else "without"
        return f"{self.unit.__name__}, {norm}, x{self.times}"


PLAIN = Contender(ReLU, False, 1, experiment.VERMILION)
CONTENDERS = [
    Contender(unit, batch_norm, times, colour)
    for unit in (ReLU, Sigmoid)
    for batch_norm, times, colour in (
        (False, 1, experiment.VERMILION),
        (False, 5, experiment.ORANGE),
        (True, 1, experiment.SKY),
        (True, 5, experiment.BLUE),
        (True, 30, experiment.GREEN),
    )
]


class Run(NamedTuple):
    """One network's training, at every evaluation."""

    steps: list[int]
    accuracy: list[float]


Runs = dict[Contender, list[Run]]


def measure(quick: bool, track: experiment.Track) -> Runs:
    """Train every contender with every seed."""
    digits, steps = load_digits(), QUICK_STEPS if quick else STEPS
    runs: Runs = {contender: [] for contender in CONTENDERS}
    for contender, seed in track(
        [(c, seed) for c in CONTENDERS for seed in experiment.seeds(quick)]
    ):
        runs[contender].append(train(digits, contender, steps, seed))
    return runs


def train(digits: Digits, contender: Contender, steps: int, seed: int) -> Run:
    """Train one network."""
    unit, batch_norm, times, _ = contender
    norm = BatchNorm if batch_norm else None
    network = perceptron(SIZES, norm=norm, seed=seed, unit=unit, spread=SPREAD)
    data, found = experiment.batches(digits, BATCH, steps, seed), Run([], [])
    for step in experiment.learn(network, data, times * BASE_RATE, EVALUATE_EVERY):
        found.steps.append(step)
        found.accuracy.append(network.accuracy(digits.test_x, digits.test_labels))
    return found


def best(own: list[Run]) -> experiment.Spread:
    """The best accuracies."""
    return experiment.spread(max(each.accuracy) for each in own)


def tables(runs: Runs) -> Iterable[Table]:
    """How good each gets, and how soon it is as good as the plain network at its best."""
    goals = NEAR, best(runs[PLAIN]).median
    title = f"{HELD_OUT} held-out digits: median (lowest to highest) of the seeds"
    reached = table_of(title, ("best accuracy",))
    soon = table_of("steps taken", [f"to {goal:.1%}" for goal in goals])
    for contender, own in runs.items():
        reached.add_row(str(contender), best(own).text())
        steps = ([experiment.first_step(*each, goal) for each in own] for goal in goals)
        soon.add_row(str(contender), *(experiment.spread(each).text(".0f") for each in steps))
    return reached, soon


def draw(runs: Runs, figure: Figure) -> None:
    """Accuracy against steps: ReLUs on the left, sigmoids on the right."""
    columns = figure.subplots(1, 2, sharey=True)
    goal = 100 * best(runs[PLAIN]).median
    for axes, unit in zip(columns, (ReLU, Sigmoid), strict=True):
        for contender, own in runs.items():
            if contender.unit is unit:
                percent = [[100 * share for share in each.accuracy] for each in own]
                experiment.band(axes, own[0].steps, percent, contender.colour, str(contender))
        axes.axhline(goal, color=QUIET, linewidth=0.8, linestyle="--")
        experiment.label(
            axes, f"Six hidden layers of {unit.__name__}s", f"training steps of {BATCH}", ""
        )
        axes.set_xscale("log")
        axes.legend(frameon=False, fontsize="small")
    columns[0].set_ylabel("held-out accuracy, %")


if __name__ == "__main__":
    experiment.run(__doc__, measure, tables, draw)
