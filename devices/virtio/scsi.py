"""The virtio SCSI host device: a bus with one target (virtio 1.2, section 5.6). VMM process.

The CD-ROM lives in the VMM, as in vmd, for it has little to do: it is read at boot or installation, nobody
writes to it, and a machine saves a process. What that costs: reading the ISO file is done on the main loop's
thread, so the console, timers and legacy interrupts wait while the host's disk does. Hence the bounds: one
command moves at most `devices.scsi.cdrom.MAX_TRANSFER` bytes, and after BATCH_BYTES others get their turn.
vCPUs and workers do not wait, as a read lets go of the GIL.

Requests are finished before the next is popped. So a task management function never finds the task it is
about, provided that the request queue is served first: see `_serve_control`.
"""

import struct
from typing import Any

from devices.block.transfer import slice_buffers
from devices.board import Board
from devices.errors import GuestError
from devices.memory import GuestMemory
from devices.scsi.cdrom import MAX_TRANSFER, CdRom
from devices.scsi.medium import Medium
from devices.scsi.target import REPORT_LUNS_UNIT, Target
from devices.scsi.unit import Overrun
from devices.state import SavedState
from devices.virtio.blk import scatter
from devices.virtio.device import VIRTIO_ID_SCSI
from devices.virtio.inprocess import InProcessDevice
from devices.virtio.queue import Chain, SplitQueue

CONTROL_QUEUE, EVENT_QUEUE, REQUEST_QUEUE = range(3)
QUEUE_SIZES = (128, 128, 128)
SEG_MAX = 126  # the request queue less request and response headers

# Responses, sections 5.6.6.1 and 5.6.6.2.
VIRTIO_SCSI_S_OK = 0
VIRTIO_SCSI_S_OVERRUN = 1
VIRTIO_SCSI_S_BAD_TARGET = 3
VIRTIO_SCSI_S_FAILURE = 9
VIRTIO_SCSI_S_FUNCTION_REJECTED = 11
VIRTIO_SCSI_S_INCORRECT_LUN = 12

# Control requests, section 5.6.6.2.
VIRTIO_SCSI_T_TMF = 0
VIRTIO_SCSI_T_AN_QUERY = 1
VIRTIO_SCSI_T_AN_SUBSCRIBE = 2

VIRTIO_SCSI_T_TMF_ABORT_TASK = 0
VIRTIO_SCSI_T_TMF_ABORT_TASK_SET = 1
VIRTIO_SCSI_T_TMF_CLEAR_TASK_SET = 3
VIRTIO_SCSI_T_TMF_I_T_NEXUS_RESET = 4
VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET = 5
VIRTIO_SCSI_T_TMF_QUERY_TASK = 6
VIRTIO_SCSI_T_TMF_QUERY_TASK_SET = 7

_RESETS = (VIRTIO_SCSI_T_TMF_I_T_NEXUS_RESET, VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET)
_TASK_FUNCTIONS = (
    VIRTIO_SCSI_T_TMF_ABORT_TASK,
    VIRTIO_SCSI_T_TMF_ABORT_TASK_SET,
    VIRTIO_SCSI_T_TMF_CLEAR_TASK_SET,
    VIRTIO_SCSI_T_TMF_QUERY_TASK,
    VIRTIO_SCSI_T_TMF_QUERY_TASK_SET,
)

# struct virtio_scsi_config, section 5.6.4: num_queues, seg_max, max_sectors (of 512 bytes), cmd_per_lun,
# event_info_size, sense_size, cdb_size, max_channel, max_target, max_lun.
_CONFIG = struct.Struct("<7I2HI")
_EVENT_SIZE = 16
_WRITABLE = range(20, 28)  # sense_size and cdb_size
_WRITABLE_FIELDS = struct.Struct("<II")
DEFAULT_SENSE_SIZE = 96
DEFAULT_CDB_SIZE = 32
# The specification has no upper bounds; these are QEMU's.
MAX_SENSE_SIZE = 65535
MAX_CDB_SIZE = 255

