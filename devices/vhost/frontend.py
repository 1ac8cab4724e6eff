"""The front end of vhost-user: a virtio device whose work is done by another process. VMM process.

Follows QEMU's docs/interop/vhost-user.rst; the back end is our own worker or anybody's (qemu-storage-daemon,
virtiofsd, passt ...). It is not trusted: a worker the guest took over may send anything, or nothing. Whatever
it does ends in one call of `on_failure`, and every wait has an end.

A back end that keeps its requests in flight in a shared buffer (INFLIGHT_SHMFD) can be replaced by `restart`.
Until then the guest sees a slow device: configuration comes from the copy, kicks stay in their eventfds, and
what the driver sets up is kept here. So a device may also be born without a back end, and be saved and
loaded like that: the first one comes by `restart`.

A pause asks where each ring stands (GET_VRING_BASE), which the back end answers when the ring is quiet and
all it took is answered. From these positions and an empty in-flight buffer this back end goes on, or the one
that takes its place if it dies meanwhile, or one in another process that was loaded with them.

Locks, outermost first: the transport's, `_session` (the conversation with the back end, a whole restart
included), the connection's (one request at a time), `_state` (never held while waiting). The main loop waits
for `_state` only, so a back end that lets a vCPU thread wait does not stop the main loop.
"""

import os
import socket
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from devices.board import Board
from devices.errors import GuestError
from devices.memory import GuestMemory
from devices.state import SavedState
from devices.vhost.channel import Channel
from devices.vhost.connection import Connection, Refused
from devices.vhost.messages import (
    CONFIG,
    CONFIG_BY_DRIVER,
    CONFIG_BY_VMM,
    INFLIGHT,
    INFLIGHT_PADDED,
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
from devices.vhost.postcopy import LazyMemory, share_memory
from devices.virtio.device import (
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_VERSION_1,
    VIRTIO_ID_BLOCK,
    VIRTIO_ID_CONSOLE,
    VIRTIO_ID_NET,
    VIRTIO_ID_SCSI,
    ActiveDriver,
    QueueConfig,
    QueueEvents,
)
from devices.virtio.queue import SplitQueue

# The features of the device type itself (virtio 1.2, section 2.2), and what split rings here can do.
DEFAULT_FEATURES = (1 << 24) - 1 | VIRTIO_F_INDIRECT_DESC | VIRTIO_F_VERSION_1

WANTED_PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.PAGEFAULT
)

# Bytes of configuration to ask for. A back end may refuse to give more than it has: these are the structures
# of virtio 1.1, which every back end knows (virtio 1.2, chapter 5).
CONFIG_SIZES = {VIRTIO_ID_NET: 12, VIRTIO_ID_BLOCK: 60, VIRTIO_ID_CONSOLE: 12, VIRTIO_ID_SCSI: 36}

