"""The pager: fills a restored machine's memory from its snapshot when somebody touches it. Pager process.

It is a process of its own for two reasons: a thread of the VMM that waits for a page while it has the GIL
would wait for ever for a pager in the same interpreter, and what goes wrong here (a disk that fails, a file
that was damaged) must not take the VMM's threads with it. It is started as workers are
(`devices.worker.launcher`), in the same sandbox with fewer system calls still. Its words:

    channel=FD  memory=FD  checksums=FD  prefetch=0|1  parent=PID

Its clients are the processes that map guest memory. Each has a userfaultfd that says which address is
touched. What a worker says of its address space is not to be trusted, since a guest may have taken it over:
contents go in through the VMM's mapping only, and a worker is told to look again. A worker that lies about
where its regions are stops itself.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import sys
from _socket import socket

from devices.pager import userfaultfd
from devices.pager.checksums import CHUNK_SIZE, Checksums
from devices.pager.messages import CHUNK, CLIENT, MAPPING, VMM_SLOT, Report, Request
from devices.vhost.channel import Channel
from devices.worker import sandbox, seccomp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

EXIT_FAILURE = 1


class Client:
    """A process that maps guest memory. Owns its userfaultfd."""

    __slots__ = ("mappings", "uffd")

    def __init__(self, uffd: int, mappings: list[tuple[int, int, int]]) -> None:
        self.uffd = uffd
        self.mappings = mappings

    def locate(self, address: int) -> tuple[int, int, int] | None:
        """The chunk that `address` is in, and where this client has it: (chunk, address, size)."""
        for start, size, offset in self.mappings:
            if start <= address < start + size:
                chunk = (address - start + offset) // CHUNK_SIZE
                first = max(chunk * CHUNK_SIZE, offset)
                end = min((chunk + 1) * CHUNK_SIZE, offset + size)
                return chunk, start + first - offset, end - first
        return None

    def address(self, offset: int) -> int:
        """Where this client has the byte at `offset` in guest RAM's file. Raises LookupError."""
        for start, size, first in self.mappings:
            if first <= offset < first + size:
                return start + offset - first
        raise LookupError(f"nothing is mapped from offset {offset:#x}")

    def wake_all(self) -> None:
        for start, size, _ in self.mappings:
            userfaultfd.wake(self.uffd, start, size)


class ChunkDamaged(Exception):
    """The memory file has other bytes than were saved."""

    def __init__(self, chunk: int) -> None:
        super().__init__(f"chunk {chunk} of the memory file is damaged")
        self.chunk = chunk


