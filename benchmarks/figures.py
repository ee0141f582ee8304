"""Averages, ratios and tables of a run's cells, for the parts of docs/performance.md.

Averages are geometric means. Where a run has nothing for a figure, it is a dash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import inf
from statistics import geometric_mean
from textwrap import fill

from benchmarks.cells import MB, WORKS
from benchmarks.plots import NOISE
from benchmarks.report import NONE
from benchmarks.results import Measured, Run

SIZES = {
    "under 1 MB": (0.0, MB),
    "1 to 10 MB": (MB, 10 * MB),
    "10 to 50 MB": (10 * MB, 50 * MB),
    "50 MB and up": (50 * MB, inf),
}
"""Classes of cells by the bytes of x: from, and below."""
LAYOUTS = ("NCHW", "NHWC", "NC")
WIDTH = 108

Figure = Callable[[Measured], float | None]


# --- which cells --------------------------------------------------------------------------------


def ordinary(run: Run) -> list[Measured]:
    """All but the awkward shapes, which NumPy alone is compared with."""
    return [m for m in run.compared if not m.cell.is_awkward]


def cells(
    run: Run,
    works: Iterable[str] = WORKS,
    *,
    dtype: str = "float32",
    output: str = "ready",
    threads: int | None = None,
) -> list[Measured]:
    """The ordinary cells of some works; by all threads where not told."""
    wanted = dtype, output, threads or run.machine.cores
    return [
        m
        for m in ordinary(run)
        if m.cell.work in works and (m.cell.dtype, m.cell.output, m.cell.threads) == wanted
    ]


def of_size(members: Iterable[Measured], size: str) -> list[Measured]:
    least, below = SIZES[size]
    return [m for m in members if least <= m.cell.bytes < below]


def of_layout(members: Iterable[Measured], layout: str) -> list[Measured]:
    return [m for m in members if m.cell.layout == layout]


def of_work(members: Iterable[Measured], work: str) -> list[Measured]:
    return [m for m in members if m.cell.work == work]


# --- figures of several cells -------------------------------------------------------------------


def against(library: str) -> Figure:
    """How many times as fast as a library fastbn is."""
    return lambda m: m.ratio(library)


def against_best(m: Measured) -> float | None:
    return m.against_peer


def figures(members: Iterable[Measured], figure: Figure) -> list[float]:
    return [value for m in members if (value := figure(m)) is not None]


def average(members: Iterable[Measured], figure: Figure) -> str:
    values = figures(members, figure)
    return ratio(geometric_mean(values)) if values else NONE


def ratio(value: float) -> str:
    """Two decimals below 10, none from there on."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.0f}"


def score(values: Sequence[float]) -> tuple[str, str, str]:
    """How many cells are ahead, level and behind."""
    ahead, behind = (sum(is_so(v) for v in values) for is_so in (is_ahead, is_behind))
    return str(ahead), str(len(values) - ahead - behind), str(behind)


def is_ahead(value: float) -> bool:
    return value > 1 + NOISE


def is_behind(value: float) -> bool:
    return value < 1 - NOISE


# --- text ---------------------------------------------------------------------------------------


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A table in Markdown, whose first columns are words and the others numbers."""
    marks = [":--" if number < words else "--:" for number in range(len(headings))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (headings, marks, *rows))


def wrapped(text: str, indent: str = "") -> str:
    return fill(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def listed(words: Sequence[str]) -> str:
    """As a sentence lists them."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
