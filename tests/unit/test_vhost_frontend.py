"""The front end against our back end, and against peers that die, keep silent or talk nonsense
(devices/vhost/frontend.py)."""

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.errors import GuestError
from devices.memory import GuestMemory
from devices.vhost.backend import PROTOCOL_FEATURES, Backend
from devices.vhost.channel import Channel, Message
from devices.vhost.frontend import VhostUserDevice
from devices.vhost.messages import (
    HEADER,
    NEED_REPLY,
    REPLY,
    U64,
    VERSION,
    VHOST_USER_F_PROTOCOL_FEATURES,
    BackendRequest,
    ProtocolError,
    Request,
)
from devices.virtio.device import VIRTIO_F_EVENT_IDX, VIRTIO_ID_BLOCK, QueueConfig, VirtioDevice
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
    open_fds,
    readable,
)


def connect(
    sock: socket.socket, memory: GuestMemory, board: ToyBoard, failures: list[str], timeout: float = 10.0
) -> VhostUserDevice:
    return VhostUserDevice(
        sock,
        name="toy0",
        device_id=VIRTIO_ID_BLOCK,
        queue_sizes=(64, 64),
        memory=memory,
        board=board,
        on_failure=failures.append,
        config_size=len(CONFIG),
        timeout=timeout,
    )


class Setup:
    def __init__(
        self, device: VhostUserDevice, toy: ToyDevice, backend: Backend, memory: GuestMemory, board: ToyBoard
    ) -> None:
        self.device = device
        self.toy = toy
        self.backend = backend
        self.memory = memory
        self.board = board
        self.events = ToyEvents()
        self.failures: list[str] = []

    def activate(self, *bases: int, features: int = TOY_FEATURES) -> list[ToyDriver]:
        drivers = [ToyDriver(self.memory, index, base) for index, base in enumerate(bases)]
        self.device.activate(features, [driver.config for driver in drivers], self.events)
        return drivers

    def echo(self, driver: ToyDriver, data: bytes, call: int | None = None) -> None:
        index = driver.config.index
        number = driver.used_idx()
        driver.request(data)
        os.eventfd_write(self.events.kicks[index], 1)
        call = self.events.calls[index] if call is None else call
        assert readable(call)
        os.eventfd_read(call)
        assert driver.used_idx() == number + 1
        assert driver.answer(number) == data[::-1]


@pytest.fixture
def setup() -> Iterator[Setup]:
    before = open_fds()
    ours, theirs = socket.socketpair()
    toy = ToyDevice()
    board = ToyBoard()
    failures: list[str] = []
    with guest_memory() as memory, backend_thread(toy, theirs) as (backend, errors, _):
        device = connect(ours, memory, board, failures)
        setup = Setup(device, toy, backend, memory, board)
        setup.failures = failures
        yield setup
        device.reset()
        device.close()
        device.close()
    setup.events.close()
    assert board.watched == {}
    assert not errors
    assert open_fds() == before, "descriptors leaked"


def test_is_a_virtio_device(setup: Setup) -> None:
    device: VirtioDevice = setup.device
    assert device.features == TOY_FEATURES
    assert device.features & VHOST_USER_F_PROTOCOL_FEATURES == 0


def test_requests_go_round(setup: Setup) -> None:
    first, second = setup.activate(0x4000, 16 * MIB)
    assert setup.toy.accepted == TOY_FEATURES
    for number in range(10):
        setup.echo(first, b"request %d" % number)
        setup.echo(second, b"REQUEST %d" % number)
    assert setup.failures == []


def test_the_driver_accepts_less(setup: Setup) -> None:
    setup.activate(0x4000, features=1 << 32 | VIRTIO_F_EVENT_IDX)
    assert setup.toy.accepted == 1 << 32


def test_reset_is_quiet_and_another_driver_may_come(setup: Setup) -> None:
    (driver,) = setup.activate(0x4000)
    setup.echo(driver, b"first")
    setup.device.reset()
    assert setup.toy.stopped == [0]
    driver.request(b"nobody serves this")
    os.eventfd_write(setup.events.kicks[0], 1)
    assert setup.device.read_config(0, 1) == CONFIG[:1]
    assert driver.used_idx() == 1
    first, second = setup.activate(0x10000, 0x20000)
    setup.echo(first, b"another")
    setup.echo(second, b"driver")
    setup.device.reset()
    setup.device.reset()


