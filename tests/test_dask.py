"""dask arrays: as NumPy's on the whole array, lazily, and the same bits by whatever scheduler."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import fastbn
from fastbn import Standardizer
from fastbn.backends import usable
from oracle.arrays import DTYPES, HALVES, LAYOUTS, channel_axis, wide
from oracle.formulas import moments as exact_moments
from support.judge import assert_within, case
from support.processes import output

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")
import fastbn.dask  # noqa: E402

Array = NDArray[Any]
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}:{module}.*")
    for module in ("dask", "distributed", "zarr", "h5py")
    for kind in ("DeprecationWarning", "FutureWarning")
]
RNG = np.random.default_rng(0)
Lazy: Any = Standardizer
SHAPE = (12, 6, 5, 6)
CHUNKINGS: dict[str, Any] = {
    "one": (-1, -1, -1, -1),
    "samples": (5, -1, -1, -1),
    "the second axis": (-1, 4, -1, -1),
    "places": (-1, -1, 2, 5),
    "all": (7, 4, 3, 5),
    "empty ones": ((0, 12), (0, 6), (5,), (2, 0, 4)),
}
SCHEDULERS: tuple[dict[str, Any], ...] = (
    {"scheduler": "synchronous"},
    {"scheduler": "threads", "num_workers": 1},
    {"scheduler": "threads", "num_workers": 5},
)
INTEGERS = (np.uint8, np.int8, np.uint16, np.int16)


@pytest.fixture(params=usable())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastbn.use_backend(request.param):
        yield request.param


def data(dtype: Any, shape: tuple[int, ...] = SHAPE) -> Array:
    return (RNG.normal(60, 20, shape)).astype(dtype)


def chunked(a: Array) -> Iterator[tuple[str, Any]]:
    for name, chunks in CHUNKINGS.items():
        yield name, da.from_array(a, chunks=chunks[: a.ndim])


def assert_same(lazy: Any, expected: Array) -> None:
    """Shape, type, chunks and meta tell what the values then are: those expected, bit for bit."""
    assert (lazy.shape, lazy.dtype) == (expected.shape, expected.dtype)
    assert (type(lazy._meta), lazy._meta.dtype) == (np.ndarray, expected.dtype)
    blocks = dask.compute(*lazy.to_delayed().ravel())
    starts = [np.cumsum((0, *chunks)) for chunks in lazy.chunks]
    for place, block in zip(np.ndindex(*lazy.numblocks), blocks, strict=True):
        at = tuple(slice(*start[i : i + 2]) for start, i in zip(starts, place, strict=True))
        there = np.ascontiguousarray(expected[at])
        assert (block.shape, block.dtype) == (there.shape, there.dtype)
        assert block.tobytes() == there.tobytes()


# ---- Moments ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*DTYPES, *HALVES])
def test_moments(backend: str, dtype: Any, layout: str) -> None:
    """Within the bounds of merged moments, and the same bits by every scheduler."""
    a = data(dtype)
    mean, var = exact_moments(wide(a, layout))
    for name, x in chunked(a):
        with case(name):
            merges = math.ceil(math.log2(max(math.prod(x.numblocks), 2)))
            s, e = np.sqrt(var), (merges + 1) * 2.0**-52 * np.abs(mean)
            found = []
            for how in SCHEDULERS:
                with dask.config.set(**how):
                    found.append(fastbn.dask.moments(x, layout=layout))
            assert_within(found[0].mean, mean, e + 1e-12 * s, "mean")
            relative = merges * (e / s + (e / s) ** 2) + 1e-10
            assert_within(found[0].var, var, relative * var, "var")
            for other in found[1:]:
                np.testing.assert_array_equal(other, found[0], strict=True)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_moments_of_integers_are_exact(backend: str, dtype: Any) -> None:
    """Whatever the chunks."""
    a = data(dtype)
    for layout in LAYOUTS:
        expected = fastbn.moments(a, layout=layout)
        for name, x in chunked(a):
            with case(name, layout):
                found = fastbn.dask.moments(x, layout=layout)
                np.testing.assert_array_equal(found, expected, strict=True)


def test_moments_in_any_order_of_memory() -> None:
    """A chunk may come in another order of memory, as some do over a network."""
    x = da.from_array(data(np.float32), chunks=(5, 4, -1, -1))
    expected = fastbn.dask.moments(x)
    for axes in ((3, 2, 1, 0), (0, 2, 1, 3), (0, 2, 3, 1)):
        there = x.transpose(axes).map_blocks(np.ascontiguousarray, dtype=x.dtype)
        found = fastbn.dask.moments(there.transpose(np.argsort(axes).tolist()))
        np.testing.assert_array_equal(found, expected)


def test_moments_of_many_chunks() -> None:
    """A tree of several levels, about a mean of a million deviations."""
    a = RNG.normal(1e6, 1, (3000, 2))
    mean, var = fastbn.dask.moments(da.from_array(a, chunks=(7, 1)))
    expected = fastbn.moments(a)
    np.testing.assert_allclose(mean, expected.mean, rtol=1e-15)
    np.testing.assert_allclose(var, expected.var, rtol=1e-8)
    constant = da.full((3000, 2), 1e6 + 0.1, chunks=(7, 1))
    assert (fastbn.dask.moments(constant).var == 0).all()


def test_moments_of_nothing() -> None:
    found = fastbn.dask.moments(da.zeros((0, 3), dtype="f4"))
    np.testing.assert_array_equal(found, np.zeros((2, 3)))
    assert fastbn.dask.moments(da.zeros((4, 0))).mean.shape == (0,)


# ---- Normalize ----

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "relu": {"activation": "relu"},
    "a slope": {"activation": ("leaky_relu", 0.1), "eps": 0.5},
    "a curve": {"activation": "silu"},
    "half": {"dtype": np.float16},
    "bfloat16": {"dtype": ml_dtypes.bfloat16},
    "to NHWC": {"out_layout": "NHWC"},
    "to NCHW": {"out_layout": "NCHW", "dtype": np.float16},
}


def vectors(channels: int) -> dict[str, Array]:
    mean, beta = RNG.normal(size=(2, channels))
    var, gamma = RNG.uniform(0.5, 2, (2, channels))
    return {"mean": mean, "var": var, "gamma": gamma.astype(np.float32), "beta": beta}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS)
def test_normalize(backend: str, options: str, layout: str) -> None:
    a = data(np.float32)
    given: dict[str, Any] = {"layout": layout, **vectors(6), **OPTIONS[options]}
    expected = fastbn.normalize(a, **given)
    for name, x in chunked(a):
        with case(name):
            y = fastbn.dask.normalize(x, **given)
            axis, to = (channel_axis(4, word) for word in (layout, given.get("out_layout", layout)))
            chunks = list(x.chunks)
            chunks.insert(to, chunks.pop(axis))
            assert y.chunks == tuple(chunks)
            assert_same(y, expected)


@pytest.mark.parametrize("dtype", [np.float64, *HALVES, *INTEGERS, ">f4", ">i2"])
def test_normalize_types(dtype: Any) -> None:
    for shape in (SHAPE, SHAPE[:2]):
        a, given = data(dtype, shape), dict[str, Any](vectors(6))
        for name, x in chunked(a):
            with case(name, shape):
                assert_same(fastbn.dask.normalize(x, **given), fastbn.normalize(a, **given))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_and_residuals(layout: str) -> None:
    """Lazy or of NumPy, in other chunks than x, and broadcast."""
    a, residual = data(np.float32), data(np.float32)
    given: dict[str, Any] = {"layout": layout, **vectors(6)}
    single = tuple(1 if i == channel_axis(4, layout) else n for i, n in enumerate(SHAPE))
    shapes = (single, (1, *single[1:]), single[1:], single[-1:], (1,))
    for shape in shapes:
        where = RNG.random(shape) < 0.5
        expected = fastbn.normalize(a, **given, where=where, residual=residual)
        for name, x in chunked(a):
            with case(name, shape):
                beside: dict[str, Any] = {"where": where, "residual": residual}
                assert_same(fastbn.dask.normalize(x, **given, **beside), expected)
                lazy = {word: da.from_array(b, chunks=4) for word, b in beside.items()}
                y = fastbn.dask.normalize(x, **given, **lazy)
                assert y.chunks == x.chunks
                assert_same(y, expected)


def test_a_residual_that_is_broadcast() -> None:
    """Nothing of its size is made, nor looked at, before the chunks need it."""
    x = da.zeros((1 << 40, 4), chunks=(((1 << 40) - 2, 2), 4))
    residual = np.broadcast_to(np.arange(4.0), x.shape)
    y = fastbn.dask.normalize(x, np.zeros(4), np.ones(4), eps=0.0, residual=residual)
    assert y[-2:].compute().tolist() == [[0, 1, 2, 3]] * 2


# ---- Standardize ----


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_standardize(layout: str, dtype: Any) -> None:
    a = data(dtype)
    a[:, :, :, 2] = 7  # constant in one channel of NHWC
    to: dict[str, Any] = {"layout": layout, "out_layout": "NHWC", "dtype": np.float16}
    for name, x in chunked(a):
        with case(name):
            y = fastbn.dask.standardize(x, layout=layout).compute()
            axes = tuple(i for i in range(4) if i != channel_axis(4, layout))
            wide_a = a.astype(float)
            std = wide_a.std(axes, keepdims=True)
            expected = (wide_a - wide_a.mean(axes, keepdims=True)) / np.where(std == 0, 1, std)
            np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
            one = Standardizer.of(x, **to)
            assert_same(fastbn.dask.standardize(x, **to), one(a))
            assert dtype != np.uint8 or one == Standardizer.of(a, **to)


def test_standardizer() -> None:
    """A lazy array there and back; progress is told once."""
    a, told = data(np.uint8, (9, 5, 6, 3)), list[int]()
    x = da.from_array(a, chunks=(4, 3, -1, 2))
    options: dict[str, Any] = {"divisor": 255, "layout": "NHWC", "out_layout": "NCHW"}
    one = Standardizer.of(x, progress=told.append, **options)
    assert told == [9]
    assert one == Standardizer.of(a, **options)
    y = one(x)
    assert_same(y, one(a))
    assert_same(one.inverse(y), one.inverse(one(a)))
    half = Standardizer([0.5] * 3, [0.25] * 3, dtype=np.float16, **options)
    assert_same(half.inverse(half(x)), half.inverse(half(a)))


# ---- How it runs ----


def test_laziness() -> None:
    """A pass looks at each chunk once, and none begins before it has to."""
    seen = list[Any]()

    def load(block: Array) -> Array:
        seen.append(block.shape)
        return block

    a = data(np.float32)
    x = da.from_array(a, chunks=(5, 4, -1, -1)).map_blocks(load, dtype=a.dtype, meta=a[:0])
    y = fastbn.dask.normalize(x, np.zeros(6), np.ones(6), residual=x)
    z = Lazy([0.0] * 6, [1.0] * 6)(x)
    assert not seen
    y.compute()
    z.compute()
    assert len(seen) == 2 * 6
    y = fastbn.dask.standardize(x)
    assert len(seen) == 3 * 6
    y.blocks[1, 0].compute()
    assert len(seen) == 3 * 6 + 1


def test_tasks_run_on_one_thread_and_the_callers_backend(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block's backend, which a pool's threads do not see of themselves."""
    seen, normalize, of = set[Any](), fastbn.normalize, fastbn.Moments._of

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*args: Any, **options: Any) -> Any:
            seen.add((function, fastbn.get_backend(), fastbn.get_num_threads()))
            return function(*args, **options)

        return noting

    monkeypatch.setattr("fastbn.functional.normalize", noted(normalize))
    monkeypatch.setattr("fastbn.Moments._of", noted(of))
    y = fastbn.dask.standardize(da.from_array(data(np.float32), chunks=5))
    with fastbn.use_backend("numpy"):
        y.compute(scheduler="threads")
    assert seen == {(normalize, backend, 1), (of, backend, 1)}


