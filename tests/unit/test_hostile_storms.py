"""What a guest or a worker does again and again, to keep the VMM's main loop busy or to fill its memory."""

import os
import socket
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from devices.platform.acpi_pm import AcpiPm
from devices.vhost.frontend import VhostUserDevice
from devices.virtio.device import VIRTIO_ID_BLOCK
from devices.virtio.vmmci import VMMCI_SHUTDOWN
from tests.unit.vhost_toy import (
    CONFIG,
    MIB,
    TOY_FEATURES,
    ToyBoard,
    ToyDevice,
    ToyDriver,
    ToyEvents,
    backend_thread,
    guest_memory,
)
from vmrun.machine.interrupts import Interrupts
from vmrun.machine.loop import EventLoop
from vmrun.machine.machine import Machine
from vmrun.machine.memory import Ram
from vmrun.machine.shutdown import Shutdown


class Line:
    def set_level(self, asserted: bool) -> None: ...


def test_the_main_loop_hears_of_a_broken_ring_once() -> None:
    """A worker that was taken over writes the err eventfd without end."""
    ours, theirs = socket.socketpair()
    board, toy, events = ToyBoard(), ToyDevice(), ToyEvents()
    with guest_memory() as memory, backend_thread(toy, theirs) as (backend, _, _):
        device = VhostUserDevice(
            ours,
            name="toy0",
            device_id=VIRTIO_ID_BLOCK,
            queue_sizes=(64, 64),
            memory=memory,
            board=board,
            on_failure=lambda text: None,
            config_size=len(CONFIG),
        )
        before = len(board.watched)
        device.activate(TOY_FEATURES, [ToyDriver(memory, 0, 0x4000).config], events)
        worker_err = backend._rings[0].err
        for _ in range(3):
            os.eventfd_write(worker_err, 1)
            board.turn(0)
        assert len(events.resets) == 1
        assert len(board.watched) == before
        device.reset()
        # The next driver is told again.
        device.activate(TOY_FEATURES, [ToyDriver(memory, 0, 0x4000).config], events)
        os.eventfd_write(backend._rings[0].err, 1)
        assert board.turn()
        assert len(events.resets) == 2
        device.reset()
        device.close()
    events.close()


def test_a_descriptor_gets_its_turn_between_handed_over_work() -> None:
    loop = EventLoop()
    fd = os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    count = 0

    def again() -> None:
        nonlocal count
        count += 1
        if count < 1000:
            loop.call_soon(again)
        else:
            loop.stop()

    turns: list[int] = []

    def readable() -> None:
        turns.append(count)
        loop.stop()

    loop.call_soon(lambda: loop.watch(fd, readable))
    loop.call_soon(again)
    try:
        loop.run()
    finally:
        loop.close()
        os.close(fd)
    assert turns and turns[0] < 1000


def test_a_guest_that_announces_its_shutdown_again_and_again_adds_no_timers() -> None:
    timers = []

    class Loop:
        def call_soon(self, callback: Any) -> None:
            callback()

        def call_later(self, seconds: float, callback: Any) -> int:
            timers.append(seconds)
            return len(timers)

        def cancel(self, timer: int) -> None: ...

    loop: Any = Loop()
    events: Any = object()
    shutdown = Shutdown(loop, AcpiPm(Line(), lambda: None, lambda: None), lambda code, reason: None)
    shutdown.vmmci.activate(0, [], events)
    for _ in range(100):
        shutdown.vmmci.write_config(0, bytes((VMMCI_SHUTDOWN, 0, 0, 0)))
    assert len(timers) == 1


def test_a_worker_cannot_cut_guest_memory_from_under_the_vmm() -> None:
    """Every worker has the descriptor; a touch of a page past the end of the file is SIGBUS."""
    with Ram(MIB) as ram:
        for size in (0, MIB - 4096, 2 * MIB):
            with pytest.raises(PermissionError):
                os.ftruncate(ram.fd, size)


class CountingVm:
    def __init__(self) -> None:
        self.tables = 0
        self.bound: list[bool] = []

    def set_gsi_routing(self, routes: Any) -> None:
        self.tables += 1

    def irqfd(self, fd: int, gsi: int, *, assign: bool = True) -> None:
        self.bound.append(assign)


def test_a_vcpu_that_waits_for_a_worker_does_not_hold_up_the_end() -> None:
    """A guest resets its disk while large requests are under way, or the worker was taken over."""
    answered = threading.Event()

    class Stuck:
        index = 0

        def stop(self) -> None: ...

        def join(self, timeout: float) -> bool:
            return answered.is_set()

    machine: Any = SimpleNamespace(
        pause=SimpleNamespace(release=lambda: None, working=0),
        vcpus=[Stuck()],
        devices={"blk0": SimpleNamespace(close=answered.set)},
    )
    Machine._stop_vcpus(machine)
    machine.devices = {}
    answered.clear()
    with pytest.raises(OSError, match="does not stop"):
        Machine._stop_vcpus(machine)


def test_masking_and_unmasking_a_vector_does_not_replace_the_routing_table() -> None:
    vm: Any = CountingVm()
    vector = Interrupts(vm).vector()
    for _ in range(10):
        vector.connect(0xFEE00000, 0x41)
        vector.disconnect()
    assert vm.tables == 1
    assert vm.bound == [True, False] * 10
    vector.connect(0xFEE00000, 0x42)
    assert vm.tables == 2
    vector.close()


def test_pending_works_for_descriptors_that_select_cannot_name() -> None:
    import fcntl
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    vm: Any = CountingVm()
    vector = Interrupts(vm).vector()
    try:
        high = fcntl.fcntl(vector.fd, fcntl.F_DUPFD_CLOEXEC, 1100)
        os.close(vector.fd)
        vector.fd = high
        assert not vector.pending()
        os.eventfd_write(high, 1)
        assert vector.pending()
    finally:
        vector.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
