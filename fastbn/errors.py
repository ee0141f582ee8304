"""The one exception of the library that NumPy does not have."""

from __future__ import annotations


class BackendError(RuntimeError):
    """A backend or instruction set was asked for that cannot run here."""
