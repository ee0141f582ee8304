"""Environment variables, defaults and overrides, and what show_config tells."""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from ctypes.util import find_library
from importlib import metadata
from typing import Any, TypeVar

import numpy as np
import pytest

import fastbn
from fastbn import backends, config
from support.processes import error, output, run

pytestmark = pytest.mark.slow

T = TypeVar("T")
USABLE = backends.usable()
ISAS = backends.native_facts().isas
WHAT = "import fastbn; print(fastbn.get_backend(), fastbn.get_num_threads())"
TELL = "import fastbn; c = fastbn.get_config(); print("
TELL_THREADS = """
import fastbn
from fastbn import config  # get_config would import every backend
n = fastbn.get_num_threads()
print(n, config._threads_source(n))
"""
KEYS = {"version", "backend", "backends", "isa", "isas", "openmp", "threads"}

# A stand-in for an installation that lacks a module, or whose compiled module is broken.
LACKING = "import sys; sys.modules[{name!r}] = None\n"
UNBUILT = LACKING.format(name="fastbn._ext.entry")
NO_NUMBA = LACKING.format(name="numba")
BROKEN = """
import sys
from importlib.machinery import ModuleSpec

class Broken:
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name == {name!r} else None
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        raise {error}("undefined symbol:\\nnothing_like_it")

sys.meta_path.insert(0, Broken())
"""
ERRORS = ["ImportError", "SystemError", "AttributeError", "OSError", "RuntimeError"]
COMPILED = [
    "fastbn._ext.cpu",
    "fastbn._ext.pool",
    "fastbn._ext.entry",
    *(f"fastbn._ext.kernels_{isa}_f32" for isa in ISAS[:1]),
]


def broken(module: str, error_type: str = "ImportError") -> str:
    """Code after which that module is there and raises when imported."""
    return BROKEN.format(name=module, error=error_type)


@pytest.fixture
def defaults() -> Iterator[None]:
    """Puts the process's defaults back."""
    saved = dict(vars(config._default))
    yield
    vars(config._default).update(saved)


# --- the environment ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", USABLE)
def test_backend_variable(name: str) -> None:
    """FASTBN_BACKEND chooses the default, and get_config says so."""
    told = output(TELL + "c['backend'], c['backend_source'])", FASTBN_BACKEND=name)
    assert told == f"{name} FASTBN_BACKEND"


@pytest.mark.parametrize("value", [None, "", "auto"])
def test_backend_auto(value: str | None) -> None:
    """Unset, empty and auto take the first usable of cython, numba, numpy, without a warning."""
    environment = {} if value is None else {"FASTBN_BACKEND": value}
    quiet = "import warnings; warnings.simplefilter('error')\n" if "cython" in USABLE else ""
    assert output(quiet + WHAT, **environment).split()[0] == USABLE[0]


