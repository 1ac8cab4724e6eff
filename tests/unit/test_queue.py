"""The split virtqueue against a driver that keeps the rules, and against one that keeps none (virtio 1.2,
section 2.7)."""

import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devices.errors import GuestError
from devices.memory import GuestMemory, MemoryRegion
from devices.virtio.queue import (
    MAX_INDIRECT,
    VIRTQ_DESC_F_INDIRECT,
    VIRTQ_DESC_F_NEXT,
    VIRTQ_DESC_F_WRITE,
    Chain,
    SplitQueue,
)

NEXT, WRITE, INDIRECT = VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE, VIRTQ_DESC_F_INDIRECT

LOW_SIZE = 0x80000
HIGH_START, HIGH_SIZE = 1 << 32, 0x10000
DESCRIPTORS, AVAILABLE, USED, TABLES, BUFFERS = 0x1000, 0x6000, 0x8000, 0x10000, 0x40000


def make_memory() -> GuestMemory:
    """RAM below and above a hole, as a machine has it."""
    fd = os.memfd_create("test-ram")
    try:
        os.ftruncate(fd, LOW_SIZE + HIGH_SIZE)
        return GuestMemory(
            [MemoryRegion(0, LOW_SIZE, fd, 0), MemoryRegion(HIGH_START, HIGH_SIZE, fd, LOW_SIZE)]
        )
    finally:
        os.close(fd)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = make_memory()
    yield memory
    memory.close()  # BufferError when a queue or a chain kept a view


class MockDriver:
    """The driver's side of the ring: descriptors, buffers and indices written straight into guest memory."""

    def __init__(self, memory: GuestMemory, size: int, start: int = 0) -> None:
        self.memory = memory
        self.size = size
        self.avail_idx = self.used_idx = start
        self.free = list(range(size))
        self.chains: dict[int, list[int]] = {}
        self.set_flags(0)
        self.publish()
        memory.write(USED, struct.pack("<HH", 0, start))

    def set_flags(self, flags: int) -> None:
        self.memory.write(AVAILABLE, struct.pack("<H", flags))

    def descriptor(self, index: int, address: int, length: int, flags: int, following: int = 0) -> None:
        self.memory.write(DESCRIPTORS + 16 * index, struct.pack("<QIHH", address, length, flags, following))

    def table(self, address: int, entries: list[tuple[int, int, int, int]]) -> None:
        self.memory.write(address, b"".join(struct.pack("<QIHH", *entry) for entry in entries))

    def offer(self, head: int) -> None:
        slot = self.avail_idx % self.size
        self.memory.write(AVAILABLE + 4 + 2 * slot, struct.pack("<H", head))
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF

    def publish(self) -> None:
        self.memory.write(AVAILABLE + 2, struct.pack("<H", self.avail_idx))

    def add(self, buffers: list[tuple[int, int, int]], indirect_after: int | None) -> int | None:
        """Offer (address, length, WRITE or 0) buffers; those from `indirect_after` on in an indirect
        table."""
        direct = len(buffers) if indirect_after is None else min(indirect_after, len(buffers) - 1)
        needed = direct + (direct < len(buffers))
        if needed > len(self.free):
            return None
        indices = [self.free.pop() for _ in range(needed)]
        for position, index in enumerate(indices):
            flags = NEXT if position < needed - 1 else 0
            following = indices[position + 1] if flags else 0xDEAD
            if position < direct:
                address, length, write = buffers[position]
                self.descriptor(index, address, length, write | flags, following)
            else:
                rest = buffers[direct:]
                table = TABLES + 0x400 * index
                self.table(
                    table,
                    [
                        (address, length, write | (NEXT if i < len(rest) - 1 else 0), i + 1)
                        for i, (address, length, write) in enumerate(rest)
                    ],
                )
                self.descriptor(index, table, 16 * len(rest), INDIRECT | (WRITE if index % 2 else 0), 0xBEEF)
        self.chains[indices[0]] = indices
        self.offer(indices[0])
        self.publish()
        return indices[0]

    def collect(self) -> list[tuple[int, int]]:
        """The used elements not yet seen; their descriptors are free again."""
        (idx,) = struct.unpack("<H", self.memory.read(USED + 2, 2))
        elements = []
        while self.used_idx != idx:
            head, written = struct.unpack(
                "<II", self.memory.read(USED + 4 + 8 * (self.used_idx % self.size), 8)
            )
            self.free += self.chains.pop(head)
            elements.append((head, written))
            self.used_idx = (self.used_idx + 1) & 0xFFFF
        return elements


