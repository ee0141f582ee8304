"""Why batch norm works: what one gradient step does to a deep network with and without it.

    python examples/why_it_works.py [--quick] [--output PATH]

Bjorck et al. (2018) in small. Theirs is ResNet-110 on CIFAR-10; this has 36 dense layers of 100
channels on 8x8 handwritten digits: a first one, 17 residual blocks of two, relu(x + norm(dense(
relu(norm(dense(x)))))), and an output layer. Weights are Gaussian with a deviation of 0.1, the
square root of 1 / channels; He's for ReLUs, of 2 / channels, are looked at before training.
Everything is seen on one batch of 128 digits:

- the loss after a step along the gradient over that before it, against the step's size, before
  training and after 100 updates at a rate of 0.001, at which both networks learn;
- the mean and variance of the channels after each block, before training, and in the first update
  at a rate of 0.1 that multiplies the loss by a thousand;
- the gradient of the loss by the output layer, images by classes, before training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import experiment
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

import fastbn
from fastbn.demo import QUIET, load_digits, table_of
from fastbn.demo.network import (
    WEIGHT_SPREAD,
    Array,
    BatchNorm,
    Dense,
    Layer,
    Network,
    ReLU,
    Residual,
    cross_entropy_gradient,
)

PIXELS, CHANNELS, CLASSES, BLOCKS = 64, 100, 10, 17
HE_SPREAD = np.sqrt(2 / CHANNELS)
BATCH = 128
SMALL_RATE, SMALL_UPDATES = 0.001, 100
LARGE_RATE, LARGE_UPDATES = 0.1, 100  # at most; fewer where the loss explodes
EXPLOSION = 1e3  # new loss over old
SIZES = np.logspace(-6, 2, 33)
DEPTHS = range(BLOCKS + 1)  # of blocks
NEVER, OVERFLOW = "never", "overflow"
SHARES = (0, 0.5, 1)  # of the update in which the loss explodes


class Moments(NamedTuple):
    """Mean over the channels of each one's mean and variance, after each block."""

    mean: list[float]
    var: list[float]


class Seen(NamedTuple):
    """What one network shows."""

    ratios: list[list[float]]
    """New loss over old for every size of the step: before training, and after the updates."""
    start: Moments
    he_start: Moments
    """With He's weights."""
    update: list[Moments]
    """After each of the shares of the update."""
    updates: float
    """How many came before it; infinity: the loss did not explode, and it is the last one."""
    loss: float
    """Before that update, of its batch."""
    gradient: Array
    """By the output layer's scores, images by classes."""


Networks = dict[str, list[Seen]]


def residual_network(batch_norm: bool, seed: int, spread: float = WEIGHT_SPREAD) -> Network:
    """The network, batch-normalized after every dense layer but the last, or not."""
    rng = np.random.default_rng(seed)

    def dense(inputs: int) -> list[Layer]:
        norm = [BatchNorm(CHANNELS)] if batch_norm else []
        return [Dense(inputs, CHANNELS, rng, spread=spread), *norm]

    layers: list[Layer] = [*dense(PIXELS), ReLU()]
    for _ in range(BLOCKS):
        layers += Residual([*dense(CHANNELS), ReLU(), *dense(CHANNELS)]), ReLU()
    return Network([*layers, Dense(CHANNELS, CLASSES, rng, spread=spread)])


def loss(network: Network, x: Array, labels: Array) -> float:
    """Mean cross-entropy of a training batch; infinite where the scores are no numbers."""
    scores = network.chain.forward(x).astype(float)
    scores -= scores.max(axis=1, keepdims=True)
    each = np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(len(x)), labels]
    return float(np.nan_to_num(each.mean(), nan=np.inf))


class Line:
    """Steps of any size along the gradient of a batch's loss, from where the network stands."""

    def __init__(self, network: Network, x: Array, labels: Array) -> None:
        self.network, self.batch = network, (x, labels)
        self.loss = loss(network, x, labels)
        network.backpropagate(x, labels)
        self.gradients = network.chain.gradients
        self.start = [parameter.copy() for parameter in network.chain.parameters]

    def go(self, size: float) -> None:
        """Set the parameters to those after a step of this size."""
        each = zip(self.network.chain.parameters, self.start, self.gradients, strict=True)
        for parameter, start, gradient in each:
            parameter[...] = start - size * gradient

    def ratio(self, size: float) -> float:
        """New loss over old; the network is left where the step ends."""
        self.go(size)
        return loss(self.network, *self.batch) / self.loss


