"""Fresh results get memory that earlier ones gave back: within bounds, and never anything else."""

from __future__ import annotations

import os
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import fastbn
from fastbn import _pool
from oracle.arrays import LAYOUTS
from support import every_call
from support.numpy_handlers import handler_of, own_handler
from support.processes import error, output
from support.variants import Variant, each_backend

configure = pytest.importorskip("fastbn._ext.pool").configure

MIB = 1 << 20
SHAPE = (4, 16, 64, 64)
"""Of an array of exactly 1 MiB in float32."""


@pytest.fixture(autouse=True)
def pool() -> Iterator[None]:
    """An empty pool, which bounds that a test sets do not outlive."""
    fastbn.clear_pool()
    yield
    configure(_pool._bound, _pool.SECONDS)
    fastbn.clear_pool()


def empty(megabytes: float) -> NDArray[Any]:
    return _pool.empty((int(megabytes * MIB),), np.dtype(np.uint8))


def facts() -> tuple[int, int]:
    """Idle bytes and hits."""
    config = fastbn.get_config()
    return config["pool_idle"], config["pool_hits"]


def idle() -> int:
    return facts()[0]


@contextmanager
def tracing() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


def traced() -> int:
    """Bytes of NumPy's arrays of 1 MiB and more that were made since tracing began, and live."""
    domain = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
    snapshot = tracemalloc.take_snapshot().filter_traces([domain])
    return sum(trace.size for trace in snapshot.traces if trace.size >= MIB)


def is_pooled(a: NDArray[Any]) -> bool:
    """Whether an array's memory is the pool's, or that of the array that it is a view of."""
    return handler_of(a if a.base is None else a.base) == "fastbn"


# --- which results ------------------------------------------------------------------------------


def large(x: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Fresh results of x's size, by the call."""
    layer, mean, var = fastbn.BatchNorm(x.shape[1]), *fastbn.moments(x)
    grouped = fastbn.group_norm(x, 4)
    back = fastbn.batch_norm_backward(x, x, mean, var, activation="relu", y=x, dresidual=True)
    second = fastbn.batch_norm_double_backward(x, None, None, x, x, mean, var)
    return {
        "batch_norm": fastbn.batch_norm(x).y,
        "where": fastbn.batch_norm(x, where=np.ones((len(x), 1, *x.shape[2:]), bool)).y,
        "virtual batches": fastbn.batch_norm(x, virtual_batch=2).y,
        "normalize": fastbn.normalize(x, mean, var),
        "batch_norm_backward": back.dx,
        "dresidual": back.dresidual,
        "normalize_backward": fastbn.normalize_backward(x, x, mean, var).dx,
        "group_norm": grouped.y,
        "group_norm_backward": fastbn.group_norm_backward(x, x, *grouped[1:], 4).dx,
        "ddy": second.ddy,
        "double backward": second.dx,
        "BatchNorm": layer(x),
        "FrozenBatchNorm": layer.to_frozen()(x),
    }


@each_backend
def test_large_results_are_from_the_pool(variant: Variant) -> None:
    """Of every call, and by every backend; they own their data, as arrays always have."""
    for name, a in large(np.ones(SHAPE, np.float32)).items():
        assert is_pooled(a), name
        assert (a if a.base is None else a.base).flags.owndata, name


@each_backend
def test_small_results_are_not(variant: Variant) -> None:
    for name, a in large(np.ones((3, *SHAPE[1:]), np.float32)).items():
        assert not is_pooled(a), name


@each_backend
def test_a_result_gets_what_another_gave_back(variant: Variant) -> None:
    """The memory of the one that was deleted last, if that is as large or a little larger."""
    x = np.ones(SHAPE, np.float32)
    y = fastbn.batch_norm(x).y
    at, hits = y.ctypes.data, facts()[1]
    del y
    assert idle() == x.nbytes
    y = fastbn.batch_norm(x).y
    assert (y.ctypes.data, *facts()) == (at, 0, hits + 1)
    other = fastbn.batch_norm(x).y
    assert not np.may_share_memory(other, y)


def test_what_fits() -> None:
    """A block goes to what is at most an eighth smaller, and of several the smallest that does."""
    blocks = [empty(size) for size in (8, 9, 10)]
    eight, nine, ten = (a.ctypes.data for a in blocks)
    blocks.clear()
    found = [empty(8.5), empty(8.5), empty(8), empty(2)]
    assert [a.ctypes.data for a in found[:3]] == [nine, found[1].ctypes.data, eight]
    assert found[1].ctypes.data not in (eight, nine, ten)
    assert idle() == 10 * MIB


def test_data_begin_on_a_page() -> None:
    """Large ones where a huge page may begin."""
    assert empty(1).ctypes.data % os.sysconf("SC_PAGE_SIZE") == 0
    assert empty(5).ctypes.data % (2 * MIB) == 0


# --- nothing but what was written ----------------------------------------------------------------


WITHOUT_FRESH_RESULTS = {
    *("moments", "gradient_sums", "population_statistics", "Moments", "ColumnMoments"),
    *("BatchNorm", "GroupNorm", "InstanceNorm"),
}
"""Calls of `every_call` that make none of x's size: layers are given `out` there."""
WITH_A_SUM = {"LayerNorm", "RMSNorm"}
"""Calls that make x + skip alone, which is NumPy's own array where no kernel makes it."""


@pytest.mark.slow
@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [name for name in every_call.ALL if "fold" not in name])
def test_no_result_has_anything_of_an_earlier_one(variant: Variant, name: str, layout: str) -> None:
    """Every result is written whole: the same bits from memory that is full of NaN."""
    shape = (6, 24, 46, 46) if layout == "NCHW" else (6, 46, 46, 24)
    reused = 0
    for how, call in every_call.ALL[name].items():
        given = every_call.Given(shape, layout, np.float32)
        expected = every_call.results(call(given))
        blocks = [_pool.empty(shape, np.dtype(np.float32)) for _ in range(6)]
        for block in blocks:
            block.fill(np.nan)
        del blocks, block
        hits = facts()[1]
        for key, a in every_call.results(call(given)).items():
            assert a.tobytes() == expected[key].tobytes(), (how, key)
        reused += facts()[1] - hits
    if name in WITH_A_SUM:
        assert (reused > 0) == variant.name.startswith("cython")
    else:
        assert (reused > 0) == (name not in WITHOUT_FRESH_RESULTS)


