"""Linux's own driver of the virtio console: ports by name, both streams at once, clients that come and go, a
port that comes, floods and goes, a terminal that is resized, a restored device.
"""

import hashlib
import json
import os
import socket
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from devices.virtio.console import VirtioConsole
from devices.virtio.device import ActiveDriver, QueueConfig
from devices.virtio.transport import VirtioPciFunction
from tests.guest.conftest import Build, MakeInitramfs
from vmrun.guestkit import kit
from vmrun.host.console import Console
from vmrun.machine.config import MachineConfig
from vmrun.machine.machine import Machine
from vmrun.machine.ports import PortLink, PortListener

MIB = 1 << 20
PROGRAM = Path(__file__).with_name("port_echo.c")
TIMEOUT = 400.0  # a kernel that is interpreted copies about 0.6 MiB/s each way


class Guest:
    """A machine with a console device, and what its clients do, which is `script`, in a thread of its own."""

    def __init__(self, stack: ExitStack, initrd: Path, directory: Path, amount: int) -> None:
        self.amount = amount
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, null)
        self.seen = bytearray()
        self.machine = Machine(MachineConfig(initrd=initrd), stack.enter_context(Console(null, null)), stack)
        self.machine.uart.output = self.seen.extend
        self.path = directory / "echo"
        self.terminal, self.flood = (self._pair(stack) for _ in range(2))
        self._stack = stack
        self._build()
        self._add("test.hvc", self.terminal[0], console=True)
        self.machine._plug_virtio_device(self.device, "console")
        self.failure: BaseException | None = None

    def _build(self) -> None:
        self.device = VirtioConsole(self.machine.ram.memory, self.machine.board, size=(90, 90))
        self.listener = PortListener(self.machine.loop, [self.device.add_port("test.echo")], self.path)
        self._stack.callback(self.listener.close)

    def _pair(self, stack: ExitStack) -> tuple[socket.socket, socket.socket]:
        ours, theirs = socket.socketpair()
        theirs.settimeout(TIMEOUT)
        stack.enter_context(theirs)
        return ours, theirs

    def _add(self, name: str, end: socket.socket, *, console: bool = False) -> None:
        link = PortLink(self.machine.loop, self.device.add_port(name, console=console))
        self._stack.callback(link.close)
        link.connect(end)

    def echo(self, amount: int) -> tuple[str, str]:
        """Send `amount` random bytes while they come back. The hashes of both."""
        sent, received = hashlib.sha256(), hashlib.sha256()
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(TIMEOUT)
            client.connect(str(self.path))

            def send() -> None:
                left = amount
                while left:
                    data = os.urandom(min(left, 1 << 16))
                    sent.update(data)
                    client.sendall(data)
                    left -= len(data)

            sender = threading.Thread(target=send)
            sender.start()
            left = amount
            while left:
                data = client.recv(min(left, 1 << 18))
                assert data, f"the end, {left} bytes early"
                received.update(data)
                left -= len(data)
            sender.join()
        return sent.hexdigest(), received.hexdigest()

    def restore(self) -> None:
        """Put another device, which has the state of ours, in its place, as after a snapshot."""
        done = threading.Event()

        def swap(error: str | None) -> None:
            assert error is None
            before = self.device
            before.pause()
            state = json.loads(json.dumps(before.save()))
            functions = [f for f in self.machine.pci.functions.values() if isinstance(f, VirtioPciFunction)]
            function = next(f for f in functions if f.device is before)
            queues = tuple(
                QueueConfig(queue.index, queue.size, queue.descriptors, queue.available, queue.used)
                for queue in function.queues
                if queue.enabled
            )
            self.listener.close()
            self._build()
            self.device.load(state, ActiveDriver(function.driver_features, queues, function))
            function.device = self.device
            before.close()
            self.device.unpause()
            self.machine.pause.resume()
            done.set()

        self.machine.loop.call_soon(lambda: self.machine.pause.pause(swap))
        assert done.wait(60)

    def line(self) -> bytes:
        """A line from the terminal."""
        text = b""
        while not text.endswith(b"\n"):
            text += self.terminal[1].recv(1)
        return text.strip()

    def script(self) -> None:
        try:
            # The first client is there before the guest is.
            sent, received = self.echo(100_000)
            assert sent == received
            # A port that was not there at the start, and whose output nobody reads.
            self.machine.loop.call_soon(lambda: self._add("test.flood", self.flood[0]))
            sent, received = self.echo(self.amount)
            assert sent == received
            # The size comes with the driver's last steps; until then the guest may find none, more than once.
            before = (b"size 0 0", b"size 90 90")
            assert self.line() in before
            self.device.resize(50, 50)
            while (line := self.line()) != b"size 50 50":
                assert line in before
            # The flood is there, and goes on when somebody reads.
            left = 2 * MIB
            while left > 0:
                left -= len(self.flood[1].recv(1 << 18))
            self.device.remove_port("test.flood")
            while self.flood[1].recv(1 << 18):
                pass
            sent, received = self.echo(100_000)
            assert sent == received
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(self.path))
                self.restore()
                assert client.recv(1) == b""
            sent, received = self.echo(100_000)
            assert sent == received
        except BaseException as failure:
            self.failure = failure
        self.machine.end(0, "all was said")


@pytest.mark.timeout(500)
@pytest.mark.parametrize(
    "amount", [MIB, pytest.param(64 * MIB, marks=[pytest.mark.slow, pytest.mark.by_hand])]
)
def test_ports(
    guest_kit: kit.GuestKit, static_program: Build, initramfs: MakeInitramfs, tmp_path: Path, amount: int
) -> None:
    initrd = initramfs({"init": static_program([PROGRAM], "init")})
    with ExitStack() as stack:
        guest = Guest(stack, initrd, tmp_path, amount)
        clients = threading.Thread(target=guest.script)
        clients.start()
        outcome = guest.machine.run(timeout=TIMEOUT)
    clients.join(10)
    if guest.failure is not None:
        raise guest.failure
    assert outcome.reason == "all was said", guest.seen.decode(errors="replace")[-2000:]
    assert b"test.echo is /dev/vport" in guest.seen
