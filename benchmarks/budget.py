"""``python -m benchmarks budget``: what a call should take, from its passes measured alone.

The budget is the sum of these, all measured in turns, or the copy of the cell's bytes if that is
more; nothing is fitted. What passes and calls have in common is measured on *few* values, two of
each channel, and counted once:

* a pass: its time on the cell, less that on few values of as many channels.
* call: the whole call on few values of 16 channels at most, by one thread.
* team: what more threads, which divide even these, take more than one.
* finalize: what few values of all channels take more than those of 16. In planes that is the
  beginning of each plane, too.

With `--behind RUN.json` the cells are those of a run in which a peer is faster, and the
instructions of their passes are counted as well, where valgrind is installed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_double
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from math import inf
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

import fastbn
from benchmarks import instructions
from benchmarks.cells import WORKS, Cell, Shape, cells_of
from benchmarks.cli import ROUNDS, chosen, make_console, positive, saved, today
from benchmarks.data import Array, Data
from benchmarks.figures import cells, is_behind
from benchmarks.libraries import BEST_COPY, LIBRARIES, build, of_fastbn
from benchmarks.machine import this_machine
from benchmarks.report import Grid, digits, number
from benchmarks.results import Run
from benchmarks.rounds import loops_of
from benchmarks.worker import timed
from fastbn._cpus import available_cpus
from fastbn._ext import entry
from fastbn.backends.base import Affine, gradient_coefficients, inverse_deviation
from fastbn.config import current

SHAPES: tuple[Shape, ...] = (
    (1, 2048, 7, 7),
    (32, 1024, 14, 14),
    (32, 2048, 7, 7),
    (1, 256, 56, 56),
    (1, 64, 112, 112),
    (16, 33, 57, 61),
    (8, 64, 56, 56),
    (4, 16, 28, 28),
    (32, 3, 224, 224),
    (16, 48, 33, 17),
    (128, 1024),
    (4096, 1000),
)
PASSES = {
    "forward": ("moments", "normalize"),
    "inference": ("normalize",),
    "backward": ("gradient_moments", "input_gradient"),
}
EMPTY = 16
"""Channels of a call that is nearly empty: one vector of the kernels."""
TURN, SAMPLES = 0.01, 40
"""Seconds, and samples, after which a turn ends."""

Call = Callable[[], Any]


@dataclass(frozen=True)
class Budget:
    """A cell's, in seconds."""

    cell: Cell
    call: float
    finalize: float
    team: float
    """0 by one thread."""
    passes: dict[str, float]
    copy: float
    """Of the bytes that the cell must move."""
    measured: float
    instructions: dict[str, float] = field(default_factory=dict)
    """For sixteen values of a pass; where they were counted."""

    @property
    def total(self) -> float:
        return max(self.call + self.finalize + self.team + sum(self.passes.values()), self.copy)

    @property
    def ratio(self) -> float:
        """How many times its budget a cell takes."""
        return self.measured / self.total


# --- what is timed ------------------------------------------------------------------------------


class Probe(NamedTuple):
    """A call to time, by so many threads; `divided`: even if it is too small for them."""

    call: Call
    threads: int
    divided: bool = False


def probes(cell: Cell, data: Data) -> dict[str, Probe]:
    """Everything to time for a cell, by name."""
    threads = cell.threads
    few, empty = few_values(cell, cell.channels), few_values(cell, min(EMPTY, cell.channels))
    of_few, of_empty = Data(few), Data(empty)
    found = {
        "whole": Probe(of_fastbn.prepare(cell, data).call, threads),
        "few": Probe(of_fastbn.prepare(few, of_few).call, threads, divided=True),
        "empty": Probe(of_fastbn.prepare(empty, of_empty).call, threads, divided=True),
        "empty alone": Probe(of_fastbn.prepare(empty, of_empty).call, 1),
    }
    found |= {name: Probe(call, threads) for name, call in passes(cell, data).items()}
    for name, call in passes(few, of_few).items():
        found[f"few {name}"] = Probe(call, threads, divided=True)
    return found | {name: Probe(call, threads) for name, call in copies(cell, data).items()}


