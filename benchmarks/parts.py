"""The parts of docs/performance.md that a run gives, each a function of the run: no empty lines,
and nothing where a section is for cells that not every run has.

Averages are geometric means. Where a run has nothing for a figure, it is a dash.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from statistics import geometric_mean, median

from benchmarks.behind import passes_behind
from benchmarks.cells import CALL, MB, WORKS, Cell, Shape
from benchmarks.figures import (
    LAYOUTS,
    SIZES,
    Figure,
    against,
    against_best,
    average,
    cells,
    figures,
    is_behind,
    listed,
    of_layout,
    of_size,
    of_work,
    ordinary,
    ratio,
    score,
    table,
    wrapped,
)
from benchmarks.kinds import (
    awkward,
    curve_times,
    curves,
    fused,
    grouped,
    halves,
    image_times,
    images,
    masked,
    reordered,
    reordered_ratios,
    row_times,
    rows,
    step_ratios,
    steps,
    table_times,
    tables,
)
from benchmarks.libraries import FROZEN, LIBRARIES, NUMPY, ONEDNN, OURS, TORCH
from benchmarks.plots import NOISE
from benchmarks.report import NONE, time
from benchmarks.results import Measured, Run

API = {
    "forward": "`batch_norm`",
    "inference": "`normalize`",
    "backward": "`batch_norm_backward`",
    "normalize_backward": "`normalize_backward`",
}
"""The function that does a work."""
FAMILIAR: tuple[tuple[Shape, str], ...] = (
    ((32, 64, 112, 112), "NCHW"),
    ((32, 256, 56, 56), "NHWC"),
    ((60, 100), "NC"),
)
SHOWN = 10
"""Cells where a peer is faster, in their table."""
NAMED = 3
"""Kinds of work where a peer is faster, in the verdict."""


def verdict(run: Run) -> str:
    members = cells(run)
    lines = [verdict_on(members, name) for name in (NUMPY, TORCH, ONEDNN)]
    lines += [verdict_on_all(members), verdict_on_use(members)]
    return "\n".join(wrapped(f"* {line}", "  ") for line in lines)


def verdict_on(members: Sequence[Measured], peer: str) -> str:
    values = figures(members, against(peer))
    if not values:
        return f"**{peer}** was not measured."
    by_work = [
        f"{API[work]} {average(of_work(members, work), against(peer))}"
        for work in WORKS
        if figures(of_work(members, work), against(peer))
    ]
    ahead, _, behind = score(values)
    return (
        f"**Against {peer}**, times as fast on average: {listed(by_work)}. Ahead in {ahead} of "
        f"{len(values)} cases, behind in {behind}."
    )


def verdict_on_all(members: Sequence[Measured]) -> str:
    """Against whatever is fastest in each cell."""
    values = figures(members, against_best)
    if not values:
        return "**No peer** was measured."
    ahead, _, behind = score(values)
    middle, least, most = map(ratio, (geometric_mean(values), min(values), max(values)))
    return (
        f"**Against the fastest other library in each case**, {middle} times as fast on average, "
        f"from {least} to {most}. Ahead in {ahead} of {len(values)} cases, behind in {behind}."
    )


def verdict_on_use(members: Sequence[Measured]) -> str:
    """The kinds of work where the best peer is faster on average, the worst first."""
    slow = []
    for work in WORKS:
        for layout in LAYOUTS:
            for size in SIZES:
                group = of_size(of_layout(of_work(members, work), layout), size)
                values = figures(group, against_best)
                if values and is_behind(geometric_mean(values)):
                    peers = Counter(m.best_peer[0] for m in group if m.best_peer)
                    what = f"{API[work]} in {layout} {size} ({peers.most_common(1)[0][0]}"
                    slow.append((geometric_mean(values), what))
    slow.sort()
    named = [f"{what}, {ratio(value)})" for value, what in slow[:NAMED]]
    more = f"; {len(slow) - NAMED} more in the table of ratios" if len(slow) > NAMED else ""
    where = (
        f"another library is faster on average in {listed(named)}{more}"
        if slow
        else "on average no other library is faster in any work, layout and class of size"
    )
    return (
        f"**Where not to use it**: {where}. Nor where the arrays are another framework's tensors, "
        "or on a GPU: fastbn works on NumPy arrays, on the CPU."
    )


def setting(run: Run) -> str:
    """The machine, the versions and the date."""
    kinds = {name: library.kind for name, library in LIBRARIES.items()}
    there = [f"{k} {v}" for k, v in run.versions.items() if k == OURS or kinds[k] == "peer"]
    absent = [name for name in run.missing if kinds[name] == "peer"]
    lines = [f"Machine: {run.machine}", f"{run.date}, {run.rounds} rounds: {', '.join(there)}"]
    lines[1] += f"; not installed: {listed(absent)}" if absent else ""
    return "\n".join(wrapped(f"* {line}", "  ") for line in lines)


def losing(run: Run) -> list[Measured]:
    """The cells where a peer is faster, the worst first."""
    return [m for m in run.lost if not m.cell.is_awkward and is_behind(m.against_peer or 1)]


def lost(run: Run) -> str:
    """How many cells lose."""
    worse, compared = losing(run), figures(ordinary(run), against_best)
    shown = f"; the {SHOWN} furthest behind" if len(worse) > SHOWN else ""
    return wrapped(
        f"In {len(worse)} of {len(compared)} cells, of any type, output and number of threads, a "
        f"peer is faster by more than {100 * NOISE:.0f} %{shown}:"
    )


def behind(run: Run) -> str:
    """The cells that lose."""
    rows = []
    for m in losing(run)[:SHOWN]:
        c, peer = m.cell, m.best_peer
        assert peer is not None
        how = f"{c.dtype}, {c.output}, {c.threads_name}"
        figure = ratio(m.against_peer or 1)
        rows.append((c.work, c.layout, c.size_name, how, peer[0], figure))
    headings = ("work", "layout", "shape", "how", "fastest peer", "ratio")
    return table(headings, rows, 5)


def ratios(run: Run) -> str:
    """By work, layout and size."""
    rows = []
    for work in WORKS:
        for layout in LAYOUTS:
            group = of_layout(cells(run, [work]), layout)
            by_size = [average(of_size(group, size), against_best) for size in SIZES]
            values = figures(group, against_best)
            rows.append((work, layout, *by_size, average(group, against_best), *score(values)))
    headings = ("work", "layout", *SIZES, "all", "ahead", "level", "behind")
    return table(headings, rows, 2)


def peers(run: Run) -> str:
    """Every peer, and every way to vary the cells, by work."""
    members = cells(run)
    rows = []
    for name, library in LIBRARIES.items():
        if library.kind == "peer" and figures(members, against(name)):
            rows.append((name, *by_work(members, against(name))))
        if name == ONEDNN:
            by_jit = [m for m in members if m.seconds(name) and "jit" in m.outcomes[name].note]
            others = [m for m in members if m not in by_jit]
            rows.append((f"{name} by its JIT", *by_work(by_jit, against(name))))
            rows.append((f"{name} without", *by_work(others, against(name))))
    varied = {
        "fastest peer": members,
        "the same in float64": cells(run, dtype="float64"),
        "the same, fresh output": cells(run, output="fresh"),
        "the same, one thread": cells(run, threads=1),
    }
    rows += [(name, *by_work(group, against_best)) for name, group in varied.items()]
    return table(("against", *WORKS, "all", "ahead", "level", "behind"), rows)


def by_work(members: Sequence[Measured], figure: Figure) -> list[str]:
    averages = [average(of_work(members, work), figure) for work in WORKS]
    return [*averages, average(members, figure), *score(figures(members, figure))]


def times(run: Run) -> str:
    """Of a few familiar shapes."""
    rows = []
    names = (OURS, NUMPY, TORCH, ONEDNN)
    for shape, layout in FAMILIAR:
        for work in WORKS[:3]:
            cell = Cell(work, layout, "float32", shape, "ready", run.machine.cores)
            m = run.at(cell) or Measured(cell, {})
            found = (time(m.seconds(name)) for name in names)
            rows.append((cell.size_name, layout, work, *found, time(m.best_copy)))
    headings = ("shape", "layout", "work", "fastbn", *names[1:], "one copy")
    return table(headings, rows, 3)


def copies(run: Run) -> str:
    """Medians of fastbn, and of the fastest peer of each cell."""
    rows = []
    for work in WORKS[:3]:
        for layout in LAYOUTS:
            group = of_layout(cells(run, [work]), layout)
            found = [in_copies(of_size(group, size)) for size in SIZES]
            rows.append((work, layout, *found))
    return table(("work", "layout", *SIZES), rows, 2)


def in_copies(members: Sequence[Measured]) -> str:
    pairs = [
        (own, best[1] / m.best_copy)
        for m in members
        if (own := m.copies()) and (best := m.best_peer) and m.best_copy
    ]
    if not pairs:
        return NONE
    ours, theirs = zip(*pairs, strict=True)
    return f"{ratio(median(ours))} ({ratio(median(theirs))})"


def memory(run: Run) -> str:
    """How fast this machine copies, and what more threads bring."""
    alone, together = (cells(run, ["inference"], threads=n) for n in (1, run.machine.cores))
    _, inside, _, large = SIZES
    found = [speed(of_size(m, size)) for size in (inside, large) for m in (alone, together)]
    cores = run.machine.cores
    ours, copy = gain(run, lambda m: m.ours), gain(run, lambda m: m.best_copy)
    return wrapped(
        f"Here a copy moves {found[0]} GB/s by one thread and {found[1]} by {cores} where arrays "
        f"have 1 to 10 MB, and {found[2]} and {found[3]} from 50 MB up (medians; bytes read and "
        f"written). From 4 MB up, fastbn is on average {ours} times as fast by {cores} threads as "
        f"by one, and a copy {copy} times."
    )


def speed(members: Iterable[Measured]) -> str:
    values = [2 * m.cell.bytes / m.best_copy / 1e9 for m in members if m.best_copy]
    return f"{median(values):.0f}" if values else NONE


def gain(run: Run, seconds: Figure) -> str:
    """How many times as fast something is by all threads as by one."""
    values = []
    for alone in cells(run, threads=1):
        together = run.at(replace(alone.cell, threads=run.machine.cores))
        if alone.cell.bytes >= 4 * MB and together:
            above, below = seconds(alone), seconds(together)
            values += [above / below] if above and below else []
    return ratio(geometric_mean(values)) if values else NONE


def backends(run: Run) -> str:
    """The other backends, and the kernels for AVX2: their time over that of the first."""
    names = [n for n, library in LIBRARIES.items() if library.kind == "fastbn" and n != OURS]
    rows, members = [], cells(run)
    for name in names:
        groups = [of_size(members, size) for size in SIZES]
        groups += [of_work(members, work) for work in WORKS]
        rows.append((name, *(average(group, against(name)) for group in groups)))
    return table(("", *SIZES, *WORKS), rows)


def calls(run: Run) -> str:
    """What does not depend on the size."""
    cell = Cell("inference", "NC", "float32", CALL, "ready", run.machine.cores)
    m = run.at(cell) or Measured(cell, {})
    found = [time(m.seconds(name)) for name in (OURS, FROZEN)]
    return wrapped(
        f"`normalize` of an array of shape {CALL} takes {found[0]}, and the same by a "
        f"`FrozenBatchNorm` {found[1]}: nearly all of it is the call. `import fastbn` takes "
        f"{time(run.import_seconds)} beside `import numpy`."
    )


PARTS: dict[str, Callable[[Run], str]] = {
    part.__name__: part
    for part in (
        verdict,
        setting,
        lost,
        behind,
        passes_behind,
        ratios,
        peers,
        times,
        copies,
        memory,
        backends,
        fused,
        steps,
        step_ratios,
        halves,
        masked,
        grouped,
        rows,
        row_times,
        curves,
        curve_times,
        images,
        image_times,
        tables,
        table_times,
        reordered,
        reordered_ratios,
        awkward,
        calls,
    )
}
