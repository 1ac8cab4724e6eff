"""Rebuilding the refcounts of a qcow2 image that its last user left dirty (lazy refcounts). Worker process.

The tables are right in such an image and the counts may not be, so the counts are made again from the tables.
The dirty bit stays set until all of it is on stable storage: dying in between only means doing it again.
"""

from __future__ import annotations

from devices.block.qcow2_file import CorruptImage, Qcow2File
from devices.block.qcow2_mapping import ClusterMap
from devices.block.qcow2_refcounts import Refcounts

# Bounds the memory for counting to 256 MiB.
MAX_CLUSTERS = 1 << 26


def rebuild_refcounts(file: Qcow2File, refcounts: Refcounts, cluster_map: ClusterMap) -> None:
    """Make all counts and COPIED flags right, durably. The image has no snapshots and no bitmaps."""
    clusters = file.end
    if clusters > MAX_CLUSTERS:
        raise CorruptImage(
            "the qcow2 image was not closed and is too large to repair: run qemu-img check -r all"
        )
    counts = memoryview(bytearray(4 * clusters)).cast("I")
    for cluster in range(clusters):
        if file.is_metadata(cluster):
            counts[cluster] = 1
    for first, count in cluster_map.data_references():
        for cluster in range(first, first + count):
            # A compressed cluster at the end of the file is rounded up to sectors that are not there.
            if cluster < clusters:
                counts[cluster] += 1
    # New blocks go behind everything that is in use, where they may need blocks themselves.
    missing = refcounts.missing_blocks(clusters)
    while True:
        again = refcounts.missing_blocks(clusters + len(missing))
        if again == missing:
            break
        missing = again
    file.took(clusters, len(missing))
    for number, index in enumerate(missing):
        refcounts.add_block(index, clusters + number)
    for cluster, count in enumerate(counts):
        if refcounts.get(cluster) != count:
            refcounts.set(cluster, count)
    for number in range(len(missing)):
        refcounts.set(clusters + number, 1)
    cluster_map.fix_copied_flags(refcounts)
    refcounts.write()
    file.sync()
