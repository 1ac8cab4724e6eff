"""A store-buffering litmus test: two processes publish and then look, as driver and device do
(devices/fence.py).

With the fence taken out of the loop below, a few to a few hundred rounds in 200,000 go wrong on an AMD EPYC.
(An empty function in its place hides them: calling it happens to last longer than a store waits.)
"""

import mmap
import os

import pytest

from devices.fence import full_fence

ROUNDS = 200_000
HERE, THERE, READY = 0, 64, 128  # in different cache lines; 4-byte numbers


def publish_and_look(shared: memoryview, log: memoryview, mine: int, others: int, cpu: int) -> None:
    """In each round store its number, then load the other side's; `log` gets what was seen."""
    os.sched_setaffinity(0, {cpu})
    shared[READY + mine] = 1
    while not shared[READY + others]:
        pass
    for number in range(1, ROUNDS):
        shared[mine] = number
        full_fence()
        log[number] = shared[others]


def count_reorderings(ours: list[int], theirs: list[int]) -> int:
    """How often a round of ours and one of theirs each missed the other's store: one load overtook a store.

    We stored i and then saw `ours[i]`, so their round ours[i] + 1 had not stored yet. If that round in turn
    did not see i, neither order of the two rounds explains it.
    """
    return sum(1 for i in range(1, ROUNDS) if ours[i] + 1 < ROUNDS and theirs[ours[i] + 1] < i)


def test_the_count_finds_a_reordering() -> None:
    in_order = [0, *range(1, ROUNDS)]
    assert count_reorderings(in_order, in_order) == 0
    # Round 7 of ours saw 6 and round 7 of theirs saw 6: each missed the other's store.
    ours, theirs = in_order.copy(), in_order.copy()
    ours[7] = theirs[7] = 6
    assert count_reorderings(ours, theirs) == 1
    theirs[7] = 7
    assert count_reorderings(ours, theirs) == 0


def run_both() -> tuple[list[int], list[int]]:
    before = os.sched_getaffinity(0)
    cpus = sorted(before)
    with mmap.mmap(-1, 4096 + 8 * ROUNDS) as memory, memoryview(memory).cast("I") as words:
        shared, ours, theirs = words[:1024], words[1024 : 1024 + ROUNDS], words[1024 + ROUNDS :]
        with shared, ours, theirs:
            child = os.fork()
            if child == 0:
                try:
                    publish_and_look(shared, theirs, THERE, HERE, cpus[1])
                finally:
                    os._exit(0)
            try:
                publish_and_look(shared, ours, HERE, THERE, cpus[0])
            finally:
                os.sched_setaffinity(0, before)
                os.waitpid(child, 0)
            return ours.tolist(), theirs.tolist()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a reordering shows only between two CPUs")
def test_no_load_overtakes_a_store_across_the_fence() -> None:
    tried = 0
    for _ in range(20):  # on a busy host the two may hardly meet
        ours, theirs = run_both()
        tried += sum(1 for seen in ours if 0 < seen < ROUNDS - 1)
        assert count_reorderings(ours, theirs) == 0
        if tried > ROUNDS // 4:
            return
    pytest.fail(f"the two processes hardly ran at the same time: {tried} rounds tried nothing")