@pytest.mark.parametrize("others", [UNBUILT, UNBUILT + NO_NUMBA], ids=["numba", "numpy"])
def test_auto_passes_over_unbuilt_kernels_with_one_warning(others: str) -> None:
    """Never-built kernels are passed over; one RuntimeWarning names the command."""
    left = [
        name for name in USABLE if name != "cython" and (name != "numba" or NO_NUMBA not in others)
    ]
    done = run(others + WHAT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == left[0]
    assert done.stderr.count("RuntimeWarning") == 1
    assert "<string>:" in done.stderr, "the warning points at whoever imports fastbn"
    assert "python -m pip install -e ." in done.stderr


def test_named_backends_do_not_warn() -> None:
    """Whoever names a backend knows: no warning about kernels that were never built."""
    done = run(UNBUILT + WHAT, FASTBN_BACKEND="numpy")
    assert (done.stdout.split()[0], done.stderr) == ("numpy", "")


@pytest.mark.parametrize("module", COMPILED)
@pytest.mark.parametrize("value", ["auto", "cython"])
def test_broken_kernels_raise(value: str, module: str) -> None:
    """A compiled module that is there and fails to import is an error, never passed over."""
    last = error(broken(module) + WHAT, FASTBN_BACKEND=value)
    assert last.startswith("fastbn.errors.BackendError: ")
    for piece in ("'cython'", "undefined symbol: nothing_like_it", "FASTBN_BACKEND"):
        assert piece in last


@pytest.mark.parametrize("module", COMPILED)
def test_a_bug_report_survives_broken_kernels(module: str) -> None:
    """On another backend all still works, and get_config does not count cython as usable."""
    told = output(
        broken(module) + TELL + "c['backend'], 'cython' in c['backends'], c['unusable'][0])",
        FASTBN_BACKEND="numpy",
    )
    assert told.startswith("numpy False cython: ")
    assert "ImportError: undefined symbol: nothing_like_it" in told


@pytest.mark.parametrize("error_type", ERRORS)
def test_a_broken_numba(error_type: str) -> None:
    """Whatever it raises: auto passes over it, whoever names it is told why, each time, and all
    else works."""
    stand_in = broken("numba", error_type)
    why = f"numba is there but fails to load ({error_type}: undefined symbol: nothing_like_it)"
    done = run(UNBUILT + stand_in + WHAT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "numpy"
    assert "slower numpy backend" in done.stderr
    last = error(stand_in + WHAT, FASTBN_BACKEND="numba")
    assert last.startswith("fastbn.errors.BackendError: environment variable FASTBN_BACKEND=numba")
    assert why in last
    told = output(stand_in + REFUSALS, FASTBN_BACKEND="numpy").splitlines()
    assert [why in line for line in told] == [True] * 5


REFUSALS = """
import fastbn
for choose in (fastbn.set_backend, fastbn.use_backend, fastbn.set_backend):
    try:
        with choose("numba"):
            pass
    except fastbn.BackendError as error:
        print(error)
try:
    fastbn.set_backend("cuda")
except ValueError as error:
    print(error)
print(fastbn.get_config()["unusable"])
"""


def test_something_else_in_numbas_place() -> None:
    """A module of that name without a spec, as tools put it there that import nothing heavy."""
    stand_in = "import sys, types; sys.modules['numba'] = types.ModuleType('numba')\n"
    done = run(UNBUILT + stand_in + WHAT)
    assert done.stdout.split()[:1] == ["numpy"], done.stderr


IMPOSSIBLE = [
    {"NUMBA_DISABLE_JIT": "1"},
    {"NUMBA_NUM_THREADS": "0"},
    {"NUMBA_THREADING_LAYER": "no such layer"},
    {"NUMBA_THREADING_LAYER_PRIORITY": "omp"},
    pytest.param(
        {"NUMBA_THREADING_LAYER": "tbb"},
        marks=pytest.mark.skipif(find_library("tbb") is not None, reason="TBB is installed"),
    ),
]


@pytest.mark.skipif("numba" not in USABLE, reason="numba is not installed")
@pytest.mark.parametrize("variables", IMPOSSIBLE, ids=str)
def test_numba_that_cannot_compile_or_have_threads(variables: dict[str, str]) -> None:
    """It is told where Numba is chosen, not in a call; auto passes over it."""
    value = next(iter(variables.values()))
    done = run(UNBUILT + WHAT, **variables)
    assert done.stdout.split()[:1] == ["numpy"], done.stderr
    last = error(WHAT, FASTBN_BACKEND="numba", **variables)
    assert last.startswith("fastbn.errors.BackendError: environment variable FASTBN_BACKEND=numba")
    chosen = "import fastbn\nwith fastbn.use_backend('numba'): pass"
    last = error(chosen, FASTBN_BACKEND="numpy", **variables)
    assert last.startswith("fastbn.errors.BackendError: backend 'numba' cannot run here: ")
    assert value in last or "DISABLE_JIT" in last or "must be > 0" in last


@pytest.mark.parametrize(
    ("lacking", "name", "remedy"),
    [(UNBUILT, "cython", "pip install -e ."), (NO_NUMBA, "numba", "pip install 'fastbn[numba]'")],
)
def test_unavailable_backend(lacking: str, name: str, remedy: str) -> None:
    """A backend that cannot run here raises BackendError with the remedy and what is usable."""
    by_variable = error(lacking + WHAT, FASTBN_BACKEND=name)
    by_call = error(f"{lacking}import fastbn; fastbn.set_backend({name!r})", FASTBN_BACKEND="numpy")
    by_block = error(
        f"{lacking}import fastbn\nwith fastbn.use_backend({name!r}): pass", FASTBN_BACKEND="numpy"
    )
    for last in (by_variable, by_call, by_block):
        assert last.startswith("fastbn.errors.BackendError: ")
        for piece in (f"backend {name!r} cannot run here", remedy, "usable here: ", "numpy"):
            assert piece in last
    assert f"environment variable FASTBN_BACKEND={name}" in by_variable


def test_unknown_backend_variable() -> None:
    """An unknown FASTBN_BACKEND raises at import and lists what is possible."""
    last = error("import fastbn", FASTBN_BACKEND="cuda")
    assert last.startswith("ValueError: environment variable FASTBN_BACKEND=cuda: ")
    for piece in ("'cuda'", "'auto', 'cython', 'numba', 'numpy'", "usable here: "):
        assert piece in last


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"FASTBN_NUM_THREADS": "3"}, "3 FASTBN_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "5"}, "5 OMP_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "4,2"}, "4 OMP_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "\t+04 ,2\n"}, "4 OMP_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "5000"}, "1024 OMP_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "2147483647"}, "1024 OMP_NUM_THREADS"),
        ({"FASTBN_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, "3 FASTBN_NUM_THREADS"),
        ({"FASTBN_NUM_THREADS": "", "OMP_NUM_THREADS": "5"}, "5 OMP_NUM_THREADS"),
    ],
    ids=str,
)
def test_thread_variables(environment: dict[str, str], told: str) -> None:
    """FASTBN_NUM_THREADS is the default, else OMP_NUM_THREADS, of a list its first; the same where
    there is no OpenMP to ask."""
    for prelude in ("", UNBUILT):
        assert output(prelude + TELL_THREADS, FASTBN_BACKEND="numpy", **environment) == told