def make_queue(memory: GuestMemory, size: int, start: int = 0, indirect: bool = True) -> SplitQueue:
    return SplitQueue(
        memory, 3, size, DESCRIPTORS, AVAILABLE, USED, next_avail=start, next_used=start, indirect=indirect
    )


@pytest.fixture
def driver(memory: GuestMemory) -> MockDriver:
    return MockDriver(memory, 8)


@pytest.fixture
def queue(memory: GuestMemory, driver: MockDriver) -> Iterator[SplitQueue]:
    queue = make_queue(memory, 8)
    yield queue
    queue.release()


def offer(driver: MockDriver, head: int = 0) -> None:
    driver.offer(head)
    driver.publish()


def test_empty_queue(queue: SplitQueue) -> None:
    assert queue.pop() is None
    assert queue.pop() is None
    assert (queue.index, queue.size, queue.next_avail, queue.next_used) == (3, 8, 0, 0)
    assert not queue.in_flight


def test_chain_lies_in_guest_memory(memory: GuestMemory, driver: MockDriver, queue: SplitQueue) -> None:
    memory.write(BUFFERS, b"header")
    driver.descriptor(5, BUFFERS, 6, NEXT, 2)
    driver.descriptor(2, HIGH_START, 512, NEXT | WRITE, 7)
    driver.descriptor(7, BUFFERS + 0x1000, 1, WRITE)
    offer(driver, 5)
    chain = queue.pop()
    assert chain is not None
    assert (chain.head, chain.readable_size, chain.writable_size) == (5, 6, 513)
    assert [bytes(view) for view in chain.readable] == [b"header"]
    assert [len(view) for view in chain.writable] == [512, 1]
    chain.writable[0][:4] = b"disk"
    assert memory.read(HIGH_START, 4) == b"disk"
    assert queue.in_flight == {5}
    driver.chains[5] = [5, 2, 7]
    assert driver.collect() == []
    queue.push(5, 513)
    assert driver.collect() == [(5, 513)]
    assert not queue.in_flight


def test_completion_out_of_order(driver: MockDriver, queue: SplitQueue) -> None:
    heads = [driver.add([(BUFFERS, 16, WRITE)], None) for _ in range(3)]
    popped = [queue.pop() for _ in range(3)]
    assert [chain and chain.head for chain in popped] == heads
    for chain in (popped[1], popped[2], popped[0]):
        assert chain is not None
        queue.push(chain.head, chain.head)
    assert [head for head, _ in driver.collect()] == [heads[1], heads[2], heads[0]]


def test_pushing_what_was_not_popped_is_our_bug(driver: MockDriver, queue: SplitQueue) -> None:
    head = driver.add([(BUFFERS, 16, WRITE)], None)
    assert head is not None
    with pytest.raises(ValueError):
        queue.push(head, 0)
    assert queue.pop() is not None
    with pytest.raises(ValueError):
        queue.push(head, -1)
    with pytest.raises(ValueError):
        queue.push(head, 1 << 32)
    assert driver.collect() == []
    queue.push(head, 0)
    with pytest.raises(ValueError):
        queue.push(head, 0)
    assert driver.collect() == [(head, 0)]


