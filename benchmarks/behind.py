"""The part of docs/performance.md on cells that stay behind: their passes, measured alone.

The figures are those of ``python -m benchmarks budget --behind`` that are committed beside the run.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from benchmarks.cells import Cell
from benchmarks.figures import is_behind, ratio, table
from benchmarks.report import NONE, digits, time
from benchmarks.results import Run

BUDGETS = Path(__file__).parent / "results" / "budget.json"
ARRAYS = {"moments": 1, "normalize": 2, "gradient_moments": 2, "input_gradient": 3}
"""That a pass reads or writes."""


def passes_behind(run: Run) -> str:
    """A row for each pass of the cells in which a peer is faster; nothing without such."""
    fields = json.loads(BUDGETS.read_text())
    rows = []
    for budget in fields["budgets"]:
        measured = run.at(Cell.from_json(budget["cell"]))
        if measured is None or measured.best_peer is None or measured.ours is None:
            continue
        if not is_behind(measured.best_peer[1] / measured.ours):
            continue
        cell, (peer, seconds) = measured.cell, measured.best_peer
        head = (
            f"{cell.work}, {cell.layout}",
            f"{cell.size_name}, {cell.threads}",
            time(measured.ours),
            f"{time(seconds)} ({peer})",
            ratio(budget["ratio"]),
        )
        for name in budget["passes"]:
            rows.append((*head, *of_pass(name, cell, budget, fields["clock"])))
            head = ("", "", "", "", "")
    headings = ("work", "shape, threads", "fastbn", "fastest peer", "budgets", "pass")
    return table((*headings, "MB", "instructions", "cycles"), rows, 2) if rows else ""


def of_pass(name: str, cell: Cell, budget: dict[str, Any], clock: float) -> tuple[str, ...]:
    """Its name, megabytes, and what sixteen values take."""
    sixteens = math.prod(cell.shape) / 16
    count = budget["instructions"].get(name)
    cycles = budget["passes"][name] * clock * cell.threads / sixteens
    if min(cycles, count or 0) < 0:
        return f"`{name}`", digits(ARRAYS[name] * cell.bytes / 1e6), NONE, NONE  # a call is all
    moved = ARRAYS[name] * cell.bytes / 1e6
    return (f"`{name}`", digits(moved), NONE if count is None else digits(count), digits(cycles))
