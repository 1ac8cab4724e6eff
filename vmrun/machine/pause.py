"""Stops a machine's vCPUs and lets them go on. VMM process; the methods belong to the main loop.

A vCPU is paused when its thread has left the guest, has completed the access the guest was in the middle of
(KVM does that on the next entry, which `immediate_exit` makes a short one), and says so. It then waits in its
own thread. Devices are not asked: with no vCPU to make requests a disk's worker finishes what it has and is
quiet; a card's worker still fills the receive buffers the guest has given.
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial

from vmrun.machine.loop import EventLoop
from vmrun.machine.vcpu import VcpuThread

# A vCPU may be waiting for a worker, which has ten seconds for each answer (devices.vhost.frontend).
PAUSE_SECONDS = 12.0

Done = Callable[[str | None], None]  # gets None, or why it did not work


class Pause:
    """`paused` and `pausing` say where it stands. Pausing twice is no error, nor is resuming what runs."""

    def __init__(self, loop: EventLoop, vcpus: Sequence[VcpuThread]) -> None:
        self.paused = False
        self._loop = loop
        self._vcpus = vcpus
        self._go = threading.Event()  # set: the vCPUs that wait for it go on. A new one for each pause
        self._missing: set[int] = set()
        self._waiting: list[Done] = []
        self._timer = 0

    @property
    def pausing(self) -> bool:
        return bool(self._missing)

    def pause(self, done: Done) -> None:
        """Stop the vCPUs; `done` is called when all are out of the guest, or when one does not come."""
        if self.paused:
            done(None)
            return
        self._waiting.append(done)
        if self._missing:
            return
        self._go = threading.Event()
        self._missing = {thread.index for thread in self._vcpus}
        self._timer = self._loop.call_later(PAUSE_SECONDS, self._late)
        for thread in self._vcpus:
            thread.post(partial(self._park, thread, self._go))

    def _park(self, thread: VcpuThread, go: threading.Event) -> None:
        """On the vCPU's thread, between two runs of the guest."""
        thread.vcpu.kvmclock_ctrl()
        self._loop.call_soon(partial(self._parked, thread.index, go))
        go.wait()

    def _parked(self, index: int, go: threading.Event) -> None:
        if go is not self._go or go.is_set():
            return  # of a pause that was given up
        self._missing.discard(index)
        if not self._missing:
            self._loop.cancel(self._timer)
            self.paused = True
            self._tell(None)

    def _late(self) -> None:
        names = ", ".join(str(index) for index in sorted(self._missing))
        self._let_go(f"vCPU {names} does not leave the guest within {PAUSE_SECONDS:g} s")

    def resume(self) -> None:
        """Let the vCPUs go on."""
        if self._missing:
            self._loop.cancel(self._timer)
        self._let_go("it was resumed meanwhile")

    def release(self) -> None:
        """The machine ends, and its vCPU threads must be able to. The loop does not run any more."""
        self._go.set()

    def _let_go(self, reason: str) -> None:
        self.paused = False
        self._missing = set()
        self._go.set()
        self._tell(reason)

    def _tell(self, error: str | None) -> None:
        waiting, self._waiting = self._waiting, []
        for done in waiting:
            done(error)