@each_backend
def test_a_call_that_fails_keeps_no_memory(variant: Variant) -> None:
    """Whatever was made for its result is given back."""
    x = np.ones(SHAPE, np.float32)
    mean, var = fastbn.moments(x)
    with tracing():
        with pytest.raises(ValueError, match="activation"):
            fastbn.batch_norm(x, activation="rleu")
        with pytest.raises(ValueError, match="overlap"):
            fastbn.batch_norm_backward(x, x, mean, var, dresidual=x[::-1])
        with pytest.raises(ValueError, match="negative"):
            fastbn.normalize(x, mean, -1 - var)
        assert traced() == 0
    assert np.isfinite(fastbn.batch_norm(x).y).all()


# --- arrays as always ----------------------------------------------------------------------------


def test_resized_arrays_keep_their_values() -> None:
    """NumPy's realloc, smaller and larger, and what is freed afterwards has another size."""
    a = empty(1)
    a[:] = np.arange(a.size) % 251
    for size in (a.size // 3, a.size // 3 + 5, 5 * MIB, 100, 0, 2 * MIB):
        before = a.copy()
        a.resize(size, refcheck=False)
        kept = min(size, before.size)
        assert np.array_equal(a[:kept], before[:kept])
        assert not a[kept:].any()  # as ndarray.resize promises
        a[:] = np.arange(size) % 251
    del a
    assert idle() > 0


def test_tracemalloc_sees_them() -> None:
    """Their bytes, in NumPy's domain, while they live; idle memory belongs to nobody."""
    with tracing():
        a, b = empty(3), empty(2)
        assert traced() == 5 * MIB
        del a
        assert traced() == 2 * MIB
        a = empty(3)
        assert traced() == 5 * MIB
        del a, b
        assert traced() == 0


def test_a_handler_of_ones_own_is_asked_instead() -> None:
    """And is in force afterwards; without one, NumPy's is."""
    x = np.ones(SHAPE, np.float32)
    with own_handler() as name:
        assert handler_of(fastbn.batch_norm(x).y) == name
        assert handler_of(np.empty(5)) == name
    assert is_pooled(fastbn.batch_norm(x).y)
    assert handler_of(np.empty(5)) == "default_allocator"


# --- bounds --------------------------------------------------------------------------------------


def test_idle_memory_is_bounded() -> None:
    """What was given back last stays; what is larger than the bound does not, and drives nothing
    out."""
    configure(10 * MIB, 60)
    blocks = [empty(size) for size in (3, 4, 5, 11)]
    places = [a.ctypes.data for a in blocks]
    while blocks:
        del blocks[0]
        assert idle() <= 10 * MIB
    assert idle() == 9 * MIB
    assert [empty(4).ctypes.data, empty(5).ctypes.data] == places[1:3]


def test_a_smaller_bound_gives_back_at_once() -> None:
    a, b = empty(3), empty(4)
    del a, b
    assert idle() == 7 * MIB
    configure(4 * MIB, 60)
    assert idle() == 4 * MIB
    configure(0, 60)
    assert idle() == 0


def test_what_was_idle_too_long_is_given_back() -> None:
    """At the next allocation, and at the next release."""
    configure(100 * MIB, 0.2)
    a, b = empty(3), empty(9)
    del a
    assert idle() == 3 * MIB
    time.sleep(0.3)
    del b
    assert idle() == 9 * MIB
    time.sleep(0.3)
    a = empty(5)
    assert idle() == 0
    assert a.size == 5 * MIB


def test_clear_pool() -> None:
    """Gives back what is idle, and nothing that is in use."""
    used, unused = empty(2), empty(3)
    used.fill(7)
    del unused
    fastbn.clear_pool()
    assert idle() == 0
    assert (used == 7).all()


RESIDENT = """
import fastbn, numpy as np
def resident():
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) << 10 for line in lines if line[:5] == "VmRSS")
def call():
    fastbn.normalize(x, mean, var)
x, mean, var = np.ones((8, 64, 112, 112), np.float32), np.zeros(64), np.ones(64)
call()
with_pool = resident()
fastbn.clear_pool()
print(with_pool - resident(), x.nbytes)
"""


def test_what_is_given_back_is_the_systems() -> None:
    given_back, size = map(int, output(RESIDENT).split())
    assert abs(given_back - size) < MIB


PEAK = """
import fastbn, numpy as np
x = np.ones((8, 64, 112, 112), np.float32)
y = fastbn.batch_norm(x).y
print(next(line.split()[1] for line in open("/proc/self/status") if line[:5] == "VmHWM"))
"""


@pytest.mark.slow
def test_one_call_has_no_higher_peak() -> None:
    """Than without a pool, but for a header of a page and what differs from run to run."""
    with_pool, without = (
        min(int(output(PEAK, FASTBN_POOL=bound)) for _ in range(3)) for bound in ("512M", "0")
    )
    assert with_pool < without + 1024


OUT_OF_MEMORY = """
import resource, fastbn, numpy as np
from fastbn import _pool
def empty(megabytes):
    return _pool.empty((megabytes << 20,), np.dtype(np.uint8))
a, b = empty(100), empty(150)
del a, b
assert fastbn.get_config()["pool_idle"] == 250 << 20
lines = open("/proc/self/status")
used = next(int(line.split()[1]) << 10 for line in lines if line[:6] == "VmSize")
resource.setrlimit(resource.RLIMIT_AS, (used + (60 << 20), -1))
a = empty(200)          # what is idle is given back first
assert fastbn.get_config()["pool_idle"] == 0
try:
    empty(1 << 20)
except MemoryError:
    print("refused", np.empty(5).size, empty(20).size >> 20)
"""


@pytest.mark.slow
def test_without_memory() -> None:
    """Idle blocks make room; where that is not enough the call fails, and later ones work."""
    assert output(OUT_OF_MEMORY, FASTBN_POOL="1G") == "refused 5 20"


# --- the environment -----------------------------------------------------------------------------

BOUND = "import fastbn; print(fastbn.get_config()['pool_bound'])"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "bound"),
    [
        ("0", 0),
        ("12345", 12345),
        ("64k", 64 << 10),
        ("256M", 256 << 20),
        (" 3 G ", 3 << 30),
        ("999999999999999G", 1 << 62),
    ],
)
def test_variable(asked: str, bound: int) -> None:
    assert int(output(BOUND, FASTBN_POOL=asked)) == bound


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["much", "-1", "1.5G", "M", "1T", "1" * 16, "\u0661"])
def test_unknown_values_of_the_variable(asked: str) -> None:
    """Say what was expected, and that it may be unset."""
    told = error("import fastbn", FASTBN_POOL=asked)
    assert told.startswith("ValueError: environment variable FASTBN_POOL is ")
    assert "expected a number of bytes" in told
    assert "unset it" in told


