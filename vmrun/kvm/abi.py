"""KVM's kernel ABI on x86-64: structs in C order, constants and ioctl numbers, all under the kernel's names.

Source: include/uapi/linux/kvm.h and arch/x86/include/uapi/asm/kvm.h (Linux 6.1). Nothing here is computed
beyond the ioctl encoding of asm-generic/ioctl.h; a test compares every size, offset and number with the
installed headers. ctypes' native layout is the kernel's, as these structs are padded explicitly. Mind that
ctypes integer fields wrap silently: a value that comes from a guest is checked before it is stored here.
"""

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    u8 = int
    u16 = int
    u32 = int
    u64 = int
    s32 = int
    bytes_ = ctypes.Array[ctypes.c_uint8]
    words = ctypes.Array[ctypes.c_uint16]
    longs = ctypes.Array[ctypes.c_uint32]
    quads = ctypes.Array[ctypes.c_uint64]
else:
    u8, u16, u32, u64 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64
    s32 = ctypes.c_int32

_Struct = TypeVar("_Struct", bound=ctypes.Structure)


def abi(size: int, **arrays: int) -> Callable[[type[_Struct]], type[_Struct]]:
    """Make `_fields_` of a class's annotations and check that it is `size` bytes, as in C.

    `arrays` gives the length of each array field, whose annotation names its element (`quads`) for the type
    checker.
    """
    elements = {
        "bytes_": ctypes.c_uint8,
        "words": ctypes.c_uint16,
        "longs": ctypes.c_uint32,
        "quads": ctypes.c_uint64,
    }

    def decorate(struct: type[_Struct]) -> type[_Struct]:
        struct._fields_ = [
            (name, elements[kind] * arrays[name] if name in arrays else kind)
            for name, kind in struct.__annotations__.items()
        ]
        if ctypes.sizeof(struct) != size:
            raise TypeError(f"{struct.__name__} is {ctypes.sizeof(struct)} bytes, the kernel's is {size}")
        return struct

    return decorate


@abi(32)
class kvm_userspace_memory_region(ctypes.Structure):
    __slots__ = ()
    slot: u32
    flags: u32
    guest_phys_addr: u64
    memory_size: u64
    userspace_addr: u64


@abi(24, pad=5)
class kvm_translation(ctypes.Structure):
    __slots__ = ()
    linear_address: u64
    physical_address: u64
    valid: u8
    writeable: u8
    usermode: u8
    pad: "bytes_"


@abi(144)
class kvm_regs(ctypes.Structure):
    __slots__ = ()
    rax: u64
    rbx: u64
    rcx: u64
    rdx: u64
    rsi: u64
    rdi: u64
    rsp: u64
    rbp: u64
    r8: u64
    r9: u64
    r10: u64
    r11: u64
    r12: u64
    r13: u64
    r14: u64
    r15: u64
    rip: u64
    rflags: u64


@abi(24)
class kvm_segment(ctypes.Structure):
    __slots__ = ()
    base: u64
    limit: u32
    selector: u16
    type: u8
    present: u8
    dpl: u8
    db: u8
    s: u8
    l: u8
    g: u8
    avl: u8
    unusable: u8
    padding: u8


@abi(16, padding=3)
class kvm_dtable(ctypes.Structure):
    __slots__ = ()
    base: u64
    limit: u16
    padding: "words"


@abi(312, interrupt_bitmap=4)
class kvm_sregs(ctypes.Structure):
    __slots__ = ()
    cs: kvm_segment
    ds: kvm_segment
    es: kvm_segment
    fs: kvm_segment
    gs: kvm_segment
    ss: kvm_segment
    tr: kvm_segment
    ldt: kvm_segment
    gdt: kvm_dtable
    idt: kvm_dtable
    cr0: u64
    cr2: u64
    cr3: u64
    cr4: u64
    cr8: u64
    efer: u64
    apic_base: u64
    interrupt_bitmap: "quads"


