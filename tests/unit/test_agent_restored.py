"""Sessions with agents of restored machines: everything is sent before the agent says a word."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.unit.agent_guest import ENV, agent, session
from vmrun.agent import protocol
from vmrun.agent.process import Capture
from vmrun.agent.protocol import (
    EXIT,
    HEADER,
    HELLO,
    HELLO_AT_ONCE,
    MAGIC,
    NOBODY,
    NONCE_BYTES,
    OP_ADD_ENTROPY,
    OP_EXEC,
    OP_PING,
    OP_SET_TIME,
    REPLY,
    AgentGone,
)
from vmrun.agent.session import AgentSession

OWN = b"the agent's nonce"[:NONCE_BYTES]
DONE = struct.pack("<IB3x", 0, 0)


def receive(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = sock.recv(size - len(data))
        assert part
        data += part
    return data


def receive_frame(sock: socket.socket) -> tuple[int, int, bytes]:
    kind, _, channel, size = HEADER.unpack(receive(sock, HEADER.size))
    return kind, channel, receive(sock, size)


@contextmanager
def restored() -> Iterator[tuple[AgentSession, socket.socket]]:
    """A session that has begun, and the guest's end of its socket."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(20)
    with theirs, AgentSession(ours) as host:
        host.hello_restored()
        yield host, theirs


def take_beginning(sock: socket.socket) -> tuple[bytes, int, int]:
    """The host's nonce, and the channels of entropy and time."""
    magic, _, flags, _, nonce, echo = HELLO.unpack(receive(sock, HELLO.size))
    assert (magic, flags, echo) == (MAGIC, HELLO_AT_ONCE, NOBODY)
    _, entropy, fields = receive_frame(sock)
    assert int.from_bytes(fields[:4], "little") == OP_ADD_ENTROPY and len(fields) == 4 + 64
    _, clock, fields = receive_frame(sock)
    assert int.from_bytes(fields[:4], "little") == OP_SET_TIME and len(fields) == 4 + 8 + 4 + 8
    return nonce, entropy, clock


def test_requests_follow_entropy_and_time_without_an_answer() -> None:
    with restored() as (host, guest):
        answers: list[float] = []
        thread = threading.Thread(target=lambda: answers.append(host.ping(20)))
        thread.start()
        nonce, entropy, clock = take_beginning(guest)
        _, ping, fields = receive_frame(guest)
        assert int.from_bytes(fields[:4], "little") == OP_PING
        guest.sendall(b"what an older session left" + protocol.hello(OWN, nonce, HELLO_AT_ONCE))
        for channel, data in ((entropy, b""), (clock, bytes(8)), (ping, fields[4:])):
            guest.sendall(protocol.frame(REPLY, 0, channel, DONE + data))
        thread.join(20)
        assert len(answers) == 1


@pytest.mark.parametrize("refused", [0, 1])
def test_nothing_goes_on_without_entropy_and_time(refused: int) -> None:
    with restored() as (host, guest):
        nonce, *channels = take_beginning(guest)
        reply = protocol.frame(REPLY, 0, channels[refused], struct.pack("<IB3x", 1, 0))
        guest.sendall(protocol.hello(OWN, nonce, HELLO_AT_ONCE) + reply)
        with pytest.raises(AgentGone, match="entropy" if refused == 0 else "clock"):
            host.ping(20)


def test_agent_that_knows_nothing_of_it() -> None:
    with restored() as (host, guest):
        nonce, _, _ = take_beginning(guest)
        guest.sendall(protocol.hello(OWN, nonce))
        with pytest.raises(AgentGone, match="too old"):
            host.ping(20)


def test_guest_that_ends_instead() -> None:
    with restored() as (host, guest):
        take_beginning(guest)
        guest.shutdown(socket.SHUT_RDWR)
        with pytest.raises(AgentGone):
            host.ping(20)


def test_agent_takes_frames_after_the_first_hello() -> None:
    nonce = os.urandom(NONCE_BYTES)
    words = protocol.texts(["sh", "-c", "exit 7"]) + protocol.texts([f"PATH={ENV['PATH']}"])
    fields = struct.pack("<IIHH", protocol.EXEC_NO_STDIN, 0, 0, 0) + protocol.text("") * 2 + words
    with agent() as (sock, _):
        sock.settimeout(20)
        run = b"".join(protocol.request_frames(9, OP_EXEC, fields))
        sock.sendall(protocol.hello(nonce, NOBODY, HELLO_AT_ONCE) + run)
        magic, _, flags, _, _, echo = HELLO.unpack(receive(sock, HELLO.size))
        assert (magic, flags, echo) == (MAGIC, HELLO_AT_ONCE, nonce)
        kind, channel, payload = receive_frame(sock)
        assert (kind, channel, payload[:8]) == (REPLY, 9, DONE)
        while kind != EXIT:
            kind, channel, payload = receive_frame(sock)
        assert (channel, protocol.parse_exit(payload).code) == (9, 7)


def test_start_of_a_long_command_is_told_before_its_end() -> None:
    with session() as guest:
        process = guest.exec(["sleep", "1000"], env=ENV, timeout=20)
        assert process.poll() is None and process.pid
        process.kill()
        assert process.wait(20).signal == 9


def test_programs_are_looked_for_in_path(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for directory, mode in ((first, 0o644), (second, 0o755)):
        directory.mkdir()
        script = directory / "tool"
        script.write_text("echo found $0 $1\n")  # without #!: the shell's
        script.chmod(mode)
    output = Capture()
    with session() as guest:
        env = {"PATH": f"{tmp_path}/none:{first}:{second}:/bin"}
        assert guest.exec(["tool", "it"], env=env, stdout=output).wait(20).exit_code == 0
        assert bytes(output.data) == f"found {second}/tool it\n".encode()
        # What the start borrowed of the agent's memory is as it was.
        again = Capture()
        assert guest.exec(["env"], env={"A": "b"}, stdout=again).wait(20).exit_code == 0
        assert b"A=b" in again.data.splitlines() and str(second).encode() not in again.data
