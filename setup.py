"""Builds the compiled kernels: one source, once for each instruction set and element type.

The kernels are `fastbn/_ext/kernels.pxi`. For every row of `INSTRUCTION_SETS` and `ELEMENTS` a
stub that includes it is written and compiled into a module of its own with the row's flags, so
that no instruction of one set can slip into another. `entry` and `cpu` are built without any.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

EXT = Path("fastbn/_ext")

# Width of a vector register in bytes, and the flags that allow it.
INSTRUCTION_SETS = {"portable": (16, ["-DFASTBN_PORTABLE"])}
if platform.machine() == "x86_64":
    INSTRUCTION_SETS |= {
        "sse2": (16, []),
        "avx2": (32, ["-mavx2", "-mfma", "-mf16c"]),
        "avx512": (
            64,
            [
                *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c"),
                "-mprefer-vector-width=512",
            ],
        ),
    }
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


def stub(isa: str, element: str) -> Path:
    """The one-line module that compiles the kernels for one instruction set and element type."""
    path = EXT / f"kernels_{isa}_{element}.pyx"
    text = 'include "kernels.pxi"\n'
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path


def extension(
    name: str, source: Path, flags: list[str], macros: list[tuple[str, str]] | None = None
) -> Extension:
    return Extension(
        f"fastbn._ext.{name}",
        [str(source)],
        include_dirs=[np.get_include(), str(EXT)],
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"), *(macros or [])],
        extra_compile_args=[*COMMON, *WARNINGS, *flags],
        libraries=["m"],
        depends=[str(path) for path in sorted(EXT.glob("*.[hp][x]*")) if path.suffix != ".pyx"],
    )


extensions = [extension(name, EXT / f"{name}.pyx", []) for name in ("cpu", "entry")] + [
    extension(
        f"kernels_{isa}_{element}",
        stub(isa, element),
        [f"-DFASTBN_WIDTH={width}", f"-D{macro}", *flags],
        [INLINED],
    )
    for isa, (width, flags) in INSTRUCTION_SETS.items()
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
