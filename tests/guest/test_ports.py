"""Linux's own driver of the virtio console: ports by name, both streams at once, clients that come and go, a
port that floods, a terminal that is resized.
"""

import hashlib
import os
import socket
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from devices.virtio.console import VirtioConsole
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
        device = VirtioConsole(self.machine.ram.memory, self.machine.board, size=(90, 90))
        self.device = device
        self.path = directory / "echo"
        loop = self.machine.loop
        echo = PortListener(loop, device.add_port("test.echo"), self.path)
        stack.callback(echo.close)
        self.terminal, self.flood = (self._pair(stack) for _ in range(2))
        for name, end in (("test.hvc", self.terminal[0]), ("test.flood", self.flood[0])):
            link = PortLink(loop, device.add_port(name, console=name == "test.hvc"))
            stack.callback(link.close)
            link.connect(end)
        self.machine._plug_virtio_device(device, "console")
        self.failure: BaseException | None = None

    def _pair(self, stack: ExitStack) -> tuple[socket.socket, socket.socket]:
        ours, theirs = socket.socketpair()
        theirs.settimeout(TIMEOUT)
        stack.enter_context(theirs)
        return ours, theirs

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

    def line(self) -> bytes:
        """A line from the terminal."""
        text = b""
        while not text.endswith(b"\n"):
            text += self.terminal[1].recv(1)
        return text.strip()

    def script(self) -> None:
        try:
            # The first client is there before the guest is.
            sent, received = self.echo(self.amount)
            assert sent == received
            sent, received = self.echo(100_000)
            assert sent == received
            assert self.line() in (b"size 0 0", b"size 90 90")  # which comes with the driver's last steps
            self.device.resize(50, 50)
            while (line := self.line()) != b"size 50 50":
                assert line == b"size 90 90"
            # All that while nobody read the flood; it is there, and goes on when somebody does.
            left = 2 * MIB
            while left > 0:
                left -= len(self.flood[1].recv(1 << 18))
        except BaseException as failure:
            self.failure = failure
        self.machine.end(0, "all was said")


@pytest.mark.timeout(500)
@pytest.mark.parametrize("amount", [MIB, pytest.param(64 * MIB, marks=pytest.mark.slow)])
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
