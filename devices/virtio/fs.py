"""virtio-fs, the device by which a guest mounts a directory of the host's: the facts of its type (virtio
1.2, 5.11). VMM process.

What the FUSE requests in its rings ask for is a back end's work, virtiofsd's as a rule. The configuration is
ours, as in QEMU's vhost-user-fs: virtiofsd does not know the tag.
"""

import struct

from devices.vhost.messages import ProtocolFeature
from devices.virtio.device import VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1

# What each virtiofsd offers. A set that is known beforehand, so that drivers may come before the back end.
FS_FEATURES = VIRTIO_F_INDIRECT_DESC | VIRTIO_F_VERSION_1

# What needs the back end's memory of what went before is of no use: files that are open in a virtiofsd end
# with it.
FS_PROTOCOL_FEATURES = ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK

# The hiprio queue and one for requests. Linux makes requests as long as a queue has descriptors: 1 MiB here.
FS_QUEUE_SIZES = (128, 256)

# struct virtio_fs_config: tag, num_request_queues. What follows is there with VIRTIO_FS_F_NOTIFICATION only.
_CONFIG = struct.Struct("<36sI")


def fs_config(tag: str) -> bytes:
    """The configuration of the file system that drivers know by `tag`, 1 to 36 bytes of UTF-8."""
    return _CONFIG.pack(tag.encode(), len(FS_QUEUE_SIZES) - 1)
