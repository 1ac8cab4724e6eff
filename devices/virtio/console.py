"""virtio-console: byte streams between guest and host, each a port with a name (virtio 1.2, section 5.3). VMM
process, main loop.

Port 0 is a console (hvc0 in Linux), or is not there: drivers take it for one. The others are generic, found
by name (/dev/virtio-ports/NAME, or /dev/vportNpM), and may come and go while the machine runs. A driver that
does not know VIRTIO_CONSOLE_F_MULTIPORT has port 0 only, and both ends of it count as open.

Bytes go straight between guest memory and what the port is connected to, a `console_ports.PortHost`, and are
kept nowhere on the way. A host that takes no more leaves the guest's chains in the ring, where a writer in
the guest waits for them; of a chain that was taken in part only the offset is remembered. A turn of the main
loop moves at most TURN_BYTES of a queue, in at most BATCH chains. So memory does not grow, and the rest of
the VMM does not wait, whatever either side does.

The exception is the console: what its host does not take at once is dropped, as on a serial line. Linux's
console spins with interrupts off until the device has used its buffer.
"""

from collections.abc import Callable
from struct import Struct
from typing import Any

from devices.block.transfer import slice_buffers
from devices.board import Board
from devices.errors import GuestError
from devices.memory import GuestMemory
from devices.state import SavedState
from devices.virtio.blk import scatter
from devices.virtio.console_ports import (
    CONTROL,
    CONTROL_RECEIVE,
    CONTROL_TRANSMIT,
    MAX_NAME,
    VIRTIO_CONSOLE_DEVICE_READY,
    VIRTIO_CONSOLE_PORT_ADD,
    VIRTIO_CONSOLE_PORT_OPEN,
    VIRTIO_CONSOLE_PORT_READY,
    VIRTIO_CONSOLE_PORT_REMOVE,
    Port,
)
from devices.virtio.device import VIRTIO_ID_CONSOLE
from devices.virtio.inprocess import InProcessDevice
from devices.virtio.queue import SplitQueue

# Feature bits, section 5.3.3.
VIRTIO_CONSOLE_F_SIZE = 1 << 0
VIRTIO_CONSOLE_F_MULTIPORT = 1 << 1
VIRTIO_CONSOLE_F_EMERG_WRITE = 1 << 2

MAX_PORTS = 16
PORT_QUEUE_SIZE = 64  # Linux fills a receive queue with pages
CONTROL_QUEUE_SIZE = 32
MAX_SIZE = 0xFFFF  # columns, and rows

_CONFIG = Struct("<HHII")  # struct virtio_console_config: cols, rows, max_nr_ports, emerg_wr
_EMERGENCY_OFFSET = 8

# Served between two turns of the main loop.
BATCH = 64
TURN_BYTES = 256 << 10


