"""A library's own process: ``python -m benchmarks.worker NAME``.

It answers a line of JSON on its input with one on its output:

* at the start, unasked: {"version"} or {"missing"};
* {"do": "prepare", "cell"}: {"status": "ready"}, "cannot", "wrong" or "failed", with a "note";
* {"do": "judge", "cell", "case"}: the same with the hard data of that name, and instead of "wrong"
  the "units" of each result;
* {"do": "run", "samples", "loops", "budget"}: {"seconds"}, after one call not timed: a number for
  each sample of so many calls, until there are enough or the budget of seconds is spent;
* {"do": "release", "keep"}: {}; what was prepared is dropped, its inputs too unless kept.

Cells are verified where they are prepared. The end of the input ends the process.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from itertools import repeat
from time import perf_counter
from typing import IO, Any, TypeVar

from benchmarks.cells import Cell
from benchmarks.data import Data, complaint
from benchmarks.judge import HardData, worst
from benchmarks.libraries import LIBRARIES, Module, Task

Answer = dict[str, Any]
D = TypeVar("D", bound=Data)


class Session:
    """One library, and the cell it is at."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.data: Data | None = None
        self.task: Task | None = None

    def answer(self, request: dict[str, Any]) -> Answer:
        if request["do"] == "prepare":
            return self.prepare(Cell.from_json(request["cell"]))
        if request["do"] == "judge":
            cell = Cell.from_json(request["cell"])
            return self.checked(cell, HardData(cell, request["case"]), judge)
        if request["do"] == "run":
            assert self.task is not None
            options = (request[name] for name in ("samples", "loops", "budget"))
            return {"seconds": timed(self.task.call, *options)}
        self.release(keep=request["keep"])
        return {}

    def prepare(self, cell: Cell) -> Answer:
        if self.data is None or self.data.key != Data.key_of(cell):
            self.data = Data(cell)
        return self.checked(cell, self.data, verify)

    def checked(self, cell: Cell, data: D, check: Callable[[Cell, D, Task], Answer]) -> Answer:
        """Prepare the task and call it once; `check` says what the answer holds besides."""
        try:
            self.task = self.module.prepare(cell, data)
            if self.task is None:
                return {"status": "cannot", "note": ""}
            return {"status": "ready", "note": self.task.note} | check(cell, data, self.task)
        except Exception as error:
            return {"status": "failed", "note": in_a_line(error)}

    def release(self, *, keep: bool) -> None:
        self.task = None
        if not keep:
            self.data = None


def timed(call: Callable[[], Any], samples: int, loops: int, budget: float) -> list[float]:
    """Seconds of a call, at least once; short calls are timed several at once."""
    seconds = list[float]()
    call()
    end = perf_counter() + budget
    while not seconds or (len(seconds) < samples and perf_counter() < end):
        start = perf_counter()
        for _ in repeat(None, loops):
            call()
        seconds.append((perf_counter() - start) / loops)
    return seconds


def verify(cell: Cell, data: Data, task: Task) -> Answer:
    """What is wrong with the results of one call, if anything is."""
    if task.read is None:
        return {}
    if cell.output != "fresh":
        for out, *_ in data.moved(cell):
            out.fill(float("nan"))  # what an earlier cell left there proves nothing
    wrong = complaint(cell, data, task.read(task.call()))
    return {"status": "wrong", "note": wrong} if wrong else {}


def judge(cell: Cell, data: HardData, task: Task) -> Answer:
    """How far from exact the results of one call are."""
    assert task.read is not None
    return {"units": worst(cell, data, task.read(task.call()))}


def in_a_line(error: Exception) -> str:
    text = str(error).strip().splitlines()[:1]
    return f"{type(error).__name__}: {' '.join(text)}"


def private_stdout() -> IO[str]:
    """The output for answers alone: whatever else the process prints goes to its error output."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def main() -> None:
    answers = private_stdout()
    try:
        module = LIBRARIES[sys.argv[1]].load()
        hello = {"version": module.version()}
    except Exception as error:
        print(json.dumps({"missing": in_a_line(error)}), file=answers)
        return
    print(json.dumps(hello), file=answers)
    session = Session(module)
    for line in sys.stdin:
        print(json.dumps(session.answer(json.loads(line))), file=answers)


if __name__ == "__main__":
    main()
