"""Makes a machine hold still, and lets it go on. VMM process; the methods belong to the main loop.

A vCPU is parked when its thread has left the guest, has completed the access the guest was in the middle of
(KVM does that on the next entry, which `immediate_exit` makes a short one), and says so. It then waits in its
own thread. When all are parked the devices are stopped: every ring is quiet, and every request that was taken
is finished. That waits for workers, as does starting them again, and the main loop waits for nobody: the
parked thread of the first vCPU does it, and whatever else takes long and needs a machine that holds still.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from vmrun.machine.loop import EventLoop
from vmrun.machine.vcpu import VcpuThread

# A vCPU may be waiting for a worker, which has ten seconds for each answer (devices.vhost.frontend).
PAUSE_SECONDS = 12.0

RESUMED = "it was resumed meanwhile"
Done = Callable[[str | None], None]  # gets None, or why it did not work; RESUMED if somebody let it go on


class Devices(Protocol):
    """What is stopped after the vCPUs and started before them. Both wait for workers; neither is an error
    when done already.
    """

    def pause(self) -> None: ...
    def unpause(self) -> None: ...


class Turn:
    """One time of holding still. The parked vCPUs wait here; the first one works off `work` meanwhile."""

    def __init__(self) -> None:
        self.over = False
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._go = threading.Event()

    def post(self, work: Callable[[], None]) -> None:
        self._work.put(work)

    def end(self, *, at_once: bool) -> None:
        """Let them go on, after what was posted; or `at_once`, all but the first."""
        self.over = True
        self._work.put(None)
        if at_once:
            self._go.set()

    def wait(self, first: bool) -> None:
        """On a vCPU's thread, until the end."""
        if not first:
            self._go.wait()
            return
        try:
            while (work := self._work.get()) is not None:
                work()
        finally:
            self._go.set()


class Pause:
    """`paused` and `pausing` say where it stands. Pausing twice is no error, nor is resuming what runs."""

    def __init__(self, loop: EventLoop, vcpus: Sequence[VcpuThread], devices: Devices) -> None:
        self.paused = False
        self.working = 0  # how much of what was given to `do` is not done
        self._loop = loop
        self._vcpus = vcpus
        self._devices = devices
        self._turn: Turn | None = None
        self._missing: set[int] = set()
        self._waiting: list[Done] = []
        self._resumed: list[Callable[[], None]] = []
        self._timer = 0

    @property
    def pausing(self) -> bool:
        return self._turn is not None and not self.paused

    def pause(self, done: Done) -> None:
        """Stop the vCPUs and the devices; `done` is called when they are, or when a vCPU does not come."""
        if self.paused:
            done(None)
            return
        self._waiting.append(done)
        if self._turn is not None:
            return
        turn = self._turn = Turn()
        self._missing = {thread.index for thread in self._vcpus}
        self._timer = self._loop.call_later(PAUSE_SECONDS, self._late)
        for thread in self._vcpus:
            thread.post(partial(self._park, thread, turn))

    def _park(self, thread: VcpuThread, turn: Turn) -> None:
        """On the vCPU's thread, between two runs of the guest."""
        thread.vcpu.kvmclock_ctrl()
        self._loop.call_soon(partial(self._parked, thread.index, turn))
        turn.wait(first=thread is self._vcpus[0])

    def _parked(self, index: int, turn: Turn) -> None:
        if turn is not self._turn:
            return  # of a pause that was given up
        self._missing.discard(index)
        if not self._missing:
            self._loop.cancel(self._timer)
            turn.post(partial(self._stop_devices, turn))

    def _stop_devices(self, turn: Turn) -> None:
        if not turn.over:
            self._devices.pause()
        self._loop.call_soon(partial(self._still, turn))

    def _still(self, turn: Turn) -> None:
        if turn is self._turn:
            self.paused = True
            self._tell(None)

    def do(self, work: Callable[[], None]) -> None:
        """Have `work` done while the machine is paused, on the thread of a parked vCPU. It may take long, and
        must not raise.
        """
        if self._turn is None or not self.paused:
            raise ValueError("the machine is not paused")
        self.working += 1
        self._turn.post(partial(self._do, work))

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        finally:
            self.working -= 1

    def _late(self) -> None:
        names = ", ".join(str(index) for index in sorted(self._missing))
        self._let_go(f"vCPU {names} does not leave the guest within {PAUSE_SECONDS:g} s")

    def resume(self) -> None:
        """Let the machine go on: the devices, then the vCPUs. What was given to `do` is done first."""
        if self._missing:
            self._loop.cancel(self._timer)
        self._let_go(RESUMED)

    def on_resume(self, callback: Callable[[], None]) -> None:
        """Have `callback` called once, on the main loop, when the machine goes on for the next time."""
        self._resumed.append(callback)

    def release(self) -> None:
        """The machine ends, and its vCPU threads must be able to. The loop does not run any more."""
        if self._turn is not None:
            self._turn.end(at_once=True)

    def _let_go(self, reason: str) -> None:
        turn, self._turn = self._turn, None
        missing, self._missing = self._missing, set()
        self.paused = False
        if turn is not None:
            turn.post(self._devices.unpause)
            # Who was to start the devices may be the one that did not come: then none was stopped.
            turn.end(at_once=self._vcpus[0].index in missing)
            resumed, self._resumed = self._resumed, []
            for callback in resumed:
                callback()
        self._tell(reason)

    def _tell(self, error: str | None) -> None:
        waiting, self._waiting = self._waiting, []
        for done in waiting:
            # Who was told before may have resumed it.
            done(RESUMED if error is None and not self.paused else error)
