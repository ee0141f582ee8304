"""The arguments of the public functions: what is accepted, and every message about what is not.

Each function looks at one argument and returns it in the form that the backends take, or raises
before anything has been written. What it returns is all that callers go on with: arrays are
numpy.ndarray itself, and options the words of our tables, whatever subclass came. A message names
the argument, what came, what was expected and what to do.
"""

from fastbn.checks import arrays, folding, layers, memory, options, states, statistics, vectors

__all__ = ["arrays", "folding", "layers", "memory", "options", "states", "statistics", "vectors"]