def few_values(cell: Cell, channels: int) -> Cell:
    """Two values of each channel: a single one would be its mean, and no sum."""
    return replace(cell, shape=(1, channels, 2) if len(cell.shape) > 2 else (2, channels))


def passes(cell: Cell, data: Data) -> dict[str, Call]:
    """The backend's passes over the cell's arrays, which write into `data.out`."""
    backend, threads = current()[0], cell.threads
    x, dy, out = (view(cell, a) for a in (data.x, data.dy, data.out))
    given = (data.mean, data.var) if cell.work == "inference" else data.batch_statistics
    mean, var, gamma, beta = (
        np.asarray(v, np.float64)[None] for v in (*given, data.gamma, data.beta)
    )
    rstd = inverse_deviation(var, data.eps)
    affine = Affine(mean, gamma * rstd, beta)
    sum_dy, sum_dy_xmu = backend.gradient_moments(dy, x, mean, threads)
    count = x.shape[1] * x.shape[3]
    coefficients = gradient_coefficients(sum_dy, sum_dy_xmu * rstd, count, mean, rstd, gamma)
    calls: dict[str, Call] = {
        "moments": lambda: backend.moments(x, threads),
        "normalize": lambda: backend.normalize(x, affine, out, threads),
        "gradient_moments": lambda: backend.gradient_moments(dy, x, mean, threads),
        "input_gradient": lambda: backend.input_gradient(dy, x, coefficients, out, threads),
    }
    return {name: calls[name] for name in PASSES[cell.work]}


def view(cell: Cell, a: Array) -> Array:
    """The array as backends take it: (G, N, C, S)."""
    if cell.layout == "NCHW":
        return a.reshape(1, *a.shape[:2], -1)
    return a.reshape(1, -1, cell.channels, 1)


def copies(cell: Cell, data: Data) -> dict[str, Call]:
    """The kinds of copy that there are here of the cell's bytes."""
    found = {}
    for name in BEST_COPY:
        try:
            task = LIBRARIES[name].load().prepare(cell, data)
        except ImportError:
            continue
        if task is not None:
            found[name] = task.call
    return found


# --- measuring ----------------------------------------------------------------------------------


def medians(all_probes: dict[str, Probe], rounds: int) -> dict[str, float]:
    """Seconds of each, over rounds in which they take turns in an order shuffled each round."""
    seconds: dict[str, list[float]] = {name: [] for name in all_probes}
    guesses = {name: min(turn(probe, loops=1)) for name, probe in all_probes.items()}
    shuffled = random.Random(0)
    for _ in range(rounds):
        for name in shuffled.sample(list(all_probes), len(all_probes)):
            seconds[name] += turn(all_probes[name], loops_of(guesses[name]))
    return {name: median(taken) for name, taken in seconds.items()}


def turn(probe: Probe, loops: int) -> list[float]:
    with team_of(probe.threads, divided=probe.divided):
        return timed(probe.call, SAMPLES, loops, TURN)


@contextmanager
def team_of(threads: int, *, divided: bool) -> Iterator[None]:
    """So many threads meanwhile; `divided`: for the smallest array too."""
    before, usual = fastbn.get_num_threads(), entry.tune()["serial_below"]
    fastbn.set_num_threads(threads)
    entry.tune(serial_below=1 if divided else usual)
    try:
        yield
    finally:
        entry.tune(serial_below=usual)
        fastbn.set_num_threads(before)


def budget_of(cell: Cell, data: Data, rounds: int) -> Budget:
    took = medians(probes(cell, data), rounds)
    return Budget(
        cell,
        call=took["empty alone"],
        team=took["empty"] - took["empty alone"] if cell.threads > 1 else 0.0,
        finalize=took["few"] - took["empty"],
        passes={name: took[name] - took[f"few {name}"] for name in PASSES[cell.work]},
        copy=min((took[name] for name in BEST_COPY if name in took), default=0.0),
        measured=took["whole"],
    )