class VirtioConsole(InProcessDevice):
    """The device. `max_ports` of 2 to MAX_PORTS counts port 0; each costs the guest two queues. `emergency`
    gets the bytes that a guest writes where no driver runs yet, on vCPU threads. `size`, columns and rows, is
    the console's.
    """

    def __init__(
        self,
        memory: GuestMemory,
        board: Board,
        *,
        max_ports: int = 4,
        size: tuple[int, int] | None = None,
        emergency: Callable[[bytes], None] | None = None,
    ) -> None:
        if not 2 <= max_ports <= MAX_PORTS:
            raise ValueError(f"a console device of {max_ports} ports: give 2 to {MAX_PORTS}")
        features = VIRTIO_CONSOLE_F_MULTIPORT
        if size is not None:
            features |= VIRTIO_CONSOLE_F_SIZE
        if emergency is not None:
            features |= VIRTIO_CONSOLE_F_EMERG_WRITE
        pair = (PORT_QUEUE_SIZE, PORT_QUEUE_SIZE)
        control = (CONTROL_QUEUE_SIZE, CONTROL_QUEUE_SIZE)
        super().__init__(
            memory,
            board,
            device_id=VIRTIO_ID_CONSOLE,
            queue_sizes=pair + control + pair * (max_ports - 1),
            features=features,
        )
        self.max_ports = max_ports
        self._ports: dict[int, Port] = {}
        self._removed: list[int] = []  # PORT_REMOVE is to be sent; before a PORT_ADD of the same number
        self._emergency = emergency
        self._multiport = False
        self._device_ready = False
        self._complained = False
        self._set_size(size)

    def _set_size(self, size: tuple[int, int] | None) -> None:
        columns, rows = size or (0, 0)
        self._size = size
        self.configuration = _CONFIG.pack(columns, rows, self.max_ports, 0)

    # For the machine, from any thread.

    def add_port(self, name: str, *, console: bool = False) -> Port:
        """A new port, closed at the host's end; the driver is told. ValueError when it cannot be."""
        with self.lock:
            numbers = range(1) if console else range(1, self.max_ports)
            free = next((number for number in numbers if number not in self._ports), None)
            if free is None:
                raise ValueError("there is a console already" if console else f"{len(numbers)} ports exist")
            port = self._create(free, name, console=console)
            if self._device_ready:
                port.pending = 1 << VIRTIO_CONSOLE_PORT_ADD
            elif console and self._queues and not self._multiport:
                port.guest_open = True
            self.wake(CONTROL_RECEIVE)
        return port

    def _create(self, number: int, name: str, *, console: bool) -> Port:
        if not 0 < len(name.encode()) <= MAX_NAME or not name.isprintable() or "/" in name:
            raise ValueError(f"port name {name!r}: give 1 to {MAX_NAME} printable characters without '/'")
        if any(port.name == name for port in self._ports.values()):
            raise ValueError(f"there is a port {name!r} already")
        port = self._ports[number] = Port(number, name, self.lock, self.wake, console=console)
        if console:
            port.size = self._size
        return port

    def remove_port(self, name: str) -> None:
        """Take a port away: its host is told that the guest closed, what is in its ring is lost. KeyError
        when there is none of that name.
        """
        with self.lock:
            port = self.port(name)
            del self._ports[port.number]
            if port.added and port.number not in self._removed:
                self._removed.append(port.number)
            port.removed()
            queue = self._queues.get(port.transmit_queue)
            if queue is not None and not self._paused:
                # At once: the next port of this number shall not begin with it.
                try:
                    self._discard(queue)
                except GuestError:
                    pass  # `serve` meets it again
            self.wake(CONTROL_RECEIVE)
            self.wake(port.transmit_queue)  # for its interrupt

    def port(self, name: str) -> Port:
        """KeyError when there is none of that name."""
        with self.lock:
            for port in self._ports.values():
                if port.name == name:
                    return port
        raise KeyError(name)

    def resize(self, columns: int, rows: int) -> None:
        """The console's size has changed. ValueError when the device was made without one, or they are not
        in 0 to 65535.
        """
        if self._size is None or not 0 <= columns <= MAX_SIZE or not 0 <= rows <= MAX_SIZE:
            raise ValueError(f"this console cannot have {columns} columns and {rows} rows")
        with self.lock:
            self._set_size((columns, rows))
            console = self._ports.get(0)
            if console is not None:
                console.size = (columns, rows)
                console.resized()
            self.config_changed()
            self.wake(CONTROL_RECEIVE)

    # What the base class and the transport call.

    def write_config(self, offset: int, data: bytes) -> None:
        """emerg_wr takes a character, in its lowest byte; the rest is read-only."""
        if offset == _EMERGENCY_OFFSET and self._emergency is not None:
            self._emergency(data[:1])

    def started(self, features: int) -> None:
        self._multiport = bool(features & VIRTIO_CONSOLE_F_MULTIPORT)
        console = self._ports.get(0)
        if console is not None and not self._multiport:
            console.guest_open = True

    def stopped(self) -> None:
        self._multiport = self._device_ready = False
        self._removed.clear()
        for port in self._ports.values():
            port.driver_gone()

    def save_own(self) -> dict[str, Any]:
        return {
            "max_ports": self.max_ports,
            "size": None if self._size is None else {"columns": self._size[0], "rows": self._size[1]},
            "device_ready": self._device_ready,
            "removed": sum(1 << number for number in self._removed),
            "ports": [port.save() for port in self._ports.values()],
        }

    def load_own(self, saved: SavedState) -> None:
        """The ports are those that the saved machine had in the end: others of ours are removed, and what it
        added is added, without a host.
        """
        saved.same("max_ports", self.max_ports, "number of ports")
        if not saved.absent("size"):
            size = saved.record("size")
            self._set_size((size.number("columns", MAX_SIZE), size.number("rows", MAX_SIZE)))
        self._device_ready = saved.flag("device_ready")
        removed = saved.bits("removed", (1 << self.max_ports) - 1)
        self._removed = [number for number in range(self.max_ports) if removed >> number & 1]
        ours = {port.name: port for port in self._ports.values()}
        self._ports = {}
        for item in saved.items("ports", self.max_ports):
            record = SavedState(saved.name, item)
            number = record.number("number", self.max_ports - 1)
            if number in self._ports:
                raise record.wrong("number", f"{number} is that of two ports")
            try:
                name = record.data("name", MAX_NAME).decode()
                port = ours.pop(name, None) or self._create(number, name, console=number == 0)
            except ValueError as error:
                raise record.wrong("name", f"is not that of a port: {error}") from None
            if port.console != (number == 0):
                raise record.wrong("number", f"of port {name!r} is {number}, but only a console has 0")
            self._ports[number] = port
            port.number = number
            port.size = self._size if port.console else None
            port.load(record)
        for port in ours.values():
            port.removed()

    def serve(self, index: int, queue: SplitQueue) -> bool:
        if index in (CONTROL_RECEIVE, CONTROL_TRANSMIT):
            if not self._multiport:
                return False
            return self._tell(queue) if index == CONTROL_RECEIVE else self._obey(queue)
        if index > CONTROL_TRANSMIT and not self._multiport:
            return False
        port = self._ports.get(index // 2 - 1 if index > CONTROL_TRANSMIT else 0)
        if index % 2 == 0:
            return port is not None and self._receive(port, queue)
        return self._discard(queue) if port is None else self._transmit(port, queue)

    def _transmit(self, port: Port, queue: SplitQueue) -> bool:
        """From the guest to the port's host."""
        moved = 0
        for _ in range(BATCH):
            if not port.host_open and not port.console:
                return False  # it waits for somebody
            chain = queue.pop()
            if chain is None:
                return False
            if chain.writable_size:
                raise GuestError(f"queue {queue.index}: {chain.writable_size} bytes to write in output")
            rest = chain.readable_size - port.offset
            if rest < 0:
                raise GuestError(f"queue {queue.index}: a chain became shorter while it was being read")
            wanted = min(rest, TURN_BYTES - moved)
            taken = 0
            if wanted and port.host_open and port.host is not None:
                whole = not port.offset and wanted == rest
                views = chain.readable if whole else slice_buffers(chain.readable, port.offset, wanted)
                taken = port.host.send(views)
            if port.console:
                taken = wanted
            if taken < rest:
                # It stays in the ring: so a snapshot finds it there, and nothing of it is held here.
                port.offset += taken
                queue.unpop(chain)
                return taken == wanted
            queue.push(chain.head, 0)
            port.chain_sent()
            moved += taken
            if moved >= TURN_BYTES:
                break
        return True

    def _receive(self, port: Port, queue: SplitQueue) -> bool:
        """From the port's host to the guest, once the guest has opened the port: Linux throws away what
        comes before.
        """
        moved = 0
        while moved < TURN_BYTES:
            if not port.guest_open or not port.host_open or port.host is None:
                return False
            chain = queue.pop()
            if chain is None:
                return False
            if chain.readable_size or not chain.writable_size:
                sizes = f"{chain.readable_size} bytes to read and {chain.writable_size} to write"
                raise GuestError(f"queue {queue.index}: input buffer with {sizes}")
            views = chain.writable
            if chain.writable_size > TURN_BYTES:
                views = slice_buffers(views, 0, TURN_BYTES)
            count = port.host.receive_into(views)
            if not count:
                queue.unpop(chain)
                return False
            queue.push(chain.head, count)
            # A guest may give buffers of one byte: each counts as a full one of BATCH.
            moved += max(count, TURN_BYTES // BATCH)
        return True

    def _discard(self, queue: SplitQueue) -> bool:
        """Output of a port that is not there."""
        for _ in range(BATCH):
            chain = queue.pop()
            if chain is None:
                return False
            queue.push(chain.head, 0)
        return True

    def _obey(self, queue: SplitQueue) -> bool:
        """What the driver says in the control queue."""
        for _ in range(BATCH):
            chain = queue.pop()
            if chain is None:
                return False
            if chain.writable_size or chain.readable_size < CONTROL.size:
                sizes = f"{chain.readable_size} bytes to read and {chain.writable_size} to write"
                raise GuestError(f"queue {queue.index}: control message with {sizes}")
            # A private copy: the guest may change its own after any check.
            message = CONTROL.unpack(b"".join(slice_buffers(chain.readable, 0, CONTROL.size)))
            self._control(*message)
            queue.push(chain.head, 0)
        return True

    def _control(self, number: int, event: int, value: int) -> None:
        port = self._ports.get(number)
        if event == VIRTIO_CONSOLE_DEVICE_READY and value == 1:
            self._device_ready = True
            for known in self._ports.values():
                known.pending |= 1 << VIRTIO_CONSOLE_PORT_ADD
        elif port is None:
            self._complain(f"event {event} of port {number}, which is not there")
            return
        elif event == VIRTIO_CONSOLE_PORT_READY and value == 1:
            port.driver_ready()
        elif event == VIRTIO_CONSOLE_PORT_OPEN and port.ready:
            if value:
                port.guest_opens()
            else:
                port.guest_closes(self._queues.get(port.transmit_queue))
        else:
            self._complain(f"event {event} with value {value} of port {number}")
            return
        self.wake(CONTROL_RECEIVE)

    def _complain(self, what: str) -> None:
        """A message that says nothing to us, or that the driver could not take the device or a port."""
        if not self._complained:
            import logging  # here: it is rare, and every start would pay

            self._complained = True
            logging.getLogger(__name__).warning("virtio console: the driver sent %s", what)

    def _tell(self, queue: SplitQueue) -> bool:
        """What the driver is to be told, as far as it has buffers."""
        for _ in range(BATCH):
            if not self._device_ready:
                return False
            port, event, message = self._next_message()
            if not message:
                return False
            chain = queue.pop()
            if chain is None:
                return False
            if chain.readable_size or chain.writable_size < len(message):
                sizes = f"{chain.readable_size} bytes to read and {chain.writable_size} to write"
                raise GuestError(f"queue {queue.index}: buffer for control messages with {sizes}")
            queue.push(chain.head, scatter(message, chain.writable))
            if port is None:
                self._removed.pop(0)
            else:
                port.message_sent(event)
        return True

    def _next_message(self) -> tuple[Port | None, int, bytes]:
        if self._removed:
            event = VIRTIO_CONSOLE_PORT_REMOVE
            return None, event, CONTROL.pack(self._removed[0], event, 1)
        for port in self._ports.values():
            message = port.next_message()
            if message is not None:
                return port, *message
        return None, 0, b""
