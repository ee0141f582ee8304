"""Standardizer: the way people write it, exactly back and forth, and from data."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

import fastbn
from fastbn import Standardizer
from oracle.arrays import DTYPES, LAYOUTS, channel_axis, to_layout
from support.variants import VARIANTS, activate, each_backend

Array = NDArray[Any]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
IMAGENET: dict[str, Any] = {"divisor": 255, "layout": "NHWC", "out_layout": "NCHW"}
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 20, 21, 3), np.uint8)


def written(x: Array, mean: Any, std: Any, divisor: float, layout: str) -> Array:
    """The formula in extended precision."""
    wide = np.moveaxis(x, channel_axis(x.ndim, layout), -1).astype(np.longdouble)
    y = (wide / divisor - np.longdouble(mean)) / np.longdouble(std)
    return np.moveaxis(y, -1, channel_axis(x.ndim, layout))


@pytest.mark.usefixtures("variant")
def test_images_as_people_write_it() -> None:
    """Within four roundings of float32 of what is subtracted and of what is left."""
    y = Standardizer(MEAN, STD, **IMAGENET)(IMAGES)
    true = np.moveaxis(written(IMAGES, MEAN, STD, 255, "NHWC"), -1, 1)
    largest = (np.array(MEAN) / STD).max() + np.abs(true)
    assert (y.dtype, y.flags.c_contiguous) == (np.dtype(np.float32), True)
    assert (np.abs(y - true) <= 4 * 2.0**-24 * largest).all()


@pytest.mark.usefixtures("variant")
@given(st.data(), st.sampled_from(LAYOUTS), st.sampled_from([1, 255, 0.25]), st.integers(0, 9))
def test_back_and_forth(data: st.DataObject, layout: str, divisor: float, seed: int) -> None:
    """The inverse gives x, as floats, in x's layout."""
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=9))
    dtype = data.draw(st.sampled_from([np.uint8, np.int16, *DTYPES]))
    to = data.draw(st.sampled_from([None, *LAYOUTS]))
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=shape) * 100).clip(0).astype(dtype)
    channels = shape[channel_axis(len(shape), layout)]
    mean, std = rng.normal(size=channels), rng.uniform(0.5, 2, channels)
    one = Standardizer(mean, std, divisor=divisor, layout=layout, out_layout=to)
    y = one(x)
    back = one.inverse(y)
    assert (back.shape, back.dtype) == (x.shape, y.dtype)
    eps = np.finfo(y.dtype).eps
    largest = np.abs(x).max(initial=0) + np.abs(mean).max() * divisor
    assert np.abs(back - x.astype(np.float64)).max(initial=0) <= 8 * eps * largest


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16])
def test_halves_come_back_as_float32(half: Any) -> None:
    one = Standardizer(MEAN, STD, dtype=half, **IMAGENET)
    y = one(IMAGES)
    back = one.inverse(y)
    assert (y.dtype, back.dtype) == (np.dtype(half), np.dtype(np.float32))
    assert back.shape == IMAGES.shape
    expected = Standardizer(MEAN, STD, **IMAGENET).inverse(y.astype(np.float32))
    np.testing.assert_array_equal(back, expected)


@each_backend
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, *DTYPES])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_data(layout: str, dtype: Any) -> None:
    """Zero mean and unit variance, however the data is cut; progress is told of every batch."""
    x = np.random.default_rng(1).normal(60, 20, (40, 4, 6, 5)).astype(dtype)
    x, told = to_layout(x, layout), list[int]()
    batches = np.split(x, [7, 8, 30])
    options: dict[str, Any] = {"layout": layout, "divisor": 255}
    one = Standardizer.of((b for b in batches), progress=told.append, **options)
    assert told == [7, 8, 30, 40]
    whole = Standardizer.of(x, **options)
    np.testing.assert_allclose(one.std, whole.std, rtol=1e-13)
    assert np.dtype(dtype).kind == "f" or one == whole
    mean, var = fastbn.moments(one(x), layout=layout)
    np.testing.assert_allclose(mean, 0, atol=1e-6)
    np.testing.assert_allclose(var, 1, rtol=1e-6)


@each_backend
def test_a_constant_channel_is_divided_by_one() -> None:
    table = np.array([[7, 1], [7, 3]], np.float32)
    one = Standardizer.of(table)
    assert one.std.tolist() == [1, 1]
    assert one(table).tolist() == [[0, -1], [0, 1]]


