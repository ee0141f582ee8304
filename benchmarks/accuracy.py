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
from benchmarks.libraries import AVX2, LIBRARIES
from benchmarks.machine import Machine, this_machine
from benchmarks.report import NONE, Grid, heading, time
from benchmarks.results import Judged, Measured, Outcome
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
ORDINARY = "ordinary: N(0, 1)"
BELOW = "< 0.01"
RESULTS = Path(__file__).parent / "results" / "accuracy.json"
"""The run that the page shows."""
PAGE = Path(__file__).parents[1] / "docs" / "numerics.md"
LEGEND = (
    "The largest error of any value, in units of what fastbn promises (docs/numerics.md): up to 1 "
    "is as promised, inf is a NaN or an infinity where there should be a number. The worse of NCHW "
    "and NHWC. Times: median over all cases."
)


def main() -> None:
    arguments = parse(sys.argv[2:])
    if arguments.page:
        PAGE.write_text(page(PAGE.read_text(), from_json(RESULTS.read_text())))
        return
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
    parser.add_argument(
        "--page",
        action="store_true",
        help="measure nothing: write the tables of docs/numerics.md anew, from the run that is "
        "kept in benchmarks/results",
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
    return made + [units_grid(members, results) for results, members in members_of(judged)]


def members_of(judged: Sequence[Judged]) -> list[tuple[Sequence[str], list[Judged]]]:
    """Of each table the results, and those that were judged by them."""
    tables: list[tuple[Sequence[str], list[Judged]]] = []
    for dtype in DTYPES:
        for work, results in TABLES:
            cell = (dtype, work)
            members = [j for j in judged if (j.measured.cell.dtype, j.measured.cell.work) == cell]
            if members:
                tables.append((results, members))
    return tables


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
    names = names_of(judged)
    by_layout = dict[str, list[Judged]]()
    for j in judged:
        by_layout.setdefault(j.measured.cell.layout, []).append(j)
    rows = case_rows(judged, names, results)
    for layout, members in by_layout.items():
        rows.append((f"time, {layout}", *(median_time(members, name) for name in names)))
    return Grid(title(judged, results), ("case", *names), rows)


def names_of(judged: Sequence[Judged]) -> list[str]:
    """The libraries that took part."""
    return [name for name in LIBRARIES if any(name in j.measured.outcomes for j in judged)]


def case_rows(
    judged: Sequence[Judged], names: Sequence[str], results: Sequence[str]
) -> list[tuple[str, ...]]:
    by_case = dict[str, list[Judged]]()
    for j in judged:
        by_case.setdefault(j.case, []).append(j)
    return [
        (case, *(largest(members, name, results) for name in names))
        for case, members in by_case.items()
    ]


def title(judged: Sequence[Judged], results: Sequence[str]) -> str:
    cell = judged[0].measured.cell
    return f"{cell.work}, {cell.dtype}, {cell.size_name}: {' and '.join(results)}"


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
        return BELOW
    if units < 100:
        return f"{units:.2g}"
    return f"{units:.0f}" if units < 1e4 else f"{units:.0e}".replace("e+0", "e").replace("e+", "e")


def median_time(judged: Sequence[Judged], library: str) -> str:
    taken = [seconds for j in judged if (seconds := j.measured.seconds(library))]
    return time(median(taken)) if taken else NONE


# --- the page -----------------------------------------------------------------------------------


def page(text: str, found: Accuracy) -> str:
    """docs/numerics.md with its tables made of a run."""
    names = shown_on_page(found.judged)
    versions = {name: found.versions[name] for name in names}
    head = heading(found.machine, versions, found.missing, found.date)
    tables = {
        "summary": summary_grid(found.judged).to_markdown(),
        "cases": "\n".join([head, *(grid.to_markdown() for grid in case_grids(found.judged))]),
    }
    for name, made in tables.items():
        begin = f"<!-- {name}: by python -m benchmarks accuracy --page -->\n"
        start = text.index(begin) + len(begin)
        text = f"{text[:start]}\n{made}\n{text[text.index('<!-- end -->', start) :]}"
    return text


def shown_on_page(judged: Sequence[Judged]) -> list[str]:
    """All but fastbn on another instruction set, whose bits are the same."""
    return [name for name in names_of(judged) if name != AVX2]


def summary_grid(judged: Sequence[Judged]) -> Grid:
    """The largest error of every type and result: of ordinary data, and of all."""
    names, rows = shown_on_page(judged), []
    for results, members in members_of(judged):
        result = f"{members[0].measured.cell.dtype}, {' and '.join(results)}"
        ordinary = [j for j in members if j.case == ORDINARY]
        for what, some in (("ordinary data", ordinary), ("all data", members)):
            rows.append((result, what, *(largest(some, name, results) for name in names)))
    return Grid("Largest errors, in bounds", ("result", "on", *names), rows, words=2)


def case_grids(judged: Sequence[Judged]) -> list[Grid]:
    """The cases where any library is off by a hundredth of its bound or more."""
    grids = []
    for results, members in members_of(judged):
        names = shown_on_page(members)
        rows = case_rows(members, names, results)
        seen = [row for row in rows if any(text != BELOW for text in row[1:])]
        grids.append(Grid(title(members, results), ("case", *names), seen, empty="none"))
    return grids


# --- kept ---------------------------------------------------------------------------------------


def to_json(found: Accuracy) -> str:
    """Strict JSON, a line for each case and cell: an infinite error is the text "inf"."""
    fields = {field: getattr(found, field) for field in ("date", "versions", "missing")}
    head = json.dumps({"machine": asdict(found.machine), **fields})
    lines = ",\n".join(json.dumps(entry(j), allow_nan=False) for j in found.judged)
    return f'{head[:-1]}, "judged": [\n{lines}\n]}}\n'


def entry(j: Judged) -> dict[str, Any]:
    """One case in one cell: of each library its outcome and units, to four digits."""
    outcomes = {name: asdict(outcome) for name, outcome in j.measured.outcomes.items()}
    for outcome in outcomes.values():
        outcome |= {k: four_digits(outcome[k]) for k in ("median", "q1", "q3")}
    for name, units in j.units.items():
        outcomes[name]["units"] = {k: four_digits(v) for k, v in units.items()}
    return {"case": j.case} | j.measured.cell.to_json() | {"outcomes": outcomes}


def four_digits(value: float) -> float | str:
    return float(f"{value:.4g}") if math.isfinite(value) else "inf"


def from_json(text: str) -> Accuracy:
    """What `to_json` wrote."""
    fields = json.loads(text)
    machine, judged = Machine(**fields.pop("machine")), map(judged_of, fields.pop("judged"))
    return Accuracy(machine=machine, judged=list(judged), **fields)


def judged_of(fields: dict[str, Any]) -> Judged:
    """What `entry` made."""
    case, outcomes = fields.pop("case"), fields.pop("outcomes")
    units = {
        name: {k: float(v) for k, v in outcome.pop("units").items()}
        for name, outcome in outcomes.items()
        if "units" in outcome
    }
    known = {name: Outcome(**outcome) for name, outcome in outcomes.items()}
    return Judged(case, Measured(Cell.from_json(fields), known), units)
