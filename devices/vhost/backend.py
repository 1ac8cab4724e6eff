"""The back end of vhost-user: what a device process does with the front end's messages. Worker process.

Follows QEMU's docs/interop/vhost-user.rst. A `Backend` keeps the protocol's state (features, memory, rings)
and starts and stops the queues of a device, which does the work. A ring runs while it is all of: given its
size, its addresses and its kick, enabled, and backed by a memory table. Where the specification would have a
disabled ring processed "without side effects", ours rests; and where it waits for the first kick, ours looks
at the ring at once.

With PAGEFAULT guest memory may be filled while it is used ("Postcopy" in vhost-user.rst): the front end
fetches a userfaultfd (POSTCOPY_ADVISE), and after POSTCOPY_LISTEN SET_MEM_TABLE is answered with the
addresses of the mappings. Before any ring runs on them, they are registered. The userfaultfd was made before
the sandbox closed and is kept for as long as it may be needed: were it closed here and by the front end,
pages not filled yet would read as zeros, and a request under way might write those to a disk.

With INFLIGHT_SHMFD a ring goes on where a back end that died left it (`devices.vhost.inflight`); the position
SET_VRING_BASE gave is then of no interest.
"""

from __future__ import annotations

import _thread
import os
from _socket import socket

from devices.errors import GuestError
from devices.pager import userfaultfd
from devices.vhost.channel import Channel
from devices.vhost.inflight import InflightBuffer, create_buffer
from devices.vhost.memory_table import MAX_REGIONS, MemoryTable
from devices.vhost.messages import (
    CONFIG,
    CONFIG_BY_VMM,
    INFLIGHT,
    INFLIGHT_PADDED,
    MAX_CONFIG_SIZE,
    MAX_MEM_TABLE_REGIONS,
    MEM_REGION,
    MEM_TABLE,
    NEED_REPLY,
    REPLY,
    SINGLE_MEM_REGION,
    U64,
    VHOST_USER_F_PROTOCOL_FEATURES,
    VRING_ADDR,
    VRING_INDEX_MASK,
    VRING_NO_FD,
    VRING_STATE,
    BackendRequest,
    ProtocolError,
    ProtocolFeature,
    Request,
    request_name,
)
from devices.virtio.queue import MAX_SIZE, SplitQueue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from devices.vhost.backend_device import BackendDevice
    from devices.vhost.channel import Message

VIRTIO_F_INDIRECT_DESC = 1 << 28  # devices.virtio.device has the others, with imports a worker does without

PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.BACKEND_SEND_FD
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)


class _Refused(Exception):
    """A sound request the device will not carry out: it is acknowledged as failed, the session goes on."""


class _Ring:
    """What the front end said about one ring. `queue` is set while the device serves it."""

    __slots__ = (
        "addresses",
        "call",
        "enabled",
        "err",
        "index",
        "kick",
        "kick_known",
        "next_avail",
        "queue",
        "size",
    )

    def __init__(self, index: int) -> None:
        self.index = index
        self.size = 0
        self.addresses: tuple[int, int, int] | None = None  # descriptors, available, used: user addresses
        self.next_avail = 0
        self.kick = self.call = self.err = -1
        self.kick_known = False  # -1 may also be the front end's word for "poll"
        self.enabled = False
        self.queue: SplitQueue | None = None