_LUN_SIZE = 8
_REQUEST_HEADER = 19  # lun, id, task_attr, prio, crn; the CDB follows
_RESPONSE = struct.Struct("<IIHBB")  # sense_len, residual, status_qualifier, status, response; sense follows
_TYPE = struct.Struct("<I")
_TMF = struct.Struct("<II8sQ")  # type, subtype, lun, id
_NOTIFICATION = struct.Struct("<I8sI")  # type, lun, event_requested
_NOTIFICATION_ANSWER = struct.Struct("<IB")  # event_actual, response

# Served between two turns of the main loop.
BATCH = 32
BATCH_BYTES = MAX_TRANSFER


class ScsiDevice(InProcessDevice):
    """A SCSI bus whose target 0 has a CD-ROM drive with `medium` in it as LUN 0."""

    def __init__(self, memory: GuestMemory, board: Board, medium: Medium) -> None:
        super().__init__(memory, board, device_id=VIRTIO_ID_SCSI, queue_sizes=QUEUE_SIZES)
        self._drive = CdRom(medium)
        self._target = Target(self._drive)
        self._set_sizes(DEFAULT_SENSE_SIZE, DEFAULT_CDB_SIZE)

    def _set_sizes(self, sense_size: int, cdb_size: int) -> None:
        self._sense_size = sense_size
        self._cdb_size = cdb_size
        self.configuration = _CONFIG.pack(
            1,
            SEG_MAX,
            MAX_TRANSFER // 512,
            QUEUE_SIZES[REQUEST_QUEUE],
            _EVENT_SIZE,
            sense_size,
            cdb_size,
            0,
            0,
            0,
        )

    def write_config(self, offset: int, data: bytes) -> None:
        """sense_size and cdb_size are the driver's, in writes of any width. GuestError when out of range."""
        with self.lock:
            configuration = bytearray(self.configuration)
            for position, value in enumerate(data, offset):
                if position in _WRITABLE:
                    configuration[position] = value
            sense_size, cdb_size = _WRITABLE_FIELDS.unpack_from(configuration, _WRITABLE.start)
            if sense_size > MAX_SENSE_SIZE or cdb_size > MAX_CDB_SIZE:
                raise GuestError(f"SCSI sense of {sense_size} bytes, CDBs of {cdb_size}")
            self._set_sizes(sense_size, cdb_size)

    def stopped(self) -> None:
        self._set_sizes(DEFAULT_SENSE_SIZE, DEFAULT_CDB_SIZE)
        self._drive.reset()

    def save_own(self) -> dict[str, Any]:
        return {"sense_size": self._sense_size, "cdb_size": self._cdb_size, "drive": self._drive.save()}

    def load_own(self, saved: SavedState) -> None:
        self._drive.load(saved.mapping("drive"))
        self._set_sizes(saved.number("sense_size", MAX_SENSE_SIZE), saved.number("cdb_size", MAX_CDB_SIZE))

    def serve(self, index: int, queue: SplitQueue) -> bool:
        if index == REQUEST_QUEUE:
            return self._serve_requests(queue)
        if index == CONTROL_QUEUE:
            return self._serve_control(queue)
        return False  # there is no event to tell of: the driver's buffers stay where they are

    def _serve_requests(self, queue: SplitQueue) -> bool:
        moved = 0
        for _ in range(BATCH):
            chain = queue.pop()
            if chain is None:
                return False
            written = self._request(chain)
            queue.push(chain.head, written)
            moved += written
            if moved >= BATCH_BYTES:
                break
        return True

    def _serve_control(self, queue: SplitQueue) -> bool:
        requests = self._queues.get(REQUEST_QUEUE)
        if requests is not None:
            # When the driver is told that a task was aborted, it uses the task's buffers for something else.
            # A request that it made before must not wait in its queue then.
            more = self._serve_requests(requests)
            self.wake(REQUEST_QUEUE)  # for its interrupt
            if more:
                return True
        for _ in range(BATCH):
            chain = queue.pop()
            if chain is None:
                return False
            queue.push(chain.head, self._control(chain))
        return True

    def _request(self, chain: Chain) -> int:
        """Carry out one SCSI command. Returns how many bytes of the chain were written."""
        request_size = _REQUEST_HEADER + self._cdb_size
        response_size = _RESPONSE.size + self._sense_size
        if chain.readable_size < request_size:
            raise GuestError(f"SCSI request of {chain.readable_size} bytes")
        if chain.writable_size < response_size:
            raise GuestError(f"SCSI request with {chain.writable_size} bytes for its response")
        data_out_size = chain.readable_size - request_size
        room = chain.writable_size - response_size
        header = _copy(chain.readable, request_size)
        lun = _find(header[:_LUN_SIZE])
        sense = b""
        status = transferred = 0
        if data_out_size and room:
            response = VIRTIO_SCSI_S_FAILURE  # VIRTIO_SCSI_F_INOUT is not offered
        elif lun is None:
            response = VIRTIO_SCSI_S_BAD_TARGET
        else:
            buffers = slice_buffers(chain.writable, response_size, room)
            try:
                reply = self._target.execute(lun, header[_REQUEST_HEADER:], buffers, room)
            except Overrun:
                response = VIRTIO_SCSI_S_OVERRUN
            else:
                response = VIRTIO_SCSI_S_OK
                status, sense, transferred = reply.status, reply.sense[: self._sense_size], reply.transferred
                scatter(reply.data, buffers)
        residual = data_out_size + room - transferred
        answer = _RESPONSE.pack(len(sense), residual, 0, status, response) + sense.ljust(
            self._sense_size, b"\0"
        )
        scatter(answer, chain.writable)
        return response_size + transferred

    def _control(self, chain: Chain) -> int:
        """Answer one request of the control queue. Returns how many bytes of the chain were written."""
        if chain.readable_size < _TYPE.size:
            raise GuestError(f"SCSI control request of {chain.readable_size} bytes")
        request = _copy(chain.readable, min(chain.readable_size, _TMF.size))
        (kind,) = _TYPE.unpack_from(request)
        if kind == VIRTIO_SCSI_T_TMF:
            if len(request) < _TMF.size:
                raise GuestError(f"SCSI task management request of {len(request)} bytes")
            _, function, lun, _ = _TMF.unpack(request)
            answer = bytes((self._manage_tasks(function, lun),))
        elif kind in (VIRTIO_SCSI_T_AN_QUERY, VIRTIO_SCSI_T_AN_SUBSCRIBE):
            if len(request) < _NOTIFICATION.size:
                raise GuestError(f"SCSI notification request of {len(request)} bytes")
            _, lun, _ = _NOTIFICATION.unpack_from(request)
            found = _find(lun) == 0
            # No event is supported.
            answer = _NOTIFICATION_ANSWER.pack(0, VIRTIO_SCSI_S_OK if found else VIRTIO_SCSI_S_BAD_TARGET)
        else:
            answer = b""  # where would the response of such a request be?
        if chain.writable_size < len(answer):
            raise GuestError(f"SCSI control request with {chain.writable_size} bytes for its response")
        return scatter(answer, chain.writable)

    def _manage_tasks(self, function: int, address: bytes) -> int:
        lun = _find(address)
        if lun is None:
            return VIRTIO_SCSI_S_BAD_TARGET
        if function not in (*_RESETS, *_TASK_FUNCTIONS):
            return VIRTIO_SCSI_S_FUNCTION_REJECTED  # CLEAR ACA, for there is no ACA, or unknown
        # A nexus has no logical unit.
        if lun != 0 and function != VIRTIO_SCSI_T_TMF_I_T_NEXUS_RESET:
            return VIRTIO_SCSI_S_INCORRECT_LUN
        if function in _RESETS:
            self._drive.reset()
        return VIRTIO_SCSI_S_OK  # FUNCTION COMPLETE: the task, if there was one, has ended


def _find(lun: bytes) -> int | None:
    """Which logical unit of target 0 the 8 bytes of `lun` name, or None when another target (5.6.6.1)."""
    if lun == REPORT_LUNS_UNIT.to_bytes(2, "big") + bytes(6):
        return REPORT_LUNS_UNIT
    if lun[0] != 1 or lun[1] != 0 or any(lun[4:]):
        return None
    if lun[2] != 0 and lun[2] >> 6 != 1:
        return None  # neither peripheral nor flat space addressing
    return (lun[2] & 0x3F) << 8 | lun[3]


def _copy(views: list[memoryview], size: int) -> bytes:
    """A private copy of the first `size` bytes: the guest may change its own after any check."""
    return b"".join(slice_buffers(views, 0, size))
