"""How many processors are allowed: affinity and the cgroup's quota, of either version."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastbn import _cpus, backends


def files(root: Path, contents: dict[str, str]) -> None:
    """Write a small tree of files."""
    for name, text in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="latin-1")


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
        ("0::/a", {"a/cpu.max": "100000 0"}, []),
        ("0::/a", {"a/cpu.max": "0 100000"}, []),
        ("0::/a", {"a/cpu.max": "100000 -1"}, []),
        ("0::/a", {"a/cpu.max": "100000"}, []),
        ("0::/a", {"a/cpu.max": "1 2 3"}, []),
        ("0::/a", {"a/cpu.max": "\xff\xfe 100000"}, []),
        ("0::/a", {"a/cpu.max": f"1{400 * '0'} 1"}, []),
        ("0::/a", {"a/cpu.max": f"1{5000 * '0'} 1"}, []),
        ("0::/a", {}, []),
        ("", {}, []),
        ("\n\n0::/a\n\n", {"a/cpu.max": "150000 100000"}, [1.5]),
        ("gibberish\n1:2\n::\n0::/a", {"a/cpu.max": "150000 100000"}, [1.5]),
        ("0::/a\x00b", {"cpu.max": "150000 100000"}, [1.5]),
        ("0::/a\x85b", {"a\x85b/cpu.max": "150000 100000"}, [1.5]),
        ("0::/\xff", {"\xff/cpu.max": "150000 100000"}, [1.5]),
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
        (
            "4:cpu,cpuacct:/a",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "250000", "cpu,cpuacct/a/cpu.cfs_period_us": "0"},
            [],
        ),
        ("3:memory:/m\n5:cpuset:/", {"m/cpu.max": "1 1", "cpu.max": "100000 100000"}, []),
    ],
)
def test_quotas(tmp_path: Path, cgroup: str, contents: dict[str, str], quotas: list[float]) -> None:
    """Every quota from the process's group up to the mount counts; what is unreadable does not."""
    root = tmp_path / "cgroup"
    files(root, {os.fsdecode(name.encode("latin-1")): text for name, text in contents.items()})
    proc = tmp_path / "self"
    proc.write_text(cgroup, encoding="latin-1")
    files(tmp_path, {"cpu.max": "1 100000"})  # above the mount: not ours
    assert list(_cpus._cgroup_quotas(proc, root)) == quotas


@pytest.mark.parametrize("linked", [True, False], ids=["linked", "alone"])
@pytest.mark.parametrize("mount", ["cpu,cpuacct", "cpuacct,cpu"])
@pytest.mark.parametrize("controllers", ["cpu,cpuacct", "cpuacct,cpu"])
def test_controllers_mounted_together(
    tmp_path: Path, controllers: str, mount: str, linked: bool
) -> None:
    """Whatever their order in the folder's name and in the process's list, with "cpu" as a link to
    that folder or without."""
    files(
        tmp_path,
        {
            f"{mount}/a/cpu.cfs_quota_us": "250000",
            f"{mount}/a/cpu.cfs_period_us": "100000",
            "cpuset/a/cpu.cfs_quota_us": "1",
            "cpuset/a/cpu.cfs_period_us": "100000",
            "self": f"5:cpuset:/a\n4:{controllers}:/a",
        },
    )
    if linked:
        (tmp_path / "cpu").symlink_to(mount)
    assert set(_cpus._cgroup_quotas(tmp_path / "self", tmp_path)) == {2.5}


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
    """The least of affinity and quotas, rounded up, never less than 1; OpenMP knows better than the
    mask, which it may have narrowed."""
    monkeypatch.setattr(_cpus, "_cgroup_quotas", lambda: iter(quotas))
    monkeypatch.setattr(_cpus, "_AFFINITY", affinity)
    monkeypatch.setattr(backends, "openmp", lambda: None)
    assert _cpus.available_cpus() == allowed
    monkeypatch.setattr(_cpus, "_AFFINITY", 1)
    monkeypatch.setattr(backends, "openmp", lambda: SimpleNamespace(processors=lambda: affinity))
    assert _cpus.available_cpus() == allowed
