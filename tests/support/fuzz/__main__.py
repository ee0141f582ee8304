"""``PYTHONPATH=tests python -m support.fuzz``: the command line."""

import sys

from support.fuzz.runner import main

sys.exit(main())
