"""The front end of vhost-user: a virtio device whose work is done by another process. VMM process.

Follows QEMU's docs/interop/vhost-user.rst; the back end is our own worker or anybody's (qemu-storage-daemon,
virtiofsd, passt ...). It is not trusted: a worker the guest took over may send anything, or nothing. Whatever
it does ends in one call of `on_failure`, and every wait has an end.

Locks, outermost first: the transport's, the connection's (one request at a time), `_state` (never held while
waiting). The main loop waits for `_state` only, so a back end that lets a vCPU thread wait does not stop the
main loop.
"""

import os
import socket
import threading
from collections.abc import Callable
from functools import partial

from devices.board import Board
from devices.errors import GuestError
from devices.memory import GuestMemory
from devices.vhost.channel import Channel
from devices.vhost.connection import Connection, Refused
from devices.vhost.messages import (
    CONFIG,
    MAX_MEM_TABLE_REGIONS,
    MEM_REGION,
    MEM_TABLE,
    NEED_REPLY,
    REPLY,
    U64,
    VHOST_USER_F_PROTOCOL_FEATURES,
    VRING_ADDR,
    VRING_NO_FD,
    VRING_STATE,
    BackendRequest,
    ProtocolError,
    ProtocolFeature,
    Request,
)
from devices.virtio.device import (
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_VERSION_1,
    VIRTIO_ID_BLOCK,
    VIRTIO_ID_CONSOLE,
    VIRTIO_ID_NET,
    VIRTIO_ID_SCSI,
    QueueConfig,
    QueueEvents,
)
from devices.virtio.queue import SplitQueue

# The features of the device type itself (virtio 1.2, section 2.2), and what split rings here can do.
DEFAULT_FEATURES = (1 << 24) - 1 | VIRTIO_F_INDIRECT_DESC | VIRTIO_F_VERSION_1

WANTED_PROTOCOL_FEATURES = (
    ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK | ProtocolFeature.BACKEND_REQ | ProtocolFeature.CONFIG
)

# Bytes of configuration to ask for. A back end may refuse to give more than it has: these are the structures
# of virtio 1.1, which every back end knows (virtio 1.2, chapter 5).
CONFIG_SIZES = {VIRTIO_ID_NET: 12, VIRTIO_ID_BLOCK: 60, VIRTIO_ID_CONSOLE: 12, VIRTIO_ID_SCSI: 36}

# "User addresses" are names the front end makes up for its memory (vhost-user.rst, "Memory access"). Ours are
# guest-physical addresses plus a constant: nobody dereferences them, a compromised worker learns nothing of
# our address space from them, and with the constant none is 0, which some back ends take for a null pointer.
USER_ADDRESS_BASE = 1 << 46


