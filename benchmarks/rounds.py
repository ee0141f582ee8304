"""Libraries taking turns: who runs when, how often, and what to do with one that dies.

Every library has a process of its own, limited to the cell's processors. All prepare a cell, then
take turns round after round, in an order shuffled each round, so that a disturbance of the machine
falls on all alike. Before the next turn the last one's threads must have gone to sleep.
"""

from __future__ import annotations

import json
import os
import random
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from benchmarks.cells import MB, Cell
from benchmarks.libraries import (
    ALBUMENTATIONS,
    COMPILED,
    LIBRARIES,
    NUMPY,
    OF_DATA,
    ONEDNN,
    OPENCV,
    OURS,
    SKLEARN,
    TORCH,
    Library,
)
from benchmarks.machine import available_memory
from benchmarks.results import Judged, Measured, Outcome

ROOT = Path(__file__).parents[1]

TURN = 0.015
"""Seconds after which a turn takes no further sample."""
SAMPLES = 60
"""In a turn at most."""
SAMPLE = 50e-6
"""Seconds that a sample lasts at least: shorter calls are timed several at once."""
SLOW = 15
"""A library so many times slower than the fastest, in two turns, has no more."""
SLEEPY = 0.1
"""Seconds to wait at most until a library's threads have stopped spinning."""
LIMIT = 120.0
"""Seconds that an answer may take, the first too; numba and TensorFlow may have to compile."""
KEPT = 200 * MB
"""Arrays larger than this are made anew for each cell, lest all processes hold all of them."""
ROOM = 8
"""Arrays that must fit in free memory before a process prepares: some libraries copy or cast."""

FOREIGN = ("OMP_", "GOMP_", "KMP_", "FASTBN_", "NUMBA_")
"""Variables that would change what is measured; they are not passed on."""
COUNTS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "TF_NUM_INTRAOP_THREADS",
)


class MissingError(Exception):
    """A library that cannot run here; says why."""


class DiedError(Exception):
    """A worker that ended, or gave no answer in time; says which."""


