"""The network of the service, on NumPy and fastbn: as it is trained, and as it is served.

A 3x3 convolution, pre-activation blocks (He et al. 2016), means of 2x2 pixels, dense layers:

    conv, [x + conv(relu(norm(x)))] * 3, pool, [relu(norm(dense(x)))] * 2, dense

Batch norm after a dense layer folds into its weights. Batch norm at the head of a block folds
nowhere: ReLU stands behind it, and what stands before it is the shortcut's too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastbn
from fastbn.demo.network import (
    BatchNorm,
    Convolution,
    Dense,
    Network,
    Pool,
    Residual,
    convolve,
    pool,
    softmax,
)

Array = NDArray[Any]
Norm = Callable[[Array], Array]

SIDE = 8  # pixels
BRIGHTEST = 16  # pixels are from 0 to 16, as in scikit-learn's digits
CHANNELS = 16
BLOCKS = 3
WIDTHS = (CHANNELS * (SIDE // 2) ** 2, 128, 64)  # after the pooling, and of the hidden layers
CLASSES = 10

STATISTICS = ("mean", "var", "gamma", "beta")  # as fastbn's arguments
NORMALIZATIONS = ("fastbn", "numpy")
EPS = 1e-5  # fastbn's default


class Block(Residual):
    """``x + conv(relu(norm(x)))``."""

    def __init__(self, channels: int, rng: np.random.Generator) -> None:
        self.norm = BatchNorm(channels, layout="NHWC", activation="relu")
        self.convolution = Convolution(channels, channels, rng)
        super().__init__([self.norm, self.convolution])


class Trained(Network):
    """The network in training."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.stem = Convolution(1, CHANNELS, rng)
        self.blocks = [Block(CHANNELS, rng) for _ in range(BLOCKS)]
        self.hidden = [
            (Dense(inputs, outputs, rng), BatchNorm(outputs, activation="relu"))
            for inputs, outputs in pairwise(WIDTHS)
        ]
        self.last = Dense(WIDTHS[-1], CLASSES, rng)
        hidden = (layer for pair in self.hidden for layer in pair)
        super().__init__([self.stem, *self.blocks, Pool(), *hidden, self.last])

    def arrays(self) -> dict[str, Array]:
        """What `Served` needs: kernels, the blocks' statistics, dense layers with theirs folded."""
        arrays = {"stem": self.stem.kernel}
        for i, block in enumerate(self.blocks):
            arrays[f"kernel{i}"] = block.convolution.kernel
            named = zip(STATISTICS, statistics(block.norm), strict=True)
            arrays |= {f"{name}{i}": vector for name, vector in named}
        for i, (dense, norm) in enumerate(self.hidden):
            # fold_into_linear takes weights as (outputs, inputs).
            folded = fastbn.fold_into_linear(dense.weight.T, dense.bias, *statistics(norm), eps=EPS)
            arrays |= {f"weight{i}": folded.weight.T, f"bias{i}": folded.bias}
        i = len(self.hidden)
        return arrays | {f"weight{i}": self.last.weight, f"bias{i}": self.last.bias}


def statistics(norm: BatchNorm) -> tuple[Array, Array, Array, Array]:
    """Batch norm's fixed vectors, in the order of `STATISTICS`."""
    return norm.running_mean, norm.running_var, norm.gamma, norm.beta


class Served:
    """The trained network: from images to probabilities, in any number of threads.

    Parameters
    ----------
    arrays : mapping of str to ndarray
        As `Trained.arrays` gives them; an ``.npz`` file of them is one.
    normalization : {"fastbn", "numpy"}
        By what the blocks normalize: fastbn, or NumPy expressions, to compare with.
    """

    def __init__(self, arrays: Mapping[str, Array], normalization: str = "fastbn") -> None:
        norm = {"fastbn": fastbn_norm, "numpy": numpy_norm}[normalization]
        self.stem = arrays["stem"]
        self.blocks = [
            (norm(*(arrays[f"{name}{i}"] for name in STATISTICS)), arrays[f"kernel{i}"])
            for i in range(BLOCKS)
        ]
        *self.hidden, self.last = (
            (arrays[f"weight{i}"], arrays[f"bias{i}"]) for i in range(len(WIDTHS))
        )

    def __call__(self, images: Array) -> Array:
        """The probabilities (N, 10) of the digits, of (N, 8, 8) images."""
        x = convolve((images / BRIGHTEST).astype(np.float32)[..., None], self.stem)
        for norm, kernel in self.blocks:
            x += convolve(norm(x), kernel)
        x = pool(x)
        for weight, bias in self.hidden:
            x = np.maximum(x @ weight + bias, 0)
        weight, bias = self.last
        return softmax(x @ weight + bias)


def fastbn_norm(mean: Array, var: Array, gamma: Array, beta: Array) -> Norm:
    """Batch norm and ReLU by fastbn, in one pass over memory."""
    return fastbn.FrozenBatchNorm(mean, var, gamma, beta, eps=EPS, layout="NHWC", activation="relu")


def numpy_norm(mean: Array, var: Array, gamma: Array, beta: Array) -> Norm:
    """The same by NumPy expressions, with all that can be computed once."""
    scale = gamma / np.sqrt(var + EPS)
    shift = beta - mean * scale
    scale, shift = scale.astype(np.float32), shift.astype(np.float32)
    return lambda x: np.maximum(x * scale + shift, 0)


def store(network: Trained, path: Path) -> None:
    """Write what is served; the file is there whole or not at all."""
    unfinished = path.with_suffix(f".{os.getpid()}.npz")
    np.savez(unfinished, **network.arrays())  # type: ignore[arg-type]
    unfinished.replace(path)


def load(path: Path, normalization: str = "fastbn") -> Served:
    """Read what `store` wrote."""
    with np.load(path, allow_pickle=False) as file:
        return Served(dict(file), normalization)
