"""The demonstration: what batch norm does for training, and what fastbn does for batch norm.

It trains the network of `fastbn.demo.network` on scikit-learn's handwritten digits with and without
batch norm, times every backend against plain NumPy, and draws both. Run it with
``python -m fastbn demo``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import fastbn
from fastbn import backends
from fastbn.demo.network import Array, BatchNorm, perceptron

if TYPE_CHECKING:  # the `demo` extra: each is imported where it is used
    from matplotlib.axes import Axes
    from rich.progress import Progress
    from rich.table import Table

EXTRA = ("matplotlib", "rich", "sklearn", "threadpoolctl")

SEED = 0
SIZES = (64, 100, 100, 100, 10)  # pixels, three hidden layers, classes
HELD_OUT = 360  # of the 1797 digits; drawn by the seed, as everything is
BATCH = 60
RATE = 0.2  # chosen, like the number of steps, on a part of the training digits
EVALUATE_EVERY = 20  # steps

EPS = 1e-5
NUMPY = "NumPy expressions"
DIRECTIONS = ("forward", "backward")

# From the palette of Okabe and Ito, which colour-blind readers can tell apart.
WITH_COLOUR, WITHOUT_COLOUR = "#0072B2", "#D55E00"
DIRECTION_COLOURS = {"forward": "#0072B2", "backward": "#56B4E9"}
TEXT_COLOURS = {"forward": "white", "backward": "black"}  # on the former
QUIET = "#555555"


class Scale(NamedTuple):
    """How long the demonstration trains, and on what it times the backends."""

    steps: int
    shape: tuple[int, int, int, int]  # NCHW
    rounds: int


FULL = Scale(4000, (32, 64, 56, 56), rounds=25)  # an activation of ResNet-50's first stage
QUICK = Scale(600, (8, 64, 56, 56), rounds=9)


class Digits(NamedTuple):
    """Images as rows of 64 pixels from 0 to 1, and their labels, in two parts."""

    train_x: Array
    train_labels: Array
    test_x: Array
    test_labels: Array


class Curve(NamedTuple):
    """Share of the held-out digits that a network gets right, after so many steps."""

    steps: list[int]
    accuracy: list[float]


Curves = dict[str, Curve]
Times = dict[str, dict[str, float]]  # contender, direction: milliseconds


def run(output: Path, *, quick: bool = False) -> None:
    """Train, serve, time, and write the plot.

    Parameters
    ----------
    output : Path
        Where the plot goes, as PNG.
    quick : bool
        Train for fewer steps and time a smaller array.

    Raises
    ------
    SystemExit
        A package of the `demo` extra is missing.
    """
    missing = ", ".join(name for name in EXTRA if find_spec(name) is None)
    if missing:
        sys.exit(f'the demo needs {missing}; run: python -m pip install "fastbn[demo]"')
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    scale = QUICK if quick else FULL
    console = Console()
    console.print(f"fastbn {fastbn.get_config()['version']}: training runs on {what_runs()}")
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress("{task.description:18}", *columns, console=console) as progress:
        curves = train_both(load_digits(), scale.steps, progress)
        times = time_backends(scale, progress)
    console.print(accuracy_table(curves), time_table(times, scale.shape))
    draw(curves, times, scale.shape, output)
    console.print(f"Plot: {output}", soft_wrap=True)


def what_runs() -> str:
    """The backend in force in words, with its instruction set and number of threads."""
    return f"{backend_label(fastbn.get_backend())}, threads: {fastbn.get_num_threads()}"


def backend_label(name: str) -> str:
    """A backend's name, with the instruction set where it is one that was compiled for several."""
    return f"{name} ({backends.native_facts().isa})" if name == "cython" else name


def load_digits() -> Digits:
    """scikit-learn's digits, in a random order, the first of them held out."""
    from sklearn import datasets

    x, labels = datasets.load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    order = np.random.default_rng(SEED).permutation(len(x))
    test, train = order[:HELD_OUT], order[HELD_OUT:]
    return Digits(x[train], labels[train], x[test], labels[test])


