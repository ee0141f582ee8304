"""Builds the compiled kernels: one source, once for each instruction set and element type.

The kernels are `fastbn/_ext/kernels.pxi`. For every row of `INSTRUCTION_SETS` that is asked for,
and of `ELEMENTS`, a stub that includes it is written and compiled into a module of its own with the
row's flags, so that no instruction of one set can slip into another. `entry` and `cpu` are built
without any.

The environment variable FASTBN_BUILD_ISA asks for instruction sets: `native`, the best that this
machine runs; a list with commas; or `all`. By default all but `portable`, where there are others.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

EXT = Path("fastbn/_ext")

# Width of a vector register in bytes, and the flags that allow it; the best first.
INSTRUCTION_SETS: dict[str, tuple[int, list[str]]] = {}
if platform.machine() == "x86_64":
    INSTRUCTION_SETS |= {
        "avx512": (
            64,
            [
                *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c"),
                "-mprefer-vector-width=512",
            ],
        ),
        "avx2": (32, ["-mavx2", "-mfma", "-mf16c"]),
        "sse2": (16, []),
    }
INSTRUCTION_SETS["portable"] = (16, ["-DFASTBN_PORTABLE"])
ELEMENTS = {
    "f32": "FASTBN_F32",
    "f64": "FASTBN_F64",
    "f16": "FASTBN_F16",
    "bf16": "FASTBN_BF16",
}
# The kernels' loops take what they do as constants: they are small functions that must be inlined.
INLINED = ("CYTHON_INLINE", "inline __attribute__((always_inline, unused))")

# Contraction to fused multiply-adds would change the bits from one instruction set to the next;
# -ffast-math would let the order of summation change as well. Neither is ever wanted here.
COMMON = [
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-g0",  # Python's own flags ask for symbols: they are four fifths of a module
]
WARNINGS = ["-Wall", "-Wextra"]

OPENMP_PROBE = """
#include <omp.h>
int main(void) {
    int n = 0;
    #pragma omp parallel num_threads(2) reduction(+:n)
    n += 1;
    return n >= 1 ? 0 : 1;
}
"""


# Loops over the sixteen lanes of a vector stay loops: unrolled in full they are vectorized badly
# (normalizing one value a channel takes 2.7 ns a channel instead of 2.2) and take half as long
# again to compile. The option is GCC's.
LANES_STAY_LOOPS = "--param=max-completely-peel-times=8"
NOTHING_PROBE = "int main(void) { return 0; }"


class BuildExt(build_ext):
    """Compiles with OpenMP where a probe runs with it, and on all processors."""

    def run(self) -> None:
        """Kernels of an earlier build that this one does not make go: they may be older than the
        source, and would be imported all the same, or packed into a wheel."""
        made = {self.get_ext_filename(extension.name) for extension in self.extensions}
        for root in (self.build_lib, *([""] if self.inplace else [])):
            for path in Path(root).glob(self.get_ext_filename("fastbn._ext.kernels_*")):
                if str(path.relative_to(root)) not in made:
                    path.unlink()
        super().run()

    def build_extensions(self) -> None:
        if self._runs(NOTHING_PROBE, LANES_STAY_LOOPS, "-Werror"):
            for extension in self.extensions:
                extension.extra_compile_args.append(LANES_STAY_LOOPS)
        if self._runs(OPENMP_PROBE, "-fopenmp"):
            for extension in self.extensions:
                extension.extra_compile_args.append("-fopenmp")
                extension.extra_link_args.append("-fopenmp")
        else:
            line = "=" * 78
            print(
                f"{line}\nfastbn: no OpenMP with this compiler: a probe did not compile, link and "
                f"run.\nThe kernels will be sequential: every call runs on one core.\n{line}",
                file=sys.stderr,
            )
        self.parallel = os.cpu_count()
        super().build_extensions()

    def _runs(self, probe: str, *flags: str) -> bool:
        """Whether a program compiles with these flags, and runs."""
        with tempfile.TemporaryDirectory() as folder:
            source, program = Path(folder, "probe.c"), Path(folder, "probe")
            source.write_text(probe)
            compiler = [*self.compiler.compiler, str(source), *flags, "-o", str(program)]
            try:
                subprocess.run(compiler, check=True, capture_output=True)
                subprocess.run([str(program)], check=True, timeout=60)
            except (OSError, subprocess.SubprocessError):
                return False
        return True


def asked() -> list[str]:
    """The instruction sets to build."""
    value = os.environ.get("FASTBN_BUILD_ISA")
    if value is None:
        return [name for name in INSTRUCTION_SETS if name != "portable"] or ["portable"]
    if value == "all":
        return list(INSTRUCTION_SETS)
    if value == "native":
        return [next(name for name, (_, flags) in INSTRUCTION_SETS.items() if runs_here(flags))]
    names = [name.strip() for name in value.split(",")]
    if not set(names) <= INSTRUCTION_SETS.keys():
        raise SystemExit(
            f"fastbn: environment variable FASTBN_BUILD_ISA is {value!r}, expected native, all, or "
            f"some of the instruction sets of {platform.machine()}, with commas between them: "
            f"{', '.join(INSTRUCTION_SETS)}; set one of these, or unset it"
        )
    return list(dict.fromkeys(names))


def runs_here(flags: list[str]) -> bool:
    """Whether this processor has what the flags allow: Linux and GCC call it by the same names."""
    needed = {flag[2:] for flag in flags if flag.startswith("-m") and "=" not in flag}
    return needed <= set(Path("/proc/cpuinfo").read_text().split())


def stub(isa: str, element: str) -> Path:
    """The one-line module that compiles the kernels for one instruction set and element type."""
    path = EXT / f"kernels_{isa}_{element}.pyx"
    text = 'include "kernels.pxi"\n'
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path


def extension(
    name: str,
    source: Path,
    flags: list[str],
    macros: Sequence[tuple[str, str]] = (),
    depends: Sequence[Path] = (),
) -> Extension:
    """A module; of the Cython files that it depends on, Cython itself knows."""
    return Extension(
        f"fastbn._ext.{name}",
        [str(source)],
        include_dirs=[np.get_include(), str(EXT)],
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"), *macros],
        extra_compile_args=[*COMMON, *WARNINGS, *flags],
        libraries=["m"],
        depends=["setup.py", *map(str, depends)],
    )


extensions = [extension(name, EXT / f"{name}.pyx", []) for name in ("cpu", "pool", "entry")] + [
    extension(
        f"kernels_{isa}_{element}",
        stub(isa, element),
        [f"-DFASTBN_WIDTH={width}", f"-D{macro}", *flags],
        [INLINED],
        sorted(EXT.glob("*.h")),
    )
    for isa, (width, flags) in ((name, INSTRUCTION_SETS[name]) for name in asked())
    for element, macro in ELEMENTS.items()
]

setup(
    ext_modules=cythonize(
        extensions,
        language_level=3,
        nthreads=os.cpu_count() or 1,
        compiler_directives={"cdivision": True, "freethreading_compatible": True},
    ),
    cmdclass={"build_ext": BuildExt},
)
