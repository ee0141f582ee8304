"""The caches as the operating system tells them, and thresholds where it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastbn.backends import tuning


def describe(root: Path, index: int, level: str, kind: str, size: str) -> None:
    """One cache, as Linux does."""
    folder = root / f"index{index}"
    folder.mkdir()
    for name, text in (("level", level), ("type", kind), ("size", size)):
        (folder / name).write_text(text + "\n")


def test_cache_bytes(tmp_path: Path) -> None:
    """The data or unified cache of a level; the default where it is unknown or unreadable."""
    describe(tmp_path, 0, "1", "Instruction", "32K")
    describe(tmp_path, 1, "1", "Data", "48K")
    describe(tmp_path, 2, "2", "Unified", "1024K")
    describe(tmp_path, 3, "3", "Unified", "huge")
    describe(tmp_path, 4, "5", "Unified", "0K")
    assert tuning.cache_bytes(1, 7, tmp_path) == 48 << 10
    assert tuning.cache_bytes(2, 7, tmp_path) == 1 << 20
    assert tuning.cache_bytes(3, 7, tmp_path) == 7
    assert tuning.cache_bytes(5, 7, tmp_path) == 7
    assert tuning.cache_bytes(4, 7, tmp_path / "absent") == 7


def test_thresholds_are_possible() -> None:
    """Whatever this machine tells: no threshold is 0, and a trip's block fits before it streams."""
    assert 0 < tuning.FUSED_BLOCK <= tuning.L2
    assert tuning.FUSED_BLOCK < tuning.STREAM_PLANES <= tuning.STREAM_MAPS <= 96 << 20
    assert tuning.LOOKAHEAD > 0
    assert tuning.SERIAL_BELOW > 0


@pytest.mark.parametrize("size", [1, 2, 7])
@pytest.mark.parametrize("channels", [1, 15, 16, 17, 100, 577, 640, 641, 700, 1000, 5001])
def test_parts_are_all_channels(channels: int, size: int) -> None:
    """In their order; each is whole vectors, or wider than what is folded, or all there is."""
    widest = tuning.MOST_FOLDED // 2 // size
    for most in (1, 16, 100, 512, 1000):
        parts = tuning.parts(channels, size, 50 * most, 50)
        assert [c for part in parts for c in range(part.start, part.stop)] == [*range(channels)]
        for part in parts:
            width = part.stop - part.start
            assert width % 16 == 0 or width > widest or len(parts) == 1
            assert part.start % 16 == 0
