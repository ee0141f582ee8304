"""A WSGI application: each answer is the report of the worker that gives it."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterable
from typing import Any

from support import import_time_calls
from support.processes import TIMEOUT

_workers = multiprocessing.get_context("fork").Barrier(int(os.environ["WEB_CONCURRENCY"]))


def application(environment: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
    """The report, given once every worker has one."""
    report = import_time_calls.report()
    _workers.wait(TIMEOUT)
    start("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(report).encode()]
