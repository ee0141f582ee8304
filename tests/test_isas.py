"""Instruction sets: what is built, what the processor runs, and what is said of all others."""

from __future__ import annotations

import pytest

from fastbn import BackendError, backends
from support.processes import error, output, run

if not backends.is_built("cython"):
    pytest.skip("the compiled kernels are not built", allow_module_level=True)

from fastbn._ext import cpu
from fastbn.backends import isas, native

BUILT = isas.built()
BUILD = "in a checkout run: FASTBN_BUILD_ISA={} python -m pip install -e ."
REFUSED = "fastbn.errors.BackendError: environment variable FASTBN_ISA is "
USABLE = backends.usable()

# The module `cpu` of another machine, before fastbn is imported.
PROCESSOR = f"""
import sys
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("fastbn._ext.cpu", {cpu.__file__!r})
cpu = sys.modules[spec.name] = module_from_spec(spec)
spec.loader.exec_module(cpu)
cpu.instruction_sets = lambda: {{runs}}
"""
TELL = "import fastbn; c = fastbn.get_config(); print("


def processor(runs: dict[str, bool]) -> str:
    """Code after which the processor runs those instruction sets."""
    return PROCESSOR.format(runs=runs)


NONE = processor({"neon": True} | dict.fromkeys(BUILT, False))
WHY_NONE = (
    f"the compiled kernels were built for {', '.join(BUILT)}, and this processor runs neon; "
    + BUILD.format("native")
)


# --- none of those that were built --------------------------------------------------------------


def test_auto_passes_over_kernels_of_other_processors_with_one_warning() -> None:
    """It names what was built, what this processor runs, and the command."""
    done = run(NONE + "import fastbn; print(fastbn.get_backend())")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == next(name for name in USABLE if name != "cython")
    assert done.stderr.count("RuntimeWarning") == 1
    assert WHY_NONE in done.stderr


def test_kernels_of_other_processors_cannot_be_chosen() -> None:
    """By the variable and by name, whichever backend runs."""
    by_variable = error(NONE + "import fastbn", FASTBN_BACKEND="cython")
    by_call = error(NONE + "import fastbn; fastbn.set_backend('cython')", FASTBN_BACKEND="numpy")
    for last in (by_variable, by_call):
        assert last.startswith("fastbn.errors.BackendError: ")
        assert f"backend 'cython' cannot run here: {WHY_NONE}; usable here: " in last


@pytest.mark.parametrize("asked", ["", "auto"])
def test_get_config_tells_of_kernels_of_other_processors(asked: str) -> None:
    """As why the backend is unusable, and why there is no instruction set."""
    tell = TELL + "c['isa'], c['openmp'], c['isas'], c['isa_source'], *c['unusable'], sep='|')"
    told = output(NONE + tell, FASTBN_BACKEND="numpy", FASTBN_ISA=asked).split("|")
    assert told[:5] == ["None", "None", "()", WHY_NONE, f"cython: {WHY_NONE}"]


@pytest.mark.parametrize("asked", [BUILT[0], "neon", "quantum"])
def test_there_is_none_to_choose(asked: str) -> None:
    """FASTBN_ISA is refused with the reason."""
    last = error(NONE + "import fastbn", FASTBN_ISA=asked, FASTBN_BACKEND="numpy")
    wanted = "expected it unset or 'auto': there is no instruction set to choose, for "
    assert last == f"{REFUSED}{asked!r}, {wanted}{WHY_NONE}"


# --- some of those that were built --------------------------------------------------------------


def test_one_that_the_processor_lacks_is_told() -> None:
    """Beside those that run here: together they are what was built."""
    tell = TELL + "*c['isas'], '|', *c['unusable'], sep=', ')"
    prelude = processor(dict.fromkeys(BUILT, False) | {BUILT[-1]: True})
    here, others = output(prelude + tell).split("|")
    assert here.strip(", ") == BUILT[-1]
    for isa in BUILT[:-1]:
        assert f"{isa}: built, and not of this processor" in others


def test_info_tells_what_was_built(capsys: pytest.CaptureFixture[str]) -> None:
    """In the line of the instruction sets."""
    from fastbn import show_config

    show_config()
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("isas "))
    runs = cpu.instruction_sets()
    assert line.split(maxsplit=1)[1] == ", ".join(isa for isa in BUILT if runs[isa])


@pytest.mark.parametrize("backend", [name for name in USABLE if name != "numba"])
def test_one_that_was_not_built_is_refused(backend: str) -> None:
    """FASTBN_ISA's message has the command that builds it, and keeps the others."""
    prelude = processor({"neon": True} | cpu.instruction_sets())
    last = error(prelude + "import fastbn", FASTBN_ISA="neon", FASTBN_BACKEND=backend)
    command = BUILD.format(",".join([*BUILT, "neon"]))
    assert last.startswith(f"{REFUSED}'neon', which was not built ({command}), expected one of ")
    assert f"run here: auto, {', '.join(isas.usable())}; set one of them" in last


def test_auto_takes_the_best_that_was_built() -> None:
    """A better one of this processor that was not built is not among what can be chosen."""
    prelude = processor({"neon": True} | cpu.instruction_sets())
    told = output(prelude + TELL + "c['isa'], *c['isas'])").split()
    assert told == [isas.usable()[0], *isas.usable()]


@pytest.mark.parametrize("built", [True, False])
def test_one_that_the_processor_lacks_is_refused(built: bool) -> None:
    """No build can help."""
    prelude = processor(cpu.instruction_sets() | {"neon": False, BUILT[0]: len(BUILT) == 1})
    asked = BUILT[0] if built and len(BUILT) > 1 else "neon"
    last = error(prelude + "import fastbn", FASTBN_ISA=asked)
    assert last.startswith(f"{REFUSED}{asked!r}, which this processor does not have, expected ")


def test_a_variant_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not built is refused before anything is imported."""
    sets = {"neon": True} | cpu.instruction_sets()
    monkeypatch.setattr(cpu, "instruction_sets", lambda: sets)
    with pytest.raises(BackendError, match=r"^isa is 'neon', which was not built \(in a checkout"):
        native.variant("neon")