def test_call_moves(setup: Setup) -> None:
    setup.device.set_call(0, setup.events.calls[1])  # not active: nothing to move
    (driver,) = setup.activate(0x4000)
    setup.device.set_call(0, setup.events.calls[1])
    setup.echo(driver, b"there", call=setup.events.calls[1])
    setup.device.set_call(0, -1)
    setup.device.set_call(0, setup.events.calls[0])
    setup.echo(driver, b"and back")


def test_config_is_cached_until_it_changes(setup: Setup) -> None:
    setup.activate(0x4000)
    assert setup.device.read_config(0, 32) == CONFIG
    setup.toy.config[0:4] = b"news"
    assert setup.device.read_config(0, 4) == CONFIG[:4]
    setup.backend.notify_config_changed()
    assert setup.board.turn()
    assert setup.events.config_changes == 1
    assert setup.device.read_config(0, 4) == b"news"
    assert setup.device.read_config(30, 6) == CONFIG[30:] + bytes(4)
    assert setup.device.read_config(4000, 2) == bytes(2)


def test_config_writes_reach_the_back_end(setup: Setup) -> None:
    setup.device.write_config(8, b"text")
    assert setup.device.read_config(6, 8) == CONFIG[6:8] + b"text" + CONFIG[12:14]
    setup.device.write_config(0, b"read-only")
    setup.device.write_config(31, b"past the end")
    assert setup.device.read_config(0, 8) == CONFIG[:8]
    assert setup.failures == []


@pytest.mark.parametrize(
    "queue",
    [
        QueueConfig(0, 8, 0x4001, 0x5000, 0x6000),
        QueueConfig(0, 8, 0x4000, 0x5001, 0x6000),
        QueueConfig(0, 8, 0x4000, 0x5000, 0x6002),
        QueueConfig(0, 8, 4 * MIB, 0x5000, 0x6000),
        QueueConfig(0, 8, 0x4000, 2 * MIB - 8, 0x6000),
        QueueConfig(0, 7, 0x4000, 0x5000, 0x6000),
        QueueConfig(0, 128, 0x4000, 0x5000, 0x6000),
        QueueConfig(2, 8, 0x4000, 0x5000, 0x6000),
    ],
)
def test_impossible_rings_are_the_guests_fault(setup: Setup, queue: QueueConfig) -> None:
    with pytest.raises(GuestError):
        setup.device.activate(TOY_FEATURES, [queue], setup.events)
    assert setup.failures == []
    (driver,) = setup.activate(0x4000)
    setup.echo(driver, b"goes on")


def test_a_bad_chain_asks_for_a_reset(setup: Setup) -> None:
    first, second = setup.activate(0x4000, 0x8000)
    first.chain(0, [(4 * MIB, 16, True)])
    os.eventfd_write(setup.events.kicks[0], 1)
    assert setup.board.turn()
    assert setup.events.resets == ["toy0: the back end cannot use ring 0"]
    setup.echo(second, b"the other ring lives")
    setup.device.reset()
    (driver,) = setup.activate(0x4000)
    setup.echo(driver, b"and after a reset this one")
    assert setup.failures == []


def test_a_dead_back_end_is_reported_once(setup: Setup) -> None:
    setup.activate(0x4000)
    setup.device._connection.hang_up()  # what the back end's end looks like from here
    while not setup.failures:
        assert setup.board.turn()
    assert setup.failures == ["toy0: the peer closed the connection"]
    setup.device.set_call(0, -1)
    setup.device.write_config(8, b"x")
    setup.device.read_config(0, 4)
    setup.device.reset()
    setup.activate(0x4000)
    setup.device.reset()
    assert len(setup.failures) == 1


Answer = Callable[[Channel, Message], None]


class Peer:
    """A back end that says what a test wants. Well-behaved where the test does not say otherwise."""

    def __init__(self, channel: Channel, answers: dict[int, Answer], features: int) -> None:
        self.channel = channel
        self.answers = answers
        self.features = features
        self.asked: list[int] = []
        self.requests: Channel | None = None

    def serve(self) -> None:
        try:
            while True:
                self.answer(self.channel.receive())
        except (EOFError, ProtocolError):
            pass

    def answer(self, message: Message) -> None:
        self.asked.append(message.request)
        if message.request == Request.SET_BACKEND_REQ_FD:
            self.requests = Channel(socket.socket(fileno=message.take_fd()))
        message.close()
        if message.request in self.answers:
            self.answers[message.request](self.channel, message)
        elif message.request == Request.GET_FEATURES:
            self.reply(message, U64.pack(self.features))
        elif message.request == Request.GET_PROTOCOL_FEATURES:
            self.reply(message, U64.pack(PROTOCOL_FEATURES))
        elif message.request == Request.GET_INFLIGHT_FD:
            self.channel.send(message.request, message.payload, [0], REPLY)
        elif message.request == Request.GET_QUEUE_NUM:
            self.reply(message, U64.pack(2))
        elif message.request in (Request.GET_CONFIG, Request.GET_VRING_BASE):
            self.reply(message, message.payload)
        elif message.flags & NEED_REPLY:
            self.reply(message, U64.pack(0))

    def reply(self, message: Message, payload: bytes) -> None:
        self.channel.send(message.request, payload, flags=REPLY)


