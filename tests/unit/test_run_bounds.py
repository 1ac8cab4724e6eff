"""What a hostile guest cannot hold up: the ends of commands and copies, and the way to its agent."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from tests.unit.test_agent_hostile import STARTED, FakeGuest, fake, within
from vmrun import cli
from vmrun.agent.process import Process
from vmrun.agent.protocol import REPLY, REQUEST, frame
from vmrun.agent.session import AgentSession
from vmrun.cli import exec as exec_commands
from vmrun.control import client, runtime
from vmrun.errors import EXIT_TIMEOUT, EXIT_VMM, UserError
from vmrun.run import guest as guests
from vmrun.run import sandbox as sandboxes
from vmrun.run.sandbox import CommandTimeout, Result, Running, Sandbox


class Machine:
    """As much of a sandbox as a command of it needs."""

    def __init__(self, session: AgentSession) -> None:
        self.exec = partial(session.exec, timeout=20)
        self.wait = Process.wait


def test_time_is_up_though_the_guest_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What kills the command waits behind its input, for ever."""
    monkeypatch.setattr(sandboxes, "KILL_SECONDS", 0.2)
    with fake() as (session, guest):

        def run() -> Result:
            machine = cast(Sandbox, cast(Any, Machine(session)))
            with Running(machine, ["x"], bytes(1 << 20), None, None, None, 100) as running:
                return running.result(0.5)

        def begin() -> None:
            kind, _, channel, _ = guest.frame()
            assert kind == REQUEST
            guest.sock.sendall(frame(REPLY, 0, channel, STARTED))

        threading.Thread(target=begin, daemon=True).start()
        assert isinstance(within(run), CommandTimeout)


def test_what_a_command_said_last_does_not_steer_the_terminal() -> None:
    with pytest.raises(UserError) as failed:
        Result(1, b"", b"first\n\x1b]0;owned\x07 \x9b\xff\n").check()
    assert str(failed.value) == "exit code 1: ?]0;owned? \ufffd\ufffd"


def test_an_image_whose_shell_does_not_end() -> None:
    sandbox = Sandbox.__new__(Sandbox)
    asked: list[float | None] = []

    def run(argv: list[str], *, timeout: float | None = None, **how: str) -> Result:
        asked.append(timeout)
        raise CommandTimeout(timeout or 0.0, Result(EXIT_TIMEOUT))

    sandbox.run = run  # type: ignore[assignment,method-assign]
    sandbox._in_guest = lambda do: None  # type: ignore[assignment,method-assign]
    with pytest.raises(UserError, match="/bin/sh, for the name server: timed out after 60 s") as failed:
        sandbox._set_network(0)
    assert asked == [guests.ANSWER_SECONDS] and failed.value.code == EXIT_VMM


@contextmanager
def crowded(directory: Path) -> Iterator[None]:
    """A machine whose agent's socket has as many waiting as there may be, and lets nobody in."""
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as waiting:
        listener.bind(str(directory / runtime.AGENT))
        listener.listen(0)
        waiting.connect(str(directory / runtime.AGENT))
        yield


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The runtime directory of a machine `web` that runs."""

    class Machine:
        state = "running"

        def __init__(self, name: str) -> None:
            pass

        def __enter__(self) -> Machine:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def status(self) -> Machine:
            return self

    monkeypatch.setattr(runtime, "find", lambda name: tmp_path)
    monkeypatch.setattr(client, "MachineClient", Machine)
    return tmp_path


def test_nobody_waits_for_ever_to_be_let_in(directory: Path) -> None:
    with crowded(directory):
        error = within(lambda: guests.open_session(directory, 0.2))
    assert isinstance(error, UserError) and error.code == EXIT_TIMEOUT
    assert str(error) == "the agent in the guest does not answer within 0.2 s"


@pytest.mark.parametrize("line", [["exec", "--timeout", "200ms", "web", "--", "true"],
                                  ["cp", "--timeout", "200ms", "web:/x", "out"]])  # fmt: skip
@pytest.mark.parametrize("full", [False, True])
def test_the_wait_for_the_agent_counts(
    directory: Path, line: list[str], full: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if full:
        with crowded(directory):
            assert within(lambda: cli.run(line)) == EXIT_TIMEOUT
    else:
        with socket.socket(socket.AF_UNIX) as deaf:
            deaf.bind(str(directory / runtime.AGENT))
            deaf.listen(1)
            assert within(lambda: cli.run(line)) == EXIT_TIMEOUT
    assert capsys.readouterr().err == "vmrun: timed out after 0.2 s\n"


@pytest.mark.parametrize("way", ["in", "out"])
def test_a_copy_has_its_time(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 20))

    def begin(guest: FakeGuest) -> None:
        _, _, channel, _ = guest.frame()
        guest.sock.sendall(frame(REPLY, 0, channel, STARTED))

    with fake() as (session, guest):
        monkeypatch.setattr(exec_commands, "_session", lambda *how: session)
        threading.Thread(target=begin, args=(guest,), daemon=True).start()
        words = [str(tmp_path / "file"), "web:/x"] if way == "in" else ["web:/x", str(tmp_path / "out")]
        assert within(lambda: cli.run(["cp", "--timeout", "500ms", *words])) == EXIT_TIMEOUT
    assert capsys.readouterr().err == "vmrun: timed out after 0.5 s\n"
