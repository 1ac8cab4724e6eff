"""passt(1), which gives a card a network without root: it makes the host's own sockets of what the guest
sends. Found, started, watched and ended here, one for each card. VMM process.

It is given one connected socket and nothing else, listens to nobody, and ends with the socket: when the VMM
is killed, its worker is too, and then nobody holds the other end. It brings a sandbox of its own, and as root
changes to nobody first. What its network looks like to the guest is fixed, whatever the host's is like:

- 100.64.0.(2K+3) is the guest's address, for card K of the machine, 100.64.0.(2K+2) its gateway and name
  server: a /31 of the block that `local` cards leave free (`vmrun.host.local`). passt answers no DHCP: the
  card's worker does.
- Names go to the first name server in the host's /etc/resolv.conf, over UDP only, which is what passt can
  forward. Before 2024 it cannot to one on the host's loopback (systemd-resolved's 127.0.0.53).
- Only IPv4. Where to is for `devices.net.filter` to say.
"""

import fcntl
import os
import select
import shutil
import signal
import socket
import struct
from types import TracebackType

from vmrun.errors import EXIT_USAGE, EXIT_VMM, UserError

NETWORK = "100.64.0."
MAX_CARDS = 126
# Locally administered, and the same in every machine: a clone's guest remembers it from before.
GATEWAY_MAC = bytes.fromhex("020064400002")
OTHER_GATEWAY_MAC = bytes.fromhex("020064400003")  # for a guest that has the first itself

STREAM = 3  # the descriptor of its socket in passt
READY_SECONDS = 10.0
STOP_SECONDS = 2.0
# Room for some of the longest frames on the way.
SOCKET_BUFFER = 1 << 20
MAX_SAID = 4096
# What it says without need, when there is no system log, and as root.
NOISE = ("Failed to send", "Don't run as root", "Started in foreground")

_arp = struct.Struct(">6s6sHHHBBH6s4s6s4s")
ETHERTYPE_ARP = 0x0806
LONGEST_ANSWER = 1514


def guest_address(number: int) -> tuple[str, str]:
    """The address of card `number` of a machine, and its gateway's, which is its name server as well."""
    return f"{NETWORK}{2 * number + 3}", f"{NETWORK}{2 * number + 2}"


def find() -> str:
    """Where passt is. UserError when it is not."""
    path = shutil.which("passt")
    if path is None:
        raise UserError(
            "--nic user: passt is not installed: install it (Debian: apt install passt), or use a tap"
        )
    return path


def _closings() -> list[tuple[int, int]]:
    """Whoever started us may have left us descriptors that children inherit: not this one."""
    closings = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if int(name) > STREAM and os.get_inheritable(int(name)):
                closings.append((os.POSIX_SPAWN_CLOSE, int(name)))
        except OSError:
            pass  # that of the directory itself
    return closings