@pytest.mark.parametrize("name", VARIANTS)
def test_an_array_of_nothing(name: str) -> None:
    one = Standardizer(MEAN, STD, **IMAGENET)
    with activate(name):
        assert one(IMAGES[:0]).shape == (0, 3, 20, 21)
        assert one.inverse(np.zeros((0, 3, 4, 5), np.float32)).shape == (0, 4, 5, 3)


OPTIONS: list[dict[str, Any]] = [
    {},
    IMAGENET,
    {"dtype": np.float16},
    {"dtype": ml_dtypes.bfloat16, "layout": "NHWC"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_equal_copies(options: dict[str, Any]) -> None:
    """Copied, pickled, through JSON; and not equal to others."""
    one = Standardizer(MEAN, STD, **options)
    x = IMAGES if one.layout == "NHWC" else np.moveaxis(IMAGES, -1, 1)
    through_json = Standardizer.from_dict(json.loads(json.dumps(one.to_dict())))
    pickled = pickle.loads(pickle.dumps(one))
    for other in (copy.copy(one), copy.deepcopy(one), pickled, through_json):
        assert other == one
        assert repr(other) == repr(one)
        np.testing.assert_array_equal(other(x), one(x))
    others: list[dict[str, Any]] = [{"divisor": 2}, {"dtype": np.float32}, {"out_layout": "NHWC"}]
    assert all(Standardizer(MEAN, STD, **changed) != one for changed in others)
    assert Standardizer([0.0, 0, 0], STD, **options) != one
    assert one != MEAN


def test_it_cannot_be_changed() -> None:
    one = Standardizer(MEAN, STD)
    with pytest.raises(AttributeError, match="Standardizer cannot be changed"):
        one.mean = one.std
    with pytest.raises(ValueError, match="read-only"):
        one.mean[0] = 1
    with pytest.raises(TypeError, match="unhashable"):
        hash(one)


X = np.zeros((2, 3), np.float32)
make: Any = Standardizer
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "std of 0": (lambda: make(MEAN, [1, 0, 1]), r"std is 0\.0 in channel 1, expected"),
    "negative std": (lambda: make(MEAN, [1, 1, -2]), r"std is -2\.0 in channel 2"),
    "NaN in std": (lambda: make(MEAN, [np.nan, 1, 1]), "std is nan in channel 0"),
    "infinite mean": (lambda: make([1, np.inf, 1], STD), "mean is inf in channel 1"),
    "a word": (lambda: make([1, "2", 1], STD), r"mean\[1\] is a str"),
    "too few": (lambda: make(MEAN, [1, 1]), r"std has shape \(2,\) but mean has 3"),
    "nested": (lambda: make([MEAN], STD), r"mean\[0\] is a list"),
    "divisor of 0": (lambda: make(MEAN, STD, divisor=0), r"divisor is 0\.0, expected"),
    "a word as divisor": (lambda: make(MEAN, STD, divisor="1"), "divisor is a str"),
    "no type": (lambda: make(MEAN, STD, dtype=int), "dtype is .*int.*, expected float16"),
    "no layout": (lambda: make(MEAN, STD, layout="CHW"), "layout is 'CHW', expected"),
    "an empty word": (lambda: make(MEAN, STD, out_layout=""), "out_layout is '', expected"),
    "channels": (lambda: make(MEAN, STD)(X[:, :2]), r"x has 2 channels .*Standardizer has"),
    "channels of y": (lambda: make(MEAN, STD).inverse(X[:, :2]), "has 2 channels"),
    "no batches": (lambda: make.of([]), "batches had no batch with values"),
    "a number": (lambda: make.of(3), "batches is an int"),
    "other channels": (lambda: make.of([X, X[:, :2]]), r"batches\[1\] has a number of"),
    "other type": (lambda: make.of([X, X.astype("u1")]), r"batches\[1\] has dtype uint8"),
    "other rank": (lambda: make.of([X, X[:, :, None]]), r"batches\[1\] has rank 3"),
    "progress": (lambda: make.of(X, progress=3), "progress is an int"),
    "keys": (lambda: make.from_dict({"mean": MEAN}), "given is a dict.*expected a dictionary of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises((TypeError, ValueError), match=message):
        call()