class Worker:
    """A library's process, seen from here."""

    def __init__(self, library: Library, threads: int) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
        counts = dict.fromkeys(COUNTS, str(threads)) | {"TF_NUM_INTEROP_THREADS": "1"}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop
        with limited_to(threads):
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", library.name],
                cwd=ROOT,
                env=kept | counts | dict(library.environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
            )

    def started(self) -> str:
        """Wait until the library is imported; its version, or MissingError."""
        hello = self.receive()
        if "missing" in hello:
            raise MissingError(hello["missing"])
        return str(hello["version"])

    def send(self, **request: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise DiedError(self._last_words()) from error

    def receive(self, limit: float = LIMIT) -> dict[str, Any]:
        """The answer; DiedError where none comes in time."""
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], limit)
        if not readable:
            raise DiedError(f"no answer for {limit:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise DiedError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **request: Any) -> dict[str, Any]:
        self.send(**request)
        return self.receive()

    def rest(self) -> None:
        """Wait until all its threads sleep: pools spin for a while after their work."""
        limit = time.monotonic() + SLEEPY
        while awake(self._process.pid) and time.monotonic() < limit:
            time.sleep(0.0005)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            assert stream is not None
            try:
                stream.close()
            except OSError:
                continue  # a request that the dead process never read

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"exit code {code}" + (f": {lines[-1]}" if lines else "")


@contextmanager
def limited_to(processors: int) -> Iterator[None]:
    """Processes started meanwhile may use the first so many processors of those allowed here."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:processors])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def awake(pid: int) -> bool:
    """Whether a thread of the process is running, or wants to."""
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        try:
            if stat.read_text().rpartition(")")[2].split()[0] == "R":
                return True
        except OSError:
            continue  # the thread has ended
    return False


class Team:
    """The libraries' workers for one number of threads; those that died start again."""

    def __init__(self, libraries: Sequence[str], threads: int) -> None:
        self._threads = threads
        self._workers: dict[str, Worker | None] = {}
        self.versions: dict[str, str] = {}
        self.missing: dict[str, str] = {}
        starting = {name: Worker(LIBRARIES[name], threads) for name in libraries}
        for name, worker in starting.items():
            try:
                self.versions[name] = worker.started()
                self._workers[name] = worker
            except (MissingError, DiedError) as why:
                self.missing[name] = str(why)
                worker.stop()

    def stop(self) -> None:
        for worker in filter(None, self._workers.values()):
            worker.stop()

    def measure(self, cell: Cell, libraries: Sequence[str], rounds: int) -> Measured:
        """Time a cell with all libraries that have something for it."""
        outcomes: dict[str, Outcome] = {}
        ready = self._prepare(cell, libraries, outcomes, do="prepare")
        notes = {name: answer["note"] for name, answer in ready.items()}
        first = {name: taken for name in notes if (taken := self._turn(name, outcomes, loops=1))}
        slow = SLOW * min((min(taken) for taken in first.values()), default=0.0)
        for name, taken in first.items():
            if slow < min(taken) < TURN:  # or the machine was busy: once more
                taken += self._turn(name, outcomes, loops=1)
        guesses = {name: min(taken) for name, taken in first.items()}
        seconds = {name: first[name] if guesses[name] > slow else [] for name in guesses}
        racing = [name for name in guesses if not seconds[name]]
        shuffled = random.Random(0)
        for _ in range(rounds):
            for name in shuffled.sample(racing, len(racing)):
                if name not in outcomes:
                    seconds[name] += self._turn(name, outcomes, loops_of(guesses[name]))
        for name, taken in seconds.items():
            if name not in outcomes:
                outcomes[name] = Outcome.of(taken, notes[name])
        self._release(keep=cell.bytes <= KEPT)
        return Measured(cell, {name: outcomes[name] for name in libraries if name in outcomes})

    def judge(self, cell: Cell, case: str, libraries: Sequence[str]) -> Judged:
        """Units of error of all libraries that have something for a cell, with hard data."""
        outcomes: dict[str, Outcome] = {}
        ready = self._prepare(cell, libraries, outcomes, do="judge", case=case)
        for name, answer in ready.items():
            if taken := self._turn(name, outcomes, loops=1):
                outcomes[name] = Outcome.of(taken, answer["note"])
        self._release(keep=False)
        return Judged(
            case,
            Measured(cell, {name: outcomes[name] for name in libraries if name in outcomes}),
            {name: answer["units"] for name, answer in ready.items()},
        )

    def _prepare(
        self,
        cell: Cell,
        libraries: Sequence[str],
        outcomes: dict[str, Outcome],
        **request: str,
    ) -> dict[str, dict[str, Any]]:
        """Prepare the cell in all processes; the answers of those that are ready.

        They do so at once as far as the memory goes, peers last: what finds no room is left out.
        """
        ready: dict[str, dict[str, Any]] = {}
        preparing: list[str] = []
        room = ROOM * cell.bytes

        def collect(name: str) -> None:
            with self._watched(name, outcomes):
                answer = self._worker(name).receive()
                if answer["status"] == "ready":
                    ready[name] = answer
                elif answer["status"] != "cannot":
                    outcomes[name] = Outcome(answer["status"], answer["note"])

        for name in sorted(libraries, key=lambda name: LIBRARIES[name].is_foreign):
            while preparing and available_memory() < room * (len(preparing) + 1):
                collect(preparing.pop(0))
            if available_memory() < room:
                outcomes[name] = Outcome("left out", "too little memory is free")
                continue
            with self._watched(name, outcomes):
                self._worker(name).send(**request, cell=cell.to_json())
                preparing.append(name)
        for name in preparing:
            collect(name)
        for name in ready:
            self._worker(name).rest()
        return ready

    def _turn(self, name: str, outcomes: dict[str, Outcome], loops: int) -> list[float]:
        seconds: list[float] = []
        with self._watched(name, outcomes):
            worker = self._worker(name)
            seconds = worker.ask(do="run", samples=SAMPLES, loops=loops, budget=TURN)["seconds"]
            worker.rest()
        return seconds

    def _release(self, *, keep: bool) -> None:
        lost: dict[str, Outcome] = {}
        for name, worker in self._workers.items():
            if worker is not None:
                with self._watched(name, lost):
                    worker.ask(do="release", keep=keep)

    def _worker(self, name: str) -> Worker:
        worker = self._workers[name]
        if worker is None:
            worker = self._workers[name] = Worker(LIBRARIES[name], self._threads)
            worker.started()
        return worker

    @contextmanager
    def _watched(self, name: str, outcomes: dict[str, Outcome]) -> Iterator[None]:
        """Mark the cell where the worker dies, and start another when next wanted."""
        try:
            yield
        except (DiedError, MissingError) as why:
            outcomes[name] = Outcome("died", str(why))
            worker, self._workers[name] = self._workers[name], None
            if worker is not None:
                worker.stop()


def loops_of(guess: float) -> int:
    """How many calls fill a sample."""
    return max(1, round(SAMPLE / guess))


def import_seconds(times: int = 7) -> float:
    """Median time of ``import fastbn`` where NumPy is imported already, and bytecode is written."""
    code = (
        "import time, numpy; t = time.perf_counter(); import fastbn; print(time.perf_counter()-t)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    usual = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}
    outputs = [
        subprocess.check_output(command, cwd=ROOT, env=usual, text=True) for _ in range(times + 1)
    ][1:]
    return sorted(map(float, outputs))[times // 2]


class Watcher(Protocol):
    """Who is told how far the run is."""

    def begin(self, cell: Cell) -> None: ...

    def end(self, cell: Cell) -> None: ...

    def say(self, text: str) -> None: ...


class Findings(NamedTuple):
    measured: list[Measured]
    versions: dict[str, str]
    missing: dict[str, str]


def measure_all(
    cells: Sequence[Cell], libraries: Sequence[str], rounds: int, watcher: Watcher
) -> Findings:
    """Measure the cells, a team for each number of threads."""
    findings = Findings([], {}, {})
    for threads in dict.fromkeys(cell.threads for cell in cells):
        team = Team([name for name in libraries if name not in findings.missing], threads)
        for name, why in team.missing.items():
            watcher.say(f"{name} is left out: {why}")
        findings.versions.update(team.versions)
        findings.missing.update(team.missing)
        try:
            for cell in (cell for cell in cells if cell.threads == threads):
                watcher.begin(cell)
                present = [name for name in taking_part(cell, libraries) if name in team.versions]
                findings.measured.append(team.measure(cell, present, rounds))
                watcher.end(cell)
        except KeyboardInterrupt:
            watcher.say("stopped; what is measured so far is kept")
            return findings
        finally:
            team.stop()
    return findings


def taking_part(cell: Cell, libraries: Sequence[str]) -> list[str]:
    """Not all: only some are drawn in the plot of the series, and not every work has every peer;
    awkward cells are for the Cython backend and NumPy."""
    if cell.is_awkward:
        return [name for name in libraries if name in (OURS, NUMPY)]
    return [
        name
        for name in libraries
        if (LIBRARIES[name].in_series or not cell.in_series)
        and (not LIBRARIES[name].is_foreign or name in peers_of(cell))
    ]


def peers_of(cell: Cell) -> tuple[str, ...]:
    """Who may take part beside fastbn and the limits."""
    if cell.is_masked:
        return ()
    if cell.is_grouped:
        return (TORCH,)
    if cell.is_step:
        return NUMPY, TORCH, COMPILED, ONEDNN
    if cell.is_reordered or cell.is_of_rows or cell.curve:
        return NUMPY, TORCH
    if cell.is_images:
        return NUMPY, OPENCV, ALBUMENTATIONS
    if cell.is_table:
        return NUMPY, SKLEARN
    return tuple(name for name in LIBRARIES if name not in OF_DATA)
