"""Notices that the host's clock jumped, and has the guest set its own. VMM process, main loop.

The host slept, the VMM was stopped (SIGSTOP, a debugger), or somebody set the host's clock: the guest's clock
stood still or is wrong, and only a driver of vmmci can be told (SYNCRTC). vmd looks once a second from its
emulated clock, and so does this, but only while there is a driver that agreed to be told.
"""

import time
from collections.abc import Callable

from devices.virtio.vmmci import VMMCI_SYNCRTC, Vmmci
from vmrun.machine.loop import EventLoop

PERIOD_SECONDS = 1.0
JUMP_SECONDS = 5.0


class ClockJump:
    """`update` is to be called on the loop's thread whenever a driver of `vmmci` came or went."""

    def __init__(self, loop: EventLoop, vmmci: Vmmci, clock: Callable[[], float] = time.time) -> None:
        self._loop = loop
        self._vmmci = vmmci
        self._clock = clock
        self._last: float | None = None  # when it last looked; None: it does not look
        self._timer: int | None = None

    def update(self) -> None:
        if not self._vmmci.syncs_clock:
            self._last = None
        elif self._last is None:
            self._last = self._clock()
            if self._timer is None:
                self._timer = self._loop.call_later(PERIOD_SECONDS, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._last is None:
            return
        now = self._clock()
        if abs(now - self._last - PERIOD_SECONDS) > JUMP_SECONDS:
            self._vmmci.send(VMMCI_SYNCRTC)
        self._last = now
        self._timer = self._loop.call_later(PERIOD_SECONDS, self._look)
