"""The device side of a split virtqueue (virtio 1.2, section 2.7), with indirect descriptors. Runs in workers
and in the VMM.

The rings are the guest's memory: it may write anything there, at any moment, also from another vCPU between
two of our reads. So every value is read once into a private number and checked before use; our own positions
live here and are never read back from the ring. Whatever the guest does, `pop` ends in a chain, in None, or
in GuestError.

Not offered: VIRTIO_F_EVENT_IDX (the driver's avail.flags decide about interrupts), and the device never
suppresses kicks, so a driver always kicks after it adds buffers. Loads and stores below rely on x86 ordering:
see devices/fence.py.
"""

from __future__ import annotations

from struct import Struct

from devices.errors import GuestError
from devices.fence import full_fence
from devices.memory import GuestMemory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from devices.vhost.inflight import QueueTracker

MAX_SIZE = 32768

VIRTQ_DESC_F_NEXT = 1
VIRTQ_DESC_F_WRITE = 2
VIRTQ_DESC_F_INDIRECT = 4
VRING_AVAIL_F_NO_INTERRUPT = 1

# Linux checks a chain in an indirect table against what the device announces (seg_max), not against the size
# of a queue that it may have made smaller. As QEMU does, such chains may be this long in any queue; it is
# also the kernel's IOV_MAX.
MAX_INDIRECT = 1024

# What is stored in a tracker's words: devices.vhost.inflight has the layout.
INFLIGHT = 1
LAST_BATCH_HEAD = 6
TRACKED_USED_IDX = 7

_DESCRIPTOR = Struct("<QIHH")  # address, length, flags, next
_DESCRIPTOR_SIZE = 16
_MAX_TOTAL = 1 << 32


class Chain:
    """One request: the buffers that start at descriptor `head`, the readable ones first, as the driver laid
    them out.

    The memoryviews lie in guest memory: the guest may change the bytes while we look. Sizes are totals in
    bytes. Views are never empty; a chain may have no readable or no writable buffer. Drop it before the
    queue's memory is unmapped.
    """

    __slots__ = ("head", "readable", "readable_size", "writable", "writable_size")

    def __init__(
        self,
        head: int,
        readable: list[memoryview],
        writable: list[memoryview],
        readable_size: int,
        writable_size: int,
    ) -> None:
        self.head = head
        self.readable = readable
        self.writable = writable
        self.readable_size = readable_size
        self.writable_size = writable_size


