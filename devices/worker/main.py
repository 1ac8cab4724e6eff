"""The entry point of a worker: parse, import, rehearse failing, enter the sandbox, serve vhost-user until
EOF.

`devices.worker.launcher` starts it as `python3 -I -S -c STUB KIND NAME key=value...`: isolated and without
site, which halves the start of the interpreter. Words that name inherited descriptors: `channel` (a connected
UNIX stream socket, or a listening one, on which one connection is accepted), and `image`, `tap` or `stream`.
To serve another VMM by hand, give it a listening socket.

Kinds and their other words:
    blk   format=raw|qcow2  read_only=0|1  serial=TEXT
          backing=qcow2,raw  backing0=FD  backing1=FD ...  journal=FD  zstd=1
          `backing` has the formats of the backing files, nearest first; `journal` is a memfd for a qcow2
          image (devices.block.qcow2_journal) that the next worker replays after this one was killed; `zstd`
          says that one of the images is compressed so, for the library must be loaded before the sandbox.
    net   mac=52:54:00:12:34:56  mtu=1500  locked=0|1
          local=100.64.1.2  hostmac=52:54:00:12:34:57  boot=FILE  hostname=NAME
          `local` is the host's address; the guest's is one higher. With it the card answers DHCP, in the name
          of `hostmac`, the tap's own MAC. Nobody tells a worker that the tap's MAC changed later, and nobody
          need: clients broadcast their requests, and find the host by ARP before they send it anything else.

          `stream` in the place of `tap` is a socket on which passt(1) serves the network. Then `local` and
          `hostmac` are a must, and there are the rules of devices.net.filter:
          allow=10.0.0.0/8:0+192.0.2.1/32:443  own=192.0.2.2+192.0.2.3  private=0|1
          (a port of 0 is every port).

Any kind: parent=PID, the process to die with; userfault=FD, an open /dev/userfaultfd, for guest memory that
is filled while it is used (devices.pager); memory=BYTES, how much guest memory it will be given, so that it
can take no more; quota=BYTES, how large its image may grow: a write beyond fails.

A worker that fails says so in one line on stderr and exits with EXIT_FAILURE, or EXIT_IMAGE when its disk
image is to blame. With VMRUN_DEBUG in the environment it also says what the sandbox could not do, and shows
tracebacks.
"""

from __future__ import annotations

import os
import sys
from _socket import SHUT_RD, SO_ACCEPTCONN, SOL_SOCKET, inet_aton, socket

from devices.block import zstd
from devices.block.open import open_image
from devices.errors import GuestError, ImageError
from devices.net.dhcp import Lease
from devices.net.filter import Network, OutboundFilter, Rules
from devices.pager import userfaultfd
from devices.vhost.backend import Backend
from devices.vhost.channel import Channel
from devices.vhost.messages import ProtocolError
from devices.virtio.blk import BlkDevice
from devices.virtio.net import NetDevice
from devices.virtio.net_stream import StreamNetDevice
from devices.worker import sandbox
from devices.worker.ring import RingServer

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from typing import NoReturn

    from devices.worker.ring import RingDevice
else:
    import _signal  # `signal` builds enums from it, for 2 ms

EXIT_FAILURE = 1
EXIT_IMAGE = 66

# The descriptor each kind needs beside the channel.
KINDS = {"blk": "image", "net": "tap"}
MAX_MESSAGE = 1000
# A guest may break a ring again and again: the pipe must keep room for what the worker has to say at its end.
MAX_REPORTS = 32


