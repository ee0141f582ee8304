"""How many processors are allowed: affinity and the cgroup's quota, of either version."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastbn import _cpus


def files(root: Path, contents: dict[str, str]) -> None:
    """Write a small tree of files."""
    for name, text in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("cgroup", "contents", "quotas"),
    [
        ("0::/a/b", {"a/b/cpu.max": "150000 100000"}, [1.5]),
        ("0::/a/b", {"a/b/cpu.max": "max 100000"}, []),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, [0.5]),
        ("0::/a/b", {"a/b/cpu.max": "400000 100000", "cpu.max": "200000 100000"}, [4, 2]),
        ("0::/", {"cpu.max": "300000 100000"}, [3]),
        # In a container the path may be the host's: the mount itself remains.
        ("0::/docker/0123", {"cpu.max": "100000 50000"}, [2]),
        ("0::/a", {"a/cpu.max": "gibberish"}, []),
        ("0::/a", {"a/cpu.max": ""}, []),
        ("0::/a", {}, []),
        ("", {}, []),
        (
            "4:cpu,cpuacct:/a\n3:memory:/m",
            {"cpu/a/cpu.cfs_quota_us": "250000", "cpu/a/cpu.cfs_period_us": "100000"},
            [2.5],
        ),
        (
            "4:cpu:/a\n0::/",
            {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"},
            [],
        ),
        ("3:memory:/m\n5:cpuset:/", {"m/cpu.max": "1 1", "cpu.max": "100000 100000"}, []),
    ],
)
def test_quotas(tmp_path: Path, cgroup: str, contents: dict[str, str], quotas: list[float]) -> None:
    """Every quota from the process's group up to the mount counts; what is unreadable does not."""
    root = tmp_path / "cgroup"
    files(root, contents)
    proc = tmp_path / "self"
    proc.write_text(cgroup)
    files(tmp_path, {"cpu.max": "1 100000"})  # above the mount: not ours
    assert list(_cpus._cgroup_quotas(proc, root)) == quotas


def test_no_cgroups_at_all(tmp_path: Path) -> None:
    """A system without cgroups has no quota."""
    assert list(_cpus._cgroup_quotas(tmp_path / "absent", tmp_path)) == []


@pytest.mark.parametrize(
    ("affinity", "quotas", "allowed"),
    [
        (8, [], 8),
        (8, [2.5], 3),
        (8, [0.25], 1),
        (2, [16.0], 2),
        (8, [4.0, 2.0], 2),
        (1, [0.0], 1),
    ],
)
def test_available_cpus(
    monkeypatch: pytest.MonkeyPatch, affinity: int, quotas: list[float], allowed: int
) -> None:
    """The least of affinity and quotas, rounded up, never less than 1."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(affinity)))
    monkeypatch.setattr(_cpus, "_cgroup_quotas", lambda: iter(quotas))
    assert _cpus.available_cpus() == allowed
