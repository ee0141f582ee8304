"""Plots of a run: the ratio to the best peer at every cell, and time against size."""

from __future__ import annotations

from collections.abc import Sequence
from math import log10
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.cells import WORKS
from benchmarks.results import Measured, Run

# From the palette of Okabe and Ito, which colour-blind readers can tell apart.
AHEAD, LEVEL, BEHIND = "#0072B2", "#999999", "#D55E00"
LINES = {
    "fastbn cython": ("#0072B2", "-"),
    "fastbn cython avx2": ("#0072B2", ":"),
    "fastbn numba": ("#009E73", "-"),
    "fastbn numpy": ("#CC79A7", "-"),
    "PyTorch": ("#D55E00", "-"),
    "numpy.copyto": ("#E69F00", "--"),
}
LIMIT = "#555555"
QUIET = "#555555"
NOISE = 0.03
BAR = 0.21
"""Inches of a figure's height for each bar."""
TITLES = {
    "forward": "Training forward",
    "inference": "Inference",
    "backward": "Training backward",
    "frozen": "Frozen backward, dx alone",
}


def draw_all(run: Run, folder: Path) -> list[Path]:
    """Write every plot that the run has cells for, as PNG; their paths."""
    made = []
    for work in WORKS:
        members = [m for m in run.compared if m.cell.work == work and m.against_peer]
        if members:
            made.append(folder / f"ratio-{work}.png")
            draw_ratios(run, members, TITLES[work], made[-1])
    series = [m for m in run.measured if m.cell.in_series]
    if series:
        made.append(folder / "sizes.png")
        draw_sizes(run, series, made[-1])
    return made


# --- the ratio at every cell --------------------------------------------------------------------


def draw_ratios(run: Run, members: Sequence[Measured], title: str, output: Path) -> None:
    """A bar a cell: channels outside on the left, inside on the right."""
    sides = [
        [m for m in members if (m.cell.layout == "NCHW") == outside] for outside in (True, False)
    ]
    sides = [ordered(run, side) for side in sides if side]
    height = 1.4 + BAR * max(len(side) for side in sides)
    figure = blank(6.6 * len(sides), height)
    limits = ratio_limits(members)
    panels = figure.subplots(1, len(sides), squeeze=False)[0]
    for axes, side in zip(panels, sides, strict=True):
        draw_bars(run, axes, side, limits)
        longest = max(len(other) for other in sides)
        axes.set_ylim(longest - 0.4, -0.6)
    figure.suptitle(
        f"{title}: the best peer's time over fastbn's", x=0.01, ha="left", weight="bold"
    )
    figure.savefig(output, dpi=130)


def ordered(run: Run, side: Sequence[Measured]) -> list[Measured]:
    """The plain cells first, then each variant; by size, small ones first."""
    return sorted(side, key=lambda m: (variant(run, m), len(m.cell.shape), m.cell.bytes))


def variant(run: Run, m: Measured) -> str:
    """In what the cell differs from float32, a ready output and all threads."""
    cell = m.cell
    words = (
        cell.dtype if cell.dtype != "float32" else "",
        cell.output if cell.output != "ready" else "",
        cell.threads_name if cell.threads != run.machine.cores else "",
    )
    return " ".join(filter(None, words))


def ratio_limits(members: Sequence[Measured]) -> tuple[float, float]:
    """The same axis for both sides, with room for the labels at the bars' ends."""
    ratios = [m.against_peer or 1.0 for m in members]
    low, high = min(0.8, *ratios), max(2.0, *ratios)
    decades = log10(high / low)
    return low / 10 ** (0.05 * decades), high * 10 ** (0.4 * decades)


