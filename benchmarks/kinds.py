"""The parts of docs/performance.md on more kinds of work, each a function of the run.

Steps, reordered outputs, rows, curves, images and tables are not in every run: their parts are
empty where they are not.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.cells import AWKWARD, FUSED, HALVES, MASKED, STEPS, WORKS
from benchmarks.figures import (
    LAYOUTS,
    against,
    against_best,
    average,
    cells,
    figures,
    of_layout,
    ordinary,
    ratio,
    score,
    table,
    wrapped,
)
from benchmarks.libraries import (
    BY_COPY,
    COMPILED,
    COPYTO,
    LIBRARIES,
    NUMPY,
    ONEDNN,
    OURS,
    SINGLE,
    TORCH,
    UNFUSED,
    UNMASKED,
)
from benchmarks.report import NONE, time
from benchmarks.results import Measured, Run


def fused(run: Run) -> str:
    """Against the best peer, and against the steps one by one."""
    rows = []
    for work in FUSED:
        members = cells(run, [work])
        pairs = [
            average(of_layout(members, layout), figure)
            for figure in (against_best, against(UNFUSED))
            for layout in LAYOUTS[:2]
        ]
        rows.append((work, *pairs))
    names = [f"{what}, {layout}" for what in ("fastest peer", "unfused") for layout in LAYOUTS[:2]]
    return table(("work", *names), rows)


def halves(run: Run) -> str:
    """The part of float32's time, and against PyTorch."""
    rows = []
    for dtype in HALVES:
        groups = [cells(run, [work], dtype=dtype) for work in WORKS[:3]]
        parts = (average(group, lambda m: m.ratio(OURS, SINGLE)) for group in groups)
        rows.append((dtype, *parts, *(average(group, against(TORCH)) for group in groups)))
    names = [f"{what}, {work}" for what in ("time", "PyTorch") for work in WORKS[:3]]
    return table(("type", *names), rows)


def masked(run: Run) -> str:
    """The time over that of the same work where everything counts."""
    rows = []
    for work in MASKED:
        members = cells(run, [work])
        by_layout = (of_layout(members, layout) for layout in LAYOUTS)
        rows.append((work, *(average(m, lambda m: m.ratio(OURS, UNMASKED)) for m in by_layout)))
    return table(("work", *LAYOUTS), rows)


def grouped(run: Run) -> str:
    """Against PyTorch."""
    kinds = {
        "group": "group norm",
        "instance": "instance norm",
        "layer": "layer norm",
        "ghost": "virtual batches",
    }
    rows = []
    for kind, name in kinds.items():
        by_work = (cells(run, [f"{kind}-{work}"]) for work in ("forward", "backward"))
        found = [average(of_layout(m, f), against(TORCH)) for m in by_work for f in LAYOUTS]
        everything = cells(run, [f"{kind}-{work}" for work in ("forward", "backward")])
        rows.append((name, *found, *score(figures(everything, against(TORCH)))))
    names = [f"{work}, {layout}" for work in ("forward", "backward") for layout in LAYOUTS]
    return table(("", *names, "ahead", "level", "behind"), rows)


def awkward(run: Run) -> str:
    """Against NumPy, by kind of shape."""
    rows = []
    for what, shapes in AWKWARD.items():
        members = [m for m in run.compared if m.cell.shape in shapes]
        values = figures(members, against(NUMPY))
        ends = (ratio(min(values)), ratio(max(values))) if values else (NONE, NONE)
        rows.append((what, average(members, against(NUMPY)), *ends, *score(values)))
    return table(("shapes", "average", "least", "most", "ahead", "level", "behind"), rows)


def steps(run: Run) -> str:
    """What a training step is, and how it does on average."""
    values = [average(of_outputs(run, [work]), against_best) for work in STEPS]
    if not of_outputs(run, STEPS):
        return ""
    return wrapped(
        "**A training step** is a forward and then its backward (*step*); *fused-step* adds a "
        "residual and applies relu, and its backward gives the residual's gradient too. On average "
        f"fastbn is {values[0]} and {values[1]} times as fast as the fastest peer. torch.compile's "
        "outputs are always fresh, of memory that it keeps; so are PyTorch's but the y of a step. "
        "Ratios to each peer:"
    )


def of_outputs(run: Run, works: Sequence[str]) -> list[Measured]:
    """Cells of ready and of fresh outputs."""
    return [m for output in ("ready", "fresh") for m in cells(run, works, output=output)]


