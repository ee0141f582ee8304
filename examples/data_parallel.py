"""Data-parallel training on handwritten digits, with batch norm over all ranks and over each alone.

    mpiexec -n 4 python -m mpi4py examples/data_parallel.py [--quick] [--output PATH]
    torchrun --nproc-per-node 4 examples/data_parallel.py

On 1, 2 or 4 ranks: batches of 16 digits are shared out among them, and gradients are added up. What
is gathered are statistics and gradients of every 4 digits, and they are merged and added in the
order of digits: with batch norm over all ranks the loss is the same, bit by bit, on any of these
numbers of ranks. Beside it is the same network whose norms go by each rank's own digits, as they do
where nothing is synchronized: on 4 ranks by 4 of them.

The network has two hidden layers of 100 ReLUs, a norm before each, and learns by plain gradient
descent.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from copy import copy
from functools import partial, reduce
from hashlib import sha256
from typing import Any, NamedTuple

import experiment
import numpy as np
from experiment import RunningNorm
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import fastbn
from fastbn import distributed
from fastbn.demo import HELD_OUT, Digits, load_digits, table_of
from fastbn.demo.network import (
    Array,
    Layer,
    Network,
    ReLU,
    cross_entropy_gradient,
    perceptron,
    softmax,
)
from fastbn.distributed import Communicator

BATCH, GROUP = 16, 4
STEPS, QUICK_STEPS = 1500, 20
RATE, SEED = 0.05, 0
SIZES = (64, 100, 100, 10)  # pixels, hidden layers, classes
SPREAD = np.sqrt(2 / 100)  # He et al. (2015), for 100 inputs
ALL, OWN = "all ranks' digits", "each rank's own"
COLOURS = {ALL: experiment.BLUE, OWN: experiment.VERMILION}
TIMED = 50  # calls


def connected() -> Communicator:
    """All ranks that were started: by torchrun, by mpiexec, or this one alone."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        import torch

        torch.distributed.init_process_group("gloo")
        return distributed.process_group(timeout=60)
    return distributed.mpi(timeout=60) if "mpi4py" in sys.modules else distributed.one_process()


class Counted:
    """A communicator that counts what goes through it."""

    def __init__(self, comm: Communicator) -> None:
        self.comm, self.rank, self.size, self.timeout = comm, comm.rank, comm.size, comm.timeout
        self.gathers, self.bytes = 0, 0

    def allgather(self, array: Array) -> Array:
        self.gathers += 1
        self.bytes += array.nbytes
        return self.comm.allgather(array)


def total(comm: Communicator, groups: Array) -> Array:
    """The sum over all ranks' groups, in their order."""
    gathered = comm.allgather(groups)
    return reduce(np.add, gathered.reshape(-1, *groups.shape[1:]))