def test_interrupt_suppression(driver: MockDriver, queue: SplitQueue) -> None:
    def use_one() -> None:
        driver.add([(BUFFERS, 1, 0)], None)
        chain = queue.pop()
        assert chain is not None
        queue.push(chain.head, 0)

    assert not queue.interrupt_wanted()  # nothing was used
    use_one()
    assert queue.interrupt_wanted()
    assert not queue.interrupt_wanted()  # said already
    driver.set_flags(1)
    use_one()
    assert not queue.interrupt_wanted()
    driver.set_flags(0xFFFE)
    assert queue.interrupt_wanted()


def test_a_queue_that_goes_on_announces_once(memory: GuestMemory, driver: MockDriver) -> None:
    """The process that served it before may have died between its last push and the interrupt."""
    taken_over = make_queue(memory, 8, start=5)
    assert taken_over.interrupt_wanted()
    assert not taken_over.interrupt_wanted()


def test_whole_ring_at_once(memory: GuestMemory, driver: MockDriver, queue: SplitQueue) -> None:
    for _ in range(8):
        assert driver.add([(BUFFERS, 1, 0)], None) is not None
    assert sorted(chain.head for chain in iter(queue.pop, None)) == list(range(8))


def test_zero_length_descriptors_name_no_byte(driver: MockDriver, queue: SplitQueue) -> None:
    driver.descriptor(0, 1 << 60, 0, NEXT | WRITE, 1)
    driver.descriptor(1, BUFFERS, 4, NEXT, 2)
    driver.descriptor(2, BUFFERS, 0, 0)
    offer(driver, 0)
    chain = queue.pop()
    assert chain is not None
    assert ([len(view) for view in chain.readable], chain.writable) == ([4], [])


def test_indirect_chain_may_be_longer_than_the_queue(driver: MockDriver, queue: SplitQueue) -> None:
    entries = MAX_INDIRECT
    driver.table(
        TABLES,
        [(BUFFERS + 16 * i, 16, WRITE | (NEXT if i < entries - 1 else 0), i + 1) for i in range(entries)],
    )
    driver.descriptor(0, TABLES, 16 * entries, INDIRECT)
    offer(driver)
    chain = queue.pop()
    assert chain is not None
    assert (len(chain.writable), chain.writable_size) == (entries, 16 * entries)


@pytest.mark.parametrize("size", [0, 3, 12, 65536, -8])
def test_bad_size(memory: GuestMemory, size: int) -> None:
    with pytest.raises(GuestError, match="power of two"):
        make_queue(memory, size)


@pytest.mark.parametrize(
    ("descriptors", "available", "used"),
    [
        (DESCRIPTORS + 8, AVAILABLE, USED),
        (DESCRIPTORS, AVAILABLE + 1, USED),
        (DESCRIPTORS, AVAILABLE, USED + 2),
        (LOW_SIZE - 16 * 8 + 16, AVAILABLE, USED),
        (DESCRIPTORS, LOW_SIZE - 18, USED),
        (DESCRIPTORS, AVAILABLE, LOW_SIZE - 64),
        (DESCRIPTORS, AVAILABLE, LOW_SIZE),
        (1 << 63, AVAILABLE, USED),
        (DESCRIPTORS, (1 << 64) - 2, USED),
    ],
)
def test_bad_ring_addresses(memory: GuestMemory, descriptors: int, available: int, used: int) -> None:
    with pytest.raises(GuestError):
        SplitQueue(memory, 0, 8, descriptors, available, used)


def test_positions_are_ours_to_get_right(memory: GuestMemory) -> None:
    with pytest.raises(ValueError):
        make_queue(memory, 8, 65536)


def test_largest_queue() -> None:
    fd = os.memfd_create("test-ram")
    os.ftruncate(fd, 1 << 20)
    memory = GuestMemory([MemoryRegion(0, 1 << 20, fd, 0)])
    os.close(fd)
    queue = SplitQueue(memory, 0, 32768, 0, 0x80000, 0x90000)
    # One loop through every descriptor: the longest walk a guest can ask for.
    memory.write(0, b"".join(struct.pack("<QIHH", 0, 1, NEXT, (i + 1) % 32768) for i in range(32768)))
    memory.write(0x80000, struct.pack("<HHH", 0, 1, 0))
    with pytest.raises(GuestError, match="loops"):
        queue.pop()
    queue.release()
    memory.close()


