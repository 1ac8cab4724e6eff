"""The back end, spoken to message by message: what QEMU says, and what nobody should say."""

import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.memory import GuestMemory
from devices.vhost.backend import PROTOCOL_FEATURES, Backend
from devices.vhost.channel import Channel
from devices.vhost.messages import CONFIG as CONFIG_HEADER
from devices.vhost.messages import (
    HEADER,
    INFLIGHT_PADDED,
    MEM_REGION,
    MEM_TABLE,
    NEED_REPLY,
    REPLY,
    SINGLE_MEM_REGION,
    U64,
    VERSION,
    VHOST_USER_F_PROTOCOL_FEATURES,
    VRING_ADDR,
    VRING_NO_FD,
    VRING_STATE,
    BackendRequest,
    ProtocolError,
    Request,
)
from tests.unit.vhost_toy import (
    CONFIG,
    MIB,
    TOY_FEATURES,
    ToyDevice,
    ToyDriver,
    ToyEvents,
    backend_thread,
    guest_memory,
    open_fds,
    readable,
)

USER = 0x7F00_0000_0000  # where a front end like QEMU would have mapped guest memory


class Peer:
    """A front end written out by hand. `errors` holds what ended the back end's session."""

    def __init__(self, channel: Channel, device: ToyDevice, memory: GuestMemory) -> None:
        self.channel = channel
        self.device = device
        self.memory = memory
        self.errors: list[BaseException] = []
        self.thread: threading.Thread | None = None
        self.backend: Backend | None = None
        self.acknowledged = False

    def ask(self, request: int, payload: bytes = b"") -> bytes:
        self.channel.send(request, payload, timeout=5)
        reply = self.channel.receive(timeout=5)
        assert (reply.request, reply.flags, reply.fds) == (request, VERSION | REPLY, [])
        return reply.payload

    def set(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> int:
        """Returns the acknowledgement."""
        if not self.acknowledged:
            self.channel.send(request, payload, fds, timeout=5)
            self.ask(Request.GET_FEATURES)
            return 0
        self.channel.send(request, payload, fds, NEED_REPLY, timeout=5)
        reply = self.channel.receive(timeout=5)
        assert (reply.request, reply.flags) == (request, VERSION | REPLY)
        return int(U64.unpack(reply.payload)[0])

    def negotiate(self, features: int = TOY_FEATURES | VHOST_USER_F_PROTOCOL_FEATURES) -> None:
        self.set(Request.SET_PROTOCOL_FEATURES, U64.pack(PROTOCOL_FEATURES))
        self.acknowledged = True
        assert self.set(Request.SET_OWNER) == 0
        assert self.set(Request.SET_FEATURES, U64.pack(features)) == 0

    def share_memory(self, user: int = USER) -> None:
        table = MEM_TABLE.pack(len(self.memory.regions), 0)
        for region in self.memory.regions:
            table += MEM_REGION.pack(region.gpa, region.size, user + region.gpa, region.offset)
        assert self.set(Request.SET_MEM_TABLE, table, tuple(r.fd for r in self.memory.regions)) == 0

    def describe(self, driver: ToyDriver, base: int = 0, user: int = USER) -> None:
        config = driver.config
        addresses = (user + config.descriptors, user + config.used, user + config.available)
        assert self.set(Request.SET_VRING_NUM, VRING_STATE.pack(config.index, config.size)) == 0
        assert self.set(Request.SET_VRING_BASE, VRING_STATE.pack(config.index, base)) == 0
        assert self.set(Request.SET_VRING_ADDR, VRING_ADDR.pack(config.index, 0, *addresses, 0)) == 0

    def connect(self, events: ToyEvents, index: int) -> None:
        assert self.set(Request.SET_VRING_CALL, U64.pack(index), (events.calls[index],)) == 0
        assert self.set(Request.SET_VRING_KICK, U64.pack(index), (events.kicks[index],)) == 0

    def enable(self, index: int, enabled: int = 1) -> None:
        assert self.set(Request.SET_VRING_ENABLE, VRING_STATE.pack(index, enabled)) == 0

    def stop(self, index: int) -> int:
        reply = VRING_STATE.unpack(self.ask(Request.GET_VRING_BASE, VRING_STATE.pack(index, 0)))
        assert reply[0] == index
        return int(reply[1])

    def broken(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> str:
        """Send this and see the session end with a ProtocolError: its text."""
        self.channel.send(request, payload, fds, timeout=5)
        with pytest.raises(EOFError):
            self.channel.receive(timeout=5)
        assert self.thread is not None
        self.thread.join(10)
        (error,) = self.errors
        assert isinstance(error, ProtocolError)
        self.errors.clear()
        return str(error)


@contextmanager
def session() -> Iterator[Peer]:
    before = open_fds()
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    device = ToyDevice()
    with guest_memory() as memory:
        peer = Peer(channel, device, memory)
        with backend_thread(device, theirs) as (backend, errors, thread), ExitStack() as stack:
            stack.callback(channel.close)
            peer.errors, peer.backend, peer.thread = errors, backend, thread
            yield peer
    assert not errors
    assert open_fds() == before, "descriptors leaked"


@pytest.fixture
def peer() -> Iterator[Peer]:
    with session() as peer:
        yield peer


@pytest.fixture
def events() -> Iterator[ToyEvents]:
    events = ToyEvents()
    yield events
    events.close()


def echo(driver: ToyDriver, events: ToyEvents, data: bytes) -> None:
    number = driver.used_idx()
    driver.request(data)
    os.eventfd_write(events.kicks[driver.config.index], 1)
    wait_for_answer(driver, events.calls[driver.config.index], number, data)


def wait_for_answer(driver: ToyDriver, call: int, number: int, data: bytes) -> None:
    assert readable(call)
    os.eventfd_read(call)
    assert driver.used_idx() == number + 1
    assert driver.answer(number) == data[::-1]


def test_handshake(peer: Peer) -> None:
    assert U64.unpack(peer.ask(Request.GET_FEATURES)) == (TOY_FEATURES | VHOST_USER_F_PROTOCOL_FEATURES,)
    assert U64.unpack(peer.ask(Request.GET_PROTOCOL_FEATURES)) == (PROTOCOL_FEATURES,)
    peer.negotiate()
    assert peer.device.accepted == TOY_FEATURES
    assert U64.unpack(peer.ask(Request.GET_QUEUE_NUM)) == (2,)


def test_ring_from_start_to_stop(peer: Peer, events: ToyEvents) -> None:
    peer.negotiate()
    peer.share_memory()
    driver = ToyDriver(peer.memory, 1, 16 * MIB)
    peer.describe(driver)
    peer.connect(events, 1)
    assert peer.device.started == []
    peer.enable(1)
    for data in (b"hello", b"abc" * 20, b"x"):
        echo(driver, events, data)
    assert peer.stop(1) == 3
    assert peer.device.stopped == [1]
    # A driver that goes on where it was, as after a pause: next_used comes from the ring.
    peer.describe(driver, base=3)
    peer.connect(events, 1)
    echo(driver, events, b"again")
    assert peer.stop(1) == 4
    assert peer.stop(1) == 4


def test_without_protocol_features_a_ring_starts_enabled(peer: Peer, events: ToyEvents) -> None:
    peer.set(Request.SET_FEATURES, U64.pack(TOY_FEATURES))
    peer.share_memory()
    driver = ToyDriver(peer.memory, 0, 0x4000)
    peer.describe(driver)
    peer.connect(events, 0)
    echo(driver, events, b"old front end")


def start(peer: Peer, events: ToyEvents, index: int = 0, base: int = 0x4000) -> ToyDriver:
    peer.negotiate()
    peer.share_memory()
    driver = ToyDriver(peer.memory, index, base)
    peer.describe(driver)
    peer.connect(events, index)
    peer.enable(index)
    return driver


def test_buffers_made_available_before_the_start_are_found(peer: Peer, events: ToyEvents) -> None:
    peer.negotiate()
    peer.share_memory()
    driver = ToyDriver(peer.memory, 0, 0x4000)
    driver.request(b"early")
    peer.describe(driver)
    peer.connect(events, 0)
    peer.enable(0)
    wait_for_answer(driver, events.calls[0], 0, b"early")


def test_a_disabled_ring_rests(peer: Peer, events: ToyEvents) -> None:
    driver = start(peer, events)
    echo(driver, events, b"one")
    peer.enable(0, 0)
    assert peer.device.stopped == [0]
    driver.request(b"two")
    os.eventfd_write(events.kicks[0], 1)
    peer.ask(Request.GET_FEATURES)
    assert driver.used_idx() == 1
    peer.enable(0)
    wait_for_answer(driver, events.calls[0], 1, b"two")


def test_call_moves_while_the_ring_runs(peer: Peer, events: ToyEvents) -> None:
    driver = start(peer, events)
    assert peer.set(Request.SET_VRING_CALL, U64.pack(0), (events.calls[1],)) == 0
    driver.request(b"moved")
    os.eventfd_write(events.kicks[0], 1)
    wait_for_answer(driver, events.calls[1], 0, b"moved")
    assert not readable(events.calls[0], 0)
    assert peer.set(Request.SET_VRING_CALL, U64.pack(0 | VRING_NO_FD)) == 0
    assert peer.device.started == [0]
    assert peer.device.stopped == []


def test_kick_without_descriptor_means_polling(peer: Peer, events: ToyEvents) -> None:
    driver = start(peer, events)
    assert peer.set(Request.SET_VRING_KICK, U64.pack(0 | VRING_NO_FD)) == 0
    driver.request(b"polled")
    wait_for_answer(driver, events.calls[0], 0, b"polled")


def test_memory_changes_under_a_running_ring(peer: Peer, events: ToyEvents) -> None:
    driver = start(peer, events)
    echo(driver, events, b"before")
    other_user = 0x5500_0000_0000
    peer.describe(driver, base=1, user=USER)
    peer.share_memory()
    echo(driver, events, b"same addresses")
    # At other addresses the ring is nowhere, until it is described again.
    err = os.eventfd(0)
    assert peer.set(Request.SET_VRING_ERR, U64.pack(0), (err,)) == 0
    peer.share_memory(other_user)
    assert readable(err)
    os.close(err)
    peer.describe(driver, base=2, user=other_user)
    echo(driver, events, b"after")


def test_memory_region_by_region(peer: Peer, events: ToyEvents) -> None:
    peer.negotiate()
    assert U64.unpack(peer.ask(Request.GET_MAX_MEM_SLOTS))[0] >= 8
    low, high = peer.memory.regions
    regions = [SINGLE_MEM_REGION.pack(0, r.gpa, r.size, USER + r.gpa, r.offset) for r in (low, high)]
    driver = ToyDriver(peer.memory, 0, 16 * MIB)
    assert peer.set(Request.ADD_MEM_REG, regions[0], (low.fd,)) == 0
    assert peer.set(Request.ADD_MEM_REG, regions[1], (high.fd,)) == 0
    peer.describe(driver)
    peer.connect(events, 0)
    peer.enable(0)
    echo(driver, events, b"high")
    assert peer.set(Request.REM_MEM_REG, regions[0], (low.fd,)) == 0
    echo(driver, events, b"still there")
    assert "to remove" in peer.broken(Request.REM_MEM_REG, regions[0])


def test_ring_outside_memory_is_the_guests_fault(peer: Peer, events: ToyEvents) -> None:
    peer.negotiate()
    peer.share_memory()
    driver = ToyDriver(peer.memory, 0, 0x4000)
    err = os.eventfd(0)
    peer.describe(driver)
    peer.describe(driver, user=USER + 4 * MIB)
    assert peer.set(Request.SET_VRING_ERR, U64.pack(0), (err,)) == 0
    peer.connect(events, 0)
    peer.enable(0)
    assert readable(err)
    os.eventfd_read(err)
    assert peer.device.started == []
    # The last bytes of a region: in it, but the ring is not.
    top = USER + 2 * MIB - 16
    assert peer.set(Request.SET_VRING_ADDR, VRING_ADDR.pack(0, 0, top, top, top, 0)) == 0
    assert readable(err)
    os.close(err)
    peer.describe(driver)
    echo(driver, events, b"put right")


def test_bad_chain_is_reported_on_the_err_eventfd(peer: Peer, events: ToyEvents) -> None:
    driver = start(peer, events)
    err = os.eventfd(0)
    assert peer.set(Request.SET_VRING_ERR, U64.pack(0), (err,)) == 0
    driver.chain(0, [(4 * MIB, 64, True)])
    os.eventfd_write(events.kicks[0], 1)
    assert readable(err)
    os.close(err)
    assert peer.stop(0) == 0


def test_reset_keeps_memory_and_call(peer: Peer, events: ToyEvents) -> None:
    driver = start(peer, events)
    echo(driver, events, b"first life")
    assert peer.set(Request.SET_STATUS, U64.pack(15)) == 0
    assert U64.unpack(peer.ask(Request.GET_STATUS)) == (15,)
    assert peer.set(Request.SET_STATUS, U64.pack(0)) == 0
    assert peer.device.stopped == [0]
    assert peer.device.accepted == 0
    features = TOY_FEATURES | VHOST_USER_F_PROTOCOL_FEATURES
    assert peer.set(Request.SET_FEATURES, U64.pack(features)) == 0
    driver = ToyDriver(peer.memory, 0, 0x8000)
    peer.describe(driver)
    assert peer.set(Request.SET_VRING_KICK, U64.pack(0), (events.kicks[0],)) == 0
    peer.enable(0)
    echo(driver, events, b"second life")
    assert peer.set(Request.RESET_DEVICE) == 0
    assert peer.set(Request.RESET_OWNER) == 0
    assert peer.device.stopped == [0, 0]


def test_config(peer: Peer) -> None:
    peer.negotiate()

    def get(offset: int, size: int) -> bytes:
        return peer.ask(Request.GET_CONFIG, CONFIG_HEADER.pack(offset, size, 0) + bytes(size))

    assert get(0, 4) == CONFIG_HEADER.pack(0, 4, 0) + CONFIG[:4]
    assert get(30, 8) == CONFIG_HEADER.pack(30, 8, 0) + CONFIG[30:] + bytes(6)
    assert get(250, 8) == b""
    assert peer.ask(Request.GET_CONFIG, CONFIG_HEADER.pack(0, 0xFFFFFFFF, 0)) == b""
    assert peer.set(Request.SET_CONFIG, CONFIG_HEADER.pack(8, 2, 0) + b"ok") == 0
    assert get(8, 2)[CONFIG_HEADER.size :] == b"ok"
    assert peer.set(Request.SET_CONFIG, CONFIG_HEADER.pack(0, 2, 0) + b"no") != 0
    assert peer.set(Request.SET_CONFIG, CONFIG_HEADER.pack(8, 4, 0) + b"no") != 0
    assert get(0, 2)[CONFIG_HEADER.size :] == CONFIG[:2]


def test_config_change_is_announced(peer: Peer) -> None:
    assert peer.backend is not None
    peer.backend.notify_config_changed()  # nobody to tell yet
    peer.negotiate()
    ours, theirs = socket.socketpair()
    requests = Channel(ours)
    with theirs:
        assert peer.set(Request.SET_BACKEND_REQ_FD, b"", (theirs.fileno(),)) == 0
    peer.backend.notify_config_changed()
    message = requests.receive(timeout=5)
    assert (message.request, message.flags, message.payload) == (
        BackendRequest.CONFIG_CHANGE_MSG,
        VERSION,
        b"",
    )
    requests.close()
    peer.backend.notify_config_changed()  # nobody listens any more


BROKEN = [
    (Request.SET_FEATURES, U64.pack(1 << 40), 0),
    (Request.SET_FEATURES, b"1234", 0),
    (Request.SET_PROTOCOL_FEATURES, U64.pack(1 << 11), 0),
    (Request.GET_FEATURES, b"", 1),
    (Request.GET_FEATURES, b"1", 0),
    (Request.SET_LOG_BASE, U64.pack(0), 0),
    (0, b"", 0),
    (4096, b"", 0),
    (Request.SET_VRING_NUM, VRING_STATE.pack(2, 8), 0),
    (Request.SET_VRING_NUM, VRING_STATE.pack(0, 0), 0),
    (Request.SET_VRING_NUM, VRING_STATE.pack(0, 65536), 0),
    (Request.SET_VRING_BASE, VRING_STATE.pack(0, 65536), 0),
    (Request.GET_VRING_BASE, VRING_STATE.pack(255, 0), 0),
    (Request.SET_VRING_ENABLE, VRING_STATE.pack(0, 2), 0),
    (Request.SET_VRING_KICK, U64.pack(0), 0),
    (Request.SET_VRING_KICK, U64.pack(VRING_NO_FD), 1),
    (Request.SET_VRING_CALL, U64.pack(7), 1),
    (Request.SET_VRING_CALL, U64.pack(0), 2),
    (Request.SET_BACKEND_REQ_FD, b"", 0),
    (Request.SET_BACKEND_REQ_FD, b"", 1),
    (Request.GET_CONFIG, b"12", 0),
    (Request.SET_MEM_TABLE, b"", 0),
    (Request.SET_MEM_TABLE, MEM_TABLE.pack(1, 0), 0),
    (Request.SET_MEM_TABLE, MEM_TABLE.pack(1, 0) + MEM_REGION.pack(0, MIB, USER, 0), 0),
    (Request.SET_MEM_TABLE, MEM_TABLE.pack(0xFFFFFFFF, 0), 0),
    (Request.ADD_MEM_REG, SINGLE_MEM_REGION.pack(0, 0, MIB, USER, 0), 0),
]


@pytest.mark.parametrize(("request_number", "payload", "fd_count"), BROKEN)
def test_broken_messages_end_the_session(
    peer: Peer, request_number: int, payload: bytes, fd_count: int
) -> None:
    fds = (peer.memory.regions[0].fd,) * fd_count
    peer.negotiate()
    assert peer.broken(request_number, payload, fds)


REGIONS = [
    MEM_REGION.pack(0, 4 * MIB, USER, 0),  # longer than its file
    MEM_REGION.pack(0, MIB, USER, 1),  # offset off a page
    MEM_REGION.pack(0, 0, USER, 0),
    MEM_REGION.pack(0, MIB, (1 << 64) - 4096, 0),
    MEM_REGION.pack((1 << 64) - 4096, MIB, USER, 0),
    MEM_REGION.pack(0, (1 << 64) - 1, USER, 0),
    MEM_REGION.pack(0, MIB, USER, 1 << 63),
]


@pytest.mark.parametrize("region", REGIONS)
def test_regions_that_cannot_be(peer: Peer, region: bytes) -> None:
    peer.negotiate()
    peer.share_memory()
    peer.broken(Request.SET_MEM_TABLE, MEM_TABLE.pack(1, 0) + region, (peer.memory.regions[0].fd,))


@pytest.mark.parametrize("second", [(MIB // 2, USER + MIB), (4 * MIB, USER + MIB // 2)])
def test_regions_that_overlap(peer: Peer, second: tuple[int, int]) -> None:
    peer.negotiate()
    table = (
        MEM_TABLE.pack(2, 0)
        + MEM_REGION.pack(0, MIB, USER, 0)
        + MEM_REGION.pack(second[0], MIB, second[1], 0)
    )
    assert "overlap" in peer.broken(Request.SET_MEM_TABLE, table, (peer.memory.regions[0].fd,) * 2)


def test_features_are_settled_while_a_ring_runs(peer: Peer, events: ToyEvents) -> None:
    driver = start(peer, events)
    assert peer.set(Request.SET_FEATURES, U64.pack(TOY_FEATURES | VHOST_USER_F_PROTOCOL_FEATURES)) == 0
    echo(driver, events, b"the same again is fine")
    assert "while a ring runs" in peer.broken(Request.SET_FEATURES, U64.pack(VHOST_USER_F_PROTOCOL_FEATURES))


def test_a_reply_is_no_request(peer: Peer) -> None:
    peer.channel.send(Request.GET_FEATURES, flags=REPLY)
    with pytest.raises(EOFError):
        peer.channel.receive(timeout=5)
    assert peer.thread is not None
    peer.thread.join(10)
    assert "reply" in str(peer.errors.pop())


small = st.integers(0, 3)
address = st.sampled_from([0, 16, 0x4000, MIB, 2 * MIB - 8, 16 * MIB, (1 << 64) - 16]).map(
    lambda a: a % (1 << 64)
)
REQUESTS = [number for name, number in vars(Request).items() if isinstance(number, int)]
payloads = st.one_of(
    st.binary(max_size=64),
    st.builds(U64.pack, st.one_of(small, st.sampled_from([VRING_NO_FD, VRING_NO_FD + 1, 15, TOY_FEATURES]))),
    st.builds(VRING_STATE.pack, small, st.sampled_from([0, 1, 8, 256, 32768, 65535])),
    st.builds(VRING_ADDR.pack, small, st.just(0), address, address, address, st.just(0)),
    st.builds(lambda gpa, user: MEM_TABLE.pack(1, 0) + MEM_REGION.pack(gpa, MIB, user, 0), address, address),
    st.builds(
        lambda offset, size: CONFIG_HEADER.pack(offset, size, 0) + bytes(size), small, st.integers(0, 40)
    ),
    st.builds(SINGLE_MEM_REGION.pack, st.just(0), address, st.just(MIB), address, st.just(0)),
)
messages = st.tuples(st.one_of(st.sampled_from(REQUESTS), st.integers(0, 50)), payloads, st.integers(0, 2))


@given(st.lists(messages, max_size=12), st.binary(max_size=40))
@settings(max_examples=60, deadline=None)
def test_nothing_but_protocol_errors(script: list[tuple[int, bytes, int]], tail: bytes) -> None:
    with session() as peer:
        peer.negotiate()
        fd = peer.memory.regions[0].fd
        try:
            for number, payload, fd_count in script:
                peer.channel.send(number, payload, (fd,) * fd_count, timeout=5)
            with socket.socket(fileno=os.dup(peer.channel.fileno())) as raw:
                raw.sendall(tail)
                raw.shutdown(socket.SHUT_WR)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            pass
        assert peer.thread is not None
        peer.thread.join(20)
        assert not peer.thread.is_alive()
        assert all(isinstance(error, ProtocolError) for error in peer.errors), peer.errors
        peer.errors.clear()


def test_header_layouts() -> None:
    """Sizes from the C structures of QEMU's hw/virtio/vhost-user.c and the kernel's linux/vhost_types.h."""
    layouts: list[tuple[struct.Struct, int]] = [
        (HEADER, 12),
        (VRING_STATE, 8),
        (VRING_ADDR, 40),
        (MEM_TABLE, 8),
        (MEM_REGION, 32),
        (SINGLE_MEM_REGION, 40),
        (CONFIG_HEADER, 12),
        (INFLIGHT_PADDED, 24),
    ]
    assert [layout.size for layout, _ in layouts] == [size for _, size in layouts]


def test_a_worker_imports_little() -> None:
    script = "import sys; sys.path.insert(0, sys.argv[1]); before = set(sys.modules)\n"
    script += "import devices.vhost.backend\nprint(*sorted(set(sys.modules) - before))"
    output = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, os.getcwd()], capture_output=True, text=True, check=True
    ).stdout
    heavy = {"argparse", "collections", "dataclasses", "enum", "functools", "logging", "pathlib", "re"}
    heavy |= {"socket", "subprocess", "threading", "typing"}
    assert not heavy & set(output.split())
    assert [name for name in output.split() if name.startswith("devices.vhost.")] == [
        "devices.vhost.backend",
        "devices.vhost.channel",
        "devices.vhost.inflight",
        "devices.vhost.memory_table",
        "devices.vhost.messages",
    ]
