"""One machine, from its configuration to its end: the room where everything is put together. VMM process,
main thread.

`Machine` opens what must be opened (disks, taps, /dev/kvm), starts a worker for each disk and card, plugs the
board, and loads the kernel; `run` lets it live until the guest, the user or a failure ends it. Everything
opened is on one ExitStack and goes in reverse order, whatever happens.
"""

import signal
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from types import FrameType

from devices.pci.bus import PciBus
from devices.platform.acpi_pm import AcpiPm
from devices.platform.cmos import Cmos
from devices.platform.debug_exit import DebugExit
from devices.platform.i8042 import I8042
from devices.platform.post import PostCodes
from devices.platform.pvpanic import PvPanic
from devices.platform.uart import Uart
from devices.vhost.frontend import VhostUserDevice
from devices.vhost.messages import ProtocolError
from devices.virtio.device import VIRTIO_ID_BLOCK, VIRTIO_ID_NET
from devices.virtio.transport import VirtioPciFunction
from devices.worker.launcher import Worker, launch
from vmrun.boot.loader import load
from vmrun.errors import EXIT_IMAGE, EXIT_NO_KVM, EXIT_PANIC, EXIT_TIMEOUT, EXIT_VMM, UserError
from vmrun.host.check import kvm_flavour
from vmrun.host.disks import Disks
from vmrun.host.tap import Tap, random_mac
from vmrun.kvm import System, Vm, abi
from vmrun.kvm.software import SoftwareCpu, adjust_cpuid, prepare_vm
from vmrun.machine import layout
from vmrun.machine.board import KvmBoard
from vmrun.machine.bootplan import plan
from vmrun.machine.config import MachineConfig
from vmrun.machine.cpuid import vcpu_leaves
from vmrun.machine.loop import EventLoop
from vmrun.machine.memory import Ram
from vmrun.machine.serial import ConsoleLike, SerialLink
from vmrun.machine.vcpu import GuestHalted, VcpuThread, allow_kicks, set_boot_state, set_common_state

BLK_QUEUES = (256,)
NET_QUEUES = (256, 256)  # receive, transmit
SOFTWARE_KVM_NOTE = (
    "vmrun: this KVM has no VMX or SVM: it interprets the guest's kernel (slowly), and vmrun finishes what it "
    "leaves undone; programs run at full speed. See `vmrun doctor`"
)
STOP_SECONDS = 5.0  # how long a vCPU thread may take to leave the guest
DEAD_WORKER_SECONDS = 2.0  # how long a broken channel may precede the news of its worker's death


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a machine ended: vmrun's exit code, and why in one line."""

    code: int
    reason: str


def run(config: MachineConfig, *, console: ConsoleLike, timeout: float | None = None) -> Outcome:
    """Build the machine, run it to its end, and leave nothing behind. Raises UserError and OSError.

    Ends after `timeout` seconds at the latest, counted from the guest's first instruction.
    """
    with ExitStack() as stack:
        return Machine(config, console, stack).run(timeout)