class Pager:
    """Owns its descriptors until the process ends."""

    __slots__ = (
        "_buffer",
        "_channel",
        "_checksums",
        "_clients",
        "_epoll",
        "_last",
        "_memory_fd",
        "_missing",
        "_prefetch",
        "_remaining",
        "_source",
    )

    def __init__(self, channel: Channel, memory_fd: int, checksums: Checksums, prefetch: bool) -> None:
        self._channel = channel
        self._memory_fd = memory_fd
        self._checksums = checksums
        self._prefetch = prefetch
        self._clients: dict[int, Client] = {}
        self._missing = bytearray(checksums.kinds)  # 1: has data, and is not known to be in
        self._remaining = checksums.data_chunks
        self._last = 0
        # Page-aligned and at one address for good: the kernel copies from here.
        pages = mmap.mmap(-1, CHUNK_SIZE)
        self._buffer = memoryview(pages)
        self._source = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        self._epoll = select.epoll()
        self._epoll.register(channel.fileno(), select.EPOLLIN)

    @property
    def fds(self) -> tuple[int, ...]:
        """The descriptors it has made for itself."""
        return (self._epoll.fileno(),)

    def serve(self) -> None:
        """Until all is in, or the VMM is gone (EOFError). Raises ChunkDamaged, and OSError for the host's
        failures.
        """
        while self._remaining or VMM_SLOT not in self._clients:
            busy = self._prefetch and VMM_SLOT in self._clients
            for fd, _ in self._epoll.poll(0 if busy else -1):
                if fd == self._channel.fileno():
                    self._take_request()
                else:
                    self._take_faults(fd)
            if busy and self._remaining:
                self._bring(self._nearest())  # one only: who waits for a page comes first
        self._channel.send(Report.COMPLETE)

    def _take_request(self) -> None:
        message = self._channel.receive()
        try:
            if message.request == Request.PREFETCH:
                self._prefetch = True
            elif message.request == Request.ADD_CLIENT:
                slot, count = CLIENT.unpack_from(message.payload)
                mappings = [
                    MAPPING.unpack_from(message.payload, CLIENT.size + number * MAPPING.size)
                    for number in range(count)
                ]
                self._add(slot, Client(message.take_fd(), mappings))
        finally:
            message.close()

    def _add(self, slot: int, client: Client) -> None:
        former = self._clients.pop(slot, None)
        if former is not None:
            self._ignore(former)
            os.close(former.uffd)
        self._clients[slot] = client
        try:
            # What a pager that died had read and not answered is asked again. And only a userfaultfd takes
            # this: a worker that was taken over may give a socket of its own, where a read would wait.
            client.wake_all()
            self._epoll.register(client.uffd, select.EPOLLIN)
        except OSError:
            if slot == VMM_SLOT:
                raise

    def _take_faults(self, fd: int) -> None:
        client = next((client for client in self._clients.values() if client.uffd == fd), None)
        if client is None:
            return  # replaced by the message just before, in the same round
        vmm = self._clients[VMM_SLOT]
        for address in userfaultfd.faults(fd):
            place = client.locate(address)
            if place is None:
                continue
            try:
                filled = self._bring_if_missing(place[0])
            except ProcessLookupError:
                raise EOFError from None  # the VMM is gone
            if filled and client is vmm:
                continue  # filling woke it
            try:
                self._answer(client, *place)
            except ProcessLookupError:
                if client is vmm:
                    raise EOFError from None
                self._ignore(client)  # a worker that is gone; the next one brings its own
                return
            except OSError:
                if client is vmm:
                    raise
                # A worker whose memory is not what it said. Whoever waits there waits; nobody else does.

    def _ignore(self, client: Client) -> None:
        try:
            self._epoll.unregister(client.uffd)
        except FileNotFoundError:
            pass  # ignored before, or never listened to
        except PermissionError:
            pass  # nothing that could be listened to

    def _bring_if_missing(self, chunk: int) -> bool:
        """Whether it was."""
        if not self._missing[chunk]:
            return False
        self._last = chunk
        self._bring(chunk)
        return True

    def _answer(self, client: Client, chunk: int, address: int, size: int) -> None:
        if not self._checksums.is_data(chunk):
            # In the client's own address space: where memory has no data at all, the VMM's is not registered.
            userfaultfd.zero(client.uffd, address, size)
            return
        self._last = chunk
        userfaultfd.wake(client.uffd, address, size)

    def _bring(self, chunk: int) -> None:
        start, size = chunk * CHUNK_SIZE, self._checksums.length(chunk)
        data = self._buffer[:size]
        # A private copy is checked, and nothing else is handed on: the file may change meanwhile.
        count = os.preadv(self._memory_fd, [data], start)
        if not self._checksums.matches(chunk, data[:count]):
            raise ChunkDamaged(chunk)
        vmm = self._clients[VMM_SLOT]
        userfaultfd.copy(vmm.uffd, vmm.address(start), self._source, size)
        self._missing[chunk] = 0
        self._remaining -= 1

    def _nearest(self) -> int:
        """The chunk not brought in that is next to the last one touched."""
        above = self._missing.find(1, self._last)
        below = self._missing.rfind(1, 0, self._last)
        if above < 0 or (below >= 0 and self._last - below < above - self._last):
            return below
        return above


def serve(words: dict[str, str], debug: bool) -> None:
    sock = socket(fileno=int(words["channel"]))
    memory_fd, checksums_fd = int(words["memory"]), int(words["checksums"])
    checksums = Checksums(os.pread(checksums_fd, os.fstat(checksums_fd).st_size, 0))
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    channel = Channel(sock)
    pager = Pager(channel, memory_fd, checksums, words.get("prefetch") == "1")
    try:
        os.close(-1)
    except OSError as error:
        str(error).encode("utf-8", "backslashreplace")  # while codecs can still be loaded
    refused = sandbox.enter(
        (0, 1, 2, sock.fileno(), memory_fd, *pager.fds), int(words["parent"]), seccomp.PAGER_ALLOWED
    )
    if debug:
        for layer, why in refused:
            say(f"sandbox without {layer}: {why}")
    try:
        pager.serve()
    except EOFError:
        pass  # the VMM needs it no more
    except ChunkDamaged as error:
        channel.send(Report.BAD_CHUNK, CHUNK.pack(error.chunk))


def say(text: str) -> None:
    try:
        os.write(2, f"vmrun worker pager: {' '.join(text.split())}\n".encode("utf-8", "backslashreplace"))
    except OSError:
        pass  # nobody listens


def main() -> NoReturn:
    status = 0
    debug = "VMRUN_DEBUG" in os.environ
    try:
        # The kind and the name come first, as for any worker.
        serve(dict(word.split("=", 1) for word in sys.argv[3:]), debug)
    except BaseException as error:
        say(
            error.strerror
            if isinstance(error, OSError) and error.strerror
            else f"{type(error).__name__}: {error}"
        )
        status = EXIT_FAILURE
    os._exit(status)