class Backend:
    """One session with a front end on `channel`, for `device`.

    Owns the channel, the memory and every descriptor received, and `uffd`, a userfaultfd of this process or
    -1: PAGEFAULT is not offered then. For one thread, but for `notify_config_changed`.
    """

    __slots__ = (
        "_channel",
        "_device",
        "_features",
        "_inflight",
        "_listening",
        "_memory",
        "_protocol_features",
        "_requests",
        "_requests_lock",
        "_rings",
        "_status",
        "_uffd",
    )

    def __init__(self, channel: Channel, device: BackendDevice, uffd: int = -1) -> None:
        self._channel = channel
        self._device = device
        self._features = 0
        self._protocol_features = 0
        self._status = 0
        self._memory = MemoryTable()
        self._uffd = uffd
        self._listening = False
        self._inflight: InflightBuffer | None = None
        self._rings = [_Ring(index) for index in range(device.queue_count)]
        self._requests: Channel | None = None
        self._requests_lock = _thread.allocate_lock()

    def serve(self) -> None:
        """Handle messages until the front end closes the connection, close everything; raises as `handle`."""
        try:
            while True:
                self.handle()
        except EOFError:
            pass
        finally:
            self.close()

    def handle(self) -> None:
        """Receive one message, carry it out and answer it; waits for one when there is none.

        Raises EOFError when the front end closed the connection, and ProtocolError when it broke the
        protocol: the session is over then. What the guest did wrong is reported on the ring's err eventfd and
        raises nothing.
        """
        message = self._channel.receive()
        try:
            reply = self._dispatch(message)
            if reply is not None:
                fds = message.fds if message.request in _REPLIES_WITH_FD else ()
                self._channel.send(message.request, reply, fds, REPLY)
        finally:
            message.close()

    def notify_config_changed(self) -> None:
        """Have the front end read the device configuration anew, if it can be told. For any thread."""
        with self._requests_lock:
            if self._requests is None or not self._protocol_features & ProtocolFeature.CONFIG:
                return
            try:
                # No reply is asked for: waiting would tie this thread to the front end's main loop.
                self._requests.send(BackendRequest.CONFIG_CHANGE_MSG)
            except EOFError:
                pass  # the session is ending; `handle` will see it

    def close(self) -> None:
        """Stop all rings and let go of everything received."""
        for ring in self._rings:
            self._stop(ring)
            for fd in (ring.kick, ring.call, ring.err):
                if fd >= 0:
                    os.close(fd)
            ring.kick = ring.call = ring.err = -1
            ring.kick_known = False
        self._drop_inflight()
        self._memory.close()
        self._drop_uffd()
        with self._requests_lock:
            if self._requests is not None:
                self._requests.close()
                self._requests = None
        self._channel.close()

    def _dispatch(self, message: Message) -> bytes | None:
        name = request_name(message.request)
        try:
            handler, size, max_fds = _HANDLERS[message.request]
        except KeyError:
            raise ProtocolError(f"{name} is not supported") from None
        if message.flags & REPLY:
            raise ProtocolError(f"{name} came as a reply")
        if size is not None and len(message.payload) != size:
            raise ProtocolError(f"{name} with {len(message.payload)} bytes instead of {size}")
        if len(message.fds) > max_fds:
            raise ProtocolError(f"{name} with {len(message.fds)} file descriptors")
        failed = 0
        try:
            reply = handler(self, message)
        except _Refused:
            reply = None
            failed = 1
        # A request with a reply of its own is answered by that alone.
        if (
            reply is None
            and message.flags & NEED_REPLY
            and self._protocol_features & ProtocolFeature.REPLY_ACK
        ):
            reply = U64.pack(failed)
        return reply

    def _get_features(self, message: Message) -> bytes:
        return U64.pack(self._device.features | VHOST_USER_F_PROTOCOL_FEATURES)

    def _set_features(self, message: Message) -> None:
        (features,) = U64.unpack(message.payload)
        if features & ~(self._device.features | VHOST_USER_F_PROTOCOL_FEATURES):
            raise ProtocolError(f"SET_FEATURES {features:#x} has features that were not offered")
        if features != self._features:
            # QEMU repeats the same features for each queue pair of a multiqueue network card, while the first
            # pairs run.
            if any(ring.queue is not None for ring in self._rings):
                raise ProtocolError("SET_FEATURES changes features while a ring runs")
            self._features = features
            self._device.set_features(features & ~VHOST_USER_F_PROTOCOL_FEATURES)
        if not features & VHOST_USER_F_PROTOCOL_FEATURES:
            for ring in self._rings:
                ring.enabled = True
                self._start(ring)

    @property
    def _offered(self) -> int:
        return PROTOCOL_FEATURES | (ProtocolFeature.PAGEFAULT if self._uffd >= 0 else 0)

    def _get_protocol_features(self, message: Message) -> bytes:
        return U64.pack(self._offered)

    def _set_protocol_features(self, message: Message) -> None:
        (features,) = U64.unpack(message.payload)
        if features & ~self._offered:
            raise ProtocolError(f"SET_PROTOCOL_FEATURES {features:#x} has features that were not offered")
        self._protocol_features = features

    def _set_owner(self, message: Message) -> None:
        """The session starts with the connection here."""

    def _reset_owner(self, message: Message) -> None:
        for ring in self._rings:
            self._stop(ring)
            ring.enabled = False

    def _reset_device(self, message: Message) -> None:
        """Memory, call and err eventfds stay: QEMU sends them once, not after each reset."""
        for ring in self._rings:
            self._stop(ring)
            self._set_kick_fd(ring, -1)
            ring.kick_known = False
            ring.enabled = False
            ring.size = 0
            ring.addresses = None
            ring.next_avail = 0
        self._drop_inflight()  # the next driver starts over; the front end gives it another buffer
        self._status = 0
        self._features = 0
        self._device.set_features(0)

    def _get_queue_num(self, message: Message) -> bytes:
        return U64.pack(len(self._rings))

    def _get_status(self, message: Message) -> bytes:
        return U64.pack(self._status)

    def _set_status(self, message: Message) -> None:
        (status,) = U64.unpack(message.payload)
        if status == 0:
            self._reset_device(message)
        self._status = status & 0xFF

    def _set_mem_table(self, message: Message) -> None:
        payload = message.payload
        count = MEM_TABLE.unpack_from(payload)[0] if len(payload) >= MEM_TABLE.size else 0
        if len(payload) != MEM_TABLE.size + count * MEM_REGION.size or len(message.fds) != count:
            raise ProtocolError(
                f"SET_MEM_TABLE of {len(payload)} bytes and {len(message.fds)} file descriptors"
            )

        def replace() -> None:
            self._memory.close()
            for number in range(count):
                gpa, size, user, offset = MEM_REGION.unpack_from(
                    payload, MEM_TABLE.size + number * MEM_REGION.size
                )
                self._memory.add(gpa, size, user, offset, message.take_fd())
            if self._listening:
                self._register_memory(payload)

        self._change_memory(replace)

    def _register_memory(self, table: bytes) -> None:
        """Tell the front end where `table`'s regions are, and have it hear of their missing pages from its
        acknowledgement on. Nobody has touched them yet.
        """
        reply = bytearray(table)
        addresses = self._memory.addresses()
        for number, (address, _) in enumerate(addresses):
            at = MEM_TABLE.size + number * MEM_REGION.size
            gpa, size, _, offset = MEM_REGION.unpack_from(table, at)
            MEM_REGION.pack_into(reply, at, gpa, size, address, offset)
        self._channel.send(Request.SET_MEM_TABLE, bytes(reply), flags=REPLY)
        confirmation = self._channel.receive()
        confirmation.close()
        if confirmation.request != Request.SET_MEM_TABLE or confirmation.payload != bytes(U64.size):
            raise ProtocolError("SET_MEM_TABLE in postcopy mode was not confirmed")
        for address, size in addresses:
            userfaultfd.register(self._uffd, address, size)

    def _postcopy_advise(self, message: Message) -> bytes:
        if self._uffd < 0:
            raise ProtocolError("POSTCOPY_ADVISE was not negotiated")
        message.fds.append(os.dup(self._uffd))  # closed with the message, when the reply is sent
        return b""

    def _postcopy_listen(self, message: Message) -> bytes:
        if self._uffd < 0:
            raise ProtocolError("POSTCOPY_LISTEN was not negotiated")
        self._listening = True
        return U64.pack(0)

    def _postcopy_end(self, message: Message) -> bytes:
        self._listening = False
        self._drop_uffd()
        return U64.pack(0)

    def _drop_uffd(self) -> None:
        if self._uffd >= 0:
            os.close(self._uffd)
            self._uffd = -1

    def _get_max_mem_slots(self, message: Message) -> bytes:
        return U64.pack(MAX_REGIONS)

    def _add_mem_reg(self, message: Message) -> None:
        if not message.fds:
            raise ProtocolError("ADD_MEM_REG without a file descriptor")
        if self._listening:
            raise ProtocolError("ADD_MEM_REG in postcopy mode is not supported")
        _, gpa, size, user, offset = SINGLE_MEM_REGION.unpack(message.payload)
        self._change_memory(lambda: self._memory.add(gpa, size, user, offset, message.take_fd()))

    def _rem_mem_reg(self, message: Message) -> None:
        _, gpa, size, user, _ = SINGLE_MEM_REGION.unpack(message.payload)
        self._change_memory(lambda: self._memory.remove(gpa, size, user))

    def _change_memory(self, change: Callable[[], None]) -> None:
        """Queues hold views of the old memory, so every ring pauses while it changes."""
        for ring in self._rings:
            self._stop(ring)
        change()
        for ring in self._rings:
            self._start(ring)

    def _ring(self, index: int) -> _Ring:
        if index >= len(self._rings):
            raise ProtocolError(f"ring {index} of a device that has {len(self._rings)}")
        return self._rings[index]

    def _set_vring_num(self, message: Message) -> None:
        index, size = VRING_STATE.unpack(message.payload)
        ring = self._ring(index)
        if not 1 <= size <= MAX_SIZE:
            raise ProtocolError(f"SET_VRING_NUM {size}")
        self._stop(ring)
        ring.size = size
        self._start(ring)

    def _set_vring_addr(self, message: Message) -> None:
        index, _, descriptors, used, available, _ = VRING_ADDR.unpack(message.payload)
        ring = self._ring(index)
        self._stop(ring)
        ring.addresses = (descriptors, available, used)
        self._start(ring)

    def _set_vring_base(self, message: Message) -> None:
        index, next_avail = VRING_STATE.unpack(message.payload)
        ring = self._ring(index)
        if next_avail > 0xFFFF:
            raise ProtocolError(f"SET_VRING_BASE {next_avail:#x}")
        self._stop(ring)
        ring.next_avail = next_avail
        self._start(ring)

    def _get_vring_base(self, message: Message) -> bytes:
        index, _ = VRING_STATE.unpack(message.payload)
        ring = self._ring(index)
        self._stop(ring)
        self._set_kick_fd(ring, -1)
        ring.kick_known = False  # stopped until the next SET_VRING_KICK
        return VRING_STATE.pack(index, ring.next_avail)

    def _take_vring_fd(self, message: Message) -> tuple[_Ring, int]:
        (value,) = U64.unpack(message.payload)
        ring = self._ring(value & VRING_INDEX_MASK)
        if bool(value & VRING_NO_FD) == bool(message.fds):
            raise ProtocolError(
                f"{request_name(message.request)} says wrongly whether it brings a file descriptor"
            )
        return ring, message.take_fd() if message.fds else -1

    def _set_vring_kick(self, message: Message) -> None:
        ring, fd = self._take_vring_fd(message)
        self._stop(ring)
        self._set_kick_fd(ring, fd)
        ring.kick_known = True
        self._start(ring)

    def _set_vring_call(self, message: Message) -> None:
        ring, fd = self._take_vring_fd(message)
        former, ring.call = ring.call, fd
        try:
            if ring.queue is not None:
                self._device.set_call(ring.index, fd)
        finally:
            if former >= 0:
                os.close(former)

    def _set_vring_err(self, message: Message) -> None:
        ring, fd = self._take_vring_fd(message)
        self._stop(ring)
        if ring.err >= 0:
            os.close(ring.err)
        ring.err = fd
        self._start(ring)

    def _set_vring_enable(self, message: Message) -> None:
        index, enable = VRING_STATE.unpack(message.payload)
        ring = self._ring(index)
        if enable > 1:
            raise ProtocolError(f"SET_VRING_ENABLE {enable}")
        ring.enabled = bool(enable)
        if enable:
            self._start(ring)
        else:
            self._stop(ring)

    def _get_config(self, message: Message) -> bytes:
        offset, size, data = self._config_request(message)
        if len(data) != size or offset + size > MAX_CONFIG_SIZE:
            return b""  # an empty payload is this reply's way to say no
        data = self._device.read_config(offset, size)
        return CONFIG.pack(offset, size, 0) + data.ljust(size, b"\0")

    def _set_config(self, message: Message) -> None:
        offset, size, data = self._config_request(message)
        if len(data) != size or offset + size > MAX_CONFIG_SIZE:
            raise _Refused
        (_, _, flags) = CONFIG.unpack_from(message.payload)
        try:
            if flags == CONFIG_BY_VMM:
                self._configure(offset, data)
            else:
                self._device.write_config(offset, data)
        except GuestError:
            raise _Refused from None

    def _configure(self, offset: int, data: bytes) -> None:
        """What the device is changes under its driver (a disk grows): no ring runs meanwhile."""
        for ring in self._rings:
            self._stop(ring)
        try:
            self._device.configure(offset, data)
        finally:
            for ring in self._rings:
                self._start(ring)
        self.notify_config_changed()

    def _config_request(self, message: Message) -> tuple[int, int, bytes]:
        if len(message.payload) < CONFIG.size:
            raise ProtocolError(f"{request_name(message.request)} of {len(message.payload)} bytes")
        offset, size, _ = CONFIG.unpack_from(message.payload)
        return offset, size, message.payload[CONFIG.size :]

    def _get_inflight_fd(self, message: Message) -> bytes:
        """The reply brings a descriptor, so it is sent from here, in the size that the front end uses."""
        _, _, queue_count, entries = self._inflight_request(message)
        if not 0 < queue_count <= len(self._rings) or not 0 < entries <= MAX_SIZE:
            raise ProtocolError(f"GET_INFLIGHT_FD for {queue_count} queues of {entries}")
        fd, size = create_buffer(queue_count, entries)
        message.fds.append(fd)  # closed with the message, when the reply is sent
        return INFLIGHT.pack(size, 0, queue_count, entries).ljust(len(message.payload), b"\0")

    def _set_inflight_fd(self, message: Message) -> None:
        size, offset, queue_count, entries = self._inflight_request(message)
        if not message.fds:
            raise ProtocolError("SET_INFLIGHT_FD without a file descriptor")
        buffer = InflightBuffer(message.fds[0], size, offset, queue_count, entries)
        for ring in self._rings:
            self._stop(ring)
        self._drop_inflight()
        self._inflight = buffer
        for ring in self._rings:
            self._start(ring)

    def _inflight_request(self, message: Message) -> tuple[int, int, int, int]:
        if len(message.payload) not in (INFLIGHT.size, INFLIGHT_PADDED.size):
            raise ProtocolError(f"{request_name(message.request)} of {len(message.payload)} bytes")
        size, offset, queue_count, entries = INFLIGHT.unpack_from(message.payload)
        return size, offset, queue_count, entries

    def _drop_inflight(self) -> None:
        """No ring runs."""
        if self._inflight is not None:
            self._inflight.close()
            self._inflight = None

    def _set_backend_req_fd(self, message: Message) -> None:
        if not message.fds:
            raise ProtocolError("SET_BACKEND_REQ_FD without a file descriptor")
        fd = message.take_fd()
        try:
            requests = Channel(socket(fileno=fd))
        except OSError as error:
            os.close(fd)
            raise ProtocolError(f"SET_BACKEND_REQ_FD: {error}") from None
        with self._requests_lock:
            if self._requests is not None:
                self._requests.close()
            self._requests = requests

    def _set_kick_fd(self, ring: _Ring, fd: int) -> None:
        if ring.kick >= 0:
            os.close(ring.kick)
        ring.kick = fd

    def _start(self, ring: _Ring) -> None:
        """Start the ring if all it needs is there and it does not run yet."""
        ready = ring.size and ring.addresses is not None and ring.kick_known and ring.enabled and self._memory
        if not ready or ring.queue is not None or ring.addresses is None:
            return
        queue = None
        tracker = self._inflight.tracker(ring.index) if self._inflight is not None else None
        try:
            descriptors, available, used = (self._memory.guest_address(address) for address in ring.addresses)
            # The front end does not say where the used ring stands: it is where the driver last saw it. A
            # guest that changes this number confuses nobody but its own driver.
            next_used = int.from_bytes(self._memory.guest.read(used + 2, 2), "little")
            queue = SplitQueue(
                self._memory.guest,
                ring.index,
                ring.size,
                descriptors,
                available,
                used,
                next_avail=ring.next_avail,
                next_used=next_used,
                indirect=bool(self._features & VIRTIO_F_INDIRECT_DESC),
                tracker=tracker,
            )
            self._device.start_queue(ring.index, queue, ring.kick, ring.call, ring.err)
        except BaseException as error:
            if queue is not None:
                queue.release()
            elif tracker is not None:
                tracker.release()
            if not isinstance(error, GuestError):
                raise
            self._signal_error(ring)
            return
        ring.queue = queue

    def _stop(self, ring: _Ring) -> None:
        queue = ring.queue
        if queue is not None:
            ring.queue = None
            ring.next_avail = self._device.stop_queue(ring.index) & 0xFFFF
            queue.release()

    def _signal_error(self, ring: _Ring) -> None:
        if ring.err >= 0:
            try:
                os.eventfd_write(ring.err, 1)
            except OSError:
                pass  # the front end chose this descriptor; if it cannot be written, nobody listens