class Machine:
    """Everything one machine is made of. What must be closed is on `stack`, which the caller closes after
    `run`.
    """

    def __init__(self, config: MachineConfig, console: ConsoleLike, stack: ExitStack) -> None:
        self.config = config
        self.outcome: Outcome | None = None
        self._software_kvm = kvm_flavour() == "pvm"
        boot = plan(config, software_kvm=self._software_kvm)
        disks = stack.enter_context(Disks(config.disks))
        taps = [stack.enter_context(Tap(nic.tap, nic.address)) for nic in config.nics]

        # Workers take a while to start: they do it while we build the rest.
        workers = []
        for index, disk in enumerate(disks):
            words = {"format": disk.config.format, "read_only": str(int(disk.config.read_only))}
            if disk.config.serial:
                words["serial"] = disk.config.serial
            workers.append(stack.enter_context(launch("blk", f"blk{index}", words, {"image": disk.fd})))
        for index, (nic, tap) in enumerate(zip(config.nics, taps, strict=True)):
            mac = nic.mac or random_mac()
            workers.append(
                stack.enter_context(launch("net", f"net{index}", {"mac": mac.hex(":")}, {"tap": tap.fd}))
            )

        self.ram = stack.enter_context(Ram(config.memory))
        state = load(self.ram.memory, boot.kernel, initrd=boot.initrd, cmdline=boot.cmdline, cpus=config.cpus)
        self.loop = EventLoop()
        stack.callback(self.loop.close)
        kvm = stack.enter_context(_open_kvm())
        vm = stack.enter_context(self._create_vm(kvm))
        supported = kvm.supported_cpuid()
        self.board = KvmBoard(vm, self.loop, _physical_address_bits(supported))
        self.pci = PciBus(
            self.board,
            self.board.pio,
            self.board.mmio,
            mmio_window=(layout.PCI_MMIO_START, layout.PCI_MMIO_END),
            pio_window=(layout.PCI_PIO_START, layout.PCI_PIO_END),
            ecam_base=layout.PCI_ECAM_START,
        )
        stack.callback(self.pci.close)
        self._plug_platform(console)
        for worker in workers:
            self._plug_worker(worker)
        self.vcpus = [self._create_vcpu(vm, supported, index, stack) for index in range(config.cpus)]
        set_boot_state(self.vcpus[0].vcpu, state)

    def _create_vm(self, kvm: System) -> Vm:
        vm = kvm.create_vm()
        try:
            vm.set_identity_map_address(layout.KVM_IDENTITY_MAP)
            vm.set_tss_address(layout.KVM_TSS)
            if self._software_kvm:
                prepare_vm(vm)
            vm.create_irqchip()
            vm.create_pit()
            self.ram.plug_into(vm)
        except BaseException:
            vm.close()
            raise
        return vm

    def _plug_platform(self, console: ConsoleLike) -> None:
        """The devices that are on every board, at the addresses that `layout` and the ACPI tables give
        them.
        """
        board, pio = self.board, self.board.pio
        self.serial = SerialLink(self.loop, console, lambda: self.end(0, "stopped from the console"))
        self.uart = Uart(board.irq_line(layout.SERIAL_IRQ), console.write, self.serial.room_in_uart)
        pio.insert(layout.SERIAL_PORT, 8, self.uart)
        self.serial.start(self.uart)
        low = min(self.config.memory, layout.PCI_HOLE_START)
        pio.insert(layout.CMOS_PORT, 2, Cmos(low, self.config.memory - low))
        keyboard = I8042(board.irq_line(1), self._guest_reset)
        pio.insert(layout.I8042_PORT, 1, keyboard.data)
        pio.insert(layout.I8042_PORT + 4, 1, keyboard.command)
        self.acpi_pm = AcpiPm(board.irq_line(layout.ACPI_SCI_IRQ), self._guest_power_off, self._guest_reset)
        pio.insert(layout.ACPI_PM_PORT, 13, self.acpi_pm)
        self.post_codes = PostCodes()
        pio.insert(layout.BOOT_MARK_PORT, 1, self.post_codes)
        debug_exit = DebugExit(
            lambda value: self.end(value & 0xFF, f"the guest wrote {value} to its debug exit")
        )
        pio.insert(layout.DEBUG_EXIT_PORT, 1, debug_exit)
        self.pci.plug(PvPanic(lambda: self.end(EXIT_PANIC, "the guest's kernel panicked")))

    def _plug_worker(self, worker: Worker) -> None:
        """Shake hands with `worker` and plug the device that it serves. UserError when its disk image is to
        blame.
        """
        is_disk = worker.name.startswith("blk")
        try:
            device = VhostUserDevice(
                worker.channel,
                name=worker.name,
                device_id=VIRTIO_ID_BLOCK if is_disk else VIRTIO_ID_NET,
                queue_sizes=BLK_QUEUES if is_disk else NET_QUEUES,
                memory=self.ram.memory,
                board=self.board,
                on_failure=lambda text: self._channel_failed(worker, text),
            )
        except ProtocolError as error:
            if not worker.wait(DEAD_WORKER_SECONDS):
                raise UserError(f"worker {worker.name} does not answer: {error}", EXIT_VMM) from None
            raise UserError(*self._worker_end(worker)) from None
        self.pci.plug(VirtioPciFunction(device, self.board, name=worker.name))
        self.loop.watch(worker.pidfd, lambda: self._worker_ended(worker))

    def _create_vcpu(
        self, vm: Vm, supported: list[abi.kvm_cpuid_entry2], index: int, stack: ExitStack
    ) -> VcpuThread:
        vcpu = stack.enter_context(vm.create_vcpu(index))
        leaves = vcpu_leaves(supported, index, self.config.cpus)
        helper = None
        if self._software_kvm:
            adjust_cpuid(leaves)
            helper = SoftwareCpu(vcpu, self.ram.memory.find, leaves)
        vcpu.set_cpuid(leaves)
        set_common_state(vcpu)
        return VcpuThread(index, vcpu, self.board.pio, self.board.mmio, helper, self._vcpu_ended)

    def run(self, timeout: float | None = None) -> Outcome:
        """Let the machine live; returns when it has ended and no vCPU runs any more."""
        if self._software_kvm:
            print(SOFTWARE_KVM_NOTE, file=sys.stderr)
        allow_kicks()
        before = {
            number: signal.signal(number, self._signalled) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            if timeout is not None:
                self.loop.call_later(
                    timeout, lambda: self.end(EXIT_TIMEOUT, f"timed out after {timeout:g} s")
                )
            for thread in self.vcpus:
                thread.start()
            self.loop.run()
        finally:
            self._stop_vcpus()
            for number, handler in before.items():
                signal.signal(number, handler)
        return self.outcome or Outcome(EXIT_VMM, "the main loop ended for no reason")

    def _stop_vcpus(self) -> None:
        for thread in self.vcpus:
            thread.stop()
        for thread in self.vcpus:
            if not thread.join(STOP_SECONDS):
                raise OSError(f"vCPU thread {thread.index} does not stop")

    def end(self, code: int, reason: str) -> None:
        """End the machine; the first reason given stands. Any thread, and signal handlers."""
        if self.outcome is None:
            self.outcome = Outcome(code, reason)
        self.loop.stop()

    def _guest_power_off(self) -> None:
        self.end(0, "the guest powered off")

    def _guest_reset(self) -> None:
        self.end(0, "the guest reset the machine")

    def _vcpu_ended(self, index: int, error: BaseException | None) -> None:
        if isinstance(error, GuestHalted):
            self.end(EXIT_PANIC, str(error))
        elif error is not None:
            self.end(EXIT_VMM, str(error) or f"vCPU {index}: {type(error).__name__}")

    def _worker_end(self, worker: Worker) -> tuple[str, int]:
        # A worker that finds its image at fault exits with the very code that vmrun reserves for that.
        return worker.describe_exit(), EXIT_IMAGE if worker.exit_code == EXIT_IMAGE else EXIT_VMM

    def _worker_ended(self, worker: Worker) -> None:
        self.loop.unwatch(worker.pidfd)
        worker.poll()
        reason, code = self._worker_end(worker)
        self.end(code, reason)

    def _channel_failed(self, worker: Worker, text: str) -> None:
        """A channel breaks before its worker's death is known: the death says more, if it comes."""

        def wait_for_death() -> None:
            self.loop.call_later(DEAD_WORKER_SECONDS, lambda: self.end(EXIT_VMM, text))

        self.loop.call_soon(wait_for_death)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        self.end(128 + number, f"stopped by {signal.Signals(number).name}")


def _open_kvm() -> System:
    try:
        return System()
    except FileNotFoundError:
        advice = "no /dev/kvm here: load the kvm module, or see `vmrun doctor`"
    except PermissionError:
        advice = (
            "/dev/kvm may not be opened: join the group that owns it (usually kvm), or see `vmrun doctor`"
        )
    except OSError as error:
        advice = f"/dev/kvm cannot be used: {error.strerror}; see `vmrun doctor`"
    raise UserError(advice, EXIT_NO_KVM)


def _physical_address_bits(leaves: list[abi.kvm_cpuid_entry2]) -> int:
    return next((leaf.eax & 0xFF for leaf in leaves if leaf.function == 0x80000008), 36)
