"""Tables of a run, once as grids of text: for the terminal by rich, for documents in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.cells import MB
from benchmarks.compare import Change
from benchmarks.libraries import OURS
from benchmarks.machine import Machine
from benchmarks.results import Measured, Run

NONE = "-"


@dataclass(frozen=True)
class Grid:
    """A table of text; the first columns are words, the others numbers."""

    title: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    words: int = 1
    empty: str = ""
    """What to say where there are no rows."""

    def to_rich(self) -> Table | str:
        if not self.rows:
            return f"{self.title}: {self.empty}"
        table = Table(title=self.title, title_justify="left", box=box.SIMPLE_HEAD)
        for number, heading in enumerate(self.headings):
            table.add_column(heading, justify="left" if number < self.words else "right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def to_markdown(self) -> str:
        if not self.rows:
            return f"### {self.title}\n\n{self.empty}\n"
        marks = (":--" if n < self.words else "--:" for n in range(len(self.headings)))
        lines = [self.headings, tuple(marks), *self.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"### {self.title}\n\n{table}\n"


def show(run: Run, console: Console) -> None:
    """Everything on the terminal: what is lost comes first."""
    for grid in (lost_grid(run), troubles_grid(run)):
        if grid.rows or grid.empty:
            console.print(grid.to_rich())
    for grid in cell_grids(run):
        console.print(grid.to_rich())


def markdown(run: Run) -> str:
    """The same as a document."""
    head = heading(run.machine, run.versions, run.missing, f"{run.date}, {run.rounds} rounds")
    grids = [grid for grid in (lost_grid(run), troubles_grid(run)) if grid.rows or grid.empty]
    return "\n".join([head, *(g.to_markdown() for g in (*grids, *cell_grids(run)))])


def heading(machine: Machine, versions: dict[str, str], missing: dict[str, str], when: str) -> str:
    """What a document begins with."""
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    left_out = "".join(f"\n* Not measured: {name} ({why})" for name, why in missing.items())
    return f"* Machine: {machine}\n* Versions: {listed}\n* Date: {when}{left_out}\n"


# --- the grids ----------------------------------------------------------------------------------


def lost_grid(run: Run) -> Grid:
    rows = []
    for m in run.lost:
        peer = m.best_peer
        assert peer is not None
        rows.append((m.cell.name, peer[0], time(m.ours), time(peer[1]), number(m.against_peer)))
    return Grid(
        "Cells where a peer is faster than fastbn cython",
        ("cell", "best peer", "fastbn", "peer", "peer / fastbn"),
        rows,
        words=2,
        empty="none",
    )


def troubles_grid(run: Run) -> Grid:
    """Libraries that were not timed at a cell that they should have done."""
    rows = [
        (m.cell.name, name, outcome.status, outcome.note.replace("|", "/"))
        for m in run.measured
        for name, outcome in m.outcomes.items()
        if outcome.status != "timed"
    ]
    return Grid("Not timed", ("cell", "library", "what", "why"), rows, words=4)


def cell_grids(run: Run) -> list[Grid]:
    """All cells, a grid for each work, layout and variant; a row is a shape."""
    groups: dict[tuple[object, ...], list[Measured]] = {}
    for m in run.measured:
        cell = m.cell
        key = (cell.in_series, cell.dtype, cell.output, cell.threads, cell.work, cell.layout)
        groups.setdefault(key, []).append(m)
    return [cells_grid(run, members) for members in groups.values()]


def cells_grid(run: Run, members: list[Measured]) -> Grid:
    cell = members[0].cell
    names = [name for name in run.libraries(members) if not name.startswith("copy,")]
    words = (cell.work, cell.layout, cell.dtype, f"{cell.output} output", cell.threads_name)
    series = ("series",) if cell.in_series else ()
    derived = ("best copy", "copies", "spread") + (() if series else ("best peer / fastbn",))
    rows = []
    for m in members:
        times = (time(m.seconds(name)) for name in names)
        ratio = () if series else (number(m.against_peer),)
        more = (time(m.best_copy), number(m.copies()), spread(m), *ratio)
        rows.append((m.cell.size_name, f"{m.cell.bytes / MB:.3g}", *times, *more))
    return Grid(", ".join((*words, *series)), ("shape", "MB", *names, *derived), rows)


def changes_grid(changes: Iterable[Change], threshold: float) -> Grid:
    rows = [
        (c.cell.name, c.library, time(c.old.median), time(c.new.median), number(c.factor))
        for c in changes
    ]
    return Grid(
        f"Slower by more than {threshold:.0%} and beyond the spread",
        ("cell", "library", "old", "new", "new / old"),
        rows,
        words=2,
        empty="none",
    )


# --- numbers as text ----------------------------------------------------------------------------


def time(seconds: float | None) -> str:
    """Three digits, in us or ms."""
    if seconds is None:
        return NONE
    unit, scaled = ("us", seconds * 1e6) if seconds < 1e-3 else ("ms", seconds * 1e3)
    return f"{digits(scaled)} {unit}"


def number(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def digits(value: float) -> str:
    """Three digits, and no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def spread(m: Measured) -> str:
    """The middle half of fastbn's samples, in percent of their median."""
    ours = m.outcomes.get(OURS)
    if ours is None or ours.status != "timed":
        return NONE
    return f"{(ours.q3 - ours.q1) / ours.median:.0%}"
