"""One machine, from its configuration to its end: the room where everything is put together. VMM process,
main thread.

`Machine` opens what must be opened (disks, taps, /dev/kvm), starts a worker for each disk and card, plugs the
board, and loads the kernel; `run` lets it live until the guest, the user or a failure ends it. Everything
opened is on one ExitStack and goes in reverse order, whatever happens.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

from devices.errors import ImageError
from devices.pci.bus import PciBus
from devices.platform import debug_console, fw_cfg
from devices.platform.acpi_pm import AcpiPm
from devices.platform.cmos import Cmos
from devices.platform.debug_console import DebugConsole
from devices.platform.debug_exit import DebugExit
from devices.platform.i8042 import I8042
from devices.platform.post import PostCodes
from devices.platform.pvpanic import PvPanic
from devices.platform.uart import Uart
from devices.vhost.messages import ProtocolError
from devices.virtio.device import VIRTIO_ID_NET, VirtioDevice
from devices.virtio.rng import VirtioRng
from devices.virtio.transport import VirtioPciFunction, virtio_identity
from devices.virtio.vmmci import IDENTITY as VMMCI_IDENTITY
from vmrun.errors import EXIT_IMAGE, EXIT_NO_KVM, EXIT_PANIC, EXIT_TIMEOUT, EXIT_VMM, UserError
from vmrun.host.check import kvm_flavour
from vmrun.host.disks import Disks, MachineDisk, OpenDisk
from vmrun.host.nics import Nics
from vmrun.kvm import System, Vm, abi
from vmrun.kvm.software import SoftwareCpu, adjust_cpuid, prepare_vm
from vmrun.machine import layout
from vmrun.machine.board import KvmBoard
from vmrun.machine.clock_jump import ClockJump
from vmrun.machine.config import DiskConfig, MachineConfig, VhostUserDisk
from vmrun.machine.cpuid import vcpu_leaves
from vmrun.machine.loop import EventLoop
from vmrun.machine.memory import Ram
from vmrun.machine.pause import RESUMED, Pause
from vmrun.machine.serial import ConsoleLike, SerialLink
from vmrun.machine.shutdown import Shutdown
from vmrun.machine.vcpu import GuestHalted, VcpuThread, allow_kicks, set_boot_state, set_common_state

if TYPE_CHECKING:
    from devices.scsi.medium import Medium
    from devices.vhost.frontend import VhostUserDevice
    from devices.virtio.console_ports import Port
    from vmrun.boot.firmware import Firmware
    from vmrun.machine.agent import GuestAgent
    from vmrun.machine.mounts import SharedDirectory
    from vmrun.machine.ports import PortListener
    from vmrun.machine.workers import SupervisedWorker
    from vmrun.snapshot.memory_file import OpenMemory
    from vmrun.snapshot.pager import LazyRam

# Devices that not every machine has are imported where they are plugged: an import at the top is paid for by
# every start.

SOFTWARE_KVM_NOTE = (
    "vmrun: this KVM has no VMX or SVM: it interprets the guest's kernel (slowly), vmrun finishes what it "
    "leaves undone; programs run at full speed. See `vmrun doctor`"
)
WATCH_SECONDS = 1.0  # of a machine's life until it is watched for having halted
# How often a restored guest's agent that does not take who it is now is told again, and after how long.
GREET_AGAIN, GREET_AGAIN_SECONDS = 3, 1.0
# What the guest's agent listens on: for so many callers at once.
AGENT_PORT = "vmrun.agent.{}"
AGENT_PORTS = 8

STOP_SECONDS = 5.0  # how long a vCPU thread may take to leave the guest


class Savable(Protocol):
    """A device whose state a snapshot has. `load` raises ValueError for what `save` cannot have said."""

    def save(self) -> dict[str, Any]: ...
    def load(self, state: dict[str, Any]) -> None: ...


class SavedMachine(Protocol):
    """What a snapshot knows of a machine; `vmrun.snapshot.restore` has it. `hold`: it stays paused. `greet`:
    its guest is told who it is now; `macs` are those it knows its cards by.
    """

    hold: bool
    greet: bool
    memory: OpenMemory

    @property
    def macs(self) -> Sequence[str]: ...

    def cpuid(self, cpu: dict[str, Any]) -> list[list[abi.kvm_cpuid_entry2]]:
        """The leaves of each vCPU. UserError when the guest cannot go on with `cpu`, the processor here."""

    def prepare(self) -> None:
        """Start what takes a while to start. In the machine's process, main thread, before `fill`."""

    def fill(self, machine: Machine, stack: ExitStack) -> LazyRam:
        """See to it that the machine's memory, which is empty, gets its contents, sooner or later. Before any
        of it is touched.
        """

    def load(self, machine: Machine) -> None:
        """Put the machine, whose devices are all there, into its state."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a machine ended: vmrun's exit code, and why in one line. `restart`: it was asked to reboot, so
    whoever started it starts it again.
    """

    code: int
    reason: str
    restart: bool = False