# --- the command --------------------------------------------------------------------------------


def main() -> None:
    arguments = parse(sys.argv[2:])
    fastbn.set_backend("cython")
    console, found = make_console(), []
    for _, group in groupby(arguments.cells, Data.key_of):
        members = list(group)
        data = Data(members[0])
        found += [budget_of(cell, data, arguments.rounds) for cell in members]
    if arguments.behind:
        counts = instructions.of_passes([b.cell for b in found])
        found = [replace(b, instructions=c) for b, c in zip(found, counts, strict=True)]
    console.print(grid(found).to_rich())
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "budget.json"
    path.write_text(to_json(found, arguments.rounds))
    console.print(f"Written: {path}", soft_wrap=True)


def cells_behind(run: Run) -> list[Cell]:
    """Those that a budget can be made of, in the order of the run."""
    members = [m for threads in (None, 1) for m in cells(run, PASSES, threads=threads)]
    return list(dict.fromkeys(m.cell for m in members if is_behind(m.against_peer or inf)))


def clock() -> float:
    """Of the processor, in Hz."""
    measure = build.load("clock.c").cycles_per_second
    measure.restype = c_double
    return float(measure())


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks budget", description=__doc__)
    add = parser.add_argument
    add(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help="a work, layout, shape or number of threads; again for more: of one kind any, of "
        "several all",
    )
    add("--behind", type=saved, metavar="FILE.json", help="the cells of a run that stay behind")
    add("--rounds", type=positive, default=ROUNDS, help="turns of each call (default: %(default)s)")
    add(
        "--output",
        type=Path,
        default=Path("benchmark-results"),
        metavar="FOLDER",
        help="where budget.json goes (default: %(default)s)",
    )
    arguments = parser.parse_args(words)
    try:
        every = cells_behind(arguments.behind) if arguments.behind else all_cells()
        arguments.cells, libraries = chosen(every, arguments.only)
    except ValueError as error:
        parser.error(str(error))
    if libraries != list(LIBRARIES):
        parser.error("a budget is of fastbn's Cython backend; --only takes no library")
    return arguments


def all_cells() -> list[Cell]:
    """By one thread and by two; those that share their arrays follow one another."""
    counts = sorted({1, min(2, available_cpus())})
    alone = cells_of(SHAPES, threads=1, works=WORKS[:3])
    return [replace(cell, threads=threads) for cell in alone for threads in counts]


def grid(budgets: Sequence[Budget]) -> Grid:
    rows = []
    for b in budgets:
        cell = b.cell
        first, second, *_ = *b.passes.values(), None
        parts = (b.call, b.finalize, b.team, first, second, b.copy, b.total, b.measured)
        words = (cell.work, cell.layout, cell.size_name, str(cell.threads))
        rows.append((*words, *map(microseconds, parts), number(b.ratio)))
    # Inference has one pass, normalize: in the first of the two columns.
    names = ("call", "finalize", "team", "first pass", "second pass", "copy")
    headings = ("work", "layout", "shape", "threads", *names, "budget", "measured", "ratio")
    return Grid("Budgets, in us", headings, rows, words=4)


def microseconds(seconds: float | None) -> str:
    return "" if seconds is None else digits(seconds * 1e6)


def to_json(budgets: Sequence[Budget], rounds: int) -> str:
    """In seconds."""
    fields = {
        "date": today(),
        "machine": asdict(this_machine(available_cpus())),
        "fastbn": of_fastbn.version(),
        "clock": clock(),
        "rounds": rounds,
        "budgets": [asdict(b) | {"total": b.total, "ratio": b.ratio} for b in budgets],
    }
    return json.dumps(fields, indent=1) + "\n"
