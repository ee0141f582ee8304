"""``python -m fastbn``: what a bug report needs, and the demonstration."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import fastbn


def main() -> None:
    """Run the command that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m fastbn", description=fastbn.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print what runs and why, for a bug report")
    demo = commands.add_parser("demo", help="train on handwritten digits, time every backend")
    demo.add_argument("--quick", action="store_true", help="fewer steps, a smaller array")
    demo.add_argument(
        "--output",
        type=writable,
        default="fastbn-demo.png",
        metavar="PATH",
        help="where the plot goes, as PNG (default: %(default)s)",
    )
    arguments = parser.parse_args()
    if arguments.command == "info":
        fastbn.show_config()
    else:
        from fastbn.demo import run

        run(arguments.output, quick=arguments.quick)


def writable(text: str) -> Path:
    """A path that a file can be written to: better asked before the work than after."""
    path = Path(text)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write a file at {text!r}")
    return path


if __name__ == "__main__":
    main()
