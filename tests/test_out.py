"""`out=`: where it may lie, working in place, and the overlaps that are refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import fastbn
from oracle.arrays import DTYPES, LAYOUTS, Array, channels_of
from support.bits import assert_same_bits
from support.memory import WRITEABLE, dense
from support.pairs import paired
from support.variants import Variant, each_backend

SHAPES = [(9, 5), (3, 7, 9), (2, 5, 6, 7)]


class Problem:
    """Arguments of the four functions that write an array."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, layout: str) -> None:
        rng = np.random.default_rng(5)
        self.x, self.dy = rng.normal(1, 2, (2, *shape)).astype(dtype)
        c = channels_of(self.x, layout)
        self.gamma, self.beta, self.mean = rng.normal(size=(3, c))
        self.var = rng.exponential(size=c)
        self.layout = layout

    def call(self, verb: str, **changed: Any) -> Array:
        """The array that the verb writes, with some arguments changed."""
        names = {
            "batch_norm": ("x", "gamma", "beta"),
            "normalize": ("x", "mean", "var", "gamma", "beta"),
            "batch_norm_backward": ("dy", "x", "mean", "var", "gamma"),
            "normalize_backward": ("dy", "x", "mean", "var", "gamma"),
        }
        given = {name: getattr(self, name) for name in names[verb]} | changed
        result = getattr(fastbn, verb)(**given, layout=self.layout)
        array: Array = result if isinstance(result, np.ndarray) else result[0]
        return array


FORWARD = ("batch_norm", "normalize")
BACKWARD = ("batch_norm_backward", "normalize_backward")
VERBS = FORWARD + BACKWARD
placed = paired(form=WRITEABLE, shape=SHAPES, dtype=DTYPES, layout=LAYOUTS)


@each_backend
@placed
def test_out_in_any_form(
    variant: Variant, form: str, shape: tuple[int, ...], dtype: Any, layout: str
) -> None:
    """The result is `out` itself, whatever its memory; it has the bits of a fresh result."""
    problem = Problem(shape, dtype, layout)
    for verb in VERBS:
        out = WRITEABLE[form](np.full(shape, np.nan, dtype))
        result = problem.call(verb, out=out)
        assert result is out
        assert_same_bits({verb: dense(out)}, {verb: dense(problem.call(verb))})


@each_backend
@placed
def test_in_place(
    variant: Variant, form: str, shape: tuple[int, ...], dtype: Any, layout: str
) -> None:
    """out=x, and out=dy in a backward, give the bits of a fresh result, whatever the memory."""
    problem = Problem(shape, dtype, layout)
    for verb, name in [
        *((verb, "x") for verb in VERBS),
        *((verb, "dy") for verb in BACKWARD),
    ]:
        both = {key: WRITEABLE[form](getattr(problem, key).copy()) for key in ("x", "dy")}
        changed = {key: a for key, a in both.items() if key == "x" or verb in BACKWARD}
        expected = dense(problem.call(verb, **changed))
        others = {key: a.tobytes() for key, a in both.items() if key != name}
        result = problem.call(verb, **changed, out=both[name])
        assert result is both[name]
        assert_same_bits({verb: dense(result)}, {verb: expected})
        assert {key: a.tobytes() for key, a in both.items() if key != name} == others


@each_backend
def test_in_place_of_one_array_for_everything(variant: Variant) -> None:
    """dy, x and out may all be the same array, or views of the same place."""
    problem = Problem((3, 5, 8), np.float32, "NCHW")
    expected = problem.call("batch_norm_backward", dy=problem.x)
    x = problem.x.copy()
    problem.call("batch_norm_backward", dy=x, x=x[:], out=x[...])
    assert_same_bits({"dx": x}, {"dx": expected})


@each_backend
def test_dx_alone_in_place(variant: Variant) -> None:
    """normalize_backward without x works in place of dy."""
    problem = Problem((3, 5, 8), np.float32, "NCHW")
    expected = problem.call("normalize_backward")
    out = problem.dy
    problem.call("normalize_backward", x=None, params=False, out=out)
    assert_same_bits({"dx": out}, {"dx": expected})


@each_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_interleaved_memory_is_apart(variant: Variant, dtype: Any) -> None:
    """Views that take turns in one buffer share no value: they are accepted."""
    problem = Problem((4, 3, 6), dtype, "NCHW")
    buffer = np.zeros((4, 3, 12), dtype)
    x, out = buffer[..., ::2], buffer[..., 1::2]
    x[...] = problem.x
    problem.call("batch_norm", x=x, out=out)
    np.testing.assert_array_equal(x, problem.x)
    assert_same_bits({"y": dense(out)}, {"y": problem.call("batch_norm")})


@each_backend
def test_a_matrix_is_an_array(variant: Variant) -> None:
    """Subclasses that are always of rank 2 are written like any other array."""
    x = np.random.default_rng(0).normal(size=(6, 40))
    memory = np.empty_like(x)
    out = np.ndarray.view(memory, np.matrix)
    assert fastbn.batch_norm(x, out=out).y is out
    np.testing.assert_array_equal(memory, fastbn.batch_norm(x).y)