def ratios(network: Network, x: Array, labels: Array) -> list[float]:
    """New loss over old for every size; the network is left as it was."""
    line = Line(network, x, labels)
    found = [line.ratio(size) for size in SIZES]
    line.go(0)
    return found


def channel_moments(network: Network, x: Array) -> Moments:
    """Those of a training batch, after the first layer and each block."""
    found = Moments([], [])
    for layer in network.layers[:-1]:
        x = layer.forward(x)
        if isinstance(layer, ReLU):
            mean, var = fastbn.moments(x)
            found.mean.append(float(mean.mean()))
            found.var.append(float(var.mean()))
    return found


def explode(
    network: Network, data: Iterable[tuple[Array, Array]], x: Array
) -> tuple[list[Moments], float, float]:
    """Train at the large rate until the loss explodes: what `Seen` has of that update."""
    updates = np.inf
    for before, batch in enumerate(data):
        line = Line(network, *batch)
        if not line.ratio(LARGE_RATE) < EXPLOSION:
            updates = before
            break
    moments = []
    for share in SHARES:
        line.go(share * LARGE_RATE)
        moments.append(channel_moments(network, x))
    return moments, updates, line.loss


def look(batch_norm: bool, seed: int) -> Seen:
    """See all there is to see of one seed's network, with or without batch norm."""
    digits, network = load_digits(), residual_network(batch_norm, seed)
    (x, labels), *_ = experiment.batches(digits, BATCH, 1, seed)
    start = channel_moments(network, x)
    he_start = channel_moments(residual_network(batch_norm, seed, HE_SPREAD), x)
    gradient = BATCH * cross_entropy_gradient(network.chain.forward(x), labels)
    at_first = ratios(network, x, labels)
    exploding = residual_network(batch_norm, seed)
    update = explode(exploding, experiment.batches(digits, BATCH, LARGE_UPDATES, seed), x)
    experiment.fit(network, experiment.batches(digits, BATCH, SMALL_UPDATES, seed), SMALL_RATE)
    after = ratios(network, x, labels)
    return Seen([at_first, after], start, he_start, *update, gradient)


def measure(quick: bool, track: experiment.Track) -> Networks:
    """Look at every network."""
    found: Networks = {name: [] for name in experiment.NORMALIZED}
    for name, seed in track(
        [(name, seed) for name in experiment.NORMALIZED for seed in experiment.seeds(quick)]
    ):
        found[name].append(look(experiment.NORMALIZED[name], seed))
    return found


def largest_good(found: Sequence[float]) -> float:
    """The largest step that lowers the loss."""
    return float(SIZES[np.array(found) < 1].max(initial=0))


def smallest_bad(found: Sequence[float]) -> float:
    """The smallest step that makes the loss explode."""
    return float(SIZES[np.array(found) >= EXPLOSION].min(initial=np.inf))


def growth(each: Sequence[float]) -> float:
    """The last over the first, of the depths or of an update's shares; infinite if no number."""
    return float(np.nan_to_num(each[-1] / each[0], nan=np.inf))


def in_one_class(gradient: Array) -> float:
    """The share of the images whose largest gradient is that of the class most common in this."""
    return float(np.bincount(gradient.argmax(axis=1)).max() / len(gradient))


TABLES: dict[str, dict[str, tuple[Callable[[Seen], float], str]]] = {
    "the largest step that lowers the loss, the smallest that multiplies it by 1000": {
        "lowers, before training": (lambda seen: largest_good(seen.ratios[0]), NEVER),
        f"after {SMALL_UPDATES} updates": (lambda seen: largest_good(seen.ratios[1]), NEVER),
        "x1000, before training": (lambda seen: smallest_bad(seen.ratios[0]), NEVER),
        f"after {SMALL_UPDATES} updates ": (lambda seen: smallest_bad(seen.ratios[1]), NEVER),
    },
    "before training: after the last block over after the first layer": {
        "channels' mean": (lambda seen: growth(seen.start.mean), OVERFLOW),
        "variance": (lambda seen: growth(seen.start.var), OVERFLOW),
        "mean, He's weights": (lambda seen: growth(seen.he_start.mean), OVERFLOW),
        "variance, He's weights": (lambda seen: growth(seen.he_start.var), OVERFLOW),
    },
    f"updates at a rate of {LARGE_RATE}, until one multiplies the loss by 1000": {
        "updates before it": (lambda seen: seen.updates, NEVER),
        "loss before it": (lambda seen: seen.loss, OVERFLOW),
        "mean, after / before": (lambda seen: growth([m.mean[-1] for m in seen.update]), OVERFLOW),
        "variance, after / before": (
            lambda seen: growth([m.var[-1] for m in seen.update]),
            OVERFLOW,
        ),
    },
    "before training: images whose largest gradient is that of one class": {
        "share": (lambda seen: in_one_class(seen.gradient), NEVER),
    },
}
"""What is told of a network, and what infinity means there."""


