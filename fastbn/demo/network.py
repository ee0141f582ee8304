"""Small networks on NumPy and fastbn alone: dense layers, convolutions, batch norm, softmax.

Among them the network of Ioffe & Szegedy (2015), section 4.1, and the worked example of training
with fastbn and then serving what was trained: read `BatchNorm` first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
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

    def __init__(
        self,
        inputs: int,
        outputs: int,
        rng: np.random.Generator,
        *,
        spread: float = WEIGHT_SPREAD,
    ) -> None:
        self.weight = rng.normal(0, spread, (inputs, outputs)).astype(np.float32)
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


class Convolution(Layer):
    """A 3x3 convolution."""

    def __init__(self, inputs: int, outputs: int, rng: np.random.Generator) -> None:
        spread = np.sqrt(2 / (9 * inputs))  # He et al. (2015), for ReLU
        self.kernel = rng.normal(0, spread, (3, 3, inputs, outputs)).astype(np.float32)
        self.parameters = (self.kernel,)

    def forward(self, x: Array) -> Array:
        self.x = x
        return convolve(x, self.kernel)

    def backward(self, dy: Array) -> Array:
        gradient: Array = patches(self.x).T @ dy.reshape(-1, dy.shape[-1])
        self.gradients = (gradient.reshape(self.kernel.shape),)
        # A pixel of x went to its neighbours: the kernel, turned around.
        return convolve(dy, self.kernel[::-1, ::-1].swapaxes(2, 3))


class Pool(Layer):
    """Means of 2x2 pixels, as rows of features."""

    def forward(self, x: Array) -> Array:
        self.shape = x.shape
        return pool(x)

    def backward(self, dy: Array) -> Array:
        dx = np.empty(self.shape, dy.dtype)
        n, height, width, channels = self.shape
        quarters(dx)[...] = dy.reshape(n, height // 2, 1, width // 2, 1, channels) / 4
        return dx


class ReLU(Layer):
    """``y = max(x, 0)``."""

    def forward(self, x: Array) -> Array:
        self.y: Array = np.maximum(x, 0)
        return self.y

    def backward(self, dy: Array) -> Array:
        return dy * (self.y > 0)


class Chain(Layer):
    """Layers one after the other, as a layer."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self.parameters = [each for layer in layers for each in layer.parameters]

    def forward(self, x: Array) -> Array:
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, dy: Array) -> Array:
        for layer in reversed(self.layers):
            dy = layer.backward(dy)
        self.gradients = [each for layer in self.layers for each in layer.gradients]
        return dy

    def serve(self, x: Array) -> Array:
        for layer in self.layers:
            x = layer.serve(x)
        return x


class Residual(Chain):
    """``x + layers(x)`` (He et al. 2016)."""

    def forward(self, x: Array) -> Array:
        return x + super().forward(x)

    def backward(self, dy: Array) -> Array:
        return dy + super().backward(dy)

    def serve(self, x: Array) -> Array:
        return x + super().serve(x)


class Network:
    """Layers one after the other, for images or rows of features, and scores of classes."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self.chain = Chain(layers)

    def backpropagate(self, x: Array, labels: Array) -> None:
        """Set every layer's gradients, of a batch's mean cross-entropy with the labels."""
        scores = self.chain.forward(x)
        self.chain.backward(cross_entropy_gradient(scores, labels))

    def train(self, x: Array, labels: Array, rate: float) -> None:
        """One step of stochastic gradient descent on a batch."""
        self.backpropagate(x, labels)
        self.chain.update(rate)

    def scores(self, x: Array) -> Array:
        """What each class scores once training is over."""
        return self.chain.serve(x)

    def serve(self, x: Array) -> Array:
        """The most probable class of each of `x`."""
        labels: Array = self.scores(x).argmax(axis=1)
        return labels

    def accuracy(self, x: Array, labels: Array) -> float:
        """The share of the labels that it gets right."""
        return float(np.mean(self.serve(x) == labels))


def perceptron(
    sizes: Sequence[int],
    *,
    norm: Callable[[int], Layer] | None,
    seed: int,
    unit: Callable[[], Layer] = Sigmoid,
    spread: float = WEIGHT_SPREAD,
) -> Network:
    """Hidden layers of units, each after a norm or not, and a softmax over the classes."""
    rng = np.random.default_rng(seed)
    *widths, classes = sizes
    layers: list[Layer] = []
    for inputs, outputs in pairwise(widths):
        layers.append(Dense(inputs, outputs, rng, spread=spread))
        if norm:
            layers.append(norm(outputs))
        layers.append(unit())
    return Network([*layers, Dense(widths[-1], classes, rng, spread=spread)])


def patches(x: Array) -> Array:
    """The 3x3 neighbourhood of every pixel, zeros beyond the edge: (N, H, W, C) to rows of 9 C."""
    n, height, width, channels = x.shape
    padded = np.zeros((n, height + 2, width + 2, channels), x.dtype)
    padded[:, 1:-1, 1:-1] = x
    windows = sliding_window_view(padded, (3, 3), axis=(1, 2))
    rows: Array = windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, 9 * channels)
    return rows


def convolve(x: Array, kernel: Array) -> Array:
    """Convolve (N, H, W, C) images with a (3, 3, C, outputs) kernel."""
    y: Array = patches(x) @ kernel.reshape(-1, kernel.shape[-1])
    return y.reshape(*x.shape[:-1], -1)


def quarters(x: Array) -> Array:
    """A view of images as 2x2 pixels on axes 2 and 4."""
    n, height, width, channels = x.shape
    return x.reshape(n, height // 2, 2, width // 2, 2, channels)


def pool(x: Array) -> Array:
    """Means of 2x2 pixels, as rows of features."""
    q = quarters(x)
    sums = q[:, :, 0, :, 0] + q[:, :, 0, :, 1] + q[:, :, 1, :, 0] + q[:, :, 1, :, 1]
    return 0.25 * sums.reshape(len(x), -1)


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
