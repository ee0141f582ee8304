"""C sources of this folder as shared libraries, compiled when first used and kept in a cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

from benchmarks.machine import processor

FOLDER = Path(__file__).parent


def load(source: str, *flags: str) -> ctypes.CDLL:
    """The library that a source file of this folder makes; ImportError where it cannot be made."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    command = [*compiler, "-O3", "-march=native", "-fPIC", "-shared", str(FOLDER / source), *flags]
    facts = (*command, processor(), (FOLDER / source).read_text())
    name = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:24]
    target = cache() / f"{Path(source).stem}-{name}.so"
    if not target.exists():
        # Made aside and moved: another process may want it at the same time.
        with tempfile.TemporaryDirectory(dir=cache()) as aside:
            made = Path(aside) / target.name
            compile_(command, made)
            made.replace(target)
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise ImportError(f"{source} was compiled but cannot be loaded: {error}") from error


def compile_(command: list[str], output: Path) -> None:
    try:
        subprocess.run([*command, "-o", str(output)], check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ImportError(f"no C compiler: {error}") from error
    except subprocess.CalledProcessError as error:
        first = error.stderr.strip().splitlines()[:1]
        raise ImportError(f"the C compiler said: {' '.join(first)}") from error


def cache() -> Path:
    """Where compiled libraries stay between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "fastbn-benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
