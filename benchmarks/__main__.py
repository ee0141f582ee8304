"""``python -m benchmarks [accuracy]``: the command lines, where what they need is installed."""

import sys
from importlib import import_module
from importlib.util import find_spec

missing = ", ".join(name for name in ("matplotlib", "rich") if find_spec(name) is None)
if missing:
    sys.exit(f'the benchmark needs {missing}; run: python -m pip install -e ".[bench]"')
command = "accuracy" if sys.argv[1:2] == ["accuracy"] else "cli"
import_module(f"benchmarks.{command}").main()
