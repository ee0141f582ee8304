"""A limit: the same bytes copied by all threads, with ordinary or with streaming stores."""

from __future__ import annotations

from ctypes import Structure, byref, c_int, c_ssize_t, c_void_p

from benchmarks.cells import Cell
from benchmarks.data import Data
from benchmarks.libraries import Task, build

_copy = build.load("copies.c", "-fopenmp", "-fno-tree-loop-distribute-patterns").copy
_copy.restype = None


class Job(Structure):
    """`struct job` of copies.c."""

    _fields_ = (
        ("out", c_void_p),
        ("a", c_void_p),
        ("b", c_void_p),
        ("c", c_void_p),
        ("n", c_ssize_t),
        ("threads", c_int),
        ("streaming", c_int),
    )


def version() -> str:
    return "copies.c"


def prepare(cell: Cell, data: Data, *, streaming: bool) -> Task:
    """Every array that the work needs read once, every result written once."""
    jobs = []
    for arrays in data.moved(cell):
        addresses = dict(zip(("out", "a", "b", "c"), (a.ctypes.data for a in arrays), strict=False))
        options = {"n": arrays[0].nbytes // 4, "threads": cell.threads, "streaming": streaming}
        jobs.append(byref(Job(**addresses, **options)))
    job, *more = jobs
    if not more:
        return Task(lambda: _copy(job), None)
    return Task(lambda: [_copy(job) for job in jobs], None)
