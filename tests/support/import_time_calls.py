"""A module that calls fastbn when imported, and again when asked, in whatever process."""

from __future__ import annotations

import os

from support import concurrency

IMPORTER = os.getpid()
EXPECTED = concurrency.digest(concurrency.LARGE)


def report() -> dict[str, int]:
    """Who calls, who imported this, threads started for the call, whether the bits are the same."""
    started = concurrency.started()
    same = concurrency.digest(concurrency.LARGE) == EXPECTED
    return {"process": os.getpid(), "importer": IMPORTER, "started": started, "same": same}