@pytest.mark.slow
def test_without_a_pool() -> None:
    """0: NumPy's own memory, every time."""
    code = """
import fastbn, numpy as np
for _ in range(3):
    y = fastbn.batch_norm(np.ones((4, 16, 64, 64), np.float32)).y
    print(np._core.multiarray.get_handler_name(y), fastbn.get_config()["pool_hits"])
"""
    assert output(code, FASTBN_POOL="0").split() == ["default_allocator", "0"] * 3


@pytest.mark.parametrize(
    ("cgroup", "contents", "limits"),
    [
        (
            "0::/a/b",
            {"a/b/memory.max": "1000", "a/memory.max": "max", "memory.max": "77"},
            [1000, 77],
        ),
        ("0::/a", {"a/memory.max": "gibberish"}, []),
        ("0::/a", {"a/memory.max": "-5"}, [0]),
        ("3:memory:/m\n4:cpu:/c", {"memory/m/memory.limit_in_bytes": "2000"}, [2000]),
        ("", {}, []),
    ],
)
def test_limits_of_cgroups(
    tmp_path: Path, cgroup: str, contents: dict[str, str], limits: list[int]
) -> None:
    """Every limit on the way up counts; what is none, or unreadable, does not."""
    for name, text in contents.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "self").write_text(cgroup)
    assert list(_pool._cgroup_limits(tmp_path / "self", tmp_path / "root")) == limits