NO_NUMBERS = ["", "many", "0", "-3", "2.5", "3abc", "0x3", "4,many", "4,0", "4,", ",4", "9" * 20]


@pytest.mark.parametrize("openmp", [None, *NO_NUMBERS, "9" * 5000], ids=lambda v: str(v)[:20])
def test_threads_without_a_usable_variable(openmp: str | None) -> None:
    """Otherwise the processors allowed here; OMP_NUM_THREADS is not ours to refuse, and what GNU
    OpenMP ignores is ignored."""
    environment = {} if openmp is None else {"OMP_NUM_THREADS": openmp}
    for prelude in ("", UNBUILT):
        told = output(prelude + TELL_THREADS, FASTBN_BACKEND="numpy", **environment)
        threads, source = told.split(" ", 1)
        assert 1 <= int(threads) <= len(os.sched_getaffinity(0))
        assert source == "processors allowed here"


@pytest.mark.parametrize("value", ["0", "-1", "1025", "5000", "2.5", "two", "2,1", " ", "9" * 5000])
def test_bad_thread_variable(value: str) -> None:
    """A FASTBN_NUM_THREADS that is no number of threads raises at import and says what is."""
    last = error("import fastbn", FASTBN_BACKEND="numpy", FASTBN_NUM_THREADS=value)
    assert last.startswith("ValueError: environment variable FASTBN_NUM_THREADS is ")
    for piece in (value[:20], "from 1 to 1024", "set one of them, or unset it"):
        assert piece in last


@pytest.mark.parametrize(("n", "remedy"), [(0, "pass 1 for serial work"), (5000, "pass 1024 at")])
def test_bad_number_of_threads(n: int, remedy: str) -> None:
    """The remedy is for what was given."""
    with pytest.raises(ValueError, match=rf"^n is {n}, .* from 1 to 1024; {remedy}"):
        fastbn.set_num_threads(n)


@pytest.mark.parametrize("isa", ISAS)
def test_isa_variable(isa: str) -> None:
    """FASTBN_ISA chooses the instruction set, and get_config says so."""
    code = TELL + "c['backend'], c['isa'], c['isa_source'])"
    assert output(code, FASTBN_ISA=isa) == f"cython {isa} FASTBN_ISA"


@pytest.mark.parametrize("value", ["", "auto"])
def test_isa_auto(value: str) -> None:
    """auto is what an unset variable gives."""
    code = TELL + "c['isa'], c['isas'])"
    environment = {"FASTBN_BACKEND": "auto" if "cython" in USABLE else "numpy"}
    assert output(code, FASTBN_ISA=value, **environment) == output(code, **environment)


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("value", ["quantum", "AVX2", "avx2,sse2"])
def test_bad_isa_variable(value: str, backend: str) -> None:
    """An unknown FASTBN_ISA raises at import, whichever backend runs, and lists the known."""
    last = error("import fastbn", FASTBN_ISA=value, FASTBN_BACKEND=backend)
    assert last.startswith(("ValueError: ", "fastbn.errors.BackendError: "))
    for piece in ("FASTBN_ISA", value, "auto", *ISAS):
        assert piece in last