class SplitQueue:
    """One ring pair. Not thread-safe: one thread pops and pushes (different queues may have different
    threads).

    `next_avail` and `next_used` are ring positions modulo 65536; `in_flight` is the set of heads popped and
    not pushed.
    """

    __slots__ = (
        "_announced",
        "_available",
        "_descriptors",
        "_indirect",
        "_last_popped",
        "_mask",
        "_memory",
        "_resubmit",
        "_states",
        "_tracked",
        "_tracker",
        "_used",
        "_used_elements",
        "in_flight",
        "index",
        "next_avail",
        "next_used",
        "size",
    )

    def __init__(
        self,
        memory: GuestMemory,
        index: int,
        size: int,
        descriptors: int,
        available: int,
        used: int,
        *,
        next_avail: int = 0,
        next_used: int = 0,
        indirect: bool = True,
        tracker: QueueTracker | None = None,
    ) -> None:
        """Queue `index` of a device: `size` entries, with the three parts at these guest-physical addresses.

        Raises GuestError when the size is not a power of two in 1..32768, or a part is misaligned or not all
        in RAM; ValueError when a position is not in 0..65535. `indirect`: VIRTIO_F_INDIRECT_DESC was
        negotiated. With a `tracker` the positions come from what the back end before this one left there and
        in the used ring, and `pop` begins with the chains it left unanswered; ProtocolError when the tracker
        makes no sense.
        """
        if not 1 <= size <= MAX_SIZE or size & (size - 1):
            raise GuestError(f"queue {index}: size {size} is not a power of two up to {MAX_SIZE}")
        # Alignment is more than form: a store across two cache lines can be seen half done by the driver.
        for name, address, alignment in (
            ("descriptor table", descriptors, 16),
            ("available ring", available, 2),
            ("used ring", used, 4),
        ):
            if address % alignment:
                raise GuestError(f"queue {index}: {name} at {address:#x} is not aligned to {alignment} bytes")
        if not 0 <= next_avail <= 0xFFFF or not 0 <= next_used <= 0xFFFF:
            raise ValueError(f"queue {index}: positions {next_avail}, {next_used} are not 16-bit")
        self.index = index
        self.size = size
        self.next_avail = next_avail
        self.next_used = next_used
        # Of a queue that goes on where another process left it, nobody knows whether the last was announced.
        self._announced = -1 if next_avail or next_used else 0
        self.in_flight: set[int] = set()
        self._last_popped = -1
        self._mask = size - 1
        self._indirect = indirect
        self._memory = memory
        self._descriptors = memory.view(descriptors, _DESCRIPTOR_SIZE * size)
        # Without event indices nobody touches the 16-bit event field that ends either ring.
        self._available = memory.view(available, 4 + 2 * size).cast("H")  # flags, idx, ring[size]
        self._used = memory.view(used, 4).cast("H")  # flags, idx
        self._used_elements = memory.view(used + 4, 8 * size).cast("I")  # id, len, id, len, ...
        self._tracker = tracker
        self._states: memoryview[int] | None = None
        self._tracked: memoryview[int] | None = None
        self._resubmit: list[int] = []
        if tracker is not None:
            self._recover(tracker)

    def _recover(self, tracker: QueueTracker) -> None:
        used_idx = self._used[1]
        heads = tracker.recover(self.size, used_idx)
        self._states, self._tracked = tracker.states, tracker.header
        if heads is not None:
            # Whatever was popped is either used or in flight, so this is where the last back end stood.
            self.next_used = used_idx
            self.next_avail = (used_idx + len(heads)) & 0xFFFF
            self.in_flight.update(heads)
            self._resubmit = heads[::-1]
            self._announced = -1

    def pop(self) -> Chain | None:
        """The next available chain, or None when there is none. Each chain popped must be pushed exactly
        once.

        Raises GuestError when the ring, a descriptor or an address makes no sense; the queue then stays where
        it is, and the device needs a reset.
        """
        if self._resubmit:
            chain = self._walk(self._resubmit[-1])
            self._last_popped = self._resubmit.pop()
            return chain
        position = self.next_avail
        waiting = (self._available[1] - position) & 0xFFFF
        if not waiting:
            return None
        if waiting > self.size:
            raise GuestError(f"queue {self.index}: available index jumped ahead by {waiting}")
        head = self._available[2 + (position & self._mask)]
        if head >= self.size:
            raise GuestError(f"queue {self.index}: head {head} is past the end of the queue")
        if head in self.in_flight:
            raise GuestError(f"queue {self.index}: head {head} was made available again while in use")
        chain = self._walk(head)
        self.next_avail = (position + 1) & 0xFFFF
        self.in_flight.add(head)
        self._last_popped = head
        if (states := self._states) is not None and (tracker := self._tracker) is not None:
            # The counter first: a mark without its place in the order would be worse than no mark.
            states[2 * head + 1] = counter = tracker.counter
            states[2 * head] = INFLIGHT
            tracker.counter = counter + 1
        return chain

    def waiting(self) -> int:
        """How many chains the driver has made available that were not popped: at most `size`, as `pop`
        judges the ring.
        """
        return min((self._available[1] - self.next_avail) & 0xFFFF, self.size)

    def unpop(self, chain: Chain) -> None:
        """Make the chain that was popped last, and not pushed, available again: the next `pop` takes it.

        The guest may have changed it meanwhile, so drop `chain`. Raises ValueError for any other chain.
        """
        head = chain.head
        if head != self._last_popped or head not in self.in_flight:
            raise ValueError(f"queue {self.index}: head {head} is not the one popped last")
        self._last_popped = -1
        if self._tracker is not None:
            self._resubmit.append(head)
            self._rewind()
            return
        self.next_avail = (self.next_avail - 1) & 0xFFFF
        self.in_flight.remove(head)

    def _rewind(self) -> None:
        """Take back the marks of the chains to resubmit, if the position in the available ring can say the
        same: it is what a front end asks for when it goes on elsewhere, without the tracker.

        It cannot when other chains are in flight, or when an earlier back end took these in another order.
        The guest may change the entries, and then confuses nobody but its own driver.
        """
        waiting = self._resubmit[::-1]
        first = (self.next_avail - len(waiting)) & 0xFFFF
        entries = [self._available[2 + (first + number & self._mask)] for number in range(len(waiting))]
        if (states := self._states) is None or entries != waiting or self.in_flight != set(waiting):
            return
        for head in waiting:
            states[2 * head] = 0
        self._resubmit.clear()
        self.in_flight.clear()
        self.next_avail = first

    def _walk(self, head: int) -> Chain:
        view = self._memory.view
        unpack = _DESCRIPTOR.unpack_from
        table = self._descriptors
        entries = remaining = self.size
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        readable_size = writable_size = 0
        index = head
        while True:
            # A private copy: the guest may change the descriptor after any check.
            address, length, flags, following = unpack(table, index * _DESCRIPTOR_SIZE)
            remaining -= 1
            if remaining < 0:
                raise GuestError(f"queue {self.index}: the chain at {head} loops or is too long")
            if flags & VIRTQ_DESC_F_INDIRECT:
                if table is not self._descriptors:
                    raise GuestError(f"queue {self.index}: indirect table inside an indirect table")
                table = self._indirect_table(address, length, flags)
                entries = remaining = length // _DESCRIPTOR_SIZE
                index = 0
                continue
            # The specification does not forbid a length of zero, and drivers were seen to send it. Such a
            # descriptor names no byte, so its address does not matter, and nobody downstream should meet an
            # empty buffer.
            if flags & VIRTQ_DESC_F_WRITE:
                if length:
                    writable.append(view(address, length))
                    writable_size += length
            elif length:
                if writable:
                    raise GuestError(f"queue {self.index}: a readable buffer after a writable one")
                readable.append(view(address, length))
                readable_size += length
            if not flags & VIRTQ_DESC_F_NEXT:
                break
            if following >= entries:
                raise GuestError(f"queue {self.index}: next descriptor {following} is past the end")
            index = following
        if readable_size + writable_size > _MAX_TOTAL:
            raise GuestError(f"queue {self.index}: the chain at {head} is longer than 4 GiB")
        return Chain(head, readable, writable, readable_size, writable_size)

    def _indirect_table(self, address: int, length: int, flags: int) -> memoryview:
        if not self._indirect:
            raise GuestError(f"queue {self.index}: indirect descriptor, which was not negotiated")
        if flags & VIRTQ_DESC_F_NEXT:
            raise GuestError(f"queue {self.index}: a descriptor after the indirect one")
        if not length or length % _DESCRIPTOR_SIZE:
            raise GuestError(f"queue {self.index}: indirect table of {length} bytes")
        if length // _DESCRIPTOR_SIZE > max(self.size, MAX_INDIRECT):
            raise GuestError(f"queue {self.index}: indirect table of {length} bytes is too long")
        return self._memory.view(address, length)

    def push(self, head: int, written: int) -> None:
        """Give the chain at `head` back; `written` bytes of its writable part were filled, counted from its
        start.

        In any order of heads. Raises ValueError for a head that is not in flight or a length of more than 32
        bits.
        """
        if head not in self.in_flight:
            raise ValueError(f"queue {self.index}: head {head} is not in flight")
        position = self.next_used
        slot = 2 * (position & self._mask)
        self._used_elements[slot + 1] = written
        self._used_elements[slot] = head
        self.in_flight.remove(head)
        position = (position + 1) & 0xFFFF
        self.next_used = position
        if (states := self._states) is not None and (tracked := self._tracked) is not None:
            # This process may be killed between any two of these stores: see devices/vhost/inflight.py.
            tracked[LAST_BATCH_HEAD] = head
            self._used[1] = position
            states[2 * head] = 0
            tracked[TRACKED_USED_IDX] = position
        else:
            # The element is visible before the index that covers it: stores stay in order.
            self._used[1] = position

    def interrupt_wanted(self) -> bool:
        """Whether the driver wants to hear of what was pushed since the last time that this said so. Ask
        after the last push of a batch, then signal the call fd.

        The driver clears NO_INTERRUPT and then looks at used.idx again; we wrote used.idx and look at the
        flag now. The fence sees to it that at least one of the two notices.
        """
        if self.next_used == self._announced:
            return False
        full_fence()
        if self._available[0] & VRING_AVAIL_F_NO_INTERRUPT:
            return False
        self._announced = self.next_used
        return True

    def release(self) -> None:
        """Let go of guest memory; the queue is of no use afterwards. Chains still held keep their own
        views."""
        self._descriptors.release()
        self._available.release()
        self._used.release()
        self._used_elements.release()
        if self._tracker is not None:
            self._tracker.release()
