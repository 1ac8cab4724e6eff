"""The words of vhost-user: request numbers, flags, feature bits and payload layouts. Both ends import it.

Follows QEMU's docs/interop/vhost-user.rst; the names are the specification's without their VHOST_USER_
prefix, and feature bits are masks. Numbers travel in the byte order of the machine, since both ends run on
it.
"""

import struct


class ProtocolError(Exception):
    """The peer broke the protocol. The connection is of no use any more: nothing can be trusted to follow."""


class Request:
    """Requests of the front end ("Front-end message types")."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    RESET_DEVICE = 34
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40


class BackendRequest:
    """Requests of the back end, on the channel SET_BACKEND_REQ_FD gave it ("Back-end message types")."""

    CONFIG_CHANGE_MSG = 2


class ProtocolFeature:
    """Protocol feature bits ("Protocol features")."""

    MQ = 1 << 0
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16


# The one virtio feature bit vhost-user took for itself; a driver never sees it.
VHOST_USER_F_PROTOCOL_FEATURES = 1 << 30

VERSION = 1
VERSION_MASK = 0x3
REPLY = 1 << 2
NEED_REPLY = 1 << 3

# In the u64 of SET_VRING_KICK, CALL and ERR.
VRING_INDEX_MASK = 0xFF
VRING_NO_FD = 1 << 8

MAX_CONFIG_SIZE = 256  # bytes of device configuration a message may carry
MAX_MEM_TABLE_REGIONS = 8  # in one SET_MEM_TABLE

HEADER = struct.Struct("=III")  # request, flags, size of the payload
U64 = struct.Struct("=Q")
VRING_STATE = struct.Struct("=II")  # index, num
VRING_ADDR = struct.Struct("=IIQQQQ")  # index, flags, descriptors, used, available, log
MEM_TABLE = struct.Struct("=II")  # number of regions, padding; the regions follow
MEM_REGION = struct.Struct("=QQQQ")  # guest address, size, user address, offset in the fd
SINGLE_MEM_REGION = struct.Struct("=QQQQQ")  # padding, then as MEM_REGION
CONFIG = struct.Struct("=III")  # offset, size, flags; the bytes follow
# mmap size, mmap offset, number of queues, queue size. The specification's structure ends here; in C, and so
# on every wire there is, four bytes of padding follow.
INFLIGHT = struct.Struct("=QQHH")
INFLIGHT_PADDED = struct.Struct("=QQHH4x")

# Who writes configuration, in the flags of SET_CONFIG (VHOST_SET_CONFIG_TYPE_*): the driver, or the VMM,
# which may change what no driver may.
CONFIG_BY_DRIVER = 0
CONFIG_BY_VMM = 1

_REQUEST_NAMES = {number: name for name, number in vars(Request).items() if isinstance(number, int)}


def request_name(request: int) -> str:
    """For error messages."""
    return _REQUEST_NAMES.get(request, f"request {request}")
