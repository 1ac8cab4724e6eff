"""The workers of a machine: started, connected to their devices, and started again when they die. VMM
process.

A worker that dies takes nothing of the guest with it. Its disk or tap and the lock stay open here, its rings
are in the guest's memory, which requests it had taken is in a buffer that the front end keeps
(`devices.vhost.inflight`), and what of a qcow2 image's tables it had in memory is in a journal
(`devices.block.qcow2_journal`). So the next one goes on in its place, and the guest sees a pause. Who dies
again and again ends the machine: a request that kills its worker would kill the next one too.

A card that goes through passt has one worker, whose death is the machine's end: half a frame may be on its
way to passt, which takes what a next one sends for the rest of that, and what comes then for frames that
nobody has checked.

Starting a process happens on the main loop's thread, because workers die with the thread that started them;
the handshake waits for the new worker, and has a thread of its own. Other people's back ends are not ours to
start again: their end is the machine's.
"""

import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from devices.board import Board
from devices.memory import GuestMemory
from devices.vhost.frontend import VhostUserDevice
from devices.vhost.messages import ProtocolError
from devices.virtio.device import VIRTIO_ID_BLOCK, VIRTIO_ID_NET
from devices.worker.launcher import launch
from vmrun.errors import EXIT_IMAGE, EXIT_VMM, UserError
from vmrun.machine.loop import EventLoop

if TYPE_CHECKING:
    from vmrun.snapshot.pager import LazyRam

# Each kind's device type, and the largest sizes of its queues (net: receive, transmit).
KINDS = {"blk": (VIRTIO_ID_BLOCK, (256,)), "net": (VIRTIO_ID_NET, (256, 256))}
FOREIGN_BLK_QUEUES = (128,)  # what qemu-storage-daemon and others have at least

# A worker may die so many times in so many seconds and is started again after so long.
MAX_RESTARTS = 3
RESTART_WINDOW = 60.0
RESTART_DELAYS = (0.0, 0.5, 2.0)

# How long a worker that was let go may take to finish its requests and flush its image.
RELEASE_SECONDS = 120.0
RELEASE_LOOK_SECONDS = 0.5  # how often it is asked whether the machine ended meanwhile

DEAD_WORKER_SECONDS = 2.0  # how long a broken channel may precede the news of its worker's death

End = Callable[[int, str], None]