@abi(320, pdptrs=4)
class kvm_sregs2(ctypes.Structure):
    __slots__ = ()
    cs: kvm_segment
    ds: kvm_segment
    es: kvm_segment
    fs: kvm_segment
    gs: kvm_segment
    ss: kvm_segment
    tr: kvm_segment
    ldt: kvm_segment
    gdt: kvm_dtable
    idt: kvm_dtable
    cr0: u64
    cr2: u64
    cr3: u64
    cr4: u64
    cr8: u64
    efer: u64
    apic_base: u64
    flags: u64
    pdptrs: "quads"


@abi(4096, region=1024)
class kvm_xsave(ctypes.Structure):
    """The XSAVE area in standard format: 512 bytes of FXSAVE image, 64 of header, then the host's layout."""

    __slots__ = ()
    region: "longs"


@abi(16)
class kvm_xcr(ctypes.Structure):
    __slots__ = ()
    xcr: u32
    reserved: u32
    value: u64


@abi(392, xcrs=32, padding=16)
class kvm_xcrs(ctypes.Structure):
    """`xcrs` is the kernel's array of 16 `kvm_xcr`, spelled as 32 numbers: register number, value, and so
    on.
    """

    __slots__ = ()
    nr_xcrs: u32
    flags: u32
    xcrs: "quads"
    padding: "quads"


@abi(16)
class kvm_msr_entry(ctypes.Structure):
    __slots__ = ()
    index: u32
    reserved: u32
    data: u64


@abi(8)
class kvm_msrs(ctypes.Structure):
    """The header; `nmsrs` times `kvm_msr_entry` follow it."""

    __slots__ = ()
    nmsrs: u32
    pad: u32


@abi(4)
class kvm_msr_list(ctypes.Structure):
    """The header; `nmsrs` times u32 follow it."""

    __slots__ = ()
    nmsrs: u32


@abi(24)
class kvm_msr_filter_range(ctypes.Structure):
    __slots__ = ()
    flags: u32
    nmsrs: u32
    base: u32
    _pad: u32
    bitmap: u64  # a pointer


@abi(392, ranges=48)
class kvm_msr_filter(ctypes.Structure):
    """`ranges` is the kernel's array of 16 `kvm_msr_filter_range`, spelled as numbers: copy one in with
    memmove.
    """

    __slots__ = ()
    flags: u32
    _pad: u32
    ranges: "quads"


@abi(40, padding=3)
class kvm_cpuid_entry2(ctypes.Structure):
    __slots__ = ()
    function: u32
    index: u32
    flags: u32
    eax: u32
    ebx: u32
    ecx: u32
    edx: u32
    padding: "longs"


@abi(8)
class kvm_cpuid2(ctypes.Structure):
    """The header; `nent` times `kvm_cpuid_entry2` follow it."""

    __slots__ = ()
    nent: u32
    padding: u32


@abi(1024, regs=1024)
class kvm_lapic_state(ctypes.Structure):
    __slots__ = ()
    regs: "bytes_"


@abi(4)
class kvm_mp_state(ctypes.Structure):
    __slots__ = ()
    mp_state: u32


@abi(128, db=4, reserved=9)
class kvm_debugregs(ctypes.Structure):
    __slots__ = ()
    db: "quads"
    dr6: u64
    dr7: u64
    flags: u64
    reserved: "quads"


@abi(72, debugreg=8)
class kvm_guest_debug(ctypes.Structure):
    __slots__ = ()
    control: u32
    pad: u32
    debugreg: "quads"  # struct kvm_guest_debug_arch


@abi(8)
class kvm_vcpu_events_exception(ctypes.Structure):
    __slots__ = ()
    injected: u8
    nr: u8
    has_error_code: u8
    pending: u8
    error_code: u32


@abi(4)
class kvm_vcpu_events_interrupt(ctypes.Structure):
    __slots__ = ()
    injected: u8
    nr: u8
    soft: u8
    shadow: u8


