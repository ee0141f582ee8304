"""Load the service, and print requests per second and latencies.

    python examples/serve/load.py

Each contender is served by a process of its own; they take turns, round after round.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from threading import Timer
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import train
from network import BRIGHTEST, SIDE
from rich.console import Console
from rich.progress import track

import fastbn
from fastbn.demo import table_of

START_SECONDS = 60.0  # numba may have to compile
WARM_UP = 0.5  # seconds
PATH = "/predict.npy"
SERVICE = Path(__file__).with_name("service.py")


class Turn(NamedTuple):
    """What one round of load came to."""

    rate: float  # requests a second
    latencies: list[float]  # seconds


Turns = dict[tuple[str, int], list[Turn]]  # of a contender, with so many images a request


def contenders() -> dict[str, tuple[dict[str, str], str]]:
    """By name: environment and normalization."""
    backends = fastbn.get_config()["backends"]
    by_fastbn = {f"fastbn, {name}": ({"FASTBN_BACKEND": name}, "fastbn") for name in backends}
    return by_fastbn | {"NumPy expressions": ({"FASTBN_BACKEND": "numpy"}, "numpy")}


@contextmanager
def server(environment: dict[str, str], *arguments: str) -> Iterator[str]:
    """A service in a process of its own, on a free port; gives its address."""
    command = [sys.executable, str(SERVICE), "--port", "0", *arguments]
    with subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            watch = Timer(START_SECONDS, process.kill)
            watch.start()
            url = process.stdout.readline().strip()
            watch.cancel()
            if not url:
                sys.exit(f"{' '.join(command)} ended with {process.wait()}")
            wait_for(url)
            yield url
        finally:
            process.terminate()


def wait_for(url: str) -> None:
    """Return when the service answers."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        connection = HTTPConnection(urlsplit(url).netloc, timeout=START_SECONDS)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                sys.exit(f"{url} did not answer in {START_SECONDS:g} seconds; is it a service?")
            time.sleep(0.05)
        finally:
            connection.close()


def body_of(images: int) -> bytes:
    """A request's body: random images."""
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, BRIGHTEST + 1, (images, SIDE, SIDE))
    np.save(file, pixels.astype(np.float32))
    return file.getvalue()


def one_connection(url: str, body: bytes, seconds: float) -> list[float]:
    """Request after request on one connection; their latencies."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=START_SECONDS)
    latencies, end = [], time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        connection.request("POST", PATH, body)
        answer = connection.getresponse()
        told = answer.read()
        if answer.status != 200:
            sys.exit(f"{url}{PATH} answered {answer.status}: {told.decode()}")
        latencies.append(time.perf_counter() - start)
    connection.close()
    return latencies


def turn(url: str, body: bytes, connections: int, seconds: float) -> Turn:
    """Load a service by several connections at once."""
    start = time.perf_counter()
    with ThreadPoolExecutor(connections) as pool:
        each = pool.map(lambda _: one_connection(url, body, seconds), range(connections))
        latencies = [latency for own in each for latency in own]
    return Turn(len(latencies) / (time.perf_counter() - start), latencies)


def measure(urls: dict[str, str], arguments: argparse.Namespace, console: Console) -> Turns:
    """All rounds; in each, every contender with every number of images."""
    bodies = {images: body_of(images) for images in arguments.images}
    turns: Turns = {(name, images): [] for images in bodies for name in urls}
    for name, images in turns:
        turn(urls[name], bodies[images], arguments.connections, WARM_UP)
    for _ in track(range(arguments.rounds), "rounds", console=console):
        for (name, images), own in turns.items():
            own.append(turn(urls[name], bodies[images], arguments.connections, arguments.seconds))
    return turns


def report(turns: Turns, images: int, connections: int, console: Console) -> None:
    """The table of one number of images a request."""
    table = table_of(
        f"images a request: {images}; connections: {connections}",
        ("requests/s", "p50, ms", "p99, ms"),
    )
    for (name, own_images), own in turns.items():
        if own_images == images:
            latencies = [1e3 * latency for one in own for latency in one.latencies]
            p50, p99 = np.percentile(latencies, (50, 99))
            rate = np.median([one.rate for one in own])
            table.add_row(name, f"{rate:.0f}", f"{p50:.2f}", f"{p99:.2f}")
    console.print(table)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Load the service.")
    parser.add_argument("--url", help="a service that runs; default: one for each contender")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 64], help="a request")
    parser.add_argument("--connections", type=int, default=4, help="at once")
    parser.add_argument("--seconds", type=float, default=2.0, help="a turn")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args(arguments)


def main(given: list[str] | None = None) -> None:
    arguments, console = parse(given), Console()
    with ExitStack() as stack:
        if arguments.url:
            urls = {arguments.url: arguments.url}
        else:
            train.ready(train.MODEL)
            urls = {
                name: stack.enter_context(server(environment, "--normalization", normalization))
                for name, (environment, normalization) in contenders().items()
            }
        turns = measure(urls, arguments, console)
    for images in arguments.images:
        report(turns, images, arguments.connections, console)


if __name__ == "__main__":
    main()
