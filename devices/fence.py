"""The full memory fence of the virtqueue handshakes. Used by workers and by the VMM.

x86 keeps loads in order with loads, stores with stores, and loads before later stores; a compiler cannot move
an access across the C calls CPython makes for it. One reordering is left: a load may overtake an earlier
store to another address, because the store still sits in the CPU's store buffer. It does happen between
Python statements, about once in 10,000 times (tests/unit/test_queue_fence.py shows it). It matters where one
side publishes and then looks whether the other side sleeps, while the other announces its sleep and then
looks for work: if both loads overtake, both sleep for ever. `SplitQueue.interrupt_wanted` is such a place; it
pairs with the virtio_mb of Linux' virtqueue_enable_cb.

Any locked instruction empties the store buffer. Taking a lock is the cheapest one CPython offers (about 0.1
us, no GIL release, no library to find); a call that drops the GIL would do as well, but only by accident.
"""

import os
import sys
from _thread import allocate_lock

if sys.byteorder != "little" or os.uname().machine != "x86_64":
    # Other processors reorder more than this file knows of, and rings are read in the host's byte order.
    raise ImportError("virtqueues need an x86-64 host: this memory ordering was thought through for no other")


def full_fence() -> None:
    """Order every earlier store before every later load, as seen by the guest and by other processes.

    The lock is a fresh one: a shared lock could be held by a thread that was just descheduled, or by the very
    code that a signal handler interrupted. Nobody waits for this one.
    """
    allocate_lock().acquire()