@each_backend
def test_only_out_is_written(variant: Variant) -> None:
    """What lies between and around the values of a strided `out` stays as it was."""
    problem = Problem((4, 3, 6), np.float32, "NCHW")
    buffer = np.full((6, 5, 15), 77, np.float32)
    written = np.zeros(buffer.shape, bool)
    written[1:5, 1:4, 2:14:2] = True
    for verb in VERBS:
        buffer[...] = 77
        problem.call(verb, out=buffer[1:5, 1:4, 2:14:2])
        assert (buffer[~written] == 77).all()
        assert_same_bits({"y": buffer[1:5, 1:4, 2:14:2].copy()}, {"y": problem.call(verb)})


def shifted(buffer: Array) -> tuple[Array, Array]:
    """Two (4, 4, 4) arrays, one value apart."""
    return buffer[:64].reshape(4, 4, 4), buffer[1:65].reshape(4, 4, 4)


def one_in_common(buffer: Array) -> tuple[Array, Array]:
    """Two (4, 4, 4) arrays: the last value of one is the first of the other."""
    return buffer[:64].reshape(4, 4, 4), buffer[63:127].reshape(4, 4, 4)


def backwards(buffer: Array) -> tuple[Array, Array]:
    """The same memory, walked from its end."""
    a = buffer[:64].reshape(4, 4, 4)
    return a, a[::-1]


def turned(buffer: Array) -> tuple[Array, Array]:
    """The same memory with two axes exchanged."""
    a = buffer[:64].reshape(4, 4, 4)
    return a, a.transpose(0, 2, 1)


def other_strides(buffer: Array) -> tuple[Array, Array]:
    """The same start, other strides."""
    return buffer[:128:2].reshape(4, 4, 4), buffer[:64].reshape(4, 4, 4)


OVERLAPS: list[Callable[[Array], tuple[Array, Array]]] = [
    shifted,
    one_in_common,
    backwards,
    turned,
    other_strides,
]


def assert_refused(buffer: Array, message: str, call: Callable[[], object]) -> None:
    """The call raises ValueError with all of the message's words, having written nothing."""
    before = buffer.tobytes()
    with pytest.raises(ValueError, match=message):
        call()
    assert buffer.tobytes() == before


@each_backend
@pytest.mark.no_kernel
@pytest.mark.parametrize("verb", VERBS)
def test_partial_overlap_with_an_array_is_refused(variant: Variant, verb: str) -> None:
    """out that overlaps x or dy without being it is refused, and nothing is written."""
    problem = Problem((4, 4, 4), np.float64, "NCHW")
    names = ("x", "dy") if verb in BACKWARD else ("x",)
    for name, overlap in product(names, OVERLAPS):
        buffer = np.random.default_rng(0).normal(size=130)
        given, out = overlap(buffer)
        message = f"^out overlaps {name} without being {name}: expected either {name} itself"
        assert_refused(
            buffer,
            message,
            partial(problem.call, verb, **{name: given}, out=out),
        )


@each_backend
@pytest.mark.no_kernel
@pytest.mark.parametrize("verb", VERBS)
def test_overlap_with_a_vector_is_refused(variant: Variant, verb: str) -> None:
    """out that overlaps gamma, beta, mean or var is refused, and nothing is written."""
    problem = Problem((4, 4, 4), np.float64, "NCHW")
    names = {"gamma", "beta", "mean", "var"}
    if verb in BACKWARD:
        names -= {"beta"}
    if verb == "batch_norm":
        names -= {"mean", "var"}
    for name in sorted(names):
        for first, step in ((0, 1), (62, 1), (1, 17)):
            buffer = np.random.default_rng(0).exponential(size=130)
            vector = buffer[first::step][:4]
            out = buffer[:64].reshape(4, 4, 4)
            assert_refused(
                buffer,
                f"^out overlaps {name}, expected memory apart from it",
                partial(problem.call, verb, **{name: vector}, out=out),
            )


@each_backend
@pytest.mark.no_kernel
@pytest.mark.parametrize("verb", VERBS)
def test_an_out_that_overlaps_itself_is_refused(variant: Variant, verb: str) -> None:
    """An `out` with two values in one place is refused, and nothing is written."""
    problem = Problem((4, 4, 4), np.float64, "NCHW")
    buffer = np.random.default_rng(0).normal(size=130)
    for strides in ((0, 32, 8), (128, 32, 0), (64, 16, 8), (8, 8, 8), (24, 8, 8)):
        out = as_strided(buffer, (4, 4, 4), strides)
        assert_refused(buffer, "^out overlaps itself", partial(problem.call, verb, out=out))


@each_backend
@pytest.mark.no_kernel
def test_byte_swapped_x_cannot_be_out(variant: Variant) -> None:
    """An `out` over a byte-swapped x is another array in the same place: refused."""
    problem = Problem((4, 4, 4), np.float64, "NCHW")
    out = np.random.default_rng(0).normal(size=(4, 4, 4))
    x = out.view(out.dtype.newbyteorder("S"))
    assert_refused(out, "^out overlaps x", lambda: problem.call("batch_norm", x=x, out=out))
