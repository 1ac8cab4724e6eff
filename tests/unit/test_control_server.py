"""The control socket with a machine of straw behind it: requests, streams, and clients that misbehave."""

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vmrun.control import client as clients
from vmrun.control import protocol, runtime, server
from vmrun.control.client import MachineClient, MachineGone, NotAnswering
from vmrun.control.server import ControlServer
from vmrun.errors import UserError
from vmrun.host.console_hub import ConsoleHub
from vmrun.host.console_log import ConsoleLog
from vmrun.machine.loop import EventLoop

STATUS = {
    "name": "web",
    "pid": 1,
    "state": "running",
    "vcpus": 2,
    "memory": 1 << 27,
    "memory_used": 1 << 20,
    "disks": 1,
    "nics": 0,
    "started": 5.0,
    "workers": {"blk0": 77},
}


class Straw:
    """A machine that notes what is asked of it."""

    def __init__(self) -> None:
        self.calls: list[object] = []
        self.pause_result: str | None = None
        self.paused: list[Callable[[str | None], None]] = []
        self.holds_pauses = False
        self.on_reset: Callable[[], None] = lambda: None

    def status(self) -> dict[str, Any]:
        return dict(STATUS)

    def inspect(self) -> dict[str, Any]:
        return {**STATUS, "config": {"cpus": 2}}

    def stop(self, force: bool) -> None:
        self.calls.append(("stop", force))

    def reset(self) -> None:
        self.calls.append("reset")
        self.on_reset()

    def pause(self, done: Callable[[str | None], None]) -> None:
        if self.pause_result == "refused":
            raise UserError("it is being stopped")
        if self.holds_pauses:
            self.paused.append(done)
        else:
            done(self.pause_result)

    def resume(self) -> None:
        self.calls.append("resume")


class Service:
    """A server on a loop in a thread."""

    def __init__(self) -> None:
        self.directory = runtime.claim("web")
        self.log = ConsoleLog(self.directory.path / "console.log", limit=1000)
        self.hub = ConsoleHub(None, self.log)
        self.server = ControlServer(self.directory, self.hub)
        self.machine = Straw()
        self.typed = b""
        self.typing = threading.Event()
        self._thread: threading.Thread | None = None
        self.start()

    def start(self) -> None:
        self.loop = EventLoop()
        self.loop.watch(self.hub.wake_fd, self.hub.on_wake)
        self.loop.watch(self.hub.input_fd, self._typed)
        self.server.serve(self.loop, self.machine)
        self._thread = threading.Thread(target=self.loop.run)
        self._thread.start()

    def _typed(self) -> None:
        self.typed += self.hub.on_input_ready(100)
        self.typing.set()

    def stop_reading(self) -> None:
        self.on_loop(lambda: self.loop.unwatch(self.hub.input_fd))

    def on_loop(self, action: Callable[[], None]) -> None:
        done = threading.Event()
        self.loop.call_soon(lambda: (action(), done.set()))  # type: ignore[arg-type, func-returns-value]
        assert done.wait(10)

    def stop(self) -> None:
        """The machine's end, without the server's."""
        if self._thread is not None:
            self.loop.stop()
            self._thread.join()
            self._thread = None
            self.server.leave()
            self.loop.close()

    def finish(self, code: int, reason: str) -> None:
        self.stop()
        self.directory.release()
        self.server.finish(code, reason)

    def close(self) -> None:
        self.stop()
        self.server.close()
        self.hub.close()
        self.log.close()
        self.directory.release()


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Service]:
    # Long enough for the address of a socket not to fit, as people's temporary directories may be.
    monkeypatch.setenv("VMRUN_RUNTIME", str(tmp_path / ("long" * 25)))
    service = Service()
    yield service
    service.close()


@pytest.fixture
def client(service: Service) -> Iterator[MachineClient]:
    with MachineClient("web") as client:
        yield client


