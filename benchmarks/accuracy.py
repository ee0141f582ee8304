"""``python -m benchmarks accuracy``: the errors on hard data, in promised bounds, and the speed."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cells import Cell, Shape, cells_of
from benchmarks.cli import Screen, chosen, cost, make_console, today
from benchmarks.libraries import LIBRARIES
from benchmarks.machine import Machine, this_machine
from benchmarks.report import NONE, Grid, heading, time
from benchmarks.results import Judged
from benchmarks.rounds import Team, Watcher
from fastbn._cpus import available_cpus
from oracle.hard import hard_data

SHAPE: Shape = (16, 24, 28, 28)
WORKS = ("forward", "backward")
DTYPES = ("float32", "float64")
KINDS = ("fastbn", "peer")
Task = tuple[str, Cell]
"""A case, and the cell to do it in."""
TABLES = (("forward", ("y",)), ("backward", ("dx",)), ("backward", ("dgamma", "dbeta")))
LEGEND = (
    "The largest error of any value, in units of what fastbn promises (docs/numerics.md): up to 1 "
    "is as promised, inf is a NaN or an infinity where there should be a number. The worse of NCHW "
    "and NHWC. Times: median over all cases."
)


def main() -> None:
    arguments = parse(sys.argv[2:])
    console = make_console()
    expected = sum(cost(cell, arguments.libraries, 1) for _, cell in arguments.tasks)
    with Screen(expected, arguments.libraries, 1, console) as screen:
        found = judge_all(arguments.tasks, arguments.libraries, screen)
    for grid in grids(found.judged):
        console.print(grid.to_rich())
    console.print(LEGEND)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, text in (("accuracy.json", to_json(found)), ("accuracy.md", markdown(found))):
        (arguments.output / name).write_text(text)
        console.print(f"Written: {arguments.output / name}", soft_wrap=True)


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks accuracy", description=__doc__)
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help="part of a library's name, a work, layout or type; again for more: of one kind any, "
        "of several all",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("benchmark-results"),
        metavar="FOLDER",
        help="where accuracy.json and accuracy.md go (default: %(default)s)",
    )
    arguments = parser.parse_args(words)
    try:
        cells, libraries = chosen(all_cells(SHAPE), arguments.only)
    except ValueError as error:
        parser.error(str(error))
    arguments.tasks = tasks_of(cells)
    arguments.libraries = [name for name in libraries if LIBRARIES[name].kind in KINDS]
    if not arguments.libraries:
        parser.error(f"no library that computes is left by: {', '.join(arguments.only)}")
    return arguments


def all_cells(shape: Shape) -> list[Cell]:
    threads = available_cpus()
    return [
        cell
        for dtype in DTYPES
        for cell in cells_of([shape], works=WORKS, dtype=dtype, threads=threads)
    ]


def tasks_of(cells: Sequence[Cell]) -> list[Task]:
    """Every case in every cell; those that share an exact result follow one another."""
    return [
        (case, cell)
        for dtype in DTYPES
        for case in hard_data(dtype)
        for cell in cells
        if cell.dtype == dtype
    ]


@dataclass(frozen=True)
class Accuracy:
    """What a run found."""

    machine: Machine
    date: str
    versions: dict[str, str]
    missing: dict[str, str]
    judged: list[Judged]


def judge_all(tasks: Sequence[Task], libraries: Sequence[str], watcher: Watcher) -> Accuracy:
    """Judge all libraries that are here, one task after another."""
    team, judged = Team(libraries, available_cpus()), []
    for name, why in team.missing.items():
        watcher.say(f"{name} is left out: {why}")
    try:
        for case, cell in tasks:
            watcher.begin(cell)
            judged.append(team.judge(cell, case, list(team.versions)))
            watcher.end(cell)
    finally:
        team.stop()
    return Accuracy(this_machine(available_cpus()), today(), team.versions, team.missing, judged)


# --- tables -------------------------------------------------------------------------------------


def markdown(found: Accuracy) -> str:
    head = heading(found.machine, found.versions, found.missing, found.date)
    return "\n".join([head, LEGEND, "", *(grid.to_markdown() for grid in grids(found.judged))])


def grids(judged: Sequence[Judged]) -> list[Grid]:
    """What breaks the promise or fails, then one for each element type and kind of result."""
    troubles = troubles_grid(judged)
    made = [broken_grid(judged), *([troubles] if troubles.rows else [])]
    for dtype in DTYPES:
        for work, results in TABLES:
            cell = (dtype, work)
            members = [j for j in judged if (j.measured.cell.dtype, j.measured.cell.work) == cell]
            if members:
                made.append(units_grid(members, results))
    return made


def broken_grid(judged: Sequence[Judged]) -> Grid:
    rows = [
        (j.case, j.measured.cell.name, name, result, f"{value:.3g}")
        for j in judged
        for name, units in j.units.items()
        for result, value in units.items()
        if LIBRARIES[name].kind == "fastbn" and value > 1
    ]
    headings = ("case", "cell", "backend", "result", "units")
    return Grid("Where fastbn is off by more than it promises", headings, rows, 4, "nowhere")


def troubles_grid(judged: Sequence[Judged]) -> Grid:
    rows = [
        (j.case, j.measured.cell.name, name, outcome.status, outcome.note.replace("|", "/"))
        for j in judged
        for name, outcome in j.measured.outcomes.items()
        if outcome.status != "timed"
    ]
    return Grid("Not judged", ("case", "cell", "library", "what", "why"), rows, 5)


def units_grid(judged: Sequence[Judged], results: Sequence[str]) -> Grid:
    """The worse layout of each case, and then the times."""
    cell = judged[0].measured.cell
    names = [name for name in LIBRARIES if any(name in j.measured.outcomes for j in judged)]
    by_case, by_layout = dict[str, list[Judged]](), dict[str, list[Judged]]()
    for j in judged:
        by_case.setdefault(j.case, []).append(j)
        by_layout.setdefault(j.measured.cell.layout, []).append(j)
    rows = [
        (case, *(largest(members, name, results) for name in names))
        for case, members in by_case.items()
    ]
    for layout, members in by_layout.items():
        rows.append((f"time, {layout}", *(median_time(members, name) for name in names)))
    title = f"{cell.work}, {cell.dtype}, {cell.size_name}: {' and '.join(results)}"
    return Grid(title, ("case", *names), rows)


def largest(judged: Sequence[Judged], library: str, results: Sequence[str]) -> str:
    """The largest error of a library, or what kept it from having one."""
    outcomes = [j.measured.outcomes[library] for j in judged if library in j.measured.outcomes]
    for outcome in outcomes:
        if outcome.status != "timed":
            return outcome.status
    values = (j.units[library][result] for j in judged if library in j.units for result in results)
    return figure(max(values)) if outcomes else NONE


def figure(units: float) -> str:
    """Two digits, as short as may be."""
    if units < 0.01:
        return "< 0.01"
    if units < 100:
        return f"{units:.2g}"
    return f"{units:.0f}" if units < 1e4 else f"{units:.0e}".replace("e+0", "e").replace("e+", "e")


def median_time(judged: Sequence[Judged], library: str) -> str:
    taken = [seconds for j in judged if (seconds := j.measured.seconds(library))]
    return time(median(taken)) if taken else NONE


# --- kept ---------------------------------------------------------------------------------------


def to_json(found: Accuracy) -> str:
    """Strict JSON: an infinite error is the text "inf"."""
    fields = asdict(found) | {"judged": [entry(j) for j in found.judged]}
    return json.dumps(fields, indent=1, allow_nan=False) + "\n"


def entry(j: Judged) -> dict[str, Any]:
    """One case in one cell: of each library its outcome and units."""
    outcomes = {name: asdict(outcome) for name, outcome in j.measured.outcomes.items()}
    for name, units in j.units.items():
        outcomes[name]["units"] = {k: v if math.isfinite(v) else "inf" for k, v in units.items()}
    return {"case": j.case} | j.measured.cell.to_json() | {"outcomes": outcomes}