@contextmanager
def faked(
    answers: dict[int, Answer] | None = None, features: int = TOY_FEATURES | VHOST_USER_F_PROTOCOL_FEATURES
) -> Iterator[tuple[Peer, Callable[[], VhostUserDevice], ToyBoard, list[str]]]:
    before = open_fds()
    ours, theirs = socket.socketpair()
    peer = Peer(Channel(theirs), answers or {}, features)
    thread = threading.Thread(target=peer.serve)
    thread.start()
    board = ToyBoard()
    failures: list[str] = []
    devices: list[VhostUserDevice] = []
    with guest_memory() as memory:

        def make() -> VhostUserDevice:
            devices.append(connect(ours, memory, board, failures, timeout=2.0))
            return devices[0]

        try:
            yield peer, make, board, failures
        finally:
            for device in devices:
                device.close()
            ours.close()
            thread.join(10)
            peer.channel.close()
            if peer.requests is not None:
                peer.requests.close()
    assert not thread.is_alive()
    assert board.watched == {}
    assert open_fds() == before, "descriptors leaked"


def drivers(device: VhostUserDevice) -> list[QueueConfig]:
    return [QueueConfig(0, 8, 0x4000, 0x5000, 0x6000)]


@contextmanager
def toy_events() -> Iterator[ToyEvents]:
    events = ToyEvents()
    yield events
    events.close()


def silent(channel: Channel, message: Message) -> None:
    pass


def wrong_request(channel: Channel, message: Message) -> None:
    channel.send(message.request + 1, U64.pack(0), flags=REPLY)


def not_a_reply(channel: Channel, message: Message) -> None:
    channel.send(message.request, U64.pack(0))


def wrong_size(channel: Channel, message: Message) -> None:
    channel.send(message.request, b"123", flags=REPLY)


def with_descriptor(channel: Channel, message: Message) -> None:
    channel.send(message.request, U64.pack(TOY_FEATURES), [0], flags=REPLY)


def refuse(channel: Channel, message: Message) -> None:
    channel.send(message.request, U64.pack(1), flags=REPLY)


def hang_up(channel: Channel, message: Message) -> None:
    channel.shutdown()


@pytest.mark.parametrize("request_number", [Request.GET_FEATURES, Request.SET_OWNER, Request.GET_CONFIG])
@pytest.mark.parametrize("answer", [wrong_request, not_a_reply, wrong_size, with_descriptor, refuse, hang_up])
def test_an_unfit_back_end_is_not_connected(request_number: int, answer: Answer) -> None:
    if (answer, request_number) == (refuse, Request.GET_FEATURES):
        return  # 1 is a fair answer to that
    with faked({request_number: answer}) as (_, make, _, failures):
        with pytest.raises(ProtocolError, match="toy0: "):
            make()
        assert failures == []


def test_a_silent_back_end_is_not_waited_for() -> None:
    before = open_fds()
    ours, theirs = socket.socketpair()
    with (
        theirs,
        guest_memory() as memory,
        pytest.raises(ProtocolError, match=r"toy0: no answer to GET_FEATURES in 0\.05 s"),
    ):
        connect(ours, memory, ToyBoard(), [], timeout=0.05)
    assert open_fds() == before


def test_too_few_queues() -> None:
    def one(channel: Channel, message: Message) -> None:
        channel.send(message.request, U64.pack(1), flags=REPLY)

    with (
        faked({Request.GET_QUEUE_NUM: one}) as (_, make, _, _),
        pytest.raises(ProtocolError, match="1 queues; 2 are needed"),
    ):
        make()


LATER = [
    Request.SET_FEATURES,
    Request.SET_MEM_TABLE,
    Request.GET_INFLIGHT_FD,
    Request.SET_INFLIGHT_FD,
    Request.SET_VRING_ADDR,
    Request.SET_VRING_KICK,
    Request.SET_VRING_ENABLE,
]