def test_files(tmp_path: Path) -> None:
    """From a memory map, zarr and HDF5, and into the last two."""
    zarr, h5py = pytest.importorskip("zarr"), pytest.importorskip("h5py")
    a = data(np.float32, (50, 6, 4))
    np.save(tmp_path / "a.npy", a)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    there = zarr.create_array(tmp_path / "a.zarr", shape=a.shape, chunks=(10, 3, 4), dtype="f4")
    there[:] = a
    with h5py.File(tmp_path / "a.h5", "w") as file:
        stored = file.create_dataset("a", data=a, chunks=(10, 3, 4))
        target = file.create_dataset("y", shape=a.shape, dtype="f4")
        sources = {
            "memory map": da.from_array(mapped, chunks=(10, 3, 4)),
            "zarr": da.from_zarr(there),
            "HDF5": da.from_array(stored, chunks=stored.chunks),
        }
        results = {name: fastbn.dask.standardize(x) for name, x in sources.items()}
        expected = results["memory map"].compute()
        assert all(x.numblocks == (5, 2, 1) for x in sources.values())
        results["zarr"].to_zarr(tmp_path / "y.zarr")
        da.store(results["HDF5"], target)
        for y in (zarr.open_array(tmp_path / "y.zarr")[:], target[:]):
            np.testing.assert_array_equal(y, expected)


