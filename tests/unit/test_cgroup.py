"""Cgroups for machines: in a tree of files that plays the kernel's part, and in the real one where it is
ours.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmrun.host import cgroup
from vmrun.host.cgroup import Group, Limits, Place, find_place, machine_limits

FILES = (
    "cgroup.procs",
    "cgroup.kill",
    "memory.max",
    "memory.oom.group",
    "memory.swap.max",
    "pids.max",
    "cpu.max",
)
ALL = frozenset(cgroup.CONTROLLERS)


def grow(directory: Path, available: str = "", on: str = "") -> Path:
    """A group as the kernel shows it."""
    os.makedirs(directory)
    for file in FILES:
        (directory / file).write_text("")
    (directory / "cgroup.controllers").write_text(available)
    (directory / "cgroup.subtree_control").write_text(on)
    return directory


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The top of a hierarchy: directories made in it have files, and go with them."""
    top = grow(tmp_path / "cgroup fs", "cpu memory pids", "cpu memory pids")
    mkdir = Path.mkdir

    def make(self: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        if self.exists() or not self.is_relative_to(top):
            mkdir(self, mode, parents, exist_ok)
        else:
            grow(self)

    monkeypatch.setattr(Path, "mkdir", make)
    monkeypatch.setattr(Path, "rmdir", lambda self: shutil.rmtree(self))
    return top


def place(tree: Path, own: str, *, look: bool = False) -> Place | None:
    mountinfo, membership = tree.parent / "mountinfo", tree.parent / "membership"
    where = str(tree).replace(" ", "\\040")
    mountinfo.write_text(
        "24 1 0:22 / /proc rw - proc proc rw\n"
        f"30 24 0:26 / {where} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
    )
    membership.write_text(f"4:memory:/elsewhere\n0::{own}\n")
    return find_place(str(mountinfo), str(membership), look=look)


def test_beside_our_own(tree: Path) -> None:
    """The group of a session has processes in it, so what it hands on is nothing; its parent is the place."""
    grow(tree / "user", "cpu memory pids", "memory pids")
    grow(tree / "user" / "session", "memory pids")
    found = place(tree, "/user/session")
    assert found is not None
    assert found.directory == tree / "user"
    assert found.controllers == {"memory", "pids", "cpu"}
    assert (tree / "user" / "cgroup.subtree_control").read_text() == "+cpu"


def test_looking_changes_nothing(tree: Path) -> None:
    (tree / "cgroup.subtree_control").write_text("")
    found = place(tree, "/", look=True)
    assert found is not None and found.controllers == ALL
    assert (tree / "cgroup.subtree_control").read_text() == ""


def test_what_is_not_ours_is_left_alone(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grow(tree / "user" / "session", "memory", "memory")
    access = os.access
    ours = tree / "user" / "session"
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path).is_relative_to(ours) and access(path, mode)
    )
    found = place(tree, "/user/session")
    assert found is not None
    assert (found.directory, found.controllers) == (ours, frozenset({"memory"}))


def test_a_host_without_version_2(tmp_path: Path) -> None:
    (tmp_path / "mountinfo").write_text("30 24 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n")
    (tmp_path / "membership").write_text("4:memory:/\n")
    assert find_place(str(tmp_path / "mountinfo"), str(tmp_path / "membership")) is None
    assert find_place(str(tmp_path / "none"), str(tmp_path / "membership")) is None
    with Group("web", Limits(memory=1, pids=2), None) as group:
        group.enter()
        assert group.missing == ["memory", "pids"]


def test_limits_are_written(tree: Path) -> None:
    with Group("web", Limits(memory=1 << 30, pids=50, cpu=1.5), Place(tree, ALL)) as group:
        path = tree / f"vmrun-web-{os.getpid()}"
        assert (group.path, group.missing) == (path, [])
        assert {file: (path / file).read_text() for file in FILES[2:]} == {
            "memory.max": "1073741824",
            "memory.oom.group": "1",
            "memory.swap.max": "0",
            "pids.max": "50",
            "cpu.max": "150000 100000",
        }
        group.enter()
        assert (path / "cgroup.procs").read_text() == "0"
        (path / "memory.events").write_text("low 0\noom 1\noom_kill 0\n")
        found = [group.out_of_memory]
        (path / "memory.events").write_text("low 0\noom 1\noom_kill 3\n")
        found.append(group.out_of_memory)
        assert found == [False, True]
    assert not path.exists()


def test_a_controller_that_is_not_there_is_told(tree: Path) -> None:
    make = cgroup._make

    def without_memory(path: Path) -> int:
        fd = make(path)
        (path / "memory.max").unlink()
        return fd

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cgroup, "_make", without_memory)
        with Group("web", Limits(memory=1 << 30, cpu=1), Place(tree, ALL)) as group:
            assert group.missing == ["memory"]


def test_what_a_killed_vmrun_left_is_removed(tree: Path) -> None:
    grow(tree / "vmrun-old-77")
    grow(tree / "somebody-else")
    with Group("first", Limits(), Place(tree, ALL)) as first:
        assert not (tree / "vmrun-old-77").exists()
        with Group("second", Limits(), Place(tree, ALL)):
            assert first.path is not None and first.path.exists()
    assert (tree / "somebody-else").exists()


def test_what_a_machine_may_take() -> None:
    limits = machine_limits(128 << 20, cpus=2, workers=3)
    assert limits.memory is not None and (128 << 20) < limits.memory < (512 << 20)
    assert limits.pids is not None and limits.pids > 2 + 3 * 2


@pytest.fixture
def real() -> Iterator[Place]:
    found = find_place()
    if found is None:
        pytest.skip("no cgroup of version 2 is ours here")
    yield found


def test_the_real_thing(real: Place) -> None:
    """Whoever enters is in it with its children, and all of them end with it."""
    program = "import os, sys; os.fork(); sys.stdout.write('x'); sys.stdout.flush(); sys.stdin.read()"
    with Group("unit-test", Limits(), real) as group:
        assert group.path is not None
        with subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=group.enter,
        ) as process:
            assert process.stdout is not None and process.stdout.read(2) == b"xx"
            path = group.path
            members = (path / "cgroup.procs").read_text().split()
            assert len(members) == 2 and str(process.pid) in members
            group.close()
            assert not path.exists()
            assert process.wait(30) == -signal.SIGKILL


def test_a_real_leftover(real: Place) -> None:
    """The process that made the group is killed; a child of it, which has no lock, goes on until the next one
    looks.
    """
    program = """
import os, subprocess, sys, time
from vmrun.host.cgroup import Group, Limits, find_place
group = Group("unit-left", Limits(), find_place())
child = subprocess.Popen(["sleep", "300"], preexec_fn=group.enter, stdout=subprocess.DEVNULL)
print(child.pid, group.path, flush=True)
time.sleep(300)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid, _, path = process.stdout.readline().strip().partition(" ")
        process.kill()
    assert Path(path).exists() and Path(f"/proc/{pid}").exists()
    real.clean()
    assert not Path(path).exists()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}/fd").exists() and os.path.exists(f"/proc/{pid}/exe"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
