"""oneDNN by its own interface, through onednn.c. float32."""

from __future__ import annotations

import ctypes
import sys
import weakref
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int64, c_void_p
from typing import Any

import numpy as np

from benchmarks.cells import WORKS, Cell
from benchmarks.data import Array, Data, Results
from benchmarks.libraries import Task, build

_PREFIX = sys.prefix
_native = build.load(
    "onednn.c",
    f"-I{_PREFIX}/include",
    f"-L{_PREFIX}/lib",
    f"-Wl,-rpath,{_PREFIX}/lib",
    "-ldnnl",
)
NAMES = ("x", "dy", "out", "mean", "var", "gamma", "beta", "dgamma", "dbeta")


class Arrays(Structure):
    """`struct arrays` of onednn.c."""

    _fields_ = tuple((name, c_void_p) for name in NAMES)


_native.make.argtypes = [c_int, c_int, c_int, POINTER(c_int64), c_float, POINTER(Arrays)]
_native.make.restype = c_void_p
_native.run.argtypes = [c_void_p]
_native.redirect.argtypes = [c_void_p, c_void_p]
_native.drop.argtypes = [c_void_p]
_native.implementation.argtypes = [c_void_p]
_native.problem.restype = _native.implementation.restype = c_char_p


def version() -> str:
    number = _native.version()
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def block() -> int:
    """Channels of a block in the layout that it prefers here."""
    channels: int = _native.block()
    return channels


def prepare(cell: Cell, data: Data) -> Task | None:
    if cell.dtype != "float32" or cell.is_fused:
        return None
    if cell.is_step:
        return step(cell, data)
    return task(cell, data, vectors(cell, data), data.out)


def task(cell: Cell, data: Data, arrays: dict[str, Array], out: Array) -> Task:
    arrays = arrays | {name: getattr(data, name) for name in reads(cell)} | {"out": out}
    work = Work(cell, f"tag_{cell.layout.lower()}", arrays, data.eps)
    return work.task(cell.output == "fresh", lambda out: out)


def step(cell: Cell, data: Data) -> Task:
    """A forward, and the backward by the statistics that it has written."""
    cells, shared = cell.forward_and_backward, vectors(cell, data)
    outputs = data.out, data.dx
    forward, backward = (task(c, data, shared, out) for c, out in zip(cells, outputs, strict=True))
    read = backward.read
    assert read is not None
    return Task(
        lambda: (forward.call(), backward.call()),
        lambda r: read(r[1])._replace(y=r[0]),
        ", ".join(dict.fromkeys((forward.note, backward.note))),
    )


def reads(cell: Cell) -> tuple[str, ...]:
    return {"backward": ("x", "dy"), "normalize_backward": ("dy",)}.get(cell.work, ("x",))


def vectors(cell: Cell, data: Data) -> dict[str, Array]:
    """The arrays of C values; a forward writes the statistics."""
    mean, var = data.batch_statistics if cell.work == "backward" else (data.mean, data.var)
    return {
        "mean": mean.astype(np.float32),
        "var": var.astype(np.float32),
        "gamma": data.gamma,
        "beta": data.beta,
        "dgamma": np.empty_like(data.gamma),
        "dbeta": np.empty_like(data.gamma),
    }


class Work:
    """A primitive with its arrays."""

    def __init__(self, cell: Cell, tag: str, arrays: dict[str, Array], eps: float) -> None:
        arrays.setdefault("x", arrays.get("dy", arrays["out"]))  # there, though not read
        self.arrays = arrays
        dims = (c_int64 * len(cell.shape))(*cell.shape)
        addresses = Arrays(**{name: a.ctypes.data for name, a in arrays.items()})
        kind, layout = WORKS.index(cell.work), getattr(_native, tag)()
        made = _native.make(kind, layout, len(cell.shape), dims, eps, ctypes.byref(addresses))
        if not made:
            raise RuntimeError(f"oneDNN refuses: {_native.problem().decode()}")
        self.handle = c_void_p(made)
        weakref.finalize(self, _native.drop, self.handle)

    def task(self, fresh: bool, plain: Any) -> Task:
        """`plain` turns the output into the cell's own layout."""
        shape, dtype = self.arrays["out"].shape, self.arrays["out"].dtype

        def run() -> Array:
            if _native.run(self.handle):
                raise RuntimeError("oneDNN failed")
            return self.arrays["out"]

        def run_fresh() -> Array:
            out = np.empty(shape, dtype)
            _native.redirect(self.handle, out.ctypes.data)
            if _native.run(self.handle):
                raise RuntimeError("oneDNN failed")
            return out

        return Task(
            run_fresh if fresh else run,
            lambda out: Results(plain(out), self.arrays["dgamma"], self.arrays["dbeta"]),
            _native.implementation(self.handle).decode(),
        )
