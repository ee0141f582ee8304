"""Normalization in batches of 2 to 256: batch norm, and what is made for small and large batches.

    python examples/small_batches.py [--quick] [--output PATH]

Wu & He (2018), Ioffe (2017), Hoffer et al. (2017) and Wu & Johnson (2021) in small. Theirs are deep
networks on ImageNet, COCO and CIFAR; these learn 8x8 handwritten digits: one of two convolutions,
whose channels have 64 values a digit, and one of two dense layers of 100 ReLUs, whose have one.
Each way in turn:

- batch norm, by running statistics with a momentum of 0.1 once it is trained;
- virtual batches of 16, for larger batches;
- batch renormalization, its limits opened in the proportions of the paper: from a tenth of the
  steps, d until a half and r until four fifths;
- group norm, four groups of channels;
- the first network with the statistics of all training digits, re-estimated once it is trained.

Every network sees as many digits as 5 epochs have, by plain gradient descent. The rate for each
network and batch size is that of 0.01, 0.02, 0.05, 0.1, 0.2, 0.5 and 1 that left the fewest errors,
in the mean of the ways and three other seeds, on a quarter of the training digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import NamedTuple

import experiment
import numpy as np
from experiment import Norm, RunningNorm
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

import fastbn
from fastbn.demo import HELD_OUT, Digits, load_digits, table_of
from fastbn.demo.network import Array, Layer, Network, ReLU, perceptron

SIZES, QUICK_SIZES = (2, 4, 8, 16, 32, 64, 128, 256), (2, 16, 256)
EPOCHS, QUICK_EPOCHS = 5, 1
VIRTUAL = 16
GHOSTS, REESTIMATED = "virtual batches", "re-estimated"
GROUPS = 4
DENSE = (64, 100, 100, 10)  # pixels, hidden layers, classes
SPREAD = np.sqrt(2 / 100)  # He et al. (2015), for 100 inputs

MakeNorm = Callable[[int], Layer]


def batch_norm(channels: int, steps: int) -> Layer:
    return RunningNorm(fastbn.BatchNorm(channels, layout="NHWC"))


def virtual_batches(channels: int, steps: int) -> Layer:
    return RunningNorm(fastbn.BatchNorm(channels, layout="NHWC", virtual_batch=VIRTUAL))


def renormalization(channels: int, steps: int) -> Layer:
    limits = fastbn.Renormalization(start=steps // 10, d_end=steps // 2, r_end=4 * steps // 5)
    return RunningNorm(fastbn.BatchNorm(channels, layout="NHWC", renormalization=limits))


def group_norm(channels: int, steps: int) -> Layer:
    return Norm(fastbn.GroupNorm(GROUPS, channels, layout="NHWC"))


WAYS: dict[str, tuple[Callable[[int, int], Layer], str]] = {
    "batch norm": (batch_norm, experiment.VERMILION),
    GHOSTS: (virtual_batches, experiment.ORANGE),
    "renormalization": (renormalization, experiment.GREEN),
    "group norm": (group_norm, experiment.PURPLE),
}
"""The layer for so many channels and steps, and its colour."""
COLOURS = {name: colour for name, (_, colour) in WAYS.items()} | {REESTIMATED: experiment.BLUE}


class Architecture(NamedTuple):
    """A network, to be made with a norm and a seed, and what it takes."""

    make: Callable[[MakeNorm, int], Network]
    view: Callable[[Array], Array]
    """Of rows of pixels."""
    rates: dict[int, float]
    """For every batch size."""


def dense(norm: MakeNorm, seed: int) -> Network:
    return perceptron(DENSE, norm=norm, seed=seed, unit=ReLU, spread=SPREAD)


ARCHITECTURES = {
    "convolutions": Architecture(
        experiment.convolutional,
        experiment.images,
        dict(zip(SIZES, (0.1, 0.1, 0.2, 0.2, 0.5, 0.5, 0.5, 0.2), strict=True)),
    ),
    "dense layers": Architecture(
        dense,
        lambda x: x,
        dict(zip(SIZES, (0.01, 0.05, 0.1, 0.1, 0.2, 0.5, 0.2, 0.2), strict=True)),
    ),
}
Errors = dict[tuple[str, str, int], list[float]]
"""For every architecture, way and batch size, those of the seeds, in percent; none where virtual
batches would be whole batches."""


def load(architecture: Architecture) -> Digits:
    """The digits as the network takes them."""
    rows = load_digits()
    train_x, test_x = (architecture.view(x) for x in (rows.train_x, rows.test_x))
    return rows._replace(train_x=train_x, test_x=test_x)


def train(
    architecture: Architecture, digits: Digits, way: str, size: int, epochs: int, seed: int
) -> Network:
    """A network, trained in one way."""
    make_norm, _ = WAYS[way]
    steps = epochs * len(digits.train_x) // size
    network = architecture.make(lambda channels: make_norm(channels, steps), seed)
    data = experiment.batches(digits, size, steps, seed)
    experiment.fit(network, data, architecture.rates[size])
    return network


def error(network: Network, digits: Digits) -> float:
    """The percentage of the held-out digits that it gets wrong."""
    return 100 * (1 - network.accuracy(digits.test_x, digits.test_labels))


def reestimate(network: Network, digits: Digits) -> None:
    """Give the norms the statistics of all training digits."""
    norms = [layer.layer for layer in network.layers if isinstance(layer, RunningNorm)]
    fastbn.reestimate(norms, network.scores, [digits.train_x])


def is_apart(way: str, size: int) -> bool:
    """Whether the way is another than batch norm in batches of this size."""
    return way != GHOSTS or size > VIRTUAL


def measure(quick: bool, track: experiment.Track) -> Errors:
    """Every architecture, way and batch size with every seed."""
    sizes, epochs = (QUICK_SIZES, QUICK_EPOCHS) if quick else (SIZES, EPOCHS)
    digits = {name: load(architecture) for name, architecture in ARCHITECTURES.items()}
    errors: Errors = {key: [] for key in product(ARCHITECTURES, COLOURS, sizes)}
    jobs = product(ARCHITECTURES, WAYS, sizes, experiment.seeds(quick))
    for name, way, size, seed in track([job for job in jobs if is_apart(*job[1:3])]):
        network = train(ARCHITECTURES[name], digits[name], way, size, epochs, seed)
        errors[name, way, size].append(error(network, digits[name]))
        if way == "batch norm":
            reestimate(network, digits[name])
            errors[name, REESTIMATED, size].append(error(network, digits[name]))
    return errors


def tables(errors: Errors) -> Iterable[Table]:
    """The errors: of each architecture in three ways, then in two."""
    ways = list(COLOURS)
    for name, own in product(ARCHITECTURES, (ways[:3], ways[3:])):
        table = table_of(f"{name}, batch size: errors on {HELD_OUT} held-out digits, %", own)
        for size in sizes_of(errors):
            each = (errors[name, way, size] for way in own)
            texts = (experiment.spread(runs).text(".1f") if runs else "-" for runs in each)
            table.add_row(str(size), *texts)
        yield table


def sizes_of(errors: Errors) -> list[int]:
    return sorted({size for *_, size in errors})


def draw(errors: Errors, figure: Figure) -> None:
    """A panel for each architecture."""
    panels = figure.subplots(1, len(ARCHITECTURES))
    for axes, name in zip(panels, ARCHITECTURES, strict=True):
        draw_errors(axes, errors, name)
    panels[-1].legend(frameon=False)


def draw_errors(axes: Axes, errors: Errors, name: str) -> None:
    """The errors against the batch size."""
    sizes = sizes_of(errors)
    for way, colour in COLOURS.items():
        own = [size for size in sizes if is_apart(way, size)]
        runs = list(zip(*(errors[name, way, size] for size in own), strict=True))
        experiment.band(axes, own, runs, colour, way)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    experiment.label(axes, f"Held-out digits, {name}", "batch size", "errors, %")
    axes.set_ylim(bottom=0)


if __name__ == "__main__":
    experiment.run(__doc__, measure, tables, draw, size=(10, 4.2))