class VhostUserDevice:
    """A `devices.virtio.device.VirtioDevice` served by the back end at the other end of `sock`. Owns `sock`.

    The constructor makes the handshake, and raises ProtocolError, naming the device, when the back end is
    dead, silent for `timeout` seconds, or unfit. Later, such a back end is reported once by
    `on_failure(text)`, from whatever thread noticed (perhaps with the transport's lock held: it must not call
    back into the device); afterwards every method is harmless.

    `name` is for messages. `features` offered to the driver are the back end's as far as `features_mask` lets
    them through. `timeout` bounds each request, a reset included, in which the back end finishes the I/O it
    has begun.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        name: str,
        device_id: int,
        queue_sizes: tuple[int, ...],
        memory: GuestMemory,
        board: Board,
        on_failure: Callable[[str], None],
        features_mask: int = DEFAULT_FEATURES,
        config_size: int | None = None,
        timeout: float = 10.0,
    ) -> None:
        self.name = name
        self.device_id = device_id
        self.queue_sizes = queue_sizes
        self.features = 0
        self._memory = memory
        self._board = board
        self._on_failure = on_failure
        self._config_size = CONFIG_SIZES.get(device_id, 0) if config_size is None else config_size
        self._config: bytes | None = None
        self._config_generation = 0
        self._connection = Connection(sock, timeout)
        self._requests: Channel | None = None
        self._session_bit = 0
        self._state = threading.Lock()
        self._failed = False
        self._watched: list[int] = []
        self._active: list[int] = []
        self._err_fds: dict[int, int] = {}
        self._events: QueueEvents | None = None
        try:
            if len(memory.regions) > MAX_MEM_TABLE_REGIONS:
                raise ProtocolError(
                    f"{len(memory.regions)} memory regions; {MAX_MEM_TABLE_REGIONS} is the most"
                )
            self.features = self._handshake() & features_mask & ~VHOST_USER_F_PROTOCOL_FEATURES
            self._fetch_config()
        except (EOFError, OSError, ProtocolError) as error:
            self.close()
            raise ProtocolError(f"{name}: {error}") from None
        self._watch_channels()

    def read_config(self, offset: int, size: int) -> bytes:
        """From a copy, so that a vCPU waits for the back end once after a change and not for each byte."""
        config = self._config
        if config is None:
            config = self._attempt(self._fetch_config) or b""
        return config[offset : offset + size].ljust(size, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        """Pass the write on; what the back end refuses, or what is past the end, changes nothing."""
        if 0 <= offset <= offset + len(data) <= self._config_size:
            self._attempt(partial(self._store_config, offset, data))

    def activate(self, features: int, queues: list[QueueConfig], events: QueueEvents) -> None:
        for queue in queues:
            if not 0 <= queue.index < len(self.queue_sizes) or queue.size > self.queue_sizes[queue.index]:
                raise GuestError(f"{self.name}: there is no queue {queue.index} of size {queue.size}")
            # The back end would find a bad ring too, but not every one lives through it.
            SplitQueue(
                self._memory, queue.index, queue.size, queue.descriptors, queue.available, queue.used
            ).release()
        self._attempt(partial(self._activate, features, queues, events))

    def set_call(self, queue: int, fd: int) -> None:
        if queue in self._active:
            self._attempt(partial(self._set_vring_fd, Request.SET_VRING_CALL, queue, fd))

    def reset(self) -> None:
        active, self._active = self._active, []
        for index in active:
            # The reply comes when the ring is quiet. Where it stood does not matter: the driver starts over.
            self._attempt(partial(self._connection.ask, Request.GET_VRING_BASE, VRING_STATE.pack(index, 0)))
        self._drop_events()

    def close(self) -> None:
        """Close the connection, which ends the back end's session. No failure is reported any more."""
        with self._state:
            self._failed = True
        self._unwatch()
        self._drop_events()
        self._connection.close()
        with self._state:
            if self._requests is not None:
                self._requests.close()

    def _handshake(self) -> int:
        connection = self._connection
        features = connection.ask_u64(Request.GET_FEATURES)
        protocol_features = 0
        if features & VHOST_USER_F_PROTOCOL_FEATURES:
            protocol_features = connection.ask_u64(Request.GET_PROTOCOL_FEATURES) & WANTED_PROTOCOL_FEATURES
            connection.set(Request.SET_PROTOCOL_FEATURES, U64.pack(protocol_features))
            connection.reply_ack = bool(protocol_features & ProtocolFeature.REPLY_ACK)
            self._session_bit = VHOST_USER_F_PROTOCOL_FEATURES
        connection.set(Request.SET_OWNER)
        if protocol_features & ProtocolFeature.MQ:
            count = connection.ask_u64(Request.GET_QUEUE_NUM)
            if count < len(self.queue_sizes):
                raise ProtocolError(f"the back end has {count} queues; {len(self.queue_sizes)} are needed")
        if protocol_features & ProtocolFeature.BACKEND_REQ:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            self._requests = Channel(ours)
            with theirs:
                connection.set(Request.SET_BACKEND_REQ_FD, fds=(theirs.fileno(),))
        if not protocol_features & ProtocolFeature.CONFIG:
            self._config_size = 0
        return features

    def _activate(self, features: int, queues: list[QueueConfig], events: QueueEvents) -> None:
        connection = self._connection
        connection.set(Request.SET_FEATURES, U64.pack(features & self.features | self._session_bit))
        regions = self._memory.regions
        table = MEM_TABLE.pack(len(regions), 0)
        for region in regions:
            table += MEM_REGION.pack(region.gpa, region.size, USER_ADDRESS_BASE + region.gpa, region.offset)
        connection.set(Request.SET_MEM_TABLE, table, [region.fd for region in regions])
        with self._state:
            self._events = events
        for queue in queues:
            self._active.append(queue.index)
            self._start_ring(queue, events)
        for queue in queues:
            if self._session_bit:
                connection.set(Request.SET_VRING_ENABLE, VRING_STATE.pack(queue.index, 1))
            # In the specification a ring starts at its first kick, and the driver may have added buffers
            # before DRIVER_OK.
            os.eventfd_write(events.kick_fd(queue.index), 1)

    def _start_ring(self, queue: QueueConfig, events: QueueEvents) -> None:
        index = queue.index
        err_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        with self._state:
            self._err_fds[index] = err_fd
        self._board.watch(err_fd, partial(self._err_readable, index))
        self._connection.set(Request.SET_VRING_NUM, VRING_STATE.pack(index, queue.size))
        self._connection.set(Request.SET_VRING_BASE, VRING_STATE.pack(index, 0))
        addresses = (USER_ADDRESS_BASE + gpa for gpa in (queue.descriptors, queue.used, queue.available))
        self._connection.set(Request.SET_VRING_ADDR, VRING_ADDR.pack(index, 0, *addresses, 0))
        self._set_vring_fd(Request.SET_VRING_ERR, index, err_fd)
        self._set_vring_fd(Request.SET_VRING_CALL, index, events.call_fd(index))
        self._set_vring_fd(Request.SET_VRING_KICK, index, events.kick_fd(index))

    def _set_vring_fd(self, request: int, index: int, fd: int) -> None:
        if fd < 0:
            self._connection.set(request, U64.pack(index | VRING_NO_FD))
        else:
            self._connection.set(request, U64.pack(index), (fd,))

    def _fetch_config(self) -> bytes:
        generation = self._config_generation
        config = b""
        if self._config_size:
            # All of it, from the beginning: QEMU's back ends do not look at the offset.
            request = CONFIG.pack(0, self._config_size, 0) + bytes(self._config_size)
            reply = self._connection.ask(Request.GET_CONFIG, request)
            if len(reply) != len(request):
                raise ProtocolError(f"{len(reply)} bytes of configuration instead of {self._config_size}")
            config = reply[CONFIG.size :]
        with self._state:
            # The back end may have announced another change since it made this answer.
            if generation == self._config_generation:
                self._config = config
        return config

    def _store_config(self, offset: int, data: bytes) -> None:
        try:
            self._connection.set(Request.SET_CONFIG, CONFIG.pack(offset, len(data), 0) + data)
        except Refused:
            pass  # a read-only field: the write is lost, as on any device
        self._forget_config()

    def _forget_config(self) -> None:
        with self._state:
            self._config_generation += 1
            self._config = None

    def _connection_readable(self) -> None:
        self._attempt(self._connection.check_idle)

    def _requests_readable(self) -> None:
        self._attempt(self._take_request)

    def _take_request(self) -> None:
        """One request of the back end's, on the main loop: nothing here may wait for the back end."""
        with self._state:
            if self._failed or self._requests is None:
                return
            try:
                message = self._requests.receive(timeout=0)
            except TimeoutError:
                return
            with_fds = bool(message.fds)
            message.close()
            if message.request != BackendRequest.CONFIG_CHANGE_MSG or message.flags & REPLY or with_fds:
                raise ProtocolError(f"back-end request {message.request} was not negotiated")
            if message.flags & NEED_REPLY:
                # Before the guest is told: that may take the transport's lock, and its holder may wait for
                # the back end.
                self._requests.send(message.request, U64.pack(0), flags=REPLY, timeout=0)
            events = self._events
        self._forget_config()
        if events is not None:
            events.config_changed()

    def _err_readable(self, index: int) -> None:
        with self._state:
            fd = self._err_fds.get(index)
            events = self._events
            if fd is None or events is None:
                return  # reset in the meantime
            try:
                os.eventfd_read(fd)
            except BlockingIOError:
                return
        events.needs_reset(f"{self.name}: the back end cannot use ring {index}")

    def _attempt(self, action: Callable[[], bytes | None]) -> bytes | None:
        """Do it, unless the back end has failed; if it fails now, say so."""
        if self._failed:
            return None
        try:
            return action()
        except (EOFError, OSError, ProtocolError) as error:
            self._fail(str(error))
            return None

    def _fail(self, reason: str) -> None:
        with self._state:
            if self._failed:
                return
            self._failed = True
        self._unwatch()
        self._connection.hang_up()
        self._on_failure(f"{self.name}: {reason}")

    def _watch_channels(self) -> None:
        watches = [(self._connection.fileno(), self._connection_readable)]
        if self._requests is not None:
            watches.append((self._requests.fileno(), self._requests_readable))
        for fd, callback in watches:
            self._watched.append(fd)
            self._board.watch(fd, callback)

    def _unwatch(self) -> None:
        with self._state:
            watched, self._watched = self._watched, []
        for fd in watched:
            self._board.unwatch(fd)

    def _drop_events(self) -> None:
        with self._state:
            self._events = None
            err_fds, self._err_fds = self._err_fds, {}
        for fd in err_fds.values():
            self._board.unwatch(fd)
            os.close(fd)
