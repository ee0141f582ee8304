"""Counts and latencies of requests, on a page in Prometheus' text format."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Collection, Mapping
from time import perf_counter

import numpy as np
from starlette.types import ASGIApp, Message, Receive, Scope, Send

KEPT = 1000  # latencies a path, from which the percentiles are
QUANTILES = (0.5, 0.9, 0.99)
OTHER = "other"  # stands for unknown paths, of which there is no end


class Metrics:
    """What has happened so far. Only the event loop's thread may use it."""

    def __init__(self, paths: Collection[str], facts: Mapping[str, object]) -> None:
        self.paths, self.facts = paths, facts
        self.requests: Counter[tuple[str, int]] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.latest: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))

    def count(self, path: str, status: int, seconds: float) -> None:
        """Remember a request."""
        path = path if path in self.paths else OTHER
        self.requests[path, status] += 1
        self.seconds[path] += seconds
        self.latest[path].append(seconds)

    def page(self) -> str:
        """Everything, a line each."""
        facts = ",".join(f'{name}="{value}"' for name, value in self.facts.items())
        lines = [
            "# HELP serve_info What serves.",
            "# TYPE serve_info gauge",
            f"serve_info{{{facts}}} 1",
            "# HELP serve_requests_total Requests, by path and status of the answer.",
            "# TYPE serve_requests_total counter",
        ]
        for (path, status), n in sorted(self.requests.items()):
            lines.append(f'serve_requests_total{{path="{path}",status="{status}"}} {n}')
        lines += [
            f"# HELP serve_latency_seconds Until the answer is sent; of a path's last {KEPT}.",
            "# TYPE serve_latency_seconds summary",
        ]
        for path, latest in sorted(self.latest.items()):
            for q, value in zip(QUANTILES, np.quantile(latest, QUANTILES), strict=True):
                lines.append(f'serve_latency_seconds{{path="{path}",quantile="{q}"}} {value:.6f}')
            total = sum(n for (p, _), n in self.requests.items() if p == path)
            lines.append(f'serve_latency_seconds_sum{{path="{path}"}} {self.seconds[path]:.6f}')
            lines.append(f'serve_latency_seconds_count{{path="{path}"}} {total}')
        return "\n".join(lines) + "\n"


class Measured:
    """Middleware that counts every request, once it is answered."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = perf_counter(), 500  # unless an answer says otherwise

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            self.metrics.count(scope["path"], status, perf_counter() - start)
