"""Requests in flight when a back end dies: at every store it could die before, and with every lie a guest
could have told (devices/vhost/inflight.py, devices/virtio/queue.py)."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.errors import GuestError
from devices.vhost.inflight import (
    INFLIGHT_MASK,
    LAST_BATCH_HEAD_FIELD,
    NEXT_SHIFT,
    USED_IDX_FIELD,
    InflightBuffer,
    QueueTracker,
    create_buffer,
    queue_region_size,
)
from devices.vhost.messages import ProtocolError
from devices.virtio import queue as queue_module
from devices.virtio.queue import SplitQueue
from tests.unit.worker_driver import SIZE, Guest


class Died(BaseException):
    """What kill -9 is to a process."""


class Stores:
    """A memoryview that counts what is stored through it, and ends the process before a given store."""

    left = 0

    def __init__(self, view: "memoryview[int]") -> None:
        self.view = view

    def __getitem__(self, index: int) -> int:
        return self.view[index]

    def __setitem__(self, index: int, value: int) -> None:
        if Stores.left == 0:
            raise Died
        Stores.left -= 1
        self.view[index] = value

    def release(self) -> None:
        self.view.release()


class Tracked:
    """A queue over a guest's ring and an in-flight buffer that outlives it."""

    def __init__(self) -> None:
        self.guest = Guest()
        self.fd, size = create_buffer(2, SIZE)
        self.buffer = InflightBuffer(self.fd, size, 0, 2, SIZE)

    def tracker(self) -> QueueTracker:
        tracker = self.buffer.tracker(0)
        assert tracker is not None
        return tracker

    def queue(self) -> SplitQueue:
        config = self.guest.config
        return SplitQueue(
            self.guest.memory,
            0,
            SIZE,
            config.descriptors,
            config.available,
            config.used,
            tracker=self.tracker(),
        )

    def close(self) -> None:
        self.buffer.close()
        os.close(self.fd)
        self.guest.close()


@pytest.fixture
def tracked() -> Iterator[Tracked]:
    tracked = Tracked()
    yield tracked
    tracked.close()


def mortal(queue: SplitQueue) -> SplitQueue:
    for name in ("_states", "_tracked", "_used", "_used_elements"):
        setattr(queue, name, Stores(getattr(queue, name)))
    return queue


@settings(max_examples=500, deadline=None)
@given(
    lives=st.lists(st.integers(0, 60), max_size=12),
    offers=st.lists(st.integers(0, 6), min_size=1, max_size=12),
    answers=st.randoms(use_true_random=False),
)
def test_killed_before_any_store_every_request_is_answered_once(lives, offers, answers) -> None:  # type: ignore[no-untyped-def]
    """A device that answers out of order, and dies before its nth store, again and again."""
    tracked = Tracked()
    guest = tracked.guest
    expected = 0
    answered: list[int] = []
    deaths = [*lives, 1 << 30]
    held: list[queue_module.Chain] = []
    queue: SplitQueue | None = None
    for stores in deaths:
        Stores.left = stores
        held.clear()
        queue = mortal(tracked.queue())
        try:
            while True:
                if offers and answers.random() < 0.5:
                    for _ in range(offers.pop()):
                        guest.offer([b"%d" % expected], [8])
                        expected += 1
                chain = queue.pop()
                if chain is not None:
                    held.append(chain)
                if held and (chain is None or answers.random() < 0.5):
                    done = held.pop(answers.randrange(len(held)))
                    data = b"".join(done.readable)
                    done.writable[0][: len(data)] = data
                    queue.push(done.head, len(data))
                elif chain is None and not offers:
                    break
        except Died:
            pass
        held.clear()
        done = chain = None  # type: ignore[assignment]
        queue.release()
        for _, length, data in guest.collect():
            answered.append(int(data[:length]))
        if stores == 1 << 30:
            assert sorted(answered) == list(range(expected))
            assert not any(word & INFLIGHT_MASK for word in tracked_words(tracked))
    tracked.close()


def tracked_words(tracked: Tracked) -> list[int]:
    tracker = tracked.tracker()
    words = list(tracker.states[::2])
    tracker.release()
    return words