@abi(4)
class kvm_vcpu_events_nmi(ctypes.Structure):
    __slots__ = ()
    injected: u8
    pending: u8
    masked: u8
    pad: u8


@abi(4)
class kvm_vcpu_events_smi(ctypes.Structure):
    __slots__ = ()
    smm: u8
    pending: u8
    smm_inside_nmi: u8
    latched_init: u8


@abi(64, reserved=26)
class kvm_vcpu_events(ctypes.Structure):
    __slots__ = ()
    exception: kvm_vcpu_events_exception
    interrupt: kvm_vcpu_events_interrupt
    nmi: kvm_vcpu_events_nmi
    sipi_vector: u32
    flags: u32
    smi: kvm_vcpu_events_smi
    triple_fault_pending: u8
    reserved: "bytes_"
    exception_has_payload: u8
    exception_payload: u64


@abi(8)
class kvm_irq_level(ctypes.Structure):
    __slots__ = ()
    irq: u32
    level: u32


@abi(520, chip=512)
class kvm_irqchip(ctypes.Structure):
    """`chip` is a union: kvm_pic_state (16 bytes) or kvm_ioapic_state (216), by `chip_id`."""

    __slots__ = ()
    chip_id: u32
    pad: u32
    chip: "bytes_"


@abi(64, pad=15)
class kvm_pit_config(ctypes.Structure):
    __slots__ = ()
    flags: u32
    pad: "longs"


@abi(112, channels=72, reserved=9)
class kvm_pit_state2(ctypes.Structure):
    """`channels` is the kernel's array of three `kvm_pit_channel_state`, kept as bytes: saved and restored,
    not read.
    """

    __slots__ = ()
    channels: "bytes_"
    flags: u32
    reserved: "longs"


@abi(48, pad=4)
class kvm_clock_data(ctypes.Structure):
    __slots__ = ()
    clock: u64
    flags: u32
    pad0: u32
    realtime: u64
    host_tsc: u64
    pad: "longs"


@abi(24)
class kvm_device_attr(ctypes.Structure):
    __slots__ = ()
    flags: u32
    group: u32
    attr: u64
    addr: u64  # a pointer


@abi(64, pad=36)
class kvm_ioeventfd(ctypes.Structure):
    __slots__ = ()
    datamatch: u64
    addr: u64
    len: u32
    fd: s32
    flags: u32
    pad: "bytes_"


@abi(32, pad=16)
class kvm_irqfd(ctypes.Structure):
    __slots__ = ()
    fd: u32
    gsi: u32
    flags: u32
    resamplefd: u32
    pad: "bytes_"


@abi(48, u=8)
class kvm_irq_routing_entry(ctypes.Structure):
    """`u` is a union. irqchip: irqchip, pin. msi: address_lo, address_hi, data, devid."""

    __slots__ = ()
    gsi: u32
    type: u32
    flags: u32
    pad: u32
    u: "longs"


@abi(8)
class kvm_irq_routing(ctypes.Structure):
    """The header; `nr` times `kvm_irq_routing_entry` follow it."""

    __slots__ = ()
    nr: u32
    flags: u32


@abi(104, args=4, pad=64)
class kvm_enable_cap(ctypes.Structure):
    __slots__ = ()
    cap: u32
    flags: u32
    args: "quads"
    pad: "bytes_"


@abi(32, padding1=6)
class kvm_run(ctypes.Structure):
    """The header of the page shared with KVM; the union of exits follows at KVM_RUN_EXIT."""

    __slots__ = ()
    request_interrupt_window: u8
    immediate_exit: u8
    padding1: "bytes_"
    exit_reason: u32
    ready_for_interrupt_injection: u8
    if_flag: u8
    flags: u16
    cr8: u64
    apic_base: u64


