"""setup.py: which instruction sets it builds, and what it leaves of an earlier build."""

from __future__ import annotations

import os
import platform
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastbn import backends

SETUP = Path(__file__).parents[1] / "setup.py"
if not SETUP.exists():
    pytest.skip("setup.py is in a checkout alone", allow_module_level=True)

X86 = ["avx512", "avx2", "sse2"]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory for setup.py, which finds nothing there to translate."""
    (tmp_path / "fastbn/_ext").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("Cython.Build.cythonize", lambda extensions, **options: extensions)
    return tmp_path


def described(
    asked: str | None, patch: pytest.MonkeyPatch, machine: str = "x86_64"
) -> dict[str, Any]:
    """What setup.py passes to setuptools where FASTBN_BUILD_ISA is `asked`."""
    given: dict[str, Any] = {}
    patch.setattr(platform, "machine", lambda: machine)
    patch.setattr("setuptools.setup", lambda **arguments: given.update(arguments))
    patch.delenv("FASTBN_BUILD_ISA", raising=False)
    if asked is not None:
        patch.setenv("FASTBN_BUILD_ISA", asked)
    runpy.run_path(str(SETUP))
    return given


def kernels(asked: str | None, patch: pytest.MonkeyPatch, machine: str = "x86_64") -> list[str]:
    """The instruction sets that setup.py builds, each for all element types."""
    names = [extension.name for extension in described(asked, patch, machine)["ext_modules"]]
    assert names[:3] == ["fastbn._ext.cpu", "fastbn._ext.pool", "fastbn._ext.entry"]
    pairs = [name.removeprefix("fastbn._ext.kernels_").split("_") for name in names[3:]]
    sets = list(dict.fromkeys(isa for isa, _ in pairs))
    assert pairs == [[isa, element] for isa in sets for element in ("f32", "f64", "f16", "bf16")]
    return sets


@pytest.mark.parametrize(
    ("asked", "built"),
    [
        (None, X86),
        ("all", [*X86, "portable"]),
        ("portable", ["portable"]),
        ("sse2,avx2", ["sse2", "avx2"]),
        (" avx2 , sse2,avx2", ["avx2", "sse2"]),
    ],
)
def test_what_is_asked_for_is_built(
    asked: str | None, built: list[str], tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever order, and once; portable kernels only where they are named."""
    assert kernels(asked, monkeypatch) == built


@pytest.mark.parametrize("asked", [None, "all", "native", "portable"])
def test_other_machines_have_portable_kernels(
    asked: str | None, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing else, whatever is asked for."""
    assert kernels(asked, monkeypatch, "aarch64") == ["portable"]


PROCESSORS = {
    "fpu sse sse2 avx f16c fma avx2 avx512f avx512dq avx512bw avx512vl": "avx512",
    "fpu sse sse2 avx f16c fma avx2 avx512f": "avx2",
    "fpu sse sse2 avx f16c avx2": "sse2",
    "fpu sse sse2": "sse2",
}


@pytest.mark.parametrize("flags", PROCESSORS)
def test_native_is_the_best_that_runs(
    flags: str, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By all that the compiler may use, and alone."""
    monkeypatch.setattr(Path, "read_text", lambda path, *_: f"flags\t\t: {flags}\nbugs\t\t:\n")
    assert kernels("native", monkeypatch) == [PROCESSORS[flags]]


@pytest.mark.skipif(not backends.is_built("cython"), reason="the compiled kernels are not built")
def test_native_is_what_the_kernels_would_choose(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The build and the import agree on what this machine runs."""
    from fastbn._ext import cpu

    best = next(isa for isa, runs in cpu.instruction_sets().items() if runs)
    assert kernels("native", monkeypatch, platform.machine()) == [best]


BAD = [
    "",
    " ",
    ",",
    "avx2,",
    "avx2,,sse2",
    "AVX2",
    "quantum",
    "avx2,neon",
    "native,sse2",
    "avx2 sse2",
]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("asked", BAD)
def test_bad_names_are_refused(
    asked: str, machine: str, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, with what came and what is known on this machine, before anything is done."""
    with pytest.raises(SystemExit) as refused:
        described(asked, monkeypatch, machine)
    message = str(refused.value)
    known = ", ".join([*X86, "portable"] if machine == "x86_64" else ["portable"])
    pieces = f"FASTBN_BUILD_ISA is {asked!r}", "native, all", machine, f": {known};", "unset it"
    for piece in pieces:
        assert piece in message
    assert "\n" not in message
    assert list(tree.rglob("*.*")) == []


def test_a_bad_name_ends_a_build_at_once(tmp_path: Path) -> None:
    """The build itself, in a process of its own: one line, and no file."""
    done = subprocess.run(
        [sys.executable, str(SETUP), "build_ext", "--inplace"],
        cwd=tmp_path,
        env=os.environ | {"FASTBN_BUILD_ISA": "quantum"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert "FASTBN_BUILD_ISA is 'quantum'" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("inplace", [True, False])
def test_kernels_of_an_earlier_build_go(
    inplace: bool, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are not built again; where a build is not in place, only what it would install."""
    from setuptools import Distribution
    from setuptools.command.build_ext import build_ext

    given = described("avx2", monkeypatch)
    command = given["cmdclass"]["build_ext"](Distribution({"ext_modules": given["ext_modules"]}))
    command.inplace, command.build_lib, command.build_temp = inplace, "build/lib", "build/temp"
    command.ensure_finalized()
    names = ("cpu", "pool", "entry", "kernels_avx2_f16", "kernels_sse2_f16", "kernels_portable_f64")
    modules = [Path(command.get_ext_filename(f"fastbn._ext.{name}")) for name in names]
    other_python = Path("fastbn/_ext/kernels_sse2_f16.cpython-00-other.so")
    for root in (tree, tree / "build/lib"):
        (root / "fastbn/_ext").mkdir(parents=True, exist_ok=True)
        for module in (*modules, other_python):
            (root / module).touch()
    monkeypatch.setattr(build_ext, "run", lambda command: None)
    command.run()
    for root, cleared in ((tree, inplace), (tree / "build/lib", True)):
        left = {path.relative_to(root) for path in (root / "fastbn/_ext").glob("*.so")}
        assert left == {*(modules[:4] if cleared else modules), other_python}


def test_modules_depend_on_what_is_compiled_into_them(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A header is in the kernels alone; flags are in all. Of its own files Cython knows."""
    (tree / "fastbn/_ext/simd.h").touch()
    for extension in described("all", monkeypatch)["ext_modules"]:
        header = ["fastbn/_ext/simd.h"] * ("kernels" in extension.name)
        assert extension.depends == ["setup.py", *header]