def test_what_was_taken_is_taken_again_in_its_old_order(tracked: Tracked) -> None:
    for number in range(5):
        tracked.guest.offer([b"%d" % number], [1])
    queue = tracked.queue()
    heads = [chain.head for _ in range(4) if (chain := queue.pop()) is not None]
    queue.push(heads[1], 1)
    queue.push(heads[3], 1)
    del chain
    queue.release()
    # The order is that of the counters, not of the heads: a descriptor that is used again is the youngest.
    queue = tracked.queue()
    assert queue.in_flight == {heads[0], heads[2]}
    assert (queue.next_used, queue.next_avail) == (2, 4)
    assert queue.interrupt_wanted()
    again = [chain.head for _ in range(3) if (chain := queue.pop()) is not None]
    assert again == [heads[0], heads[2], 4]
    assert queue.pop() is None
    for head in again:
        queue.push(head, 1)
    del chain
    queue.release()
    assert sorted(head for head, _, _ in tracked.guest.collect()) == [0, 1, 2, 3, 4]


def test_unpopped_is_still_in_flight(tracked: Tracked) -> None:
    for _ in range(2):
        tracked.guest.offer([b"x"], [1])
    queue = tracked.queue()
    first = queue.pop()
    assert first is not None
    queue.unpop(first)
    second = queue.pop()
    assert second is not None
    assert second.head == first.head
    queue.unpop(second)
    del first, second
    queue.release()
    queue = tracked.queue()
    heads = []
    while (chain := queue.pop()) is not None:
        heads.append(chain.head)
        queue.push(chain.head, 1)
    assert heads == [0, 1]
    del chain
    queue.release()


def test_a_batch_of_a_back_end_before_us_is_taken_back(tracked: Tracked) -> None:
    """One that used three descriptors at once, moved the index, and died before it took its marks away."""
    tracker = tracked.tracker()
    assert tracker.recover(SIZE, 10) is None
    for counter, head in enumerate((7, 3, 5, 9)):
        tracker.states[2 * head] = 1
        tracker.states[2 * head + 1] = 100 + counter
    previous = 0
    for head in (7, 5, 3):
        tracker.states[2 * head] = 1 | previous << NEXT_SHIFT
        previous = head
    tracker.header[LAST_BATCH_HEAD_FIELD] = 3
    assert tracker.recover(SIZE, 13) == [9]
    assert tracker.header[USED_IDX_FIELD] == 13
    assert tracker.counter == 104
    tracker.release()


@pytest.mark.parametrize("used_idx", [9, 10 + SIZE + 1, 0x8000])
def test_a_used_index_nobody_wrote_is_the_guests_fault(tracked: Tracked, used_idx: int) -> None:
    tracker = tracked.tracker()
    tracker.recover(SIZE, 10)
    with pytest.raises(GuestError, match="used index"):
        tracker.recover(SIZE, used_idx)
    tracker.release()


def test_a_last_batch_past_the_end(tracked: Tracked) -> None:
    tracker = tracked.tracker()
    tracker.recover(SIZE, 0)
    tracker.header[LAST_BATCH_HEAD_FIELD] = SIZE
    with pytest.raises(GuestError, match="last batch"):
        tracker.recover(SIZE, 1)
    tracker.release()


def test_no_region_for_such_a_queue(tracked: Tracked) -> None:
    assert tracked.buffer.tracker(2) is None
    tracker = tracked.tracker()
    with pytest.raises(ProtocolError, match="ring of"):
        tracker.recover(2 * SIZE, 0)
    tracker.release()


@pytest.mark.parametrize(
    ("size", "offset", "queues", "entries"),
    [
        (queue_region_size(SIZE), 0, 2, SIZE),
        (2 * queue_region_size(SIZE) + 1, 0, 2, SIZE),
        (2 * queue_region_size(SIZE), 4096, 2, SIZE),
        (queue_region_size(SIZE), 1, 1, SIZE),
        (1 << 63, 0, 1, SIZE),
        (64, 0, 0, SIZE),
    ],
)
def test_no_buffer(tracked: Tracked, size: int, offset: int, queues: int, entries: int) -> None:
    with pytest.raises(ProtocolError, match="in-flight buffer"):
        InflightBuffer(tracked.fd, size, offset, queues, entries)
