"""RAM that comes out of a snapshot: page by page when somebody touches it, or all at once. VMM process.

The memfd is empty at first. Every process that maps it registers its mapping with a userfaultfd, and a
process of its own (`devices.pager.main`) answers: so a restore takes the same time for any size of memory,
and a machine holds only what it touches. Where no userfaultfd is to be had everything is read in at the
start.

Three things must never happen, and each has its rule:
- A page that is missing reads as zeros. That is what the kernel does when the last descriptor of a
  userfaultfd is closed, so this process keeps one of each for as long as anything is missing.
- The guest hangs because its pager is gone. A thread here waits for the pager's end and starts another one,
  which has everybody that waits ask again. It is a thread and not the main loop because that one may itself
  be waiting for a page; and nobody in this process waits for a page with the GIL held, because
  `LazyGuestMemory` has pages brought in before it hands out a view of them.
- The machine goes on with bytes that are not what was saved. Whoever waits for such a page is let go only
  after the vCPUs were told to leave the guest and the workers were killed.
"""

import ctypes
import errno
import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from devices.memory import GuestMemory
from devices.pager import userfaultfd
from devices.pager.checksums import CHUNK_SIZE
from devices.pager.messages import CHUNK, CLIENT, MAPPING, VMM_SLOT, Report, Request
from devices.vhost.channel import Channel
from devices.vhost.messages import ProtocolError
from devices.worker.launcher import Worker, launch
from vmrun.errors import EXIT_IMAGE, EXIT_VMM
from vmrun.machine.memory import Ram
from vmrun.snapshot.memory_file import OpenMemory

# A pager may die so many times in so many seconds.
MAX_RESTARTS = 3
RESTART_WINDOW = 60.0
SEND_SECONDS = 5.0  # how long a pager may be too busy to take a message

MADV_POPULATE_READ = 22  # linux/mman.h, since 5.14; /dev/userfaultfd is younger

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

End = Callable[[int, str], None]
Mappings = list[tuple[int, int, int]]  # address, size, offset in the memfd


def launch_pager(memory: OpenMemory, *, prefetch: bool) -> Worker:
    """The process alone: it waits until it is told whose memory it is."""
    words = {"prefetch": str(int(prefetch))}
    return launch("pager", "pager", words, {"memory": memory.fd, "checksums": memory.checksums_fd})


class MemoryLost(OSError):
    """A page cannot be brought in any more. The machine is ending for it."""


