"""``python -m benchmarks``: the command line, where what it needs is installed."""

import sys
from importlib import import_module
from importlib.util import find_spec

missing = ", ".join(name for name in ("matplotlib", "rich") if find_spec(name) is None)
if missing:
    sys.exit(f'the benchmark needs {missing}; run: python -m pip install -e ".[bench]"')
import_module("benchmarks.cli").main()