class Raw:
    """A client without manners."""

    def __init__(self, service: Service) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        fd = os.open(service.directory.path, os.O_PATH)
        self.sock.connect(f"/proc/self/fd/{fd}/control")
        os.close(fd)
        self.file = self.sock.makefile("rb")

    def ask(self, line: bytes) -> Any:
        self.sock.sendall(line)
        return json.loads(self.file.readline())

    def at_end(self) -> bool:
        try:
            return self.file.read() == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.file.close()
        self.sock.close()


@pytest.fixture
def raw(service: Service) -> Iterator[Raw]:
    raw = Raw(service)
    yield raw
    raw.close()


def test_questions(client: MachineClient) -> None:
    status = client.status()
    assert (status.name, status.vcpus, status.workers) == ("web", 2, {"blk0": 77})
    assert status.uptime > 1
    assert client.inspect()["config"] == {"cpus": 2}


def test_orders(service: Service, client: MachineClient) -> None:
    client.pause()
    client.resume()
    client.stop()
    client.stop(force=True)
    assert service.machine.calls == ["resume", ("stop", False), ("stop", True)]


def test_refusals(service: Service, client: MachineClient) -> None:
    service.machine.pause_result = "vCPU 3 does not leave the guest"
    with pytest.raises(UserError, match="vCPU 3 does not leave"):
        client.pause()
    service.machine.pause_result = "refused"
    with pytest.raises(UserError, match="it is being stopped"):
        client.pause()
    assert client.status().pid == 1


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"hello\n", "not a JSON object"),
        (b"[1]\n", "not a JSON object"),
        (b"\xff\n", "not a JSON object"),
        (b"[" * 5000 + b"\n", "not a JSON object"),
        (b'{"v":2,"id":1,"command":"status"}\n', "version 2"),
        (b'{"id":1,"command":"status"}\n', "version None"),
        (b'{"v":1,"id":"x","command":"status"}\n', "id must be"),
        (b'{"v":1,"id":true,"command":"status"}\n', "id must be"),
        (b'{"v":1,"id":1}\n', "command must be"),
        (b'{"v":1,"id":1,"command":"fly"}\n', "no command 'fly'"),
        (b'{"v":1,"id":1,"command":"__init__"}\n', "no command"),
        (b'{"v":1,"id":1,"command":"status","x":1}\n', "unknown key 'x'"),
        (b'{"v":1,"id":1,"command":"stop","force":1}\n', "force must be true or false"),
        (b'{"v":1,"id":1,"command":"console","replay":-1}\n', "replay must be"),
        (b'{"v":1,"id":1,"command":"console","replay":1e3}\n', "replay must be"),
    ],
)
def test_nonsense_is_answered(raw: Raw, line: bytes, text: str) -> None:
    answer = raw.ask(line)
    assert answer["v"] == 1 and answer["ok"] is False and text in answer["error"]["message"]
    assert answer["error"]["exit_code"] == 64
    assert answer["id"] == (1 if b'"id":1' in line else None)
    assert raw.ask(b'\n \n{"v":1,"id":9,"command":"status"}\n')["id"] == 9


def test_requests_in_pieces_and_in_heaps(raw: Raw) -> None:
    for byte in b'{"v":1,"id":3,"command":"sta':
        raw.sock.sendall(bytes([byte]))
    assert raw.ask(b'tus"}\n')["id"] == 3
    raw.sock.sendall(b'{"v":1,"id":4,"command":"status"}\n' * 50)
    assert [json.loads(raw.file.readline())["id"] for _ in range(50)] == [4] * 50


def test_a_line_without_end(raw: Raw) -> None:
    answer = raw.ask(b"x" * protocol.MAX_LINE)
    assert "at most" in answer["error"]["message"]
    assert raw.at_end()


