"""A module that calls fastbn when imported, and again when asked, in whatever process."""

from __future__ import annotations

import os

import company

IMPORTER = os.getpid()
EXPECTED = company.digest(company.LARGE)


def report() -> dict[str, int]:
    """Who calls, who imported this, threads started for the call, whether the bits are the same."""
    started = company.started()
    same = company.digest(company.LARGE) == EXPECTED
    return {"process": os.getpid(), "importer": IMPORTER, "started": started, "same": same}
