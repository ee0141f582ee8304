"""The arguments of the public functions: what is accepted, and every message about what is not.

Most functions look at one argument and return it in the form that the backends take, or raise;
some only refuse. Nothing has been written by then. What they return is all that callers go on with:
arrays are numpy.ndarray itself, and options the words of our tables, whatever subclass came. A
message names the argument, what came, what was expected and what to do.
"""

from fastbn.checks import (
    arrays,
    dask,
    distributed,
    folding,
    layers,
    memory,
    options,
    standardizer,
    states,
    statistics,
    vectors,
)

__all__ = [
    "arrays",
    "dask",
    "distributed",
    "folding",
    "layers",
    "memory",
    "options",
    "standardizer",
    "states",
    "statistics",
    "vectors",
]
