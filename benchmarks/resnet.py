"""Time a training forward and backward of fastbn, beside PyTorch where that is installed.

    python -m benchmarks.resnet [--rounds 15]

float32, ready outputs, all threads, on two arrays of a ResNet with batches of 32 (103 MB each). The
libraries take turns, round after round; medians are shown, and PyTorch's time over fastbn's.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fastbn

SHAPES = ((32, 64, 112, 112), (32, 256, 56, 56))
Calls = dict[str, Callable[[], object]]


def fastbn_calls(x: Any, dy: Any, layout: str) -> Calls:
    """The forward and backward of fastbn, into one ready array."""
    channels = x.shape[1 if layout == "NCHW" else -1]
    gamma, beta = np.ones(channels, np.float32), np.zeros(channels, np.float32)
    out = np.empty_like(x)
    _, mean, var = fastbn.batch_norm(x, gamma, beta, layout=layout, out=out)
    return {
        "forward": lambda: fastbn.batch_norm(x, gamma, beta, layout=layout, out=out),
        "backward": lambda: fastbn.batch_norm_backward(
            dy, x, mean, var, gamma, layout=layout, out=out
        ),
    }


def torch_calls(torch: Any, x: Any, dy: Any, layout: str) -> Calls:
    """PyTorch's own operators on the same memory; its backward always makes a fresh array."""
    torch.set_num_threads(fastbn.get_num_threads())
    x, dy = torch.from_numpy(x), torch.from_numpy(dy)
    out = torch.empty_like(x)
    if layout == "NHWC":
        x, dy, out = (a.permute(0, 3, 1, 2) for a in (x, dy, out))
    gamma, beta = torch.ones(x.shape[1]), torch.zeros(x.shape[1])
    mean, rstd = torch.empty(x.shape[1]), torch.empty(x.shape[1])
    ops = torch.ops.aten

    def forward() -> object:
        return ops.native_batch_norm.out(
            x, gamma, beta, None, None, True, 0.1, 1e-5, out=out, save_mean=mean, save_invstd=rstd
        )

    def backward() -> object:
        return ops.native_batch_norm_backward(
            dy, x, gamma, None, None, mean, rstd, True, 1e-5, [True, True, True]
        )

    forward()
    return {"forward": forward, "backward": backward}


def medians(calls: Calls, rounds: int, title: str) -> dict[str, float]:
    """Median seconds of each call, all taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in track(range(rounds), title, transient=True):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def measure(shape: tuple[int, ...], layout: str, torch: Any, rounds: int) -> dict[str, float]:
    """Median seconds by "library verb" on one array."""
    n, c, h, w = shape
    size = shape if layout == "NCHW" else (n, h, w, c)
    rng = np.random.default_rng(0)
    x, dy = (rng.random(size, np.float32) for _ in range(2))
    libraries = {"fastbn": fastbn_calls(x, dy, layout)}
    if torch is not None:
        libraries["torch"] = torch_calls(torch, x, dy, layout)
    calls = {
        f"{library} {verb}": call
        for library, verbs in libraries.items()
        for verb, call in verbs.items()
    }
    return medians(calls, rounds, f"{shape} {layout}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        torch = None
    facts = fastbn.get_config()
    table = Table(title=f"{facts['backend']} ({facts['isa']}), {facts['threads']} threads, ms")
    for column in ("x", "layout", "pass", "fastbn", "PyTorch", "ratio"):
        table.add_column(column, justify="right")
    for shape in SHAPES:
        for layout in ("NCHW", "NHWC"):
            seconds = measure(shape, layout, torch, rounds)
            for verb in ("forward", "backward"):
                ours, theirs = seconds[f"fastbn {verb}"], seconds.get(f"torch {verb}")
                peer = (
                    ("-", "-")
                    if theirs is None
                    else (f"{theirs * 1e3:.1f}", f"{theirs / ours:.2f}")
                )
                table.add_row(str(shape), layout, verb, f"{ours * 1e3:.1f}", *peer)
    Console().print(table)


if __name__ == "__main__":
    main()
