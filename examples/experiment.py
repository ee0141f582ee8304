"""What the experiments beside this file share: a network, batches, spread over seeds, plots, `run`.

Their other layers are those of `fastbn.demo.network`, their data scikit-learn's handwritten digits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from threadpoolctl import threadpool_limits

import fastbn
from fastbn.__main__ import writable
from fastbn.demo import QUIET, WITH_COLOUR, WITHOUT_COLOUR, Digits, what_runs
from fastbn.demo.network import Array, Convolution, Dense, Layer, Network, Pool, ReLU

SEEDS, QUICK_SEEDS = range(5), range(2)

SIDE, CLASSES = 8, 10  # pixels, digits
CHANNELS = (1, 8, 16)  # of the images, and after each convolution

# From the palette of Okabe and Ito, as the demonstration's.
BLUE, VERMILION, ORANGE, GREEN = WITH_COLOUR, WITHOUT_COLOUR, "#E69F00", "#009E73"
SKY, PURPLE = "#56B4E9", "#CC79A7"
NORMALIZED = {"with batch norm": True, "without batch norm": False}
NORMALIZED_COLOURS = dict(zip(NORMALIZED, (BLUE, VERMILION), strict=True))

Found = TypeVar("Found")
Job = TypeVar("Job")


def seeds(quick: bool) -> range:
    """What every network is trained, or looked at, with."""
    return QUICK_SEEDS if quick else SEEDS


class Track(Protocol):
    """Goes through jobs one by one, and shows how far it is."""

    def __call__(self, jobs: Sequence[Job], /) -> Iterable[Job]: ...


class Norm(Layer):
    """One of fastbn's layers in a network, that serves as it trains."""

    def __init__(self, layer: fastbn.BatchNorm | fastbn.GroupNorm) -> None:
        self.layer = layer
        self.parameters = [a for a in (layer.gamma, layer.beta) if a is not None]

    def forward(self, x: Array) -> Array:
        return self.layer(x)

    def backward(self, dy: Array) -> Array:
        dx = self.layer.backward(dy)
        self.gradients = self.layer.dgamma, self.layer.dbeta
        return dx


class RunningNorm(Norm):
    """Batch norm, that serves by its running statistics."""

    layer: fastbn.BatchNorm

    def serve(self, x: Array) -> Array:
        y = self.layer.eval()(x)
        self.layer.train()
        return y


def convolutional(norm: Callable[[int], Layer], seed: int) -> Network:
    """Two 3x3 convolutions of 8 and 16 channels, each with a norm and ReLU, and a dense layer."""
    rng = np.random.default_rng(seed)
    layers: list[Layer] = []
    for inputs, outputs in pairwise(CHANNELS):
        layers += Convolution(inputs, outputs, rng), norm(outputs), ReLU()
    return Network([*layers, Pool(), Dense(CHANNELS[-1] * (SIDE // 2) ** 2, CLASSES, rng)])


def images(x: Array) -> Array:
    """Rows of pixels as (N, H, W, C)."""
    return x.reshape(-1, SIDE, SIDE, 1)


class Spread(NamedTuple):
    """What the seeds gave."""

    low: float
    median: float
    high: float

    def text(self, form: str = ".1%", infinite: str = "never") -> str:
        """The median, and what it lies between; in words where that is infinite."""
        low, median, high = (infinite if np.isinf(v) else format(v, form) for v in self)
        return median if low == high else f"{median} ({low} to {high})"


def spread(values: Iterable[float]) -> Spread:
    """The median and the extremes."""
    low, *_, high = ordered = sorted(float(value) for value in values)
    middle = len(ordered) // 2
    # The mean of the two in the middle, which may both be infinite.
    return Spread(low, (ordered[middle] + ordered[~middle]) / 2, high)


def batches(digits: Digits, size: int, steps: int, seed: int) -> Iterator[tuple[Array, Array]]:
    """Random batches of the training digits, with their labels."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = rng.choice(len(digits.train_x), size, replace=False)
        yield digits.train_x[chosen], digits.train_labels[chosen]


def learn(
    network: Network, data: Iterable[tuple[Array, Array]], rate: float, every: int
) -> Iterator[int]:
    """Train on every batch; gives the number of steps taken, whenever `every` more are."""
    for step, (x, labels) in enumerate(data, 1):
        network.train(x, labels, rate)
        if step % every == 0:
            yield step


def fit(network: Network, data: Iterable[tuple[Array, Array]], rate: float) -> None:
    """Train on every batch."""
    for x, labels in data:
        network.train(x, labels, rate)


def first_step(steps: Sequence[int], accuracy: Sequence[float], goal: float) -> float:
    """The first evaluated step with the goal's accuracy, or infinity."""
    points = zip(steps, accuracy, strict=True)
    return next((step for step, share in points if share >= goal), np.inf)


def run(
    about: str | None,
    measure: Callable[[bool, Track], Found],
    tables: Callable[[Found], Iterable[Table]],
    draw: Callable[[Found, Figure], None],
    *,
    size: tuple[float, float] = (10, 4),
) -> None:
    """An experiment as a command: measure, print the tables, save the plot.

    Parameters
    ----------
    about : str
        The script's docstring.
    measure : callable
        Takes whether to be quick, and what to go through its jobs with; gives what it found.
    tables, draw : callable
        Take what was found.
    size : tuple
        The plot's, in inches.
    """
    arguments = parse(about)
    console = Console()
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("runs,"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, repeatable():
        console.print(f"fastbn {fastbn.get_config()['version']}: {what_runs()}")
        found = measure(arguments.quick, progress.track)
    console.print(*tables(found))
    save(partial(draw, found), arguments.output, size)
    console.print(f"Plot: {arguments.output}", soft_wrap=True)


def save(draw: Callable[[Figure], None], output: Path, size: tuple[float, float]) -> None:
    """A plot as a file, without a display."""
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=QUIET)
    figure.savefig(output, format="png", dpi=100)


def parse(about: str | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer steps and seeds")
    parser.add_argument(
        "--output",
        type=writable,
        default=Path(parser.prog).with_suffix(".png"),
        metavar="PATH",
        help="where the plot goes, as PNG (default: %(default)s)",
    )
    return parser.parse_args()


@contextmanager
def repeatable() -> Iterator[None]:
    """One thread, which small arrays are fastest on; networks may diverge without a warning."""
    with (
        threadpool_limits(1, "blas"),
        fastbn.use_num_threads(1),
        np.errstate(over="ignore", invalid="ignore"),
    ):
        yield


def band(
    axes: Axes, x: Sequence[float], runs: Sequence[Sequence[float]], colour: str, label: str
) -> None:
    """A line of medians over the seeds, in a band from the lowest to the highest."""
    axes.plot(x, np.median(runs, axis=0), color=colour, linewidth=1.8, label=label)
    low, high = np.min(runs, axis=0), np.max(runs, axis=0)
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def label(axes: Axes, title: str, x: str, y: str) -> None:
    """Titles, of the plot and of its axes."""
    axes.set_title(title, loc="left", size=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