def expect_refusal(queue: SplitQueue, match: str) -> None:
    for _ in range(2):  # the queue stays where it is
        with pytest.raises(GuestError, match=match):
            queue.pop()
    assert queue.next_avail == 0
    assert not queue.in_flight


def test_available_index_jump(memory: GuestMemory, queue: SplitQueue) -> None:
    memory.write(AVAILABLE + 2, struct.pack("<H", 9))
    expect_refusal(queue, "jumped")
    memory.write(AVAILABLE + 2, struct.pack("<H", 0xFFFF))  # backwards is a jump, too
    expect_refusal(queue, "jumped")


def test_head_past_the_end(driver: MockDriver, queue: SplitQueue) -> None:
    offer(driver, 8)
    expect_refusal(queue, "head 8")


def test_head_offered_twice(driver: MockDriver, queue: SplitQueue) -> None:
    driver.descriptor(0, BUFFERS, 1, 0)
    offer(driver)
    offer(driver)
    assert queue.pop() is not None
    with pytest.raises(GuestError, match="in use"):
        queue.pop()


def test_next_past_the_end(driver: MockDriver, queue: SplitQueue) -> None:
    driver.descriptor(0, BUFFERS, 1, NEXT, 8)
    offer(driver)
    expect_refusal(queue, "next descriptor 8")


def test_loops(driver: MockDriver, queue: SplitQueue) -> None:
    driver.descriptor(0, BUFFERS, 1, NEXT, 1)
    driver.descriptor(1, BUFFERS, 1, NEXT, 0)
    offer(driver)
    expect_refusal(queue, "loops")
    driver.descriptor(0, BUFFERS, 0, NEXT, 0)  # onto itself, and empty
    expect_refusal(queue, "loops")


def test_loop_in_an_indirect_table(driver: MockDriver, queue: SplitQueue) -> None:
    driver.table(TABLES, [(BUFFERS, 1, NEXT, 1), (BUFFERS, 1, NEXT, 0)])
    driver.descriptor(0, TABLES, 32, INDIRECT)
    offer(driver)
    expect_refusal(queue, "loops")


def test_readable_after_writable(driver: MockDriver, queue: SplitQueue) -> None:
    driver.descriptor(0, BUFFERS, 1, NEXT | WRITE, 1)
    driver.descriptor(1, BUFFERS, 1, 0)
    offer(driver)
    expect_refusal(queue, "after a writable")


@pytest.mark.parametrize(
    ("address", "length"),
    [
        (LOW_SIZE, 1),
        (LOW_SIZE - 1, 2),
        (HIGH_START + HIGH_SIZE - 4, 8),
        (HIGH_START - 1, 2),
        ((1 << 64) - 1, 2),
    ],
)
@pytest.mark.parametrize("flags", [0, WRITE])
def test_address_outside_ram(
    driver: MockDriver, queue: SplitQueue, address: int, length: int, flags: int
) -> None:
    driver.descriptor(0, address, length, flags)
    offer(driver)
    expect_refusal(queue, "not RAM")


@pytest.mark.parametrize(
    ("length", "flags", "match"),
    [
        (0, INDIRECT, "0 bytes"),
        (24, INDIRECT, "24 bytes"),
        (16 * (MAX_INDIRECT + 1), INDIRECT, "too long"),
        (16, INDIRECT | NEXT, "after the indirect"),
        (16 * MAX_INDIRECT, INDIRECT, "not RAM"),
    ],
)
def test_bad_indirect_tables(
    driver: MockDriver, queue: SplitQueue, length: int, flags: int, match: str
) -> None:
    driver.descriptor(0, LOW_SIZE - 64, length, flags, 1)
    offer(driver)
    expect_refusal(queue, match)


