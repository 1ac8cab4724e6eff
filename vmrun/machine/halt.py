"""Notices a guest that will never do anything again: every processor halts with interrupts off, as Linux does
when it is to power off and has no ACPI to do that with. VMM process; the methods belong to the main loop.

KVM tells nobody: the vCPU waits in the kernel, in KVM_MP_STATE_HALTED, for an interrupt that it will not
take. So a machine that has not exited for a while is asked, by a kick for each vCPU, and again from time to
time. On hardware a non-maskable interrupt could still wake it; here nobody sends one.
"""

from collections.abc import Callable, Sequence
from functools import partial

from vmrun.kvm import abi
from vmrun.machine.loop import EventLoop
from vmrun.machine.pause import Pause
from vmrun.machine.vcpu import VcpuThread

LOOK_SECONDS = 1.0
ASK_AGAIN = 10  # looks, for one that still does not exit
INTERRUPT_FLAG = 1 << 9  # RFLAGS.IF
# Processors that wait for another one to start them.
NOT_STARTED = (abi.KVM_MP_STATE_UNINITIALIZED, abi.KVM_MP_STATE_INIT_RECEIVED)


class HaltWatch:
    """Calls `halted` once, when that is so."""

    def __init__(
        self, loop: EventLoop, vcpus: Sequence[VcpuThread], pause: Pause, halted: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._vcpus = vcpus
        self._pause = pause
        self._halted = halted
        self._exits: list[int] = []
        self._quiet = 0  # looks since the last exit of the guest's own
        self._dead: set[int] = set()

    def start(self) -> None:
        self._loop.call_later(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        self.start()
        exits = [thread.exits for thread in self._vcpus]
        # The posted work of one that holds still would be done when it goes on, which may be much later.
        still = self._pause.paused or self._pause.pausing
        self._quiet = 0 if still or exits != self._exits else self._quiet + 1
        self._exits = exits
        if self._quiet % ASK_AGAIN == 1:
            self._dead.clear()
            for thread in self._vcpus:
                thread.post(partial(self._inspect, thread))

    def _inspect(self, thread: VcpuThread) -> None:
        """On the vCPU's thread, between two runs of the guest."""
        state = thread.vcpu.get_mp_state()
        halted = state == abi.KVM_MP_STATE_HALTED and not thread.vcpu.get_regs().rflags & INTERRUPT_FLAG
        self._loop.call_soon(partial(self._answer, thread.index, halted or state in NOT_STARTED))

    def _answer(self, index: int, dead: bool) -> None:
        self._exits[index] += 1  # our kick's
        if dead:
            self._dead.add(index)
        if len(self._dead) == len(self._vcpus):
            self._dead.clear()
            self._halted()