class LazyGuestMemory(GuestMemory):
    """Guest memory whose views can be touched without waiting for the pager."""

    __slots__ = ("_here", "_lazy", "_mappings")

    def __init__(self, ram: Ram, lazy: "LazyRam", ranges: list[tuple[int, int]]) -> None:
        super().__init__(list(ram.memory.regions))
        self._lazy = lazy
        self._mappings = ram.mappings
        chunks = -(-sum(region.size for region in self.regions) // CHUNK_SIZE)
        self._here = bytearray(b"\1") * chunks
        for offset, size in ranges:
            first, count = offset // CHUNK_SIZE, -(-size // CHUNK_SIZE)
            self._here[first : first + count] = bytes(count)

    def find(self, gpa: int, size: int) -> memoryview | None:
        found = super().find(gpa, size)
        if found is not None and size and self._lazy.pending:
            self._bring(gpa, size)
        return found

    def _bring(self, gpa: int, size: int) -> None:
        for region, (address, length, offset) in zip(self.regions, self._mappings, strict=True):
            start = gpa - region.gpa
            if 0 <= start < length:
                first, last = (offset + start) // CHUNK_SIZE, (offset + start + size - 1) // CHUNK_SIZE
                chunk = self._here.find(0, first, last + 1)
                while chunk >= 0:
                    # One page of it: the pager brings in whole chunks.
                    self._touch(address - offset + chunk * CHUNK_SIZE)
                    self._here[chunk] = 1
                    chunk = self._here.find(0, chunk, last + 1)
                return

    def _touch(self, address: int) -> None:
        # ctypes lets go of the GIL for it.
        while _libc.madvise(address, 1, MADV_POPULATE_READ):
            error = ctypes.get_errno()
            if error not in (errno.EINTR, errno.EAGAIN):
                raise MemoryLost(error, f"guest memory: {os.strerror(error)}")
        if self._lazy.failed:
            raise MemoryLost(errno.EIO, "guest memory cannot be brought in")


class LazyRam:
    """Fills `ram` from `memory`, both of which must outlive it. A `devices.vhost.postcopy.LazyMemory`.

    Make it before anything keeps `ram.memory`, which it replaces, and before anything touches RAM. `start` as
    early as possible: the pager starts while the rest of the machine is made. Close it after the vCPUs have
    stopped and the workers are gone, before `ram`.

    When memory cannot be brought in any more, it calls, from a thread of its own, `end(exit code, reason)`
    and then `halt()`: that must tell every vCPU to leave the guest, and kill (SIGKILL) every worker, without
    waiting for any of them. With `prefetch` everything is brought in without being asked for; without, only
    what is touched. `pager` is one of `memory` that was launched earlier.
    """

    def __init__(
        self,
        ram: Ram,
        memory: OpenMemory,
        end: End,
        halt: Callable[[], None],
        *,
        prefetch: bool,
        pager: Worker | None = None,
    ) -> None:
        size = sum(region.size for region in ram.memory.regions)
        if size != memory.checksums.size:
            raise ValueError(f"the snapshot has {memory.checksums.size} bytes of memory, the machine {size}")
        self.failed = False
        self.restarts = 0
        # An open /dev/userfaultfd until `close`, which workers are given as `userfault`. -1: there is none.
        self.userfault_fd = -1
        self._pending = False
        self._ram = ram
        self._source = memory
        self._end = end
        self._halt = halt
        self._prefetch = prefetch
        self._launched = pager
        # Held while talking to the pager and while `_clients` changes, never while waiting for a page.
        self._lock = threading.Lock()
        self._clients: dict[str, tuple[int, int, Mappings]] = {}  # slot, userfaultfd, mappings
        self._unregistered: set[str] = set()  # clients whose memory is not registered yet
        self._deaths: deque[float] = deque()
        self._done = threading.Event()  # complete, failed or closed
        self._stop_fd = -1
        self._thread: threading.Thread | None = None
        self._worker: Worker
        self._channel: Channel

    @property
    def pending(self) -> bool:
        return self._pending

    def start(self) -> None:
        """Let RAM be filled from now on; or fill it, where the host gives no userfaultfd, which raises
        UserError when the memory file is damaged. Main thread: the pager dies with the thread that starts it.
        """
        try:
            self.userfault_fd = os.open(userfaultfd.DEVICE, os.O_RDWR | os.O_CLOEXEC)
            uffd = userfaultfd.create(self.userfault_fd)
        except OSError as error:
            self._drop_device()
            import logging  # here: it is rare, and every start would pay

            logging.getLogger(__name__).info(
                "memory is read at once: %s: %s", userfaultfd.DEVICE, error.strerror
            )
            self._fill()
            return
        self._clients["vmm"] = (VMM_SLOT, uffd, self._ram.mappings)
        ranges = self._source.checksums.ranges()
        for address, size in self._pieces(ranges):
            userfaultfd.register(uffd, address, size)
        self._pending = True
        self._ram.memory = LazyGuestMemory(self._ram, self, ranges)
        self._launch()
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._watch()

    def _watch(self) -> None:
        self._thread = threading.Thread(target=self._supervise, name="pager", daemon=True)
        self._thread.start()

    @contextmanager
    def unsupervised(self) -> Iterator[None]:
        """Meanwhile there is no thread here. A pager that dies is noticed afterwards, so touch no memory."""
        if self._thread is None:
            yield
            return
        os.eventfd_write(self._stop_fd, 1)
        self._thread.join()
        os.eventfd_read(self._stop_fd)
        try:
            yield
        finally:
            if not self._done.is_set():
                self._watch()

    def add_client(self, name: str, uffd: int, mappings: Mappings) -> None:
        """See `devices.vhost.postcopy.LazyMemory`."""
        with self._lock:
            if self.failed:
                os.close(uffd)
                raise MemoryLost(errno.EIO, "guest memory cannot be brought in")
            former = self._clients.pop(name, None)
            if former is not None:
                os.close(former[1])  # of a process that is gone, or of mappings that are
            slot = former[0] if former is not None else len(self._clients)
            self._clients[name] = (slot, uffd, mappings)
            self._unregistered.add(name)
            if self._pending:
                self._introduce(name)

    def client_registered(self, name: str) -> None:
        with self._lock:
            self._unregistered.discard(name)
            if not self._pending:
                self._let_go(name)

    def complete(self) -> None:
        """Returns when everything is in. Raises MemoryLost when that cannot be. Not for a thread that the
        pager's supervision depends on, of which there are none but its own.
        """
        with self._lock:
            self._prefetch = True
            if self._pending:
                self._tell(Request.PREFETCH)
        if self._thread is not None:
            self._done.wait()
        if self.failed or self._pending:
            raise MemoryLost(errno.EIO, "guest memory cannot be brought in")

    def close(self) -> None:
        if self._thread is not None:
            os.eventfd_write(self._stop_fd, 1)
            self._thread.join()
            self._thread = None
            os.close(self._stop_fd)
            self._channel.close()
            self._worker.stop(0)
        self._done.set()
        with self._lock:
            for _, uffd, _ in self._clients.values():
                os.close(uffd)
            self._clients.clear()
        self._drop_device()

    def __enter__(self) -> "LazyRam":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _drop_device(self) -> None:
        if self.userfault_fd >= 0:
            os.close(self.userfault_fd)
            self.userfault_fd = -1

    def _fill(self) -> None:
        source = self._source
        for chunk in source.data():
            data = source.read_chunk(chunk)
            # Into the page cache that all processes share. Nobody has RAM yet.
            while data:
                data = data[os.pwrite(self._ram.fd, data, (chunk + 1) * CHUNK_SIZE - len(data)) :]

    def _pieces(self, ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The addresses in this process, as (address, size), of ranges of the memfd."""
        pieces = []
        for start, size in ranges:
            for address, length, offset in self._ram.mappings:
                first, end = max(start, offset), min(start + size, offset + length)
                if first < end:
                    pieces.append((address + first - offset, end - first))
        return pieces

    def _launch(self) -> None:
        self._worker = self._launched or launch_pager(self._source, prefetch=self._prefetch)
        self._launched = None
        self._channel = Channel(self._worker.channel)
        for name in self._clients:
            self._introduce(name)

    def _introduce(self, name: str) -> None:
        slot, uffd, mappings = self._clients[name]
        payload = CLIENT.pack(slot, len(mappings)) + b"".join(MAPPING.pack(*mapping) for mapping in mappings)
        self._tell(Request.ADD_CLIENT, payload, (uffd,))

    def _tell(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        try:
            self._channel.send(request, payload, fds, timeout=SEND_SECONDS)
        except (EOFError, OSError):
            pass  # it has ended, which its supervisor sees; the next one is told everything

    def _supervise(self) -> None:
        while True:
            poll = select.poll()
            for fd in (self._stop_fd, self._channel.fileno(), self._worker.pidfd):
                poll.register(fd, select.POLLIN)
            ready = {fd for fd, _ in poll.poll()}
            if self._stop_fd in ready:
                return
            # First what it said: it ends after that.
            if self._channel.fileno() in ready and self._heard():
                return
            if self._worker.pidfd in ready and not self._start_again():
                return

    def _heard(self) -> bool:
        """Whether the pager has reported, and so is needed no more."""
        try:
            message = self._channel.receive(SEND_SECONDS)
        except (EOFError, OSError, ProtocolError):
            # It has ended. Whatever else it does without its channel is of no use.
            if not self._worker.wait(SEND_SECONDS):
                signal.pidfd_send_signal(self._worker.pidfd, signal.SIGKILL)
            return False
        message.close()
        if message.request == Report.COMPLETE:
            self._finish()
        elif message.request == Report.BAD_CHUNK:
            self._fail(EXIT_IMAGE, str(self._source.damaged(CHUNK.unpack(message.payload)[0])))
        return True

    def _start_again(self) -> bool:
        self._worker.poll()
        reason = self._worker.describe_exit()
        now = time.monotonic()
        while self._deaths and self._deaths[0] < now - RESTART_WINDOW:
            self._deaths.popleft()
        if len(self._deaths) == MAX_RESTARTS:
            self._fail(EXIT_VMM, f"{reason} (and {MAX_RESTARTS} times before within {RESTART_WINDOW:g} s)")
            return False
        self._deaths.append(now)
        import logging  # here: it is rare, and every start would pay

        logging.getLogger(__name__).warning("%s; it is started again", reason)
        with self._lock:
            self._channel.close()
            self._worker.stop(0)
            try:
                self._launch()
            except OSError as error:
                failure = f"the pager cannot be started again: {error.strerror or error}"
            else:
                self.restarts += 1
                return True
        self._fail(EXIT_VMM, failure)
        return False

    def _finish(self) -> None:
        with self._lock:
            self._pending = False
            for name in list(self._clients):
                if name not in self._unregistered:
                    self._let_go(name)
        self._done.set()

    def _let_go(self, name: str) -> None:
        """Everything is in, so what is missing now is zeros, which the kernel gives by itself."""
        _, uffd, mappings = self._clients.pop(name)
        for address, size, _ in mappings:
            try:
                userfaultfd.unregister(uffd, address, size)
            except OSError:
                pass  # its process is gone, or has mapped memory elsewhere since
        os.close(uffd)

    def _fail(self, code: int, reason: str) -> None:
        self.failed = True
        self._end(code, reason)
        self._halt()
        # Who waits in this process gets zeros, and does nothing with them: vCPUs find that they have to leave
        # the guest, others that `failed` is set. Workers keep their userfaultfds until they are dead.
        with self._lock:
            _, uffd, mappings = self._clients["vmm"]
            for address, size, _ in mappings:
                userfaultfd.unregister(uffd, address, size)
        self._done.set()
