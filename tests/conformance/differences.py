"""Every line in which vmrun's transcript may differ from QEMU's, with the reason; and the comparison.

Names and values are patterns as of fnmatch; None is a line that is not there. An entry that applies to a
transcript in which nothing differs any more is a complaint as well: the table says what is so.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple


class Difference(NamedTuple):
    name: str
    qemu: str | None
    vmrun: str | None
    reason: str


_ERROR_LENGTH = (
    "a failed request wrote its status and nothing else: we say so; QEMU counts the whole buffer (2.7.8.2: "
    "no more than was written)"
)
_BLK_LIMITS = "limits are each implementation's own"

DIFFERENCES = (
    # Configuration space.
    Difference("*.pci.command.writable", "0507", "0407", "SERR# enable: we have no system errors to report"),
    Difference("*.pci.latency.writable", "00", "ff",
               "PCI Express makes it read-only 0; drivers set it, harmlessly"),
    Difference("*.pci.bar4", "memory64 prefetchable size 4000", "memory32 size 4000",
               "32 bits reach everywhere in our window; reading ISR has an effect, so not prefetchable"),
    Difference("*.pci.bar4.upper", "writable ffffffff", None, "the upper half of QEMU's 64-bit BAR"),
    Difference("*.pci.bar0", "io size ??", "io size 80", "QEMU sizes it by the device's configuration"),
    Difference("*.pci.bar0", "io size ???", "io size 80", "QEMU sizes it by the device's configuration"),
    # Features that have no switch in QEMU, and registers of the transport.
    Difference("*.legacy.feature.30", "offered", None, "VIRTIO_F_BAD_FEATURE, for drivers of 2007"),
    Difference("blk*.feature.4", "offered", None, "GEOMETRY: cylinders and heads mean nothing here"),
    Difference("*.legacy.features.by.bytes", "DISAGREE", "agree",
               "QEMU's registers answer at their first byte only; ours give the byte that was asked for"),
    Difference("*.modern.reset.driver.feature", "00000001", "00000000",
               "a reset forgets what the driver accepted (2.4); QEMU keeps showing it"),
    Difference("*.modern.features.without.version1", "status 0b", "status 03",
               "a modern driver must accept VERSION_1 (6.1): we refuse FEATURES_OK, QEMU serves it"),
    Difference("*.modern.features.not.offered", "status 0b", "status 03",
               "accepting what is not offered is refused (2.2.2); QEMU ignores the excess bits"),
    # virtio-blk.
    Difference("blk*.config.discard", "*", "*", _BLK_LIMITS),
    Difference("blk*.config.write_zeroes", "*", "*", _BLK_LIMITS),
    Difference("blk*.read.past.end.used", "513", "1", _ERROR_LENGTH),
    Difference("blk*.read.across.end.used", "1025", "1", _ERROR_LENGTH),
    Difference("blk*.read.far.used", "513", "1", _ERROR_LENGTH),
    Difference("blk*.read.sector.overflow.used", "513", "1", _ERROR_LENGTH),
    Difference("blk*.read.half.sector.used", "257", "1", _ERROR_LENGTH),
    Difference("blk*.unsupported.with.data.used", "65", "1", _ERROR_LENGTH),
    Difference("blk*.id.short.data", "aa aa", "00 aa",
               "the serial number is padded with zeroes (5.2.6); QEMU writes one zero and leaves the rest"),
    # virtio-console: the ports of the guest agent, which QEMU here has not (tests/guest/test_ports.py).
    Difference("console*", None, "*", "a device that the other machine was not given"),
    # virtio-net.
    Difference("net*.modern.*arp", "*num_buffers not 1", "*header zero, 1 buffer",
               "num_buffers is 1 without MRG_RXBUF (5.1.6.4.1); QEMU leaves what was there"),
    Difference("net*.queue2.size", "64", "0", "QEMU has the control queue even when CTRL_VQ is switched off"),
    Difference("net*.queues", "3", "2", "likewise"),
    Difference("net*.pci.msix.vectors", "4", "3", "a vector for each queue and one for changes: likewise"),
    # virtio-rng.
    Difference("rng*.queue0.size", "8", "64", "QEMU has 8 entries, little for a driver that asks ahead"),
    # virtio-scsi.
    Difference("scsi*.config.limits", "channel 0 target 255 lun 16383", "channel 0 target 0 lun 0",
               "one drive and no more: a scan of the bus ends at once"),
    Difference("scsi*.inquiry.vpd", "status 0 residual 0", "status 0 residual *",
               "QEMU fills short answers up to the length that was allowed"),
    Difference("scsi*.mode.sense.2a", "status 0 residual 0", "status 0 residual *", "likewise"),
    Difference("scsi*.request.sense", "check condition, * 6/29/00", "status 0 residual 0",
               "REQUEST SENSE hands over a unit attention as its data (SPC-3, 6.27); QEMU fails the command"),
    Difference("scsi*.request.sense.data", "00 0/00", "70 6/29", "likewise"),
    Difference("scsi*.toc.data", "*16aa*", "*14aa*",
               "control bits of the lead-out: digital copying is not allowed"),
    Difference("scsi*.toc.msf.data", "*16aa*", "*14aa*", "likewise"),
    Difference("scsi*.toc.sessions.data", "000a01010000000000000000", "000a01010014010000000000",
               "the first track of the last session is described, as MMC has it; QEMU has zeroes"),
    Difference("scsi*.event.status.data", "0004 *", "0006 *",
               "the length counts what follows it, as MMC has it; QEMU leaves out the rest of the header"),
    Difference("scsi*.read.more.room", "status 0 residual 4294963200 *", "status 0 residual 4096 *",
               "one block was asked for: QEMU fills the whole buffer and counts it as less than nothing"),
    Difference("scsi*.write", "response 1", "check condition, * 5/20/00",
               "a CD-ROM knows no WRITE; QEMU first misses its data"),
)  # fmt: skip


def compare(qemu: Mapping[str, str], vmrun: Mapping[str, str]) -> list[str]:
    """One line for each difference that the table does not allow, and for each that it allows in vain."""
    complaints = []
    used: set[Difference] = set()
    for name in dict.fromkeys((*qemu, *vmrun)):
        theirs, ours = qemu.get(name), vmrun.get(name)
        if theirs == ours:
            continue
        allowed = [
            difference
            for difference in DIFFERENCES
            if fnmatchcase(name, difference.name)
            and _matches(theirs, difference.qemu)
            and _matches(ours, difference.vmrun)
        ]
        used.update(allowed)
        if not allowed:
            complaints.append(f"{name}: QEMU {theirs!r}, vmrun {ours!r}")
    groups = {difference.name for difference in used}
    for difference in DIFFERENCES:
        if difference.name not in groups and any(fnmatchcase(name, difference.name) for name in qemu):
            complaints.append(f"{difference.name}: does not differ any more ({difference.reason})")
    return complaints


def _matches(value: str | None, pattern: str | None) -> bool:
    return value is None if pattern is None else value is not None and fnmatchcase(value, pattern)