class SupervisedWorker:
    """One worker over all its lives. A context manager: at its end the worker is gone.

    What it calls `end(exit code, reason)` for is the machine's end. `fds` stay the caller's and must stay
    open: each life gets them anew. `memory_size` is the guest's, in bytes: a worker maps that, and not much
    more. `lazy` is who fills the guest's memory, if that is done while it runs.
    """

    def __init__(
        self,
        kind: str,
        name: str,
        words: Mapping[str, str],
        fds: Mapping[str, int],
        memory_size: int,
        lazy: "LazyRam | None" = None,
    ) -> None:
        self.kind = kind
        self.name = name
        self.restarts = 0
        # A confined VMM starts nobody, and a stream may be in the middle of a frame.
        self.replaceable = "stream" not in fds
        self._words = dict(words)
        self._fds = dict(fds)
        self._memory_size = memory_size
        self._lazy = lazy
        self._deaths: deque[float] = deque()
        self._quitting = False
        self._released = False  # by us; its end is no death
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._launch()

    def _launch(self) -> None:
        fds = dict(self._fds)
        if self._lazy is not None and self._lazy.userfault_fd >= 0:
            fds["userfault"] = self._lazy.userfault_fd
        words = {**self._words, "memory": str(self._memory_size)}
        self.worker = launch(self.kind, self.name, words, fds)
        self._gone = threading.Event()  # this worker has ended

    def connect(self, memory: GuestMemory, board: Board, loop: EventLoop, end: End) -> VhostUserDevice:
        """Shake hands, and look after the worker from now on. UserError when it cannot serve, which may be
        its disk image's fault.
        """
        self._loop, self._end = loop, end
        device_id, queue_sizes = KINDS[self.kind]
        try:
            self.device = VhostUserDevice(
                self.worker.channel,
                name=self.name,
                device_id=device_id,
                queue_sizes=queue_sizes,
                memory=memory,
                board=board,
                on_failure=self._channel_failed,
                wait_for_end=self._wait_until_gone,
                lazy=self._lazy,
            )
        except ProtocolError as error:
            if not self.worker.wait(DEAD_WORKER_SECONDS):
                raise UserError(f"worker {self.name} does not answer: {error}", EXIT_VMM) from None
            raise UserError(*self._reason()) from None
        loop.watch(self.worker.pidfd, self._ended)
        return self.device

    def _reason(self) -> tuple[str, int]:
        # A worker that finds its image at fault exits with the very code that vmrun reserves for that.
        return self.worker.describe_exit(), EXIT_IMAGE if self.worker.exit_code == EXIT_IMAGE else EXIT_VMM

    def _channel_failed(self, text: str) -> None:
        """Any thread. A channel breaks before its worker's death is known, and the death says more. A worker
        that lives on without its channel is of no use, and still has the guest's memory.
        """
        self._soon(lambda: self._kill_later(text))

    def _kill_later(self, text: str) -> None:
        worker = self.worker

        def kill() -> None:
            if worker is self.worker and self.device.failed and not worker.poll():
                import logging  # here: it is rare, and every start would pay

                logging.getLogger(__name__).warning("%s; it is killed", text)
                signal.pidfd_send_signal(worker.pidfd, signal.SIGKILL)

        self._loop.call_later(DEAD_WORKER_SECONDS, kill)

    def _wait_until_gone(self) -> None:
        """Any thread but the main loop's."""
        self._gone.wait(2 * DEAD_WORKER_SECONDS)

    def release(self) -> None:
        """Let the worker finish, flush and end, so that what it served can be exchanged: `replace` brings
        another. The machine is paused. Any thread but the main loop's. OSError when it did not end well.
        """
        self._released = True
        self.device.release()
        deadline = time.monotonic() + RELEASE_SECONDS
        while not self._gone.wait(RELEASE_LOOK_SECONDS):
            # The main loop reaps it. Where that has ended nobody waits for two minutes: OSError.
            self._loop.ask(lambda: None)
            if time.monotonic() > deadline:
                raise TimeoutError(f"worker {self.name} does not end")
        if self.worker.exit_code != 0:
            raise OSError(self.worker.describe_exit())

    def launch_another(self, words: Mapping[str, str], fds: Mapping[str, int]) -> socket.socket:
        """After `release`: start a worker for something else, for `VhostUserDevice.restart` with what is
        returned. Main loop.
        """
        self.worker.stop()
        self._words, self._fds = dict(words), dict(fds)
        self._launch()
        self._released = False
        self._loop.watch(self.worker.pidfd, self._ended)
        return self.worker.channel

    def kill(self) -> None:
        """At once, whatever it does. Any thread."""
        try:
            signal.pidfd_send_signal(self.worker.pidfd, signal.SIGKILL)
        except OSError:
            pass  # it is gone already

    def _ended(self) -> None:
        self._loop.unwatch(self.worker.pidfd)
        self.worker.poll()
        self._gone.set()
        if self._released:
            return
        reason, code = self._reason()
        now = time.monotonic()
        while self._deaths and self._deaths[0] < now - RESTART_WINDOW:
            self._deaths.popleft()
        if code == EXIT_IMAGE or not self.replaceable:
            self._end(code, reason)
        elif len(self._deaths) == MAX_RESTARTS:
            self._end(code, f"{reason} (and {MAX_RESTARTS} times before within {RESTART_WINDOW:g} s)")
        else:
            delay = RESTART_DELAYS[min(len(self._deaths), len(RESTART_DELAYS) - 1)]
            self._deaths.append(now)
            import logging  # here: it is rare, and every start would pay

            logging.getLogger(__name__).warning("%s; it is started again", reason)
            self._loop.call_later(delay, self._start_again)

    def _start_again(self) -> None:
        if self._quitting or self._released or not self._gone.is_set():
            return
        if self._thread is not None:
            self._thread.join()  # it has reported; a moment
        try:
            self.worker.stop()
            self._launch()
        except OSError as error:
            self._end(EXIT_VMM, f"worker {self.name} cannot be started again: {error.strerror or error}")
            return
        self.restarts += 1
        self._loop.watch(self.worker.pidfd, self._ended)
        self._thread = threading.Thread(
            target=self._reconnect, args=(self.worker.channel,), name=f"restart-{self.name}", daemon=True
        )
        self._thread.start()

    def _reconnect(self, channel: socket.socket) -> None:
        try:
            self.device.restart(channel)
        except ProtocolError as error:
            self._channel_failed(str(error))

    def _soon(self, callback: Callable[[], None]) -> None:
        with self._lock:
            if not self._quitting:
                self._loop.call_soon(callback)

    def quit(self) -> None:
        """Start nothing any more. Before the loop is closed; the vCPUs have stopped."""
        with self._lock:
            self._quitting = True
        self.device.close()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> "SupervisedWorker":
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.stop()


def connect_foreign(
    path: Path, name: str, memory: GuestMemory, board: Board, on_failure: Callable[[str], None]
) -> VhostUserDevice:
    """The disk that somebody else's vhost-user-blk back end serves at the socket `path`. UserError when there
    is none, or none that fits.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(os.fspath(path))
    except OSError as error:
        sock.close()
        text = (error.strerror or str(error)).lower()
        raise UserError(f"--disk vhost-user:{path}: {text}: is the back end running?", EXIT_IMAGE) from None
    try:
        return VhostUserDevice(
            sock,
            name=name,
            device_id=VIRTIO_ID_BLOCK,
            queue_sizes=FOREIGN_BLK_QUEUES,
            memory=memory,
            board=board,
            on_failure=on_failure,
        )
    except ProtocolError as error:
        raise UserError(f"--disk vhost-user:{path}: {error}", EXIT_IMAGE) from None