KVM_RUN_EXIT = 32  # offset of the exit union in struct kvm_run
KVM_RUN_VALID_REGS = 288  # offset of kvm_valid_regs
KVM_RUN_DIRTY_REGS = 296
KVM_RUN_SYNC_REGS = 304  # offset of struct kvm_sync_regs: kvm_regs, kvm_sregs, kvm_vcpu_events


@abi(16)
class kvm_run_io(ctypes.Structure):
    __slots__ = ()
    direction: u8
    size: u8
    port: u16
    count: u32
    data_offset: u64


@abi(24, data=8)
class kvm_run_mmio(ctypes.Structure):
    __slots__ = ()
    phys_addr: u64
    data: "bytes_"
    len: u32
    is_write: u8


@abi(136, data=16)
class kvm_run_internal(ctypes.Structure):
    __slots__ = ()
    suberror: u32
    ndata: u32
    data: "quads"


@abi(32, insn_bytes=15)
class kvm_run_emulation_failure(ctypes.Structure):
    __slots__ = ()
    suberror: u32
    ndata: u32
    flags: u64
    insn_size: u8
    insn_bytes: "bytes_"


@abi(32)
class kvm_run_debug(ctypes.Structure):
    """struct kvm_debug_exit_arch."""

    __slots__ = ()
    exception: u32
    pad: u32
    pc: u64
    dr6: u64
    dr7: u64


@abi(24, pad=7)
class kvm_run_msr(ctypes.Structure):
    __slots__ = ()
    error: u8
    pad: "bytes_"
    reason: u32
    index: u32
    data: u64


@abi(16)
class kvm_run_fail_entry(ctypes.Structure):
    __slots__ = ()
    hardware_entry_failure_reason: u64
    cpu: u32


@abi(136, data=16)
class kvm_run_system_event(ctypes.Structure):
    __slots__ = ()
    type: u32
    ndata: u32
    data: "quads"


@abi(520)
class kvm_sync_regs(ctypes.Structure):
    __slots__ = ()
    regs: kvm_regs
    sregs: kvm_sregs
    events: kvm_vcpu_events


KVMIO = 0xAE
_WRITE, _READ = 1, 2


def _IO(nr: int) -> int:
    return KVMIO << 8 | nr


def _IOW(nr: int, size: int) -> int:
    return _WRITE << 30 | size << 16 | KVMIO << 8 | nr


def _IOR(nr: int, size: int) -> int:
    return _READ << 30 | size << 16 | KVMIO << 8 | nr


def _IOWR(nr: int, size: int) -> int:
    return (_READ | _WRITE) << 30 | size << 16 | KVMIO << 8 | nr


_size = ctypes.sizeof