class Passt:
    """A passt for card `number` of a machine, whose guest has `mac`. A context manager that owns the process,
    `fd`, our end of its socket, and `pidfd`, which is readable when passt has ended.

    Returns while passt still starts: `wait_ready` before anybody uses the socket. Raises UserError and
    OSError.
    """

    def __init__(self, number: int, mac: bytes) -> None:
        if number >= MAX_CARDS:
            raise UserError(f"--nic user: only the first {MAX_CARDS} cards can be")
        self.guest, self.gateway = guest_address(number)
        self.mac = mac
        self.gateway_mac = OTHER_GATEWAY_MAC if mac == GATEWAY_MAC else GATEWAY_MAC
        self.fd = self.pidfd = self._said_fd = -1
        self.pid = 0
        self._end: os.waitid_result | None = None
        try:
            self._start(find())
        except BaseException:
            self.close()
            raise

    def _command(self, path: str) -> list[str]:
        return [
            *(path, "--foreground", "--quiet", "--fd", str(STREAM), "--ipv4-only"),
            *("--address", self.guest, "--netmask", "31", "--gateway", self.gateway),
            *("--mac-addr", self.gateway_mac.hex(":"), "--no-map-gw", "--no-dhcp"),
            # No --dns: passt of 2023 (Debian 12) forgets where to forward to when it is given one.
            *("--dns-forward", self.gateway, "--search", "none"),
            *("--tcp-ports", "none", "--udp-ports", "none"),
        ]

    def _start(self, path: str) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        said = -1
        high: list[int] = []
        try:
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
            ours.setblocking(False)
            self._said_fd, said = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            # Out of the way: a descriptor of ours may have the number that another one gets in passt.
            for fd in (said, theirs.fileno()):
                high.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, STREAM + 1))
            null = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in (0, 1)]
            copies = [(os.POSIX_SPAWN_DUP2, fd, target) for fd, target in zip(high, (2, STREAM), strict=True)]
            # A session of its own: Ctrl-C is for us. No environment: it needs none.
            self.pid = os.posix_spawn(
                path,
                self._command(path),
                {},
                file_actions=[*null, *copies, *_closings()],
                setsid=True,
                setsigmask=(),
                setsigdef=[signal.SIGTERM, signal.SIGINT, signal.SIGPIPE],
            )
            self.pidfd = os.pidfd_open(self.pid)
            self.fd = ours.detach()
        finally:
            ours.close()
            theirs.close()
            for fd in (said, *high):
                if fd >= 0:
                    os.close(fd)

    def wait_ready(self) -> None:
        """Wait until it answers. UserError when it ends instead, with what it said."""
        request = _arp.pack(
            *(b"\xff" * 6, self.mac, ETHERTYPE_ARP, 1, 0x0800, 6, 4, 1),
            *(self.mac, socket.inet_aton(self.guest), bytes(6), socket.inet_aton(self.gateway)),
        )
        try:
            os.write(self.fd, len(request).to_bytes(4, "big") + request)
            length = int.from_bytes(self._read(4), "big")
            if length > LONGEST_ANSWER:
                raise UserError(f"passt answered with {length} bytes to an ARP request", EXIT_VMM)
            self._read(length)
        except (BrokenPipeError, ConnectionResetError, EOFError):
            self._wait(STOP_SECONDS)
            raise UserError(f"--nic user: {self.describe_exit()}", EXIT_USAGE) from None

    def _read(self, size: int) -> bytes:
        ready = select.poll()
        ready.register(self.fd, select.POLLIN)
        data = b""
        while len(data) < size:
            if not ready.poll(READY_SECONDS * 1000):
                raise UserError(f"passt does not answer within {READY_SECONDS:g} s", EXIT_VMM)
            piece = os.read(self.fd, size - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def poll(self) -> bool:
        """Whether it has ended. Reaps it, once."""
        if self._end is None and self.pidfd >= 0:
            self._end = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
        return self._end is not None

    def _wait(self, seconds: float) -> bool:
        if not self.poll() and self.pidfd >= 0:
            ended = select.poll()
            ended.register(self.pidfd, select.POLLIN)
            ended.poll(seconds * 1000)
        return self.poll()

    def describe_exit(self) -> str:
        """How it ended, as one line, with what it said. After `poll`."""
        if self._end is None:
            return "passt is running"
        if self._end.si_code == os.CLD_EXITED:
            text = f"passt exited with status {self._end.si_status}"
        else:
            text = f"passt was killed by signal {self._end.si_status}"
        said = self._last_words()
        return f"{text}: {said}" if said else text

    def _last_words(self) -> str:
        """It is not trusted: only printable text goes to the user's terminal."""
        try:
            said = os.read(self._said_fd, MAX_SAID).decode("utf-8", "replace")
        except BlockingIOError:
            return ""
        lines = [line.strip() for line in said.split("\n")]
        text = "; ".join(line for line in lines if line and not line.startswith(NOISE))
        if "routable interface" in text:
            text += " (the host has no default route)"
        return "".join(character if character.isprintable() else "?" for character in text)

    def close(self) -> None:
        """End it, and let go of everything. Fine to call twice. TimeoutError when even SIGKILL does not."""
        if self.fd >= 0:
            with socket.socket(fileno=self.fd) as ours:
                self.fd = -1
                try:
                    # Not only a close: a worker may still have the socket.
                    ours.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # passt was faster
        for number in (None, signal.SIGTERM, signal.SIGKILL):
            if self.pidfd < 0 or self.poll():
                break
            if number is not None:
                try:
                    signal.pidfd_send_signal(self.pidfd, number)
                except PermissionError:
                    break  # it has another user id than a VMM that has confined itself
            self._wait(STOP_SECONDS)
        for fd in (self.pidfd, self._said_fd):
            if fd >= 0:
                os.close(fd)
        ended = self._end is not None or self.pidfd < 0
        self.pidfd = self._said_fd = -1
        if not ended:
            raise TimeoutError(f"passt (process {self.pid}) does not end")

    def __enter__(self) -> "Passt":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