def test_nested_indirect(driver: MockDriver, queue: SplitQueue) -> None:
    driver.table(TABLES, [(TABLES, 16, INDIRECT, 0)])
    driver.descriptor(0, TABLES, 16, INDIRECT)
    offer(driver)
    expect_refusal(queue, "inside an indirect")


def test_next_past_the_end_of_an_indirect_table(driver: MockDriver, queue: SplitQueue) -> None:
    driver.table(TABLES, [(BUFFERS, 1, NEXT, 2), (BUFFERS, 1, 0, 0), (BUFFERS, 1, 0, 0)])
    driver.descriptor(0, TABLES, 32, INDIRECT)
    offer(driver)
    expect_refusal(queue, "next descriptor 2")


def test_indirect_not_negotiated(memory: GuestMemory, driver: MockDriver) -> None:
    queue = make_queue(memory, 8, indirect=False)
    driver.table(TABLES, [(BUFFERS, 1, 0, 0)])
    driver.descriptor(0, TABLES, 16, INDIRECT)
    offer(driver)
    expect_refusal(queue, "not negotiated")
    queue.release()


def test_more_than_4_gib() -> None:
    """Descriptors may overlap, so a sparse gigabyte is enough to name more than 4."""
    fd = os.memfd_create("test-ram")
    os.ftruncate(fd, 1 << 30)
    memory = GuestMemory([MemoryRegion(0, 1 << 30, fd, 0)])
    os.close(fd)
    driver = MockDriver(memory, 8)
    queue = make_queue(memory, 8)
    for i in range(5):
        driver.descriptor(i, 0, 1 << 30, WRITE | (NEXT if i < 4 else 0), i + 1)
    offer(driver)
    expect_refusal(queue, "4 GiB")
    driver.descriptor(3, 0, 1 << 30, WRITE)
    chain = queue.pop()
    assert chain is not None
    assert chain.writable_size == 1 << 32
    del chain
    queue.release()
    memory.close()


class TreacherousMemory(GuestMemory):
    """Changes every descriptor the moment the device uses an address from one: between its check and its
    use."""

    __slots__ = ("armed",)
    armed: bool

    def view(self, gpa: int, size: int) -> memoryview:
        if getattr(self, "armed", False):
            evil = struct.pack("<QIHH", 1 << 60, 0xFFFFFFFF, NEXT | INDIRECT, 0xFFFF)
            super().view(DESCRIPTORS, 16)[:] = evil
        return super().view(gpa, size)


def test_descriptors_are_read_once(memory: GuestMemory) -> None:
    treacherous = TreacherousMemory(list(memory.regions))
    driver = MockDriver(treacherous, 8)
    queue = make_queue(treacherous, 8)
    driver.descriptor(0, BUFFERS, 16, NEXT, 1)
    driver.descriptor(1, BUFFERS, 32, WRITE)
    offer(driver)
    treacherous.armed = True
    chain = queue.pop()
    assert chain is not None
    assert (chain.readable_size, chain.writable_size) == (16, 32)
    del chain
    queue.release()


class CountingMemory(GuestMemory):
    __slots__ = ("views",)
    views: int

    def view(self, gpa: int, size: int) -> memoryview:
        self.views = getattr(self, "views", 0) + 1
        return super().view(gpa, size)


def test_a_loop_is_walked_no_further_than_the_queue_is_long(memory: GuestMemory) -> None:
    """Otherwise a guest could keep the device busy for as long as it likes."""
    counting = CountingMemory(list(memory.regions))
    driver = MockDriver(counting, 8)
    queue = make_queue(counting, 8)
    for i in range(8):
        driver.descriptor(i, BUFFERS, 1, NEXT if i < 7 else 0, i + 1)
    offer(driver)
    chain = queue.pop()
    assert chain is not None
    assert len(chain.readable) == 8  # as long as the queue is allowed
    queue.push(0, 0)
    driver.descriptor(7, BUFFERS, 1, NEXT, 0)
    offer(driver)
    counting.views = 0
    with pytest.raises(GuestError, match="loops"):
        queue.pop()
    assert counting.views == 8
    del chain
    queue.release()


