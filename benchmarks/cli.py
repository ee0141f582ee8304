"""``python -m benchmarks``: measure, compare two runs, or make a run's report again.

``python -m benchmarks accuracy`` measures errors on hard data instead, ``python -m benchmarks
budget`` compares calls with their passes, and
``python -m benchmarks page`` makes docs/performance.md from the results that are committed.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import plots, report
from benchmarks.cells import MB, Cell, all_cells, quick_cells
from benchmarks.compare import broken, regressions
from benchmarks.libraries import LIBRARIES
from benchmarks.machine import this_machine
from benchmarks.results import Run
from benchmarks.rounds import import_seconds, measure_all, taking_part
from fastbn._cpus import available_cpus

ROUNDS, QUICK_ROUNDS = 9, 3
WIDE = 240
"""Columns of the tables where no terminal limits them."""


def main() -> None:
    arguments = parse()
    console = make_console()
    if arguments.compare:
        old, new = arguments.compare
        sys.exit(compare(old, new, arguments.threshold, console))
    run = arguments.report or measure(arguments, console)
    if arguments.again:
        run = arguments.again.renewed(run)
    arguments.output.mkdir(parents=True, exist_ok=True)
    written = write(run, arguments.output)
    report.show(run, console)
    for path in written:
        console.print(f"Written: {path}", soft_wrap=True)


def make_console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDE)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add_options(parser.add_argument)
    arguments = parser.parse_args()
    try:
        cells = (quick_cells if arguments.quick else all_cells)(available_cpus())
        if arguments.again:
            cells = [m.cell for m in arguments.again.measured if m.is_disturbed]
        arguments.cells, arguments.libraries = chosen(cells, arguments.only)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def add_options(add: Callable[..., object]) -> None:
    add("--quick", action="store_true", help="a look, in under two minutes")
    add(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help="a work, a family of works, layout, type, shape as 32x64x112x112, output, number of "
        "threads as '1 thread', or part of a library's name; again for more: of one kind any, of "
        "several all",
    )
    add("--rounds", type=positive, help=f"turns of each library (default: {ROUNDS})")
    add(
        "--output",
        type=Path,
        default=Path("benchmark-results"),
        metavar="FOLDER",
        help="where results.json, results.md and the plots go (default: %(default)s)",
    )
    add(
        "--report",
        type=saved,
        metavar="FILE.json",
        help="measure nothing: make the tables and plots of an earlier run again",
    )
    add(
        "--again",
        type=saved,
        metavar="FILE.json",
        help="measure again the cells of an earlier run whose samples lie apart by more than half "
        "of their median, as where the machine had something else to do, and keep its others",
    )
    add(
        "--compare",
        nargs=2,
        type=saved,
        metavar=("OLD.json", "NEW.json"),
        help="measure nothing: list what became slower; exit code 1 if anything did",
    )
    add(
        "--threshold",
        type=float,
        default=0.1,
        metavar="PART",
        help="how much slower counts (default: %(default)s)",
    )


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 up")
    return int(text)


def saved(text: str) -> Run:
    """A run that was saved as JSON."""
    try:
        return Run.load(Path(text))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def chosen(cells: Sequence[Cell], words: Sequence[str]) -> tuple[list[Cell], list[str]]:
    """The cells and libraries that the words leave: of one kind any, of several kinds all."""
    wanted: dict[str, set[str]] = {}
    for word in words:
        kind, values = meaning(cells, word)
        wanted.setdefault(kind, set()).update(values)
    libraries = wanted.pop("library", set(LIBRARIES))
    left = [c for c in cells if all(properties(c)[k] in v for k, v in wanted.items())]
    if not left:
        raise ValueError(f"no cell is left by: {', '.join(words)}")
    return left, [name for name in LIBRARIES if name in libraries]


def meaning(cells: Sequence[Cell], word: str) -> tuple[str, set[str]]:
    """What kind of word it is, and the values it stands for."""
    folded = word.casefold()
    known = {(kind, value) for cell in cells for kind, value in properties(cell).items()}
    for kind, value in known:
        if value.casefold() == folded:
            return kind, {value}
    exact = {name for name in LIBRARIES if name.casefold() == folded}
    libraries = exact or {name for name in LIBRARIES if folded in name.casefold()}
    if not libraries:
        values = ", ".join(sorted(value for kind, value in known if kind != "shape"))
        names = ", ".join(LIBRARIES)
        raise ValueError(
            f"--only {word!r} is none of: {values}; a shape among the cells, as 32x64x112x112; "
            f"a library: {names}"
        )
    return "library", libraries


def properties(cell: Cell) -> dict[str, str]:
    """What --only can ask for, by kind."""
    return {
        "work": cell.work,
        "family": cell.family,
        "layout": cell.layout,
        "type": cell.dtype,
        "shape": cell.size_name,
        "output": cell.output,
        "threads": cell.threads_name,
    }


def measure(arguments: argparse.Namespace, console: Console) -> Run:
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    cells, libraries = arguments.cells, arguments.libraries
    expected = sum(cost(cell, libraries, rounds) for cell in cells)
    console.print(f"{len(cells)} cells, about {max(1, round(expected / 60))} min")
    took = import_seconds()
    with Screen(expected, libraries, rounds, console) as screen:
        findings = measure_all(cells, libraries, rounds, screen)
    return Run(
        machine=this_machine(available_cpus()),
        date=today(),
        versions=findings.versions,
        missing=findings.missing,
        import_seconds=took,
        measured=findings.measured,
        rounds=rounds,
    )


def today() -> str:
    return datetime.datetime.now().astimezone().date().isoformat()


def cost(cell: Cell, libraries: Sequence[str], rounds: int) -> float:
    """About how many seconds a cell takes, on a machine of two cores."""
    share = len(taking_part(cell, libraries)) / len(LIBRARIES)
    size = cell.bytes / MB
    return share * (1.0 + 0.03 * size + rounds * (0.1 + 0.004 * size))


class Screen:
    """The progress bar. It is drawn between cells alone, so as not to disturb them."""

    def __init__(
        self, expected: float, libraries: Sequence[str], rounds: int, console: Console
    ) -> None:
        self._libraries, self._rounds = libraries, rounds
        self._progress = Progress(
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.description}"),
            console=console,
            auto_refresh=False,
            speed_estimate_period=300,
        )
        self._task = self._progress.add_task("starting the libraries", total=expected)

    def __enter__(self) -> Screen:
        self._progress.start()
        self._progress.refresh()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, cell: Cell) -> None:
        self._progress.update(self._task, description=cell.name, refresh=True)

    def end(self, cell: Cell) -> None:
        spent = cost(cell, self._libraries, self._rounds)
        self._progress.update(self._task, advance=spent, refresh=True)

    def say(self, text: str) -> None:
        self._progress.console.print(text, soft_wrap=True)


def write(run: Run, folder: Path) -> list[Path]:
    """The run's JSON, its tables in Markdown, and the plots."""
    run.save(folder / "results.json")
    (folder / "results.md").write_text(report.markdown(run))
    return [folder / "results.json", folder / "results.md", *plots.draw_all(run, folder)]


def compare(old: Run, new: Run, threshold: float, console: Console) -> int:
    """The exit code: 1 where something of fastbn has become slower, or no longer works."""
    slower, lost = regressions(old, new, threshold), broken(old, new)
    console.print(report.changes_grid(slower, threshold).to_rich())
    for cell, library, outcome in lost:
        console.print(f"{cell.name}, {library}: {outcome.status}: {outcome.note}", soft_wrap=True)
    return 1 if slower or lost else 0
