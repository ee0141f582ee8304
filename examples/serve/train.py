"""Train the service's network on scikit-learn's digits, and store it.

python examples/serve/train.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from network import SIDE, Trained, store
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from threadpoolctl import threadpool_limits

import fastbn
from fastbn.demo import load_digits, what_runs
from fastbn.demo.network import Layer

MODEL = Path(__file__).with_name("model.npz")
SEED = 0
EPOCHS = 6
BATCH = 64
RATE = 0.05  # at first; it falls to 0 step by step
MOMENTUM = 0.9


class Momentum:
    """Stochastic gradient descent that remembers where it was going."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self.velocities = [[np.zeros_like(p) for p in layer.parameters] for layer in layers]

    def step(self, rate: float) -> None:
        """Move every parameter, in place."""
        for layer, velocities in zip(self.layers, self.velocities, strict=True):
            each = zip(layer.parameters, layer.gradients, velocities, strict=True)
            for parameter, gradient, velocity in each:
                velocity *= MOMENTUM
                velocity -= rate * gradient
                parameter += velocity


def train(epochs: int, console: Console) -> Trained:
    """Train for so many epochs, with a progress bar, and tell how well it went."""
    train_x, train_labels, test_x, test_labels = load_digits()
    train_x, test_x = (x.reshape(-1, SIDE, SIDE, 1) for x in (train_x, test_x))
    network, rng = Trained(SEED), np.random.default_rng(SEED)
    momentum = Momentum(network.layers)
    batches = len(train_x) // BATCH
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("epochs"))
    # Arrays this small gain nothing from threads, which wait for each other.
    with (
        Progress(*columns, console=console) as progress,
        threadpool_limits(1, "blas"),
        fastbn.use_num_threads(1),
    ):
        for epoch in progress.track(range(epochs)):
            order = rng.permutation(len(train_x))[: batches * BATCH]
            for i, batch in enumerate(np.split(order, batches)):
                network.backpropagate(train_x[batch], train_labels[batch])
                momentum.step(RATE * (1 - (epoch + i / batches) / epochs))
        seen, unseen = (
            network.accuracy(x, labels)
            for x, labels in ((train_x, train_labels), (test_x, test_labels))
        )
        console.print(f"trained by {what_runs()}: {seen:.1%} of its digits, {unseen:.1%} held out")
    return network


def ready(model: Path) -> Path:
    """The path of a stored network, which is trained now where there is none."""
    if not model.exists():
        store(train(EPOCHS, Console(stderr=True)), model)
    return model


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the network and store it.")
    parser.add_argument("--output", type=Path, default=MODEL, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="default: %(default)s")
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse()
    store(train(arguments.epochs, Console(stderr=True)), arguments.output)


if __name__ == "__main__":
    main()