SECTOR_SIZE = 512

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
    has begun. `wait_for_end` returns when the process of a back end that has failed is gone: only then is
    the memory its rings were in the guest's again. `lazy` fills memory while it is used.

    Without `sock` the device has all of `features_mask` until a back end comes, which must have them too.
    `config` is the configuration of a device type whose back ends have none to give (virtio-fs): no driver
    can write it.
    """

    def __init__(
        self,
        sock: socket.socket | None,
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
        wait_for_end: Callable[[], None] = lambda: None,
        lazy: LazyMemory | None = None,
        config: bytes | None = None,
        protocol_features: int = WANTED_PROTOCOL_FEATURES,
    ) -> None:
        self.name = name
        self.device_id = device_id
        self.queue_sizes = queue_sizes
        self.features = 0
        self._memory = memory
        self._board = board
        self._on_failure = on_failure
        if config is not None:
            config_size = len(config)
        self._config_size = CONFIG_SIZES.get(device_id, 0) if config_size is None else config_size
        self._own_config = config
        self._config = config or b""
        self._config_stale = True
        self._config_generation = 0
        self._timeout = timeout
        self._wait_for_end = wait_for_end
        self._lazy = lazy
        self._session = threading.Lock()
        self._connection = Connection(sock or socket.socket(socket.AF_UNIX), timeout)
        self._requests: Channel | None = None
        self._session_bit = 0
        self._wanted_protocol_features = protocol_features
        self._protocol_features = 0
        self._state = threading.Lock()
        self._failed = False  # this back end; another may come
        self._closed = False
        self._watched: list[int] = []
        # What the driver set up: the features it accepted and its queues, while it is there.
        self._driver: tuple[int, list[QueueConfig]] | None = None
        self._paused = False
        # Where the rings stand that are to go on, while none runs. None: the rings run, or a back end died
        # before it said; then the in-flight buffer knows.
        self._bases: dict[int, int] | None = None
        self._written: dict[int, int] = {}  # bytes of configuration that drivers set, by offset
        self._config_differs = False  # from what the driver of a loaded device has seen
        self._inflight: tuple[int, bytes] | None = None  # the buffer's descriptor and what tells its layout
        self._err_fds: dict[int, int] = {}
        self._events: QueueEvents | None = None
        try:
            if len(memory.regions) > MAX_MEM_TABLE_REGIONS:
                raise ProtocolError(
                    f"{len(memory.regions)} memory regions; {MAX_MEM_TABLE_REGIONS} is the most"
                )
            if sock is None:
                self._connection.close()
                self._failed = True
                self.features = features_mask
                return
            self.features = self._handshake() & features_mask & ~VHOST_USER_F_PROTOCOL_FEATURES
            self._fetch_config()
        except (EOFError, OSError, ProtocolError) as error:
            self.close()
            raise ProtocolError(f"{name}: {error}") from None
        self._watch_channels()

    @property
    def failed(self) -> bool:
        """Whether there is no back end that serves this device."""
        return self._failed

    def read_config(self, offset: int, size: int) -> bytes:
        """From a copy, so that a vCPU waits for the back end once after a change and not for each byte."""
        if self._config_stale:
            with self._session:
                if self._config_stale:
                    self._attempt(self._fetch_config)
        return self._config[offset : offset + size].ljust(size, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        """Pass the write on; what the back end refuses, or what is past the end, changes nothing."""
        if 0 <= offset <= offset + len(data) <= self._config_size:
            with self._session:
                self._attempt(partial(self._store_config, offset, data))

    def activate(self, features: int, queues: list[QueueConfig], events: QueueEvents) -> None:
        self._check_queues(queues)
        with self._session:
            self._take_driver(features, queues, events, {queue.index: 0 for queue in queues})
            if not self._paused:
                self._attempt(self._start_driver)

    def _check_queues(self, queues: list[QueueConfig]) -> None:
        for queue in queues:
            if not 0 <= queue.index < len(self.queue_sizes) or queue.size > self.queue_sizes[queue.index]:
                raise GuestError(f"{self.name}: there is no queue {queue.index} of size {queue.size}")
            # The back end would find a bad ring too, but not every one lives through it.
            SplitQueue(
                self._memory, queue.index, queue.size, queue.descriptors, queue.available, queue.used
            ).release()

    def _take_driver(
        self, features: int, queues: list[QueueConfig], events: QueueEvents, bases: dict[int, int]
    ) -> None:
        self._driver = (features, queues)
        self._bases = bases
        with self._state:
            self._events = events

    def set_call(self, queue: int, fd: int) -> None:
        with self._session:
            if self._driver is not None and any(config.index == queue for config in self._driver[1]):
                self._attempt(partial(self._set_vring_fd, Request.SET_VRING_CALL, queue, fd))

    def pause(self) -> None:
        """As for every virtio device. A back end that fails here is reported, and the rings' positions come
        from the next one, when it is there: until then `save` raises ProtocolError.
        """
        with self._session:
            if not self._paused:
                self._paused = True
                if self._driver is not None:
                    self._attempt(self._stop_driver)

    def unpause(self) -> None:
        with self._session:
            if not self._paused:
                return
            self._paused = False
            with self._state:
                events = self._events
            if self._driver is None or events is None:
                return
            self._attempt(self._start_driver)
            differs, self._config_differs = self._config_differs, False
        if differs:
            events.config_changed()

    def save(self) -> dict[str, Any]:
        with self._session:
            if self._driver is not None and (self._bases is None or not self._paused):
                raise ProtocolError(f"{self.name}: the back end has not said where its rings stand")
            if self._config_stale:
                self._attempt(self._fetch_config)
            bases = self._bases if self._driver is not None else None
            return {
                "rings": {str(index): base for index, base in bases.items()} if bases is not None else None,
                "config": self._config.hex(),
                "written": {str(offset): value for offset, value in sorted(self._written.items())},
            }

    def load(self, state: dict[str, Any], driver: ActiveDriver | None) -> None:
        """The configuration may be another than the one saved (a card has another MAC): the driver is told
        when it goes on. What drivers had written to it is written again.
        """
        saved = SavedState(self.name, state)
        config = saved.data("config", self._config_size)
        written = saved.record("written")
        writes = {
            offset: written.number(str(offset), 0xFF)
            for offset in range(self._config_size)
            if str(offset) in saved.mapping("written")
        }
        bases = {}
        if driver is not None:
            self._check_queues(list(driver.queues))
            rings = saved.record("rings")
            known = saved.mapping("rings")
            # A ring that the guest broke has no position, and rests until the driver resets the device.
            for queue in driver.queues:
                if str(queue.index) in known:
                    bases[queue.index] = rings.number(str(queue.index), 0xFFFF)
        with self._session:
            self._paused = True
            for offset, value in writes.items():
                self._attempt(partial(self._store_config, offset, bytes((value,))))
            self._attempt(self._fetch_config)
            self._config_differs = self._config != config
            if driver is not None:
                self._take_driver(driver.features, list(driver.queues), driver.events, bases)

    def reset(self) -> None:
        with self._session:
            driver, self._driver = self._driver, None
            self._bases = None
            self._config_differs = False
            for queue in driver[1] if driver is not None else ():
                # The reply comes when the ring is quiet. Where it stood does not matter: the driver starts
                # over.
                request = VRING_STATE.pack(queue.index, 0)
                self._attempt(partial(self._connection.ask, Request.GET_VRING_BASE, request))
            if driver is not None and self._failed:
                self._wait_for_end()
            self._drop_inflight()
            self._drop_err_fds()
            with self._state:
                self._events = None

    def restart(self, sock: socket.socket) -> None:
        """Go on with another back end, at the other end of `sock` (owned from now on), where the one that
        failed and is gone left off; or with the first one.

        Waits for the back end, so not for the main loop. Raises ProtocolError when this one is unfit too;
        `on_failure` is not called for it.
        """
        with self._session:
            with self._state:
                if self._closed:
                    sock.close()
                    raise ProtocolError(f"{self.name}: the device is closed")
                former, self._connection = self._connection, Connection(sock, self._timeout)
                requests, self._requests = self._requests, None
            former.close()
            if requests is not None:
                requests.close()
            self._drop_err_fds()
            try:
                self._resume()
            except (EOFError, OSError, ProtocolError) as error:
                self._connection.hang_up()
                raise ProtocolError(f"{self.name}: {error}") from None
            with self._state:
                self._failed = self._closed
            self._watch_channels()

    def release(self) -> None:
        """Let the back end go, paused: it finishes, flushes and ends, and `restart` brings another one,
        perhaps with another image. No failure is reported. Does not wait."""
        with self._session:
            with self._state:
                self._failed = True
            self._unwatch()
            self._connection.hang_up()

    def resize(self, size: int) -> None:
        """Let a disk have `size` bytes, more than before. The back end makes its image longer, and then says
        itself that its configuration changed; so the driver is told.

        Waits for the back end, so not for the main loop. Raises Refused when it does not want to, and
        ProtocolError when it cannot be asked.
        """
        # struct virtio_blk_config begins with the capacity.
        data = (size // SECTOR_SIZE).to_bytes(8, "little")
        with self._session:
            if self._failed:
                raise ProtocolError(f"{self.name}: the back end is gone")
            try:
                self._connection.set(Request.SET_CONFIG, CONFIG.pack(0, len(data), CONFIG_BY_VMM) + data)
            except Refused:
                raise Refused(f"{self.name} cannot be resized to {size} bytes") from None
            except (EOFError, OSError, ProtocolError) as error:
                self._fail(str(error))
                raise ProtocolError(f"{self.name}: {error}") from None

    def close(self) -> None:
        """Close the connection, which ends the back end's session. No failure is reported any more."""
        with self._state:
            self._failed = self._closed = True
            connection = self._connection
        connection.hang_up()  # a restart under way ends at once
        with self._session:
            self._unwatch()
            self._drop_inflight()
            self._drop_err_fds()
            self._connection.close()
            with self._state:
                self._events = None
                if self._requests is not None:
                    self._requests.close()

    def _handshake(self) -> int:
        connection = self._connection
        features = connection.ask_u64(Request.GET_FEATURES)
        protocol_features = 0
        if features & VHOST_USER_F_PROTOCOL_FEATURES:
            wanted = self._wanted_protocol_features
            if self._lazy is None:
                wanted &= ~ProtocolFeature.PAGEFAULT
            protocol_features = connection.ask_u64(Request.GET_PROTOCOL_FEATURES) & wanted
            connection.set(Request.SET_PROTOCOL_FEATURES, U64.pack(protocol_features))
            connection.reply_ack = bool(protocol_features & ProtocolFeature.REPLY_ACK)
            self._session_bit = VHOST_USER_F_PROTOCOL_FEATURES
        self._protocol_features = protocol_features
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
        if not protocol_features & ProtocolFeature.CONFIG and self._own_config is None:
            self._config_size = 0
        return features

    def _resume(self) -> None:
        offered = self._handshake()
        with self._state:
            events = self._events
        if self.features & ~offered:
            raise ProtocolError(f"the back end no longer offers features {self.features & ~offered:#x}")
        before = self._config
        for offset, value in sorted(self._written.items()):
            self._store_config(offset, bytes((value,)))
        self._forget_config()
        self._fetch_config()
        if self._driver is None or events is None:
            return
        if self._bases is None:
            if not self._protocol_features & ProtocolFeature.INFLIGHT_SHMFD:
                raise ProtocolError("the back end does not know what was in flight")
            self._start_driver()
            if self._paused:
                # The one before died while it was pausing. This one has taken over what was in flight.
                self._stop_driver()
        elif not self._paused:
            self._start_driver()
        if self._config != before:
            events.config_changed()

    def _stop_driver(self) -> None:
        """Stop the rings of the driver that is there, and remember where they stand."""
        if self._driver is None or self._bases is not None:
            return
        bases = {}
        for queue in self._driver[1]:
            # The reply comes when the ring is quiet.
            reply = self._connection.ask(Request.GET_VRING_BASE, VRING_STATE.pack(queue.index, 0))
            if len(reply) != VRING_STATE.size:
                raise ProtocolError(f"reply to GET_VRING_BASE of {len(reply)} bytes")
            index, base = VRING_STATE.unpack(reply)
            if index != queue.index:
                raise ProtocolError(f"reply to GET_VRING_BASE is about ring {index}, not {queue.index}")
            bases[index] = base & 0xFFFF
            # The main loop may not have seen yet that the guest broke this ring. Such a ring does not go on.
            self._err_readable(index)
        with self._state:
            self._bases = {index: base for index, base in bases.items() if index in self._err_fds}
        self._drop_err_fds()
        # Nothing is in flight any more, and whoever goes on starts with a buffer that says so.
        self._drop_inflight()

    def _start_driver(self) -> None:
        """Start the rings from where they stand, or, when that is not known, from where the in-flight buffer
        of the back end before this one says.
        """
        with self._state:
            events = self._events
        if self._driver is None or events is None:
            return
        features, queues = self._driver
        bases, self._bases = self._bases, None
        if bases is not None:
            queues = [queue for queue in queues if queue.index in bases]
        connection = self._connection
        connection.set(Request.SET_FEATURES, U64.pack(features & self.features | self._session_bit))
        regions = self._memory.regions
        table = MEM_TABLE.pack(len(regions), 0)
        for region in regions:
            table += MEM_REGION.pack(region.gpa, region.size, USER_ADDRESS_BASE + region.gpa, region.offset)
        self._share_memory(table, [region.fd for region in regions])
        if self._protocol_features & ProtocolFeature.INFLIGHT_SHMFD:
            self._share_inflight()
        for queue in queues:
            # The in-flight buffer says it better; this is QEMU's answer for back ends that do not look there.
            base = bases[queue.index] if bases is not None else self._used_index(queue)
            self._start_ring(queue, events, base)
        for queue in queues:
            if self._session_bit:
                connection.set(Request.SET_VRING_ENABLE, VRING_STATE.pack(queue.index, 1))
            # In the specification a ring starts at its first kick, and the driver may have added buffers
            # before DRIVER_OK, or while there was no back end.
            os.eventfd_write(events.kick_fd(queue.index), 1)

    def _share_memory(self, table: bytes, fds: list[int]) -> None:
        lazy = self._lazy
        if lazy is not None and lazy.pending:
            if self._protocol_features & ProtocolFeature.PAGEFAULT:
                share_memory(self._connection, self.name, table, fds, lazy)
                return
            lazy.complete()
        self._connection.set(Request.SET_MEM_TABLE, table, fds)

    def _share_inflight(self) -> None:
        """The buffer is the back end's invention; all we do is to keep it for the next one."""
        if self._inflight is None:
            request = INFLIGHT_PADDED.pack(0, 0, len(self.queue_sizes), max(self.queue_sizes))
            layout, fd = self._connection.ask_fd(Request.GET_INFLIGHT_FD, request)
            self._inflight = (fd, layout)
            if len(layout) not in (INFLIGHT.size, INFLIGHT_PADDED.size):
                raise ProtocolError(f"reply to GET_INFLIGHT_FD of {len(layout)} bytes")
        fd, layout = self._inflight
        self._connection.set(Request.SET_INFLIGHT_FD, layout, (fd,))

    def _used_index(self, queue: QueueConfig) -> int:
        return int.from_bytes(self._memory.read(queue.used + 2, 2), "little")

    def _start_ring(self, queue: QueueConfig, events: QueueEvents, base: int) -> None:
        index = queue.index
        err_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        with self._state:
            self._err_fds[index] = err_fd
        self._board.watch(err_fd, partial(self._err_readable, index))
        self._connection.set(Request.SET_VRING_NUM, VRING_STATE.pack(index, queue.size))
        self._connection.set(Request.SET_VRING_BASE, VRING_STATE.pack(index, base))
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

    def _fetch_config(self) -> None:
        generation = self._config_generation
        config = self._own_config or b""
        if self._config_size and self._own_config is None:
            # All of it, from the beginning: QEMU's back ends do not look at the offset.
            request = CONFIG.pack(0, self._config_size, 0) + bytes(self._config_size)
            reply = self._connection.ask(Request.GET_CONFIG, request)
            if len(reply) != len(request):
                raise ProtocolError(f"{len(reply)} bytes of configuration instead of {self._config_size}")
            config = reply[CONFIG.size :]
        with self._state:
            # The back end may have announced another change since it made this answer.
            self._config = config
            self._config_stale = generation != self._config_generation

    def _store_config(self, offset: int, data: bytes) -> None:
        if self._own_config is not None:
            return
        try:
            self._connection.set(Request.SET_CONFIG, CONFIG.pack(offset, len(data), CONFIG_BY_DRIVER) + data)
        except Refused:
            pass  # a read-only field: the write is lost, as on any device
        else:
            self._written.update(enumerate(data, offset))
        self._forget_config()

    def _forget_config(self) -> None:
        with self._state:
            self._config_generation += 1
            self._config_stale = True

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
            # Once says all until the driver resets the device. A worker that was taken over would write
            # without end, and the main loop would do little else.
            del self._err_fds[index]
        self._board.unwatch(fd)
        os.close(fd)
        events.needs_reset(f"{self.name}: the back end cannot use ring {index}")

    def _attempt(self, action: Callable[[], object]) -> None:
        """Do it, unless the back end has failed; if it fails now, say so."""
        if self._failed:
            return
        try:
            action()
        except (EOFError, OSError, ProtocolError) as error:
            self._fail(str(error))

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

    def _drop_err_fds(self) -> None:
        with self._state:
            err_fds, self._err_fds = self._err_fds, {}
        for fd in err_fds.values():
            self._board.unwatch(fd)
            os.close(fd)

    def _drop_inflight(self) -> None:
        if self._inflight is not None:
            os.close(self._inflight[0])
            self._inflight = None