def test_release_lets_go_of_guest_memory() -> None:
    memory = make_memory()
    queue = make_queue(memory, 8)
    with pytest.raises(BufferError):
        memory.close()
    queue.release()
    queue.release()
    with pytest.raises(ValueError):
        queue.pop()
    memory_again = GuestMemory(list(memory.regions))
    assert memory_again.regions[0].mapping is memory.regions[0].mapping
    for region in memory.regions:
        region.view.release()
        region.mapping.close()


def test_worker_imports_stay_lean() -> None:
    root = Path(__file__).resolve().parents[2]
    code = (
        f"import os, sys; sys.path.insert(0, {str(root)!r}); before = set(sys.modules)\n"
        "import devices.virtio.queue; print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) <= {
        "__future__",
        "_struct",
        "devices",
        "devices.errors",
        "devices.fence",
        "devices.memory",
        "devices.virtio",
        "devices.virtio.queue",
        "mmap",
        "struct",
    }


buffers = st.tuples(
    st.lists(st.integers(1, 64), max_size=4), st.lists(st.integers(1, 64), max_size=4)
).filter(lambda sizes: bool(sizes[0] or sizes[1]))
operations = st.lists(
    st.one_of(
        st.tuples(st.just("add"), buffers, st.none() | st.integers(0, 8)),
        st.tuples(st.just("pop"), st.none(), st.none()),
        st.tuples(st.just("push"), st.integers(0, 31), st.none()),
    ),
    max_size=60,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.sampled_from([1, 2, 4, 16]),
    start=st.one_of(st.just(0), st.integers(65500, 65535)),
    operations=operations,
)
def test_well_formed_traffic(memory: GuestMemory, size: int, start: int, operations: list[tuple]) -> None:  # type: ignore[type-arg]
    """Whatever order requests come and complete in, every buffer arrives and every head comes back once."""
    driver = MockDriver(memory, size, start)
    queue = make_queue(memory, size, start)
    offered: list[tuple[int, bytes, int]] = []  # not popped: head, what is readable, how much is writable
    popped: list[Chain] = []
    pushed: list[tuple[int, int]] = []
    serial = 0
    for name, argument, where in operations:
        if name == "add":
            sizes, payload, cursor = [], b"", BUFFERS + (serial % 64) * 0x400
            for length in argument[0]:
                serial += 1
                content = bytes((serial + i) & 0xFF for i in range(length))
                memory.write(cursor, content)
                payload += content
                sizes.append((cursor, length, 0))
                cursor += length
            for length in argument[1]:
                sizes.append((cursor, length, WRITE))
                cursor += length
            serial += 1
            head = driver.add(sizes, where)
            if head is not None:
                offered.append((head, payload, sum(argument[1])))
        elif name == "pop":
            chain = queue.pop()
            if not offered:
                assert chain is None
                continue
            assert chain is not None
            head, payload, writable = offered.pop(0)
            assert chain.head == head
            assert (chain.readable_size, chain.writable_size) == (len(payload), writable)
            assert sum(map(len, chain.writable)) == writable
            if serial < 64:  # buffers are not recycled yet
                assert b"".join(chain.readable) == payload
            popped.append(chain)
        elif popped:
            chain = popped.pop(argument % len(popped))
            for view in chain.writable:
                view[:] = b"w" * len(view)
            queue.push(chain.head, chain.writable_size)
            pushed.append((chain.head, chain.writable_size))
            if len(pushed) % 3 == 0 or size == 1:
                assert driver.collect() == pushed
                pushed.clear()
        assert queue.in_flight == {chain.head for chain in popped}
    assert driver.collect() == pushed
    assert queue.next_used == driver.used_idx
    queue.release()


