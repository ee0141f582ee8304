"""Element types: `wide` and `single` read values of any, `narrow` writes them.

float16 and bfloat16 are in memory alone. They are converted here, float16 by the processor where it
can, else by integer operations, which LLVM makes vectors of.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import extending

from fastbn.backends.numba.compiling import BRAIN, HALF
from fastbn.backends.numba.instructions import intrinsic


@intrinsic
def _bits(context: Any, value: Any, like: Any) -> Any:
    """The last bits of a value, as many as the type of `like` has, as that type."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        result, bits = context.get_value_type(like), ir.IntType(like.bitwidth)
        number = args[0]
        if isinstance(number.type, ir.IntType) and number.type != bits:
            number = builder.trunc(number, bits)
        return builder.bitcast(number, result)

    return like(value, like), generate


_CONVERTS = bool(binding.get_host_cpu_features().get("f16c"))
"""Whether the processor converts float16; else integer operations do."""


@intrinsic
def _from_half(context: Any, value: Any) -> Any:
    """The float32 of float16's bits, by the processor."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(HALF), generate


@intrinsic
def _to_half(context: Any, value: Any) -> Any:
    """The bits of the float16 nearest to a float32, by the processor."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return HALF(types.float32), generate


def wide(value: Any) -> Any:
    """A value of any element type in float64: exactly."""


@extending.overload(wide, strict=False)
def _wide(value: Any) -> Any:
    if value == BRAIN:
        return lambda value: np.float64(_bits((value & 0xFFFF) << 16, np.float32(0)))
    if value == HALF and _CONVERTS:
        return lambda value: np.float64(_from_half(value))
    return _wide_half if value == HALF else lambda value: np.float64(value)


def _wide_half(value: Any) -> Any:
    # The exponents are 1008 apart: a power of two is exact, for numbers below the normal ones too.
    size = np.int64(value & 0x7FFF)
    number = _bits(size << 42, 0.0) * 2.0**1008
    number = number if size < 0x7C00 else _bits(size << 42 | 0x7FF << 52, 0.0)
    return -number if value & 0x8000 else number


def single(value: Any) -> Any:
    """A value of any element type but float64 in float32: exactly."""


@extending.overload(single, strict=False)
def _single(value: Any) -> Any:
    return lambda value: np.float32(wide(value))


def narrow(value: Any, like: Any) -> Any:
    """A number as an element like another: the nearest, and of two the even one; a half by way of
    float32."""


@extending.overload(narrow, strict=False)
def _narrow(value: Any, like: Any) -> Any:
    if like == BRAIN:
        return _narrow_brain
    if like == HALF and _CONVERTS:
        return lambda value, like: _to_half(np.float32(value))
    if like == HALF:
        return _narrow_half
    return lambda value, like: type(like)(value)


def _narrow_brain(value: Any, like: Any) -> Any:
    bits = np.int64(_bits(np.float32(value), np.uint32(0)))
    rounded = bits + 0x7FFF + (bits >> 16 & 1)
    return np.int16((rounded if value == value else bits | 0x400000) >> 16)


def _narrow_half(value: Any, like: Any) -> Any:
    bits = np.int64(_bits(np.float32(value), np.uint32(0)))
    size = bits & 0x7FFFFFFF
    normal = size - (112 << 23) + 0xFFF + (size >> 13 & 1) >> 13
    # Below the normal numbers, 1/2 is added: its last bits are those that float16 keeps.
    tiny = np.int64(_bits(_bits(size, np.float32(0)) + np.float32(0.5), np.uint32(0))) - (126 << 23)
    half: Any = normal if size >= 113 << 23 else tiny
    half = half if size < 143 << 23 else 0x7C00
    return np.uint16((half if value == value else 0x7E00) | bits >> 16 & 0x8000)