class Complaint:
    """Says what went wrong, on stderr, one line at a time, in the worker's name."""

    __slots__ = ("_name", "_reports", "debug")

    def __init__(self, name: str, debug: bool) -> None:
        self._name = name
        self._reports = 0
        self.debug = debug

    def say(self, text: str) -> None:
        line = f"vmrun worker {self._name}: {' '.join(text.split())}"
        try:
            os.write(2, line.encode("utf-8", "backslashreplace")[:MAX_MESSAGE] + b"\n")
        except OSError:
            pass  # nobody listens, or the pipe is full of what nobody read

    def say_error(self, error: BaseException) -> None:
        """What is expected to fail speaks for itself; anything else is a bug and has its kind named."""
        if isinstance(error, OSError) and error.strerror:
            self.say(error.strerror)
        elif isinstance(error, OSError | ImageError | ProtocolError | GuestError | ValueError):
            self.say(str(error))
        else:
            self.say(f"{type(error).__name__}: {error}")
        if self.debug:
            import traceback  # `rehearse` has imported it before the sandbox

            os.write(2, "".join(traceback.format_exception(error)).encode("utf-8", "backslashreplace"))

    def report(self, text: str) -> None:
        """What the guest did wrong: said, but not for ever."""
        self._reports += 1
        if self._reports <= MAX_REPORTS:
            self.say(text)

    def fatal(self, text: str) -> NoReturn:
        """For the rings' threads: the process ends here and now."""
        self.say(text)
        os._exit(EXIT_FAILURE)

    def rehearse(self) -> None:
        """Fail once while modules and codecs can still be loaded: in the sandbox a lazy import is a
        second failure.
        """
        try:
            os.close(-1)
        except OSError as error:
            f"{error}: {error.strerror}".encode("utf-8", "backslashreplace")
            if self.debug:
                import traceback

                traceback.format_exception(error)


class Options:
    """The command line, checked."""

    __slots__ = (
        "backing",
        "channel",
        "fd",
        "journal",
        "kind",
        "memory",
        "name",
        "parent",
        "quota",
        "streams",
        "userfault",
        "words",
    )

    def __init__(self, arguments: list[str]) -> None:
        """Raises ValueError, naming the word that is wrong."""
        if len(arguments) < 2 or arguments[0] not in KINDS:
            raise ValueError("start it as: KIND NAME key=value...")
        self.kind, self.name = arguments[:2]
        self.words: dict[str, str] = {}
        for word in arguments[2:]:
            key, separator, value = word.partition("=")
            if not separator:
                raise ValueError(f"{word!r} is not key=value")
            self.words[key] = value
        self.channel = self._number("channel")
        self.streams = self.kind == "net" and "stream" in self.words
        self.fd = self._number("stream" if self.streams else KINDS[self.kind])
        self.parent = self._number("parent") if "parent" in self.words else None
        self.journal = self._number("journal") if "journal" in self.words else None
        self.userfault = self._number("userfault") if "userfault" in self.words else None
        self.memory = self._number("memory") if "memory" in self.words else None
        self.quota = self._number("quota") if "quota" in self.words else None
        self.backing: list[tuple[str, int]] = []
        if "backing" in self.words:
            for index, fmt in enumerate(self.words["backing"].split(",")):
                self.backing.append((fmt, self._number(f"backing{index}")))

    @property
    def fds(self) -> tuple[int, ...]:
        """All descriptors but the channel."""
        journal = () if self.journal is None else (self.journal,)
        return (self.fd, *(fd for _, fd in self.backing), *journal)

    def _number(self, key: str) -> int:
        text = self.words.get(key, "")
        if not text.isdecimal():
            raise ValueError(f"{key}={text} is not a number")
        return int(text)


