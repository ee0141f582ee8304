"""What is timed: fastbn, its peers, and the limits that the memory sets.

A library is a module of this package with two functions:

* ``version()``: what runs, in words.
* ``prepare(cell, data)``: the `Task` of a cell, or None where the library has nothing for it.

A module imports its package at its top, so that it fails to import where that is not installed;
only the library's own worker process imports it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, cast

from benchmarks.cells import Cell
from benchmarks.data import Data, Results

OURS = "fastbn cython"
"""What is compared with the peers."""
AVX2 = "fastbn cython avx2"
UNFUSED, SINGLE, UNMASKED = "fastbn unfused", "fastbn in float32", "fastbn unmasked"
"""What it is compared with besides, in fused cells, in halves and in masked cells."""
FROZEN = "FrozenBatchNorm"
"""Inference as an object."""
BY_COPY = "fastbn by a copy"
"""What a reordered output is compared with."""


class Task(NamedTuple):
    """One cell's work, ready to run."""

    call: Callable[[], Any]
    """Does the work once, to its end; what is timed."""
    read: Callable[[Any], Results] | None
    """What a call returned, as arrays in the cell's layout; None where it is another work's."""
    note: str = ""
    """What the library says about how it does this cell."""


class Module(Protocol):
    """The interface of a library's module."""

    def version(self) -> str: ...

    def prepare(self, cell: Cell, data: Data) -> Task | None: ...


@dataclass(frozen=True)
class Library:
    """A library by its name in the tables."""

    name: str
    module: str
    kind: Literal["fastbn", "fastbn too", "peer", "other layout", "limit"]
    """Only a peer counts in "the best peer"; another layout's times are shown, not compared. What
    is fastbn too has only some works."""
    environment: Mapping[str, str] = field(default_factory=dict)
    in_series: bool = False
    """Whether it is drawn in the plot of time against size."""

    @property
    def is_fastbn(self) -> bool:
        return self.kind in ("fastbn", "fastbn too")

    @property
    def is_foreign(self) -> bool:
        return self.kind in ("peer", "other layout")

    def load(self) -> Module:
        """Its module; ImportError or another error where it cannot run here."""
        return cast(Module, importlib.import_module(f"{__name__}.{self.module}"))


NUMPY, TORCH, COMPILED, ONEDNN = "NumPy", "PyTorch", "torch.compile", "oneDNN"
SKLEARN, OPENCV, ALBUMENTATIONS = "scikit-learn", "OpenCV", "albumentations"
OF_DATA = SKLEARN, OPENCV, ALBUMENTATIONS
"""Peers for images and tables alone."""
COPYTO = "numpy.copyto"

CYTHON = {"FASTBN_BACKEND": "cython"}
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""Memory that was freed is not given back, and has its pages when it is wanted again."""
ALONE = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
"""It compiles in its own process, and leaves none behind."""


def _fastbn(name: str, **environment: str) -> Library:
    return Library(name, "of_fastbn", "fastbn", environment, in_series=True)


LIBRARIES: dict[str, Library] = {
    library.name: library
    for library in (
        _fastbn(OURS, **CYTHON),
        _fastbn(AVX2, **CYTHON, FASTBN_ISA="avx2"),
        _fastbn("fastbn numba", FASTBN_BACKEND="numba"),
        _fastbn("fastbn numpy", FASTBN_BACKEND="numpy"),
        Library(UNFUSED, "fastbn_unfused", "fastbn too", CYTHON),
        Library(SINGLE, "fastbn_float32", "fastbn too", CYTHON),
        Library(UNMASKED, "fastbn_unmasked", "fastbn too", CYTHON),
        Library(BY_COPY, "fastbn_by_copy", "fastbn too", CYTHON),
        Library(FROZEN, "fastbn_frozen", "fastbn too", CYTHON, in_series=True),
        Library(NUMPY, "of_numpy", "peer"),
        Library(TORCH, "of_torch", "peer", KEPT, in_series=True),
        Library(COMPILED, "of_torch_compile", "peer", KEPT | ALONE),
        Library(ONEDNN, "of_onednn", "peer"),
        Library("JAX", "of_jax", "peer", {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"}),
        Library("TensorFlow", "of_tensorflow", "peer", {"TF_CPP_MIN_LOG_LEVEL": "3"}),
        Library("ONNX Runtime", "of_onnxruntime", "peer"),
        Library("OpenVINO", "of_openvino", "peer"),
        Library(SKLEARN, "of_sklearn", "peer"),
        Library(OPENCV, "of_opencv", "peer"),
        Library(ALBUMENTATIONS, "of_albumentations", "peer"),
        Library("oneDNN blocked", "of_onednn_blocked", "other layout"),
        Library(COPYTO, "numpy_copyto", "limit", in_series=True),
        Library("copy, ordinary stores", "copy_ordinary", "limit", in_series=True),
        Library("copy, streaming stores", "copy_streaming", "limit", in_series=True),
    )
}

BEST_COPY = tuple(library.name for library in LIBRARIES.values() if library.kind == "limit")
"""The unit "a copy" is the fastest of these: NumPy's own where a call costs more than its bytes."""