def step_ratios(run: Run) -> str:
    """By work, output and layout."""
    peers, rows = (NUMPY, TORCH, COMPILED, ONEDNN), []
    for work in STEPS:
        for output in ("ready", "fresh"):
            for layout in LAYOUTS:
                group = of_layout(cells(run, [work], output=output), layout)
                found = [average(group, figure) for figure in (*map(against, peers), against_best)]
                if group:
                    rows.append(
                        (work, output, layout, *found, *score(figures(group, against_best)))
                    )
    headings = ("work", "output", "layout", *peers, "fastest peer", "ahead", "level", "behind")
    return table(headings, rows, 3) if rows else ""


def reordered(run: Run) -> str:
    """What a reordered output is."""
    if not cells(run, output="reordered"):
        return ""
    return wrapped(
        "**An output in another order of memory** than x (`out=`): NCHW planes of x channels last, "
        "and the reverse. Ratios to NumPy's copy of x and fastbn's call in place (*by a copy*), to "
        "NumPy's copy alone, and to the peers:"
    )


def reordered_ratios(run: Run) -> str:
    """By work and x's layout."""
    others, rows = (BY_COPY, COPYTO, NUMPY, TORCH), []
    for work in WORKS[:3]:
        for layout in LAYOUTS[:2]:
            group = of_layout(cells(run, [work], output="reordered"), layout)
            if group:
                found = (average(group, against(name)) for name in others)
                rows.append((work, layout, *found, *score(figures(group, against(BY_COPY)))))
    headings = ("work", "x in", "by a copy", "copy alone", *others[2:])
    scores = ("ahead of by a copy", "level", "behind")
    return table((*headings, *scores), rows, 2) if rows else ""


# --- families of works, cell by cell ------------------------------------------------------------


def rows(run: Run) -> str:
    """What the works of rows are."""
    return introduction(
        run,
        "rows",
        '**Rows along the last axis**: layer norm (`layer_norm` with `axes="last"`) and RMS norm '
        "(`rms_norm`), each row by its own statistics; 32x768x128 in NHWC are 32 texts of 128 "
        "tokens. *skip*: of x + skip, with that sum as a result, and backward with its other "
        "gradient. PyTorch has an operator for all but the backward of RMS norm, which autograd "
        "does; where its dgamma is wrong, as 2.13's of layer norm in bfloat16, it has no time. "
        "fastbn's times, and ratios to each peer:",
    )


def row_times(run: Run) -> str:
    return cell_by_cell(run, "rows")


def curves(run: Run) -> str:
    """What the works of curves are."""
    return introduction(
        run,
        "curves",
        "**Activations of inference**: `normalize` with silu or hard_swish in the same pass; "
        "PyTorch normalizes and then activates in place. fastbn's times, and ratios to each peer:",
    )


def curve_times(run: Run) -> str:
    return cell_by_cell(run, "curves")


def images(run: Run) -> str:
    """What the work of images is."""
    return introduction(
        run,
        "images",
        "**Images** (`Standardizer`): bytes, channels last, to normalized float32 by planes, in "
        "one pass. fastbn's times, and ratios to each peer:",
    )


def image_times(run: Run) -> str:
    return cell_by_cell(run, "images")


def tables(run: Run) -> str:
    """What the works of tables are."""
    return introduction(
        run,
        "tables",
        "**Tables**: the columns of (rows, columns) standardized by their own statistics, by "
        "`fastbn.sklearn.StandardScaler` as by scikit-learn's. fastbn's times, and ratios to each "
        "peer:",
    )


def table_times(run: Run) -> str:
    return cell_by_cell(run, "tables")


def of_family(run: Run, family: str) -> list[Measured]:
    return [m for m in ordinary(run) if m.cell.family == family]


def introduction(run: Run, family: str, text: str) -> str:
    return wrapped(text) if of_family(run, family) else ""


def cell_by_cell(run: Run, family: str) -> str:
    """The time of each cell, and the ratios to the peers that any of them has."""
    members, lines = of_family(run, family), []
    names = [name for name in run.libraries(members) if LIBRARIES[name].kind == "peer"]
    for m in members:
        how = f"{m.cell.layout}, {m.cell.dtype}, {m.cell.output}"
        found = (average([m], against(name)) for name in names)
        lines.append((m.cell.work, m.cell.size_name, how, time(m.ours), *found))
    return table(("work", "shape", "how", "fastbn", *names), lines, 3) if lines else ""