def open_device(options: Options) -> RingDevice:
    """In the sandbox: what parses a disk image needs it as much as what serves the guest. Owns
    `options.fds`.
    """
    words = options.words
    if options.kind == "blk":
        backing = None
        for fmt, fd in reversed(options.backing):
            backing = open_image(fmt, fd, True, backing)
        read_only = words.get("read_only", "0") == "1"
        image = open_image(words.get("format", "raw"), options.fd, read_only, backing, options.journal)
        return BlkDevice(image, words.get("serial", options.name).encode("utf-8", "replace"))
    mac = _mac(words.get("mac", ""))
    mtu = int(words["mtu"]) if "mtu" in words else None
    if options.streams:
        lease = _lease(words, mac)
        if lease is None:
            raise ValueError("a network by stream= needs local=")
        outbound = OutboundFilter(lease.address, lease.server, _rules(words))
        return StreamNetDevice(options.fd, mac, mtu, lease=lease, outbound=outbound)
    return NetDevice(options.fd, mac, mtu, locked=words.get("locked", "0") == "1", lease=_lease(words, mac))


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def _lease(words: dict[str, str], mac: bytes) -> Lease | None:
    if "local" not in words:
        return None
    server = inet_aton(words["local"])
    return Lease(
        mac,
        (int.from_bytes(server, "big") + 1).to_bytes(4, "big"),
        _mac(words.get("hostmac", "")),
        server,
        os.fsencode(words.get("boot", "")),
        words.get("hostname", "").encode("ascii", "ignore"),
    )


def _rules(words: dict[str, str]) -> Rules:
    allowed = []
    for rule in _list(words, "allow"):
        network, _, port = rule.partition(":")
        allowed.append((Network(network), int(port)))
    own = [Network(address) for address in _list(words, "own")]
    return Rules(allowed, own, words.get("private", "0") == "1")


def _list(words: dict[str, str], key: str) -> list[str]:
    return words[key].split("+") if words.get(key) else []


def connect(fd: int) -> socket:
    """The channel's socket; of a listening one, the first connection."""
    sock = socket(fileno=fd)
    if sock.getsockopt(SOL_SOCKET, SO_ACCEPTCONN):
        accepted, _ = sock._accept()  # type: ignore[attr-defined]  # what `socket` wraps
        sock.close()
        sock = socket(fileno=accepted)
    return sock


def end_on_signal(sock: socket) -> None:
    """SIGTERM and SIGINT end the session as if the front end had closed the channel: requests end, the image
    is flushed.

    A signal that comes just before recvmsg waits there is noticed at the next message only; the launcher
    kills then.
    """

    def end(number: int, frame: object) -> None:
        try:
            sock.shutdown(SHUT_RD)
        except OSError:
            pass  # the front end was faster

    _signal.signal(_signal.SIGTERM, end)
    _signal.signal(_signal.SIGINT, end)


def serve(options: Options, complaint: Complaint) -> None:
    """Returns when the front end closed the channel and everything is flushed and closed."""
    sock = connect(options.channel)
    end_on_signal(sock)
    if options.kind == "net":
        os.set_blocking(options.fd, False)  # what NetDevice wants, and the sandbox no longer allows
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    uffd = -1
    if options.userfault is not None:
        uffd = userfaultfd.create(options.userfault)
        os.close(options.userfault)
    complaint.rehearse()
    if options.words.get("zstd") == "1":
        zstd.load()
    own = (uffd,) if uffd >= 0 else ()
    refused = sandbox.enter(
        (0, 1, 2, sock.fileno(), *own, *options.fds),
        options.parent,
        memory=options.memory,
        quota=options.quota,
    )
    if complaint.debug:
        for layer, why in refused:
            complaint.say(f"sandbox without {layer}: {why}")
    server = RingServer(open_device(options), complaint.report, complaint.fatal)
    try:
        Backend(Channel(sock), server, uffd).serve()
    finally:
        server.close()


def main() -> NoReturn:
    arguments = sys.argv[1:]
    debug = "VMRUN_DEBUG" in os.environ
    complaint = Complaint(arguments[1] if len(arguments) > 1 else "?", debug)
    status = 0
    try:
        serve(Options(arguments), complaint)
    except ImageError as error:
        complaint.say_error(error)
        status = EXIT_IMAGE
    except BaseException as error:
        complaint.say_error(error)
        status = EXIT_FAILURE
    # Everything is closed; what the interpreter would tidy up beyond that, the kernel does faster.
    os._exit(status)