@pytest.mark.parametrize(("limits", "bound"), [([], 512 * MIB), ([80 * MIB], 10 * MIB), ([0], 0)])
def test_bound_by_the_memory_there_is(
    monkeypatch: pytest.MonkeyPatch, limits: list[int], bound: int
) -> None:
    """An eighth of it, and no more than 512 MiB."""
    monkeypatch.delenv("FASTBN_POOL", raising=False)
    monkeypatch.setattr(_pool, "_cgroup_limits", lambda: limits)
    monkeypatch.setattr(_pool, "_bound", _pool._bound)
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 1 << 24, "SC_PAGE_SIZE": 4096}.get)
    _pool.read_environment()
    assert _pool._bound == bound


# --- threads and forks ---------------------------------------------------------------------------


@pytest.mark.slow
def test_threads() -> None:
    """Many at once: no two arrays share memory while both live, and all is given back."""

    def work(number: int) -> bool:
        rng = np.random.default_rng(number)
        held: list[NDArray[Any]] = []
        for step in range(200):
            a = empty(rng.uniform(1, 3))
            a[:: 1 << 12] = number
            held.append(a)
            if step % 5 == 4:
                fine = all((a[:: 1 << 12] == number).all() for a in held)
                held.clear()
                if not fine:
                    return False
            if step % 50 == 49:
                fastbn.clear_pool()
        return True

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(8)))
    assert idle() <= _pool._bound


def in_child(work: Callable[[], bool]) -> bool:
    """Whether it is true in a forked child, which may not take long."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if work() else 2
        finally:
            os._exit(status)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_an_empty_pool() -> None:
    """Whatever other threads do meanwhile; arrays in use stay, and both sides go on."""
    kept, stop = empty(2), threading.Event()
    kept.fill(5)

    def busy() -> None:
        while not stop.is_set():
            empty(1.5)

    def child() -> bool:
        nonlocal kept
        started_empty = idle() == 0
        unharmed = bool((kept == 5).all())
        del kept
        a = empty(2)
        return started_empty and unharmed and idle() == 0 and a.size == 2 * MIB

    threads = [threading.Thread(target=busy) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        assert all(in_child(child) for _ in range(20))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert (kept == 5).all()
    assert idle() >= MIB
