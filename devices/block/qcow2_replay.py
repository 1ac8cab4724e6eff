"""Replaying the restart journal of a qcow2 image. Worker process.

At whatever moment the worker before this one was killed, also in the middle of a commit: the file has for
each guest cluster what it had when the journal was last empty, or an entry from the journal. So the newest
one counts, whatever the file has; host clusters that are new count 1, whatever the file says; and of the
tables that lay in memory only none is needed. What a cluster held before it was changed may be unknown by
now: that is a leak. docs/qcow2.md has the whole argument.
"""

from __future__ import annotations

from devices.block.qcow2_file import CorruptImage, Qcow2File
from devices.block.qcow2_journal import Journal
from devices.block.qcow2_mapping import COMPRESSED_FLAG, OFFSET_MASK, ClusterMap
from devices.block.qcow2_refcounts import Refcounts


def replay_journal(journal: Journal, file: Qcow2File, refcounts: Refcounts, cluster_map: ClusterMap) -> None:
    """Bring the tables in memory to where they were, and let `cluster_map` keep `journal` from now on.

    The records stay: dying again before the next commit means doing this again.
    """
    bits = file.cluster_bits
    newest: dict[int, int] = {}
    new: set[int] = set()
    for cluster, entry, count, is_new in journal.records():
        for guest in range(cluster, cluster + count):
            newest[guest] = entry
            if is_new:
                new.add((entry & OFFSET_MASK) >> bits)
                entry += file.cluster_size
    refcounts.restore(sorted(new))
    unused = set(new)
    # Nothing is recorded meanwhile, so that a commit in between, which only an untrue journal can cause, does
    # not empty it.
    for guest, entry in newest.items():
        if entry & COMPRESSED_FLAG:
            raise CorruptImage("the qcow2 restart journal is not of this image")
        cluster_map.check_entry(guest, entry)
        old = cluster_map.entry(guest)
        unused.discard((entry & OFFSET_MASK) >> bits)
        if old != entry:
            # `replace` frees what it replaces.
            unused.discard((old & OFFSET_MASK) >> bits)
            cluster_map.replace(guest << bits, 1, entry)
    for host in sorted(unused):
        refcounts.free_later(host, 1)
    cluster_map.journal = journal
