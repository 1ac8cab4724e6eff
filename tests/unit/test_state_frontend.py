"""What the front end keeps over a pause for any back end: configuration that the driver wrote, and what it
makes of answers that are none (devices/vhost/frontend.py).
"""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from devices.memory import GuestMemory
from devices.vhost.channel import Channel, Message
from devices.vhost.frontend import VhostUserDevice
from devices.vhost.messages import REPLY, VRING_STATE, ProtocolError, Request
from devices.virtio.device import ActiveDriver
from tests.unit.state_mutations import through_json
from tests.unit.test_vhost_frontend import Answer, connect, drivers, faked
from tests.unit.vhost_toy import (
    CONFIG,
    TOY_FEATURES,
    ToyBoard,
    ToyDevice,
    ToyDriver,
    ToyEvents,
    backend_thread,
    guest_memory,
    open_fds,
    readable,
)

Make = Callable[[], tuple[VhostUserDevice, ToyDevice]]


@contextmanager
def devices() -> Iterator[tuple[GuestMemory, Make, list[str]]]:
    """Makes front ends, each with a back end of its own, over one memory."""
    before = open_fds()
    failures: list[str] = []
    with guest_memory() as memory, ExitStack() as stack:

        def make() -> tuple[VhostUserDevice, ToyDevice]:
            ours, theirs = socket.socketpair()
            toy = ToyDevice()
            stack.enter_context(backend_thread(toy, theirs))
            device = connect(ours, memory, ToyBoard(), failures)
            stack.callback(device.close)
            return device, toy

        yield memory, make, failures
        assert failures == []
    assert open_fds() == before


def test_two_rings_go_on_in_another_process() -> None:
    with devices() as (memory, make, _):
        device, _ = make()
        events, others = ToyEvents(), ToyEvents()
        first, second = ToyDriver(memory, 0, 0x4000), ToyDriver(memory, 1, 0x8000)
        device.activate(TOY_FEATURES, [first.config, second.config], events)
        for number in range(3):
            second.request(b"request %d" % number)
        device.pause()
        second.request(b"later")
        state = through_json(device.save())
        assert state["rings"]["0"] == 0
        other, toy = make()
        other.load(state, ActiveDriver(TOY_FEATURES, (first.config, second.config), others))
        assert toy.started == []
        other.unpause()
        assert sorted(toy.started) == [0, 1]
        first.request(b"here")
        os.eventfd_write(others.kicks[0], 1)
        for queue in (0, 1):
            assert readable(others.calls[queue])
        assert first.answer(0) == b"ereh"
        other.pause()
        assert other.save()["rings"] == {"0": first.used_idx(), "1": second.used_idx()}
        assert (first.used_idx(), second.used_idx()) == (1, 4)
        assert second.answer(3) == b"retal"
        events.close()
        others.close()


def test_configuration_that_the_driver_wrote_is_written_again() -> None:
    with devices() as (_, make, failures):
        device, _ = make()
        device.write_config(8, b"text")
        device.write_config(0, b"refused")
        device.pause()
        state = through_json(device.save())
        assert state["written"] == {str(8 + offset): value for offset, value in enumerate(b"text")}
        other, toy = make()
        other.load(state, None)
        assert bytes(toy.config) == CONFIG[:8] + b"text" + CONFIG[12:]
        assert other.save() == state
        # The back end may be another one by now.
        ours, theirs = socket.socketpair()
        with ExitStack() as stack:
            next_toy = ToyDevice()
            stack.enter_context(backend_thread(next_toy, theirs))
            other._fail("it is gone")
            failures.clear()
            other.restart(ours)
            assert bytes(next_toy.config) == bytes(toy.config)
            other.close()


def short(channel: Channel, message: Message) -> None:
    channel.send(message.request, bytes(4), flags=REPLY)


def another_ring(channel: Channel, message: Message) -> None:
    channel.send(message.request, VRING_STATE.pack(1, 0), flags=REPLY)


def hang_up(channel: Channel, message: Message) -> None:
    channel.shutdown()


@pytest.mark.parametrize("answer", [short, another_ring, hang_up])
def test_an_answer_that_is_none_is_a_failure_and_nothing_is_saved(answer: Answer) -> None:
    with faked({Request.GET_VRING_BASE: answer}) as (_, make, _, failures):
        device = make()
        events = ToyEvents()
        device.activate(TOY_FEATURES, drivers(device), events)
        device.pause()
        device.pause()
        assert len(failures) == 1
        with pytest.raises(ProtocolError, match="toy0: the back end has not said"):
            device.save()
        device.unpause()
        device.reset()
        assert len(failures) == 1
        events.close()


def test_pause_waits_for_requests_that_take_long() -> None:
    """The answer comes when the ring is quiet, not before."""
    release = threading.Event()

    def late(channel: Channel, message: Message) -> None:
        assert release.wait(10)
        channel.send(message.request, message.payload, flags=REPLY)

    with faked({Request.GET_VRING_BASE: late}) as (_, make, _, failures):
        device = make()
        events = ToyEvents()
        device.activate(TOY_FEATURES, drivers(device), events)
        thread = threading.Thread(target=device.pause)
        thread.start()
        assert thread.is_alive()
        release.set()
        thread.join(10)
        assert device.save()["rings"] == {"0": 0}
        assert failures == []
        device.unpause()
        events.close()
