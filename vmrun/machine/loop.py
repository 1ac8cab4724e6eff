"""The VMM's event loop: descriptors, timers, and work handed over by other threads. Runs on the main thread.

Everything that is not a vCPU exit happens here: the console, worker supervision, legacy interrupts, signals.
Callbacks must not block. `watch`, `unwatch`, `call_soon` and `stop` may be called from any thread.
"""

import heapq
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

Callback = Callable[[], None]
T = TypeVar("T")

ASK_SECONDS = 0.2  # how often who asked looks whether the loop is still there


class EventLoop:
    """Owns its epoll and wake-up descriptors, never those it watches."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._lock = threading.Lock()
        self._wake_lock = threading.RLock()  # the handler of a signal may find its own thread holding it
        self._callbacks: dict[int, Callback] = {}
        self._writers: dict[int, Callback] = {}
        self._hangups: dict[int, Callback] = {}
        self._soon: deque[Callback] = deque()
        self._timers: list[tuple[float, int, Callback]] = []
        self._cancelled: set[int] = set()
        self._next_timer = 0
        self._stopping = False

    def watch(self, fd: int, callback: Callback | None) -> None:
        """Call `callback` whenever `fd` is readable or hung up; None stops that, and nothing else."""
        self._watch(self._callbacks, fd, callback)

    def watch_writable(self, fd: int, callback: Callback | None) -> None:
        """Call `callback` whenever `fd` can take more; None stops that."""
        self._watch(self._writers, fd, callback)

    def watch_hangup(self, fd: int, callback: Callback | None) -> None:
        """Call `callback` whenever `fd` is hung up in both directions, also while nothing else about it is of
        interest; None stops that.
        """
        self._watch(self._hangups, fd, callback)

    def _watch(self, callbacks: dict[int, Callback], fd: int, callback: Callback | None) -> None:
        with self._lock:
            if callback is None:
                callbacks.pop(fd, None)
            else:
                callbacks[fd] = callback
            self._update(fd)

    def unwatch(self, fd: int) -> None:
        """Forget `fd` altogether; fine when it was not watched. To be called before `fd` is closed."""
        with self._lock:
            self._callbacks.pop(fd, None)
            self._writers.pop(fd, None)
            self._hangups.pop(fd, None)
            self._update(fd)

    def _update(self, fd: int) -> None:
        events = (select.EPOLLIN if fd in self._callbacks else 0) | (
            select.EPOLLOUT if fd in self._writers else 0
        )
        try:
            if not events and fd not in self._hangups:
                self._epoll.unregister(fd)
                return
            try:
                self._epoll.modify(fd, events)
            except FileNotFoundError:
                self._epoll.register(fd, events)
        except (FileNotFoundError, ValueError):
            if events or fd in self._hangups:
                raise

    def call_soon(self, callback: Callback) -> None:
        """Run `callback` on the loop's thread."""
        self._soon.append(callback)
        self._wake()

    def ask(self, work: Callable[[], T]) -> T:
        """Have the loop's thread do `work`, and wait for what comes of it, an exception too; OSError when the
        loop stops instead. Any other thread.
        """
        done = threading.Event()
        results: list[T] = []
        failures: list[BaseException] = []

        def run() -> None:
            try:
                results.append(work())
            except Exception as error:
                failures.append(error)
            done.set()

        self.call_soon(run)
        while not done.wait(ASK_SECONDS):
            if self._stopping:
                raise OSError("the machine ended meanwhile")
        if failures:
            raise failures[0]
        return results[0]

    def call_later(self, seconds: float, callback: Callback) -> int:
        """Run `callback` once, in `seconds`; the result is for `cancel`. Loop thread only."""
        self._next_timer += 1
        heapq.heappush(self._timers, (time.monotonic() + seconds, self._next_timer, callback))
        return self._next_timer

    def cancel(self, timer: int) -> None:
        self._cancelled.add(timer)

    def stop(self) -> None:
        """Let `run` return after the callbacks under way."""
        self._stopping = True
        self._wake()

    def _wake(self) -> None:
        with self._wake_lock:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def run(self) -> None:
        """Serve until `stop`. An exception from a callback ends the loop and comes out here."""
        while not self._stopping:
            self._run_timers()
            timeout = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
            for fd, events in self._epoll.poll(timeout):
                if fd == self._wake_fd:
                    os.eventfd_read(fd)
                    continue
                reader = self._callbacks.get(fd)
                if reader is not None and events & ~select.EPOLLOUT:
                    reader()
                writer = self._writers.get(fd)
                if writer is not None and events & ~select.EPOLLIN:
                    writer()
                hangup = self._hangups.get(fd)
                if hangup is not None and events & select.EPOLLHUP:
                    hangup()
            # Only what is there now. What comes meanwhile has signalled the wake-up descriptor too, and a
            # guest that makes vCPU threads hand over work without end does not keep timers and descriptors
            # waiting.
            for _ in range(len(self._soon)):
                self._soon.popleft()()

    def _run_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            _, number, callback = heapq.heappop(self._timers)
            if number in self._cancelled:
                self._cancelled.discard(number)
            else:
                callback()

    def close(self) -> None:
        self._epoll.close()
        with self._wake_lock:
            # A thread that is late must not write to what has this number next, a disk perhaps.
            fd, self._wake_fd = self._wake_fd, -1
        os.close(fd)
