"""Arrays and options drawn from one seed, in every kind of memory that NumPy has.

An array lies in bytes of its own, between canaries, which are NaN in every element type: before it,
behind it, and between its elements where its strides leave room.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from oracle.arrays import LAYOUTS, channel_axis
from oracle.formulas import ACTIVATIONS

Array = NDArray[Any]
T = TypeVar("T")

CANARY = 0xFF
MARGIN = 64
"""Bytes before and behind an array."""
UNIT_STRIDES = (0, 1, -3, 8, 13, -64, 1 << 40, -(1 << 40) - 7)
"""Of axes of length 1 or 0, whose strides mean nothing."""
STEPS = (1, 1, 1, 1, 1, 2, 3, -1, -1, -2)
BOUNDARIES = (7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65)
AROUND_CHUNKS = (16383, 16384, 16385, 16400)
AROUND_ROWS = (63, 65, 511, 513, 1023, 1024, 1025, 2047, 2049, 4097)
MOST = 1500
"""Values of most arrays."""

HALF, BRAIN = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
SINGLE, DOUBLE = np.dtype(np.float32), np.dtype(np.float64)
EITHER: tuple[np.dtype[Any], ...] = SINGLE, DOUBLE
INTEGERS = tuple(np.dtype(name) for name in ("uint8", "int8", "uint16", "int16"))
PARAMETERS: tuple[np.dtype[Any], ...] = (*EITHER * 4, HALF, BRAIN)
LARGEST_RATIO = {HALF: 1e2, BRAIN: 30.0, SINGLE: 4e5, DOUBLE: 4e11}
"""Of a mean to the deviation, so that the bounds hold for nearly all that is drawn."""
LARGEST_EXPONENT = {HALF: 2.0, BRAIN: 30.0, SINGLE: 30.0, DOUBLE: 140.0}
"""Of ten."""


class Placed(NamedTuple):
    """An array, and the bytes in which it lies."""

    view: Array
    memory: NDArray[np.uint8]

    def words(self) -> str:
        """What matters of where it lies."""
        a, words = self.view, []
        dense = np.ndarray(a.shape, a.dtype).strides
        if a.strides != dense:
            words.append(f"strides {a.strides}")
        if not a.flags.aligned:
            words.append("misaligned")
        if not a.dtype.isnative:
            words.append("byte-swapped")
        if not a.flags.writeable:
            words.append("read-only")
        return ", ".join([f"{a.dtype.name} {a.shape}", *words])


class Source:
    """All that a case draws comes from here, and here from its seed."""

    def __init__(self, seed: int, few: bool = False) -> None:
        self.random, self.values = random.Random(seed), np.random.default_rng(seed)
        self.few = few
        """Few types and options, for a backend that compiles for each."""
        self.odd = self.chance(0.7)
        """Whether arrays lie in odd memory; else they are dense, as the plain entries want them."""

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def choice(self, among: Sequence[T]) -> T:
        return among[int(self.random.random() * len(among))]

    def uniform(self, low: float, high: float) -> float:
        return self.random.uniform(low, high)

    # --- options ----------------------------------------------------------------------------------

    def dtype(self) -> np.dtype[Any]:
        if self.few:
            return self.choice((SINGLE, SINGLE, DOUBLE))
        return self.choice((HALF, BRAIN, SINGLE, SINGLE, SINGLE, DOUBLE, DOUBLE))

    def datum(self) -> np.dtype[Any]:
        """Of data as it comes: mostly integers."""
        return self.choice(INTEGERS) if self.chance(0.6) else self.dtype()

    def layout(self) -> str:
        return self.choice(LAYOUTS)

    def eps(self) -> float:
        return self.choice((1e-5, 1e-5, 1e-3, 0.0, 1.0, 1e-12))

    def activation(self) -> Any:
        if self.chance(0.5):
            return None
        return "relu" if self.few else self.choice(ACTIVATIONS[1:])

    def shape(self, layout: str) -> tuple[int, ...]:
        """Samples, channels and places in the layout's order; mostly small, rank 2 to 6."""
        if self.chance(0.02):
            return in_layout(self._around_chunks(), layout)
        rank = self.choice((2, 2, 3, 3, 4, 4, 4, 5, 6))
        shape = [self.choice((1, 1, 2, 3, 4, 5)) for _ in range(rank)]
        for _ in range(self.choice((0, 1, 1, 2))):
            shape[self.random.randrange(rank)] = self.choice(BOUNDARIES)
        if self.chance(0.05):
            shape[self.random.randrange(rank)] = self.choice((300, 1000, 2500))
        while np.prod(shape) > MOST:
            shape[shape.index(max(shape))] = self.choice((1, 2, 3, *BOUNDARIES[:6]))
        if self.chance(0.03):
            shape[self.random.randrange(rank)] = 0
        return in_layout(shape, layout)

    def _around_chunks(self) -> Sequence[int]:
        places, rows = self.choice(AROUND_CHUNKS), self.choice(AROUND_ROWS)
        return self.choice(
            (
                (1, 1, places),
                (1, 2, places),
                (2, 1, places // 2 + 1),
                (rows, self.choice((1, 2, 3, 5, 16))),
                (rows, 2, 2),
                (3, self.choice((4097, 5001))),
            )
        )

    # --- values -----------------------------------------------------------------------------------

    def batch(self, shape: tuple[int, ...], layout: str, dtype: np.dtype[Any]) -> Array:
        """Values like a network's, or harder; each channel may differ."""
        if dtype.kind in "iu":
            ends = np.iinfo(dtype)
            high = self.choice((ends.max, ends.max, ends.min + 2))
            return self.values.integers(ends.min, high, shape, dtype, endpoint=True)
        axis = channel_axis(len(shape), layout)
        each = [1] * len(shape)
        each[axis] = shape[axis]
        noise, kind = self.noise(shape), self.random.random()
        shift, scale = self.values.normal(size=each), 1.0
        if kind < 0.15:
            shift = (
                shift + self.choice((-1, 1)) * 10 ** self.uniform(0, 1) * LARGEST_RATIO[dtype] / 20
            )
        elif kind < 0.3:
            scale = 10 ** self.uniform(-LARGEST_EXPONENT[dtype], LARGEST_EXPONENT[dtype])
        elif kind < 0.4:
            noise = noise * (self.values.random(each) < 0.6)  # channels that are constant
        elif kind < 0.45 and noise.size:
            noise.flat[self.random.randrange(noise.size)] = 10 ** self.uniform(0, 4)
        with np.errstate(over="ignore"):
            x = ((noise + shift) * scale).astype(dtype)
        if self.chance(0.03) and x.size:
            x.flat[self.random.randrange(x.size)] = self.choice((np.nan, np.inf, -np.inf))
        return x

    def noise(self, shape: Sequence[int]) -> Array:
        kind = self.random.random()
        if kind < 0.7:
            return self.values.normal(size=shape)
        if kind < 0.8:
            return self.values.integers(-3, 4, shape).astype(float)
        if kind < 0.9:
            return self.values.choice([-1.0, 1.0], shape)
        return np.where(self.values.random(shape) < 0.9, 0, self.values.normal(size=shape))

    def gradient(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """dy or its like."""
        dy = self.noise(shape)
        if self.chance(0.2):
            dy = dy + self.uniform(-30, 30)
        if self.chance(0.1):
            dy = dy * 10 ** (self.uniform(-1, 1) * min(LARGEST_EXPONENT[dtype], 20))
        dy = dy.astype(dtype)
        if self.chance(0.02) and dy.size:
            dy.flat[self.random.randrange(dy.size)] = self.choice((np.nan, np.inf))
        return dy

    def activated(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """A forward's y, kinks and NaN among its values."""
        y = self.values.normal(2, 3, shape)
        for value in (0.0, -0.0, 6.0):
            y[self.values.random(shape) < 0.1] = value
        if self.chance(0.05):
            y[self.values.random(shape) < 0.1] = np.nan
        return y.astype(dtype)

    def vector(self, channels: int) -> Array:
        """gamma or its like."""
        size = self.choice((1.0, 1.0, 1.0, 1e-3, 1e3))
        values = self.values.normal(size=channels) * size
        if self.chance(0.2):
            values[self.values.random(channels) < 0.3] = 0
        return values.astype(self.choice(PARAMETERS))

    def mask(self, shape: tuple[int, ...], layout: str) -> Array:
        """Which places count, in any shape that broadcasts."""
        single = list(shape)
        single[channel_axis(len(shape), layout)] = 1
        for axis in range(len(single)):
            if self.chance(0.2):
                single[axis] = min(single[axis], 1)
        while len(single) > 1 and single[0] == 1 and self.chance(0.3):
            single = single[1:]
        kept = self.choice((0.2, 0.7, 0.7, 0.95, 1.0 if self.chance(0.5) else 0.0))
        return np.asarray(self.values.random(single) < kept)

    def weights(self, samples: int) -> Array:
        """How much samples count."""
        kind = self.random.random()
        if kind < 0.2:
            w = np.ones(samples)
        elif kind < 0.4:
            w = self.values.integers(0, 4, samples).astype(float)
        elif kind < 0.6:
            w = np.exp(3 * self.values.normal(size=samples))
            w /= w.sum() if samples else 1
        else:
            w = self.values.random(samples) * self.choice((1.0, 1e-3, 1e6, 2.0**-40))
        if self.chance(0.3):
            w[self.values.random(samples) < 0.3] = 0
        if self.chance(0.05):
            return np.asarray(w / w.max(initial=1) * self.choice((1e300, 1e-300)))
        return np.asarray(w, self.choice(EITHER))

    # --- memory -----------------------------------------------------------------------------------

    def place(self, values: Array, *, written: bool = False) -> Placed:
        """The values somewhere; what is written lies in native order, each value by itself."""
        if not self.odd or self.chance(0.4):
            memory = np.full(values.nbytes + 2 * MARGIN, CANARY, np.uint8)
            view = np.ndarray(values.shape, values.dtype, memory.data, MARGIN)
            view[...] = values
            return Placed(view, memory)
        size, dtype = values.itemsize, values.dtype
        if not written and dtype.kind in "fiu" and self.chance(0.1):
            dtype = dtype.newbyteorder("S")
        strides, repeated = self._strides(values.shape, size, written)
        if repeated is not None:
            values = values.take([0], repeated)
        reach = [
            (n - 1) * s for n, s in zip(values.shape, strides, strict=True) if n > 1 and values.size
        ]
        low, high = sum(r for r in reach if r < 0), sum(r for r in reach if r > 0)
        start = MARGIN + (self.random.randrange(size) if self.chance(0.15) else 0)
        start += size if self.chance(0.3) else 0
        memory = np.full(start - low + high + size + MARGIN, CANARY, np.uint8)
        view = np.ndarray(values.shape, dtype, memory.data, start - low, strides)
        view[...] = values
        if repeated is not None:
            shape = [n if axis != repeated else self._length for axis, n in enumerate(view.shape)]
            view = np.ndarray(shape, dtype, memory.data, start - low, strides)
        if not written and self.chance(0.1):
            view.flags.writeable = False
        return Placed(view, memory)

    def _strides(
        self, shape: tuple[int, ...], size: int, written: bool
    ) -> tuple[list[int], int | None]:
        """Odd strides of an array, and the axis along which it is repeated by a stride of 0."""
        order, strides, reach = list(range(len(shape))), [0] * len(shape), size
        if self.chance(0.25):
            self.random.shuffle(order)
        elif self.chance(0.15):
            order = order[:1] + order[2:] + order[1:2]  # channels last, or what would be
        repeated = None
        real = [axis for axis in order if shape[axis] > 1]
        if not written and real and self.chance(0.06):
            repeated = self.choice(real)
            self._length = shape[repeated]
        for axis in reversed(order):
            if axis == repeated:
                continue
            if shape[axis] <= 1 or 0 in shape:
                strides[axis] = self.choice(UNIT_STRIDES)
                continue
            step = self.choice(STEPS)
            reach *= abs(step)
            if self.chance(0.1):
                reach += self.choice((1, 2, 3, 7)) * (1 if self.chance(0.1) else size)
            strides[axis] = reach if step > 0 else -reach
            reach *= shape[axis]
        return strides, repeated


def in_layout(shape: Sequence[int], layout: str) -> tuple[int, ...]:
    """An NCHW shape in the layout's order."""
    n, c, *places = shape
    return (n, c, *places) if layout == "NCHW" else (n, *places, c)
