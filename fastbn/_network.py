"""A small network on NumPy and fastbn alone: dense layers, batch norm, sigmoids, softmax.

The network of Ioffe & Szegedy (2015), section 4.1, and the worked example of training with fastbn
and then serving what was trained: read `BatchNorm` first.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastbn

Array = NDArray[Any]

WEIGHT_SPREAD = 0.1  # standard deviation of the initial weights
AVERAGING = 0.05  # share of the newest batch in the running statistics


class Layer:
    """What every layer can do; only batch norm serves otherwise than it trains."""

    parameters: Sequence[Array] = ()
    gradients: Sequence[Any] = ()  # of the loss, one for each parameter

    def forward(self, x: Array) -> Array:
        """The layer's output for a training batch; it keeps what `backward` needs."""
        raise NotImplementedError

    def backward(self, dy: Array) -> Array:
        """The loss's gradient by the input, from that by the output; sets `gradients`."""
        raise NotImplementedError

    def update(self, rate: float) -> None:
        """One step of gradient descent, in place."""
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter -= rate * gradient

    def serve(self, x: Array) -> Array:
        """The output once training is over."""
        return self.forward(x)


class Dense(Layer):
    """``y = x @ weight + bias``."""

    def __init__(self, inputs: int, outputs: int, rng: np.random.Generator) -> None:
        self.weight = rng.normal(0, WEIGHT_SPREAD, (inputs, outputs)).astype(np.float32)
        self.bias = np.zeros(outputs, np.float32)
        self.parameters = self.weight, self.bias

    def forward(self, x: Array) -> Array:
        self.x = x
        return x @ self.weight + self.bias

    def backward(self, dy: Array) -> Array:
        self.gradients = self.x.T @ dy, dy.sum(axis=0)
        return dy @ self.weight.T


class BatchNorm(Layer):
    """Batch norm, perhaps with an activation: trains on the statistics of each batch, serves with
    their running averages."""

    def __init__(
        self, channels: int, *, layout: str = "NCHW", activation: str | None = None
    ) -> None:
        self.layout, self.activation = layout, activation
        self.gamma = np.ones(channels, np.float32)
        self.beta = np.zeros(channels, np.float32)
        self.parameters = self.gamma, self.beta
        self.running_mean = np.zeros(channels)
        self.running_var = np.ones(channels)

    def forward(self, x: Array) -> Array:
        y, mean, var = fastbn.batch_norm(
            x, self.gamma, self.beta, layout=self.layout, activation=self.activation
        )
        self.x, self.mean, self.var = x, mean, var
        self.y = y if self.activation else None  # the gradient through an activation needs it
        n = x.size // len(mean)  # values a channel
        self.running_mean += AVERAGING * (mean - self.running_mean)
        self.running_var += AVERAGING * (var * n / max(n - 1, 1) - self.running_var)  # unbiased
        return y

    def backward(self, dy: Array) -> Array:
        dx, *self.gradients = fastbn.batch_norm_backward(
            dy,
            self.x,
            self.mean,
            self.var,
            self.gamma,
            layout=self.layout,
            activation=self.activation,
            y=self.y,
        )
        return dx

    def serve(self, x: Array) -> Array:
        return fastbn.normalize(
            x,
            self.running_mean,
            self.running_var,
            self.gamma,
            self.beta,
            layout=self.layout,
            activation=self.activation,
        )


class Sigmoid(Layer):
    """``y = 1 / (1 + exp(-x))``."""

    def forward(self, x: Array) -> Array:
        self.y = 0.5 + 0.5 * np.tanh(0.5 * x)  # the same, and never overflows
        return self.y

    def backward(self, dy: Array) -> Array:
        return dy * self.y * (1 - self.y)


class Network:
    """Layers one after the other, for images or rows of features, and scores of classes."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers

    def backpropagate(self, x: Array, labels: Array) -> None:
        """Set every layer's gradients, of a batch's mean cross-entropy with the labels."""
        for layer in self.layers:
            x = layer.forward(x)
        dy = cross_entropy_gradient(x, labels)
        for layer in reversed(self.layers):
            dy = layer.backward(dy)

    def train(self, x: Array, labels: Array, rate: float) -> None:
        """One step of stochastic gradient descent on a batch."""
        self.backpropagate(x, labels)
        for layer in self.layers:
            layer.update(rate)

    def scores(self, x: Array) -> Array:
        """What each class scores once training is over."""
        for layer in self.layers:
            x = layer.serve(x)
        return x

    def serve(self, x: Array) -> Array:
        """The most probable class of each of `x`."""
        labels: Array = self.scores(x).argmax(axis=1)
        return labels


def sigmoids(sizes: Sequence[int], *, batch_norm: bool, seed: int) -> Network:
    """Hidden layers of sigmoids, batch-normalized or not, and a softmax over the classes."""
    rng = np.random.default_rng(seed)
    *widths, classes = sizes
    layers: list[Layer] = []
    for inputs, outputs in pairwise(widths):
        layers.append(Dense(inputs, outputs, rng))
        if batch_norm:
            layers.append(BatchNorm(outputs))
        layers.append(Sigmoid())
    return Network([*layers, Dense(widths[-1], classes, rng)])


def softmax(scores: Array) -> Array:
    """The probabilities of the classes, in rows."""
    p: Array = np.exp(scores - scores.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return p


def cross_entropy_gradient(scores: Array, labels: Array) -> Array:
    """Gradient by `scores` of their softmax's cross-entropy with the labels, mean of the batch."""
    p = softmax(scores)
    p[np.arange(len(labels)), labels] -= 1
    return p / len(labels)
