"""``python -m benchmarks [accuracy | budget | page]``, where what they need is there."""

import sys
from importlib import import_module
from importlib.util import find_spec

missing = ", ".join(name for name in ("matplotlib", "rich") if find_spec(name) is None)
if missing:
    sys.exit(f'the benchmark needs {missing}; run: python -m pip install -e ".[bench]"')
command = sys.argv[1] if sys.argv[1:2] in (["accuracy"], ["budget"], ["page"]) else "cli"
import_module(f"benchmarks.{command}").main()