@pytest.mark.parametrize("backend", [None, "numpy", "cython"])
def test_import_is_light(backend: str | None) -> None:
    """`import fastbn` imports NumPy and the compiled kernels, and none of the heavy libraries."""
    if backend not in (None, *USABLE) or (backend is None and "cython" not in USABLE):
        backend = "numpy"
    heavy = {"numba", "llvmlite", "scipy", "matplotlib", "sklearn", "torch", "rich", "dask"}
    code = f"import sys, fastbn; print(sorted({heavy} & set(sys.modules)))"
    assert output(code, **({"FASTBN_BACKEND": backend} if backend else {})) == "[]"


def test_environment_is_read_once() -> None:
    """A variable changed after the import changes nothing, and fastbn changes none itself."""
    code = f"""
import os
before = dict(os.environ)
import fastbn, numpy
fastbn.batch_norm(numpy.ones((64, 8, 32, 32), numpy.float32))
assert dict(os.environ) == before
os.environ["FASTBN_NUM_THREADS"] = "7"
os.environ["FASTBN_BACKEND"] = "cuda"
isa = fastbn.get_config()["isa"]
os.environ["FASTBN_ISA"] = "portable"
fastbn.batch_norm(numpy.ones((2, 3)))
print(fastbn.get_num_threads(), fastbn.get_backend() == {USABLE[0]!r})
assert fastbn.get_config()["isa"] == isa
"""
    quiet = "import warnings; warnings.simplefilter('ignore')"
    assert output(quiet + code, FASTBN_NUM_THREADS="2") == "2 True"


# --- defaults and overrides ---------------------------------------------------------------------


@pytest.mark.parametrize("name", USABLE)
def test_set_backend(name: str, defaults: None) -> None:
    """set_backend makes a default for all threads; auto is the first usable."""
    fastbn.set_backend(name)
    assert fastbn.get_backend() == name == in_a_thread(fastbn.get_backend)
    assert fastbn.get_config()["backend_source"] == "set_backend"
    fastbn.set_backend("auto")
    assert fastbn.get_backend() == USABLE[0]


def test_set_num_threads(defaults: None) -> None:
    """set_num_threads makes a default for all threads; NumPy's whole numbers are welcome."""
    for n in (3, np.int64(5), 1024):
        fastbn.set_num_threads(n)  # type: ignore[arg-type]
        assert fastbn.get_num_threads() == n == in_a_thread(fastbn.get_num_threads)
    assert fastbn.get_config()["threads_source"] == "set_num_threads"


def test_use_overrides_the_default_in_this_context_alone(defaults: None) -> None:
    """use_* holds within its block, nests, ends with it, and is unseen by other threads."""
    fastbn.set_backend(USABLE[0])
    fastbn.set_num_threads(4)
    with fastbn.use_backend("numpy"), fastbn.use_num_threads(2):
        assert (fastbn.get_backend(), fastbn.get_num_threads()) == ("numpy", 2)
        assert in_a_thread(fastbn.get_backend) == USABLE[0]
        assert in_a_thread(fastbn.get_num_threads) == 4
        with fastbn.use_backend(USABLE[0]), fastbn.use_num_threads(3):
            assert (fastbn.get_backend(), fastbn.get_num_threads()) == (USABLE[0], 3)
        fastbn.set_num_threads(6)
        assert (fastbn.get_backend(), fastbn.get_num_threads()) == ("numpy", 2)
        told = fastbn.get_config()
        assert told["backend_source"] == "use_backend"
        assert told["threads_source"] == "use_num_threads"
    assert (fastbn.get_backend(), fastbn.get_num_threads()) == (USABLE[0], 6)


def test_use_ends_with_an_exception() -> None:
    """An exception leaves the block with the default in force again."""
    before = fastbn.get_backend(), fastbn.get_num_threads()
    with pytest.raises(KeyError), fastbn.use_backend("numpy"), fastbn.use_num_threads(9):
        raise KeyError
    assert (fastbn.get_backend(), fastbn.get_num_threads()) == before


def test_use_is_unseen_by_other_tasks() -> None:
    """Each asyncio task has its own use_num_threads, though all run in one thread."""

    async def work(n: int) -> int:
        with fastbn.use_num_threads(n):
            await asyncio.sleep(0)
            return fastbn.get_num_threads()

    async def together() -> list[int]:
        return await asyncio.gather(*(work(n) for n in range(1, 6)))

    assert asyncio.run(together()) == [1, 2, 3, 4, 5]