KVM_GET_API_VERSION = _IO(0x00)
KVM_CREATE_VM = _IO(0x01)
KVM_GET_MSR_INDEX_LIST = _IOWR(0x02, _size(kvm_msr_list))
KVM_CHECK_EXTENSION = _IO(0x03)
KVM_GET_VCPU_MMAP_SIZE = _IO(0x04)
KVM_GET_SUPPORTED_CPUID = _IOWR(0x05, _size(kvm_cpuid2))
KVM_CREATE_VCPU = _IO(0x41)
KVM_SET_USER_MEMORY_REGION = _IOW(0x46, _size(kvm_userspace_memory_region))
KVM_SET_TSS_ADDR = _IO(0x47)
KVM_SET_IDENTITY_MAP_ADDR = _IOW(0x48, 8)
KVM_CREATE_IRQCHIP = _IO(0x60)
KVM_IRQ_LINE = _IOW(0x61, _size(kvm_irq_level))
KVM_GET_IRQCHIP = _IOWR(0x62, _size(kvm_irqchip))
KVM_SET_IRQCHIP = _IOR(0x63, _size(kvm_irqchip))
KVM_SET_GSI_ROUTING = _IOW(0x6A, _size(kvm_irq_routing))
KVM_IRQFD = _IOW(0x76, _size(kvm_irqfd))
KVM_CREATE_PIT2 = _IOW(0x77, _size(kvm_pit_config))
KVM_IOEVENTFD = _IOW(0x79, _size(kvm_ioeventfd))
KVM_SET_CLOCK = _IOW(0x7B, _size(kvm_clock_data))
KVM_GET_CLOCK = _IOR(0x7C, _size(kvm_clock_data))
KVM_RUN = _IO(0x80)
KVM_GET_REGS = _IOR(0x81, _size(kvm_regs))
KVM_SET_REGS = _IOW(0x82, _size(kvm_regs))
KVM_GET_SREGS = _IOR(0x83, _size(kvm_sregs))
KVM_SET_SREGS = _IOW(0x84, _size(kvm_sregs))
KVM_TRANSLATE = _IOWR(0x85, _size(kvm_translation))
KVM_GET_MSRS = _IOWR(0x88, _size(kvm_msrs))
KVM_SET_MSRS = _IOW(0x89, _size(kvm_msrs))
KVM_GET_CPUID2 = _IOWR(0x91, _size(kvm_cpuid2))
KVM_GET_LAPIC = _IOR(0x8E, _size(kvm_lapic_state))
KVM_SET_LAPIC = _IOW(0x8F, _size(kvm_lapic_state))
KVM_SET_CPUID2 = _IOW(0x90, _size(kvm_cpuid2))
KVM_GET_MP_STATE = _IOR(0x98, _size(kvm_mp_state))
KVM_SET_MP_STATE = _IOW(0x99, _size(kvm_mp_state))
KVM_SET_GUEST_DEBUG = _IOW(0x9B, _size(kvm_guest_debug))
KVM_GET_PIT2 = _IOR(0x9F, _size(kvm_pit_state2))
KVM_SET_PIT2 = _IOW(0xA0, _size(kvm_pit_state2))
KVM_SET_TSC_KHZ = _IO(0xA2)
KVM_GET_TSC_KHZ = _IO(0xA3)
KVM_GET_VCPU_EVENTS = _IOR(0x9F, _size(kvm_vcpu_events))
KVM_SET_VCPU_EVENTS = _IOW(0xA0, _size(kvm_vcpu_events))
KVM_ENABLE_CAP = _IOW(0xA3, _size(kvm_enable_cap))
KVM_GET_DEBUGREGS = _IOR(0xA1, _size(kvm_debugregs))
KVM_SET_DEBUGREGS = _IOW(0xA2, _size(kvm_debugregs))
KVM_GET_XSAVE = _IOR(0xA4, _size(kvm_xsave))
KVM_SET_XSAVE = _IOW(0xA5, _size(kvm_xsave))
KVM_GET_XCRS = _IOR(0xA6, _size(kvm_xcrs))
KVM_SET_XCRS = _IOW(0xA7, _size(kvm_xcrs))
KVM_KVMCLOCK_CTRL = _IO(0xAD)
KVM_X86_SET_MSR_FILTER = _IOW(0xC6, _size(kvm_msr_filter))
KVM_GET_SREGS2 = _IOR(0xCC, _size(kvm_sregs2))
KVM_SET_SREGS2 = _IOW(0xCD, _size(kvm_sregs2))
KVM_GET_XSAVE2 = _IOR(0xCF, _size(kvm_xsave))
KVM_SET_DEVICE_ATTR = _IOW(0xE1, _size(kvm_device_attr))
KVM_GET_DEVICE_ATTR = _IOW(0xE2, _size(kvm_device_attr))
KVM_HAS_DEVICE_ATTR = _IOW(0xE3, _size(kvm_device_attr))

KVM_API_VERSION = 12

