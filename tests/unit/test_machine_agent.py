"""The VMM's own talk with the guest's agent: clients wait for its end, so it has one."""

import socket
import threading
from typing import Any, cast

import pytest

from vmrun.agent.session import AgentSession
from vmrun.machine.agent import GuestAgent
from vmrun.machine.loop import EventLoop
from vmrun.machine.ports import PortLink


class FreeLink:
    """A link whose guest listens, and whose client is let go of at once."""

    free = True

    class port:
        guest_open = True

    def connect(self, connection: socket.socket) -> None:
        connection.close()


@pytest.mark.parametrize("failure", [OSError(5, "broken"), RuntimeError("can't start new thread")])
def test_it_is_told_that_nothing_came_of_it(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    def hello(session: AgentSession, timeout: float) -> None:
        raise failure

    monkeypatch.setattr(AgentSession, "hello", hello)
    monkeypatch.setattr(threading, "excepthook", lambda unheard: None)
    loop = EventLoop()
    told: list[bool] = []

    def done(worked: bool) -> None:
        told.append(worked)
        loop.stop()

    def give_up() -> None:
        told.append(True)
        loop.stop()

    try:
        loop.call_later(10.0, give_up)
        GuestAgent(loop, [cast(PortLink, cast(Any, FreeLink()))]).talk(lambda session: None, done)
        loop.run()
    finally:
        loop.close()
    assert told == [False]


def test_one_thing_after_another_in_one_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that is told who it is may be asked to shut down meanwhile, and has one port then."""
    sessions: list[AgentSession] = []
    monkeypatch.setattr(AgentSession, "hello", lambda session, timeout: sessions.append(session))
    loop = EventLoop()
    link = FreeLink()
    guest = GuestAgent(loop, [cast(PortLink, cast(Any, link))])
    asked = threading.Event()
    seen: list[object] = []

    def first(session: AgentSession) -> None:
        assert asked.wait(10)
        seen.append(session)

    def second(session: AgentSession) -> None:
        raise OSError(5, "broken")

    def done(worked: bool) -> None:
        seen.append(worked)
        if len(seen) == 3:
            loop.stop()

    try:
        assert guest.listens
        guest.talk(first, done)
        link.free = False
        assert guest.listens, "though nobody else could have the port"
        guest.talk(second, done)
        asked.set()
        loop.run()
        assert not guest.listens
        guest.talk(first, done)
    finally:
        loop.close()
    assert seen == [*sessions, True, False, False]
    assert len(sessions) == 1
