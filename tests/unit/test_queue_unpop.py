"""Giving back the chain that was popped last."""

from collections.abc import Iterator

import pytest

from devices.virtio.queue import SplitQueue
from tests.unit.worker_driver import SIZE, Guest


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


@pytest.fixture
def queue(guest: Guest) -> Iterator[SplitQueue]:
    queue = guest.queue()
    yield queue
    queue.release()


def test_it_is_popped_again(guest: Guest, queue: SplitQueue) -> None:
    guest.offer([b"a"], [])
    guest.offer([b"b"], [])
    first = queue.pop()
    assert first is not None
    queue.unpop(first)
    assert (queue.next_avail, queue.in_flight) == (0, set())
    del first
    for data in (b"a", b"b"):
        chain = queue.pop()
        assert chain is not None
        assert bytes(chain.readable[0]) == data
        queue.push(chain.head, 0)
        del chain
    assert len(guest.collect()) == 2


def test_positions_wrap(guest: Guest, queue: SplitQueue) -> None:
    for _ in range(0x10000 // SIZE):
        for _ in range(SIZE):
            guest.offer([], [1])
            chain = queue.pop()
            assert chain is not None
            before = queue.next_avail
            queue.unpop(chain)
            del chain
            chain = queue.pop()
            assert chain is not None
            assert queue.next_avail == before
            queue.push(chain.head, 0)
            del chain
        guest.collect()
    assert queue.next_avail == 0


def test_no_other_chain(guest: Guest, queue: SplitQueue) -> None:
    for _ in range(3):
        guest.offer([], [1])
    first, second = queue.pop(), queue.pop()
    assert first is not None and second is not None
    with pytest.raises(ValueError, match="head 0 is not the one popped last"):
        queue.unpop(first)
    queue.unpop(second)
    for chain in (first, second):
        with pytest.raises(ValueError, match="not the one popped last"):
            queue.unpop(chain)
    assert (queue.next_avail, queue.in_flight) == (1, {0})
    again = queue.pop()
    assert again is not None
    queue.push(again.head, 0)
    with pytest.raises(ValueError, match="head 1"):
        queue.unpop(again)
