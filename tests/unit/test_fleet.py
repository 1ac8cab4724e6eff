"""How machines are started together, up to where there is a machine: nothing runs here but forks."""

import fcntl
import os
import select
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vmrun.control import detach, fleet, machine_file, runtime, session
from vmrun.control.machine_entry import MachineEntry
from vmrun.control.machine_file import StartRule
from vmrun.errors import UserError


@pytest.fixture(autouse=True)
def base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VMRUN_RUNTIME", str(tmp_path / "run"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "vm.toml"
    found.write_text("".join(f"[machines.{name}]\n" for name in "abcde"))
    return found


@pytest.fixture
def machines(path: Path) -> list[MachineEntry]:
    return list(machine_file.load(path).machines)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe2(os.O_CLOEXEC)
    yield ends
    for fd in ends:
        os.close(fd)


def never() -> None:
    raise AssertionError("nobody has the lock")


def is_locked(path: Path) -> bool:
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_machine_holds_the_files_lock_until_it_has_its_name(
    path: Path, machines: list[MachineEntry], pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever becomes of `up` meanwhile, the next command sees the machine."""

    def run(config: Any, *, name: str, timeout: None, starter: session.Starter) -> Any:
        os.close(pipe[1])  # the test's end is the last: it goes with the test, and we do
        os.read(pipe[0], 1)
        directory = runtime.claim(name)
        starter.claimed(directory)
        starter.running(name)
        os.read(pipe[0], 1)
        directory.release()
        return SimpleNamespace(code=0, reason="")

    monkeypatch.setattr(session, "run", run)
    with fleet.one_at_a_time(path, never) as lock:
        starting = detach.Starting(fleet._vmm(machines[0], lock), str)
    assert is_locked(path)
    os.write(pipe[1], b"x")
    assert starting.result() == "a"
    assert not is_locked(path) and "a" in runtime.running()
    os.write(pipe[1], b"x")


def test_in_groups_with_a_pause_between(
    path: Path, machines: list[MachineEntry], pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a group are on their way before any of the next is; one that fails holds up nothing."""
    pauses: list[float] = []

    def run(config: Any, *, name: str, timeout: None, starter: session.Starter) -> Any:
        os.write(pipe[1], name.encode())
        if name == "b":
            raise UserError("no b", 66)
        starter.running(name)
        return SimpleNamespace(code=0, reason="")

    def pause(seconds: float) -> None:
        assert select.select([pipe[0]], [], [], 0)[0]
        pauses.append(seconds)
        begun.append("".join(sorted(os.read(pipe[0], 10).decode())))

    begun: list[str] = []
    monkeypatch.setattr(session, "run", run)
    monkeypatch.setattr(detach.Detached, "claimed", lambda self, directory: None)
    monkeypatch.setattr(fleet.time, "sleep", pause)
    with fleet.one_at_a_time(path, never) as lock:
        told = list(fleet.start(machines, StartRule(2, 7.5), lock, str))
    assert [(machine.name, failure and failure.code) for machine, failure in told] == [
        ("a", None),
        ("b", 66),
        ("c", None),
        ("d", None),
        ("e", None),
    ]
    assert pauses == [7.5, 7.5] and begun == ["ab", "cd"]


def test_one_machine_does_not_hold_anothers_pipe(pipe: tuple[int, int]) -> None:
    """Nobody listens to the first: it learns so although the second lives."""
    go, wait = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)

    def first(starter: detach.Detached) -> tuple[int, str]:
        os.close(go[1])
        os.read(go[0], 1)
        os.write(pipe[1], b"heard" if starter.running("first") else b"alone")
        return 0, ""

    def second(starter: detach.Detached) -> tuple[int, str]:
        os.close(wait[1])
        starter.running("second")
        os.read(wait[0], 1)  # until the test has ended
        return 0, ""

    one = detach.Starting(first, str)
    other = detach.Starting(second, str, [one])
    assert other.result() == "second"
    one.close()
    os.write(go[1], b"x")
    assert os.read(pipe[0], 10) == b"alone"
    for fd in (*go, *wait):
        os.close(fd)