async def _values(backend: str) -> AsyncIterator[int]:
    with fastbn.use_backend(backend), fastbn.use_num_threads(7):
        yield 1
        yield 2


def _in_force() -> tuple[str, int]:
    return fastbn.get_backend(), fastbn.get_num_threads()


def test_an_async_generator_that_is_left_early() -> None:
    """The event loop ends it in a context of its own: no error, and the block has ended in the
    context that it began in, too, and in no other block."""
    before = _in_force()
    complaints: list[dict[str, Any]] = []

    async def consume() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, told: complaints.append(told))
        for _ in range(2):
            async for _ in _values("numpy"):
                assert _in_force() == ("numpy", 7)
                break
            await asyncio.sleep(0.01)
            assert _in_force() == before
        with fastbn.use_num_threads(5):
            async for _ in _values("numpy"):
                break
            await asyncio.sleep(0.01)
            assert _in_force() == (before[0], 5)
        assert _in_force() == before
        here = config._threads_here.get()
        assert here is None or here.outer is None, "ended blocks do not pile up"

    asyncio.run(consume())
    assert complaints == []


def test_a_generator_that_is_passed_on() -> None:
    """Begun in one context and ended in another, in whatever order."""

    def values(n: int) -> Generator[int]:
        with fastbn.use_num_threads(n):
            yield n

    before = _in_force()
    contexts = [contextvars.copy_context() for _ in range(2)]
    generators = [values(n) for n in (3, 4)]
    for generator in generators:
        assert contexts[0].run(next, generator) == contexts[0].run(fastbn.get_num_threads)
    contexts[1].run(generators[0].close)
    assert contexts[0].run(fastbn.get_num_threads) == 4
    contexts[1].run(generators[1].close)
    assert contexts[0].run(_in_force) == contexts[1].run(_in_force) == _in_force() == before


def in_a_thread(function: Callable[[], T]) -> T:
    """What `function` gives in a thread of its own."""
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


# --- what is told -------------------------------------------------------------------------------


def test_get_config() -> None:
    """The keys that are promised, with what is in force; changing the dict changes nothing."""
    told = fastbn.get_config()
    assert told.keys() >= KEYS
    assert told["backend"] == fastbn.get_backend()
    assert told["threads"] == fastbn.get_num_threads()
    assert told["backends"] == USABLE
    assert told["isas"] == ISAS
    assert told["isa"] in (ISAS or (None,))
    assert told["openmp"] in ((True, False) if ISAS else (None,))
    assert told["version"].count(".") == 2
    unusable = [name for name in backends.BACKENDS if name not in USABLE]
    unusable += [line.partition(": ")[0] for line in backends.native_facts().foreign]
    assert [line.partition(": ")[0] for line in told["unusable"]] == unusable
    told["backend"] = "changed"
    assert fastbn.get_config()["backend"] == fastbn.get_backend()


@pytest.mark.parametrize("name", [name for name in USABLE if name != "cython"])
def test_other_backends_have_no_instruction_set(name: str) -> None:
    """What the kernels could do is not told as what runs."""
    with fastbn.use_backend(name):
        told = fastbn.get_config()
    assert (told["isa"], told["openmp"], told["isas"]) == (None, None, ISAS)
    assert name in told["isa_source"] or not ISAS


def test_unbuilt_kernels_are_told() -> None:
    """isa_source says how to build them, and so does the list of what cannot run."""
    told = output(
        UNBUILT + TELL + "c['isa'], c['openmp'], c['isas'], c['isa_source'], c['unusable'])",
        FASTBN_BACKEND="numpy",
    )
    assert told.startswith("None None () the compiled kernels were never built")
    assert told.count("python -m pip install -e .") == 2


@pytest.mark.parametrize("broken", ["raises", "gives nothing"])
def test_without_metadata(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a frozen or vendored copy, or beside a broken installation."""

    def version(name: str) -> None:
        if broken == "raises":
            raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert fastbn.__version__ == fastbn.get_config()["version"] == "unknown"


def test_show_config(capsys: pytest.CaptureFixture[str]) -> None:
    """show_config prints a line for each fact of get_config."""
    fastbn.show_config()
    lines = capsys.readouterr().out.splitlines()
    told = fastbn.get_config()
    assert [line.split()[0] for line in lines] == list(told)
    for line, value in zip(lines, told.values(), strict=True):
        assert (", ".join(value) or "none" if isinstance(value, tuple) else str(value)) in line
