"""The VMM's own talk with the guest's agent: clients wait for its end, so it has one."""

import socket
import threading
from typing import Any, cast

import pytest

from vmrun.agent.session import AgentSession
from vmrun.machine import agent
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
        agent.talk(loop, [cast(PortLink, cast(Any, FreeLink()))], lambda session: None, done)
        loop.run()
    finally:
        loop.close()
    assert told == [False]
