"""Every rank, layout, odd shape and size against the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastbn
from fastbn._batch import Batch
from fastbn._call import Call
from fastbn.backends.reference import ReferenceBackend
from oracle.arrays import DTYPES, LAYOUTS, Array, channels_of, to_layout
from support.bits import assert_same_bits, run_all
from support.judge import check_everything
from support.memory import FORMS, channels_last
from support.pairs import paired
from support.variants import Variant, each_backend

SHAPES = [  # as NCHW
    (1, 1),
    (5, 1),
    (1, 5),
    (17, 33),
    (64, 3),
    (3, 5, 7),
    (2, 16, 1),
    (1, 1, 31),
    (2, 3, 4, 5),
    (1, 7, 9, 1),
    (5, 1, 1, 8),
    (3, 17, 7, 7),
    (4, 3, 33, 31),
    (2, 64, 1, 1),
    (1, 1, 1, 1),
    (2, 9, 2, 3, 4),
    (1, 2, 1, 15, 1),
    (2, 3, 2, 1, 2, 2),
]
EMPTY = [(0, 3), (0, 3, 4, 4), (2, 3, 0), (2, 3, 4, 0), (2, 0), (2, 0, 4, 4), (0, 0, 0)]


def problem(shape: tuple[int, ...], dtype: Any, layout: str) -> tuple[Array, Array, Array, Array]:
    """x, dy, gamma and beta for an NCHW shape, in `layout`."""
    rng = np.random.default_rng(7)
    x = to_layout(rng.normal(-1, 2, shape), layout).astype(dtype)
    dy = to_layout(rng.normal(size=shape), layout).astype(dtype)
    gamma, beta = rng.normal(size=(2, shape[1])).astype(dtype)
    return x, dy, gamma, beta


@paired(shape=SHAPES, dtype=DTYPES, layout=LAYOUTS)
def test_shapes(variant: Variant, shape: tuple[int, ...], dtype: Any, layout: str) -> None:
    """Rank 2 to 6, size-1 axes, both sides of every lane boundary: right within the bounds."""
    x, dy, gamma, beta = problem(shape, dtype, layout)
    check_everything(x, dy, gamma, beta, layout=layout)
    check_everything(x, dy, layout=layout, eps=0.5)


@pytest.mark.slow
@paired(channels=[1, 3, 64, 257], dtype=DTYPES, layout=LAYOUTS)
def test_large_batches(variant: Variant, channels: int, dtype: Any, layout: str) -> None:
    """Batches large enough for several threads and several chunks a channel."""
    shape = (6, channels, 151_553 // channels // 6, 3)
    x, dy, gamma, beta = problem(shape, dtype, layout)
    with fastbn.use_num_threads(2):
        check_everything(x, dy, gamma, beta, layout=layout)


@pytest.mark.parametrize("channels", [*range(1, 36), 47, 48, 63, 64, 65])
def test_every_width_of_channels_inside(variant: Variant, channels: int) -> None:
    """Channels innermost: every remainder of channels by a vector's lanes, over odd rows."""
    for rows in (1, 2, 3, 13):
        x, dy, gamma, beta = problem((rows, channels), np.float32, "NHWC")
        check_everything(x, dy, gamma, beta, layout="NHWC")


@pytest.mark.parametrize("places", [*range(1, 36), 47, 48, 63, 64, 65])
def test_every_length_of_a_plane(variant: Variant, places: int) -> None:
    """Channels outside: every remainder of a plane by a vector's lanes, over few samples."""
    for samples in (1, 2, 3):
        x, dy, gamma, beta = problem((samples, 3, places), np.float32, "NCHW")
        check_everything(x, dy, gamma, beta)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 16, 5, 3), (2, 9, 2, 3, 4)], ids=str)
def test_channels_last_memory_handed_over_as_nchw(
    variant: Variant, shape: tuple[int, ...], dtype: Any
) -> None:
    """The same memory gives the same bits under either name, and y lies as x does."""
    x, dy, gamma, beta = problem(shape, dtype, "NCHW")
    x, dy = channels_last(x), channels_last(dy)
    last_x, last_dy = np.moveaxis(x, 1, -1), np.moveaxis(dy, 1, -1)
    assert last_x.flags.c_contiguous
    named_nchw = run_all(x, dy, gamma, beta)
    for name, value in named_nchw.items():
        if value.ndim > 1:
            assert value.strides == x.strides, name
            named_nchw[name] = np.moveaxis(value, 1, -1)
    assert_same_bits(named_nchw, run_all(last_x, last_dy, gamma, beta, layout="NHWC"))


@each_backend
@pytest.mark.no_kernel
@pytest.mark.parametrize("with_out", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty_batches(
    variant: Variant, shape: tuple[int, ...], layout: str, with_out: bool
) -> None:
    """No values, or no channels: empty y, zero statistics and gradients, never NaN."""
    for dtype in DTYPES:
        x = to_layout(np.empty(shape), layout).astype(dtype)
        out = np.empty_like(x) if with_out else None
        c = channels_of(x, layout)
        for gamma in (None, np.ones(c, np.float64)):
            y, mean, var = fastbn.batch_norm(x, gamma, gamma, layout=layout, out=out)
            applied = fastbn.normalize(x, mean, var, gamma, gamma, layout=layout, out=out)
            for a in (y, applied):
                assert (a.shape, a.dtype) == (x.shape, x.dtype)
                assert out is None or a is out
            for v in (mean, var, *fastbn.moments(x, layout=layout)):
                np.testing.assert_array_equal(v, np.zeros(c), strict=True)
            for verb in (fastbn.batch_norm_backward, fastbn.normalize_backward):
                dx, dgamma, dbeta = verb(x, x, mean, var, gamma, layout=layout, out=out)
                assert (dx.shape, dx.dtype) == (x.shape, x.dtype)
                zeros = np.zeros(c, dtype if gamma is None else np.float64)
                for d in (dgamma, dbeta):
                    assert d is not None
                    np.testing.assert_array_equal(d, zeros, strict=True)
                assert verb(x, x, mean, var, layout=layout, params=False)[1:] == (None, None)


@each_backend
@pytest.mark.no_kernel
def test_an_empty_batch_is_still_checked(variant: Variant) -> None:
    """Emptiness excuses no bad argument."""
    x = np.empty((0, 3), np.float32)
    with pytest.raises(ValueError, match="gamma has shape"):
        fastbn.batch_norm(x, np.ones(4))
    with pytest.raises(ValueError, match="out has shape"):
        fastbn.batch_norm(x, out=np.empty((1, 3), np.float32))
    with pytest.raises(ValueError, match="eps is -1"):
        fastbn.batch_norm(x, eps=-1.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_a_view_is_aligned(form: str, layout: str) -> None:
    """Whatever the array is, and native: kernels read values one by one, too."""
    x = FORMS[form](np.ones((4, 3, 5, 6), np.float32))
    (span,) = Call((ReferenceBackend(), 1), Batch(x, layout, None, None)).spans
    view = span.view(x)
    assert view.flags.aligned
    assert view.dtype.isnative
    assert np.array_equal(np.ravel(view), np.ones(x.size))