def test_waiting_for_the_end(service: Service) -> None:
    endings: list[clients.Ending] = []
    names: list[dict[str, int]] = []
    ready = threading.Barrier(4)

    def wait() -> None:
        with MachineClient("web") as client:
            number = client._send("wait")
            client.status()
            ready.wait()
            endings.append(clients._parse_ending(client._receive(number, 10)))
            names.append(runtime.running())

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    ready.wait()
    service.finish(67, "the guest's kernel panicked")
    for thread in threads:
        thread.join()
    assert endings == [clients.Ending(67, "the guest's kernel panicked")] * 3
    assert names == [{}] * 3  # the name is free by the time anybody hears of the end


def test_stop_and_wait(service: Service, client: MachineClient) -> None:
    service.machine.stop = lambda force: service.loop.stop()  # type: ignore[method-assign]
    finish = threading.Thread(target=lambda: (service._thread.join(), service.finish(0, "off")))  # type: ignore[union-attr, func-returns-value]
    finish.start()
    assert client.stop_and_wait(timeout=10) == clients.Ending(0, "off")
    finish.join()


def test_a_vmm_that_dies_and_one_that_is_silent(service: Service) -> None:
    with MachineClient("web") as client:
        waiting = client._send("wait")
        client.status()
        service.stop()
        with pytest.raises(TimeoutError):
            client._receive(waiting, 0.05)
        client.timeout = 0.05
        with pytest.raises(NotAnswering, match="does not answer"):
            client.status()
        service.server.close()
        with pytest.raises(MachineGone, match="machine web died"):
            client._receive(waiting, 10)


def test_reset(service: Service, client: MachineClient) -> None:
    service.machine.on_reset = service.loop.stop
    service.machine.holds_pauses = True
    pausing = client._send("pause")
    number = client._send("reset")
    assert service._thread is not None
    service._thread.join()
    service.stop()
    service.start()
    assert client._receive(number, 10) == {"state": "running"}
    with pytest.raises(UserError, match="was reset"):
        client._receive(pausing, 10)
    assert client.status().name == "web"


def test_a_reset_that_is_refused(service: Service, client: MachineClient) -> None:
    def refuse() -> None:
        raise UserError("a snapshot of web is being made")

    service.machine.on_reset = refuse
    with pytest.raises(UserError, match="is being made"):
        client.reset()
    assert not service.server._resetting
    # The next life of the machine owes nobody an answer.
    service.machine.on_reset = service.loop.stop
    number = client._send("reset")
    assert service._thread is not None
    service._thread.join()
    service.stop()
    service.start()
    assert client._receive(number, 10) == {"state": "running"}
    assert client.status().name == "web" and not client._answers


def test_events(service: Service, client: MachineClient) -> None:
    events = client.events()
    with MachineClient("web") as other:
        client._ask("events")
        other.pause()
        other.resume()
        other.stop(force=True)
    service.finish(0, "off")
    seen = [(event["event"], event.get("reason")) for event in events]
    assert seen == [("paused", None), ("resumed", None), ("stopping", None), ("ended", "off")]


def test_too_much_at_once(service: Service, raw: Raw) -> None:
    for number in range(server.MAX_PENDING):
        raw.sock.sendall(b'{"v":1,"id":%d,"command":"wait"}\n' % number)
    assert "under way" in raw.ask(b'{"v":1,"id":99,"command":"wait"}\n')["error"]["message"]
    assert "under way already" in raw.ask(b'{"v":1,"id":3,"command":"status"}\n')["error"]["message"]
    service.finish(1, "x")
    assert {json.loads(line)["id"] for line in raw.file} == set(range(server.MAX_PENDING))


def test_clients_are_counted(service: Service) -> None:
    many = [MachineClient("web") for _ in range(server.MAX_CLIENTS)]
    for each in many:
        each.status()
    with MachineClient("web") as one_more, pytest.raises(UserError, match="clients already"):
        one_more.status()
    for each in many:
        each.close()
    with MachineClient("web") as again:
        assert again.status().name == "web"


