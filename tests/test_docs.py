"""Every example in the docstrings, the README and the documents runs and says what it shows."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest

import fastbn

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path
    for pattern in ("README.md", "docs/*.md", "CONTRIBUTING.md", "examples/*/README.md")
    for path in ROOT.glob(pattern)
)
BLOCK = re.compile(r"^```(python|pycon)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
DOCUMENTED = (
    "batch_norm",
    "normalize",
    "batch_norm_backward",
    "normalize_backward",
    "batch_norm_double_backward",
    "normalize_double_backward",
    "moments",
    "fold_into_conv",
    "fold_into_linear",
    "FrozenBatchNorm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "group_norm_backward",
    "instance_norm_backward",
    "layer_norm_backward",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "rms_norm",
    "rms_norm_backward",
    "RMSNorm",
)


def docstrings() -> list[doctest.DocTest]:
    """The docstrings with examples, of every module with a Python source."""
    finder, found = doctest.DocTestFinder(exclude_empty=True), []
    names = ["fastbn", *(m.name for m in pkgutil.walk_packages(fastbn.__path__, "fastbn."))]
    for name in names:
        if name.endswith("__main__") or name.startswith("fastbn._ext."):
            continue
        try:
            module = importlib.import_module(name)
        except ImportError:
            # A backend whose needs are not here; test_variants.py says which are.
            assert name.startswith(("fastbn.backends.numba", "fastbn.backends.native")), name
            continue
        found += [test for test in finder.find(module, name) if test.examples]
    return found


def check(test: doctest.DocTest) -> None:
    """Run the examples; the report of what failed is the message."""
    report: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(
        test, out=report.append
    )
    assert result.attempted > 0
    assert not result.failed, "".join(report)


@pytest.mark.parametrize("test", docstrings(), ids=lambda test: test.name)
def test_docstring(test: doctest.DocTest) -> None:
    """The examples of a docstring give what they show."""
    check(test)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_everything_is_documented(name: str) -> None:
    """Each docstring has its sections, an example, the formula and types."""
    documented = getattr(fastbn, name)
    given = "Attributes" if isinstance(documented, type) else "Returns"
    for section in ("Parameters", given, "Raises", "Examples", ">>> ", "``"):
        assert section in documented.__doc__


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_document(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document's blocks run from top to bottom in one namespace; pycon blocks are doctests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    text = path.read_text()
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == len(re.findall(r"^```py", text, re.MULTILINE)), "a block with no end"
    namespace: dict[str, Any] = {"__name__": "document"}
    for block in blocks:
        kind, source = block.groups()
        line = text[: block.start()].count("\n") + 1
        if kind == "pycon" or source.startswith(">>> "):
            parsed = doctest.DocTestParser().get_doctest(
                source, namespace, path.name, str(path), line
            )
            parsed.globs = namespace  # shared, not copied: later blocks see what this one made
            report: list[str] = []
            runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
            result = runner.run(parsed, out=report.append, clear_globs=False)
            assert not result.failed, "".join(report)
        else:
            exec(compile("\n" * line + source, str(path), "exec"), namespace)