@pytest.mark.parametrize("request_number", LATER)
@pytest.mark.parametrize("answer", [wrong_request, not_a_reply, wrong_size, refuse, hang_up])
def test_nonsense_while_activating_is_one_failure(request_number: int, answer: Answer) -> None:
    with faked({request_number: answer}) as (_, make, _, failures), toy_events() as events:
        device = make()
        device.activate(TOY_FEATURES, drivers(device), events)
        assert len(failures) == 1
        assert failures[0].startswith("toy0: ")
        device.reset()
        device.activate(TOY_FEATURES, drivers(device), events)
        assert len(failures) == 1


def test_silence_at_reset_is_a_failure() -> None:
    with faked({Request.GET_VRING_BASE: hang_up}) as (_, make, _, failures), toy_events() as events:
        device = make()
        device.activate(TOY_FEATURES, drivers(device), events)
        device.reset()
        assert failures == ["toy0: the peer closed the connection"]


def test_an_old_back_end_without_protocol_features() -> None:
    with faked(features=TOY_FEATURES) as (peer, make, _, failures), toy_events() as events:
        device = make()
        assert device.read_config(0, 4) == bytes(4)
        device.write_config(0, b"lost")
        device.activate(TOY_FEATURES, drivers(device), events)
        device.set_call(0, events.calls[1])
        device.reset()
        assert failures == []
        assert Request.GET_PROTOCOL_FEATURES not in peer.asked
        assert Request.SET_VRING_ENABLE not in peer.asked
        assert Request.SET_VRING_KICK in peer.asked
        assert Request.GET_CONFIG not in peer.asked


def test_talking_out_of_turn_is_a_failure() -> None:
    with faked() as (peer, make, board, failures):
        make()
        peer.channel.send(Request.GET_FEATURES, U64.pack(0), flags=REPLY)
        assert board.turn()
        assert failures == ["toy0: GET_FEATURES came unasked"]
        assert board.watched == {}


def test_config_change_with_a_reply_wanted() -> None:
    with faked() as (peer, make, board, failures), toy_events() as events:
        device = make()
        device.activate(TOY_FEATURES, drivers(device), events)
        assert peer.requests is not None
        asked = len(peer.asked)
        peer.requests.send(BackendRequest.CONFIG_CHANGE_MSG, flags=NEED_REPLY)
        assert board.turn()
        reply = peer.requests.receive(timeout=5)
        assert (reply.request, reply.flags, reply.payload) == (2, VERSION | REPLY, U64.pack(0))
        assert events.config_changes == 1
        assert len(peer.asked) == asked, "the main loop asked the back end"
        device.read_config(0, 1)
        assert peer.asked[asked:] == [Request.GET_CONFIG]
        assert failures == []


def test_config_that_changes_while_it_is_fetched_is_not_kept() -> None:
    """Also: the main loop goes on while a vCPU thread waits for the back end."""
    with faked() as (peer, make, board, failures):
        device = make()
        assert peer.requests is not None
        requests = peer.requests

        def change_then_answer(channel: Channel, message: Message) -> None:
            requests.send(BackendRequest.CONFIG_CHANGE_MSG)
            assert board.turn()
            peer.reply(message, message.payload[:-1] + b"o")
            peer.answers[Request.GET_CONFIG] = new_answer

        def new_answer(channel: Channel, message: Message) -> None:
            peer.reply(message, message.payload[:-1] + b"n")

        requests.send(BackendRequest.CONFIG_CHANGE_MSG)
        assert board.turn()
        peer.answers[Request.GET_CONFIG] = change_then_answer
        assert device.read_config(31, 1) == b"o"
        assert device.read_config(31, 1) == b"n"
        assert failures == []


def test_a_ring_is_kicked_when_it_starts() -> None:
    with faked() as (_, make, _, _), toy_events() as events:
        device = make()
        device.activate(TOY_FEATURES, drivers(device), events)
        assert readable(events.kicks[0], 0)


BAD_REQUESTS = [
    HEADER.pack(3, VERSION, 24) + bytes(24),
    HEADER.pack(2, VERSION | REPLY, 0),
    HEADER.pack(2, 0, 0),
    HEADER.pack(2, VERSION, 1 << 20),
    HEADER.pack(99, VERSION | NEED_REPLY, 0),
]