def test_positions_wrap_at_65536(memory: GuestMemory) -> None:
    driver = MockDriver(memory, 4, 65530)
    queue = make_queue(memory, 4, 65530)
    chain = None
    for turn in range(20):
        head = driver.add([(BUFFERS, 8, WRITE)], None)
        chain = queue.pop()
        assert chain is not None
        assert chain.head == head
        queue.push(chain.head, turn)
        assert driver.collect() == [(head, turn)]
    assert queue.next_avail == queue.next_used == (65530 + 20) & 0xFFFF
    del chain
    queue.release()


addresses = st.one_of(
    st.integers(0, 0x9000),  # also the rings themselves
    st.integers(LOW_SIZE - 64, LOW_SIZE + 64),
    st.integers(HIGH_START - 8, HIGH_START + 8),
    st.sampled_from([TABLES, BUFFERS, HIGH_START + HIGH_SIZE - 1, (1 << 64) - 1, 1 << 63]),
)
lengths = st.one_of(
    st.integers(0, 256), st.sampled_from([16, 32, 48, 1 << 31, (1 << 32) - 1, (1 << 32) - 16])
)
flags = st.one_of(st.integers(0, 7), st.integers(0, 0xFFFF))
descriptors = st.tuples(addresses, lengths, flags, st.one_of(st.integers(0, 9), st.integers(0, 0xFFFF)))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.sampled_from([1, 2, 8]),
    start=st.sampled_from([0, 1, 65535]),
    ahead=st.one_of(st.integers(0, 9), st.integers(0, 0xFFFF)),
    heads=st.lists(st.one_of(st.integers(0, 9), st.integers(0, 0xFFFF)), min_size=8, max_size=8),
    table=st.lists(descriptors, min_size=8, max_size=8),
    indirect=st.lists(descriptors, min_size=1, max_size=8),
    push=st.booleans(),
)
def test_garbage(
    memory: GuestMemory,
    size: int,
    start: int,
    ahead: int,
    heads: list[int],
    table: list[tuple[int, int, int, int]],
    indirect: list[tuple[int, int, int, int]],
    push: bool,
) -> None:
    """No ring makes the device do anything but refuse it, or hand out views that lie within RAM."""
    driver = MockDriver(memory, size, start)
    queue = make_queue(memory, size, start)
    for index, entry in enumerate(table):
        driver.descriptor(index, *entry)
    driver.table(TABLES, indirect)
    memory.write(AVAILABLE + 4, struct.pack("<8H", *heads))
    memory.write(AVAILABLE + 2, struct.pack("<H", (start + ahead) & 0xFFFF))
    for _ in range(size + 1):
        try:
            chain = queue.pop()
        except GuestError:
            with pytest.raises(GuestError):
                queue.pop()
            break
        if chain is None:
            break
        assert chain.readable_size == sum(map(len, chain.readable))
        assert chain.writable_size == sum(map(len, chain.writable))
        assert all(chain.readable)
        assert all(chain.writable)
        assert chain.head in queue.in_flight
        if push:
            queue.push(chain.head, 0)
    assert len(queue.in_flight) <= size
    queue.release()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rings=st.randoms(use_true_random=False), size=st.sampled_from([1, 16, 256]))
def test_noise(memory: GuestMemory, rings, size: int) -> None:  # type: ignore[no-untyped-def]
    memory.write(DESCRIPTORS, rings.randbytes(16 * size))
    memory.write(AVAILABLE, rings.randbytes(4 + 2 * size))
    (idx,) = struct.unpack("<H", memory.read(AVAILABLE + 2, 2))
    start = (idx - rings.randrange(size + 2)) & 0xFFFF
    queue = make_queue(memory, size, start)
    for _ in range(size + 1):
        try:
            if queue.pop() is None:
                break
        except GuestError:
            break
    queue.release()