def train_both(digits: Digits, steps: int, progress: Progress) -> Curves:
    """Train with and without batch norm, side by side: same weights to begin with, same batches."""
    from threadpoolctl import threadpool_limits

    networks = {
        "with batch norm": perceptron(SIZES, norm=BatchNorm, seed=SEED),
        "without batch norm": perceptron(SIZES, norm=None, seed=SEED),
    }
    curves = {name: Curve([], []) for name in networks}
    bars = {name: progress.add_task(name, total=steps, note="") for name in networks}
    rng = np.random.default_rng(SEED)
    # Matrices this small gain nothing from BLAS's threads, which spin while they wait.
    with threadpool_limits(1, "blas"):
        for step in range(1, steps + 1):
            batch = rng.choice(len(digits.train_x), BATCH, replace=False)
            for network in networks.values():
                network.train(digits.train_x[batch], digits.train_labels[batch], RATE)
            if step % EVALUATE_EVERY:
                continue
            for name, network in networks.items():
                accuracy = network.accuracy(digits.test_x, digits.test_labels)
                curves[name].steps.append(step)
                curves[name].accuracy.append(accuracy)
                progress.update(bars[name], completed=step, note=f"{accuracy:.1%} held-out")
    return curves


def numpy_forward(x: Array, gamma: Array, beta: Array) -> Array:
    """Batch norm as one writes it in NumPy; gamma and beta have the shape (C, 1, 1)."""
    mean = x.mean(axis=(0, 2, 3), keepdims=True)
    var = x.var(axis=(0, 2, 3), keepdims=True)
    y: Array = gamma * (x - mean) / np.sqrt(var + EPS) + beta
    return y


def numpy_backward(
    dy: Array, x: Array, mean: Array, var: Array, gamma: Array
) -> tuple[Array, Array, Array]:
    """Its gradient, in the same way; every vector has the shape (C, 1, 1)."""
    axes, n = (0, 2, 3), x.size // x.shape[1]
    rstd = 1 / np.sqrt(var + EPS)
    xhat = (x - mean) * rstd
    dgamma = (dy * xhat).sum(axis=axes, keepdims=True)
    dbeta = dy.sum(axis=axes, keepdims=True)
    dx = gamma * rstd * (dy - dbeta / n - xhat * (dgamma / n))
    return dx, dgamma, dbeta


def time_backends(scale: Scale, progress: Progress) -> Times:
    """Median time of every contender, in rounds so that a disturbance falls on all alike."""
    contenders = prepare(scale.shape)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in contenders}
    total = (1 + scale.rounds) * len(contenders)
    bar = progress.add_task("timing", total=total, note="warming up")
    for call in contenders.values():
        call()  # numba compiles in its first call
        progress.advance(bar)
    for _ in range(scale.rounds):
        for key, call in contenders.items():
            start = perf_counter()
            call()
            seconds[key].append(perf_counter() - start)
            progress.update(bar, advance=1, note=key[0])
    progress.update(bar, note="")
    times: Times = {}
    for (name, direction), values in seconds.items():
        times.setdefault(name, {})[direction] = 1e3 * median(values)
    return times


def prepare(shape: tuple[int, int, int, int]) -> dict[tuple[str, str], Callable[[], object]]:
    """What is timed: NumPy's expressions and each backend, forward and backward."""
    rng = np.random.default_rng(SEED)
    x, dy = rng.standard_normal((2, *shape), np.float32)
    gamma, beta = rng.standard_normal((2, shape[1]), np.float32)
    y, mean, var = fastbn.batch_norm(x, gamma, beta)
    dx = np.empty_like(dy)

    def on(backend: str, verb: Callable[..., object], *operands: Array, out: Array) -> None:
        with fastbn.use_backend(backend):
            verb(*operands, eps=EPS, out=out)

    columns = [v.astype(np.float32)[:, None, None] for v in (mean, var, gamma)]
    calls: dict[tuple[str, str], Callable[[], object]] = {
        (NUMPY, "forward"): partial(numpy_forward, x, columns[2], beta[:, None, None]),
        (NUMPY, "backward"): partial(numpy_backward, dy, x, *columns),
    }
    for name in reversed(fastbn.get_config()["backends"]):
        label = f"fastbn, {backend_label(name)}"
        calls[label, "forward"] = partial(on, name, fastbn.batch_norm, x, gamma, beta, out=y)
        calls[label, "backward"] = partial(
            on, name, fastbn.batch_norm_backward, dy, x, mean, var, gamma, out=dx
        )
    return calls