def test_only_the_owner(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = os.geteuid() + 1
    monkeypatch.setattr(server, "UCRED", FakeCredentials(stranger))
    with MachineClient("web") as client, pytest.raises(UserError, match="belongs to somebody else"):
        client.status()
    monkeypatch.setattr(server, "UCRED", FakeCredentials(0))
    with MachineClient("web") as client:
        client.status()


@pytest.mark.root
def test_strangers_are_known_by_the_kernel(service: Service) -> None:
    """Even if somebody opens the way for them: a process of user 65534 is handed the open directory."""
    program = (
        "import os, socket, sys\nos.setgid(65534); os.setuid(65534)\n"
        "sock = socket.socket(socket.AF_UNIX); sock.connect(f'/proc/self/fd/{sys.argv[1]}/control')\n"
        "sys.stdout.write(sock.makefile().readline())"
    )
    service.directory.path.chmod(0o711)
    service.directory.socket_path.chmod(0o777)
    fd = os.open(service.directory.path, os.O_PATH)
    command = [sys.executable, "-c", program, str(fd)]
    run = subprocess.run(command, pass_fds=[fd], capture_output=True, text=True, check=True, cwd="/")
    os.close(fd)
    assert "belongs to somebody else" in run.stdout
    assert not service.server.clients


class FakeCredentials:
    size = struct.calcsize("3i")

    def __init__(self, uid: int) -> None:
        self.uid = uid

    def unpack(self, data: bytes) -> tuple[int, int, int]:
        assert struct.unpack("3i", data)[1] == os.geteuid()
        return 1, self.uid, 1


def read_exactly(sock: socket.socket, count: int) -> bytes:
    sock.settimeout(10)
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        assert piece, f"the end after {data!r}"
        data += piece
    return data


def test_console(service: Service, client: MachineClient) -> None:
    service.hub.write(b"before")
    with client.console(replay=3) as sock, MachineClient("web") as second, second.console() as other:
        service.hub.write(b" login: ")
        assert read_exactly(sock, 11) == b"ore login: "
        assert read_exactly(other, 8) == b" login: "
        sock.sendall(b"root\n")
        other.sendall(b"ls\n")
        while len(service.typed) < 8:
            assert service.typing.wait(10)
            service.typing.clear()
        assert sorted(service.typed.split()) == [b"ls", b"root"]
        service.hub.write(b"bye")
        service.finish(0, "off")
        assert read_exactly(sock, 3) == b"bye" and sock.recv(1) == b""
    assert not service.server.clients


def test_a_guest_that_does_not_read_stops_nobody(service: Service, client: MachineClient) -> None:
    service.stop_reading()
    with client.console() as sock, MachineClient("web") as other:
        sock.setblocking(False)
        sent = 0
        try:
            while True:
                sent += sock.send(b"x" * 10000)
                assert sent < 4 << 20
        except BlockingIOError:
            pass
        assert other.status().name == "web"
        service.on_loop(lambda: service.loop.watch(service.hub.input_fd, service._typed))
        while len(service.typed) < sent:
            assert service.typing.wait(10)
            service.typing.clear()
        assert service.typed == b"x" * sent


def test_log(service: Service) -> None:
    service.hub.write(b"a" * 1000 + b"b" * 1000 + b"c" * 10)
    with MachineClient("web") as client, client.log() as sock:
        assert read_exactly(sock, 1010) == b"b" * 1000 + b"c" * 10
        assert sock.recv(1) == b""
    with MachineClient("web") as client, client.log(follow=True) as sock:
        service.hub.write(b"d")
        assert read_exactly(sock, 1011)[-2:] == b"cd"


@pytest.mark.parametrize("command", ["log", "console"])
def test_nothing_falls_between_log_and_stream(
    service: Service, client: MachineClient, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = service.hub.log.read

    def read_and_be_overtaken() -> bytes:
        kept = read()
        service.hub.write(b"between")
        return kept

    monkeypatch.setattr(service.hub.log, "read", read_and_be_overtaken)
    with client.log(follow=True) if command == "log" else client.console(replay=100) as sock:
        assert read_exactly(sock, 7) == b"between"


def test_a_slow_reader_loses_the_oldest_and_stops_nobody(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "STREAM_LIMIT", 50000)
    with MachineClient("web") as client, client.console() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for number in range(400):
            service.on_loop(lambda number=number: service.hub.write(b"%04d" % number * 500))  # type: ignore[misc]
            service.on_loop(lambda: None)
        with MachineClient("web") as other:
            assert other.status().name == "web"
        service.finish_later = threading.Thread(target=service.finish, args=(0, "off"))  # type: ignore[attr-defined]
        service.finish_later.start()  # type: ignore[attr-defined]
        slow.settimeout(10)
        text = b""
        while data := slow.recv(65536):
            text += data
        service.finish_later.join()  # type: ignore[attr-defined]
    assert text.startswith(b"0000" * 500)
    assert b"bytes of console output lost]" in text
    assert text.endswith(b"0399" * 500)


def test_a_reader_that_never_reads_does_not_hold_up_the_end(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "FAREWELL_SECONDS", 0.1)
    with MachineClient("web") as client, client.console():
        for _ in range(20):
            service.on_loop(lambda: service.hub.write(b"x" * 50000))
        service.finish(0, "off")


def test_events_nobody_reads_close_the_connection(
    service: Service, monkeypatch: pytest.MonkeyPatch, client: MachineClient
) -> None:
    monkeypatch.setattr(server, "MAX_RESPONSE", 1000)
    client._ask("events")
    deadline = time.monotonic() + 30
    while service.server.clients and time.monotonic() < deadline:
        service.on_loop(lambda: service.server.tell("paused"))
    assert not service.server.clients


def test_half_closed_clients_get_what_they_wait_for(service: Service, raw: Raw) -> None:
    raw.sock.sendall(b'{"v":1,"id":1,"command":"wait"}\n')
    raw.sock.shutdown(socket.SHUT_WR)
    with MachineClient("web") as other:
        other.status()
    service.finish(3, "off")
    assert json.loads(raw.file.readline())["result"] == {"code": 3, "reason": "off"}
    assert raw.at_end()


def test_a_client_that_leaves_is_forgotten(service: Service) -> None:
    service.machine.holds_pauses = True
    client = MachineClient("web")
    client._send("pause")
    with MachineClient("web") as other:
        other.status()
        client.close()
        deadline = time.monotonic() + 10
        while len(service.server.clients) > 1:
            assert time.monotonic() < deadline
            other.status()
        service.on_loop(lambda: service.machine.paused[0](None))
        other.status()


def test_a_late_waiter_is_in_time(service: Service) -> None:
    """Connected and asked, but the loop never came to it; one connection of it was not even accepted."""
    with MachineClient("web") as known:
        known.status()
        service.stop()
        numbers = [(known, known._send("wait"))]
        with MachineClient("web") as unknown:
            numbers.append((unknown, unknown._send("wait")))
            service.finish(4, "off")
            for client, number in numbers:
                assert client._receive(number, 10) == {"code": 4, "reason": "off"}


def test_no_descriptors_left(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop does not spin on a connection it cannot take, and takes it when it can."""
    monkeypatch.setattr(server, "ACCEPT_AGAIN_SECONDS", 0.05)
    attempts = []

    class Poor:
        def __init__(self, listener: socket.socket) -> None:
            self.listener = listener

        def accept(self) -> tuple[socket.socket, Any]:
            attempts.append(time.monotonic())
            if len(attempts) < 4:
                raise OSError(24, "Too many open files")
            return self.listener.accept()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.listener, name)

    service.on_loop(lambda: setattr(service.server, "_listener", Poor(service.server._listener)))
    with MachineClient("web") as client:
        assert client.status().name == "web"
    assert len(attempts) == 4