def draw_bars(run: Run, axes: Axes, side: Sequence[Measured], limits: tuple[float, float]) -> None:
    ratios = [m.against_peer or 1.0 for m in side]
    places = np.arange(len(side))
    widths = [ratio - 1 for ratio in ratios]
    axes.set_xscale("log")
    axes.barh(places, widths, 0.72, left=1, color=[colour(ratio) for ratio in ratios])
    for where, (m, ratio) in enumerate(zip(side, ratios, strict=True)):
        text = f" {ratio:.2f}  {m.best_peer[0] if m.best_peer else ''}"
        axes.text(max(ratio, 1.0), where, text, va="center", size=7.5)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(places, [label(run, m) for m in side], size=7.5)
    axes.set_xlim(*limits)
    axes.xaxis.set_major_locator(LogLocator(subs=(0.5, 1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    layouts = " and ".join(dict.fromkeys(m.cell.layout for m in side))
    axes.set_title(layouts.replace("NC", "(N, C)") if layouts == "NC" else layouts, size=10)
    axes.set_xlabel("times as fast as the best peer, which is named (log scale)", size=8.5)
    tidy(axes)


def colour(ratio: float) -> str:
    if abs(ratio - 1) <= NOISE:
        return LEVEL
    return AHEAD if ratio > 1 else BEHIND


def label(run: Run, m: Measured) -> str:
    words = (size(m.cell.bytes), m.cell.size_name, variant(run, m))
    return "   ".join(filter(None, reversed(words)))


# --- time against size --------------------------------------------------------------------------


def draw_sizes(run: Run, series: Sequence[Measured], output: Path) -> None:
    """A panel for each work and layout of the series."""
    works = [work for work in WORKS if any(m.cell.work == work for m in series)]
    layouts = [name for name in ("NCHW", "NHWC") if any(m.cell.layout == name for m in series)]
    figure = blank(5.6 * len(layouts), 0.8 + 4.2 * len(works))
    panels = figure.subplots(len(works), len(layouts), squeeze=False, sharex=True, sharey=True)
    for work, line in zip(works, panels, strict=True):
        for layout, axes in zip(layouts, line, strict=True):
            chosen = [m for m in series if (m.cell.work, m.cell.layout) == (work, layout)]
            draw_lines(run, axes, sorted(chosen, key=lambda m: m.cell.bytes))
            axes.set_title(f"{TITLES[work]}, {layout}", loc="left", size=11)
        line[0].set_ylabel("median time of a call")
    for axes in panels[-1]:
        axes.set_xlabel("size of x")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    cell = series[0].cell
    title = f"Time against size: {cell.channels} channels, {cell.dtype}, {cell.threads_name}"
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    figure.savefig(output, dpi=130)


def draw_lines(run: Run, axes: Axes, members: Sequence[Measured]) -> None:
    """A line a library, and the limit as the edge of what cannot be."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    copies = [(m.cell.bytes, m.best_copy) for m in members if m.best_copy]
    if copies:
        sizes, seconds = zip(*copies, strict=True)
        axes.fill_between(sizes, seconds, min(seconds) / 10, color="#EEEEEE", zorder=0)
        axes.plot(sizes, seconds, color=LIMIT, linewidth=1.2, label="best copy: the limit")
    for name in (name for name in LINES if name in run.libraries(members)):
        points = [(m.cell.bytes, m.seconds(name)) for m in members if m.seconds(name)]
        shade, style = LINES[name]
        axes.plot(*zip(*points, strict=True), style, color=shade, linewidth=1.8, label=name)
    for kind, text in ((run.machine.l2, "L2 of a core"), (run.machine.l3, "L3")):
        if kind:
            axes.axvline(kind, color="#BBBBBB", linewidth=0.8, zorder=0)
            axes.text(
                kind, 0.99, f" {text}", transform=axes.get_xaxis_transform(),
                size=8, color=QUIET, va="top",
            )  # fmt: skip
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: duration(value)))
    axes.margins(x=0.02)
    axes.grid(color="#E5E5E5", linewidth=0.6)
    tidy(axes)


# --- both ---------------------------------------------------------------------------------------


def blank(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    return figure


def tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=QUIET)
    axes.set_axisbelow(True)


def size(count: float) -> str:
    """Bytes as B, KB or MB."""
    for unit, scale in (("MB", 1e6), ("KB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.3g} B"


def duration(seconds: float) -> str:
    """A power of ten of seconds."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale * 0.999:
            return f"{seconds / scale:g} {unit}"
    return f"{seconds * 1e9:g} ns"