class Grouped(Layer):
    """A layer that takes each group of samples by itself, since products of matrices round
    otherwise where they have more rows; its gradients are those of all ranks."""

    def __init__(self, layer: Layer, comm: Communicator) -> None:
        self.layer, self.comm = layer, comm
        self.parameters = layer.parameters

    def forward(self, x: Array) -> Array:
        parts = np.split(x, len(x) // GROUP)
        self.twins = [copy(self.layer) for _ in parts]  # with the same parameters
        return np.concatenate([a.forward(part) for a, part in zip(self.twins, parts, strict=True)])

    def backward(self, dy: Array) -> Array:
        parts = np.split(dy, len(self.twins))
        dx = [a.backward(part) for a, part in zip(self.twins, parts, strict=True)]
        each = zip(*(twin.gradients for twin in self.twins), strict=True)
        self.gradients = [total(self.comm, np.stack(groups)) for groups in each]
        return np.concatenate(dx)

    def serve(self, x: Array) -> Array:
        return self.layer.serve(x)


class OwnNorm(RunningNorm):
    """Batch norm by this rank's samples; the gradients of its parameters are those of all."""

    def __init__(self, layer: fastbn.BatchNorm, comm: Communicator) -> None:
        super().__init__(layer)
        self.comm = comm

    def backward(self, dy: Array) -> Array:
        dx = super().backward(dy)
        self.gradients = tuple(total(self.comm, a[None]) for a in self.gradients)
        return dx


def over_all(channels: int, comm: Communicator) -> RunningNorm:
    options: dict[str, Any] = {"merge_every": GROUP, "gradients": "sum"}
    return RunningNorm(distributed.SyncBatchNorm(channels, comm=comm, **options))


def over_own(channels: int, comm: Communicator) -> RunningNorm:
    return OwnNorm(fastbn.BatchNorm(channels), comm)


WAYS: dict[str, Callable[[int, Communicator], RunningNorm]] = {ALL: over_all, OWN: over_own}


class Found(NamedTuple):
    """What one way of normalizing gave."""

    losses: list[float]
    error: float
    """Percent of the held-out digits."""
    gathers: float
    """By the norms, a step."""
    sent: float
    """Bytes by the norms of a rank, a step."""
    time: float
    """Microseconds of a norm's forward and backward."""


def train(comm: Communicator, norms: Counted, way: str, digits: Digits, steps: int) -> Found:
    """A network, each rank by its share of every batch."""
    layers = perceptron(SIZES, norm=None, seed=SEED, unit=ReLU, spread=SPREAD).layers
    with_norms: list[Layer] = []
    for layer in layers:
        if isinstance(layer, ReLU):
            with_norms.append(WAYS[way](SIZES[1], norms))
        with_norms.append(Grouped(layer, comm))
    network = Network(with_norms)
    share = BATCH // comm.size
    mine = slice(comm.rank * share, (comm.rank + 1) * share)
    batches = experiment.batches(digits, BATCH, steps, SEED)
    losses = [step(network, comm, x[mine], labels[mine]) for x, labels in batches]
    error = 100 * (1 - network.accuracy(digits.test_x, digits.test_labels))
    sent = norms.gathers / steps, norms.bytes / steps
    return Found(losses, error, *sent, timed(WAYS[way](SIZES[1], norms).layer, share))


def step(network: Network, comm: Communicator, x: Array, labels: Array) -> float:
    """Descend by the gradient of all ranks' samples; gives the mean of their losses."""
    scores = network.chain.forward(x)
    groups = len(x) // GROUP
    pairs = list(zip(np.split(scores, groups), np.split(labels, groups), strict=True))
    chances = [softmax(some)[np.arange(GROUP), known] for some, known in pairs]
    dy = np.concatenate([cross_entropy_gradient(*pair) for pair in pairs])
    network.chain.backward(dy / np.float32(groups * comm.size))
    network.chain.update(RATE)
    return float(-np.log(comm.allgather(np.stack(chances)).astype(np.float64)).mean())


def timed(layer: fastbn.BatchNorm, samples: int) -> float:
    """The median time of a forward and a backward, in microseconds."""
    x = np.random.default_rng(SEED).normal(size=(samples, SIZES[1])).astype(np.float32)
    times = []
    for _ in range(TIMED):
        start = time.perf_counter()
        layer(x)
        layer.backward(x)
        times.append(time.perf_counter() - start)
    return float(1e6 * np.median(times))


def table(found: dict[str, Found], ranks: int) -> Table:
    """What each way gave."""
    shown = table_of(f"batch norm (ranks: {ranks}) by", list(found))
    rows: dict[str, Callable[[Found], str]] = {
        "loss, of the last 100 steps": lambda a: f"{np.mean(a.losses[-100:]):.4f}",
        f"errors on {HELD_OUT} held-out digits, %": lambda a: f"{a.error:.1f}",
        "gathers a step, of two norms": lambda a: f"{a.gathers:.0f}",
        "bytes that a rank sends a step": lambda a: f"{a.sent:.0f}",
        "bytes that it receives": lambda a: f"{a.sent * (ranks - 1):.0f}",
        "forward and backward of a norm, us": lambda a: f"{a.time:.0f}",
    }
    for name, text in rows.items():
        shown.add_row(name, *map(text, found.values()))
    return shown


def draw(found: dict[str, Found], figure: Figure) -> None:
    """The losses, averaged over some steps."""
    axes = figure.subplots()
    for name, each in found.items():
        width = max(len(each.losses) // 50, 1)
        means = np.reshape(each.losses[: len(each.losses) // width * width], (-1, width)).mean(1)
        steps = width * np.arange(1, len(means) + 1)
        axes.plot(steps, means, color=COLOURS[name], linewidth=1.8, label=f"by {name}")
    axes.set_yscale("log")
    experiment.label(axes, "Training loss", "step", "cross-entropy")
    axes.legend(frameon=False)


def main() -> None:
    arguments = experiment.parse(__doc__)
    comm, digits = connected(), load_digits()
    if BATCH // GROUP % comm.size:
        sys.exit(f"{comm.size} ranks, expected 1, 2 or 4: each takes whole groups of {GROUP}")
    steps = QUICK_STEPS if arguments.quick else STEPS
    with experiment.repeatable():
        found = {way: train(comm, Counted(comm), way, digits, steps) for way in WAYS}
    if comm.rank == 0:
        console = Console()
        console.print(table(found, comm.size))
        digest = sha256(np.array(found[ALL].losses).tobytes()).hexdigest()[:16]
        console.print(f"The {steps} losses by {ALL}: {digest}, on any number of ranks")
        experiment.save(partial(draw, found), arguments.output, (6, 4))
        console.print(f"Plot: {arguments.output}", soft_wrap=True)


if __name__ == "__main__":
    main()
