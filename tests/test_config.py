"""Environment variables, defaults and overrides, and what show_config tells."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import pytest
from processes import error, output, run

import fastbn
from fastbn import backends, config

T = TypeVar("T")
USABLE = backends.usable()
ISAS = backends.native_facts().isas
WHAT = "import fastbn; print(fastbn.get_backend(), fastbn.get_num_threads())"
TELL = "import fastbn; c = fastbn.get_config(); print("
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
        raise ImportError("undefined symbol: nothing_like_it")

sys.meta_path.insert(0, Broken())
"""
COMPILED = [
    "fastbn._ext.cpu",
    "fastbn._ext.entry",
    *(f"fastbn._ext.kernels_{isa}_f32" for isa in ISAS[:1]),
]


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
    last = error(BROKEN.format(name=module) + WHAT, FASTBN_BACKEND=value)
    assert last.startswith("fastbn.errors.BackendError: ")
    for piece in ("'cython'", "undefined symbol: nothing_like_it", "FASTBN_BACKEND"):
        assert piece in last


@pytest.mark.parametrize("module", COMPILED)
def test_a_bug_report_survives_broken_kernels(module: str) -> None:
    """On another backend all still works, and get_config does not count cython as usable."""
    told = output(
        BROKEN.format(name=module) + TELL + "c['backend'], 'cython' in c['backends'])",
        FASTBN_BACKEND="numpy",
    )
    assert told == "numpy False"


def test_auto_passes_over_a_broken_numba() -> None:
    """Without kernels, a numba that is there and fails to import leaves numpy."""
    done = run(UNBUILT + BROKEN.format(name="numba") + WHAT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "numpy"
    assert "slower numpy backend" in done.stderr


@pytest.mark.skipif("numba" not in USABLE, reason="numba is not installed")
def test_numba_without_its_compiler_is_unavailable() -> None:
    last = error(WHAT, FASTBN_BACKEND="numba", NUMBA_DISABLE_JIT="1")
    assert last.startswith("fastbn.errors.BackendError: ")
    assert "NUMBA_DISABLE_JIT is set" in last


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
        ({"FASTBN_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, "3 FASTBN_NUM_THREADS"),
        ({"FASTBN_NUM_THREADS": "", "OMP_NUM_THREADS": "5"}, "5 OMP_NUM_THREADS"),
    ],
    ids=str,
)
def test_thread_variables(environment: dict[str, str], told: str) -> None:
    """FASTBN_NUM_THREADS is the default, else OMP_NUM_THREADS, of a list its first."""
    code = TELL + "c['threads'], c['threads_source'])"
    assert output(code, FASTBN_BACKEND="numpy", **environment) == told


@pytest.mark.parametrize("openmp", [None, "", "many", "0"])
def test_threads_without_a_usable_variable(openmp: str | None) -> None:
    """Otherwise the processors allowed here; OMP_NUM_THREADS is not ours to refuse."""
    environment = {} if openmp is None else {"OMP_NUM_THREADS": openmp}
    code = TELL + "c['threads'], c['threads_source'])"
    threads, source = output(code, FASTBN_BACKEND="numpy", **environment).split(" ", 1)
    assert 1 <= int(threads) <= len(os.sched_getaffinity(0))
    assert source == "processors allowed here"


@pytest.mark.parametrize("value", ["0", "-1", "1025", "2.5", "two", "2,1", " "])
def test_bad_thread_variable(value: str) -> None:
    """A FASTBN_NUM_THREADS that is no number of threads raises at import and says what is."""
    last = error("import fastbn", FASTBN_BACKEND="numpy", FASTBN_NUM_THREADS=value)
    assert last.startswith("ValueError: environment variable FASTBN_NUM_THREADS is ")
    for piece in (value, "from 1 to 1024"):
        assert piece in last


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
    heavy = {"numba", "llvmlite", "scipy", "matplotlib", "sklearn", "torch", "rich"}
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
    told["backend"] = "changed"
    assert fastbn.get_config()["backend"] == fastbn.get_backend()


def test_show_config(capsys: pytest.CaptureFixture[str]) -> None:
    """show_config prints a line for each fact of get_config."""
    fastbn.show_config()
    lines = capsys.readouterr().out.splitlines()
    told = fastbn.get_config()
    assert [line.split()[0] for line in lines] == list(told)
    for line, value in zip(lines, told.values(), strict=True):
        assert (", ".join(value) if isinstance(value, tuple) else str(value)) in line
