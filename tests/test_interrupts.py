"""Wherever an interrupt comes, a layer's arrays that belong together are all old or all new."""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Callable
from functools import cache, partial
from itertools import count
from types import CodeType, FrameType
from typing import Any

import pytest

import fastbn
from oracle.arrays import Array
from support.layers import CHANNELS, batch, made

pytestmark = pytest.mark.slow

X, DY, _ = batch((6, CHANNELS, 3))
RUNNING = ("running_mean", "running_var", "num_batches_tracked")
GRADIENTS = ("_dgamma", "_dbeta")


@cache
def points(code: CodeType) -> frozenset[int]:
    """Where Python looks for signals, but for a function's start: after a call, and on a loop's way
    back."""
    found, after_call = set(), False
    for instruction in dis.get_instructions(code):
        if after_call or "JUMP_BACKWARD" in instruction.opname:
            found.add(instruction.offset)
        after_call = instruction.opname.startswith("CALL")
    return frozenset(found)


def interrupted(call: Callable[[], object], at: int) -> bool:
    """Whether the call passed more of fastbn's points than these, and was interrupted at the next.

    None is in a generator: what is raised as it is closed, Python ignores.
    """
    passed = 0

    def passes() -> None:
        nonlocal passed
        passed += 1
        if passed > at:
            raise KeyboardInterrupt

    def trace(frame: FrameType, event: str, _: object) -> Any:
        is_ours = frame.f_globals["__name__"].startswith("fastbn.")
        if not is_ours or frame.f_code.co_flags & inspect.CO_GENERATOR:
            return None
        passes()
        frame.f_trace_opcodes, here = True, points(frame.f_code)

        def trace_here(frame: FrameType, event: str, _: object) -> Any:
            if event == "opcode" and frame.f_lasti in here:
                passes()
            return trace_here

        return trace_here

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def called(**options: Any) -> Any:
    """A layer after a forward."""
    bn = made(**options)
    bn(X)
    return bn


def gone_back() -> Any:
    """A layer with gradients."""
    bn = called()
    bn.backward(DY)
    return bn


STATE = {name: a + 1 for name, a in made().state_dict().items()}
CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], object], tuple[str, ...]]] = {
    "training": (made, lambda bn: bn(X), RUNNING),
    "state": (made, lambda bn: bn.load_state_dict(STATE), ("gamma", "beta", *RUNNING)),
    "backward": (called, lambda bn: bn.backward(DY), GRADIENTS),
    "accumulating": (gone_back, lambda bn: bn.backward(DY, accumulate=True), GRADIENTS),
    "freezing": (gone_back, lambda bn: setattr(bn, "frozen_affine", True), GRADIENTS),
}
"""What makes a layer, what is interrupted, and the arrays that it writes."""


@pytest.mark.parametrize("case", CASES)
def test_arrays_are_all_old_or_all_new(case: str) -> None:
    """After an interrupt before, between and after any two steps; and they are the same arrays."""
    prepared, call, names = CASES[case]

    def held(bn: Any) -> list[Array]:
        return [getattr(bn, name) for name in names]

    def bits(arrays: list[Array]) -> tuple[bytes, ...]:
        return tuple(a.tobytes() for a in arrays)

    bn = prepared()
    old = bits(held(bn))
    call(bn)
    new, found = bits(held(bn)), set()
    assert all(a != b for a, b in zip(old, new, strict=True))
    for at in count():
        bn = prepared()
        arrays = held(bn)
        if not interrupted(partial(call, bn), at):
            break
        found.add(bits(arrays))
        assert all(a is b for a, b in zip(arrays, held(bn), strict=True))
    assert found == {old, new}


@pytest.mark.parametrize("sequential", [True, False])
def test_reestimation(sequential: bool) -> None:
    """Either all layers have new statistics or none, and each its modes."""
    layers = [made(), made("frozen statistics")]

    def forward(x: Array) -> None:
        for layer in layers:
            x = layer.train()(x)

    def everything() -> list[Any]:
        arrays = [a.tobytes() for layer in layers for a in layer.state_dict().values()]
        modes = "training", "frozen_statistics", "_last"
        of_layers = [getattr(layer, name) for layer in layers for name in modes]
        runnings = [running for layer in layers for running in layer._running.values()]
        return [*arrays, *of_layers, *((r.observe, r.is_frozen) for r in runnings)]

    layers[0].eval()
    old = everything()
    call = partial(fastbn.reestimate, layers, forward, [X], sequential=sequential)
    for at in count():
        if not interrupted(call, at) or everything() != old:
            break
    new = everything()
    call()
    assert everything() == new != old
