"""Serve the network over HTTP.

    python examples/serve/service.py

It trains the network first where there is none yet. FASTBN_BACKEND chooses fastbn's backend.
"""

from __future__ import annotations

import argparse
import io
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from zipfile import BadZipFile

import bodies
import msgspec
import numpy as np
import train
import uvicorn
from metrics import Measured, Metrics
from network import NORMALIZATIONS, SIDE, Array, Served, load
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from threadpoolctl import threadpool_limits

import fastbn

CONNECTIONS = 200  # at once; more are answered with 503
METHODS = {"/predict": "POST", "/predict.npy": "POST", "/health": "GET", "/metrics": "GET"}


def make_app(served: Served, normalization: str = "fastbn") -> Starlette:
    """The service, as an ASGI application."""
    for images in (1, bodies.MAX_IMAGES):  # numba compiles at the first call
        served(np.zeros((images, SIDE, SIDE)))
    facts = what_runs() | {"normalization": normalization}
    metrics = Metrics(METHODS, facts)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"} | facts)

    async def page(request: Request) -> Response:
        return PlainTextResponse(metrics.page(), media_type="text/plain; version=0.0.4")

    endpoints = {
        "/predict": predictor(lambda body: json_answer(served(bodies.from_json(body)))),
        "/predict.npy": predictor(lambda body: npy_answer(served(bodies.from_npy(body)))),
        "/health": health,
        "/metrics": page,
    }
    app = Starlette(
        routes=[Route(path, endpoints[path], methods=[m]) for path, m in METHODS.items()],
        middleware=[Middleware(Measured, metrics)],
        exception_handlers={HTTPException: refuse, ClientDisconnect: gone, Exception: fail},
    )
    app.router.redirect_slashes = False
    return app


def what_runs() -> dict[str, str]:
    """What fastbn computes by; only Cython's kernels are there for several instruction sets."""
    config = fastbn.get_config()
    isa = config["isa"] if config["backend"] == "cython" else "none"
    return {"backend": config["backend"], "isa": isa, "threads": str(config["threads"])}


def predictor(answer: Callable[[bytes], Response]) -> Callable[[Request], object]:
    """An endpoint that answers a body, in a thread of the pool."""

    async def predict(request: Request) -> Response:
        return await run_in_threadpool(answer, await bodies.read(request))

    return predict


def json_answer(probabilities: Array) -> Response:
    """The digits and their probabilities as JSON."""
    answer = {
        "digits": probabilities.argmax(axis=1).tolist(),
        "probabilities": probabilities.tolist(),
    }
    return Response(msgspec.json.encode(answer), media_type="application/json")


def npy_answer(probabilities: Array) -> Response:
    """The probabilities as an .npy file."""
    file = io.BytesIO()
    np.save(file, probabilities, allow_pickle=False)
    return Response(file.getvalue(), media_type="application/octet-stream")


async def refuse(request: Request, error: Exception) -> Response:
    """A 4xx, with a message."""
    assert isinstance(error, HTTPException)
    path, status = request.url.path, error.status_code
    message = error.detail
    if status == 404:
        known = ", ".join(f"{method} {known}" for known, method in METHODS.items())
        message = f"{path!r} is no path of this service; it has {known}"
    elif status == 405:
        message = f"{request.method} came for {path}, expected {METHODS[path]}; use that"
    return JSONResponse({"error": message}, status, error.headers)


async def gone(request: Request, error: Exception) -> Response:
    """Nobody is there to read it, but it is counted."""
    return JSONResponse({"error": "the connection was closed before the body was here"}, 400)


async def fail(request: Request, error: Exception) -> Response:
    """A bug; the log has the traceback."""
    return JSONResponse({"error": "the service failed on this request; its log says how"}, 500)


def listen(config: uvicorn.Config) -> socket.socket:
    """The socket to serve on, bound: its port is known before anything is served."""
    listening = config.bind_socket()
    # asyncio does this for sockets that it makes; elsewhere an answer's second packet waits 40 ms.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Serve the network over HTTP.")
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--model", type=Path, default=train.MODEL, help="default: %(default)s")
    parser.add_argument(
        "--normalization",
        choices=NORMALIZATIONS,
        default="fastbn",
        help="numpy: by NumPy expressions, to compare with",
    )
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse()
    model = train.ready(arguments.model)
    # Requests run side by side already: threads within one would only wait for each other.
    if "FASTBN_NUM_THREADS" not in os.environ:
        fastbn.set_num_threads(1)
    with threadpool_limits(1, "blas"):
        try:
            app = make_app(load(model, arguments.normalization), arguments.normalization)
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            sys.exit(f"{model} is no model of this network ({error}); delete it")
        config = uvicorn.Config(
            app,
            arguments.host,
            arguments.port,
            access_log=False,
            log_level="warning",
            limit_concurrency=CONNECTIONS,
        )
        listening = listen(config)
        host, port = listening.getsockname()[:2]
        print(f"http://{host}:{port}", flush=True)
        uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main()