def run(
    config: MachineConfig,
    *,
    console: ConsoleLike,
    timeout: float | None = None,
    attend: Callable[[Machine], None] = lambda machine: None,
    saved: SavedMachine | None = None,
) -> Outcome:
    """Build the machine, run it to its end, and leave nothing behind. Raises UserError and OSError.

    Ends after `timeout` seconds at the latest, counted from the guest's first instruction. `attend` is given
    the machine before it runs. With `saved` it goes on where that one was, once it is resumed: it begins
    pausing.
    """
    with ExitStack() as stack:
        machine = Machine(config, console, stack, saved)
        attend(machine)
        return machine.run(timeout)


class Machine:
    """Everything one machine is made of. What must be closed is on `stack`, which the caller closes after
    `run`.
    """

    def __init__(
        self,
        config: MachineConfig,
        console: ConsoleLike,
        stack: ExitStack,
        saved: SavedMachine | None = None,
    ) -> None:
        self.config = config
        self.stack = stack
        self.outcome: Outcome | None = None
        self.agent_ports: list[Port] = []
        self.vcpus: list[VcpuThread] = []
        self.workers: dict[str, SupervisedWorker] = {}
        self.on_config: Callable[[MachineConfig], None] = lambda config: None
        self._on_begun: Callable[[], None] = lambda: None
        self._saved = saved
        self._termination_asked = False
        self._software_kvm = kvm_flavour() == "pvm"
        boot = None
        if saved is None and config.firmware is None:
            from vmrun.machine.bootplan import plan

            boot = plan(config, software_kvm=self._software_kvm)
        images = [disk for disk in config.disks if isinstance(disk, DiskConfig)]
        disks = self._disks = stack.enter_context(Disks(images))
        disc = _open_disc(config.cdrom, stack) if config.cdrom is not None else None
        nics = self._nics = stack.enter_context(Nics(config.nics, config.name))

        self.ram = stack.enter_context(Ram(config.memory))
        self.lazy: LazyRam | None = saved.fill(self, stack) if saved is not None else None
        # Workers take a while to start: they do it while we build the rest.
        workers = self.workers
        positions = [index for index, disk in enumerate(config.disks) if isinstance(disk, DiskConfig)]
        for index, disk in zip(positions, disks, strict=True):
            from vmrun.machine.workers import SupervisedWorker

            worker = SupervisedWorker("blk", f"blk{index}", disk.words, disk.fds, config.memory, self.lazy)
            workers[worker.name] = stack.enter_context(worker)
        for index, nic in enumerate(nics):
            from vmrun.machine.workers import SupervisedWorker

            worker = SupervisedWorker("net", f"net{index}", nic.words, nic.fds, config.memory, self.lazy)
            workers[worker.name] = stack.enter_context(worker)

        self._mounts: list[SharedDirectory] = []
        for index, mount in enumerate(config.mounts):
            from vmrun.machine.mounts import SharedDirectory

            shared = SharedDirectory(mount, f"mount{index}", self.lazy)
            self._mounts.append(stack.enter_context(shared))

        state = self._firmware = self._flash = None
        if boot is not None:
            from vmrun.boot.loader import load

            state = load(
                self.ram.memory, boot.kernel, initrd=boot.initrd, cmdline=boot.cmdline, cpus=config.cpus
            )
        elif config.firmware is not None:
            self._firmware = self._load_firmware(config.firmware)
            from vmrun.machine.flash import Flash

            self._flash = stack.enter_context(Flash(self._firmware.image))
        self.loop = EventLoop()
        stack.callback(self.loop.close)
        nics.watch(self.loop, self.end)
        kvm = stack.enter_context(_open_kvm())
        vm = stack.enter_context(self._create_vm(kvm))
        supported = kvm.supported_cpuid()
        self._kvm = kvm
        self.board = KvmBoard(vm, self.loop, _physical_address_bits(supported))
        self.pci = PciBus(
            self.board,
            self.board.pio,
            self.board.mmio,
            mmio_window=(layout.PCI_MMIO_START, layout.PCI_MMIO_HIGH_END),
            pio_window=(layout.PCI_PIO_START, layout.PCI_PIO_END),
            ecam_base=layout.PCI_ECAM_START,
        )
        stack.callback(self.pci.close)
        self._plug_platform(console)
        self._plug_workers(workers, stack)
        if disc is not None:
            from devices.virtio.scsi import ScsiDevice

            scsi = ScsiDevice(self.ram.memory, self.board, disc)
            self._plug_virtio_device(scsi, "scsi")
        self._plug_virtio()
        leaves = self._leaves(supported) if saved is None else saved.cpuid(self.cpu_identity())
        self.vcpus = [self._create_vcpu(vm, each, index, stack) for index, each in enumerate(leaves)]
        if state is not None:
            set_boot_state(self.vcpus[0].vcpu, state)
        # Otherwise the CPU stays as KVM made it: after a reset, about to fetch from the end of the flash.
        self.pause = Pause(self.loop, self.vcpus, self.pci)
        if saved is not None:
            saved.load(self)

    def _create_vm(self, kvm: System) -> Vm:
        vm = kvm.create_vm()
        try:
            vm.set_identity_map_address(layout.KVM_IDENTITY_MAP)
            vm.set_tss_address(layout.KVM_TSS)
            if self._software_kvm:
                prepare_vm(vm)
            # Memory first: once there are interrupt controllers, it waits 4 ms for an RCU grace period.
            self.ram.plug_into(vm)
            if self._flash is not None:
                self._flash.plug_into(vm, len(self.ram.memory.regions))
            vm.create_irqchip()
            vm.create_pit()
        except BaseException:
            vm.close()
            raise
        return vm

    def _load_firmware(self, path: Path) -> Firmware:
        from vmrun.boot.firmware import load

        cards = virtio_identity(VIRTIO_ID_NET)
        roms = {nic.rom for nic in self.config.nics if nic.rom is not None}
        return load(
            self.ram.memory,
            path,
            cpus=self.config.cpus,
            roms=[(cards.vendor_id, cards.device_id, rom) for rom in roms],
        )

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
        usable = low if self._firmware is None else self._firmware.ram_end
        cmos = Cmos(usable, self.config.memory - low)
        pio.insert(layout.CMOS_PORT, 2, cmos)
        if self._firmware is not None:
            pio.insert(fw_cfg.SELECT_PORT, fw_cfg.PORTS, self._firmware.config)
            if self.config.verbose:
                log = DebugConsole(lambda line: print(f"firmware: {line}", file=sys.stderr))
                pio.insert(debug_console.PORT, 1, log)
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
        self.platform: dict[str, Savable] = {
            "uart": self.uart,
            "cmos": cmos,
            "i8042": keyboard,
            "acpi_pm": self.acpi_pm,
            "post_codes": self.post_codes,
        }
        self.pci.plug(PvPanic(lambda: self.end(EXIT_PANIC, "the guest's kernel panicked")))

    def _plug_virtio(self) -> None:
        """The virtio devices that are on every board and live in this process."""
        rng = VirtioRng(self.ram.memory, self.board)
        self._plug_virtio_device(rng, "rng")
        if self.config.agent:
            from devices.virtio.console import VirtioConsole

            console = VirtioConsole(self.ram.memory, self.board, max_ports=AGENT_PORTS + 1)
            self.agent_ports = [console.add_port(AGENT_PORT.format(index)) for index in range(AGENT_PORTS)]
            self._plug_virtio_device(console, "console")
        self.shutdown = Shutdown(self.loop, self.acpi_pm, self._end_requested)
        vmmci = self.shutdown.vmmci
        self.shutdown.on_driver = ClockJump(self.loop, vmmci).update
        self.pci.plug(VirtioPciFunction(vmmci, self.board, name="vmmci", identity=VMMCI_IDENTITY))

    def _plug_workers(self, workers: dict[str, SupervisedWorker], stack: ExitStack) -> None:
        """One PCI function for each worker and each foreign back end, disks first and in their order.
        UserError when one cannot serve.
        """
        names = [f"blk{index}" for index in range(len(self.config.disks))]
        foreign = {
            name: disk.path
            for name, disk in zip(names, self.config.disks, strict=True)
            if isinstance(disk, VhostUserDisk)
        }
        self.devices: dict[str, VhostUserDevice] = {}
        for name in dict.fromkeys((*names, *workers)):
            if name in foreign:
                from vmrun.machine.workers import connect_foreign

                device = connect_foreign(
                    foreign[name], name, self.ram.memory, self.board, lambda text: self.end(EXIT_VMM, text)
                )
            else:
                device = workers[name].connect(self.ram.memory, self.board, self.loop, self.end)
                stack.callback(workers[name].quit)
            self._plug_virtio_device(device, name)
            self.devices[name] = device
        for shared in self._mounts:
            device = shared.connect(self.ram.memory, self.board, self.loop, self.end)
            stack.callback(shared.quit)
            self._plug_virtio_device(device, shared.name)
            self.devices[shared.name] = device

    def _plug_virtio_device(self, device: VirtioDevice, name: str) -> None:
        identity = virtio_identity(device.device_id) if self.config.legacy_virtio else None
        self.pci.plug(VirtioPciFunction(device, self.board, name=name, identity=identity))

    def resize_disk(self, index: int, size: int) -> None:
        """Let disk `index` have `size` bytes, more than before; its driver is told. Waits for the disk's
        worker, so from any thread but the main loop's. UserError when it cannot be.
        """
        try:
            self.devices[f"blk{index}"].resize(size)
        except ProtocolError as error:
            raise UserError(str(error), EXIT_IMAGE) from None

    def _leaves(self, supported: list[abi.kvm_cpuid_entry2]) -> list[list[abi.kvm_cpuid_entry2]]:
        """What each vCPU of a new machine tells of itself."""
        cpus = self.config.cpus
        leaves = [vcpu_leaves(supported, index, cpus) for index in range(cpus)]
        if self._software_kvm:
            for each in leaves:
                adjust_cpuid(each)
        return leaves

    def _create_vcpu(
        self, vm: Vm, leaves: list[abi.kvm_cpuid_entry2], index: int, stack: ExitStack
    ) -> VcpuThread:
        vcpu = stack.enter_context(vm.create_vcpu(index))
        helper = SoftwareCpu(vcpu, self.ram.memory.find, leaves) if self._software_kvm else None
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
            if self._saved is not None:
                self.pause.pause(self._restored)
            for thread in self.vcpus:
                thread.start()
            self.loop.run()
        finally:
            self._stop_vcpus()
            for number, handler in before.items():
                signal.signal(number, handler)
        return self.outcome or Outcome(EXIT_VMM, "the main loop ended for no reason")

    def _restored(self, error: str | None) -> None:
        """What was restored holds still. Or it runs: it was to stop, or to go on, before it did."""
        if error is not None and error != RESUMED:
            self.end(EXIT_VMM, error)
            return
        if error is None and self._saved is not None and not self._saved.hold:
            self.pause.resume()
        self._on_begun()

    def when_begun(self, callback: Callable[[], None]) -> None:
        """Have `callback` called once on the main loop, when the machine runs or, restored, is to hold still
        and does: a pause before that would be ended with the one that a restore begins with. Before `run`.
        """
        if self._saved is None:
            self.loop.call_soon(callback)
        else:
            self._on_begun = callback

    def use_agent(self, listener: PortListener) -> None:
        """`listener` leads to the agent's ports. A restored guest that has one is told who it is now, before
        anybody else is let in, unless somebody else does that. Before `run`.
        """
        guest: list[GuestAgent] = []

        def agent() -> GuestAgent:
            from vmrun.machine.agent import GuestAgent  # most machines end without

            if not guest:
                guest.append(GuestAgent(self.loop, listener.links))
            return guest[0]

        saved = self._saved
        if saved is not None and saved.greet:
            from vmrun.machine.agent import greet

            greeting = greet(list(zip(saved.macs, self.macs(), strict=True)))

            def tell(more: int) -> None:
                def told(worked: bool) -> None:
                    if worked or not more:
                        listener.admit()
                    else:
                        # All clones of it would draw the same random numbers: a busy host is no reason.
                        self.loop.call_later(GREET_AGAIN_SECONDS, lambda: tell(more - 1))

                agent().talk(greeting, told)

            listener.hold()
            # Not now: a machine that is held may not go on for hours, and no agent answers before.
            self.pause.on_resume(lambda: tell(GREET_AGAIN))

        def ask(reboot: bool, done: Callable[[bool], None]) -> bool:
            if not agent().listens:
                return False
            from vmrun.machine.agent import shut_down

            agent().talk(shut_down(reboot=reboot), done)
            return True

        self.shutdown.ask_agent = ask

    def watch_halts(self) -> None:
        """End the machine when its guest halts for good; before `run`. Not for a VMM that is confined, which
        may not ask KVM for it.
        """

        def begin() -> None:
            from vmrun.machine.halt import HaltWatch  # many have ended by now

            HaltWatch(
                self.loop, self.vcpus, self.pause, lambda: self._end_requested(0, "the guest halted")
            ).start()

        self.loop.call_later(WATCH_SECONDS, begin)

    def halt(self) -> None:
        """Memory is lost: have the vCPUs leave the guest, and nobody use what they would read. Any thread; it
        waits for nobody.
        """
        for thread in self.vcpus:
            thread.stop()
        for worker in self.workers.values():
            worker.kill()

    def adopt(self, config: MachineConfig) -> None:
        """From now on the machine is made of `config`: its disks have other files. Main loop."""
        self.config = config
        for index, disk in enumerate(config.disks):
            if isinstance(disk, DiskConfig):
                opened = self.disk(index)
                opened.config = disk
                if disk.overlay is not None and opened.backing:
                    # What it is above has been moved too, from where a snapshot was being made.
                    below = opened.backing[0]
                    below.config = replace(below.config, path=disk.path)
        self.on_config(config)

    def disk(self, index: int) -> MachineDisk:
        """The files of disk `index`, which is an image of ours."""
        before = sum(isinstance(disk, DiskConfig) for disk in self.config.disks[:index])
        return self._disks[before]

    def exchange_disk(self, index: int, config: DiskConfig | None = None) -> None:
        """Let disk `index` be what `config` says from now on, or what it was: its worker was released. While
        the machine is paused, on a parked vCPU's thread. Raises UserError and OSError.
        """
        from vmrun.machine.workers import DEAD_WORKER_SECONDS

        before = sum(isinstance(disk, DiskConfig) for disk in self.config.disks[:index])
        disk = self._disks[before] if config is None else self._disks.exchange(before, config)
        worker = self.workers[f"blk{index}"]
        channel = self.loop.ask(lambda: worker.launch_another(disk.words, disk.fds))
        process = worker.worker
        try:
            self.devices[f"blk{index}"].restart(channel)
        except ProtocolError as error:
            # Its death says more than its silence, and is known a moment later: the main loop reaps it.
            deadline = time.monotonic() + DEAD_WORKER_SECONDS
            while not (dead := self.loop.ask(process.poll)) and time.monotonic() < deadline:
                time.sleep(0.02)
            raise OSError(process.describe_exit() if dead else str(error)) from None

    @property
    def held(self) -> bool:
        """Whether it was restored to stay paused."""
        return self._saved is not None and self._saved.hold

    def msr_indices(self) -> list[int]:
        """Of the model-specific registers that KVM can save."""
        return self._kvm.msr_indices()

    def cpu_identity(self) -> dict[str, Any]:
        """What processor the guest is used to. Found out when it is saved or restored: most starts need it
        not.
        """
        from vmrun.host.check import cpu_flags
        from vmrun.kvm.identity import cpu_identity

        supported = self._kvm.supported_cpuid()
        return cpu_identity(supported, software=self._software_kvm, host_flags=cpu_flags())

    def memory_source(self) -> OpenMemory | None:
        """Where memory comes from that is not here yet."""
        if self._saved is None or self.lazy is None or not self.lazy.pending:
            return None
        return self._saved.memory

    def macs(self) -> list[str]:
        """Of the cards, in order."""
        return [nic.words["mac"] for nic in self._nics]

    def _stop_vcpus(self) -> None:
        self.pause.release()
        for thread in self.vcpus:
            thread.stop()
        for thread in self.vcpus:
            while not thread.join(STOP_SECONDS) and self.pause.working:
                pass  # a snapshot is being written; it ends by itself
            if thread.join(0):
                continue
            # It waits for a worker, which a reset does until the requests under way are finished; one that
            # was taken over never answers. Without their channels workers finish, flush and end as well.
            for device in self.devices.values():
                device.close()
            if not thread.join(STOP_SECONDS):
                raise OSError(f"vCPU thread {thread.index} does not stop")

    def request_shutdown(self, code: int = 128 + signal.SIGTERM, reason: str = "stopped") -> None:
        """Ask the guest to shut down, as `vmrun.machine.shutdown` says; `code` is for an end that must be
        forced. Any thread, and signal handlers.
        """
        self.loop.call_soon(lambda: self._ask_guest(code, reason, reboot=False))

    def request_reboot(self, code: int = 128 + signal.SIGTERM, reason: str = "rebooted") -> None:
        """Ask the guest to reboot, likewise. The machine ends, and its outcome says `restart`."""
        self.loop.call_soon(lambda: self._ask_guest(code, reason, reboot=True))

    def _ask_guest(self, code: int, reason: str, *, reboot: bool) -> None:
        self.pause.resume()  # a guest that holds still hears nothing
        self.shutdown.request(code, reason, reboot=reboot)

    def end(self, code: int, reason: str, *, restart: bool = False) -> None:
        """End the machine; the first reason given stands. Any thread, and signal handlers."""
        if self.outcome is None:
            self.outcome = Outcome(code, reason, restart)
        self.loop.stop()

    def _end_requested(self, code: int, reason: str) -> None:
        self.end(code, reason, restart=self.shutdown.reboot)

    def _guest_power_off(self) -> None:
        self._end_requested(0, "the guest powered off")

    def _guest_reset(self) -> None:
        self._end_requested(0, "the guest reset the machine")

    def _vcpu_ended(self, index: int, error: BaseException | None) -> None:
        if isinstance(error, GuestHalted):
            # On the loop, behind what the guest's last words to vmmci put there.
            halted = str(error)
            self.loop.call_soon(lambda: self._guest_halted(halted))
        elif error is not None:
            self.end(EXIT_VMM, str(error) or f"vCPU {index}: {type(error).__name__}")

    def _guest_halted(self, how: str) -> None:
        # OpenBSD has no other way to end a machine than this.
        if self.shutdown.expected:
            self._end_requested(0, "the guest shut down")
        else:
            self.end(EXIT_PANIC, how)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        code, reason = 128 + number, f"stopped by {signal.Signals(number).name}"
        if number == signal.SIGTERM and not self._termination_asked:
            self._termination_asked = True
            self.request_shutdown(code, reason)
        else:
            self.end(code, reason)


def _open_disc(path: Path, stack: ExitStack) -> Medium:
    """The image at `path`, open and locked against writers until `stack` is closed."""
    from devices.scsi.medium import Medium

    file = stack.enter_context(closing(OpenDisk(DiskConfig(path, "raw", read_only=True))))
    try:
        return Medium(file.fd)
    except ImageError as error:
        raise UserError(f"--cdrom {path}: {error}", EXIT_IMAGE) from None


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