KVM_CAP_IRQCHIP = 0
KVM_CAP_USER_MEMORY = 3
KVM_CAP_NR_VCPUS = 9
KVM_CAP_NR_MEMSLOTS = 10
KVM_CAP_IRQFD = 32
KVM_CAP_PIT2 = 33
KVM_CAP_IOEVENTFD = 36
KVM_CAP_TSC_CONTROL = 60
KVM_CAP_MAX_VCPUS = 66
KVM_CAP_TSC_DEADLINE_TIMER = 72
KVM_CAP_SYNC_REGS = 74
KVM_CAP_IMMEDIATE_EXIT = 136
KVM_CAP_X86_USER_SPACE_MSR = 188
KVM_CAP_X86_MSR_FILTER = 189
KVM_CAP_EXIT_ON_EMULATION_FAILURE = 204
KVM_CAP_XSAVE2 = 208

KVM_EXIT_UNKNOWN = 0
KVM_EXIT_EXCEPTION = 1
KVM_EXIT_IO = 2
KVM_EXIT_HYPERCALL = 3
KVM_EXIT_DEBUG = 4
KVM_EXIT_HLT = 5
KVM_EXIT_MMIO = 6
KVM_EXIT_IRQ_WINDOW_OPEN = 7
KVM_EXIT_SHUTDOWN = 8
KVM_EXIT_FAIL_ENTRY = 9
KVM_EXIT_INTR = 10
KVM_EXIT_INTERNAL_ERROR = 17
KVM_EXIT_SYSTEM_EVENT = 24
KVM_EXIT_X86_RDMSR = 29
KVM_EXIT_X86_WRMSR = 30

KVM_EXIT_IO_IN = 0
KVM_EXIT_IO_OUT = 1

KVM_INTERNAL_ERROR_EMULATION = 1
KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES = 1

KVM_SYSTEM_EVENT_SHUTDOWN = 1
KVM_SYSTEM_EVENT_RESET = 2
KVM_SYSTEM_EVENT_CRASH = 3

KVM_MEM_READONLY = 1 << 1

KVM_IRQCHIP_PIC_MASTER = 0
KVM_IRQCHIP_PIC_SLAVE = 1
KVM_IRQCHIP_IOAPIC = 2
KVM_IRQ_ROUTING_IRQCHIP = 1
KVM_IRQ_ROUTING_MSI = 2
KVM_IRQFD_FLAG_DEASSIGN = 1 << 0
KVM_IOEVENTFD_FLAG_DATAMATCH = 1 << 0
KVM_IOEVENTFD_FLAG_PIO = 1 << 1
KVM_IOEVENTFD_FLAG_DEASSIGN = 1 << 2
KVM_PIT_SPEAKER_DUMMY = 1

KVM_GUESTDBG_ENABLE = 0x00000001
KVM_GUESTDBG_SINGLESTEP = 0x00000002
KVM_GUESTDBG_USE_SW_BP = 0x00010000
KVM_GUESTDBG_USE_HW_BP = 0x00020000

KVM_MP_STATE_RUNNABLE = 0
KVM_MP_STATE_UNINITIALIZED = 1
KVM_MP_STATE_INIT_RECEIVED = 2
KVM_MP_STATE_HALTED = 3

KVM_SYNC_X86_REGS = 1 << 0
KVM_SYNC_X86_SREGS = 1 << 1
KVM_SYNC_X86_EVENTS = 1 << 2

KVM_MSR_EXIT_REASON_INVAL = 1 << 0
KVM_MSR_EXIT_REASON_UNKNOWN = 1 << 1
KVM_MSR_EXIT_REASON_FILTER = 1 << 2
KVM_MSR_FILTER_READ = 1 << 0
KVM_MSR_FILTER_WRITE = 1 << 1

KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1 << 0
KVM_CLOCK_TSC_STABLE = 1 << 1
KVM_CLOCK_REALTIME = 1 << 2
KVM_CLOCK_HOST_TSC = 1 << 3
KVM_VCPU_TSC_CTRL = 0
KVM_VCPU_TSC_OFFSET = 0
KVM_VCPUEVENT_VALID_SHADOW = 1 << 2
