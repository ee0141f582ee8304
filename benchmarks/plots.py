"""Plots of a run: the ratio to the best peer at every cell, and time against size."""

from __future__ import annotations

from collections.abc import Sequence
from math import log10
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.cells import FUSED, STEPS, WORKS, Cell
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
DPI = 130
NOISE = 0.03
BAR = 0.21
"""Inches of a figure's height for each bar."""
TITLES = {
    "forward": "Training forward",
    "inference": "Inference",
    "backward": "Training backward",
    "normalize_backward": "Backward by fixed statistics, dx alone",
    "fused-forward": "Training forward with residual and relu",
    "fused-inference": "Inference with residual and relu",
    "fused-backward": "Training backward with relu, and the residual's gradient",
    "step": "Training forward and backward",
    "fused-step": "Training forward and backward with residual and relu",
}


def draw_all(
    run: Run, folder: Path, works: Sequence[str] = (*WORKS, *FUSED, *STEPS), origin: str = ""
) -> list[Path]:
    """Write every plot that the run has cells for, as PNG; their paths.

    Each file says its origin where one is given.
    """
    notes = {"Source": origin} if origin else {}
    made = []
    for work in works:
        of_work = [m for m in run.compared if m.cell.work == work and not m.cell.is_awkward]
        members = [m for m in of_work if m.against_peer]
        if members:
            made.append(folder / f"ratio-{work}.png")
            draw_ratios(run, members, TITLES[work]).savefig(made[-1], dpi=DPI, metadata=notes)
    series = [m for m in run.measured if m.cell.in_series]
    if series:
        made.append(folder / "sizes.png")
        draw_sizes(run, series).savefig(made[-1], dpi=DPI, metadata=notes)
    return made


# --- the ratio at every cell --------------------------------------------------------------------


def draw_ratios(run: Run, members: Sequence[Measured], title: str) -> Figure:
    """A bar a cell: planes (NCHW) on the left, channels last on the right."""
    sides = [
        [m for m in members if (m.cell.layout == "NCHW") == planes] for planes in (True, False)
    ]
    lines = [lines_of(run, side) for side in sides if side]
    longest = max(map(len, lines))
    figure = blank(6.6 * len(lines), 1.4 + BAR * longest)
    limits = ratio_limits(members)
    panels = figure.subplots(1, len(lines), squeeze=False)[0]
    for axes, side in zip(panels, lines, strict=True):
        draw_bars(axes, side, limits)
        axes.set_ylim(longest - 0.4, -0.6)
    figure.suptitle(
        f"{title}: the best peer's time over fastbn's", x=0.01, ha="left", weight="bold"
    )
    return figure


def lines_of(run: Run, side: Sequence[Measured]) -> list[str | Measured]:
    """The plain cells first, then each variant under its heading; in each by size."""
    groups: dict[str, list[Measured]] = {}
    for m in sorted(side, key=lambda m: (rank(run, m), m.cell.bytes)):
        groups.setdefault(heading(run, m), []).append(m)
    lines: list[str | Measured] = []
    for name, group in groups.items():
        lines += [name, *group]
    return lines


def rank(run: Run, m: Measured) -> tuple[bool, ...]:
    """Sorts by what differs from a float32 array of images, a ready output and all threads."""
    cell = m.cell
    alone = cell.threads != run.machine.cores
    return alone, cell.output != "ready", cell.dtype != "float32", cell.layout == "NC"


def heading(run: Run, m: Measured) -> str:
    cell = m.cell
    layout = "(N, C)" if cell.layout == "NC" else cell.layout
    return f"{layout}, {cell.dtype}, {cell.output} output, {cell.threads_name}"


def ratio_limits(members: Sequence[Measured]) -> tuple[float, float]:
    """The same axis for both sides, with room for the labels at the bars' ends."""
    ratios = [m.against_peer or 1.0 for m in members]
    low, high = min(0.8, *ratios), max(2.0, *ratios)
    decades = log10(high / low)
    return low / 10 ** (0.05 * decades), high * 10 ** (0.4 * decades)


def draw_bars(axes: Axes, lines: Sequence[str | Measured], limits: tuple[float, float]) -> None:
    axes.set_xscale("log")
    for where, line in enumerate(lines):
        if isinstance(line, str):
            text = axes.text(limits[0], where + 0.1, f" {line}", va="center", size=8)
            text.set(weight="bold", bbox={"color": "white", "pad": 0.5})
            continue
        ratio, peer = line.against_peer or 1.0, line.best_peer or ("", 0.0)
        axes.barh(where, ratio - 1, 0.72, left=1, color=colour(ratio))
        axes.text(max(ratio, 1.0), where, f" {ratio:.2f}  {peer[0]}", va="center", size=7.5)
    axes.axvline(1, color="black", linewidth=0.8, zorder=0)
    names = ["" if isinstance(line, str) else label(line.cell) for line in lines]
    axes.set_yticks(range(len(lines)), names)
    axes.set_xlim(*limits)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("times as fast as the best peer, which is named (log scale)", size=8.5)
    tidy(axes)
    axes.tick_params(labelsize=7.5)
    axes.tick_params(axis="y", length=0)


def colour(ratio: float) -> str:
    if abs(ratio - 1) <= NOISE:
        return LEVEL
    return AHEAD if ratio > 1 else BEHIND


def label(cell: Cell) -> str:
    return f"{cell.size_name}   {size(cell.bytes)}"


# --- time against size --------------------------------------------------------------------------


def draw_sizes(run: Run, series: Sequence[Measured]) -> Figure:
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
    return figure


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
