"""The agent's program on the host: the very same C, built once, serving one end of a socket pair."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from vmrun.agent.session import AgentSession
from vmrun.guestkit import guest_agent

ENV = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}


@cache
def _built() -> tuple[tempfile.TemporaryDirectory[str], Path]:
    # It lives as long as the tests: a developer's cache is not theirs to fill.
    directory = tempfile.TemporaryDirectory(prefix="vmrun-agent-", ignore_cleanup_errors=True)
    program = Path(directory.name) / "vmrun-agent"
    guest_agent.compile_program(program)
    return directory, program


def program() -> Path:
    return _built()[1]


@contextmanager
def agent(*options: str) -> Iterator[tuple[socket.socket, subprocess.Popen[bytes]]]:
    """The host's end, and the agent's process; it ends when the test closes the socket."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = subprocess.Popen(
                [program(), "--fd", str(theirs.fileno()), *options],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        try:
            yield ours, process
            # Another descriptor of the socket, or a thread that reads, would keep it open.
            ours.shutdown(socket.SHUT_RDWR) if ours.fileno() >= 0 else None
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()


@contextmanager
def session(*options: str) -> Iterator[AgentSession]:
    with agent(*options) as (sock, _), AgentSession(sock) as session:
        session.hello(20)
        yield session