@pytest.mark.parametrize("stream", BAD_REQUESTS)
def test_bad_back_end_requests_are_a_failure(stream: bytes) -> None:
    with faked() as (peer, make, board, failures):
        make()
        assert peer.requests is not None
        with socket.socket(fileno=os.dup(peer.requests.fileno())) as raw:
            socket.send_fds(raw, [stream], [0])
        assert board.turn()
        assert len(failures) == 1


def test_half_a_back_end_request_does_not_hold_up_the_main_loop() -> None:
    with faked() as (peer, make, board, failures):
        make()
        assert peer.requests is not None
        with socket.socket(fileno=os.dup(peer.requests.fileno())) as raw:
            raw.sendall(HEADER.pack(2, VERSION, 0)[:5])
            assert board.turn()
            assert not board.turn(0)
            raw.sendall(HEADER.pack(2, VERSION, 0)[5:])
            assert board.turn()
        assert failures == []


def test_a_back_end_that_floods_and_does_not_read_is_a_failure() -> None:
    with faked() as (peer, make, board, failures):
        make()
        assert peer.requests is not None
        while not failures:
            peer.requests.send(BackendRequest.CONFIG_CHANGE_MSG, flags=NEED_REPLY, timeout=0)
            assert board.turn()
        assert failures == ["toy0: no answer in time"]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_random_answers(data: st.DataObject) -> None:
    replies = data.draw(
        st.lists(
            st.one_of(
                st.none(),
                st.binary(min_size=1, max_size=40),
                st.tuples(st.integers(0, 45), st.integers(0, 15), st.binary(max_size=20)).map(
                    lambda t: HEADER.pack(t[0], t[1], len(t[2])) + t[2]
                ),
            ),
            max_size=40,
        )
    )

    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    peer = Peer(channel, {}, TOY_FEATURES | VHOST_USER_F_PROTOCOL_FEATURES)

    def serve() -> None:
        try:
            for reply in replies:
                message = channel.receive()
                if reply is None:
                    peer.answer(message)
                else:
                    message.close()
                    with socket.socket(fileno=os.dup(channel.fileno())) as raw:
                        raw.sendall(reply)
        except (EOFError, ProtocolError, OSError):
            pass
        channel.shutdown()

    thread = threading.Thread(target=serve)
    thread.start()
    failures: list[str] = []
    before = open_fds()
    with guest_memory() as memory, toy_events() as events:
        board = ToyBoard()
        try:
            # Half a message is waited for; a timeout here is as good an answer as any.
            device = connect(ours, memory, board, failures, timeout=0.05)
        except ProtocolError as error:
            assert str(error).startswith("toy0: ")
        else:
            device.activate(TOY_FEATURES, drivers(device), events)
            board.turn(0)
            device.read_config(0, 4)
            device.write_config(8, b"x")
            device.reset()
            device.read_config(0, 4)
            board.turn()
            assert len(failures) == 1, "the peer hung up in the end"
            device.close()
        thread.join(10)
        assert board.watched == {}
    channel.close()
    if peer.requests is not None:
        peer.requests.close()
    assert not thread.is_alive()
    assert open_fds() == before - 2


def test_closing_wakes_a_thread_that_waits() -> None:
    asked = threading.Event()

    def never(channel: Channel, message: Message) -> None:
        asked.set()

    with faked({Request.GET_VRING_BASE: never}) as (_, make, _, failures), toy_events() as events:
        device = make()
        device.activate(TOY_FEATURES, drivers(device), events)
        thread = threading.Thread(target=device.reset)
        thread.start()
        assert asked.wait(10)
        device.close()
        thread.join(10)
        assert not thread.is_alive()
        assert failures == []


def test_user_addresses_are_not_ours() -> None:
    """What the back end is told of memory: guest addresses, file offsets, names that mean nothing here."""
    tables: list[bytes] = []

    def keep(channel: Channel, message: Message) -> None:
        tables.append(message.payload)
        channel.send(message.request, U64.pack(0), flags=REPLY)

    with faked({Request.SET_MEM_TABLE: keep}) as (_, make, _, _), toy_events() as events:
        device = make()
        device.activate(TOY_FEATURES, drivers(device), events)
        (table,) = tables
        assert struct.unpack_from("=II", table) == (2, 0)
        low, high = struct.iter_unpack("=QQQQ", table[8:])
        assert (low[0], low[1], low[3]) == (0, 2 * MIB, 0)
        assert (high[0], high[1], high[3]) == (16 * MIB, MIB, 2 * MIB)
        assert low[2] != 0
        assert high[2] - low[2] == 16 * MIB
