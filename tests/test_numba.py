"""What is Numba's own: its threads, its cache on disk, and where its kernels store."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fastbn
from support.judge import check_forward
from support.machines import ALWAYS_STREAM, NEVER_STREAM, pretend
from support.processes import output

numba = pytest.importorskip("numba")
call = pytest.importorskip("fastbn.backends.numba.call")
compiling = pytest.importorskip("fastbn.backends.numba.compiling")
finalize = pytest.importorskip("fastbn.backends.numba.finalize")
halves = pytest.importorskip("fastbn.backends.numba.halves")
pytestmark = pytest.mark.slow

CALLS = """
import sys, threading
import numba, numpy as np, fastbn
x = np.random.default_rng(0).normal(size=(64, 3, 24, 24)).astype(np.float32)
want = fastbn.batch_norm(x)[0].tobytes()
before = numba.get_num_threads()
"""


@pytest.fixture(autouse=True)
def _on_numba(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Numba, with threads even for the smallest array."""
    monkeypatch.setattr(call, "SERIAL_BELOW", 0)
    with fastbn.use_backend("numba"):
        yield


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("scale", [1e153, 1e-150])
def test_squares_that_overflow(scale: float, layout: str) -> None:
    """The sum of squares is out of range, the variance is not."""
    unit = np.random.default_rng(2).normal(size=(60, 40, 40))
    got, want = fastbn.moments(unit * scale, layout=layout), fastbn.moments(unit, layout=layout)
    np.testing.assert_allclose(got.var / scale / scale, want.var, rtol=1e-12)


def test_stores_stay_inside_the_output() -> None:
    """Rows that begin and end anywhere in a cache line, in the cache and past it."""
    x = np.random.default_rng(3).normal(size=(3, 2, 43)).astype(np.float32)
    expected = fastbn.batch_norm(x).y
    for streams in (NEVER_STREAM, ALWAYS_STREAM):
        for start in range(0, 20, 3):
            memory = np.full(x.size + 40, 7.0, np.float32)
            out = memory[start : start + x.size].reshape(x.shape)
            with pretend(**streams):
                fastbn.batch_norm(x, out=out)
            assert out.tobytes() == expected.tobytes()
            assert (memory[:start] == 7).all()
            assert (memory[start + x.size :] == 7).all()


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("shape", [(3, 2, 43), (2, 3, 1100), (6, 5, 48)])
def test_what_is_let_through_lies_anywhere(shape: tuple[int, ...], layout: str) -> None:
    """The residual's gradient in its cache lines as dx does, and otherwise; in place too."""
    rng = np.random.default_rng(4)
    x, dy = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    y, mean, var = fastbn.batch_norm(x, layout=layout, activation="relu")
    options: dict[str, Any] = {"y": y, "activation": "relu", "layout": layout}
    plain = dy * (y > 0)
    expected = fastbn.batch_norm_backward(plain, x, mean, var, layout=layout)
    for streams in (NEVER_STREAM, ALWAYS_STREAM):
        for start in (0, 3, 16):
            memory = np.full(x.size + 40, 7.0, np.float32)
            through = memory[start : start + x.size].reshape(shape)
            in_place = dy.copy()
            with pretend(**streams):
                calls = [
                    fastbn.batch_norm_backward(dy, x, mean, var, dresidual=through, **options),
                    fastbn.batch_norm_backward(
                        in_place, x, mean, var, dresidual=in_place, **options
                    ),
                ]
            for got in calls:
                assert got.dx.tobytes() == expected.dx.tobytes()
                np.testing.assert_array_equal(got.dresidual, plain)
            assert (memory[:start] == 7).all()
            assert (memory[start + x.size :] == 7).all()