DISTRIBUTED = """
import dask, dask.array as da, numpy as np, fastbn.dask
from distributed import Client

x = da.random.default_rng(0).normal(5, 3, (400, 6, 5), chunks=(30, 4, 3))
levels = (x.astype(np.float32) * 9).astype(np.uint8)
results = []
with dask.config.set(scheduler="synchronous"):
    results.append([*map(fastbn.dask.moments, (x, levels)), fastbn.dask.standardize(x).compute()])
how = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
with Client(processes=True, **how) as client:
    assert len(set(client.run(lambda: __import__("os").getpid()).values())) == 2
    results.append([*map(fastbn.dask.moments, (x, levels)), fastbn.dask.standardize(x).compute()])
assert all(np.array_equal(a, b) for a, b in zip(*results))
print("the same")
"""


def test_two_worker_processes() -> None:
    """The same bits as in this one, in a process that has a deadline."""
    pytest.importorskip("distributed")
    assert output(DISTRIBUTED) == "the same"


# ---- scikit-learn ----


def test_scaler() -> None:
    """Of tables with missing values and weights, whole and in parts."""
    scaler_of = pytest.importorskip("fastbn.sklearn").StandardScaler
    a = RNG.normal(5, [1, 2, 30], (200, 3))
    weight = RNG.uniform(0.5, 2, 200)
    missing = a.copy()
    missing[RNG.random(a.shape) < 0.1] = np.nan
    for table in (a, missing, a.astype(np.float32), a.astype(int)):
        x = da.from_array(table, chunks=(30, 2))
        for weights in (None, weight):
            expected = scaler_of().fit(table, sample_weight=weights)
            parts = scaler_of().partial_fit(
                x[:90], sample_weight=None if weights is None else weights[:90]
            )
            parts.partial_fit(x[90:], sample_weight=None if weights is None else weights[90:])
            for fitted in (scaler_of().fit(x, sample_weight=weights), parts):
                for name in ("mean_", "var_", "scale_", "n_samples_seen_"):
                    got, known = getattr(fitted, name), getattr(expected, name)
                    np.testing.assert_allclose(got, known, rtol=1e-12)
                assert_same(fitted.transform(x), fitted.transform(table))
                back = fitted.inverse_transform(fitted.transform(x))
                assert_same(back, fitted.inverse_transform(fitted.transform(table)))
            assert_same(scaler_of(copy=False).fit_transform(x), scaler_of().fit(x).transform(table))
        assert fitted.n_features_in_ == 3