def accuracy_table(curves: Curves) -> Table:
    """What each network reached, and how soon."""
    table = table_of(
        f"{HELD_OUT} held-out digits, served with fastbn.normalize",
        ("accuracy", "steps to 90 %", "steps to 95 %"),
    )
    for name, curve in curves.items():
        reached = [first_step(curve, goal) for goal in (0.90, 0.95)]
        table.add_row(name, f"{curve.accuracy[-1]:.1%}", *reached)
    return table


def first_step(curve: Curve, goal: float) -> str:
    """The first evaluated step at which the curve is at its goal, or a dash."""
    steps = (step for step, share in zip(*curve, strict=True) if share >= goal)
    return str(next(steps, "-"))


def time_table(times: Times, shape: tuple[int, ...]) -> Table:
    """Milliseconds, and the speed against NumPy's expressions."""
    table = table_of(
        f"batch norm of {shape}, float32, median time",
        [heading for direction in DIRECTIONS for heading in (f"{direction}, ms", "speed")],
    )
    for name, own in times.items():
        cells = [(f"{own[d]:.2f}", f"{times[NUMPY][d] / own[d]:.1f}x") for d in DIRECTIONS]
        table.add_row(name, *(text for pair in cells for text in pair))
    table.caption = "fastbn writes into ready arrays; NumPy's expressions allocate theirs"
    return table


def table_of(title: str, headings: Sequence[str]) -> Table:
    """A table with a column for names, and one of numbers for each heading."""
    from rich import box
    from rich.table import Table

    table = Table("", title=title, box=box.SIMPLE)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def draw(curves: Curves, times: Times, shape: tuple[int, ...], output: Path) -> None:
    """Write the plot: accuracy on the left, time on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.05))
    draw_accuracy(left, curves)
    draw_times(right, times, shape)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=QUIET)
    figure.savefig(output, format="png", dpi=160)


def draw_accuracy(axes: Axes, curves: Curves) -> None:
    """Held-out accuracy against steps."""
    colours = (WITH_COLOUR, WITHOUT_COLOUR)
    for (name, (steps, accuracy)), colour in zip(curves.items(), colours, strict=True):
        percent = 100 * np.array(accuracy)
        axes.plot(steps, percent, color=colour, linewidth=2, label=f"{name}: {percent[-1]:.1f} %")
    axes.set_title("Handwritten digits, three layers of 100 sigmoids", loc="left", size=11)
    axes.set_xlabel(f"training steps of {BATCH} digits")
    axes.set_ylabel("held-out accuracy, %")
    axes.set(xlim=(0, None), ylim=(0, 102))
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.legend(
        loc="center right",
        bbox_to_anchor=(1.0, 0.3),  # right of the slow curve's rise, above a short one
        handlelength=1.2,
        labelcolor="linecolor",
        prop={"weight": "bold"},
        frameon=False,
    )


def draw_times(axes: Axes, times: Times, shape: tuple[int, ...]) -> None:
    """A pair of bars for each contender, with its time and its speed against NumPy."""
    thickness = 0.36
    for offset, direction in zip((-thickness / 2, thickness / 2), DIRECTIONS, strict=True):
        own = [by_direction[direction] for by_direction in times.values()]
        where = np.arange(len(own)) + offset
        colour = DIRECTION_COLOURS[direction]
        bars = axes.barh(where, own, thickness, color=colour)
        texts = [f"{ms:.1f} ms ({own[0] / ms:.1f}x)" for ms in own]
        axes.bar_label(bars, [f"{own[0]:.1f} ms", *texts[1:]], padding=4, size=9)
        axes.text(0, where[0], f"  {direction}", color=TEXT_COLOURS[direction], va="center")
    axes.set_yticks(range(len(times)), [name.replace(", ", ",\n") for name in times])
    axes.invert_yaxis()
    axes.set_title(f"Batch norm of {shape}, float32", loc="left", size=11)
    axes.set_xlabel("median time, ms (speed against NumPy expressions)")
    axes.margins(x=0.25)