def test_a_gradient_that_is_kept_needs_no_activation() -> None:
    """Without one it is dy, and so are the sums of it, by the same bodies."""
    x, dy = np.random.default_rng(5).normal(size=(2, 4, 3, 20))
    _, mean, var = fastbn.batch_norm(x)
    want = fastbn.batch_norm_backward(dy, x, mean, var)
    compiled = compiling.body.cache_info().currsize
    got = fastbn.batch_norm_backward(dy, x, mean, var, dresidual=True)
    assert compiling.body.cache_info().currsize == compiled
    for a, b in zip(got, (*want, dy), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("scale", [1e-30, 1e30, np.nan, np.inf])
def test_what_float32_does_not_fit_changes_no_neighbour(scale: float, layout: str) -> None:
    """Its channel is computed in float64, the others' bits are as ever."""
    rng = np.random.default_rng(6)
    x, dy = (rng.normal(size=(5, 6, 30)).astype(np.float32) for _ in range(2))
    gamma = rng.normal(size=6).astype(np.float32)
    if layout == "NHWC":
        x, dy = (np.ascontiguousarray(np.moveaxis(a, 1, -1)) for a in (x, dy))
    one = (slice(None), 2) if layout == "NCHW" else (..., 2)
    usual, odd = x.copy(), x.copy()
    odd[one] *= scale
    results = []
    for a in (usual, odd):
        y, mean, var = fastbn.batch_norm(a, gamma, eps=0.0, layout=layout)
        results.append((y, fastbn.batch_norm_backward(dy, a, mean, var, gamma, layout=layout).dx))
    for a, b in zip(*results, strict=True):
        if scale in (1e-30, 1e30):
            assert np.isfinite(b).all()
        a[one] = b[one] = 0
        assert a.tobytes() == b.tobytes()
    if np.isfinite(scale):
        check_forward(odd, eps=0.0, layout=layout)


def _copied(values: Any, out: Any) -> None:
    """Values in another type."""
    for i in range(values.size):
        out[i] = halves.narrow(halves.wide(values[i]), out[i])


_copy_all = numba.njit(_copied)


def _halves(name: str) -> Any:
    """A half type, and the integers that stand for it."""
    if name == "float16":
        return np.dtype(np.float16), np.uint16
    return np.dtype(ml_dtypes.bfloat16), np.int16


def _same(a: Any, b: Any) -> bool:
    """The same bits, NaNs of any bits apart."""
    nan = np.isnan(b.astype(np.float32))
    integer = np.uint16 if a.itemsize == 2 else np.uint32
    equal = (a.view(integer) == b.view(integer)) | nan
    return bool(equal.all() and (np.isnan(a.astype(np.float32)) == nan).all())


def test_float16_by_integers_is_as_the_processor_does_it() -> None:
    """What converts where the processor does not."""
    every = np.arange(1 << 16).astype(np.uint16)
    wide = numba.vectorize(["float64(uint16)"])(halves._wide_half)
    with np.errstate(all="ignore"):  # signalling NaNs
        assert _same(wide(every).astype(np.float32), every.view(np.float16).astype(np.float32))
    narrow = numba.vectorize(["uint16(float64, uint16)"])(halves._narrow_half)
    bits = np.random.default_rng(0).integers(-(1 << 31), 1 << 31, 1 << 18).astype(np.int32)
    near = every.view(np.float16).astype(np.float32).view(np.int32)[:, None] + [0, 4095, 4096, 4097]
    singles = np.concatenate([bits, near.astype(np.int32).ravel()]).view(np.float32)
    with np.errstate(all="ignore"):
        got = narrow(singles.astype(np.float64), np.uint16(0))
        assert _same(got.view(np.float16), singles.astype(np.float16))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_every_half_is_a_float32(name: str) -> None:
    """All 65536 come out as they are, and go back."""
    dtype, stored = _halves(name)
    every = np.arange(-1, 1 << 16).astype(np.uint16)  # an odd number
    singles, back = np.empty(every.size, np.float32), np.empty(every.size, stored)
    _copy_all(every.view(stored), singles)
    assert _same(singles, every.view(dtype).astype(np.float32))
    _copy_all(singles, back)
    assert _same(back.view(dtype), every.view(dtype))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_halves_are_rounded_to_even(name: str) -> None:
    """Around every half and every tie between two, and at random."""
    dtype, stored = _halves(name)
    every = np.arange(1 << 16).astype(np.uint16).view(dtype).astype(np.float32).view(np.int32)
    kept = 13 if name == "float16" else 16
    near = [every + (half << kept - 1) + step for half in (0, 1) for step in range(-2, 3)]
    near.append(np.random.default_rng(0).integers(-(1 << 31), 1 << 31, 1 << 20).astype(np.int32))
    tiny = np.arange(1 << 12) * np.float64(2.0**-26)  # ties between subnormal numbers of float16
    near += [
        (sign * tiny).astype(np.float32).view(np.int32) + i for sign in (1, -1) for i in (0, 1)
    ]
    singles = np.concatenate([*near, near[0][:3]]).view(np.float32)
    got = np.empty(singles.size, stored)
    _copy_all(singles, got)
    with np.errstate(all="ignore"):
        assert _same(got.view(dtype), singles.astype(dtype))


@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_calls_from_several_threads(layer: str) -> None:
    """Numba ends the process when its "workqueue" threads are entered twice at once."""
    code = """
wrong = []
def work():
    for _ in range(30):
        with fastbn.use_num_threads(2):
            if fastbn.batch_norm(x)[0].tobytes() != want:
                wrong.append(1)
threads = [threading.Thread(target=work) for _ in range(4)]
[t.start() for t in threads], [t.join() for t in threads]
print(len(wrong), numba.get_num_threads() == before, numba.threading_layer())
"""
    printed = output(CALLS + code, **_threading(layer))
    assert printed == f"0 True {layer}"


def test_beside_parallel_code_of_others() -> None:
    """A user's own parallel function in another thread, on the layer that bears one at a time."""
    code = """
@numba.njit(parallel=True)
def total(a):
    s = 0.0
    for i in numba.prange(a.size):
        s += a[i]
    return s
ones = np.ones(100_000)
total(ones)
thread = threading.Thread(target=lambda: [total(ones) for _ in range(100)])
thread.start()
same = [fastbn.batch_norm(x)[0].tobytes() == want for _ in range(100)]
thread.join()
print(all(same), numba.threading_layer())
"""
    assert output(CALLS + code, **_threading("workqueue")) == "True workqueue"


@pytest.mark.parametrize("layer", ["omp", "workqueue"])
@pytest.mark.parametrize("used", [True, False], ids=["used", "unused"])
def test_forked_children_compute(layer: str, used: bool) -> None:
    """GNU OpenMP's threads are lost in a child, where numba then ends the process."""
    first = "2" if used else "1"
    code = f"""
import os
with fastbn.use_num_threads({first}):
    fastbn.batch_norm(x)
child = os.fork()
if child == 0:
    with fastbn.use_num_threads(2):
        same = [fastbn.batch_norm(x)[0].tobytes() == want for _ in range(3)]
    os._exit(0 if all(same) else 1)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), fastbn.batch_norm(x)[0].tobytes() == want)
"""
    environment = {**_threading(layer), "FASTBN_NUM_THREADS": "1"}
    assert output(CALLS + code, **environment) == "0 True"


def test_without_a_place_for_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core import caching

    monkeypatch.setattr(caching.CompileResultCacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="no locator"):
        numba.njit(_double, cache=True)
    assert compiling.kernel()(_double)(2) == 4


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """The cache cannot be written: the kernels run all the same."""
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
import numpy as np, fastbn
assert fastbn.batch_norm(np.arange(6.0).reshape(3, 2)).mean.tolist() == [2.0, 3.0]
"""
    environment = {"NUMBA_CACHE_DIR": str(tmp_path), "FASTBN_BACKEND": "numba"}
    assert output(code, **environment) == ""
    assert not list(tmp_path.rglob("*.nbc"))


def _to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "garbage": lambda path: path.write_bytes(b"\x00garbage" * 100),
    "another pickle": lambda path: path.write_bytes(2 * pickle.dumps(numba.__version__)),
    "a folder": _to_folder,
}


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_of_the_cache(
    damage: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are as good as none: what they held is compiled anew, and kept where that can be."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    for hits in (0, 1):
        compiled: Any = compiling.kernel()(_double)
        assert (compiled(2), sum(compiled.stats.cache_hits.values())) == (4, hits)
    (path,) = tmp_path.rglob(f"*.{kind}")
    DAMAGE[damage](path)
    for hits in (0, 0 if damage == "a folder" else 1):
        compiled = compiling.kernel()(_double)
        assert (compiled(2), sum(compiled.stats.cache_hits.values())) == (4, hits)


def test_damaged_files_of_bodies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    kinds = np.dtype(np.float64), False, False, False
    body = partial(compiling.body.__wrapped__, finalize.start_forward, *kinds)
    assert body() != 0
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*.nb?")}
    assert len(kept) == 2
    for path in kept:
        path.write_bytes(b"garbage")
    assert body() != 0
    assert all(len(path.read_bytes()) == len(whole) for path, whole in kept.items())


def test_the_cache_is_of_these_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba looks at a function's own file; what it calls may be in any of the package's."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    assert len(compiling._stamp()) == len(list(Path(compiling.__file__).parent.glob("*.py")))
    for stamp, hits in ((1, 0), (1, 1), (2, 0)):
        monkeypatch.setattr(compiling, "_stamp", lambda stamp=stamp: ((stamp, stamp),))
        compiled: Any = compiling.kernel()(_double)
        assert (compiled(2), sum(compiled.stats.cache_hits.values())) == (4, hits)


def _double(value: int) -> int:
    return 2 * value


def _threading(layer: str) -> dict[str, str]:
    pytest.importorskip("numba.np.ufunc." + {"omp": "omppool"}.get(layer, layer))
    return {"NUMBA_THREADING_LAYER": layer, "NUMBA_NUM_THREADS": "2", "FASTBN_BACKEND": "numba"}