def tables(found: Networks) -> Iterable[Table]:
    """The median (lowest to highest) of the seeds."""
    for title, rows in TABLES.items():
        table = table_of(title, list(experiment.NORMALIZED))
        for name, (quantity, infinite) in rows.items():
            each = (
                experiment.spread(map(quantity, own)).text(".2g", infinite)
                for own in found.values()
            )
            table.add_row(name, *each)
        yield table


def draw(found: Networks, figure: Figure) -> None:
    """Ratios and moments with their bands; gradients of the first seed."""
    (first, later, *maps), (start, update, *more) = figure.subplots(2, 3)
    for stage, axes in enumerate((first, later)):
        draw_ratios(axes, found, stage)
    first.legend(frameon=False, fontsize="small")
    draw_start(start, found)
    draw_update(update, found)
    for axes, (name, own) in zip((*maps, *more), found.items(), strict=True):
        draw_gradient(axes, name, own[0])


def draw_ratios(axes: Axes, found: Networks, stage: int) -> None:
    """New loss over old against the step."""
    for name, own in found.items():
        # Infinity has no place in a plot.
        drawn = [np.minimum(seen.ratios[stage], 1e9).tolist() for seen in own]
        experiment.band(axes, SIZES.tolist(), drawn, experiment.NORMALIZED_COLOURS[name], name)
    axes.axhline(1, color=QUIET, linewidth=0.8, linestyle="--")
    axes.set(xscale="log", yscale="log", ylim=(0.1, 1e5))
    when = f"after {SMALL_UPDATES} updates" if stage else "before training"
    experiment.label(axes, f"A step's effect, {when}", "size of the step", "new loss / old loss")


def draw_start(axes: Axes, found: Networks) -> None:
    """Moments against depth."""
    for name, own in found.items():
        colour = experiment.NORMALIZED_COLOURS[name]
        experiment.band(axes, DEPTHS, [seen.start.var for seen in own], colour, "variance")
        for text, style, each in (
            ("mean", ":", [seen.start.mean for seen in own]),
            ("variance, He's weights", "--", [seen.he_start.var for seen in own]),
        ):
            axes.plot(DEPTHS, np.median(each, axis=0), style, color=colour, label=text)
    axes.set_yscale("log")
    experiment.label(axes, "Channels before training", "blocks", "")
    axes.legend(frameon=False, fontsize="x-small")


def draw_update(axes: Axes, found: Networks) -> None:
    """The variances in an update in which the loss explodes, or in the last one."""
    for name, own in found.items():
        seen = next((seen for seen in own if np.isfinite(seen.updates)), own[0])
        for share, moments, style in zip(SHARES, seen.update, (":", "--", "-"), strict=True):
            colour = experiment.NORMALIZED_COLOURS[name]
            axes.plot(DEPTHS, moments.var, color=colour, linestyle=style, label=f"{share:.0%}")
    axes.set_yscale("log")
    experiment.label(axes, "Variance in one update at a rate of 0.1", "blocks", "")
    axes.legend(title="share of it", frameon=False, fontsize="x-small", ncols=2)


def draw_gradient(axes: Axes, name: str, seen: Seen) -> None:
    """The output layer's gradient, images by classes."""
    axes.imshow(seen.gradient, aspect="auto", cmap="PuOr", vmin=-1, vmax=1, interpolation="nearest")
    experiment.label(axes, f"Gradient, {name}", "classes", "images")
    axes.set_xticks(range(CLASSES))


if __name__ == "__main__":
    experiment.run(__doc__, measure, tables, draw, size=(10, 6))