_REPLIES_WITH_FD = (Request.GET_INFLIGHT_FD, Request.POSTCOPY_ADVISE)

# Request -> what carries it out, the size of its payload (None: it varies), the most descriptors it may
# bring.
_HANDLERS: dict[int, tuple[Callable[[Backend, Message], bytes | None], int | None, int]] = {
    Request.GET_FEATURES: (Backend._get_features, 0, 0),
    Request.SET_FEATURES: (Backend._set_features, U64.size, 0),
    Request.SET_OWNER: (Backend._set_owner, 0, 0),
    Request.RESET_OWNER: (Backend._reset_owner, 0, 0),
    Request.SET_MEM_TABLE: (Backend._set_mem_table, None, MAX_MEM_TABLE_REGIONS),
    Request.SET_VRING_NUM: (Backend._set_vring_num, VRING_STATE.size, 0),
    Request.SET_VRING_ADDR: (Backend._set_vring_addr, VRING_ADDR.size, 0),
    Request.SET_VRING_BASE: (Backend._set_vring_base, VRING_STATE.size, 0),
    Request.GET_VRING_BASE: (Backend._get_vring_base, VRING_STATE.size, 0),
    Request.SET_VRING_KICK: (Backend._set_vring_kick, U64.size, 1),
    Request.SET_VRING_CALL: (Backend._set_vring_call, U64.size, 1),
    Request.SET_VRING_ERR: (Backend._set_vring_err, U64.size, 1),
    Request.GET_PROTOCOL_FEATURES: (Backend._get_protocol_features, 0, 0),
    Request.SET_PROTOCOL_FEATURES: (Backend._set_protocol_features, U64.size, 0),
    Request.GET_QUEUE_NUM: (Backend._get_queue_num, 0, 0),
    Request.SET_VRING_ENABLE: (Backend._set_vring_enable, VRING_STATE.size, 0),
    Request.SET_BACKEND_REQ_FD: (Backend._set_backend_req_fd, 0, 1),
    Request.GET_CONFIG: (Backend._get_config, None, 0),
    Request.SET_CONFIG: (Backend._set_config, None, 0),
    Request.POSTCOPY_ADVISE: (Backend._postcopy_advise, 0, 0),
    Request.POSTCOPY_LISTEN: (Backend._postcopy_listen, 0, 0),
    Request.POSTCOPY_END: (Backend._postcopy_end, 0, 0),
    Request.GET_INFLIGHT_FD: (Backend._get_inflight_fd, None, 0),
    Request.SET_INFLIGHT_FD: (Backend._set_inflight_fd, None, 1),
    Request.RESET_DEVICE: (Backend._reset_device, 0, 0),
    Request.GET_MAX_MEM_SLOTS: (Backend._get_max_mem_slots, 0, 0),
    Request.ADD_MEM_REG: (Backend._add_mem_reg, SINGLE_MEM_REGION.size, 1),
    Request.REM_MEM_REG: (Backend._rem_mem_reg, SINGLE_MEM_REGION.size, 1),
    Request.SET_STATUS: (Backend._set_status, U64.size, 0),
    Request.GET_STATUS: (Backend._get_status, 0, 0),
}
